"""Mamba-2 (SSD): one decay per head, B and C shared by the heads of a group and convolved together with x.

in_proj yields [z | x | B | C | dt]. Without its SSM the mixer computes out_proj(norm(silu(conv(x)), z)) with the gated
norm in place. Dead are then the rows of B, C and dt in in_proj, their convolution channels, A_log, D and dt_bias.

B batch, L tokens, E inner width, G groups, N state size, H heads.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.mamba2 import modeling_mamba2

from .finer_kinds import Mamba2Shape
from .mamba_like import MambaLike, MixerWithoutSSM


class Mamba2MixerWithoutSSM(MixerWithoutSSM):
    """The Mamba-2 mixer without its scan."""

    modeling = modeling_mamba2

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__(mixer)
        self.norm = mixer.norm
        self.num_heads, self.head_dim, self.n_groups = mixer.num_heads, mixer.head_dim, mixer.n_groups

    def forward(
        self, hidden_states: Tensor, cache_params: Cache | None = None, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Output (B, L, D) of the mixer for its normed input (B, L, D); attention_mask (B, L), 0 at padding."""
        masked = self.modeling.apply_mask_to_padding_states
        gate, x = self.in_proj(masked(hidden_states, attention_mask)).chunk(2, dim=-1)
        x = masked(self.convolve(x.transpose(1, 2), cache_params).transpose(1, 2), attention_mask)
        return self.out_proj(self.norm(x, gate).to(hidden_states.dtype))


class Mamba2(MambaLike):
    """Mamba-2."""

    models = ("mamba2",)
    finer = ("heads", "states")
    mixer_without_ssm = Mamba2MixerWithoutSSM

    def shape(self, config: Any) -> Mamba2Shape:
        return Mamba2Shape(
            D=config.hidden_size, H=config.num_heads, P=config.head_dim, N=config.state_size, G=config.n_groups,
            K=config.conv_kernel, bias=config.use_bias, conv_bias=config.use_conv_bias,
        )  # fmt: skip

    def flops_beside_weights(self, module: nn.Module, tokens: int) -> float:
        return scan_flops(module, tokens)

    def dead_in_mixer(self, mixer: nn.Module) -> int:
        return dead_without_ssm(mixer)


def dead_without_ssm(mixer: nn.Module) -> int:
    """Parameters of a Mamba-2 mixer that nothing reads when its SSM is gone."""
    in_proj_rows = mixer.in_proj.out_features - 2 * mixer.intermediate_size
    channels = mixer.conv1d.out_channels - mixer.intermediate_size
    in_conv = channels * (mixer.conv1d.kernel_size[0] + (mixer.conv1d.bias is not None))
    return in_proj_rows * (mixer.hidden_size + (mixer.in_proj.bias is not None)) + in_conv + 3 * mixer.num_heads


def scan_flops(module: nn.Module, tokens: int) -> float:
    """Of a Mamba-2 mixer's scan, as a recurrence: for each element of the state (H, P, N), dt B x, update and C.

    0 for any other module, and for a mixer without its SSM.
    """
    if not hasattr(module, "A_log"):
        return 0.0
    width, state = int(module.intermediate_size), int(module.ssm_state_size)
    return 5.0 * tokens * width * state
