"""Hymba's hybrid heads: attention and Mamba side by side on one projection.

    [q | k | v | x | gate] = in_proj(u)
    out_proj((norm1(attention(q, k, v)) + norm2(ssm(x, gate))) / 2)

Some layers have no k and v of their own and take those of the layer before. The Mamba functions are those of
transformers' Mamba, looked up at each call: CUDA kernels where they are installed, this package's CPU scans after
`kernels.install()`.

B batch, L tokens, D model width, E inner width, N state size, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.models.mamba import modeling_mamba as scans
from transformers.models.mamba.modeling_mamba import MambaRMSNorm as RMSNorm

from .cache import HymbaCache
from .configuration import HymbaConfig

KeysValues = tuple[Tensor, Tensor]
"""Rotated keys (B, key-value heads, T, query width) and values (B, key-value heads, T, value width)."""


@dataclass(frozen=True)
class Pass:
    """What all layers have in common in one pass over the tokens.

    cos, sin: (L, query width), the rotations; everything, window: bool masks (L, keys) or (B, 1, L, keys) of the global
    and the other layers, None where plain causal attention is the same; real: bool (B, L, 1), False at padding, None if
    there is none; cache: None without one; first: whether nothing was read before.
    """

    cos: Tensor
    sin: Tensor
    everything: Tensor | None
    window: Tensor | None
    real: Tensor | None
    cache: HymbaCache | None
    first: bool


class HymbaMixer(nn.Module):
    """The hybrid heads of one layer: attention and Mamba on parts of one projection."""

    def __init__(self, config: HymbaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.reuses, self.is_global = config.reuses(layer_idx), config.is_global(layer_idx)
        D, E, N, rank = config.hidden_size, config.inner_size, config.mamba_d_state, config.mamba_dt_rank
        eps = config.rms_norm_eps
        q, groups = config.num_attention_heads * config.kq_head_dim, config.num_key_value_heads
        kv = 0 if self.reuses else groups
        self.widths: dict[str, int] = {
            "q": q,
            "k": kv * config.kq_head_dim,
            "v": kv * config.v_head_dim,
            "x": E,
            "gate": E,
        }
        self.in_proj = nn.Linear(D, sum(self.widths.values()), bias=False)
        self.conv1d = nn.Conv1d(E, E, config.mamba_d_conv, groups=E, padding=config.mamba_d_conv - 1)
        self.x_proj = nn.ModuleList([nn.Linear(E, rank + 2 * N, bias=False)])
        self.dt_proj = nn.ModuleList([nn.Linear(rank, E)])
        self.A_log = nn.ParameterList([torch.empty(E, N)])
        self.D = nn.ParameterList([torch.empty(E)])
        self.dt_layernorm, self.B_layernorm, self.C_layernorm = RMSNorm(rank, eps), RMSNorm(N, eps), RMSNorm(N, eps)
        self.pre_avg_layernorm1, self.pre_avg_layernorm2 = RMSNorm(E, eps), RMSNorm(E, eps)
        self.out_proj = nn.Linear(E, D, bias=False)

    def forward(self, u: Tensor, here: Pass, shared: KeysValues | None) -> tuple[Tensor, KeysValues | None]:
        """What the heads add (B, L, D) for normed input u (B, L, D), and the keys and values they used."""
        parts = self.project(u)
        keys_values = shared if self.reuses else self.keys_and_values(parts["k"], parts["v"], here)
        a = self.pre_avg_layernorm1(self.attention(parts["q"], keys_values, here))
        y = self.pre_avg_layernorm2(self.ssm(self.convolution(parts["x"], here), parts["gate"], here))
        return self.out_proj((a + y) / 2), keys_values

    def project(self, u: Tensor) -> dict[str, Tensor]:
        """The parts of the projection, each (B, L, its width)."""
        return dict(zip(self.widths, self.in_proj(u).split(list(self.widths.values()), dim=-1), strict=True))

    def keys_and_values(self, k: Tensor, v: Tensor, here: Pass) -> KeysValues:
        """Keys and values of this pass, after those that the cache holds."""
        config = self.config
        keys = rotated(heads(k, config.kq_head_dim), here.cos, here.sin)
        values = heads(v, config.v_head_dim)
        return (keys, values) if here.cache is None else here.cache.update(keys, values, self.layer_idx)

    def attention(self, q: Tensor, keys_values: KeysValues, here: Pass) -> Tensor:
        """(B, L, E), the attention of q (B, L, H * query width)."""
        width, (keys, values) = self.config.kq_head_dim, keys_values
        queries = rotated(heads(q, width), here.cos, here.sin)
        # Torch's fast kernels want queries and keys as wide as values: zeros change no product.
        queries, keys = (F.pad(x, (0, max(0, values.shape[-1] - width))) for x in (queries, keys))
        mask = here.everything if self.is_global else here.window
        a = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=mask is None and q.shape[1] > 1, scale=width**-0.5,
            enable_gqa=True,
        )  # fmt: skip
        return a.transpose(1, 2).flatten(2)

    def convolution(self, x: Tensor, here: Pass) -> Tensor:
        """silu(conv(x)) for x (B, L, E), zero at padding, continuing from the cache."""
        length, weight, bias = x.shape[1], self.conv1d.weight.squeeze(1), self.conv1d.bias
        x = masked(x, here.real).transpose(1, 2)
        if here.cache is not None and not here.first and length == 1:
            state = here.cache.get_conv_state(self.layer_idx)
            y = scans.causal_conv1d_update(x, state, weight, bias, activation="silu")
        else:
            if here.cache is not None:
                x = here.cache.update_conv_state(x, self.layer_idx, conv_kernel_size=weight.shape[1])
            y = scans.causal_conv1d_fn(x, weight, bias, activation="silu")[..., -length:]
        return masked(y.transpose(1, 2), here.real)

    def ssm(self, x: Tensor, gate: Tensor, here: Pass) -> Tensor:
        """(B, L, E), the gated scan of x (B, L, E), continuing from the cache."""
        N, rank = self.config.mamba_d_state, self.config.mamba_dt_rank
        dt, B, C = self.x_proj[0](x).split([rank, N, N], dim=-1)
        dt = F.linear(self.dt_layernorm(dt), self.dt_proj[0].weight)  # its bias is added within the scan, in float32
        B, C = self.B_layernorm(B), self.C_layernorm(C)
        A, D, bias = -torch.exp(self.A_log[0].float()), self.D[0].float(), self.dt_proj[0].bias.float()
        if here.first:
            x, dt, B, C, gate = (part.transpose(1, 2) for part in (x, dt, B, C, gate))
            y, state = scans.mamba_selective_scan(
                x, dt, A, B, C, D=D, z=gate, delta_bias=bias, delta_softplus=True, return_last_state=True
            )
            if here.cache is not None:
                here.cache.update_recurrent_state(state, self.layer_idx)
            return y.transpose(1, 2).to(x.dtype)
        state = here.cache.get_recurrent_state(self.layer_idx)
        outputs = [
            scans.mamba_selective_state_update(
                state, x[:, t], dt[:, t], A, B[:, t], C[:, t], D, z=gate[:, t], dt_bias=bias, dt_softplus=True
            )
            for t in range(x.shape[1])
        ]
        return torch.stack(outputs, dim=1).to(x.dtype)

    @torch.no_grad()
    def init_scan(self) -> None:
        """A, D and the bias of dt as transformers' Mamba initialises them: decays 1 to N, steps from 0.001 to 0.1."""
        A = torch.arange(1, self.config.mamba_d_state + 1, dtype=torch.float32, device=self.A_log[0].device)
        init.copy_(self.A_log[0], A.log().expand_as(self.A_log[0]))
        init.ones_(self.D[0])
        init.kaiming_uniform_(self.conv1d.weight, a=math.sqrt(5))
        weight, bias = self.dt_proj[0].weight, self.dt_proj[0].bias
        init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)
        low, high = math.log(1e-3), math.log(1e-1)
        dt = torch.exp(low + (high - low) * torch.rand(bias.shape, device=bias.device))
        init.copy_(bias, dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt


def heads(x: Tensor, width: int) -> Tensor:
    """(B, heads, L, width) from (B, L, heads * width)."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def masked(x: Tensor, real: Tensor | None) -> Tensor:
    """x (B, L, E) with zeros where `real` (B, L, 1) is False."""
    return x if real is None else x.masked_fill(~real, 0.0)


def rotations(places: Tensor, config: HymbaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, (L, query width), of rotary embeddings with a base stretched for the longer context (NTK)."""
    width = config.kq_head_dim
    stretch = 2 * config.max_position_embeddings / config.orig_max_position_embeddings - 1
    base = config.rope_theta * stretch ** (width / (width - 2))
    frequencies = base ** -(torch.arange(0, width, 2, device=places.device, dtype=torch.float32) / width)
    angles = torch.outer(places.float(), frequencies).repeat(1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, heads, L, width) turned by its places: the first half of its width is paired with the second."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def visible(queries: Tensor, keys: Tensor, window: int, n_meta: int, padding: Tensor | None) -> Tensor:
    """Which keys a query sees: bool (L, keys), or (B, 1, L, keys) with padding (B,).

    queries (L,) and keys (keys,) are places in the stream. A key is seen from later places if it is a meta token or at
    most `window` places back; padding is not. Every place sees itself, so that padding has a finite result.
    """
    i, j = queries[:, None], keys
    before = 0 if padding is None else padding[:, None, None, None]
    seen = (j <= i) & (j >= before) & ((i - j <= window) | (j < before + n_meta))
    return seen | (i == j)
