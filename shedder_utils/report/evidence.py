"""Evidence: how far one model is ahead of another, and what that makes of a claim.

All models answer the same items, so accuracies are compared item by item where the records hold the answers; other
numbers are taken as independent, which makes their intervals rather too wide (`runs.error_of_sum`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import pandas as pd

from ..profiles import Profile, ProfileModel
from ..records import Metric, Record
from .rendering import DASH, markdown, place, save, scored_with, sidecar
from .runs import error_of, error_of_sum

Z95 = 1.96
CLEARLY = 5.0
"""Points by which the lower end of a dense model's interval must exceed guessing, for pruning to show anything."""
Outcome = Literal["reproduced", "close", "deviates", "not shown at this scale", "not run at full width", "not run"]


@dataclass(frozen=True)
class Advantage:
    """How far one model is ahead of another after n removals, each measured from its own dense value.

    neutral: the value that favours neither, 0 for differences and 1 for ratios; above it speaks for the claim.
    low, high: 95 % interval; both equal value for numbers without sampling error. paper: the paper's own value.
    counts: how many removals each of two states has, in the order in which `measure` names them; empty for n of each.
    """

    measure: str
    n_removed: int
    value: float
    low: float
    high: float
    neutral: float
    paper: float | None = None
    counts: tuple[int, ...] = ()

    @property
    def removed(self) -> str:
        """How many removals it is about, both counts where two states have different ones."""
        return f"{' and '.join(map(str, dict.fromkeys(self.counts or (self.n_removed,))))} removed"

    @property
    def outcome(self) -> Literal["for", "against", "open"]:
        """Whether the interval lies on one side of neutral."""
        if self.low > self.neutral:
            return "for"
        return "against" if self.high < self.neutral else "open"

    def __str__(self) -> str:
        reported = "" if self.paper is None else f" (paper {self.text(self.paper)})"
        return f"{self.removed} {self.with_interval}{reported}"

    @property
    def with_interval(self) -> str:
        """The value, with its interval where it has one."""
        interval = "" if self.low == self.high else f" [{self.text(self.low)}, {self.text(self.high)}]"
        return f"{self.text(self.value)}{interval}"

    def text(self, value: float) -> str:
        """A value as it is shown: a factor, or a difference with its sign."""
        return f"×{value:.2f}" if self.neutral == 1 else f"{value:+.1f}"


@dataclass(frozen=True)
class Verdict:
    """What the records say about a claim: the verdict, the numbers behind it, and why in one sentence.

    test: what was compared and which outcome counts as what; notebook: where it is told; records: what was read.
    """

    id: str
    text: str
    verdict: Outcome
    why: str
    numbers: tuple[Advantage, ...] = ()
    test: str = ""
    notebook: str = ""
    records: tuple[Record, ...] = field(default=(), repr=False)

    @property
    def summary(self) -> list[str]:
        """One line for each measure, in the order of the numbers, with its values in order of removals."""
        groups: dict[str, list[str]] = {}
        for number in self.numbers:
            groups.setdefault(number.measure, []).append(str(number))
        return [f"{measure}: {'; '.join(numbers)}" for measure, numbers in groups.items()]


@dataclass(frozen=True)
class Verdicts:
    """Some verdicts together, as a table."""

    items: tuple[Verdict, ...]
    title: str

    def to_markdown(self) -> str:
        """A table with id, claim, verdict, why, numbers, the test and the notebook that tells of it."""
        header = ("Id", "Claim", "Verdict", "Why", "Numbers", "Test", "Notebook")
        rows = [
            (item.id, item.text, f"**{item.verdict}**", item.why, "<br>".join(item.summary) or DASH, item.test,
             item.notebook or DASH)
            for item in self.items
        ]  # fmt: skip
        note = (
            "Above 0 (differences) or ×1 (ratios) speaks for the claim. Brackets: 95 % intervals; they cover the "
            "choice of items, not of training runs, of which there is one for each model. What is neither reproduced "
            "nor close deviates, if the models are the paper's own; others cannot refute the paper, so it is not shown "
            "at this scale. Two counts: of the two states, in the order in which they are named."
        )
        scored = scored_with(yours=[record for item in self.items for record in item.records])
        return f"**{self.title}**\n\n{markdown(header, rows)}\n{note}{scored}\n"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    @property
    def frame(self) -> pd.DataFrame:
        """One line for each number: id, verdict, measure, removed, counts, value, low, high, neutral, paper, outcome.

        counts: removed, or both counts where two states have different ones.
        """
        lines = [
            (item.id, item.verdict, one.measure, one.n_removed, one.removed.removesuffix(" removed"), one.value,
             one.low, one.high, one.neutral, one.paper, one.outcome)
            for item in self.items
            for one in item.numbers
        ]  # fmt: skip
        names = ["id", "verdict", "measure", "removed", "counts", "value", "low", "high", "neutral", "paper", "outcome"]
        return pd.DataFrame(lines, columns=names)

    def save(self, folder: str | Path) -> list[Path]:
        """Write claims.md, claims.csv (the numbers) and claims.json (the records behind each verdict).

        Raises RecordError where they cannot be stored.
        """
        found = {place(record): record for item in self.items for record in item.records}
        about = [
            {"id": item.id, "verdict": item.verdict, "records": list(map(place, item.records))} for item in self.items
        ]
        texts = {
            "md": self.to_markdown(),
            "csv": self.frame.to_csv(index=False, float_format="%.6g", lineterminator="\n"),
            "json": sidecar({"caption": self.title, "verdicts": about}, [found[name] for name in sorted(found)]),
        }
        return save(texts, folder, "claims")


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
    four, weights = (ahead_dense, ahead, behind_dense, behind), (-1, 1, 1, -1)
    value = (behind_dense.value - behind.value) - (ahead_dense.value - ahead.value)
    return value, error_of_sum(weights, four)


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


def narrow(profile: Profile, read: Iterable[Record]) -> str | None:
    """Which of the models behind some records have under half the parameters of the published ones; None if none.

    They bear the published names and are something else, such as stand-ins with which a long run is rehearsed.
    """
    found = {record.model.name: record.model.parameters_dense for record in read}
    shaped = {name: profile.models[name] for name in found if profile.models[name].shape}
    published = {name: _published(settings.model_dump_json()) for name, settings in shaped.items()}
    less = [f"{name} has {found[name]:,} of {n:,} parameters" for name, n in published.items() if 2 * found[name] < n]
    return f"{' and '.join(less)}." if less else None


@cache
def _published(settings: str) -> int:
    """The parameters of a model of which a profile gives the shape; settings: of that model, as JSON."""
    from ..shapes import without_weights

    return int(without_weights(ProfileModel.model_validate_json(settings)).num_parameters())


def weak(profile: Profile, dense: dict[str, dict[str, Metric]]) -> str | None:
    """Which dense models do not answer clearly better than by guessing."""
    for model, scores in dense.items():
        average, chance = scores.get("average"), 100 * profile.chance_of(model)
        if average is None or not average.value - Z95 * error_of(average) > chance + CLEARLY:
            found = "unknown" if average is None else f"{average.value:.1f} ± {error_of(average):.1f}"
            return f"{model} is not clearly above chance: dense average {found}, chance {chance:.1f}."
    return None


def failed(profile: Profile) -> Outcome:
    """The verdict on a claim that the numbers do not bear out: only the paper's own models can refute it."""
    return "deviates" if profile.papers_own_models else "not shown at this scale"
