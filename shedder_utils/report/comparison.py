"""Yours against recorded: whether two records of one run agree, and if not, which input differs first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from ..plan import Plan
from ..records import Metric, Record
from ..savings import MEASURED, standing
from ..statistics import ROUNDING
from .runs import error_of

SAME = 1e-4
"""By how much of it a number without standard error may differ between machines."""
TIMES = ("/seconds", "/low", "/high", "/peak_mib")
"""Endings of metrics that are no result of their own: what one machine took, and the ends of intervals."""


def inputs(yours: Record, recorded: Record) -> Iterator[str]:
    """What differs in what the two were made from, causes first: model, settings, data, removals, versions, machine."""
    for part in ("fingerprint", "dtype", "revision"):
        yield from _differ(f"model {part}", getattr(yours.model, part), getattr(recorded.model, part))
    yield from _settings("setting ", *map(_without_times, (yours.spec, recorded.spec)))
    yield from _times(yours, recorded)
    for role in sorted({*yours.data, *recorded.data}):
        ours, theirs = (record.data[role].fingerprint if role in record.data else None for record in (yours, recorded))
        yield from _differ(f"data fingerprint of {role}", ours, theirs)
    yield from _differ("removals", " ".join(yours.model.removals), " ".join(recorded.model.removals))
    machine, other = yours.environment.model_dump(), recorded.environment.model_dump()
    for name in machine:
        label = "" if name in ("scan", "device", "cpu", "threads") else "version of "
        yield from _differ(f"{label}{name}", machine[name], other[name])
    yield from _differ("commit", yours.code.commit, recorded.code.commit)


def _differ(what: str, ours: object, theirs: object) -> Iterator[str]:
    if ours != theirs:
        yield f"{what}: {_short(ours)} here, {_short(theirs)} recorded"


def _short(value: object) -> str:
    text = "none" if value in (None, "") else str(value)
    return text if len(text) <= 60 else f"{text[:12]}..."


def _settings(prefix: str, ours: Any, theirs: Any) -> Iterator[str]:
    """The settings that differ, by their place."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys((*theirs, *ours)):
            separator = "" if prefix.endswith(" ") else "."
            yield from _settings(f"{prefix}{separator}{key}", ours.get(key), theirs.get(key))
    else:
        yield from _differ(prefix, ours, theirs)


def _without_times(spec: dict[str, Any]) -> dict[str, Any]:
    """Settings less the savings that a search was given, where these were measured: nobody sets them."""
    return {**spec, "per": {"unit": spec["per"]["unit"]}} if _weighs_times(spec) else spec


def _weighs_times(spec: dict[str, Any]) -> bool:
    return "per" in spec and spec["per"]["unit"] in MEASURED


def _times(yours: Record, recorded: Record) -> Iterator[str]:
    """That two searches chose by other times, each by those of its machine: so either may be right."""
    both_timed = _weighs_times(yours.spec) and _weighs_times(recorded.spec)
    if both_timed and yours.spec["per"] != recorded.spec["per"]:
        ours, theirs = (f"{one.environment.cpu}, {one.environment.device}" for one in (yours, recorded))
        where = f"another machine: {ours} here, {theirs} recorded" if ours != theirs else f"{ours} at another time"
        yield f"savings in {yours.spec['per']['unit']} time were measured on {where}"


def numbers(yours: Record, recorded: Record) -> Iterator[str]:
    """The results that differ by more than chance and rounding explain; one of them is missing: also that."""
    for name in dict.fromkeys((*recorded.metrics, *yours.metrics)):
        ours, theirs = yours.metrics.get(name), recorded.metrics.get(name)
        if ours is None or theirs is None:
            yield f"{name} is {'not here' if ours is None else 'not recorded'}"
        elif name.endswith("/speedup"):
            if not _meet(name, yours, recorded):
                yield f"{name}: {ours.value:.2f} here, {theirs.value:.2f} recorded, and their intervals do not meet"
        elif not name.endswith(TIMES) and not _agree(ours, theirs):
            yield f"{name}: {ours.value:.6g} here, {theirs.value:.6g} recorded"
    yield from _scores(yours, recorded)


def _meet(name: str, yours: Record, recorded: Record) -> bool:
    """Whether the intervals of a speedup in two records have a value in common."""
    (low, high), (other_low, other_high) = (
        [record.metrics[name.replace("/speedup", end)].value for end in ("/low", "/high")]
        for record in (yours, recorded)
    )
    return low <= other_high and other_low <= high


def _agree(ours: Metric, theirs: Metric) -> bool:
    """Equal, or within two standard errors of the recorded number, or within rounding where it has none."""
    if ours.value == theirs.value or (math.isnan(ours.value) and math.isnan(theirs.value)):
        return True
    error = error_of(theirs)
    allowed = SAME * abs(theirs.value) if math.isnan(error) else 2 * error
    return abs(ours.value - theirs.value) <= allowed


def _scores(yours: Record, recorded: Record) -> Iterator[str]:
    """The first score of two searches with one order that differs beyond rounding."""
    if yours.plan is None or recorded.plan is None:
        return
    plans = [Plan.model_validate(record.plan) for record in (yours, recorded)]
    if plans[0].components != plans[1].components:
        return
    for n, (ours, theirs) in enumerate(zip(plans[0].scores, plans[1].scores, strict=True)):
        if ours is not None and theirs is not None and not _near(ours, theirs, SAME, plans[1]):
            yield f"score after {n} removals: {ours:.6g} here, {theirs:.6g} recorded"
            return


def _near(ours: float, theirs: float, tolerance: float, plan: Plan) -> bool:
    """Whether two scores differ by no more than a tolerance: a share of them, or nats where the metric is in nats."""
    if plan.provenance.get("metric") == "kl":
        return math.isclose(ours, theirs, rel_tol=0, abs_tol=tolerance)
    return math.isclose(ours, theirs, rel_tol=tolerance)


def order(yours: Record, recorded: Record) -> tuple[str, bool] | None:
    """Where two searches part, and whether a tie within rounding explains it; None if they never do.

    After a tie the searches go different ways, so only the first difference is judged.
    """
    plans = [Plan.model_validate(record.plan) for record in (yours, recorded)]
    ours, theirs = (plan.removals for plan in plans)
    for n, (own, other) in enumerate(zip(ours, theirs, strict=False), 1):
        if (own.component, own.kept) != (other.component, other.kept):
            tied = _tied(plans, n, 2 * ROUNDING[recorded.model.dtype])
            return f"removal {n} is {own.component} here, {other.component} recorded", tied
    if len(ours) != len(theirs):
        return f"the order has {len(ours)} removals here, {len(theirs)} recorded", False
    return None


def _tied(plans: Sequence[Plan], n: int, rounding: float) -> bool:
    """Whether removal n, in which two plans part, has scores as close as those of a tie on two machines.

    rounding: of measured scores, twice what `search` calls a tie, and one of the searches has to state that it met one;
    where a removal is taken over, the search that it comes from states that. What is estimated rounds like any number.
    """
    ours, theirs = (plan.removals[n - 1].score for plan in plans)
    if ours is None or theirs is None:
        return False
    if not any("ties" in plan.provenance for plan in plans):
        return _near(ours, theirs, max(SAME, rounding), plans[1])
    stated = any(plan.provenance.get("ties") or n <= _taken_over(plan) for plan in plans)
    if "per" in plans[1].provenance:
        return stated and _as_dear(plans, n, rounding)
    return stated and _near(ours, theirs, rounding, plans[1])


def _as_dear(plans: Sequence[Plan], n: int, rounding: float) -> bool:
    """Whether the removals n of two plans raise the loss as much for each unit that they save, within rounding."""
    prices, savings = [], []
    for plan in plans:
        provenance = plan.provenance
        before, score = plan.scores[0 if provenance["one_shot"] else n - 1], plan.scores[n]
        saved = [0.0, *provenance["saved"][provenance["per"]["unit"]]]
        assert before is not None
        assert score is not None
        savings.append(saved[n] - saved[n - 1])
        prices.append(standing(math.log(score / before), savings[-1])[0])
    return abs(prices[0] - prices[1]) <= rounding * sum(1 / saving for saving in savings) / 2


def _taken_over(plan: Plan) -> int:
    """How many of a plan's removals are another search's."""
    return int(plan.provenance.get("taken_over", {}).get("removals", 0))
