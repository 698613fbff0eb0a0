"""Depthwise causal convolution with SiLU on the CPU, forward and backward, fused.

    a[t] = bias + sum_k weight[k] * x[t - K + 1 + k],   y[t] = silu(a[t])

Nothing lies before the first token but zeros. Sixteen channels share a vector, time is the outer loop. The backward
walks from the end and keeps the last K gradients of `a` in a ring. B batch, L tokens, C channels, K taps (any number;
the models have 2 to 4).
"""

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layout import aligned, needs_gradient, pad_channels
from .simd import STAMP, fill, fma, load, prefetch, sigmoid, store
from .threads import Kernel, at, next_task, own_scratch, unpack

_BLOCKS = 4  # blocks of 16 channels in one task
_AHEAD = 2  # rows to prefetch ahead
_VECTOR = 64  # bytes
_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)


@njit(error_model="numpy", forceinline=True)
def _activation(t, c, K, x, x_t, weight, bias):
    """a[t] for the sixteen channels at c; `x_t` is the address of x[t]."""
    a = load(bias[0], c)
    for k in range(max(0, K - 1 - t), K):
        a = fma(load(at(weight, k, 0), c), load(x_t, (k - K + 1) * x[2] + c), a)
    return a


@njit(error_model="numpy")
def _forward_task(task, groups, L, C, K, silu, x, weight, bias, y):
    b = task // groups
    first = (task - b * groups) * _BLOCKS * 16
    for t in range(L):
        x_t, y_t = at(x, b, t), at(y, b, t)
        for c in range(first, min(first + _BLOCKS * 16, C), 16):
            if t + _AHEAD < L:
                prefetch(x_t, _AHEAD * x[2] + c)
                prefetch(y_t, _AHEAD * y[2] + c)
            a = _activation(t, c, K, x, x_t, weight, bias)
            store(y_t, c, a * sigmoid(a) if silu else a)


@njit(error_model="numpy", forceinline=True)
def _reverse_step(t, c, K, silu, own, x, x_t, weight, bias, dy_t, dx_t):
    """One step back in time for sixteen channels; `own` holds the last K gradients of a (a ring), then dweight (K
    vectors) and dbias."""
    sums = own + K * _VECTOR
    da = load(dy_t, c)
    if silu:
        a = _activation(t, c, K, x, x_t, weight, bias)
        s = sigmoid(a)
        da = da * (s * fma(a, fill(_ONE) - s, fill(_ONE)))
    store(own, t % K * 16, da)
    dx = fill(_ZERO)
    for k in range(K):
        dx = fma(load(at(weight, k, 0), c), load(own, (t + K - 1 - k) % K * 16), dx)
    store(dx_t, c, dx)
    for k in range(max(0, K - 1 - t), K):
        store(sums, k * 16, fma(da, load(x_t, (k - K + 1) * x[2] + c), load(sums, k * 16)))
    store(sums, K * 16, load(sums, K * 16) + da)


@njit(error_model="numpy")
def _backward_task(task, scratch, groups, L, C, K, silu, x, weight, bias, dy, dx, dweight, dbias):
    b = task // groups
    first = (task - b * groups) * _BLOCKS * 16
    end = min(first + _BLOCKS * 16, C)
    own_size = (2 * K + 1) * _VECTOR
    for i in range((end - first) // 16 * (2 * K + 1)):
        store(scratch, i * 16, fill(_ZERO))
    for t in range(L - 1, -1, -1):
        x_t, dy_t, dx_t = at(x, b, t), at(dy, b, t), at(dx, b, t)
        for c in range(first, end, 16):
            if t >= _AHEAD + K:
                prefetch(x_t, c - (_AHEAD + K) * x[2])
                prefetch(dy_t, c - _AHEAD * dy[2])
                prefetch(dx_t, c - _AHEAD * dx[2])
            _reverse_step(t, c, K, silu, scratch + (c - first) // 16 * own_size, x, x_t, weight, bias, dy_t, dx_t)
    for c in range(first, end, 16):
        sums = scratch + (c - first) // 16 * own_size + K * _VECTOR
        for k in range(K):
            store(at(dweight, b, k), c, load(sums, k * 16))
        store(at(dbias, b, 0), c, load(sums, K * 16))


def _kernels(stamp: str) -> tuple[Kernel, Kernel]:
    def forward(array: Any) -> None:
        stamp  # noqa: B018 - part of numba's cache key, see simd.STAMP
        task = next_task(array)
        while task >= 0:
            _forward_task(task, *unpack(array, 5, 4))
            task = next_task(array)

    def backward(array: Any) -> None:
        stamp  # noqa: B018
        scratch = own_scratch(array)
        task = next_task(array)
        while task >= 0:
            _backward_task(task, scratch, *unpack(array, 5, 7))
            task = next_task(array)

    return Kernel(forward), Kernel(backward)


_forward, _backward = _kernels(STAMP)


class _CausalConv(torch.autograd.Function):
    """The convolution as autograd sees it: C a multiple of 16, weight (K, C)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        x, weight, bias, silu, keep = inputs
        batch, L, C = x.shape
        K = weight.shape[0]
        groups = -(-C // (16 * _BLOCKS))
        x = aligned(x)
        y = torch.empty(batch, L, C)
        _forward(batch * groups, (groups, L, C, K, silu), (x, weight, bias, y), work=batch * L * C * (K + 20) // 16)
        if keep:
            ctx.save_for_backward(x, weight, bias)
            ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, weight, bias = ctx.saved_tensors
        batch, L, C = x.shape
        K = weight.shape[0]
        groups = -(-C // (16 * _BLOCKS))
        dx, dweight, dbias = torch.empty(batch, L, C), torch.empty(batch, K, C), torch.empty(batch, C)
        _backward(
            batch * groups,
            (groups, L, C, K, ctx.silu),
            (x, weight, bias, aligned(dy), dx, dweight, dbias),
            scratch=16 * _BLOCKS * (2 * K + 1),
            work=batch * L * C * (4 * K + 30) // 16,
        )
        return dx, dweight.sum(0), dbias.sum(0), None, None


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    """Depthwise causal convolution over the tokens, then SiLU; differentiable in every tensor.

    Args: x (B, L, C); weight (C, K), the last tap being the current token's; bias (C,). CPU tensors of float32,
    bfloat16 or float16; arithmetic is in float32.
    Returns: (B, L, C) in x's dtype. Matches causal_conv1d's `causal_conv1d_fn`, here with the channels last.
    """
    C = x.shape[-1]
    offset = weight.new_zeros(C, dtype=torch.float32) if bias is None else bias
    arguments = pad_channels(x), pad_channels(weight.t()).contiguous(), pad_channels(offset).contiguous()
    y = _CausalConv.apply(*arguments, silu, needs_gradient(*arguments))
    return y[..., :C].to(x.dtype)
