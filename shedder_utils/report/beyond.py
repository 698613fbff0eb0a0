"""What the paper did not ask: every strategy on one model, accuracy beside measured speed.

A strategy is a row of a pruning study: what was removed, how it was chosen, and after how many removals. All of them
are timed in one run, so that accuracies stand beside times that can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from ..errors import DataError
from ..profiles import PARETO, Profile, Strategy, Study
from ..records import Metric, Record
from ..savings import MEASURED, Savings
from .evidence import Z95
from .rendering import DASH, Table
from .runs import Runs, error_of, error_of_sum
from .speed import PHASES, Measured
from .tables import text_of

KINDS = {
    "mamba_block": "Mamba blocks", "ssm": "SSMs", "mha": "MHAs", "mlp": "MLPs",
    "transformer_block": "Transformer blocks", "hymba_block": "Hymba blocks", "attention": "attention",
    "mlp_channels": "MLP channels", "inner_channels": "inner channels", "heads": "heads", "states": "state dimensions",
}  # fmt: skip
METRICS = {
    "perplexity": "perplexity", "kl": "divergence from the dense model", "block_influence": "block influence",
    "taylor": "first-order Taylor", "magnitude": "magnitude of weights", "random": "chance",
}  # fmt: skip
UNITS = {"parameters": "parameter", "bytes": "byte", "prefill": "prefill time", "decode": "decode time"}
SOURCES = ("recorded", "yours")
DENSE = "dense"


@dataclass(frozen=True)
class Point:
    """One strategy after n removals, with what was measured of it, as far as it was.

    name: that of its times in the record of the study "pareto"; share: of the parameters that is gone, from 0 to 1.
    """

    study: str
    n_removed: int
    scores: dict[str, Metric]
    share: float | None
    times: dict[str, Measured]
    seconds: float | None

    @property
    def decode(self) -> Measured | None:
        """The speedup in decode."""
        return self.times.get("decode")


def kinds_of(settings: Study | Strategy) -> str:
    """What a study removes, in words."""
    return " & ".join(KINDS[kind] for kind in settings.kinds)


def chosen_by(settings: Study | Strategy) -> str:
    """How a study chooses, in words."""
    if isinstance(settings, Study):
        return METRICS["perplexity"]
    words = METRICS[settings.metric]
    if settings.one_shot:
        words += ", ranked once"
    return words if settings.per is None else f"{words}, per {UNITS[settings.per]} saved"


def points(runs: Runs) -> list[Point]:
    """The dense model, then every row of every study that is timed. Raises DataError where a profile has none."""
    settings = runs.profile.pareto
    if settings is None:
        raise DataError(f"strategies: profile {runs.profile.name} has no 'pareto' that names them")
    rows = [(study, n) for study in settings.studies for n in runs.profile.searches[study].rows[settings.model] if n]
    return [_point(runs, settings.model, study, n) for study, n in [(DENSE, 0), *rows]]


def _point(runs: Runs, model: str, study: str, n_removed: int) -> Point:
    record = runs.evaluated(study, model, n_removed)
    timed = runs.at(PARETO, model, "speed")
    name = f"{study}/{n_removed}" if n_removed else DENSE
    same = timed is not None and (not n_removed or _order(timed, name) == _removals(record))
    values = {key: metric.value for key, metric in timed.metrics.items()} if timed and same else {}
    return Point(
        study=study,
        n_removed=n_removed,
        scores=runs.scores(study, model, n_removed),
        share=1 - record.model.parameters / record.model.parameters_dense if record else None,
        times={phase: _speedup(values, f"{name}/{phase}") for phase in PHASES if f"{name}/{phase}/speedup" in values},
        seconds=values.get(f"{name}/decode/seconds"),
    )


def _order(timed: Record, name: str) -> list[str] | None:
    return timed.spec["orders"].get(name)


def _removals(record: Record | None) -> list[str] | None:
    return None if record is None else list(record.model.removals)


def _speedup(values: dict[str, float], name: str) -> Measured:
    value, low, high = (values[f"{name}/{part}"] for part in ("speedup", "low", "high"))
    return Measured(value, low, high, values.get(f"{name}/ideal"))


def strategies(yours: Runs, recorded: Runs) -> Table:
    """Every strategy on one model: accuracy, and measured speed.

    The frame has one line for each row and source: kinds, chosen_by, study, removed, source, share, ppl, average,
    average_stderr, and for each phase the speedup, its interval and the ideal.
    """
    rows, lines = [], []
    for ours, theirs in zip(points(yours), points(recorded), strict=True):
        for source, point in zip(SOURCES, (theirs, ours), strict=True):
            rows.append((*_words(yours.profile, point), source, *_cells(point)))
            lines.append(_line(yours.profile, source, point))
    header = (
        "Removed",
        "Chosen by",
        "Count",
        "Source",
        "Parameters gone",
        "LAMBADA ppl ↓",
        "Average",
        "Prefill",
        "Decode",
    )
    model = yours.profile.pareto.model if yours.profile.pareto else ""
    title = f"Strategies on {model}: accuracy and measured speed ({yours.profile.title})"
    note = (
        "Accuracy in points, ± one standard error. Speedup against the dense model with its 95 % interval, all in one "
        f"run, beside the ideal. Chance and magnitude read no text. {DASH}: not run."
    )
    return Table("table_strategies", title, note, header, tuple(rows), pd.DataFrame(lines), yours.given, recorded.given)


def _words(profile: Profile, point: Point) -> tuple[str, str, str]:
    if not point.n_removed:
        return "nothing", DASH, "0"
    settings = profile.searches[point.study]
    return kinds_of(settings), chosen_by(settings), f"{point.n_removed}"


def _cells(point: Point) -> Iterator[str]:
    yield DASH if point.share is None else f"{point.share:.1%}"
    yield text_of(point.scores.get("ppl"), 2)
    yield text_of(point.scores.get("average"), 1)
    yield from (str(point.times[phase]) if phase in point.times else DASH for phase in PHASES)


def _line(profile: Profile, source: str, point: Point) -> dict[str, object]:
    kinds, by, _ = _words(profile, point)
    average = point.scores.get("average")
    line = {
        "kinds": kinds, "chosen_by": by, "study": point.study, "removed": point.n_removed, "source": source,
        "share": point.share, "ppl": point.scores["ppl"].value if "ppl" in point.scores else None,
        "average": average.value if average else None, "average_stderr": error_of(average) if average else None,
    }  # fmt: skip
    for phase, found in point.times.items():
        line |= {
            phase: found.value,
            f"{phase}_low": found.low,
            f"{phase}_high": found.high,
            f"{phase}_ideal": found.ideal,
        }
    return line


def joint(yours: Runs, recorded: Runs) -> Table:
    """The joint search against the best single kind that is at least as fast, and its predicted speed against measured.

    The frame has one line for each row and source: study, removed, predicted, measured, low, high, average, rival,
    rival_removed, rival_average, difference, error, verdict.
    """
    lines = [line for source, runs in zip(SOURCES, (recorded, yours), strict=True) for line in _joint(runs, source)]
    rows = tuple(
        (f"{line['study']}: {line['removed']}", str(line["source"]), _number(line["predicted"], 2),
         _number(line["measured"], 2), _number(line["average"], 1), str(line["rival"]),
         _number(line["rival_average"], 1), _number(line["difference"], 1, "+"), str(line["verdict"]))
        for line in sorted(lines, key=lambda line: (line["study"], line["removed"]))
    )  # fmt: skip
    header = ("Joint search", "Source", "Predicted speedup", "Measured", "Average", "Best of one kind, as fast",
              "Its average", "Difference", "Verdict")  # fmt: skip
    note = (
        "Predicted: from what each component saves, as weighed before the search. Of the rows of tables 1 and 2 that "
        "are at least as fast, the most accurate one is the rival. Ahead, behind: the 95 % interval of the "
        f"difference excludes zero. {DASH}: not run, or no other kind is as fast."
    )
    title = f"The joint search against single kinds ({yours.profile.title})"
    return Table("table_joint", title, note, header, rows, pd.DataFrame(lines), yours.given, recorded.given)


def _joint(runs: Runs, source: str) -> Iterator[dict[str, object]]:
    found = points(runs)
    single = [point for point in found if point.study in runs.profile.studies]
    for point in found:
        settings = runs.profile.beyond.get(point.study)
        if settings is None or settings.per not in MEASURED:
            continue
        measured, rival = point.times.get(settings.per), _rival(point, single, settings.per)
        line: dict[str, object] = {
            "study": point.study, "removed": point.n_removed, "source": source,
            "predicted": _predicted(runs, point), "measured": measured.value if measured else None,
            "low": measured.low if measured else None, "high": measured.high if measured else None,
            "average": point.scores["average"].value if "average" in point.scores else None,
        }  # fmt: skip
        yield line | _against(point, rival)


def _rival(point: Point, single: Sequence[Point], phase: str) -> Point | None:
    """Of single kinds that are at least as fast in a phase, the most accurate row."""
    own = point.times.get(phase)
    fast = [
        other
        for other in single
        if own and phase in other.times and other.times[phase].value >= own.value and "average" in other.scores
    ]
    return max(fast, key=lambda other: other.scores["average"].value, default=None)


def _against(point: Point, rival: Point | None) -> dict[str, object]:
    names = ("rival_removed", "rival_average", "difference", "error")
    if rival is None or "average" not in point.scores:
        return {"rival": DASH, **dict.fromkeys(names), "verdict": "no rival" if point.times else "not run"}
    ours, theirs = point.scores["average"], rival.scores["average"]
    difference, error = ours.value - theirs.value, error_of_sum((1, -1), (ours, theirs))
    clear = abs(difference) > Z95 * error
    verdict = "not told apart" if not clear else "ahead" if difference > 0 else "behind"
    found = (rival.n_removed, theirs.value, difference, error)
    return {"rival": f"{rival.study}: {rival.n_removed}", **dict(zip(names, found, strict=True)), "verdict": verdict}


def _predicted(runs: Runs, point: Point) -> float | None:
    """The speedup that a plan's savings promise."""
    plan = runs.plan(point.study, runs.profile.pareto.model if runs.profile.pareto else "")
    if plan is None or "per" not in plan.provenance or len(plan) < point.n_removed:
        return None
    return Savings.model_validate(plan.provenance["per"]).speedup(plan.first(point.n_removed).gone)


def _number(value: object, digits: int, sign: str = "") -> str:
    return f"{value:{sign}.{digits}f}" if isinstance(value, float) else DASH
