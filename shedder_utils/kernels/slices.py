"""Wide MLPs on a CPU: some tokens at a time, so that what lies between their two products stays in the cache.

Zamba2's 10,240 channels, gate and up, are 80 KiB a token in float32. For two sequences of 2,048 that is 320 MiB, which
an MLP writes and reads again several times: with a narrow model most of its time goes there. Tokens do not meet in an
MLP, so slices of them give the same outputs, but for rounding where a product is summed in another order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CACHE = 2**24
"""Bytes that gate and up may take: about the share of a last-level cache that a core has, and far more than the
channels of a small model need, which stay in one piece."""


def in_slices(forward: Callable[..., Tensor], down: str) -> Callable[..., Tensor]:
    """The forward of a gated MLP, (..., D) -> (..., D), in slices of tokens where it is wide and on a CPU.

    down: the attribute with the projection from channels to D. Whole where gradients are taken or torch compiles.
    """

    @functools.wraps(forward)
    def sliced(self: Any, hidden: Tensor, *position: Any) -> Tensor:
        tokens = max(CACHE // (2 * getattr(self, down).in_features * hidden.element_size()), 1)
        whole = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if whole or hidden.device.type != "cpu" or hidden.shape[:-1].numel() <= tokens:
            return forward(self, hidden, *position)
        pieces = hidden.flatten(0, -2).split(tokens)
        return torch.cat([forward(self, piece, *position) for piece in pieces]).view(hidden.shape)

    return sliced
