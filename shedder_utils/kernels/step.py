"""Decoding on the CPU: one token's update of a Mamba-1 or Mamba-2 state, and of the convolution's window.

These run on transformers' own cache layout, state size innermost, so the sixteen lanes lie along the state and each
channel's output is a horizontal sum. In place and not differentiable. B batch, R channels (Mamba-1: E; Mamba-2: heads
times head width), H heads, P head width (Mamba-1: H = R, P = 1), G groups, N state size, K convolution taps.
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.graph import increment_version

from .simd import (
    LANES,
    LOG2_E,
    STAMP,
    exp2,
    fill,
    flush,
    fma,
    load,
    load_scalar,
    sigmoid,
    softplus,
    spread,
    store,
    store_scalar,
    total,
)
from .threads import Kernel, at, next_task, own_scratch, unpack

_SCALE = np.float32(LOG2_E)
_ZERO = np.float32(0.0)


@njit(error_model="numpy", forceinline=True)
def _by_head(vector, r0, P):
    """The values of sixteen channels from one for each head; the sixteen lie in one head, or are a head each."""
    return load(vector, r0) if P == 1 else spread(vector, r0 // P)


@njit(error_model="numpy")
def _state_task(task, scratch, R, P, G, N, one_decay, use_softplus, state, x, dt, A, B, C, D, z, bias, y):
    """Sixteen channels of one sequence."""
    blocks = R // 16
    b = task // blocks
    r0 = (task - b * blocks) * 16
    delta = _by_head(at(dt, b, 0), r0, P) + _by_head(bias[0], r0, P)
    if use_softplus:
        delta = softplus(delta)
    now = load(at(x, b, 0), r0)
    store(scratch, 0, delta * fill(_SCALE))
    store(scratch, 16, delta * now)
    for i in range(16):
        row, A_row = at(state, b, r0 + i), at(A, (r0 + i) // P, 0)
        group = (r0 + i) * G // R
        scale, scaled = spread(scratch, i), spread(scratch, 16 + i)
        out = fill(_ZERO)
        decay = exp2(scale * spread(A_row, 0))
        for n in range(0, N, 16):
            if not one_decay:
                decay = exp2(scale * load(A_row, n))
            h = flush(fma(decay, load(row, n), scaled * load(at(B, b, group), n)))
            store(row, n, h)
            out = fma(h, load(at(C, b, group), n), out)
        store_scalar(scratch, 32 + i, total(out))
    out = fma(_by_head(D[0], r0, P), now, load(scratch, 32))
    if z[0]:
        gate = load(at(z, b, 0), r0)
        out = out * (gate * sigmoid(gate))
    store(at(y, b, 0), r0, out)


@njit(error_model="numpy")
def _window_task(task, scratch, C, K, silu, window, x, weight, bias, y):
    """Sixteen channels of one sequence: move their windows on by one token, then convolve."""
    blocks = C // 16
    b = task // blocks
    c0 = (task - b * blocks) * 16
    for i in range(16):
        row, taps = at(window, b, c0 + i), at(weight, c0 + i, 0)
        out = load_scalar(bias[0], c0 + i)
        for k in range(K):
            value = load_scalar(row, k + 1) if k < K - 1 else load_scalar(at(x, b, 0), c0 + i)
            store_scalar(row, k, value)
            out += value * load_scalar(taps, k)
        store_scalar(scratch, i, out)
    a = load(scratch, 0)
    store(at(y, b, 0), c0, a * sigmoid(a) if silu else a)


def _kernels(stamp: str) -> tuple[Kernel, Kernel]:
    def update_state(array: Any) -> None:
        stamp  # noqa: B018 - part of numba's cache key, see simd.STAMP
        scratch = own_scratch(array)
        task = next_task(array)
        while task >= 0:
            _state_task(task, scratch, *unpack(array, 6, 10))
            task = next_task(array)

    def update_window(array: Any) -> None:
        stamp  # noqa: B018
        scratch = own_scratch(array)
        task = next_task(array)
        while task >= 0:
            _window_task(task, scratch, *unpack(array, 3, 5))
            task = next_task(array)

    return Kernel(update_state), Kernel(update_window)


_update_state, _update_window = _kernels(STAMP)


def can_update(state: Tensor, channels: int, lanes: int) -> bool:
    """Whether these kernels can update `state`: float32, contiguous, widths multiples of 16, and no autograd."""
    fits = channels % LANES == 0 and lanes % LANES == 0
    return fits and state.dtype == torch.float32 and state.is_contiguous() and not torch.is_grad_enabled()


def _rows(x: Tensor) -> Tensor:
    """`x` in float32 with its last dimension contiguous; without a copy wherever that is so."""
    x = x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor | None,
    dt_bias: Tensor,
    softplus: bool,
) -> Tensor:
    """Advance `state` (B, R, N) by one token, in place.

    Returns: the output (B, R), float32.
    Args: x, z (B, R); dt (B, H); A (H, N), or (H,) where a head has one decay; B, C (B, G, N); D, dt_bias (H,). H is R,
    or R is H heads of a multiple of 16 channels.
    """
    batch, R, N = state.shape
    x, dt, A, B, C, D, dt_bias = (_rows(tensor) for tensor in (x, dt, A, B, C, D, dt_bias))
    z = None if z is None else _rows(z)
    y = torch.empty(batch, R)
    H = dt.shape[1]
    A = A.view(H, -1)
    integers = (R, R // H, B.shape[1], N, A.shape[1] == 1, softplus)
    tensors = (state, x, dt, A, B, C, D, z, dt_bias, y)
    _update_state(batch * R // LANES, integers, tensors, scratch=48, work=batch * R * N)
    increment_version(state)
    return y


def window_update(window: Tensor, x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    """Advance the convolution's `window` (B, C, K) by the token x (B, C), in place.

    Returns: the output (B, C), float32.
    Args: weight (C, K), the last tap being the new token's; bias (C,).
    """
    batch, C, K = window.shape
    x, weight, bias = _rows(x), _rows(weight), _rows(bias)
    y = torch.empty(batch, C)
    _update_window(batch * C // LANES, (C, K, silu), (window, x, weight, bias, y), scratch=16, work=batch * C)
    increment_version(window)
    return y
