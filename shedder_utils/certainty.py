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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .calibration import Calibration, calibrate
from .components import Cut
from .errors import DataError
from .importance import perplexity
from .plan import Plan, Stage
from .removal import removed
from .search import search
from .statistics import correlations

Scores = Mapping[str, Callable[[PreTrainedModel], float]]
"""What is measured of a pruned model, by name."""


@dataclass(frozen=True)
class Certainty:
    """What several searches of one model agree on.

    plans: by the name of the calibration data. correlation: for each pair, Spearman's and Kendall's correlation of the
    orders, and the share of removals that both make. spread: for each number of removals and each measurement, the
    mean, standard deviation, least and most over the plans. ties: removals of each plan with a rival within error.
    """

    plans: dict[str, Plan]
    correlation: pd.DataFrame
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

    held_out: text whose perplexity is measured after so many removals as `after` lists; measurements: more to measure
    there, such as a task's accuracy. checkpoints: a folder where every search goes on from; options: of `search`.
    Raises DataError for fewer than two calibrations.
    """
    if len(calibrations) < 2:
        raise DataError(f"order certainty: {len(calibrations)} calibrations were given, expected two or more")
    plans = {}
    for name, calibration in calibrations.items():
        checkpoint = checkpoints / f"{name}.json" if checkpoints else None
        plans[name] = search(model, calibration, stages, checkpoint=checkpoint, **options)
    measured = {"perplexity": lambda pruned: perplexity(pruned, held_out), **(measurements or {})}
    return Certainty(
        plans=plans,
        correlation=correlations({name: names(plan) for name, plan in plans.items()}),
        spread=_spread(model, plans, after, measured),
        ties=pd.Series({name: len(plan.provenance["ties_within_error"]) for name, plan in plans.items()}, name="ties"),
    )


def draws(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    samples: Sequence[int],
    seeds: Sequence[int],
    *,
    sequence_length: int,
    batch_size: int,
) -> dict[str, Calibration]:
    """Calibration data by name, such as "pocket-prose, 64 samples, seed 1": every source, size and seed together."""
    settings = {"sequence_length": sequence_length, "batch_size": batch_size}
    return {
        f"{source}, {n} samples, seed {seed}": calibrate(source, tokenizer, samples=n, seed=seed, **settings)
        for source in sources
        for n in samples
        for seed in seeds
    }


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


def _spread(
    model: PreTrainedModel, plans: Mapping[str, Plan], after: Iterable[int], measurements: Scores
) -> pd.DataFrame:
    counts = list(after)
    runs = {name: trajectory(model, plan, counts, measurements) for name, plan in plans.items()}
    return pd.concat(runs).groupby(level="removals").agg(["mean", "std", "min", "max"])
