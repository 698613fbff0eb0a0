"""Candidates: what may be removed next, and whether stages ask for more than there is."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from .components import PARTS, Component, Cut
from .errors import NothingLeftError, PlanError
from .families import family_of
from .plan import Stage
from .removal import components


def candidates(model: PreTrainedModel, stage: Stage, gone: Sequence[Cut]) -> list[Cut]:
    """What may go next, in depth order: not what is gone, nor what lies in it or holds it; parts one group less.

    Raises NothingLeftError where that is so.
    """
    left, kept, width = [], dict(gone), family_of(model).channels
    for component in components(model, stage.kinds):
        if any(component.within(other) or other.within(component) for other in kept):
            continue
        if family_of(model).conflict(model, [*kept, component]):
            continue
        if component.kind in PARTS:
            left.append(Cut(component, kept.get(component, width(model, component.kind)) - stage.group))
        elif component not in kept:
            left.append(Cut(component))
    left = [cut for cut in left if cut.kept > 0 or cut.component.kind not in PARTS]
    if not left:
        raise NothingLeftError(f"nothing is left to remove of {' & '.join(stage.kinds)}: ask for less")
    return left


def with_candidate(gone: Sequence[Cut], candidate: Cut) -> list[Cut]:
    """What is gone if a candidate goes too, in place of an earlier cut of the same component."""
    return [*(cut for cut in gone if cut.component != candidate.component), candidate]


def check_stages(model: PreTrainedModel, stages: Sequence[Stage]) -> None:
    """Refuse stages that ask for more than there is, before any work, with a PlanError."""
    asked: dict[str, int] = {}
    for stage in stages:
        there = removals(model, stage)
        key = " & ".join(stage.kinds)
        asked[key] = asked.get(key, 0) + stage.steps
        if asked[key] > there:
            raise PlanError(f"{asked[key]} removals of {key} were asked for, the model has {there}: ask for fewer")


def removals(model: PreTrainedModel, stage: Stage) -> int:
    """How many removals there are of a stage's kinds, at most where what goes first decides what is left.

    Raises PlanError for a group that does not fit the model.
    """
    return _at_most(model, components(model, stage.kinds), stage.group)


def _at_most(model: PreTrainedModel, there: Sequence[Component], group: int) -> int:
    """How many removals there are of components: of those that hold others either they go, or what lies in them."""
    most = 0
    for component in there:
        if not any(component.within(other) for other in there):
            inside = [other for other in there if other.within(component)]
            most += max(_removals(model, component, group), _at_most(model, inside, group))
    return most


def _removals(model: PreTrainedModel, component: Component, group: int) -> int:
    """How often something can be taken from a component: parts, `group` at a time, as long as some are left."""
    if component.kind not in PARTS:
        return 1
    width, together = (how(model, component.kind) for how in (family_of(model).channels, family_of(model).together))
    if width % group:
        what = PARTS[component.kind]
        raise PlanError(f"group {group} does not divide the {width} {what} of {component}: choose a divisor")
    if group % together:
        raise PlanError(
            f"group {group} of {component}: expected a multiple of {together}, the groups with their own B and C"
        )
    return width // group - 1
