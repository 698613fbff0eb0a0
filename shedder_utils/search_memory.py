"""The memory of a search: what it holds, in bytes, and how a budget is shared out.

A sweep (`sweep.py`) holds streams: those on their way through the layers, for one calibration batch, and those kept
from step to step, for all batches. The budget bounds both together. Beside it there are the model, copies of what is
left of mixers that have lost heads, channels or states, one layer at work, and a slice of the logits. On a GPU that is
with the kernels of mamba_ssm: transformers' fallback holds more.

B batch, L tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from .distributed import ranks_here
from .families import family_of
from .families.finer_kinds import WIDTHS
from .importance import LOGITS_AT_ONCE
from .plan import Stage
from .removal import components

GIB = 2**30
TOKENS_AT_ONCE = 8192
"""How many tokens a layer runs on at once, if a batch has no more: enough to fill a device."""

UNPRUNED = -1
"""The layer at which the stream of the model without any candidate removed is born: before the first."""


@dataclass(frozen=True)
class Layout:
    """Which streams a sweep holds.

    births: how many candidates there are at each layer; most: streams on their way at once; spacing: a stream is kept
    before one in so many of the layers to which the next step may go back; unpruned_spacing: likewise the unpruned one.
    """

    births: Mapping[int, int]
    most: int
    spacing: int
    unpruned_spacing: int

    def places(self, birth: int) -> list[int]:
        """Before which layers a stream born at a layer is kept: spread evenly over those where candidates are."""
        later = [layer for layer in sorted(self.births) if layer > max(birth, 0)]
        n = len(later) // (self.unpruned_spacing if birth == UNPRUNED else self.spacing)
        return [later[len(later) * part // (n + 1)] for part in range(1, n + 1)]

    def kept(self) -> int:
        """How many streams are kept, of each sequence."""
        return len(self.places(UNPRUNED)) + sum(n * len(self.places(birth)) for birth, n in self.births.items())


def layout(births: Mapping[int, int], batch_bytes: int, all_bytes: int, budget: float) -> Layout:
    """Share a budget out: up to half of it, as far as needed, to the streams on their way, the rest to kept ones.

    Of the rest, up to a quarter goes to the unpruned stream, of which every step makes use.
    batch_bytes, all_bytes: one stream of the largest batch, and of all batches. Two streams are on their way at least.
    """
    on_their_way = min((1 + sum(births.values())) * batch_bytes, budget / 2)
    most, left = max(2, int(on_their_way // batch_bytes)), budget - on_their_way
    none = len(births) + 1
    found = Layout(births, most, none, none)
    for spacing in range(len(births), 0, -1):
        denser = replace(found, unpruned_spacing=spacing)
        if len(denser.places(UNPRUNED)) * all_bytes <= left / 4:
            found = denser
    for spacing in range(len(births), 0, -1):
        denser = replace(found, spacing=spacing)
        if denser.kept() * all_bytes <= left:
            found = denser
    return found


@dataclass(frozen=True)
class SearchMemory:
    """What a fast search holds at its peak, in bytes.

    model: parameters and buffers; stack: streams on their way; kept: streams kept from step to step; layer: what one
    layer needs for itself; logits: a slice of them, with their logarithms; copies: at most, of mixers without parts.
    """

    model: int
    stack: int
    kept: int
    layer: int
    logits: int
    copies: int = 0

    @property
    def total(self) -> int:
        """All of it; a layer and the logits never are at work together."""
        return self.model + self.copies + self.stack + self.kept + max(self.layer, self.logits)

    def __str__(self) -> str:
        parts = [("model", self.model), ("streams", self.stack), ("kept", self.kept)]
        parts += [("copies", self.copies)] if self.copies else []
        listed = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts)
        return f"{listed} + layer {self.layer / GIB:.2f} or logits {self.logits / GIB:.2f} = {self.total / GIB:.2f} GiB"


def search_memory(
    model: PreTrainedModel,
    stages: Iterable[Stage],
    *,
    sequences: int,
    sequence_length: int,
    batch_size: int,
    memory_gib: float,
) -> SearchMemory:
    """The memory of a fast search for perplexity, from shapes alone: the model may be on the meta device.

    memory_gib: the budget that `search` would be given.
    """
    row = family_of(model).stream_bytes(model, sequence_length)
    batch = row * min(batch_size, sequences)
    stages = list(stages)
    streams = []
    for stage in stages:
        births = births_of(model, stage)
        found = layout(births, batch, row * sequences, memory_gib * GIB)
        most = min(1 + sum(births.values()), found.most)
        streams.append((most * batch, found.kept() * row * sequences))
    stack, kept = max(streams, key=sum, default=(batch, 0))
    at_work = max(1, min(TOKENS_AT_ONCE, stack // row * sequence_length) // (batch_size * sequence_length))
    return SearchMemory(
        model=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        stack=stack,
        kept=kept,
        layer=layer_bytes(model, at_work * batch_size * sequence_length),
        logits=logits_bytes(model, batch_size * (sequence_length - 1)),
        copies=_narrow_mixers(model, stages) * model.dtype.itemsize,
    )


def _narrow_mixers(model: PreTrainedModel, stages: Iterable[Stage]) -> int:
    """The parameters of all mixers that may be without parts at once, which is more than is left of them."""
    steps = sum(stage.steps for stage in stages if WIDTHS.keys() & set(stage.kinds))
    blocks = components(model, "mamba_block") if steps else []
    return sum(sorted(family_of(model).parameters(model, block) for block in blocks)[-steps:])


def births_of(model: PreTrainedModel, stage: Stage) -> dict[int, int]:
    """How many candidates a stage has at each layer at its beginning."""
    layer_of = family_of(model).layer_of
    return Counter(layer_of(model, component) for component in components(model, stage.kinds))


def default_gib(device: torch.device) -> float:
    """Half of what is free on a GPU; on a CPU, which others use as well, an eighth, shared by the ranks there."""
    if device.type == "cuda":
        spare = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return (torch.cuda.mem_get_info(device)[0] + spare) / 2 / GIB
    return min(_free_in_system(), _free_in_container()) / ranks_here() / 8 / GIB


def layer_bytes(model: PreTrainedModel, tokens: int) -> int:
    """What a layer at work holds: for each token input, output, and about three of the widest projection."""
    widest = max(m.out_features for m in family_of(model).layers(model).modules() if isinstance(m, nn.Linear))
    return tokens * (3 * widest + 2 * model.config.hidden_size) * max(4, model.dtype.itemsize)


def logits_bytes(model: PreTrainedModel, tokens: int) -> int:
    """What a loss holds of so many tokens: a slice of the logits, and their logarithms."""
    vocabulary: int = model.get_output_embeddings().out_features
    return 2 * min(LOGITS_AT_ONCE // vocabulary, tokens) * vocabulary * max(4, model.dtype.itemsize)


def _free_in_system() -> int:
    if sys.platform == "linux":
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_in_container() -> float:
    """What the limit of a Linux control group leaves; inf without one."""
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        return int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    return float("inf")
