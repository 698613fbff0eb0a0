"""Passes: how often a search runs through its calibration data, counted from the components that a model has.

By Algorithm 1 of the paper it is once for each candidate of each step; the sweep starts each at its layer.
"""

from __future__ import annotations

from transformers import PreTrainedModel

from .components import PARTS
from .families import family_of
from .profiles import Strategy, Study
from .removal import components
from .shapes import Work


def candidates_by_step(model: PreTrainedModel, study: Study | Strategy) -> list[int]:
    """How many candidates each step of a search has: its passes by Algorithm 1.

    Exact where no kind takes from another; where one does, as blocks take their SSMs, at most, for what goes first
    decides what is left. An MLP stays a candidate as long as it has channels to lose, a mixer as long as it has heads.
    """
    counts: list[int] = []
    for number, stage in enumerate(study.stages):
        there, shrinks = len(components(model, stage.kinds)), not PARTS.keys() & set(stage.kinds)
        before = sum(s.steps for s in study.stages[:number] if set(s.kinds) <= set(stage.kinds)) if shrinks else 0
        counts += [there - before - step if shrinks else there for step in range(stage.steps)]
    return counts


def ranked_by_step(model: PreTrainedModel, study: Study | Strategy, known: int = 0) -> list[int]:
    """How many candidates a search ranks in each step after those known: all, or if it ranks once, those that are new.

    New are all when a kind first comes up, and what a removal leaves of a component that loses parts.
    """
    counts = candidates_by_step(model, study)
    if not study.options.get("one_shot"):
        return counts[known:]
    kinds_by_step = [set(stage.kinds) for stage in study.stages for _ in range(stage.steps)]
    new, ranked = list[int](), set[str]()
    for count, kinds in zip(counts[known:], kinds_by_step[known:], strict=True):
        new.append(int(bool(PARTS.keys() & kinds)) if kinds <= ranked else count)
        ranked |= kinds
    return new


def share_from(model: PreTrainedModel, study: Study | Strategy, work: Work) -> list[float]:
    """For each step the share of a pass that a candidate's variant still has to run, from its layer on; the mean."""
    shares = []
    for stage in study.stages:
        layers = [family_of(model).layer_of(model, component) for component in components(model, stage.kinds)]
        left = [sum(work.layers[layer:]) + work.head for layer in layers]
        shares += [sum(left) / len(left) / work.whole] * stage.steps
    return shares
