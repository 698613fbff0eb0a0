"""Resuming: whether the checkpoint of a search that was stopped belongs to the search that wants to go on from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import PlanError
from .plan import Plan
from .savings import Budget, Savings


def resumed(found: Plan, wanted: Plan, path: Path) -> Plan:
    """The plan of a checkpoint, if it belongs to the search of the empty plan `wanted`.

    Raises PlanError with the first setting that differs.
    """
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
    asked = ("metric", "one_shot", "seed")
    metric: dict[str, Any] = {name: plan.provenance[name] for name in asked if name in plan.provenance}
    rules: dict[str, type[Savings | Budget]] = {"per": Savings, "until": Budget}
    there = {name: rule for name, rule in rules.items() if name in plan.provenance}
    metric |= {name: str(rule.model_validate(plan.provenance[name])) for name, rule in there.items()}
    stages = [stage.model_dump() for stage in plan.stages]
    parts: dict[str, dict[str, Any]] = {"model": plan.model, "calibration": plan.calibration}
    parts |= {f"stage {number}": stage for number, stage in enumerate(stages, start=1)}
    named = {f"{part} {name}": value for part, settings in parts.items() for name, value in settings.items()}
    return metric | {"stages": len(stages)} | named
