"""The search: remove what the model misses least, again and again (section 3.3, Algorithms 1 and 2).

For each step and each candidate, the calibration perplexity without it is measured; the candidate with the lowest
goes for good. `method="plain"` is that, word for word. `method="fast"` gets the same numbers from one sweep through the
layers for each step (`sweep.py`), and settles ties within rounding by the plain rule, so that its plan is the same.

Other metrics take the place of perplexity as baselines: the divergence from the dense model is measured likewise, the
rest is estimated (`rankings.py`), where `method` makes no difference. With `per`, components that differ in cost
compete by what the loss rises for each unit of cost that they save (`savings.py`).

C candidates, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from .distributed import gathered, mine, on_first, rank, ranks
from .errors import BudgetMissedError, NothingLeftError, PlanError
from .families import family_of
from .importance import MEASURES, Measure, evaluating, finite, full_pass
from .inventory import parameters_removed
from .loading import identity
from .out_of_memory import enough_memory
from .plan import COUNTS, Plan, Removal, Stage
from .rankings import RANKINGS
from .removal import removed
from .resuming import check_ranks, resumed
from .savings import Budget, Savings, saving_no_less, standing, worth_removing
from .search_memory import default_gib
from .statistics import ROUNDING, within_error
from .sweep import Sweep
from .variants import layer_cost

METHODS = ("fast", "plain")
METRICS = (*MEASURES, *RANKINGS)


def search(
    model: PreTrainedModel,
    calibration: Calibration,
    stages: Stage | Iterable[Stage],
    *,
    method: str = "fast",
    metric: str = "perplexity",
    one_shot: bool = False,
    seed: int = 0,
    per: Savings | None = None,
    until: Budget | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    memory_gib: float | None = None,
) -> Plan:
    """Find which components to remove, and in which order.

    stages: what to remove, one stage after the other. method: "fast" or "plain", the same plan. metric: "perplexity"
    or another of `METRICS`, the lowest goes; seed: of "random". one_shot: every candidate is ranked once, alone, in the
    dense model, and never again. per: what each component saves; the lowest rise of the mean calibration loss for each
    unit of it goes (`savings.standing`), and what saves nothing stays. until: a budget that ends the search when it is
    reached, before the stages are done. checkpoint: a file that holds the plan so far after every step; a search that
    was killed, or had fewer steps, goes on from it. progress: a bar on stderr. memory_gib: what "fast" may hold beside
    the model and a layer at work, by default a part of what is free (`search_memory.py`).

    Each removal's score is that of a full pass; see `Plan` for what it is. Ties go to the lowest index in depth order.
    Under torchrun (`distributed.py`) every rank has to call this, and gets the same plan.
    Raises PlanError for stages that ask for more than there is, `per` with another metric than perplexity, a checkpoint
    of another search, and ranks that were given different ones; BudgetMissedError for a budget that the stages do not
    reach; ModelError for a dense score that is no finite number, and where a device runs out of memory.
    """
    stages = [stages] if isinstance(stages, Stage) else list(stages)
    for name, value, known in (("method", method, METHODS), ("metric", metric, METRICS)):
        if value not in known:
            raise PlanError(f"search {name} {value!r} is unknown: expected one of {', '.join(known)}")
    if per is not None and metric != "perplexity":
        raise PlanError(f"search metric {metric!r} cannot be weighed against {per.unit}: expected perplexity")
    check_stages(model, stages)
    memory_gib = default_gib(model.device) if memory_gib is None else memory_gib
    settings = _Settings(stages, method, metric, one_shot, seed, memory_gib, progress, per, until)
    with evaluating(model), enough_memory():
        run = _Search(model, calibration, settings, Path(checkpoint) if checkpoint is not None else None)
        try:
            while (stage := run.open_stage()) is not None:
                run.advance(stage)
        except NothingLeftError:
            if until is None:
                raise
    if until is not None and not until.reached(run.plan.gone):
        left = f"{until.savings.share(run.plan.gone):.1%} of the {until.savings.unit}"
        found = f"budget {until.text!r} is not reached, {len(run.plan)} removals save {left}"
        raise BudgetMissedError(f"{found}: allow more steps, or ask for less")
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
    per: Savings | None
    until: Budget | None

    @property
    def savings(self) -> list[Savings]:
        """All that is counted."""
        counted = {savings.unit: savings for savings in (self.per, self.until and self.until.savings) if savings}
        return list(counted.values())

    def provenance(self) -> dict[str, Any]:
        """What a plan keeps of them, and the counts that a search begins with."""
        found: dict[str, Any] = {"metric": self.metric, "one_shot": self.one_shot, "seed": self.seed}
        if self.metric in MEASURES:
            found |= {"method": self.method, "memory_gib": round(self.memory_gib, 3), **dict.fromkeys(COUNTS, 0)}
        rules = {"per": self.per, "until": self.until}
        found |= {name: rule.model_dump() for name, rule in rules.items() if rule is not None}
        if self.savings:
            found["saved"] = {savings.unit: [] for savings in self.savings}
        return found | {"ranks": ranks(), "ties_within_error": []}


class _Search:
    """A search under way: the plan so far, and one step at a time."""

    def __init__(
        self, model: PreTrainedModel, calibration: Calibration, settings: _Settings, checkpoint: Path | None
    ) -> None:
        self.model, self.calibration, self.settings, self.checkpoint = model, calibration, settings, checkpoint
        self.tolerance = ROUNDING[str(model.dtype).removeprefix("torch.")]
        self.measure: Measure | None = MEASURES[settings.metric]() if settings.metric in MEASURES else None
        self.ranked: dict[Cut, Tensor] = {}
        self.plan = self._begun()
        if self.measure is not None:
            self.measure.prepare(model, calibration)
            self.sweep = Sweep(model, calibration, self.measure, settings.memory_gib)
            if self.plan.dense_score is None:
                dense = self.measure.score(self._dense_pass())
                self.plan.dense_score = finite(model, dense, f"the {settings.metric}")
                self._save()

    def open_stage(self) -> int | None:
        """The number of the stage that still has removals to make; None when the plan is whole."""
        if self.settings.until is not None and self.settings.until.reached(self.plan.gone):
            return None
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
        left = worth_removing(self.settings.per, gone, candidates(self.model, self.settings.stages[number], gone))
        values = self._once(left) if self.settings.one_shot else self._values(base, left)
        chosen, score = self._choice(base, left, values)
        best = left[chosen]
        self.plan.removals.append(
            Removal(
                component=best.component,
                kept=best.kept or None,
                stage=number,
                score=score,
                parameters=parameters_removed(self.model, with_candidate(gone, best))
                - parameters_removed(self.model, gone),
            )
        )
        for savings in self.settings.savings:
            so_far = (self.plan.first(n).gone for n in range(1, len(self.plan) + 1))
            self.plan.provenance["saved"][savings.unit] = [savings.of(cuts) for cuts in so_far]
        as_good = [left[place] for place in within_error(values, chosen)]
        rivals = [str(rival) for rival in saving_no_less(self.settings.per, gone, best, as_good)]
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
        self._count("passes", len(without))
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
        with self._counting(), self._bar(len(mine(self.calibration.batches))) as bar:
            return self.sweep.values(gone, left, bar)

    def _swept_pass(self, gone: list[Cut], candidate: Cut | None, *, for_good: bool) -> Tensor:
        with self._counting():
            return self.sweep.full_pass(gone, candidate, for_good=for_good)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Inside, the sweep's layer runs count as the search's."""
        runs, reused = self.sweep.layer_runs, self.sweep.reused
        yield
        self._count("layer_runs", self.sweep.layer_runs - runs)
        self._count("layer_runs_reused", self.sweep.reused - reused)

    def _choice(self, gone: list[Cut], left: list[Cut], values: Tensor) -> tuple[int, float]:
        """The place of the best candidate, the first of equals, and its score.

        After a sweep, those as good within rounding are measured by full passes, as "plain" measures all.
        """
        scores = values.mean(dim=1).tolist() if self.measure is None else [self.measure.score(own) for own in values]
        places = list(range(len(left)))
        swept = self.measure is not None and self.settings.method == "fast"
        if self.measure is not None and swept:
            worst, least = (
                [
                    self._rank(gone, cut, self.measure.tied(score, error))
                    for cut, score in zip(left, scores, strict=True)
                ]
                for error in (self.tolerance / 2, -self.tolerance / 2)
            )
            places = [place for place in places if least[place] <= min(worst)]
            self._count("ties", len(places) - 1)
            settled = len(places) == 1 and not self.settings.one_shot
            for place in places:
                scores[place] = self.measure.score(self._swept_pass(gone, left[place], for_good=settled))
        best = min(places, key=lambda place: self._rank(gone, left[place], scores[place]))
        if len(places) > 1 and swept and not self.settings.one_shot:
            self.sweep.forget(left[best])
        return best, scores[best]

    def _rank(self, gone: list[Cut], candidate: Cut, score: float) -> tuple[float, ...]:
        """Where a candidate of this score stands: the lowest goes."""
        if self.settings.per is None:
            return (score,)
        before = self.plan.dense_score if self.settings.one_shot else self.plan.scores[-1]
        assert before is not None
        rise = math.log(score) - math.log(before) if math.isfinite(score) else math.inf
        return (*standing(rise, self.settings.per.further(gone, candidate)), score)

    def _dense_pass(self) -> Tensor:
        if self.settings.method == "plain":
            return self._full_pass([])
        if (stage := self.open_stage()) is not None:
            self.sweep.prepare(candidates(self.model, self.settings.stages[stage], []))
        return self._swept_pass([], None, for_good=True)

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
        """The plan of the checkpoint, or an empty one, the same on every rank."""
        plan = Plan(
            stages=self.settings.stages,
            model=identity(self.model),
            calibration=self.calibration.describe(),
            provenance=self.settings.provenance(),
        )
        check_ranks(gathered({rank(): plan}))
        path = self.checkpoint
        found = None if path is None else on_first(lambda: Plan.load(path) if path.exists() else None)
        return plan if path is None or found is None else resumed(found, plan, path)

    def _save(self) -> None:
        """Store the plan; no rank goes on before it is stored."""
        path = self.checkpoint
        if path is not None:
            on_first(lambda: self.plan.save(path))
