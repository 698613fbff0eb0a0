"""What the records of a profile say: scores by the paper's columns, removal orders, numbers of layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from pathlib import Path

from pydantic import ValidationError

from .. import records
from ..errors import PlanError, RecordError
from ..files import in_project
from ..plan import Plan
from ..profiles import RELEASED, SEARCH, Profile, ReleasedOrder
from ..records import Metric, Record
from ..statistics import paired_error

BLOCKS, SSMS = "block_pruning", "ssm_pruning"
Place = tuple[str, str, str]
"""Study, model and setting of a record."""


class Runs:
    """The records of one profile under one root, `runs` or `results`; a root that does not exist has none.

    Whatever it gives out it remembers, so that a table or verdict can name the records behind it. Raises RecordError
    for a broken record.
    """

    def __init__(self, profile: Profile, root: str | Path) -> None:
        self.profile, self.root = profile, in_project(root)
        found = records.find(self.root, profile=profile.name)
        self._records = {(record.study, record.model.name, record.setting): record for record in found}
        self._given: dict[Place, Record] = {}

    def fresh(self) -> Runs:
        """The same records, none of them given out yet."""
        other = copy(self)
        other._given = {}
        return other

    @property
    def given(self) -> tuple[Record, ...]:
        """The records given out so far, in order of their places."""
        return tuple(self._given[place] for place in sorted(self._given))

    def studies(self, table: int) -> list[str]:
        """The studies of the profile that fill a table of the paper."""
        return [name for name, study in self.profile.studies.items() if study.table == table]

    def all(self) -> tuple[Record, ...]:
        """Every record, in order of their places."""
        return tuple(self._records.values())

    def of(self, study: str, model: str) -> list[Record]:
        """The records of a study of a model, in order of their settings."""
        found = [record for place, record in self._records.items() if place[:2] == (study, model)]
        return [record for record in map(self._give, found) if record]

    def at(self, study: str, model: str, setting: str) -> Record | None:
        """The record at a place."""
        return self._give(self._records.get((study, model, setting)))

    def search(self, study: str, model: str) -> Record | None:
        """The record of a study's search."""
        return self.at(study, model, SEARCH)

    def plan(self, study: str, model: str) -> Plan | None:
        """The removals that a study's search found. Raises RecordError for a record that holds none."""
        return self._plan(self.search(study, model))

    def _plan(self, record: Record | None) -> Plan | None:
        if record is None:
            return None
        try:
            return Plan.model_validate(record.plan)
        except (ValidationError, PlanError) as error:
            file = records.path(self.root, record.profile, record.study, record.model.name, record.setting)
            raise RecordError(f"{file}: expected the plan of a search, found none; delete it and run again") from error

    def curve(self, study: str, model: str) -> list[float]:
        """The calibration perplexity with 0, 1, 2, ... removals of a study's search; empty where it was not run."""
        plan = self.plan(study, model)
        return [math.nan if score is None else score for score in plan.scores] if plan else []

    def evaluated(self, study: str, model: str, n_removed: int) -> Record | None:
        """The evaluation of a model after the first n removals of a study's search; the dense model's for 0.

        Scores of other weights or another order than the search's are left over from an earlier run and do not count.
        """
        if n_removed == 0:
            return self.at("dense", model, "scores")
        plan, search = self.plan(study, model), self.search(study, model)
        if plan is None or search is None or len(plan) < n_removed:
            return None
        gone = tuple(map(str, plan.first(n_removed).gone))
        runs = [record for place, record in self._records.items() if place[:2] == (study, model)]
        same = [run for run in runs if run.model.fingerprint == search.model.fingerprint]
        return self._give(next((run for run in same if run.model.removals == gone), None))

    def scores(self, study: str, model: str, n_removed: int) -> dict[str, Metric]:
        """The scores of `evaluated` by column of the paper: perplexity, and accuracies in points.

        Their average is that of the paper's tables of the model (`Profile.accuracies_of`). A column that was not
        measured is left out, and the average of it too.
        """
        record = self.evaluated(study, model, n_removed)
        return {} if record is None else by_column(record, self.profile)

    def released(self, order: ReleasedOrder, n_removed: int) -> dict[str, Metric]:
        """The scores by column after the first n removals of a released order; those of other removals do not count."""
        record = self._records.get((RELEASED, order.model, order.setting(n_removed)))
        if record is None or record.model.removals != tuple(map(str, order.plan.first(n_removed).gone)):
            return {}
        self._give(record)
        return by_column(record, self.profile)

    def dense(self, model: str) -> dict[str, Metric]:
        """The scores of the dense model."""
        return self.scores("dense", model, 0)

    def layers(self, model: str) -> int | None:
        """How many layers the dense model has, as far as a search or the profile says."""
        plans = [self._plan(self._records.get((study, model, SEARCH))) for study in self.profile.studies]
        settings = self.profile.models[model].random
        return next((int(plan.model["layers"]) for plan in plans if plan), settings.layers if settings else None)

    def _give(self, record: Record | None) -> Record | None:
        if record is not None:
            self._given[record.study, record.model.name, record.setting] = record
        return record


def by_column(record: Record, profile: Profile) -> dict[str, Metric]:
    """The scores of a record by column of the paper: see `Runs.scores`."""
    found: dict[str, Metric] = {}
    for column in profile.evaluation.tasks:
        metric = record.metrics.get(f"{column.task}/{profile.metric_of(record.model.name, column)}")
        if metric is not None:
            found[column.column] = metric if column.metric == "perplexity" else _points(metric)
    averaged = profile.accuracies_of(record.model.name)
    if found.keys() >= set(averaged):
        found["average"] = mean([found[name] for name in averaged])
    return found


def mean(metrics: Sequence[Metric]) -> Metric:
    """The mean of independent measurements, with its standard error; n is the number of all items."""
    errors = [error_of(metric) for metric in metrics]
    items = [metric.items for metric in metrics if metric.items]
    return Metric(
        value=math.fsum(metric.value for metric in metrics) / len(metrics),
        stderr=math.hypot(*errors) / len(metrics),
        n=sum(metric.n or 0 for metric in metrics),
        items=" ".join(items) if len(items) == len(metrics) else None,
    )


def error_of(metric: Metric) -> float:
    """The standard error, not a number where there is none."""
    return math.nan if metric.stderr is None else metric.stderr


def error_of_sum(weights: Sequence[float], metrics: Sequence[Metric]) -> float:
    """The standard error of a weighted sum of metrics: paired for accuracies, in points, on the same items.

    Where a record does not say how single items were answered, and for perplexities, they are taken as independent,
    which makes it rather too wide.
    """
    items = [metric.items for metric in metrics if metric.items]
    error = paired_error(weights, items) if len(items) == len(metrics) else None
    independent = math.hypot(*(weight * error_of(m) for weight, m in zip(weights, metrics, strict=True)))
    return independent if error is None else 100 * error


def _points(metric: Metric) -> Metric:
    return Metric(value=100 * metric.value, stderr=100 * error_of(metric), n=metric.n, items=metric.items)
