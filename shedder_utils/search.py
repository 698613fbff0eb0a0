"""The search: remove what the model misses least, again and again (section 3.3, Algorithms 1 and 2).

For each step and each candidate, the calibration perplexity without it is measured; the candidate with the lowest
goes for good. `method="plain"` is that, word for word. `method="fast"` gets the same numbers from one sweep through the
layers for each step (`sweep.py`), and settles ties within rounding by the plain rule, so that its plan is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .calibration import Calibration
from .components import Component, Cut
from .errors import PlanError
from .families import family_of
from .importance import evaluating, perplexity
from .inventory import parameters_removed
from .loading import identity
from .plan import Plan, Removal, Stage
from .removal import components, removed
from .sweep import Sweep, layer_cost

METHODS = ("fast", "plain")
METRICS = ("perplexity",)
ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}
"""Relative difference of scores within which two candidates are tied; half precision rounds coarser."""


def search(
    model: PreTrainedModel,
    calibration: Calibration,
    stages: Stage | Iterable[Stage],
    *,
    method: str = "fast",
    metric: str = "perplexity",
    checkpoint: str | Path | None = None,
    progress: bool = True,
    memory_gib: float = 1.0,
) -> Plan:
    """Find which components to remove, and in which order.

    stages: what to remove, one stage after the other. method: "fast" or "plain", the same plan. checkpoint: a file that
    holds the plan so far after every step; a search that was killed goes on from it. progress: a bar on stderr.
    memory_gib: what "fast" may keep from step to step, beside the model and one batch.

    Each removal's score is the perplexity of a full pass. Ties go to the lowest index in depth order.
    Raises PlanError for stages that ask for more than there is, and for a checkpoint of another search.
    """
    stages = [stages] if isinstance(stages, Stage) else list(stages)
    _check(model, stages, method, metric)
    with evaluating(model):
        run = _Search(model, calibration, stages, method, metric, checkpoint, progress, memory_gib)
        while (stage := run.open_stage()) is not None:
            run.advance(stage)
    return run.plan


class _Search:
    """A search under way: the plan so far, and one step at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        calibration: Calibration,
        stages: list[Stage],
        method: str,
        metric: str,
        checkpoint: str | Path | None,
        progress: bool,
        memory_gib: float,
    ) -> None:
        self.model, self.calibration, self.stages = model, calibration, stages
        self.method, self.progress = method, progress
        self.checkpoint = Path(checkpoint) if checkpoint is not None else None
        self.tolerance = ROUNDING.get(model.dtype, 2e-3)
        self.sweep = Sweep(model, calibration, memory_gib)
        self.plan = Plan(
            stages=stages,
            model=identity(model),
            calibration=calibration.describe(),
            provenance={"method": method, "metric": metric, "layer_runs": 0, "layer_runs_plain": 0, "ties": 0},
        )
        if self.checkpoint is not None and self.checkpoint.exists():
            self.plan = _resumed(Plan.load(self.checkpoint), self.plan, self.checkpoint)
        if self.plan.dense_score is None:
            self.plan.dense_score = self._full_pass([])
            self._save()

    def open_stage(self) -> int | None:
        """The number of the stage that still has removals to make; None when the plan is whole."""
        done = len(self.plan)
        for number, stage in enumerate(self.stages):
            if done < stage.steps:
                return number
            done -= stage.steps
        return None

    def advance(self, number: int) -> None:
        """Make one removal and store the plan."""
        gone = self.plan.gone
        candidates = _candidates(self.model, self.stages[number], gone)
        self.plan.provenance["layer_runs_plain"] += sum(self._pass_cost(_with(gone, one)) for one in candidates)
        best, score = self._fast(gone, candidates) if self.method == "fast" else self._plain(gone, candidates)
        self.plan.removals.append(
            Removal(
                component=best.component,
                kept=best.kept if best.component.kind == "mlp_channels" else None,
                stage=number,
                score=score,
                parameters=parameters_removed(self.model, _with(gone, best)) - parameters_removed(self.model, gone),
            )
        )
        self._save()

    def _plain(self, gone: list[Cut], candidates: list[Cut]) -> tuple[Cut, float]:
        """Algorithm 1: one full pass for each candidate; min() keeps the first of equals."""
        with self._bar(len(candidates)) as bar:
            scores = []
            for candidate in candidates:
                scores.append(self._full_pass(_with(gone, candidate)))
                bar.update()
        best = min(range(len(candidates)), key=scores.__getitem__)
        return candidates[best], scores[best]

    def _fast(self, gone: list[Cut], candidates: list[Cut]) -> tuple[Cut, float]:
        """One sweep, then a full pass for the best, and for those as good within rounding."""
        before = self.sweep.layer_runs
        with self._bar(len(self.calibration.batches)) as bar:
            scores = self.sweep.scores(gone, candidates, bar)
        self.plan.provenance["layer_runs"] += self.sweep.layer_runs - before
        limit = min(scores) * (1 + self.tolerance)
        tied = [candidate for candidate, score in zip(candidates, scores, strict=True) if score <= limit]
        self.plan.provenance["ties"] += len(tied) - 1
        exact = [self._full_pass(_with(gone, candidate)) for candidate in tied]
        best = min(range(len(tied)), key=exact.__getitem__)
        self.sweep.forget(tied[best])
        return tied[best], exact[best]

    def _full_pass(self, gone: Sequence[Cut]) -> float:
        self.plan.provenance["layer_runs"] += self._pass_cost(gone)
        with removed(self.model, gone):
            return perplexity(self.model, self.calibration)

    def _pass_cost(self, gone: Sequence[Cut]) -> int:
        with removed(self.model, gone):
            present = sum(map(layer_cost, family_of(self.model).layers(self.model)))
        return present * self.calibration.sequences

    def _bar(self, total: int) -> tqdm:
        done, wanted = len(self.plan) + 1, sum(stage.steps for stage in self.stages)
        return tqdm(total=total, desc=f"removal {done} of {wanted}", leave=False, disable=not self.progress)

    def _save(self) -> None:
        if self.checkpoint is not None:
            self.plan.save(self.checkpoint)


def _check(model: PreTrainedModel, stages: list[Stage], method: str, metric: str) -> None:
    """Refuse what cannot be searched, before any work."""
    for name, value, known in (("method", method, METHODS), ("metric", metric, METRICS)):
        if value not in known:
            raise PlanError(f"search {name} {value!r} is unknown: expected one of {', '.join(known)}")
    asked: dict[str, int] = {}
    for stage in stages:
        there = sum(_removals(model, component, stage.group) for component in components(model, stage.kinds))
        key = " & ".join(stage.kinds)
        asked[key] = asked.get(key, 0) + stage.steps
        if asked[key] > there:
            raise PlanError(f"{asked[key]} removals of {key} were asked for, the model has {there}: ask for fewer")


def _removals(model: PreTrainedModel, component: Component, group: int) -> int:
    """How often something can be taken from a component: channels, `group` at a time, as long as some are left."""
    if component.kind != "mlp_channels":
        return 1
    width = family_of(model).channels(model)
    if width % group:
        raise PlanError(f"group {group} does not divide the {width} channels of {component}: choose a divisor")
    return width // group - 1


def _candidates(model: PreTrainedModel, stage: Stage, gone: Sequence[Cut]) -> list[Cut]:
    """What may go next, in depth order: not what is gone, nor what lies in it or holds it; channels one group less."""
    left, kept, width = [], dict(gone), family_of(model).channels
    for component in components(model, stage.kinds):
        if any(component.within(other) or other.within(component) for other in kept):
            continue
        if family_of(model).conflict(model, [*kept, component]):
            continue
        if component.kind == "mlp_channels":
            left.append(Cut(component, kept.get(component, width(model)) - stage.group))
        elif component not in kept:
            left.append(Cut(component))
    left = [cut for cut in left if cut.kept > 0 or cut.component.kind != "mlp_channels"]
    if not left:
        raise PlanError(f"nothing is left to remove of {' & '.join(stage.kinds)}: ask for fewer steps")
    return left


def _with(gone: Sequence[Cut], candidate: Cut) -> list[Cut]:
    """What is gone if a candidate goes too, in place of an earlier cut of the same component."""
    return [*(cut for cut in gone if cut.component != candidate.component), candidate]


def _resumed(found: Plan, wanted: Plan, path: Path) -> Plan:
    """The plan of a checkpoint, if it belongs to this search."""
    settings = (
        ("model", found.model, wanted.model),
        ("calibration", found.calibration, wanted.calibration),
        ("stages", found.stages, wanted.stages),
        ("metric", found.provenance.get("metric"), wanted.provenance["metric"]),
    )
    for name, theirs, ours in settings:
        if theirs != ours:
            raise PlanError(
                f"checkpoint {path} is of another search: {name} is {theirs}, expected {ours}; delete or move it"
            )
    return found
