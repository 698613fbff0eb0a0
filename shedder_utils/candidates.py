"""Candidates: what may be removed next, and whether stages ask for more than there is."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from .components import Component, Cut
from .errors import PlanError
from .families import family_of
from .plan import Stage
from .removal import components


def candidates(model: PreTrainedModel, stage: Stage, gone: Sequence[Cut]) -> list[Cut]:
    """What may go next, in depth order: not what is gone, nor what lies in it or holds it; channels one group less.

    Raises PlanError where nothing is left.
    """
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


def with_candidate(gone: Sequence[Cut], candidate: Cut) -> list[Cut]:
    """What is gone if a candidate goes too, in place of an earlier cut of the same component."""
    return [*(cut for cut in gone if cut.component != candidate.component), candidate]


def check_stages(model: PreTrainedModel, stages: Sequence[Stage]) -> None:
    """Refuse stages that ask for more than there is, before any work, with a PlanError."""
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
