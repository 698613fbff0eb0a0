"""The search: remove what the model misses least, again and again (section 3.3, Algorithms 1 and 2).

For each step and each candidate, the calibration perplexity without it is measured; the candidate with the lowest
goes for good. `method="plain"` is that, word for word. `method="fast"` gets the same numbers from one sweep through the
layers for each step (`sweep.py`), and settles ties within rounding by the plain rule, so that its plan is the same.

Other metrics take the place of perplexity as baselines: the divergence from the dense model is measured likewise, the
rest is estimated (`rankings.py`), where `method` makes no difference.

C candidates, S sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from .calibration import Calibration
from .candidates import candidates, check_stages, with_candidate
from .components import Cut
from .distributed import mine, on_first, rank, ranks
from .errors import PlanError
from .families import family_of
from .importance import MEASURES, Measure, evaluating, full_pass
from .inventory import parameters_removed
from .loading import identity
from .plan import Plan, Removal, Stage
from .rankings import RANKINGS
from .removal import removed
from .search_memory import default_gib
from .statistics import within_error
from .sweep import Sweep, layer_cost

METHODS = ("fast", "plain")
METRICS = (*MEASURES, *RANKINGS)
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Difference of mean losses, in nats, within which two candidates are tied; half precision rounds coarser."""


def search(
    model: PreTrainedModel,
    calibration: Calibration,
    stages: Stage | Iterable[Stage],
    *,
    method: str = "fast",
    metric: str = "perplexity",
    one_shot: bool = False,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    memory_gib: float | None = None,
) -> Plan:
    """Find which components to remove, and in which order.

    stages: what to remove, one stage after the other. method: "fast" or "plain", the same plan. metric: "perplexity"
    or another of `METRICS`, the lowest goes; seed: of "random". one_shot: every candidate is ranked once, alone, in the
    dense model, and never again. checkpoint: a file that holds the plan so far after every step; a search that was
    killed goes on from it. progress: a bar on stderr. memory_gib: what "fast" may hold beside the model and a layer at
    work, by default a part of what is free (`search_memory.py`).

    Each removal's score is that of a full pass; see `Plan` for what it is. Ties go to the lowest index in depth order.
    Under torchrun (`distributed.py`) every rank has to call this, and gets the same plan.
    Raises PlanError for stages that ask for more than there is, and for a checkpoint of another search.
    """
    stages = [stages] if isinstance(stages, Stage) else list(stages)
    for name, value, known in (("method", method, METHODS), ("metric", metric, METRICS)):
        if value not in known:
            raise PlanError(f"search {name} {value!r} is unknown: expected one of {', '.join(known)}")
    check_stages(model, stages)
    memory_gib = default_gib(model.device) if memory_gib is None else memory_gib
    settings = _Settings(stages, method, metric, one_shot, seed, memory_gib, progress)
    with evaluating(model):
        run = _Search(model, calibration, settings, Path(checkpoint) if checkpoint is not None else None)
        while (stage := run.open_stage()) is not None:
            run.advance(stage)
    return run.plan


@dataclass(frozen=True)
class _Settings:
    """What `search` was asked for."""

    stages: list[Stage]
    method: str
    metric: str
    one_shot: bool
    seed: int
    memory_gib: float
    progress: bool

    def provenance(self) -> dict[str, Any]:
        """What a plan keeps of them, and the counts that a search begins with."""
        found: dict[str, Any] = {"metric": self.metric, "one_shot": self.one_shot, "seed": self.seed}
        if self.metric in MEASURES:
            counts = ("layer_runs", "layer_runs_plain", "layer_runs_reused", "ties")
            found |= {"method": self.method, "memory_gib": round(self.memory_gib, 3), **dict.fromkeys(counts, 0)}
        return found | {"ranks": ranks(), "ties_within_error": []}


class _Search:
    """A search under way: the plan so far, and one step at a time."""

    def __init__(
        self, model: PreTrainedModel, calibration: Calibration, settings: _Settings, checkpoint: Path | None
    ) -> None:
        self.model, self.calibration, self.settings, self.checkpoint = model, calibration, settings, checkpoint
        self.tolerance = ROUNDING.get(model.dtype, 2e-3)
        self.measure: Measure | None = MEASURES[settings.metric]() if settings.metric in MEASURES else None
        self.ranked: dict[Cut, Tensor] = {}
        self.plan = self._begun()
        if self.measure is not None:
            self.measure.prepare(model, calibration)
            self.sweep = Sweep(model, calibration, self.measure, settings.memory_gib)
            if self.plan.dense_score is None:
                self.plan.dense_score = self.measure.score(self._full_pass([]))
                self._save()

    def open_stage(self) -> int | None:
        """The number of the stage that still has removals to make; None when the plan is whole."""
        done = len(self.plan)
        for number, stage in enumerate(self.settings.stages):
            if done < stage.steps:
                return number
            done -= stage.steps
        return None

    def advance(self, number: int) -> None:
        """Make one removal and store the plan."""
        gone = self.plan.gone
        base = [] if self.settings.one_shot else gone
        left = candidates(self.model, self.settings.stages[number], gone)
        values = self._once(left) if self.settings.one_shot else self._values(base, left)
        chosen, score = self._choice(base, left, values)
        best = left[chosen]
        self.plan.removals.append(
            Removal(
                component=best.component,
                kept=best.kept if best.component.kind == "mlp_channels" else None,
                stage=number,
                score=score,
                parameters=parameters_removed(self.model, with_candidate(gone, best))
                - parameters_removed(self.model, gone),
            )
        )
        rivals = [str(left[place]) for place in within_error(values, chosen)]
        if rivals:
            entry = {"removal": len(self.plan), "chosen": str(best), "number": len(rivals), "rivals": rivals}
            self.plan.provenance["ties_within_error"].append(entry)
        self._save()

    def _once(self, left: list[Cut]) -> Tensor:
        """(C, S), the values of candidates that are ranked alone, in the dense model, when they first come up."""
        new = [candidate for candidate in left if candidate not in self.ranked]
        if new:
            self.ranked.update(zip(new, self._values([], new), strict=True))
        return torch.stack([self.ranked[candidate] for candidate in left])

    def _values(self, gone: list[Cut], left: list[Cut]) -> Tensor:
        """(C, S), the values of candidates by the metric and the method."""
        if self.measure is None:
            with removed(self.model, gone):
                return RANKINGS[self.settings.metric](self.model, self.calibration, left, self.settings.seed)
        without = [with_candidate(gone, candidate) for candidate in left]
        self._count("layer_runs_plain", sum(map(self._pass_cost, without)))
        if self.settings.method == "fast":
            return self._swept(gone, left)
        with self._bar(len(left)) as bar:
            values = []
            for cuts in without:
                values.append(self._full_pass(cuts))
                bar.update()
        return torch.stack(values)

    def _swept(self, gone: list[Cut], left: list[Cut]) -> Tensor:
        runs, reused = self.sweep.layer_runs, self.sweep.reused
        with self._bar(len(mine(self.calibration.batches))) as bar:
            values = self.sweep.values(gone, left, bar)
        self._count("layer_runs", self.sweep.layer_runs - runs)
        self._count("layer_runs_reused", self.sweep.reused - reused)
        return values

    def _choice(self, gone: list[Cut], left: list[Cut], values: Tensor) -> tuple[int, float]:
        """The place of the best candidate, the first of equals, and its score.

        After a sweep, those as good within rounding are measured by full passes, as "plain" measures all.
        """
        scores = values.mean(dim=1).tolist() if self.measure is None else [self.measure.score(own) for own in values]
        places = list(range(len(left)))
        if self.measure is not None and self.settings.method == "fast":
            limit = self.measure.tied(min(scores), self.tolerance)
            places = [place for place in places if scores[place] <= limit]
            self._count("ties", len(places) - 1)
            for place in places:
                scores[place] = self.measure.score(self._full_pass(with_candidate(gone, left[place])))
        best = min(places, key=scores.__getitem__)
        if self.measure is not None and not self.settings.one_shot:
            self.sweep.forget(left[best])
        return best, scores[best]

    def _full_pass(self, gone: Sequence[Cut]) -> Tensor:
        assert self.measure is not None
        self._count("layer_runs", self._pass_cost(gone))
        with removed(self.model, gone):
            return full_pass(self.model, self.calibration, self.measure)

    def _pass_cost(self, gone: Sequence[Cut]) -> int:
        with removed(self.model, gone):
            present = sum(map(layer_cost, family_of(self.model).layers(self.model)))
        return present * self.calibration.sequences

    def _count(self, name: str, n: int) -> None:
        self.plan.provenance[name] += n

    def _bar(self, total: int) -> tqdm:
        done, wanted = len(self.plan) + 1, sum(stage.steps for stage in self.settings.stages)
        hidden = not self.settings.progress or rank() > 0
        return tqdm(total=total, desc=f"removal {done} of {wanted}", leave=False, disable=hidden)

    def _begun(self) -> Plan:
        """The plan of the checkpoint, or an empty one."""
        plan = Plan(
            stages=self.settings.stages,
            model=identity(self.model),
            calibration=self.calibration.describe(),
            provenance=self.settings.provenance(),
        )
        path = self.checkpoint
        found = None if path is None else on_first(lambda: Plan.load(path) if path.exists() else None)
        return plan if path is None or found is None else _resumed(found, plan, path)

    def _save(self) -> None:
        """Store the plan; no rank goes on before it is stored."""
        path = self.checkpoint
        if path is not None:
            on_first(lambda: self.plan.save(path))


def _resumed(found: Plan, wanted: Plan, path: Path) -> Plan:
    """The plan of a checkpoint, if it belongs to this search."""
    theirs, ours = _identifying(found), _identifying(wanted)
    for name in dict.fromkeys([*ours, *theirs]):
        there, here = theirs.get(name, "not there"), ours.get(name, "not there")
        if there != here:
            raise PlanError(
                f"checkpoint {path} is of another search: {name} is {there}, expected {here}; delete or move it"
            )
    return found


def _identifying(plan: Plan) -> dict[str, Any]:
    """By name, the settings that a search must share with its checkpoint: "calibration seed", "stage 1 steps", ..."""
    metric = {name: plan.provenance[name] for name in ("metric", "one_shot", "seed") if name in plan.provenance}
    stages = [stage.model_dump() for stage in plan.stages]
    parts: dict[str, dict[str, Any]] = {"model": plan.model, "calibration": plan.calibration}
    parts |= {f"stage {number}": stage for number, stage in enumerate(stages, start=1)}
    named = {f"{part} {name}": value for part, settings in parts.items() for name, value in settings.items()}
    return metric | {"stages": len(stages)} | named
