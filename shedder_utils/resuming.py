"""Resuming: whether the checkpoint of a search that was stopped belongs to the search that wants to go on from it.

Likewise whether the processes of one search were all given the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import PlanError
from .plan import Plan, shared_removals
from .savings import Budget, Savings


def resumed(found: Plan, wanted: Plan, path: Path) -> Plan:
    """The plan of a checkpoint, if it belongs to the search of the empty plan `wanted`, or is how that begins.

    Raises PlanError with the first setting that differs.
    """
    if len(found) <= shared_removals(found.stages, wanted.stages):
        found = found.model_copy(update={"stages": wanted.stages})
    if differs := _difference(found, wanted):
        raise another_search(path, *differs)
    return found


def another_search(path: Path, name: str, there: Any, here: Any) -> PlanError:
    """The error for a checkpoint in which a setting differs."""
    return PlanError(f"checkpoint {path} is of another search: {name} is {there}, expected {here}; delete or move it")


def check_ranks(plans: Sequence[Plan]) -> None:
    """Refuse a search that its ranks understand differently. plans: the empty plan of each.

    Raises PlanError with the first setting that differs.
    """
    for rank, plan in enumerate(plans):
        if differs := _difference(plan, plans[0]):
            name, there, here = differs
            raise PlanError(
                f"rank {rank} was given another search than rank 0: {name} is {there}, expected {here}; give all the "
                "same model, data and settings, and savings that one of them has weighed"
            )


def _difference(found: Plan, wanted: Plan) -> tuple[str, Any, Any] | None:
    """Name and both values of the first setting in which two plans are not of one search."""
    theirs, ours = _identifying(found), _identifying(wanted)
    for name in dict.fromkeys([*ours, *theirs]):
        there, here = theirs.get(name, "not there"), ours.get(name, "not there")
        if there != here:
            return name, there, here
    return None


def _identifying(plan: Plan) -> dict[str, Any]:
    """By name, the settings that a search must share with its checkpoint: "calibration seed", "stage 1 steps", ..."""
    asked = ("metric", "one_shot", "seed")
    metric: dict[str, Any] = {name: plan.provenance[name] for name in asked if name in plan.provenance}
    rules: dict[str, type[Savings | Budget]] = {"per": Savings, "until": Budget}
    for name in (name for name in rules if name in plan.provenance):
        rule = rules[name].model_validate(plan.provenance[name])
        timing = (rule.savings if isinstance(rule, Budget) else rule).timing
        metric |= {f"{name} {setting}": value for setting, value in timing.items()} | {name: str(rule)}
    stages = [stage.model_dump() for stage in plan.stages]
    parts: dict[str, dict[str, Any]] = {"model": plan.model, "calibration": plan.calibration}
    parts |= {f"stage {number}": stage for number, stage in enumerate(stages, start=1)}
    named = {f"{part} {name}": value for part, settings in parts.items() for name, value in settings.items()}
    return metric | {"stages": len(stages)} | named
