"""MLPs with only their first channels (Algorithm 2), and other parts of layers that share memory with the whole.

A channel is a row of the gate and up projections and a column of the down projection:

    down(act(gate(x)) * up(x))

Zamba2 keeps gate and up in one matrix, gate first, and adds to it a low-rank adapter of the position.

B batch, L tokens, D model width, I channels, R adapter rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.slices import in_slices


class NarrowMLP(nn.Module):
    """A gated MLP that shares memory with the one it is made from.

    gate, up: (D -> I); down: (I -> D); act: the activation. adapter: none, or its first layer (D -> R) and the gate's
    and the up's part of its second (R -> I).
    """

    def __init__(
        self,
        gate: nn.Linear,
        up: nn.Linear,
        down: nn.Linear,
        act: Callable[[Tensor], Tensor],
        adapter: Iterable[nn.Linear] = (),
    ) -> None:
        super().__init__()
        self.gate, self.up, self.down, self.act = gate, up, down, act
        self.adapter = nn.ModuleList(adapter)

    @partial(in_slices, down="down")
    def forward(self, hidden: Tensor, *_: Any) -> Tensor:
        """Output (B, L, D) for the normed input (B, L, D)."""
        gate, up = self.gate(hidden), self.up(hidden)
        if self.adapter:
            first, to_gate, to_up = self.adapter
            low = first(hidden)
            gate, up = gate + to_gate(low), up + to_up(low)
        return self.down(self.act(gate) * up)

    def first(self, kept: int) -> NarrowMLP:
        """The MLP of the first `kept` channels."""
        adapter = [*self.adapter[:1], *(rows(half, 0, kept) for half in self.adapter[1:])]
        narrow = NarrowMLP(
            rows(self.gate, 0, kept), rows(self.up, 0, kept), columns(self.down, kept), self.act, adapter
        )
        return narrow.train(self.training)


def rows(linear: nn.Linear, begin: int, end: int) -> nn.Linear:
    """The linear layer that computes outputs `begin` to `end` only, sharing memory with `linear`."""
    part = nn.Linear(linear.in_features, end - begin, bias=linear.bias is not None, device="meta")
    part.weight = _view(linear.weight, (slice(begin, end),))
    if linear.bias is not None:
        part.bias = _view(linear.bias, (slice(begin, end),))
    return part


def columns(linear: nn.Linear, end: int) -> nn.Linear:
    """The linear layer that reads the first `end` inputs only, sharing memory with `linear`."""
    part = nn.Linear(end, linear.out_features, bias=linear.bias is not None, device="meta")
    part.weight = _view(linear.weight, (slice(None), slice(end)))
    part.bias = linear.bias
    return part


def _view(parameter: Tensor, part: tuple[slice, ...]) -> nn.Parameter:
    with torch.no_grad():
        return nn.Parameter(parameter[part], requires_grad=parameter.requires_grad)
