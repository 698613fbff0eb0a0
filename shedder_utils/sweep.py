"""The sweep: all candidates of a step from one walk through the layers.

Candidates that differ at layer i share everything before it. So one walk carries the unpruned stream and every
variant born so far, runs each layer on all of them, many stacked in a batch, and lets each candidate of that layer join
as a new variant: about half the layer runs of one full pass for each candidate, and large batches. After a removal at
layer r, all that was computed before r still holds; kept streams are where the next walk picks variants up.

The unpruned stream runs by itself, so that it is bit for bit that of a full pass. The full pass that settles a removal
starts from what is kept of it, and leaves behind the unpruned stream of the next step.

A memory budget (`search_memory.py`) bounds how many streams are on their way, and which are kept. Where more variants
would be on their way than it allows, those under way go to the end first: that costs no layer run.

The values of variants equal those of full passes to rounding; `search` settles ties within rounding by full passes.

B batch, L tokens, C candidates, S sequences.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .calibration import Calibration
from .candidates import with_candidate
from .components import Cut
from .distributed import gathered, mine
from .families import Stream, family_of
from .importance import Measure
from .kernels.memory import give_back_freed_memory
from .out_of_memory import once_smaller
from .removal import removed
from .search_memory import GIB, UNPRUNED, layout
from .variants import Stack, T, Variant, set_aside, through


class Sweep:
    """Measures candidates by sweeping; remembers what stays valid from step to step.

    memory_gib: what all streams may take. layer_runs: layers evaluated so far, in layers times sequences; reused: those
    that were spared because their result was kept. Both count all ranks.
    """

    def __init__(self, model: PreTrainedModel, calibration: Calibration, measure: Measure, memory_gib: float) -> None:
        self.model, self.calibration, self.measure = model, calibration, measure
        self.family = family_of(model)
        self.budget = memory_gib * GIB
        self.layout, self.places = layout({}, 1, 1, 0), {UNPRUNED: set[int]()}
        self.wanted: set[Cut] = set()
        self._forget_all()
        self.layer_runs = self.reused = 0
        self._runs = self._spared = 0

    def prepare(self, candidates: Sequence[Cut]) -> None:
        """Share the budget out for these candidates, and drop what was kept of others."""
        self.wanted = set(candidates)
        births = Counter(map(self._birth, candidates))
        if any(n > self.layout.births.get(layer, 0) for layer, n in births.items()):
            rows = [self.family.stream_bytes(self.model, batch.shape[1]) * len(batch) for batch in self._batches()]
            self.layout = layout(births, max(rows, default=1), sum(rows), self.budget)
            self.places = {birth: set(self.layout.places(birth)) for birth in (UNPRUNED, *births)}
        for number in self.kept:
            self._keep_only_wanted(number)

    def values(self, gone: Sequence[Cut], candidates: Sequence[Cut], progress: tqdm) -> Tensor:
        """(C, S) float64, the measure without each candidate, for a model without `gone`: full passes to rounding."""
        at = defaultdict(list)
        for candidate in candidates:
            at[self._birth(candidate)].append(candidate)
        self.prepare(candidates)

        def measured(number: int, ids: Tensor) -> Tensor:
            own = self._walk(number, ids, at)
            progress.update()
            return torch.stack([own[candidate] for candidate in candidates])

        return torch.cat(self._on_all_batches(gone, measured), dim=1)

    def full_pass(self, gone: Sequence[Cut], candidate: Cut | None, *, for_good: bool) -> Tensor:
        """(S,) float64, the measure without `gone` and a candidate, bit for bit that of `importance.full_pass`.

        It starts from what is kept of the stream of the model without `gone`, before the candidate's layer.
        for_good: the candidate is removed, and the stream of this pass is what the variants of the next step leave.
        """
        birth = UNPRUNED if candidate is None else self._birth(candidate)
        without = gone if candidate is None else with_candidate(gone, candidate)

        def measured(number: int, ids: Tensor) -> Tensor:
            index = self._latest(number, birth)
            here = self._unpruned_at(number, index, ids)
            self._spared += here.runs
            while index < len(self.family.layers(self.model)):
                here = self._alone(index, here)
                index += 1
                if for_good and index > birth:
                    self._keep_unpruned(number, index, here)
            return self._measured(number, here, ids)

        if for_good:
            self._forget_after(birth)
        return torch.cat(self._on_all_batches(without, measured))

    def forget(self, removal: Cut) -> None:
        """Drop what a removal made invalid: what was kept after its layer."""
        self._forget_after(self._birth(removal))

    def _forget_after(self, layer: int) -> None:
        for number in self.kept:
            for index in range(layer + 1, len(self.family.layers(self.model))):
                self.kept[number].pop(index, None)
                self.unpruned[number].pop(index, None)

    def _forget_all(self) -> None:
        self.kept: dict[int, dict[int, Stack]] = {number: {} for number, _ in mine(self.calibration.batches)}
        self.unpruned: dict[int, dict[int, Variant]] = {number: {} for number in self.kept}

    def _on_all_batches(self, gone: Sequence[Cut], compute: Callable[[int, Tensor], Tensor]) -> list[Tensor]:
        """What is computed for each calibration batch by the model without `gone`, in their order."""

        def on_mine() -> dict[int, tuple[Tensor, int, int]]:
            found = {}
            for number, batch in mine(self.calibration.batches):
                self._runs = self._spared = 0
                found[number] = compute(number, batch.to(self.model.device)), self._runs, self._spared
                give_back_freed_memory()
            return found

        with removed(self.model, gone):
            found = gathered(once_smaller(on_mine, self._shrink))
        self.layer_runs += sum(runs for _, runs, _ in found)
        self.reused += sum(spared for _, _, spared in found)
        return [values for values, _, _ in found]

    def _shrink(self) -> str:
        """Go on with half the budget, and nothing kept."""
        self.budget /= 2
        self.layout = layout({}, 1, 1, 0)
        self._forget_all()
        self.prepare(list(self.wanted))
        return f"a search budget of {self.budget / GIB:.2f} GiB"

    def _keep_only_wanted(self, number: int) -> None:
        """Drop what is kept of candidates that are none any more, or has no place any more."""
        for index, stack in list(self.kept[number].items()):
            left = {cut: v for cut, v in stack.items() if cut in self.wanted and self._has_place(cut, index)}
            del self.kept[number][index]
            if left:
                self.kept[number][index] = stack if len(left) == len(stack) else set_aside(left)
        for index in [index for index in self.unpruned[number] if index not in self.places[UNPRUNED]]:
            del self.unpruned[number][index]

    def _walk(self, number: int, ids: Tensor, at: dict[int, list[Cut]]) -> dict[Cut, Tensor]:
        """The values (B,) of every candidate on one batch."""
        joins, births = self._starts(number, at)
        unpruned = self._unpruned_before(sorted(births), number, ids)
        stack: Stack = {}
        found: dict[Cut, Tensor] = {}
        for index in range(min((*joins, *births)), len(self.family.layers(self.model))):
            stack |= joins.get(index, {})
            here = births.get(index, [])
            while stack and 1 + len(stack) + len(here) > self.layout.most:
                first = list(stack)[: self.layout.most]
                found |= self._to_the_end(number, index, {cut: stack.pop(cut) for cut in first}, ids)
            born = self._born(index, here, next(unpruned).stream) if here else {}
            stack = self._past(number, index, stack) | born
        return found | self._all_measured(number, stack, ids)

    def _starts(self, number: int, at: dict[int, list[Cut]]) -> tuple[dict[int, Stack], dict[int, list[Cut]]]:
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
                    self._spared += kept[latest][cut].runs
        return joins, births

    def _unpruned_before(self, layers: Sequence[int], number: int, ids: Tensor) -> Iterator[Variant]:
        """The unpruned stream before some layers, in turn, from what is kept of it."""
        index, here = 0, None
        for layer in layers:
            latest = self._latest(number, layer)
            if here is None or latest > index:
                before = 0 if here is None else here.runs
                index, here = latest, self._unpruned_at(number, latest, ids)
                self._spared += here.runs - before
            while index < layer:
                index, here = index + 1, self._alone(index, here)
                self._keep_unpruned(number, index, here)
            yield here

    def _latest(self, number: int, layer: int) -> int:
        """The last layer up to this one before which the unpruned stream is kept; 0, where it starts, if none is."""
        return max((index for index in self.unpruned[number] if index <= layer), default=0)

    def _unpruned_at(self, number: int, index: int, ids: Tensor) -> Variant:
        """The unpruned stream before a layer where it is kept, or before the first."""
        kept = self.unpruned[number].get(index)
        return Variant(self.family.start(self.model, ids)) if kept is None else kept

    def _alone(self, index: int, here: Variant) -> Variant:
        """The stream of one model after a layer: not stacked with others, it is bit for bit that of a full pass."""
        return self._step(index, {UNPRUNED: here})[UNPRUNED]

    def _keep_unpruned(self, number: int, index: int, here: Variant) -> None:
        if index in self.places[UNPRUNED]:
            self.unpruned[number][index] = set_aside({UNPRUNED: here})[UNPRUNED]

    def _to_the_end(self, number: int, index: int, stack: Stack, ids: Tensor) -> dict[Cut, Tensor]:
        """The values of variants before a layer, among which nothing is born any more."""
        for later in range(index, len(self.family.layers(self.model))):
            stack = self._past(number, later, stack)
        return self._all_measured(number, stack, ids)

    def _all_measured(self, number: int, stack: Stack, ids: Tensor) -> dict[Cut, Tensor]:
        return {cut: self._measured(number, variant, ids) for cut, variant in stack.items()}

    def _measured(self, number: int, variant: Variant, ids: Tensor) -> Tensor:
        """The values (B,) of a stream after the last layer."""
        return self.measure.values(self.model, self.family.finish(self.model, variant.stream), ids, number).cpu()

    def _born(self, index: int, cuts: Sequence[Cut], unpruned: Stream) -> Stack:
        """The variants that depart from the unpruned stream in a layer, after it."""
        born: Stack = {}
        for cut in cuts:
            with removed(self.model, [cut]):
                born |= self._step(index, {cut: Variant(unpruned)})
        return born

    def _past(self, number: int, index: int, stack: Stack) -> Stack:
        """Variants after a layer; some are kept as they are before it."""
        there = self.kept[number].get(index, {})
        new = {cut: v for cut, v in stack.items() if cut not in there and self._has_place(cut, index)}
        if new:
            self.kept[number][index] = there | set_aside(new)
        return self._step(index, stack)

    def _step(self, index: int, stack: dict[T, Variant]) -> dict[T, Variant]:
        """Variants after a layer. Empties `stack`."""
        after, runs = through(self.model, self.family.layers(self.model)[index], stack)
        self._runs += runs
        return after

    def _has_place(self, cut: Cut, index: int) -> bool:
        return index in self.places[self._birth(cut)]

    def _birth(self, cut: Cut) -> int:
        """The layer at which a variant departs from the unpruned stream."""
        return self.family.layer_of(self.model, cut.component)

    def _batches(self) -> list[Tensor]:
        return [batch for _, batch in mine(self.calibration.batches)]
