"""Tables 6 to 9 of the paper (section 4.4): how much faster pruned models prefill and decode.

Speedups are ratios taken in one run on one machine, with 95 % intervals, beside the ideal: the dense model's arithmetic
over the pruned one's in prefill, and its memory traffic over the pruned one's in decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from .. import paper
from ..errors import DataError
from ..profiles import Profile
from ..records import Record
from .evidence import Advantage, Verdict, failed, untrained
from .rendering import DASH, Table
from .runs import Runs

PHASES = ("prefill", "decode")
NOTE = (
    "Speedup against the dense model on the same machine, with its 95 % interval; ideal: the share of arithmetic "
    "(prefill) and of memory traffic (decode) that is left. The dense model's second run shows what a difference is "
    f"worth. Difference: yours less recorded, and whether the intervals meet. {DASH}: not reported, not run."
)
CLAIMS: dict[str, tuple[int, int | str]] = {"C8": (6, 14), "C9": (7, 24), "C10": (8, "15.48% + 18 ssm")}
CLOSE = 0.10
"""By how much of it a measured speedup may miss the paper's and still be close; half of that counts as reproduced."""


@dataclass(frozen=True)
class Measured:
    """A speedup with its 95 % interval, and the ideal one."""

    value: float
    low: float
    high: float
    ideal: float | None

    def __str__(self) -> str:
        ideal = "" if self.ideal is None else f", ideal {self.ideal:.2f}"
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]{ideal}"


def available(profile: Profile) -> list[int | str]:
    """The tables of speed that a profile measures: the paper's by number, further ones by name."""
    return sorted(profile.speed.tables, key=str) if profile.speed else []


def table(number: int | str, yours: Runs, recorded: Runs) -> Table:
    """A table of speed: the paper, the record, yours and the difference in each row; last, the second dense run.

    number: 6, 7, 8 or 9, or the name of one that the paper does not have.
    Its frame has one line for each row and phase: model, removed, paper_row, phase, paper, recorded, yours, low, high,
    ideal, difference, verdict. Raises DataError for a table that the profile does not measure.
    """
    if number not in available(yours.profile):
        raise DataError(f"table {number}: expected one of {available(yours.profile)} with profile {yours.profile.name}")
    rows: list[tuple[str, ...]] = []
    lines: list[dict[str, object]] = []
    for n, stands_for in _rows(yours.profile, number):
        found = {source: measured(runs, number, n) for source, runs in (("recorded", recorded), ("yours", yours))}
        reported = _reported(number, stands_for)
        if reported:
            rows.append((f"paper: {stands_for}", "paper", *(f"{reported[phase]:.2f}" for phase in PHASES), ""))
        for source, values in found.items():
            rows.append((_removed(n), source, *(str(values[phase]) if values else DASH for phase in PHASES), ""))
        compared = {phase: _compared(found, phase) for phase in PHASES}
        differences = (DASH if one is None else f"{one:+.2f}" for one, _ in compared.values())
        verdicts = dict.fromkeys(verdict for _, verdict in compared.values())
        rows.append((_removed(n), "difference", *differences, "; ".join(verdicts)))
        lines += _lines(number, yours, n, stands_for, found, reported)
    model = yours.profile.speed.tables[number].model if yours.profile.speed else ""
    numbered = f"Table {number}. " if isinstance(number, int) else ""
    title = f"{numbered}Inference speed of pruned {model}: paper, recorded, yours ({yours.profile.title})"
    header = ("Removed", "Source", "Prefill", "Decode", "Verdict")
    given = (yours.given, recorded.given)
    return Table(f"table_{number}", title, NOTE, header, tuple(rows), pd.DataFrame(lines), *given)


def _compared(found: dict[str, dict[str, Measured]], phase: str) -> tuple[float | None, str]:
    """Yours less recorded, and whether the two intervals meet."""
    recorded, yours = (found[source].get(phase) for source in ("recorded", "yours"))
    if yours is None or recorded is None:
        return None, "not run" if yours is None else "not recorded"
    if yours == recorded:
        return 0.0, "same"
    meet = yours.low <= recorded.high and recorded.low <= yours.high
    return yours.value - recorded.value, "intervals meet" if meet else "differs"


def _rows(profile: Profile, number: int | str) -> Iterator[tuple[str, int | str | None]]:
    """The names of the runs of a table, and the paper's rows that they stand beside."""
    settings = profile.speed.tables[number].rows if profile.speed else {}
    for n, stands_for in settings.items():
        yield str(n), stands_for
    yield f"{min(settings)} again", None


def _removed(name: str) -> str:
    return "none, second run" if name.endswith("again") else name if name != "0" else "none"


def record_of(runs: Runs, number: int | str) -> Record | None:
    """The record of a table of speed."""
    settings = runs.profile.speed.tables[number] if runs.profile.speed else None
    return runs.at("speed", settings.model, f"table_{number}") if settings else None


def measured(runs: Runs, number: int | str, name: str) -> dict[str, Measured]:
    """Both phases of one run of a table; empty where it was not measured."""
    record = record_of(runs, number)
    if record is None or f"{name}/prefill/speedup" not in record.metrics:
        return {}
    values = {key: metric.value for key, metric in record.metrics.items()}
    return {
        phase: Measured(
            value=values[f"{name}/{phase}/speedup"],
            low=values[f"{name}/{phase}/low"],
            high=values[f"{name}/{phase}/high"],
            ideal=values.get(f"{name}/{phase}/ideal"),
        )
        for phase in PHASES
    }


def _reported(number: int | str, stands_for: int | str | None) -> dict[str, float]:
    """The paper's row; empty where it has none."""
    for row in paper.rows(number) if isinstance(number, int) else ():
        if stands_for is not None and row.labels.get("pruned", row.labels.get("state")) == stands_for:
            return {phase: float(row.values[phase] or 0) for phase in PHASES}
    return {}


def _lines(
    number: int | str,
    runs: Runs,
    name: str,
    stands_for: int | str | None,
    found: dict[str, dict[str, Measured]],
    reported: dict[str, float],
) -> Iterator[dict[str, object]]:
    model = runs.profile.speed.tables[number].model if runs.profile.speed else ""
    for phase in PHASES:
        recorded, yours = (found[source].get(phase) for source in ("recorded", "yours"))
        difference, verdict = _compared(found, phase)
        yield {
            "model": model, "removed": name, "paper_row": stands_for, "phase": phase, "paper": reported.get(phase),
            "recorded": recorded.value if recorded else None, "yours": yours.value if yours else None,
            "low": yours.low if yours else None, "high": yours.high if yours else None,
            "ideal": yours.ideal if yours else None, "difference": difference, "verdict": verdict,
        }  # fmt: skip


def faster(runs: Runs, name: str, text: str) -> Verdict:
    """C8, C9, C10: the speedups of the paper's row, within a tenth and beyond doubt above 1, in the claim's phases."""
    number, stands_for = CLAIMS[name]
    settings = runs.profile.speed.tables.get(number) if runs.profile.speed else None
    ours = next((n for n, row in settings.rows.items() if row == stands_for), None) if settings else None
    found = {} if ours is None else measured(runs, number, str(ours))
    if settings is None or ours is None or not found:
        return Verdict(name, text, "not run", f"Table {number} was not measured.")
    reported = _reported(number, stands_for)
    phases = ("decode",) if name == "C10" else PHASES
    numbers = tuple(
        Advantage(f"speedup in {phase}", ours, m.value, m.low, m.high, 1, reported[phase])
        for phase, m in found.items()
        if phase in phases
    )
    misses = [abs(number.value / (number.paper or 1) - 1) for number in numbers]
    why = f"The measured speedups are {', '.join(f'{100 * miss:.0f} %' for miss in misses)} off the paper's."
    unfit = untrained(runs.profile, [settings.model])
    if unfit:
        return Verdict(name, text, "not shown at this scale", unfit, numbers)
    if max(misses) > CLOSE or any(number.outcome != "for" for number in numbers):
        return Verdict(name, text, failed(runs.profile), why, numbers)
    return Verdict(name, text, "reproduced" if max(misses) <= CLOSE / 2 else "close", why, numbers)
