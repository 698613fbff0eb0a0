"""Bringing tensors into the form the kernels read: float32, channels innermost, a multiple of 16, rows at any stride.

A slice of a projection's output, or a transposed view of such a tensor, satisfies this without a copy; a tensor with
the tokens innermost is transposed tile by tile, which takes a fraction of the time of torch's general copy. B batch, L
tokens, C channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

from .simd import LANES, STAMP, load_scalar, store_scalar, transpose_tile
from .threads import Kernel, at, next_task, unpack


@njit(error_model="numpy")
def _transpose_task(task, L, C, x, y):
    """Sixteen channels of one sequence, from (B, C, L) to (B, L, C)."""
    blocks = C // 16
    b = task // blocks
    c = (task - b * blocks) * 16
    source = at(x, b, c)
    target = at(y, b, 0) + 4 * c
    whole = L // 16 * 16
    for t in range(0, whole, 16):
        transpose_tile(source + 4 * t, x[2], target + 4 * t * C, C)
    for t in range(whole, L):
        for i in range(16):
            store_scalar(target, t * C + i, load_scalar(source, i * x[2] + t))


def _kernel(stamp: str) -> Kernel:
    def transpose(array: Any) -> None:
        stamp  # noqa: B018 - part of numba's cache key, see simd.STAMP
        task = next_task(array)
        while task >= 0:
            _transpose_task(task, *unpack(array, 2, 2))
            task = next_task(array)

    return Kernel(transpose)


_transpose = _kernel(STAMP)


def aligned(x: Tensor | None) -> Tensor | None:
    """`x`, float32 (..., C), or a copy whose last dimension is contiguous; None stays None. Not differentiable."""
    if x is None or x.stride(-1) == 1:
        return x
    if x.dim() != 3 or x.stride(1) != 1 or x.shape[2] % LANES:
        return x.contiguous()
    batch, L, C = x.shape
    y = torch.empty(batch, L, C)
    _transpose(batch * C // 16, (L, C), (x.transpose(1, 2), y), work=batch * L * C // 4)
    return y


def pad_channels(x: Tensor) -> Tensor:
    """`x` in float32 with the last dimension filled up with zeros to a multiple of 16. Differentiable."""
    missing = -x.shape[-1] % LANES
    return F.pad(x.float(), (0, missing)) if missing else x.float()


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd has to record an operation on these."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
