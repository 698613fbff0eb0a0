"""Variants: the streams of models that differ by one removal, stacked through a layer, or set aside for later.

B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from .components import Cut
from .families import Stream, family_of
from .kernels.memory import room_beside_the_heap
from .search_memory import TOKENS_AT_ONCE

T = TypeVar("T", bound=Hashable)
"""Whose stream it is."""


@dataclass
class Variant:
    """The stream of a model for one calibration batch, and the layer runs that led to it."""

    stream: Stream
    runs: int = 0


Stack = dict[Cut, Variant]
"""Variants before the same layer, by the candidate that they lack."""


def layer_cost(layer: nn.Module) -> int:
    """1 for a layer that computes something, 0 for one that is skipped: what a layer run counts."""
    return int(any(True for _ in layer.parameters()))


def through(model: PreTrainedModel, layer: nn.Module, stack: dict[T, Variant]) -> tuple[dict[T, Variant], int]:
    """Variants after a layer, and the layer runs it took. Empties `stack`.

    The layer runs on some at a time, below each other, so that what it needs is bounded; on one alone it computes bit
    for bit what a full pass does.
    """
    after: dict[T, Variant] = {}
    made = 0
    for group in _groups(stack):
        before = [stack.pop(owner) for owner in group]
        rows, runs = len(before[0].stream["hidden"]), [variant.runs for variant in before]
        stream = _joined(before)
        del before
        stream = family_of(model).step(model, layer, stream)
        cost = layer_cost(layer) * rows
        made += cost * len(group)
        for place, owner in enumerate(group):
            after[owner] = Variant(_rows(stream, place * rows, rows), runs[place] + cost)
    return after, made


def set_aside(variants: dict[T, Variant]) -> dict[T, Variant]:
    """A copy of variants in memory that the work on layers, which takes and frees much, does not scatter."""
    streams = [variant.stream for variant in variants.values()]
    rows, kept = len(streams[0]["hidden"]), {}
    for name in _names(streams):
        widest = max((stream[name] for stream in streams), key=lambda tensor: tensor.itemsize)
        room = room_beside_the_heap(widest, rows * len(streams))
        kept[name] = torch.cat([stream[name] for stream in streams], out=room)
    return {
        owner: Variant(_rows(kept, place * rows, rows), variant.runs)
        for place, (owner, variant) in enumerate(variants.items())
    }


def _groups(stack: dict[T, Variant]) -> Iterator[list[T]]:
    """As many variants at a time as a layer takes."""
    owners = list(stack)
    rows, length = next(iter(stack.values())).stream["hidden"].shape[:2] if stack else (1, 1)
    at_once = max(1, TOKENS_AT_ONCE // (rows * length))
    for first in range(0, len(owners), at_once):
        yield owners[first : first + at_once]


def _joined(variants: Sequence[Variant]) -> Stream:
    """Variants below each other."""
    streams = [variant.stream for variant in variants]
    if len(streams) == 1:
        return streams[0]
    return {name: torch.cat([stream[name] for stream in streams]) for name in _names(streams)}


def _names(streams: Sequence[Stream]) -> list[str]:
    """The tensors that all of these streams have: what one lacks, no layer to come reads."""
    return [name for name in streams[0] if all(name in stream for stream in streams)]


def _rows(stream: Stream, begin: int, rows: int) -> Stream:
    return {name: tensor[begin : begin + rows] for name, tensor in stream.items()}
