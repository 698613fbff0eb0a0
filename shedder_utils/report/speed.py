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
from .counterparts import ABSENT, BOTH, absent, timed_as
from .evidence import Advantage, Verdict, failed, untrained
from .rendering import DASH, Table
from .runs import Runs

PHASES = ("prefill", "decode")
NOTE = (
    "Speedup against the dense model on the same machine, with its 95 % interval; ideal: one over the share of "
    "arithmetic (prefill) and of memory traffic (decode) that is left. The dense model's second run shows what a "
    f"difference is worth. Difference: yours less recorded, and whether the intervals meet. {DASH}: not reported, "
    "not run."
)
CLAIMS: dict[str, tuple[int, int | str, float]] = {
    "C8": (6, 14, 1.3), "C9": (7, 24, 1.2), "C10": (8, "15.48% + 18 ssm", 1.4)
}  # fmt: skip
"""The table and the row behind each claim about speed, and the speedup in its words, such as "about 1.3 times"."""
ROUNDING = 0.05
"""How far from the truth a speedup may be that is stated to one decimal."""
CLOSE = 0.5
"""The share of the paper's gain (speedup less 1) that counts as close."""


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


@dataclass(frozen=True)
class Line:
    """One run of a table by its name, beside the row of the paper that it stands for; None where there is no such one.

    reported, recorded, yours: by phase, empty where there are none.
    """

    name: str | None
    stands_for: int | str | None
    reported: dict[str, float]
    recorded: dict[str, Measured]
    yours: dict[str, Measured]

    def compared(self, phase: str) -> tuple[float | None, str]:
        """Yours less recorded, and whether the two intervals meet."""
        recorded, yours = self.recorded.get(phase), self.yours.get(phase)
        if self.name is None:
            return None, ABSENT
        if yours is None or recorded is None:
            return None, "not run" if yours is None else "not recorded"
        if yours == recorded:
            return 0.0, "same"
        meet = yours.low <= recorded.high and recorded.low <= yours.high
        return yours.value - recorded.value, "intervals meet" if meet else "differs"


def available(profile: Profile) -> list[int | str]:
    """The tables of speed that a profile measures: the paper's by number, further ones by name."""
    return sorted(profile.speed.tables, key=str) if profile.speed else []


def table(number: int | str, yours: Runs, recorded: Runs) -> Table:
    """A table of speed: the paper, the record, yours and the difference in each row; last, the second dense run.

    number: 6, 7, 8 or 9, or the name of one that the paper does not have.
    Its frame has one line for each row and phase: model, removed, paper_row, phase, paper, recorded, yours, low, high,
    ideal, difference, verdict. Raises DataError for a table that the profile does not measure.
    """
    if yours.profile.speed is None or number not in available(yours.profile):
        raise DataError(f"table {number}: expected one of {available(yours.profile)} with profile {yours.profile.name}")
    model = yours.profile.speed.tables[number].model
    layers = yours.layers(model) or recorded.layers(model)
    lines = [
        Line(
            name,
            stands_for,
            reported=_reported(number, stands_for),
            recorded=measured(recorded, number, name) if name else {},
            yours=measured(yours, number, name) if name else {},
        )
        for name, stands_for in _rows(yours.profile, number)
    ]
    numbered = f"Table {number}. " if isinstance(number, int) else ""
    title = f"{numbered}Inference speed of pruned {model}: paper, recorded, yours ({yours.profile.title})"
    header = ("Removed", "Source", "Prefill", "Decode", "Verdict")
    rows = tuple(row for line in lines for row in _wide(number, line, layers))
    frame = pd.DataFrame([one for line in lines for one in _tidy(model, line)])
    return Table(f"table_{number}", title, NOTE, header, rows, frame, yours.given, recorded.given)


def _rows(profile: Profile, number: int | str) -> list[tuple[str | None, int | str | None]]:
    """The names of a table's runs, and the paper's rows beside them, in its order; no name where only it has one."""
    settings = profile.speed.tables[number].rows if profile.speed else {}
    missing = absent(number, profile) if isinstance(number, int) else []
    order = [timed_as(row) for row in paper.rows(number)] if isinstance(number, int) else []
    own: list[tuple[str | None, int | str | None]] = [(str(n), stands_for) for n, stands_for in settings.items()]
    rows = [*own, *((None, timed_as(row)) for row in missing)]
    placed = sorted(rows, key=lambda row: order.index(row[1]) if row[1] in order else len(order)) if missing else rows
    return [*placed, (f"{min(settings)} again", None)]


def _wide(number: int | str, line: Line, layers: int | None) -> Iterator[tuple[str, ...]]:
    """The lines of a row: paper, where it has it, recorded, yours, difference; paper alone is followed by dashes."""
    if line.reported and isinstance(number, int):
        blocks = paper.models()[str(paper.rows(number)[0].labels["model"])]["blocks"]
        reported = (f"{line.reported[phase]:.2f}" for phase in PHASES)
        yield (f"paper: {_of(line.stands_for, blocks)}", "paper", *reported, "")
    if line.name is None:
        yield (DASH, BOTH, *(DASH for _ in PHASES), ABSENT)
        return
    removed = _removed(line.name)
    if isinstance(line.stands_for, int) and line.stands_for:
        removed = _of(int(line.name), layers)
    for source, values in (("recorded", line.recorded), ("yours", line.yours)):
        yield (removed, source, *(str(values[phase]) if values else DASH for phase in PHASES), "")
    compared = [line.compared(phase) for phase in PHASES]
    differences = (DASH if one is None else f"{one:+.2f}" for one, _ in compared)
    yield (removed, "difference", *differences, "; ".join(dict.fromkeys(verdict for _, verdict in compared)))


def _of(count: int | str | None, whole: int | None) -> str:
    """A number of removals, and of how many; that of several kinds, which the paper has by name, as it is."""
    return f"{count} of {whole}" if isinstance(count, int) and whole else f"{count}"


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


def _tidy(model: str, line: Line) -> Iterator[dict[str, object]]:
    for phase in PHASES:
        recorded, yours = line.recorded.get(phase), line.yours.get(phase)
        difference, verdict = line.compared(phase)
        yield {
            "model": model, "removed": line.name, "paper_row": line.stands_for, "phase": phase,
            "paper": line.reported.get(phase),
            "recorded": recorded.value if recorded else None, "yours": yours.value if yours else None,
            "low": yours.low if yours else None, "high": yours.high if yours else None,
            "ideal": yours.ideal if yours else None, "difference": difference, "verdict": verdict,
        }  # fmt: skip


def faster(runs: Runs, name: str, text: str) -> Verdict:
    """C8, C9, C10: the paper's row is faster than dense beyond doubt, by as much or by half as much as it says."""
    number, stands_for, stated = CLAIMS[name]
    settings = runs.profile.speed.tables.get(number) if runs.profile.speed else None
    ours = next((n for n, row in settings.rows.items() if row == stands_for), None) if settings else None
    found = {} if ours is None else measured(runs, number, str(ours))
    if settings is None or ours is None or not found:
        return Verdict(name, text, "not run", f"The paper's row {stands_for} of table {number} was not measured.")
    runs.search(settings.study, settings.model)  # what found the removals belongs to the evidence, and to its cost
    reported = _reported(number, stands_for)
    phases = ("decode",) if name == "C10" else PHASES
    numbers = tuple(
        Advantage(f"speedup in {phase}", ours, m.value, m.low, m.high, 1, reported[phase])
        for phase, m in found.items()
        if phase in phases
    )
    unfit = untrained(runs.profile, [settings.model])
    if unfit:
        return Verdict(name, text, "not shown at this scale", unfit, numbers)
    gains = {phase: (found[phase].value - 1) / (reported[phase] - 1) for phase in phases}
    shares = " and ".join(f"{100 * gain:.0f} % in {phase}" for phase, gain in gains.items())
    why = f"Of the paper's gain (speedup less 1), {shares}."
    if all(one.outcome == "for" for one in numbers):
        if all(one.low <= stated + ROUNDING and one.high >= stated - ROUNDING for one in numbers):
            return Verdict(name, text, "reproduced", why, numbers)
        if min(gains.values()) >= CLOSE:
            return Verdict(name, text, "close", why, numbers)
    return Verdict(name, text, failed(runs.profile), why, numbers)
