"""Verdicts: whether the records bear out what the paper says in words (C1, C2 and C12 so far).

Each claim has a function in `CHECKS` that compares models pairwise after the same number of removals. Standard errors
take the evaluations as independent; as all models answer the same items, that makes the intervals rather too wide.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from .. import paper
from ..errors import DataError
from ..files import write_atomically
from ..profiles import Profile
from ..records import Metric
from .rendering import DASH, markdown
from .runs import BLOCKS, SSMS, Runs, error_of
from .tables import WHAT, paper_values

Z95 = 1.96
CLEARLY = 5.0
"""Points by which the lower end of a dense model's interval must exceed guessing, for pruning to show anything."""
Outcome = Literal["reproduced", "close", "deviates", "not shown at this scale", "not run"]
MAMBA1, MAMBA2, ZAMBA2 = "mamba-2.8b", "mamba2-2.7b", "zamba2-2.7b"


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


def judge(runs: Runs, ids: Iterable[str] | None = None) -> Verdicts:
    """The verdicts on some claims, or on all that there is a test for. Raises DataError for a claim the paper lacks."""
    texts = {claim.id: claim.text for claim in paper.claims()}
    wanted = list(CHECKS if ids is None else ids)
    unknown = [name for name in wanted if name not in texts]
    if unknown:
        raise DataError(f"claim {unknown[0]!r} is none of the paper's: expected one of {', '.join(texts)}")
    title = f"What the paper claims, and what these records show ({runs.profile.title})"
    return Verdicts(tuple(CHECKS.get(name, _untested)(runs, name, texts[name]) for name in wanted), title)


def _untested(_: Runs, name: str, text: str) -> Verdict:
    return Verdict(name, text, "not run", "No study of this version measures it.")


def block_tolerance(runs: Runs, name: str, text: str) -> Verdict:
    """C1: without Mamba blocks, Mamba-1 loses less than Mamba-2 and Zamba2."""
    return _tolerance(runs, name, text, 1, [(MAMBA1, MAMBA2), (MAMBA1, ZAMBA2)])


def ssm_tolerance(runs: Runs, name: str, text: str) -> Verdict:
    """C2: without SSMs, Mamba-2 and Zamba2 lose less than Mamba-1."""
    return _tolerance(runs, name, text, 2, [(MAMBA2, MAMBA1), (ZAMBA2, MAMBA1)])


def _tolerance(runs: Runs, name: str, text: str, table: int, wanted: Sequence[tuple[str, str]]) -> Verdict:
    """Whether the first of each pair loses less accuracy, and less perplexity by ratio, in each row of the paper."""
    study = next(iter(runs.studies(table)), None)
    rows = {} if study is None else runs.profile.studies[study].rows
    pairs = [pair for pair in _pairs(runs.profile, wanted) if set(pair) <= set(rows)]
    if study is None or not pairs:
        return Verdict(name, text, "not run", "The profile has no two models to compare.")
    compared = list(dict.fromkeys(model for pair in pairs for model in pair))
    scores = {(model, n): runs.scores(study, model, n) for model in compared for n in (0, *rows[model])}
    found = [
        _advantages(table, runs.profile, scores, pair, (ours, theirs), stands_for)
        for pair in pairs
        for ours, stands_for in rows[pair[0]].items()
        for theirs, same in rows[pair[1]].items()
        if ours and stands_for == same
    ]
    numbers = tuple(advantage for advantages in found for advantage in advantages)
    missing = [place for place, values in scores.items() if not {"average", "ppl"} <= values.keys()]
    if missing:
        first = f"{missing[0][0]} with {missing[0][1]} {WHAT[table]} removed"
        return Verdict(name, text, "not run", f"There is no whole evaluation of {first}.", numbers)
    unfit = _random(runs.profile, compared) or _weak(runs.profile, {model: scores[model, 0] for model in compared})
    if unfit:
        return Verdict(name, text, "not shown at this scale", unfit, numbers)
    own = {model.paper for model in runs.profile.models.values()}
    absent = sorted({model for pair in wanted for model in pair} - own)
    return _weigh(runs.profile, name, text, numbers, absent)


def _weigh(profile: Profile, name: str, text: str, numbers: tuple[Advantage, ...], absent: list[str]) -> Verdict:
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
    return Verdict(name, text, _failed(profile), why, numbers)


def crossover(runs: Runs, name: str, text: str) -> Verdict:
    """C12: by calibration perplexity relative to dense, Mamba-1 leads without blocks and Mamba-2 without SSMs."""
    pairs = _pairs(runs.profile, [(MAMBA1, MAMBA2)])
    if not pairs or not {BLOCKS, SSMS} <= set(runs.profile.studies):
        return Verdict(name, text, "not run", "The profile has no two models, or not both studies, to compare.")
    first, second = pairs[0]
    tests = [_relative(runs, BLOCKS, "Mamba blocks", first, second), _relative(runs, SSMS, "SSMs", second, first)]
    numbers = tuple(number for test in tests for number in test)
    if not all(tests):
        return Verdict(name, text, "not run", "A search with two or more removals is missing.", numbers)
    holds = [sum(number.outcome == "for" for number in test) for test in tests]
    why = (
        f"From 2 removals on, the sign holds at {holds[0]} of {len(tests[0])} counts for Mamba blocks "
        f"and at {holds[1]} of {len(tests[1])} for SSMs."
    )
    unfit = _random(runs.profile, (first, second))
    if unfit:
        return Verdict(name, text, "not shown at this scale", unfit, numbers)
    if holds == list(map(len, tests)):
        return Verdict(name, text, "reproduced", why, numbers)
    most = all(2 * n_holds > len(test) for n_holds, test in zip(holds, tests, strict=True))
    return Verdict(name, text, "close" if most else _failed(runs.profile), why, numbers)


CHECKS: dict[str, Callable[[Runs, str, str], Verdict]] = {"C1": block_tolerance, "C2": ssm_tolerance, "C12": crossover}
"""The test of each claim, called with the records, the claim's id and its text."""


def _relative(runs: Runs, study: str, what: str, ahead: str, behind: str) -> list[Advantage]:
    """The ratio of two models' relative perplexities after 2, 3, ... removals of their searches; no sampling error."""
    curves = [runs.curve(study, model) for model in (ahead, behind)]
    ours, theirs = ([score / curve[0] for score in curve] for curve in curves)
    measure = f"{what}, calibration perplexity relative to dense, {behind} over {ahead}"
    return [
        Advantage(measure, n, other / own, other / own, other / own, 1)
        for n, (own, other) in enumerate(zip(ours, theirs, strict=False))
        if n >= 2
    ]


Scores = dict[tuple[str, int], dict[str, Metric]]


def _advantages(
    table: int, profile: Profile, scores: Scores, pair: tuple[str, str], counts: tuple[int, int], stands_for: float
) -> list[Advantage]:
    """Both measures of one pair after its counts of removals, which stand for one of the paper's, if measured."""
    ahead, behind = pair
    four = [scores[place] for model, n in zip(pair, counts, strict=True) for place in ((model, 0), (model, n))]
    kind = "mamba_block" if table == 1 else "ssm"
    reported = [
        paper_values(table, profile.models[model].paper, n, target)
        for model in pair
        for n, target in ((0, "dense"), (stands_for, kind))
    ]
    theirs = {column: _theirs(column, reported) for column in ("average", "ppl")}
    found = []
    if all("average" in values for values in four):
        value, error = _lead(*(values["average"] for values in four))
        interval = (value, value - Z95 * error, value + Z95 * error)
        measure = f"{WHAT[table]}, loss of average accuracy in points, {behind} less {ahead}"
        found.append(Advantage(measure, counts[0], *interval, 0, theirs["average"]))
    if all("ppl" in values for values in four):
        value, error = _lead(*(_logarithm(values["ppl"]) for values in four))
        interval = (_exp(value), _exp(value - Z95 * error), _exp(value + Z95 * error))
        measure = f"{WHAT[table]}, LAMBADA perplexity relative to dense, {behind} over {ahead}"
        found.append(Advantage(measure, counts[0], *interval, 1, theirs["ppl"]))
    return found


def _theirs(column: str, reported: list[dict[str, float | None]]) -> float | None:
    """The paper's own advantage in a column, where it reports all four values."""
    values = [row.get(column) for row in reported]
    metrics = [Metric(value=value) for value in values if value is not None]
    if len(metrics) < len(values):
        return None
    return _lead(*metrics)[0] if column == "average" else _exp(_lead(*map(_logarithm, metrics))[0])


def _lead(ahead_dense: Metric, ahead: Metric, behind_dense: Metric, behind: Metric) -> tuple[float, float]:
    """What the second model loses more than the first, on a scale where higher is better, with its standard error."""
    four = (ahead_dense, ahead, behind_dense, behind)
    value = (behind_dense.value - behind.value) - (ahead_dense.value - ahead.value)
    return value, math.hypot(*map(error_of, four))


def _logarithm(perplexity: Metric) -> Metric:
    """Minus the logarithm: higher is better, and differences are ratios."""
    return Metric(value=-math.log(perplexity.value), stderr=error_of(perplexity) / perplexity.value, n=perplexity.n)


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _pairs(profile: Profile, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The profile's names of pairs of the paper's models, as far as it has both."""
    own = {model.paper: name for name, model in profile.models.items()}
    return [(own[first], own[second]) for first, second in wanted if first in own and second in own]


def _random(profile: Profile, compared: Iterable[str]) -> str | None:
    untrained = [model for model in compared if profile.models[model].random]
    return f"{' and '.join(untrained)}: untrained, so there is nothing to lose." if untrained else None


def _weak(profile: Profile, dense: dict[str, dict[str, Metric]]) -> str | None:
    """Which dense models do not answer clearly better than by guessing."""
    guesses = [100 * column.chance for column in profile.evaluation.tasks if column.metric != "perplexity"]
    chance = math.fsum(guesses) / len(guesses)
    for model, scores in dense.items():
        average = scores.get("average")
        if average is None or not average.value - Z95 * error_of(average) > chance + CLEARLY:
            found = "unknown" if average is None else f"{average.value:.1f} ± {error_of(average):.1f}"
            return f"{model} is not clearly above chance: dense average {found}, chance {chance:.1f}."
    return None


def _failed(profile: Profile) -> Outcome:
    return "deviates" if profile.papers_own_models else "not shown at this scale"
