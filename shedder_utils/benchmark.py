"""Benchmark: how fast models prefill and decode, compared within one run (section 4.4, tables 6 to 9).

Prefill reads a prompt and gives the first new token; decode gives the tokens after it, one at a time, from the cache.
In every round each model runs once, the order turning from round to round, so that what disturbs the machine disturbs
all alike; a speedup is the median over rounds of reference time / model time. The reference runs twice in each round:
the ratio of its two times, which should be 1, tells what a difference is worth. Times are of this machine, ratios are
what may be compared, with each other and with the ideal: what a model no longer computes, or reads (`costs.py`).

B batch, L tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from . import provenance
from .costs import Costs, costs
from .errors import ModelError
from .importance import evaluating
from .removal import is_masked

PHASES = ("prefill", "decode")
AGAIN = " again"
"""What the name of the reference's second run in each round ends with."""


@dataclass(frozen=True)
class Speedup:
    """Median over rounds of reference time / model time, with a 95 % bootstrap interval of that median."""

    value: float
    low: float
    high: float


@dataclass
class Timings:
    """Seconds by model and phase, one for each round: of a whole prefill, and of one decoded token.

    The first model is the reference; the reference's name with `AGAIN` holds its second run. peak_mib: by model, the
    most memory in use while it ran: on a CPU of the whole process, with all models that are compared; on a CUDA device
    what torch had given out there. A system that cannot tell the peak of a part of a process's life leaves it out.
    work: by model, what such a prompt and a token after it cost. batch_size: prompts at a time.
    """

    reference: str
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    work: dict[str, Costs] = field(default_factory=dict)
    batch_size: int = 1

    def speedup(self, model: str, phase: str) -> Speedup:
        """How many times faster than the reference a model is in a phase."""
        rounds = np.array(self.seconds[self.reference][phase]) / np.array(self.seconds[model][phase])
        draws = np.random.default_rng(0).choice(rounds, (2000, len(rounds)))
        low, high = np.percentile(np.median(draws, axis=1), (2.5, 97.5))
        return Speedup(float(np.median(rounds)), float(low), float(high))

    def ideal(self, model: str, phase: str) -> float:
        """The speedup if time were the cost alone: FLOPs in prefill, bytes moved in decode; 1 for the second run."""
        dense = self.work[self.reference]
        return self.work.get(model, dense).ideal(dense, phase, self.batch_size)

    def table(self) -> pd.DataFrame:
        """One row for each model and phase: quartiles in ms, the speedup, its interval and the ideal, peak memory."""
        rows = []
        for model, phases in self.seconds.items():
            for phase, seconds in phases.items():
                quartiles = np.percentile(seconds, (25, 50, 75)) * 1e3
                speedup = self.speedup(model, phase)
                ratios = (speedup.value, speedup.low, speedup.high, self.ideal(model, phase))
                rows.append((model, phase, *quartiles, *ratios, self.peak_mib.get(model)))
        columns = ["model", "phase", "ms_25", "ms_median", "ms_75", "speedup", "low", "high", "ideal", "peak_mib"]
        return pd.DataFrame(rows, columns=columns).set_index(["model", "phase"])


def benchmark(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 16,
    batches: int = 10,
    batch_size: int = 1,
    warmup: int = 2,
    progress: bool = True,
) -> Timings:
    """Time models against the first of them, each round on the same random prompt (B, L).

    batches: rounds that count; warmup: rounds before them that do not. new_tokens: at least 2, the first belongs to
    prefill. Raises ModelError for fewer new tokens, and for a model whose components are only masked (inside
    `removed()`): it still carries what was removed, so `extract` it first.
    """
    if new_tokens < 2:
        raise ModelError(f"benchmark: {new_tokens} new tokens leave nothing to decode: ask for 2 or more")
    masked = [name for name, model in models.items() if is_masked(model)]
    if masked:
        raise ModelError(f"benchmark: model {masked[0]!r} is masked, not pruned: time what extract() returns")
    reference = next(iter(models))
    runs = {**models, reference + AGAIN: models[reference]}
    timings = Timings(reference, {name: {phase: [] for phase in PHASES} for name in runs}, batch_size=batch_size)
    generator = torch.Generator().manual_seed(0)
    names = list(runs)
    vocabulary = min(model.config.vocab_size for model in models.values())
    for number in tqdm(range(-warmup, batches), desc="benchmark", leave=False, disable=not progress):
        prompt = torch.randint(vocabulary, (batch_size, prompt_tokens), generator=generator)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = _once(runs[name], prompt, new_tokens)
            if number >= 0:
                for phase, value in zip(PHASES, seconds, strict=True):
                    timings.seconds[name][phase].append(value)
    peaks = {name: _peak_mib(model, prompt, new_tokens) for name, model in runs.items()}
    timings.peak_mib = {name: peak for name, peak in peaks.items() if peak is not None}
    timings.work = {name: costs(model, prompt_tokens) for name, model in models.items()}
    return timings


def _once(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of one prefill, and of one token of the greedy decoding after it."""
    with evaluating(model):
        meter = _CudaMeter(model.device) if model.device.type == "cuda" else _Meter()
        meter.mark()
        output = model(prompt.to(model.device), use_cache=True, logits_to_keep=1)
        token = output.logits[:, -1:].argmax(-1)
        meter.mark()
        held = "cache_params" if "cache_params" in output else "past_key_values"
        cache = output[held]
        for _ in range(new_tokens - 1):
            token = model(token, use_cache=True, **{held: cache}).logits[:, -1:].argmax(-1)
        meter.mark()
    prefill, decode = meter.seconds()
    return prefill, decode / (new_tokens - 1)


def _peak_mib(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> float | None:
    """The peak of memory in MiB of the same once more, where the system can tell it. Not timed: it begins with nothing
    kept from earlier runs, which they are faster for."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
        _once(model, prompt, new_tokens)
        return torch.cuda.max_memory_allocated(model.device) / 2**20
    known = provenance.reset_peak()
    _once(model, prompt, new_tokens)
    return provenance.peak_mib() if known else None


class _Meter:
    """Seconds between marks."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def mark(self) -> None:
        self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]


class _CudaMeter:
    """The same from events on the device, which runs behind the program."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # else that of the current device, another one perhaps
        self.marks.append(event)

    def seconds(self) -> list[float]:
        torch.cuda.synchronize(self.device)
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]
