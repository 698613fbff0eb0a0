"""Mamba (Mamba-1, the S6 scan) and Falcon-Mamba, which adds norms on B, C and dt.

Without its SSM the mixer computes out_proj(silu(conv(x)) * silu(z)), where [x | z] = in_proj(u). Dead are then x_proj,
dt_proj, A_log and D (and Falcon-Mamba's norms on dt, B and C, which have no weights of their own).

B batch, L tokens, E inner width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.models.mamba import modeling_mamba

from .finer_kinds import Mamba1Shape
from .mamba_like import MambaLike, MixerWithoutSSM


class MambaMixerWithoutSSM(MixerWithoutSSM):
    """The Mamba-1 mixer without its scan."""

    modeling = modeling_mamba

    def forward(
        self, hidden_states: Tensor, cache_params: Cache | None = None, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        """Output (B, L, D) of the mixer for its normed input (B, L, D); attention_mask (B, L), 0 at padding."""
        masked = self.modeling.apply_mask_to_padding_states
        x, gate = self.in_proj(masked(hidden_states, attention_mask)).transpose(1, 2).chunk(2, dim=1)
        x = masked(self.convolve(x, cache_params).transpose(1, 2), attention_mask)
        return self.out_proj(x * self.act(gate.transpose(1, 2)))


class Mamba(MambaLike):
    """Mamba-1 and Falcon-Mamba."""

    models = ("mamba", "falcon_mamba")
    finer = ("inner_channels", "states")
    mixer_without_ssm = MambaMixerWithoutSSM

    def shape(self, config: Any) -> Mamba1Shape:
        return Mamba1Shape(
            D=config.hidden_size, E=config.intermediate_size, N=config.state_size, R=int(config.time_step_rank),
            K=config.conv_kernel, bias=config.use_bias, conv_bias=config.use_conv_bias,
        )  # fmt: skip

    def flops_beside_weights(self, module: nn.Module, tokens: int) -> float:
        """The scan: for each element of the state (E, N), exp(dt A), dt B x, the update and its product with C."""
        return 7.0 * tokens * module.A_log.numel() if hasattr(module, "A_log") else 0.0

    def dead_in_mixer(self, mixer: nn.Module) -> int:
        dead = [*mixer.x_proj.parameters(), *mixer.dt_proj.parameters(), mixer.A_log, mixer.D]
        return sum(parameter.numel() for parameter in dead)
