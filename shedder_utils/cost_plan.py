"""Cost plan: what a profile downloads, computes and holds in memory, before any of it starts.

Searches are priced from shapes: the passes of Algorithm 1, the work that one sweep a step leaves of them before what is
kept from step to step saves more, and the memory that `search_memory.py` adds up. Hours are the larger of arithmetic
and memory traffic on a device, at the share of its peak that `EFFICIENCY` and `BANDWIDTH` state; on a GPU they and the
memory are with the kernels of mamba_ssm. Minutes on a CPU that was measured come from the records (`schedule.py`).
Nothing is downloaded and no model is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedModel

from .errors import ProfileError
from .loading import local_folder
from .passes import candidates_by_step, ranked_by_step, share_from
from .prefix import removals_before
from .profiles import (
    CERTAINTY,
    PARETO,
    RECOVERY,
    RELEASED,
    SAVINGS,
    SEARCH,
    SPEED,
    CalibrationSettings,
    Certainty,
    Profile,
    StageSettings,
    Strategy,
    Study,
)
from .schedule import Schedule
from .search_memory import GIB, TOKENS_AT_ONCE, SearchMemory, default_gib, layer_bytes, logits_bytes, search_memory
from .shapes import trained_parameters, without_weights, work_per_token

EFFICIENCY, BANDWIDTH = 0.3, 0.6
"""The shares of a device's peak arithmetic and of its peak memory traffic that the estimates count on."""
TOKENS_OF_A_TEXT = 105
"""Tokens of one calibration text: the mean of Alpaca with prompt, and of the pocket instructions."""
ROWS, TOKENS_OF_A_ROW = 49_760, 140
"""Rows of the cleaned Alpaca that recovery trains on, and tokens of one, about."""
CHECKPOINT_BYTES = 2 * (4 + 8) + 4
"""Of each parameter that is trained: an old and a new checkpoint, with Adam's two moments, and the best state."""
DATA_GB = 0.6
"""Alpaca, wikitext-2 and the seven tasks together, as they lie on disk."""
TASKS = {
    "lambada_openai": (5153, 1, 85), "hellaswag": (10042, 4, 100), "piqa": (1838, 2, 45), "arc_easy": (2376, 4, 40),
    "arc_challenge": (1172, 4, 45), "winogrande": (1267, 2, 30), "openbookqa": (500, 4, 20),
}  # fmt: skip
"""Of lm-eval's tasks: items, requests of each, and tokens of a request, about."""
OTHER_TASK = (400, 4, 60)
TOKENS_OF_A_REQUEST = 128
"""Of the longest in a batch of them, about."""
TIMED = "timed together"
"""What a job is that has memory and no hours."""
ESTIMATED = {"block_influence": 2.0, "taylor": 6.0, "magnitude": 0.0, "random": 0.0}
"""Passes of the calibration data that one step of an estimated metric takes, about."""


@dataclass(frozen=True)
class Device:
    """A processor at its peak: operations a second in half precision and in float32, bytes a second, memory in GiB."""

    name: str
    half_flops: float
    single_flops: float
    bytes: float
    gib: float

    def hours(self, job: Job) -> float:
        """How long a job takes, at the stated shares of the peaks."""
        flops = self.single_flops if job.single else self.half_flops
        return max(job.flops / (EFFICIENCY * flops), job.bytes / (BANDWIDTH * self.bytes)) / 3600


GPUS = (
    Device("V100-32GB", 125e12, 15.7e12, 0.90e12, 32), Device("A100-80GB", 312e12, 19.5e12, 2.04e12, 80),
    Device("H100-80GB", 989e12, 67e12, 3.35e12, 80),
)  # fmt: skip
CPUS = (Device("2 CPU cores", 150e9, 150e9, 20e9, 8),)


@dataclass(frozen=True)
class Job:
    """The runs of one study on one model.

    passes: what Algorithm 1 would need, one full pass of the calibration data for each candidate of each step, at most
    where one kind takes from another, without the steps that are taken over from a search before; flops, bytes: of the
    fast search and the evaluations; gib: peak memory, weights included; single: in float32, whatever the profile's
    numbers are; memory: what a search holds at its peak, which `gib` adds up; checkpoints_gb: on disk, meanwhile.
    """

    study: str
    model: str
    what: str
    passes: int
    flops: float
    bytes: float
    gib: float
    single: bool = False
    memory: SearchMemory | None = None
    checkpoints_gb: float = 0.0


@dataclass
class CostPlan:
    """What a profile takes: its downloads, its jobs, and what is done of it. models, studies: only those."""

    profile: Profile
    schedule: Schedule
    models: Sequence[str] = ()
    studies: Sequence[str] = ()
    jobs: list[Job] = field(init=False)

    def __post_init__(self) -> None:
        for what, names, known in (
            ("model", self.models, self.profile.models), ("study", self.studies, self.profile.study_names)
        ):  # fmt: skip
            unknown = [name for name in names if name not in known]
            if unknown:
                raise ProfileError(f"{what} {unknown[0]!r} is not in the profile: expected one of {', '.join(known)}")
        self.jobs = list(self._jobs())

    @property
    def devices(self) -> tuple[Device, ...]:
        """The devices that hours are given for."""
        return GPUS if self.profile.device == "cuda" else CPUS

    @cached_property
    def downloads(self) -> dict[str, float]:
        """Gigabytes to download by model, without those that are here already."""
        return {
            name: settings.download_gb
            for name, settings in self.profile.models.items()
            if name in self._wanted and settings.ref and not is_here(settings.ref, settings.revision)
        }

    @property
    def disk_gb(self) -> float:
        """Disk for downloads, data sets with them, what is recorded, and the checkpoints of one tuning at a time."""
        return sum(self.downloads.values()) + (DATA_GB if self.downloads else 0.1) + self.checkpoints_gb

    @property
    def checkpoints_gb(self) -> float:
        """What the largest of the tunings that are left keeps on disk until it is recorded."""
        left = {step.model for step in self.schedule.left if step.study == RECOVERY}
        return max((job.checkpoints_gb for job in self.jobs if job.model in left), default=0.0)

    @property
    def not_counted(self) -> list[str]:
        """Runs without hours: counts of components, and what is timed, which takes as long as the clock needs."""
        counted, runs = {job.study for job in self.jobs if job.what != TIMED}, self.schedule.steps
        weighed = [f"savings of {run.study}" for run in runs if run.setting == SAVINGS]
        return list(dict.fromkeys([*(run.study for run in runs if run.study not in counted), *weighed]))

    @property
    def _wanted(self) -> list[str]:
        return list(dict.fromkeys(step.model for step in self.schedule.steps))

    def _jobs(self) -> Iterator[Job]:
        for name in self._wanted:
            pricing = _Pricing(self.profile, name)
            searched = [study for study in self.profile.searches if self._runs(study, name, SEARCH)]
            for number, study in enumerate(searched):
                own = pricing.drawing(self.profile.calibration_in(study, name))
                yield own.search(study, before=searched[:number])
            for study in ("dense", *self.profile.searches, RELEASED):
                evaluated = self._runs(study, name) - sum(self._runs(study, name, s) for s in (SEARCH, SAVINGS))
                if evaluated:
                    yield pricing.evaluations(study, evaluated)
            if self.profile.certainty and self._runs(CERTAINTY, name):
                yield pricing.certainty(self.profile.certainty)
            if tunings := self._runs(RECOVERY, name):
                yield pricing.recovery(tunings)
                yield pricing.evaluations(RECOVERY, tunings)
            for study, compared in compared_at_once(self.profile, name).items():
                if self._runs(study, name):
                    yield pricing.timings(study, compared)

    def _runs(self, study: str, model: str, setting: str | None = None) -> int:
        """How many different runs of a study there are."""
        steps = {step for step in self.schedule.steps if (step.study, step.model) == (study, model)}
        return len([step for step in steps if setting in (None, step.setting)])


class _Pricing:
    """What the studies of one model cost."""

    def __init__(self, profile: Profile, name: str) -> None:
        self.profile, self.name = profile, name
        self.model: PreTrainedModel = without_weights(profile.models[name])
        self.calibration = profile.calibration_of(name)
        self.model.to(getattr(torch, profile.dtype or "float32"))
        self.number_bytes = self.model.dtype.itemsize
        self.weights = float(self.model.num_parameters() * self.number_bytes)
        self.search_gib = profile.search_gib or default_gib(
            torch.device(profile.device if torch.cuda.is_available() else "cpu")
        )

    @property
    def tokens(self) -> int:
        """Calibration tokens: whole sequences, at least one."""
        length = self.calibration.sequence_length
        return max(1, self.calibration.samples * TOKENS_OF_A_TEXT // length) * length

    def drawing(self, calibration: CalibrationSettings) -> _Pricing:
        """The same with other calibration data."""
        other = copy(self)
        other.calibration = calibration
        return other

    def search(self, study: str, before: Sequence[str] = ()) -> Job:
        """A search by one sweep or estimate a step, with a full pass for each removal that was measured.

        before: the searches that are there by then, to take the first steps over from.
        """
        settings = self.profile.searches[study]
        known = removals_before(self.profile, self.name, study, before)
        counts = ranked_by_step(self.model, settings, known)
        metric = settings.options.get("metric", "perplexity")
        if metric in ESTIMATED:
            ranked = sum(map(bool, counts))
            return self._job(study, "search", settings, 0, ESTIMATED[metric] * ranked, 2 * ranked)
        passes = self._swept(settings, counts, known) + len(counts) + (not known)
        return self._job(study, "search", settings, sum(counts), passes, len(counts) * 2 + (not known))

    def certainty(self, settings: Certainty) -> Job:
        """A search with each draw of calibration data, and one sweep more that ranks all components."""
        stage = StageSettings(kinds=(settings.kind,), steps=settings.steps)
        each = Strategy(stages=(stage,), rows={})
        counts = candidates_by_step(self.model, each)
        counts = [counts[0], *counts]
        draws = self.calibration.model_copy(update={"sequence_length": settings.sequence_length,
                                                    "batch_size": settings.batch_size})  # fmt: skip
        sequences = sum(draw.sequences for draw in settings.draws.values())
        swept = self._swept(each, counts[1:]) + self._swept(each, counts[:1]) + settings.steps + 1
        one = self.drawing(draws)._job(CERTAINTY, f"{len(settings.draws)} searches", each, 0, swept, len(counts) * 2)
        share = sequences * settings.sequence_length / self.drawing(draws).tokens
        return replace(one, passes=len(settings.draws) * sum(counts), flops=one.flops * share, bytes=one.bytes * share)

    def _swept(self, settings: Study | Strategy, counts: Sequence[int], known: int = 0) -> float:
        """Passes that sweeps take, for so many candidates in each step after those known; none where there is none."""
        work = work_per_token(self.model, self.calibration.sequence_length)
        later = share_from(self.model, settings, work)[known : known + len(counts)]
        return sum(1 + share * n for n, share in zip(counts, later, strict=True) if n)

    def _job(self, study: str, what: str, settings: Study | Strategy, count: int, passes: float, walks: int) -> Job:
        """count: passes of Algorithm 1; passes: those that are done; walks: how often all weights are read."""
        length, work = self.calibration.sequence_length, work_per_token(self.model, self.calibration.sequence_length)
        rows = max(1, TOKENS_AT_ONCE // length)
        reads = walks * max(1, self.tokens // (rows * length)) * self.weights
        moved = passes * self.tokens * len(work.layers) * work.traffic * self.number_bytes
        memory = self._search_memory(settings)
        return Job(
            study, self.name, what, count, passes * self.tokens * work.whole, reads + moved, memory.total / GIB,
            memory=memory,
        )  # fmt: skip

    def _search_memory(self, settings: Study | Strategy) -> SearchMemory:
        """The peak of a search; what is kept is less where all of it takes less than the budget."""
        length = self.calibration.sequence_length
        return search_memory(
            self.model, settings.plan_stages, sequences=self.tokens // length, sequence_length=length,
            batch_size=self.calibration.batch_size, memory_gib=self.search_gib,
        )  # fmt: skip

    def evaluations(self, study: str, count: int) -> Job:
        """So many evaluations of the model with all tasks; on a CPU the C library keeps freed memory beside that."""
        tokens, requests = 0, 0
        for task in self.profile.evaluation.task_names:
            items, each, length = TASKS.get(task, OTHER_TASK)
            items = min(items, self.profile.evaluation.limit or items)
            tokens, requests = tokens + items * each * length, requests + items * each
        batch, work = self.profile.evaluation.batch_size, work_per_token(self.model, TOKENS_OF_A_REQUEST)
        moved = requests / batch * self.weights + tokens * len(work.layers) * work.traffic * self.number_bytes
        return Job(
            study, self.name, "evaluation" if count == 1 else f"{count} evaluations", 0, count * tokens * work.whole,
            count * moved, (self.weights + max(self._scoring(), self._prose())) / GIB,
        )  # fmt: skip

    def _scoring(self) -> int:
        """Bytes beside the weights while lm-eval scores a batch: of a layer, and of the logits in three forms."""
        tokens = self.profile.evaluation.batch_size * TOKENS_OF_A_REQUEST
        return layer_bytes(self.model, tokens) + 3 * 4 * tokens * self.model.config.vocab_size

    def _prose(self) -> int:
        """Bytes beside the weights while the perplexity of held-out prose is measured."""
        prose = self.profile.evaluation.prose
        tokens = prose.batch_size * prose.sequence_length
        return max(layer_bytes(self.model, tokens), logits_bytes(self.model, tokens))

    def timings(self, study: str, compared: int) -> Job:
        """So many states of the model side by side, each as large as the dense one, which is more than they take."""
        return Job(study, self.name, TIMED, 0, 0.0, 0.0, compared * self.weights / GIB)

    def recovery(self, count: int) -> Job:
        """So many tunings, forward and twice as much backward, in float32, of a copy of the model."""
        tables = self.profile.recovery.tables.values() if self.profile.recovery else ()
        recipe = next(table.recipe for table in tables if table.model == self.name)
        work = work_per_token(self.model, recipe.max_length)
        batch = recipe.batch_size * min(recipe.max_length, TOKENS_OF_A_ROW)
        batches = recipe.steps or recipe.epochs * ROWS / (recipe.batch_size * recipe.accumulation)
        tokens = batches * recipe.accumulation * batch
        kept = 4 * batch * len(work.layers) * work.traffic
        states = 4 if recipe.method == "full" else 1  # weights, gradients and two moments, or weights alone
        moved = count * tokens / batch * 3 * (kept + states * 4 * self.model.num_parameters())
        return Job(
            RECOVERY, self.name, "tuning" if count == 1 else f"{count} tunings", 0, 3 * count * tokens * work.whole,
            moved, (self.weights + states * 4 * self.model.num_parameters() + kept) / GIB, single=True,
            checkpoints_gb=CHECKPOINT_BYTES * trained_parameters(self.model, recipe) / 1e9,
        )  # fmt: skip


def compared_at_once(profile: Profile, model: str) -> dict[str, int]:
    """How many states of a model the studies of speed hold side by side, the dense one among them, at most."""
    tables = profile.speed.tables.values() if profile.speed else ()
    found = {SPEED: max((len(table.rows) for table in tables if table.model == model), default=0)}
    if profile.pareto and profile.pareto.model == model:
        rows = [profile.searches[study].rows[model] for study in profile.pareto.studies]
        found[PARETO] = 1 + sum(n > 0 for states in rows for n in states)
    return found


def is_here(ref: str, revision: str | None = None) -> bool:
    """Whether a model is on this machine: a folder, or in the cache of the Hub."""
    return local_folder(ref) is not None or isinstance(
        try_to_load_from_cache(ref, "config.json", revision=revision), str
    )
