"""Statistics: paired comparison of candidates and of evaluations, and correlation of orders.

Two candidates of a step are measured on the same sequences, so their difference is paired: its standard error is that
of the mean of the sequences' differences, which is much less than the error of either. Likewise two models that answer
the same items of a task.

C candidates, S sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

ERRORS = 1.96
"""How many standard errors of a difference it may be from zero: a 95 % interval, for one comparison."""
ROUNDING = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-3, "float16": 2e-3}
"""Difference of mean losses, in nats, within which two candidates are tied, by the model's numbers."""


@dataclass(frozen=True)
class Difference:
    """How much more one candidate costs than another: the mean over sequences, and its standard error."""

    mean: float
    stderr: float

    @property
    def within_error(self) -> bool:
        """Whether the sequences do not tell the two apart."""
        return abs(self.mean) <= ERRORS * self.stderr


def paired(values: Tensor, reference: Tensor) -> Difference:
    """The difference of two candidates' values (S,) on the same sequences; the error is nan for fewer than two."""
    differences = (values - reference).double()
    return Difference(differences.mean().item(), differences.std().item() / math.sqrt(len(differences)))


def within_error(values: Tensor, chosen: int) -> list[int]:
    """The candidates that their values (C, S) do not tell from the chosen one; none without two sequences or more."""
    if values.shape[1] < 2:
        return []
    return [place for place, own in enumerate(values) if place != chosen and paired(own, values[chosen]).within_error]


def packed(hits: Sequence[float]) -> str:
    """Which items of a task were answered rightly, 1 or 0 each, as text: their number, and bits in hexadecimal.

    >>> packed([1, 0, 0, 0, 1, 1])
    '6:8c'
    """
    return f"{len(hits)}:{np.packbits(np.asarray(hits, dtype=bool)).tobytes().hex()}"


def unpacked(text: str) -> NDArray[Any]:
    """(n,) float64, 1 or 0 for each item: what `packed` was given."""
    n, _, digits = text.partition(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), dtype=np.uint8))[: int(n)].astype(float)


def paired_error(weights: Sequence[float], answers: Sequence[str]) -> float | None:
    """The standard error of a weighted sum of accuracies that were measured on the same items; None if on others.

    answers: for each accuracy what `packed` gives, or for a mean of several tasks all of theirs, with spaces between.
    """
    tasks = list(zip(*(text.split() for text in answers), strict=False))
    variances = []
    for of_task in tasks:
        values = [unpacked(text) for text in of_task]
        if len({len(own) for own in values}) > 1 or len(values[0]) < 2:
            return None
        combined = sum(weight * own for weight, own in zip(weights, values, strict=True))
        variances.append(np.var(combined, ddof=1) / len(values[0]))
    return math.sqrt(sum(variances)) / len(tasks)


def correlations(orders: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Every pair of orders: Spearman's rho, Kendall's tau-b, and the share of what both contain.

    What one order lacks and another has counts as tied there, after all that it has.
    """
    rows, listed = [], list(orders.items())
    for place, (first, ours) in enumerate(listed):
        for second, theirs in listed[place + 1 :]:
            everything = sorted({*ours, *theirs})
            a, b = (_positions(order, everything) for order in (ours, theirs))
            shared = len({*ours} & {*theirs}) / max(len(ours), len(theirs), 1)
            rows.append((first, second, spearman(a, b), kendall(a, b), shared))
    columns = ["first", "second", "spearman", "kendall", "shared"]
    return pd.DataFrame(rows, columns=columns).set_index(["first", "second"])


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation, ties at their mean rank; nan where one is constant."""
    first, second = pd.Series(a).rank(), pd.Series(b).rank()
    return float(first.corr(second)) if first.std() and second.std() else float("nan")


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b, which allows for ties; nan where one is constant."""
    first, second = _signs(a), _signs(b)
    scale = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / scale if scale else float("nan")


def _positions(order: Sequence[str], everything: Sequence[str]) -> list[float]:
    place = {item: index for index, item in enumerate(order)}
    return [place.get(item, len(order)) for item in everything]


def _signs(values: Sequence[float]) -> NDArray[Any]:
    array = np.asarray(values, dtype=float)
    return np.sign(array[:, None] - array[None, :])
