"""How sure is the order? What one calibration data finds, to be compared with what others do (`report/certainty.py`).

Other draws of calibration data, other sizes and other texts give other plans: their orders are compared, and what they
leave on text that none of them saw. How sure a single search is of each choice stands in its plan
(`provenance["ties_within_error"]`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from .calibration import Calibration
from .candidates import candidates
from .errors import DataError
from .importance import Perplexity, evaluating, perplexity
from .plan import Plan, Stage
from .removal import removed
from .search import search
from .search_memory import default_gib
from .sweep import Sweep


@dataclass(frozen=True)
class Finding:
    """What one calibration data finds.

    plan: of a search; alone: by component, the mean calibration loss in nats of the dense model without it, which is
    how the first step ranks all; left: the perplexity of held-out text after some of the plan's removals, a row for
    each number.
    """

    plan: Plan
    alone: dict[str, float]
    left: pd.DataFrame


def finding(
    model: PreTrainedModel,
    calibration: Calibration,
    stages: Stage | Sequence[Stage],
    *,
    held_out: Calibration,
    after: Iterable[int],
    checkpoint: Path | None = None,
    memory_gib: float | None = None,
    **options: Any,
) -> Finding:
    """What one calibration data finds: how it ranks the components of the first stage, and a search.

    held_out: text whose perplexity is measured after so many removals as `after` lists. The others are as for `search`.
    """
    stages = [stages] if isinstance(stages, Stage) else list(stages)
    settings = {"checkpoint": checkpoint, "memory_gib": memory_gib, **options}
    plan = search(model, calibration, stages, **settings)
    left = trajectory(model, plan, after, held_out)
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


def trajectory(model: PreTrainedModel, plan: Plan, after: Iterable[int], held_out: Calibration) -> pd.DataFrame:
    """The column "perplexity", of held-out text after so many removals of a plan: a row for each number."""
    rows = {}
    for n in after:
        with removed(model, plan.first(n).gone):
            rows[n] = {"perplexity": perplexity(model, held_out)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("removals")
