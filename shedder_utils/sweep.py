"""The sweep: the scores of all candidates of a step from one walk through the layers.

Candidates that differ at layer i share everything before it. So one walk carries the unpruned stream and every
variant born so far, stacked in the batch, runs each layer once on the stack, and lets each candidate of that layer join
as a new variant: about half the layer runs of one full pass for each candidate, and large batches. After a removal at
layer r, all that was computed before r still holds; stacks kept within a memory budget are where the next walk starts.

The scores equal those of full passes to rounding; `search` settles ties within rounding by full passes.

B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .calibration import Calibration
from .components import Cut
from .families import Stream, family_of
from .importance import sequence_losses, to_perplexity
from .kernels.memory import beside_the_heap, give_back_freed_memory
from .removal import removed

TOKENS_AT_ONCE = 8192
"""How many tokens a layer runs on at once: enough to fill a device."""


@dataclass
class Stack:
    """The streams of several variants before one layer, for one calibration batch.

    owners: whose B rows follow each other in the stream; the first is None, the model without any candidate removed.
    """

    owners: list[Cut | None]
    stream: Stream
    rows: int

    def of(self, position: int) -> Stream:
        """The B rows of one owner."""
        begin = position * self.rows
        return {name: tensor[begin : begin + self.rows] for name, tensor in self.stream.items()}

    def aside(self) -> Stack:
        """The stack in memory that the work on layers, which takes and frees much, does not scatter."""
        return Stack(self.owners, {name: beside_the_heap(t) for name, t in self.stream.items()}, self.rows)

    def only(self, owners: set[Cut | None]) -> Stack:
        """The stack without the variants of others."""
        keep = [i for i, owner in enumerate(self.owners) if owner in owners]
        if len(keep) == len(self.owners):
            return self
        return Stack([self.owners[i] for i in keep], _stacked([self.of(i) for i in keep]), self.rows)


class Sweep:
    """Scores candidates by sweeping; remembers what stays valid from step to step.

    memory_gib: what the kept stacks may take. layer_runs: layers evaluated so far, in layers times sequences.
    """

    def __init__(self, model: PreTrainedModel, calibration: Calibration, memory_gib: float) -> None:
        self.model = model
        self.calibration = calibration
        self.family = family_of(model)
        self.memory_gib = memory_gib
        self.layer_runs = 0
        self.kept: list[dict[int, Stack]] = [{} for _ in calibration.batches]
        self.scored: set[Cut] = set()

    def scores(self, gone: Sequence[Cut], candidates: Sequence[Cut], progress: tqdm) -> list[float]:
        """The perplexity without each candidate, for a model without `gone`."""
        self._keep_for(candidates)
        at = defaultdict(list)
        for candidate in candidates:
            at[self.family.layer_of(self.model, candidate.component)].append(candidate)
        losses: dict[Cut, list[Tensor]] = {candidate: [] for candidate in candidates}
        with removed(self.model, gone):
            for number, batch in enumerate(self.calibration.batches):
                for owner, loss in self._walk(number, batch.to(self.model.device), at):
                    losses[owner].append(loss)
                give_back_freed_memory()
                progress.update()
        return [to_perplexity(losses[candidate]) for candidate in candidates]

    def forget(self, removal: Cut) -> None:
        """Drop what a removal made invalid: the stacks after its layer."""
        layer = self.family.layer_of(self.model, removal.component)
        for stacks in self.kept:
            for index in [index for index in stacks if index > layer]:
                del stacks[index]

    def _keep_for(self, candidates: Sequence[Cut]) -> None:
        """Keep the stacks that lack no variant of these candidates, without the variants of others."""
        new = [self.family.layer_of(self.model, cut.component) for cut in candidates if cut not in self.scored]
        for stacks in self.kept:
            for index, stack in list(stacks.items()):
                if new and (index > min(new) or None not in stack.owners):
                    del stacks[index]
                else:
                    left = stack.only({None, *candidates})
                    stacks[index] = stack if left is stack else left.aside()
        self.scored = set(candidates)

    def _walk(self, number: int, ids: Tensor, at: dict[int, list[Cut]]) -> list[tuple[Cut, Tensor]]:
        """The losses (B,) of every candidate's variant on one batch."""
        layers = self.family.layers(self.model)
        begin = max(self.kept[number], default=0)
        stack = self.kept[number].get(begin) or Stack([None], self.family.start(self.model, ids), len(ids))
        stride, last_birth = self._stride(stack.stream, at, len(layers)), max(at)
        for index in range(begin, len(layers)):
            if index % stride == 0 and index:
                self.kept[number][index] = stack.aside()
            here = at.get(index, [])
            born = [part for candidate in here for part in self._variant(candidate, stack.of(0))]
            stack = Stack([*stack.owners, *here], _stacked([*self._step(index, stack.stream), *born]), stack.rows)
            if index == last_birth:  # nothing is born any more, so the unpruned stream has done its work
                stack = stack.only(set(stack.owners) - {None})
        return [
            (owner, sequence_losses(self.family.finish(self.model, stack.of(position)), ids).cpu())
            for position, owner in enumerate(stack.owners)
            if owner is not None
        ]

    def _variant(self, candidate: Cut, stream: Stream) -> list[Stream]:
        """The stream after a candidate's layer, without the candidate, in parts."""
        with removed(self.model, [candidate]):
            return self._step(self.family.layer_of(self.model, candidate.component), stream)

    def _step(self, index: int, stream: Stream) -> list[Stream]:
        """The stream after a layer, in parts: what a layer needs for itself is bounded, however many are stacked."""
        layer = self.family.layers(self.model)[index]
        rows, length = stream["hidden"].shape[:2]
        self.layer_runs += layer_cost(layer) * rows
        at_once = max(1, TOKENS_AT_ONCE // length)
        return [
            self.family.step(self.model, layer, {name: tensor[row : row + at_once] for name, tensor in stream.items()})
            for row in range(0, rows, at_once)
        ]

    def _stride(self, stream: Stream, at: dict[int, list[Cut]], n_layers: int) -> int:
        """Every how many layers a stack is kept, so that all of them fit the budget."""
        row = sum(tensor[:1].nbytes for tensor in stream.values())
        owners = accumulate((len(at.get(index, ())) for index in range(n_layers)), initial=1)
        everything = row * self.calibration.sequences * sum(owners)
        return max(1, math.ceil(everything / (self.memory_gib * 2**30)))


def layer_cost(layer: torch.nn.Module) -> int:
    """1 for a layer that computes something, 0 for one that is skipped: what a layer run counts."""
    return int(any(True for _ in layer.parameters()))


def _stacked(streams: list[Stream]) -> Stream:
    if len(streams) == 1:
        return streams[0]
    return {name: torch.cat([stream[name] for stream in streams]) for name in streams[0]}
