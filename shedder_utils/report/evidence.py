"""Evidence: how far one model is ahead of another, and what that makes of a claim.

Standard errors take the evaluations as independent; as all models answer the same items, that makes the intervals
rather too wide.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from ..files import write_atomically
from ..profiles import Profile
from ..records import Metric
from .rendering import DASH, markdown
from .runs import error_of

Z95 = 1.96
CLEARLY = 5.0
"""Points by which the lower end of a dense model's interval must exceed guessing, for pruning to show anything."""
Outcome = Literal["reproduced", "close", "deviates", "not shown at this scale", "not run"]


@dataclass(frozen=True)
class Advantage:
    """How far one model is ahead of another after n removals, each measured from its own dense value.

    neutral: the value that favours neither, 0 for differences and 1 for ratios; above it speaks for the claim.
    low, high: 95 % interval; both equal value for numbers without sampling error. paper: the paper's own value.
    """

    measure: str
    n_removed: int
    value: float
    low: float
    high: float
    neutral: float
    paper: float | None = None

    @property
    def outcome(self) -> Literal["for", "against", "open"]:
        """Whether the interval lies on one side of neutral."""
        if self.low > self.neutral:
            return "for"
        return "against" if self.high < self.neutral else "open"

    def __str__(self) -> str:
        interval = "" if self.low == self.high else f" [{self._text(self.low)}, {self._text(self.high)}]"
        reported = "" if self.paper is None else f" (paper {self._text(self.paper)})"
        return f"{self.n_removed} removed {self._text(self.value)}{interval}{reported}"

    def _text(self, value: float) -> str:
        return f"×{value:.2f}" if self.neutral == 1 else f"{value:+.1f}"


@dataclass(frozen=True)
class Verdict:
    """What the records say about a claim: the verdict, the numbers behind it, and why in one sentence."""

    id: str
    text: str
    verdict: Outcome
    why: str
    numbers: tuple[Advantage, ...] = ()

    @property
    def summary(self) -> list[str]:
        """One line for each measure, with its values in order of removals."""
        groups = groupby(sorted(self.numbers, key=lambda number: number.measure), key=lambda number: number.measure)
        return [f"{measure}: {'; '.join(map(str, numbers))}" for measure, numbers in groups]


@dataclass(frozen=True)
class Verdicts:
    """Some verdicts together, as a table."""

    items: tuple[Verdict, ...]
    title: str

    def to_markdown(self) -> str:
        """A table with id, claim, verdict, why and numbers."""
        rows = [
            (item.id, item.text, f"**{item.verdict}**", item.why, "<br>".join(item.summary) or DASH)
            for item in self.items
        ]
        note = (
            "Above 0 (differences) or ×1 (ratios) speaks for the claim. Brackets: 95 % intervals; they cover the "
            "choice of items, not of training runs, of which there is one for each model."
        )
        return f"**{self.title}**\n\n{markdown(('Id', 'Claim', 'Verdict', 'Why', 'Numbers'), rows)}\n{note}\n"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def save(self, folder: str | Path) -> list[Path]:
        """Write claims.md. Raises RecordError where it cannot be stored."""
        path = Path(folder, "claims.md")
        write_atomically(path, self.to_markdown())
        return [path]


def weigh(profile: Profile, name: str, text: str, numbers: tuple[Advantage, ...], absent: list[str]) -> Verdict:
    """Reproduced: every interval lies on the claim's side. Close: some do, none lies on the other."""
    outcomes = Counter(number.outcome for number in numbers)
    why = (
        f"Of {len(numbers)} comparisons, {outcomes['for']} speak for the claim with 95 % confidence, "
        f"{outcomes['against']} against it, and {outcomes['open']} are open."
    ) + (f" Not compared, for the profile has no model for it: {', '.join(absent)}." if absent else "")
    if numbers and outcomes["for"] == len(numbers):
        return Verdict(name, text, "reproduced", why, numbers)
    if outcomes["for"] and not outcomes["against"]:
        return Verdict(name, text, "close", why, numbers)
    return Verdict(name, text, failed(profile), why, numbers)


def lead(ahead_dense: Metric, ahead: Metric, behind_dense: Metric, behind: Metric) -> tuple[float, float]:
    """What the second model loses more than the first, on a scale where higher is better, with its standard error."""
    four = (ahead_dense, ahead, behind_dense, behind)
    value = (behind_dense.value - behind.value) - (ahead_dense.value - ahead.value)
    return value, math.hypot(*map(error_of, four))


def logarithm(perplexity: Metric) -> Metric:
    """Minus the logarithm: higher is better, and differences are ratios."""
    return Metric(value=-math.log(perplexity.value), stderr=error_of(perplexity) / perplexity.value, n=perplexity.n)


def exp(value: float) -> float:
    """e to the power of a value, finite for any."""
    return math.exp(min(value, 700.0))


def untrained(profile: Profile, compared: Iterable[str]) -> str | None:
    """Which of the models are random; None if all are trained."""
    random = [model for model in compared if profile.models[model].random]
    return f"{' and '.join(random)}: untrained, so there is nothing to lose." if random else None


def weak(profile: Profile, dense: dict[str, dict[str, Metric]]) -> str | None:
    """Which dense models do not answer clearly better than by guessing."""
    guesses = [100 * column.chance for column in profile.evaluation.tasks if column.metric != "perplexity"]
    chance = math.fsum(guesses) / len(guesses)
    for model, scores in dense.items():
        average = scores.get("average")
        if average is None or not average.value - Z95 * error_of(average) > chance + CLEARLY:
            found = "unknown" if average is None else f"{average.value:.1f} ± {error_of(average):.1f}"
            return f"{model} is not clearly above chance: dense average {found}, chance {chance:.1f}."
    return None


def failed(profile: Profile) -> Outcome:
    """The verdict on a claim that the numbers do not bear out: only the paper's own models can refute it."""
    return "deviates" if profile.papers_own_models else "not shown at this scale"
