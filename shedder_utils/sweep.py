"""The sweep: all candidates of a step from one walk through the layers.

Candidates that differ at layer i share everything before it. So one walk carries the unpruned stream and every
variant born so far, runs each layer on all of them, many stacked in a batch, and lets each candidate of that layer join
as a new variant: about half the layer runs of one full pass for each candidate, and large batches. After a removal at
layer r, all that was computed before r still holds; kept streams are where the next walk picks variants up.

A memory budget (`search_memory.py`) bounds how many streams are on their way, and which are kept. Where more variants
would be on their way than it allows, those under way go to the end first: that costs no layer run.

The values equal those of full passes to rounding; `search` settles ties within rounding by full passes.

B batch, L tokens, C candidates, S sequences.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .calibration import Calibration
from .components import Cut
from .distributed import gathered, mine
from .families import Stream, family_of
from .importance import Measure
from .kernels.memory import give_back_freed_memory, room_beside_the_heap
from .out_of_memory import once_smaller
from .removal import removed
from .search_memory import GIB, TOKENS_AT_ONCE, UNPRUNED, Layout, layout


@dataclass
class Variant:
    """The stream of the model without one candidate, for one calibration batch, and the layer runs that led to it."""

    stream: Stream
    runs: int = 0


Stack = dict[Cut | None, Variant]
"""Variants before the same layer, by the candidate that they lack; None is the model without any candidate removed."""


class Sweep:
    """Measures candidates by sweeping; remembers what stays valid from step to step.

    memory_gib: what all streams may take. layer_runs: layers evaluated so far, in layers times sequences; reused: those
    that were spared because their result was kept. Both count all ranks.
    """

    def __init__(self, model: PreTrainedModel, calibration: Calibration, measure: Measure, memory_gib: float) -> None:
        self.model, self.calibration, self.measure = model, calibration, measure
        self.family = family_of(model)
        self.budget = memory_gib * GIB
        self.layout, self.places = Layout({}, most=0, spacing=1), dict[int, set[int]]()
        self.kept: dict[int, dict[int, Stack]] = {number: {} for number, _ in mine(calibration.batches)}
        self.layer_runs = self.reused = 0
        self._runs = self._spared = 0

    def values(self, gone: Sequence[Cut], candidates: Sequence[Cut], progress: tqdm) -> Tensor:
        """(C, S) float64, the measure without each candidate, for a model without `gone`."""
        at = defaultdict(list)
        for candidate in candidates:
            at[self._birth(candidate)].append(candidate)
        self._arrange(at)
        with removed(self.model, gone):
            found = once_smaller(lambda: self._walks(at, candidates, progress), lambda: self._shrink(at))
        values, runs, spared = zip(*gathered(found), strict=True)
        self.layer_runs += sum(runs)
        self.reused += sum(spared)
        return torch.cat(values, dim=1)

    def _walks(
        self, at: dict[int, list[Cut]], candidates: Sequence[Cut], progress: tqdm
    ) -> dict[int, tuple[Tensor, int, int]]:
        """By batch, the values (C, B), the layer runs, and those that were spared."""
        found = {}
        for number, batch in mine(self.calibration.batches):
            self._runs = self._spared = 0
            own = self._walk(number, batch.to(self.model.device), at)
            found[number] = torch.stack([own[candidate] for candidate in candidates]), self._runs, self._spared
            give_back_freed_memory()
            progress.update()
        return found

    def _shrink(self, at: dict[int, list[Cut]]) -> str:
        """Go on with half the budget, and nothing kept."""
        self.budget /= 2
        self.layout, self.kept = Layout({}, most=0, spacing=1), {number: {} for number in self.kept}
        self._arrange(at)
        return f"a search budget of {self.budget / GIB:.2f} GiB"

    def forget(self, removal: Cut) -> None:
        """Drop what a removal made invalid: what was kept after its layer."""
        for stacks in self.kept.values():
            for index in [index for index in stacks if index > self._birth(removal)]:
                del stacks[index]

    def _arrange(self, at: dict[int, list[Cut]]) -> None:
        """Share the budget out anew for more candidates than before, and drop what was kept of others."""
        births = {layer: len(cuts) for layer, cuts in at.items()}
        if any(n > self.layout.births.get(layer, 0) for layer, n in births.items()):
            rows = [self.family.stream_bytes(self.model, batch.shape[1]) * len(batch) for batch in self._batches()]
            self.layout = layout(births, max(rows, default=1), sum(rows), self.budget)
            self.places = {birth: set(self.layout.places(birth)) for birth in (UNPRUNED, *births)}
        wanted = {None, *(cut for cuts in at.values() for cut in cuts)}
        for stacks in self.kept.values():
            for index, stack in list(stacks.items()):
                left = {owner: v for owner, v in stack.items() if owner in wanted and self._has_place(owner, index)}
                del stacks[index]
                if left:
                    stacks[index] = stack if len(left) == len(stack) else _aside(left)

    def _walk(self, number: int, ids: Tensor, at: dict[int, list[Cut]]) -> dict[Cut, Tensor]:
        """The values (B,) of every candidate on one batch."""
        joins, births = self._starts(number, ids, at)
        stack: Stack = {}
        found: dict[Cut, Tensor] = {}
        for index in range(min(joins), len(self.family.layers(self.model))):
            stack |= joins.get(index, {})
            here = births.get(index, [])
            while len(stack) > 1 and len(stack) + len(here) > self.layout.most:
                first = [owner for owner in stack if owner is not None][: self.layout.most]
                found |= self._to_the_end(number, index, {owner: stack.pop(owner) for owner in first}, ids)
            stack = self._past(number, index, stack, here)
            if index == max(births, default=UNPRUNED):
                del stack[None]  # nothing is born any more, so the unpruned stream has done its work
        return found | self._measured(number, stack, ids)

    def _starts(
        self, number: int, ids: Tensor, at: dict[int, list[Cut]]
    ) -> tuple[dict[int, Stack], dict[int, list[Cut]]]:
        """Kept variants by the layer where they join the walk, and the candidates that are still to be born."""
        kept = self.kept[number]
        joins: dict[int, Stack] = defaultdict(dict)
        births: dict[int, list[Cut]] = defaultdict(list)
        for layer, cuts in at.items():
            for cut in cuts:
                latest = max((index for index, stack in kept.items() if cut in stack), default=None)
                if latest is None:
                    births[layer].append(cut)
                else:
                    joins[latest][cut] = kept[latest][cut]
        if births:
            usable = (index for index, stack in kept.items() if None in stack and index <= min(births))
            latest = max(usable, default=0)
            joins[latest][None] = kept[latest][None] if latest else Variant(self.family.start(self.model, ids))
        self._spared += sum(variant.runs for stack in joins.values() for variant in stack.values())
        return joins, births

    def _to_the_end(self, number: int, index: int, stack: Stack, ids: Tensor) -> dict[Cut, Tensor]:
        """The values of variants before a layer, among which nothing is born any more."""
        for later in range(index, len(self.family.layers(self.model))):
            stack = self._past(number, later, stack, [])
        return self._measured(number, stack, ids)

    def _measured(self, number: int, stack: Stack, ids: Tensor) -> dict[Cut, Tensor]:
        """The values of variants after the last layer."""
        found = {}
        for owner, variant in stack.items():
            assert owner is not None
            states = self.family.finish(self.model, variant.stream)
            found[owner] = self.measure.values(self.model, states, ids, number).cpu()
        return found

    def _past(self, number: int, index: int, stack: Stack, here: list[Cut]) -> Stack:
        """Variants after a layer, with those born there; some are kept as they are before it."""
        self._keep(number, index, stack)
        born: Stack = {}
        for cut in here:
            with removed(self.model, [cut]):
                born |= self._step(index, {cut: Variant(stack[None].stream)})
        return self._step(index, stack) | born

    def _step(self, index: int, stack: Stack) -> Stack:
        """Variants after a layer, which runs on some at a time, so that what it needs is bounded. Empties `stack`."""
        layer = self.family.layers(self.model)[index]
        after: Stack = {}
        for group in _groups(stack):
            before = [stack.pop(owner) for owner in group]
            rows, runs = len(before[0].stream["hidden"]), [variant.runs for variant in before]
            joined = _joined(before) if len(before) > 1 else before[0].stream
            del before
            stream = self.family.step(self.model, layer, joined)
            cost = layer_cost(layer) * rows
            self._runs += cost * len(group)
            for place, owner in enumerate(group):
                after[owner] = Variant(_rows(stream, place * rows, rows), runs[place] + cost)
        return after

    def _keep(self, number: int, index: int, stack: Stack) -> None:
        """Keep those variants that have a place before this layer, and are not kept there yet."""
        there = self.kept[number].get(index, {})
        new = {owner: v for owner, v in stack.items() if owner not in there and self._has_place(owner, index)}
        if new:
            self.kept[number][index] = there | _aside(new)

    def _has_place(self, owner: Cut | None, index: int) -> bool:
        return index in self.places[self._birth(owner)]

    def _birth(self, owner: Cut | None) -> int:
        """The layer at which a variant departs from the unpruned stream."""
        return UNPRUNED if owner is None else self.family.layer_of(self.model, owner.component)

    def _batches(self) -> list[Tensor]:
        return [batch for _, batch in mine(self.calibration.batches)]


def layer_cost(layer: torch.nn.Module) -> int:
    """1 for a layer that computes something, 0 for one that is skipped: what a layer run counts."""
    return int(any(True for _ in layer.parameters()))


def _groups(stack: Stack) -> Iterator[list[Cut | None]]:
    """The owners of as many variants at a time as a layer takes."""
    owners = list(stack)
    rows, length = next(iter(stack.values())).stream["hidden"].shape[:2] if stack else (1, 1)
    at_once = max(1, TOKENS_AT_ONCE // (rows * length))
    for first in range(0, len(owners), at_once):
        yield owners[first : first + at_once]


def _joined(variants: Sequence[Variant]) -> Stream:
    """Variants below each other."""
    streams = [variant.stream for variant in variants]
    return {name: torch.cat([stream[name] for stream in streams]) for name in _names(streams)}


def _names(streams: Sequence[Stream]) -> list[str]:
    """The tensors that all of these streams have: what one lacks, no layer to come reads."""
    return [name for name in streams[0] if all(name in stream for stream in streams)]


def _rows(stream: Stream, begin: int, rows: int) -> Stream:
    return {name: tensor[begin : begin + rows] for name, tensor in stream.items()}


def _aside(stack: Stack) -> Stack:
    """A copy of variants in memory that the work on layers, which takes and frees much, does not scatter."""
    streams = [variant.stream for variant in stack.values()]
    rows, kept = len(streams[0]["hidden"]), {}
    for name in _names(streams):
        room = room_beside_the_heap(streams[0][name], rows * len(streams))
        kept[name] = torch.cat([stream[name] for stream in streams], out=room)
    return {
        owner: Variant(_rows(kept, place * rows, rows), variant.runs)
        for place, (owner, variant) in enumerate(stack.items())
    }
