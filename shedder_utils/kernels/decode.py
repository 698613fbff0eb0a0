"""One token through transformers' Mamba mixers on the CPU, with little around the arithmetic.

Their own `forward` is written for any number of tokens, with and without a cache. For one token it makes some sixty
small operations, most of which move, mask, repeat or convert, and a small model's decoding takes its time there. Here
are the same formulas in a dozen. Projections and norms are called as modules, so that adapters and hooks see them.

B batch, D model width, E inner width, G groups, N state size, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from .simd import LANES
from .step import can_update, state_update, window_update

Mixer = Any
"""A mixer of Mamba, Falcon-Mamba, Mamba-2 or Zamba2."""


def can_step(mixer: Mixer, u: Tensor, cache: Cache | None, mask: Tensor | None) -> bool:
    """Whether these functions can take a mixer's input u (B, L, D): one token in float32, after others, no autograd."""
    if cache is None or mask is not None or u.shape[1] != 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    state, window, convolution = *_states(mixer, cache), mixer.conv1d
    tensors = (u, convolution.weight, mixer.A_log)
    floats = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    if not floats or state is None or window is None or cache.is_recording_past(mixer.layer_idx):
        return False
    known = mixer.activation in ("silu", "swish") and convolution.bias is not None
    whole_heads = not hasattr(mixer, "head_dim") or mixer.head_dim % LANES == 0
    fits = can_update(state, mixer.intermediate_size, state.shape[-1]) and can_update(window, window.shape[1], LANES)
    return known and whole_heads and fits


def step(mixer: Mixer, u: Tensor, cache: Cache) -> Tensor:
    """The mixer's output (B, 1, D) for one token u (B, 1, D), its states in the cache moved on."""
    inside = _mamba if hasattr(mixer, "x_proj") else _mamba2
    state, window = _states(mixer, cache)
    y: Tensor = mixer.out_proj(inside(mixer, mixer.in_proj(u)[:, 0], state, window)[:, None])
    return y


def _states(mixer: Mixer, cache: Cache) -> tuple[Any, Any]:
    return cache.get_recurrent_state(mixer.layer_idx), cache.get_conv_state(mixer.layer_idx)


def _convolved(mixer: Mixer, x: Tensor, window: Tensor) -> Tensor:
    return window_update(window, x, mixer.conv1d.weight[:, 0], mixer.conv1d.bias, silu=True)


def _mamba(mixer: Mixer, projected: Tensor, state: Tensor, window: Tensor) -> Tensor:
    """What out_proj reads (B, E), from what in_proj gave (B, 2 E); Falcon-Mamba has norms on dt, B and C."""
    x, gate = projected.chunk(2, dim=-1)
    x = _convolved(mixer, x, window)
    N = state.shape[-1]
    dt, B, C = mixer.x_proj(x[:, None]).split([mixer.time_step_rank, N, N], dim=-1)
    if hasattr(mixer, "dt_layernorm"):
        dt, B, C = mixer.dt_layernorm(dt), mixer.b_layernorm(B), mixer.c_layernorm(C)
    dt = F.linear(dt[:, 0], mixer.dt_proj.weight)
    A = -torch.exp(mixer.A_log)
    return state_update(state, x, dt, A, B, C, mixer.D, gate, mixer.dt_proj.bias, softplus=True)


def _mamba2(mixer: Mixer, projected: Tensor, state: Tensor, window: Tensor) -> Tensor:
    """What out_proj reads (B, E), from what in_proj gave (B, 2 E + 2 G N + H)."""
    E, G, N = mixer.intermediate_size, mixer.n_groups, state.shape[-1]
    gate, convolved, dt = projected.split([E, E + 2 * G * N, mixer.num_heads], dim=-1)
    x, B, C = _convolved(mixer, convolved, window).split([E, G * N, G * N], dim=-1)
    B, C = B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
    A = -torch.exp(mixer.A_log)
    y = state_update(state.flatten(1, 2), x, dt, A, B, C, mixer.D, None, mixer.dt_bias, softplus=True)
    normed: Tensor = mixer.norm(y, gate)
    return normed
