"""How sure is the order? What searches with other calibration data agree on.

Other draws of calibration data, other sizes and other texts give other plans. Their orders are compared by rank
correlation, and the plans by what they leave on text that none of them saw. How sure a single search is of each choice
stands in its plan (`provenance["ties_within_error"]`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .calibration import Calibration
from .candidates import candidates
from .components import Cut
from .errors import DataError
from .importance import Perplexity, evaluating, perplexity
from .plan import Plan, Stage
from .removal import removed
from .search import search
from .search_memory import default_gib
from .statistics import correlations
from .sweep import Sweep

Scores = Mapping[str, Callable[[PreTrainedModel], float]]
"""What is measured of a pruned model, by name."""


@dataclass(frozen=True)
class Finding:
    """What one calibration data finds.

    plan: of a search; alone: by component, the mean calibration loss in nats of the dense model without it, which is
    how the first step ranks all; left: what is measured after some of the plan's removals, a row for each number.
    """

    plan: Plan
    alone: dict[str, float]
    left: pd.DataFrame

    @property
    def ranking(self) -> list[str]:
        """All components, the one that the dense model misses least first."""
        return sorted(self.alone, key=self.alone.__getitem__)


@dataclass(frozen=True)
class Certainty:
    """What several searches of one model agree on.

    plans: by the name of the calibration data. correlation: for each pair, Spearman's and Kendall's correlation of the
    orders, and the share of removals that both make; ranking: the same for how the first step ranks all components.
    spread: for each number of removals and each measurement, the mean, standard deviation, least and most over the
    plans. ties: removals of each plan with a rival within error.
    """

    plans: dict[str, Plan]
    correlation: pd.DataFrame
    ranking: pd.DataFrame
    spread: pd.DataFrame
    ties: pd.Series


def order_certainty(
    model: PreTrainedModel,
    calibrations: Mapping[str, Calibration],
    stages: Stage | Sequence[Stage],
    *,
    held_out: Calibration,
    after: Iterable[int],
    measurements: Scores | None = None,
    checkpoints: Path | None = None,
    **options: Any,
) -> Certainty:
    """Search once with each calibration data, and compare the orders and what they leave.

    checkpoints: a folder where every search goes on from; the others as for `finding`.
    Raises DataError for fewer than two calibrations.
    """
    if len(calibrations) < 2:
        raise DataError(f"order certainty: {len(calibrations)} calibrations were given, expected two or more")
    after, found = list(after), {}
    for name, calibration in calibrations.items():
        checkpoint = checkpoints / f"{name}.json" if checkpoints else None
        settings: dict[str, Any] = {
            "held_out": held_out, "after": after, "measurements": measurements, "checkpoint": checkpoint
        }  # fmt: skip
        found[name] = finding(model, calibration, stages, **settings, **options)
    return Certainty(
        plans={name: one.plan for name, one in found.items()},
        correlation=correlations({name: names(one.plan) for name, one in found.items()}),
        ranking=correlations({name: one.ranking for name, one in found.items()}),
        spread=pd.concat([one.left for one in found.values()])
        .groupby(level="removals")
        .agg(["mean", "std", "min", "max"]),
        ties=pd.Series(
            {name: len(one.plan.provenance["ties_within_error"]) for name, one in found.items()}, name="ties"
        ),
    )


def finding(
    model: PreTrainedModel,
    calibration: Calibration,
    stages: Stage | Sequence[Stage],
    *,
    held_out: Calibration,
    after: Iterable[int],
    measurements: Scores | None = None,
    checkpoint: Path | None = None,
    memory_gib: float | None = None,
    **options: Any,
) -> Finding:
    """What one calibration data finds: how it ranks the components of the first stage, and a search.

    held_out: text whose perplexity is measured after so many removals as `after` lists; measurements: more to measure
    there, such as a task's accuracy. The others are as for `search`.
    """
    stages = [stages] if isinstance(stages, Stage) else list(stages)
    settings = {"checkpoint": checkpoint, "memory_gib": memory_gib, **options}
    plan = search(model, calibration, stages, **settings)
    measured = {"perplexity": lambda pruned: perplexity(pruned, held_out), **(measurements or {})}
    left = trajectory(model, plan, after, measured)
    return Finding(plan, losses_alone(model, calibration, stages[0], memory_gib), left)


def losses_alone(
    model: PreTrainedModel, calibration: Calibration, stage: Stage, memory_gib: float | None = None
) -> dict[str, float]:
    """By candidate of a stage, the mean calibration loss in nats of the dense model without it, from one sweep."""
    budget = default_gib(model.device) if memory_gib is None else memory_gib
    left = candidates(model, stage, [])
    with evaluating(model):
        values = Sweep(model, calibration, Perplexity(), budget).values([], left, tqdm(disable=True))
    return dict(zip(map(str, left), values.mean(dim=1).tolist(), strict=True))


def beginning(calibration: Calibration, sequences: int) -> Calibration:
    """The first sequences of calibration data. Raises DataError where there are fewer."""
    if calibration.sequences < sequences:
        raise DataError(
            f"calibration data has {calibration.sequences} sequences, {sequences} were asked for: draw more texts"
        )
    rows, size = torch.cat(calibration.batches)[:sequences], len(calibration.batches[0])
    return Calibration(list(rows.split(size)), {**calibration.source, "first_sequences": sequences})


def names(plan: Plan) -> list[str]:
    """A plan's removals by name in order; a component that loses channels again and again is named with what stays."""
    return [str(Cut(removal.component, removal.kept or 0)) for removal in plan.removals]


def trajectory(model: PreTrainedModel, plan: Plan, after: Iterable[int], measurements: Scores) -> pd.DataFrame:
    """What is measured of a model after so many removals of a plan: a row for each number, a column for each name."""
    rows = {}
    for n in after:
        with removed(model, plan.first(n).gone):
            rows[n] = {name: measure(model) for name, measure in measurements.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("removals")
