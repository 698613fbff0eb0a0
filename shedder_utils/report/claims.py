"""Verdicts: whether the records bear out what the paper says in words.

Each claim has a function in `CHECKS`. Those here compare two models after the same share of removals; those in
`granularities.py` and `recovery.py` compare states of one model, and those in `speed.py` times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from .. import paper
from ..errors import DataError
from ..profiles import Profile
from ..records import Metric
from . import granularities, recovery, speed
from .counterparts import paper_values
from .criteria import CRITERIA
from .evidence import Z95, Advantage, Verdict, Verdicts, exp, failed, lead, logarithm, narrow, untrained, weak, weigh
from .runs import BLOCKS, SSMS, Runs
from .tables import WHAT

MAMBA1, MAMBA2, ZAMBA2 = "mamba-2.8b", "mamba2-2.7b", "zamba2-2.7b"


def judge(runs: Runs, ids: Iterable[str] | None = None) -> Verdicts:
    """The verdicts on some claims, or on all. Raises DataError for a claim the paper lacks."""
    texts = {claim.id: claim.text for claim in paper.claims()}
    wanted = list(texts if ids is None else ids)
    unknown = [name for name in wanted if name not in texts]
    if unknown:
        raise DataError(f"claim {unknown[0]!r} is none of the paper's: expected one of {', '.join(texts)}")
    title = f"What the paper claims, and what these records show ({runs.profile.title})"
    return Verdicts(tuple(_judge(runs.fresh(), name, texts[name]) for name in wanted), title)


def _judge(runs: Runs, name: str, text: str) -> Verdict:
    """The verdict on one claim, with its test in words and the records that the check read."""
    verdict = CHECKS.get(name, _untested)(runs, name, text)
    if verdict.verdict != "not run" and (why := narrow(runs.profile, runs.given)):
        verdict = replace(verdict, verdict="not run at full width", why=why)
    test, notebook = CRITERIA[name]
    return replace(verdict, test=test, notebook=notebook, records=runs.given)


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
    unfit = untrained(runs.profile, compared) or weak(runs.profile, {model: scores[model, 0] for model in compared})
    if unfit:
        return Verdict(name, text, "not shown at this scale", unfit, numbers)
    own = {model.paper for model in runs.profile.models.values()}
    absent = sorted({model for pair in wanted for model in pair} - own)
    return weigh(runs.profile, name, text, numbers, absent)


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
    unfit = untrained(runs.profile, (first, second))
    if unfit:
        return Verdict(name, text, "not shown at this scale", unfit, numbers)
    if holds == list(map(len, tests)):
        return Verdict(name, text, "reproduced", why, numbers)
    most = all(2 * n_holds > len(test) for n_holds, test in zip(holds, tests, strict=True))
    return Verdict(name, text, "close" if most else failed(runs.profile), why, numbers)


CHECKS: dict[str, Callable[[Runs, str, str], Verdict]] = {
    "C1": block_tolerance, "C2": ssm_tolerance, **granularities.CHECKS, **dict.fromkeys(speed.CLAIMS, speed.faster),
    "C11": recovery.restored, "C12": crossover,
}  # fmt: skip
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
        value, error = lead(*(values["average"] for values in four))
        interval = (value, value - Z95 * error, value + Z95 * error)
        measure = f"{WHAT[table]}, loss of average accuracy in points, {behind} minus {ahead}"
        found.append(Advantage(measure, counts[0], *interval, 0, theirs["average"], counts[::-1]))
    if all("ppl" in values for values in four):
        value, error = lead(*(logarithm(values["ppl"]) for values in four))
        interval = (exp(value), exp(value - Z95 * error), exp(value + Z95 * error))
        measure = f"{WHAT[table]}, LAMBADA perplexity relative to dense, {behind} over {ahead}"
        found.append(Advantage(measure, counts[0], *interval, 1, theirs["ppl"], counts[::-1]))
    return found


def _theirs(column: str, reported: list[dict[str, float | None]]) -> float | None:
    """The paper's own advantage in a column, where it reports all four values."""
    values = [row.get(column) for row in reported]
    metrics = [Metric(value=value) for value in values if value is not None]
    if len(metrics) < len(values):
        return None
    return lead(*metrics)[0] if column == "average" else exp(lead(*map(logarithm, metrics))[0])


def _pairs(profile: Profile, wanted: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The profile's names of pairs of the paper's models, as far as it has both."""
    own = {model.paper: name for name, model in profile.models.items()}
    return [(own[first], own[second]) for first, second in wanted if first in own and second in own]
