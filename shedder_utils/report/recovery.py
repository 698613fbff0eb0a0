"""Tables 10 to 12 of the paper (section 4.5): models dense, pruned and tuned, and whether tuning restores them (C11).

Beside them stands what the paper does not have: the dense model tuned by the same recipe. What that gains comes from
the instructions; recovery is what a pruned model gains beyond it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pandas as pd

from .. import paper
from ..errors import DataError
from ..profiles import RECOVERY, Profile, RecoveryRow, RecoveryTable
from ..records import Metric, Record
from .counterparts import ABSENT, BOTH, absent, is_tuned, words
from .evidence import Z95, Advantage, Verdict, untrained, weak, weigh
from .rendering import DASH, Table
from .runs import Runs, by_column, error_of, error_of_sum
from .tables import HEADINGS, Cell, difference_of, text_of

COLUMNS = ("ppl", "average")
SOURCES = ("paper", "recorded", "yours")
LESS = {10: "{:g} of 64 SSMs", 11: "{:.2f} % and 18 of 54 SSMs", 12: "{:g} of 32 blocks"}
"""What the paper removes in each table."""
NOTE = (
    "Average accuracy in points, ± one standard error. Won back: the share of what pruning lost that tuning gives "
    "back, in perplexity and in average accuracy, where anything was lost. The dense model tuned by the same recipe "
    "shows what the instructions do alone. "
    f"{DASH}: not reported, not run. Difference: yours less recorded, and the verdict on it."
)


@dataclass(frozen=True)
class State:
    """A model of a table: dense or, with a row, less some components; tuned or not."""

    tuned: bool
    row: RecoveryRow | None = None

    def __str__(self) -> str:
        less = f"less {self.row.removed} ({self.row.study})" if self.row else "dense"
        return f"{less}, tuned" if self.tuned else less


Values = Mapping[str, Metric]
Found = dict[State, Values]
"""What a source has of each state, by column; the paper's values have no standard error."""


def available(profile: Profile) -> list[int]:
    """The numbers of the tables of recovery that a profile fills."""
    return sorted(_tables(profile))


def table(number: int, yours: Runs, recorded: Runs) -> Table:
    """Table 10 (Mamba-2), 11 (Zamba2) or 12 (Hymba): the paper, the record, yours and the difference for each state.

    Its frame has one line for each state and column: model, state, stands_for, column, paper, recorded,
    recorded_stderr, yours, yours_stderr, difference, verdict, won_back (yours, a share); rows that only the paper has
    come last. Raises DataError for a table for which the profile tunes no model.
    """
    if number not in available(yours.profile):
        raise DataError(f"table {number}: expected one of {available(yours.profile)} with profile {yours.profile.name}")
    about = _tables(yours.profile)[number]
    found = {"recorded": measured(number, recorded), "yours": measured(number, yours)}
    found["paper"] = _reported(number, about)
    rows: list[tuple[str, ...]] = []
    lines: list[dict[str, object]] = []
    for state in states(about):
        cells = [_cell(found, state, column) for column in COLUMNS]
        shares = {source: [_won_back(found[source], state, column) for column in COLUMNS] for source in SOURCES}
        rows += _wide(number, yours.profile, state, cells, shares)
        lines += _tidy(about, state, cells, shares["yours"])
    for row in absent(number, yours.profile):
        cells = [Cell(column, row.values.get(column), None, None) for column in COLUMNS]
        rows += _wide_paper(number, about.model, row, cells)
        lines += [
            {"model": about.model, "state": words(row), "stands_for": row.labels.get("ratio"), "column": cell.column,
             "paper": cell.paper, "verdict": ABSENT}
            for cell in cells
        ]  # fmt: skip
    title = f"Table {number}. Recovery tuning of pruned {about.model}: paper, recorded, yours ({yours.profile.title})"
    header = ("Model", "State", "Source", *(HEADINGS[name] for name in COLUMNS), "Won back", "Verdict")
    return Table(f"table_{number}", title, NOTE, header, tuple(rows), pd.DataFrame(lines), yours.given, recorded.given)


def states(about: RecoveryTable) -> list[State]:
    """The states of a table, in its order: dense, dense and tuned, then each row pruned, and tuned."""
    return [State(tuned, row) for row in (None, *about.rows) for tuned in (False, True)]


def measured(number: int, runs: Runs) -> Found:
    """The scores of each state, as far as it was run."""
    about = _tables(runs.profile)[number]
    records = {state: evaluated(runs, about.model, state) for state in states(about)}
    return {state: _values(record, runs.profile) for state, record in records.items() if record}


def evaluated(runs: Runs, model: str, state: State) -> Record | None:
    """The record of a state; that of a tuning only if it began from the weights and removals that are current."""
    study, n_removed = (state.row.study, state.row.removed) if state.row else ("dense", 0)
    start = runs.evaluated(study, model, n_removed)
    if start is None or not state.tuned:
        return start
    tuned = runs.at(RECOVERY, model, f"{state.row.state if state.row else 'dense'}_tuned")
    same = tuned is not None and all(
        getattr(tuned.model, name) == getattr(start.model, name) for name in ("fingerprint", "removals")
    )
    return tuned if same else None


def restored(runs: Runs, name: str, text: str) -> Verdict:
    """C11: tuning wins back half or more of what was lost, wherever something clearly was, in tables 10 to 12."""
    found = {number: measured(number, runs) for number in available(runs.profile)}
    if not found:
        return Verdict(name, text, "not run", "The profile tunes no model.")
    tables = {number: _tables(runs.profile)[number] for number in found}
    numbers = tuple(number for place, values in found.items() for number in _halves(place, tables[place], values))
    missing = [(about.model, state) for n, about in tables.items() for state in states(about) if state not in found[n]]
    if missing:
        what = f"There is no evaluation of {missing[0][0]}, {missing[0][1]}."
        return Verdict(name, text, "not run", what, numbers)
    models = [about.model for about in tables.values()]
    unfit = untrained(runs.profile, models) or weak(runs.profile, {model: runs.dense(model) for model in models})
    if unfit:
        return Verdict(name, text, "not shown at this scale", unfit, numbers)
    control = " ".join(_control(tables[number].model, values) for number, values in found.items())
    if not numbers:
        why = f"Pruning cost nothing that these items show, so there is nothing to win back. {control}"
        return Verdict(name, text, "not shown at this scale", why)
    covered = {runs.profile.models[model].paper for model in models}
    absent = sorted({str(row.labels["model"]) for number in (10, 11, 12) for row in paper.rows(number)} - covered)
    verdict = weigh(runs.profile, name, text, numbers, absent)
    return replace(verdict, why=f"{verdict.why} {control}")


def _tables(profile: Profile) -> dict[int, RecoveryTable]:
    return dict(profile.recovery.tables) if profile.recovery else {}


def _values(record: Record, profile: Profile) -> Values:
    """Perplexity and average accuracy of a record."""
    return {name: value for name, value in by_column(record, profile).items() if name in COLUMNS}


def _reported(number: int, about: RecoveryTable) -> Found:
    """The paper's values of the states that it has."""
    found: Found = {}
    for row in paper.rows(number):
        values = {name: Metric(value=value) for name, value in row.values.items() if value is not None}
        state = str(row.labels["state"])
        owners: tuple[RecoveryRow | None, ...] = (None,) if state == "dense" else about.rows
        for own in owners:
            if own is None or is_tuned(row, own):
                found[State(state == "tuned", own)] = values
    return found


def _cell(found: dict[str, Found], state: State, column: str) -> Cell:
    reported, recorded, yours = (found[source].get(state, {}).get(column) for source in SOURCES)
    return Cell(column, None if reported is None else reported.value, recorded, yours)


def _won_back(found: Found, state: State, column: str) -> float | None:
    """The share of the loss in a column that a tuned state has won back; None where nothing was lost, or not known."""
    if state.row is None or not state.tuned:
        return None
    three = [found.get(one, {}).get(column) for one in (State(False), State(False, state.row), state)]
    dense, pruned, tuned = (math.nan if metric is None else metric.value for metric in three)
    lost = pruned - dense if column == "ppl" else dense - pruned
    won = pruned - tuned if column == "ppl" else tuned - pruned
    return won / lost if lost > 0 and not math.isnan(won) else None


def _wide(
    number: int, profile: Profile, state: State, cells: list[Cell], shares: dict[str, list[float | None]]
) -> Iterator[tuple[str, ...]]:
    """The lines of a state: paper, where it has it, recorded, yours, difference."""
    about = _tables(profile)[number]
    won = {source: " / ".join(DASH if one is None else f"{one:.0%}" for one in both) for source, both in shares.items()}
    won = {source: text if state.row and state.tuned else "" for source, text in won.items()}
    if any(cell.paper is not None for cell in cells):
        named = (profile.models[about.model].paper, _papers_words(number, state))
        yield (*named, "paper", *map(_reported_text, cells), won["paper"], "")
    for source in SOURCES[1:]:
        values = (text_of(getattr(cell, source), cell.digits) for cell in cells)
        yield (about.model, str(state), source, *values, won[source], "")
    verdicts = dict.fromkeys(cell.verdict for cell in cells)
    yield (about.model, str(state), "difference", *map(difference_of, cells), "", "; ".join(verdicts))


def _wide_paper(number: int, model: str, row: paper.Row, cells: list[Cell]) -> Iterator[tuple[str, ...]]:
    """The lines of a row that only the paper has."""
    tuned = ", tuned" if row.labels["state"] == "tuned" else ""
    named = f"less {LESS[number].format(row.labels['ratio'])}{tuned}" if "ratio" in row.labels else words(row)
    yield (str(row.labels["model"]), named, "paper", *map(_reported_text, cells), "", "")
    yield (model, DASH, BOTH, *(DASH for _ in cells), "", ABSENT)


def _reported_text(cell: Cell) -> str:
    return DASH if cell.paper is None else f"{cell.paper:.{cell.digits}f}"


def _papers_words(number: int, state: State) -> str:
    """A state of the paper in its words."""
    if state.row is None:
        return "dense"
    less = f"less {LESS[number].format(state.row.stands_for)}"
    return f"{less}, tuned" if state.tuned else less


def _tidy(
    about: RecoveryTable, state: State, cells: list[Cell], shares: list[float | None]
) -> Iterator[dict[str, object]]:
    for cell, share in zip(cells, shares, strict=True):
        yield {
            "model": about.model, "state": str(state), "stands_for": state.row.stands_for if state.row else None,
            "column": cell.column, "paper": cell.paper,
            "recorded": cell.recorded.value if cell.recorded else None,
            "recorded_stderr": cell.recorded.stderr if cell.recorded else None,
            "yours": cell.yours.value if cell.yours else None,
            "yours_stderr": cell.yours.stderr if cell.yours else None,
            "difference": cell.difference, "verdict": cell.verdict, "won_back": share,
        }  # fmt: skip


def _halves(number: int, about: RecoveryTable, found: Found) -> Iterator[Advantage]:
    """How far each tuned state is beyond the middle between dense and pruned, where the loss is clear."""
    reported = _reported(number, about)
    for row in about.rows:
        for column in COLUMNS:
            three = _three(found, row, column)
            if three and _clearly_lost(column, *three[:2]):
                theirs = _three(reported, row, column)
                value = _beyond(column, *theirs)[0] if theirs else None
                own = row.study if row.stands_for is not None else f"{row.study} (a row of ours)"
                yield Advantage(f"{about.model}, {own}, {_WORDS[column]}", row.removed, *_beyond(column, *three),
                                1 if column == "ppl" else 0, value)  # fmt: skip


_WORDS = {
    "ppl": "LAMBADA perplexity, midway between dense and pruned over tuned",
    "average": "average accuracy in points, tuned above midway between dense and pruned",
}


def _three(found: Found, row: RecoveryRow, column: str) -> tuple[Metric, Metric, Metric] | None:
    """Dense, pruned and tuned, if all are known."""
    values = [found.get(state, {}).get(column) for state in (State(False), State(False, row), State(True, row))]
    dense, pruned, tuned = values
    return (dense, pruned, tuned) if dense and pruned and tuned else None


def _clearly_lost(column: str, dense: Metric, pruned: Metric) -> bool:
    """Whether the loss differs from 0 with 95 % confidence."""
    lost = pruned.value - dense.value if column == "ppl" else dense.value - pruned.value
    return lost > Z95 * error_of_sum((1, -1), (dense, pruned))


def _beyond(column: str, dense: Metric, pruned: Metric, tuned: Metric) -> tuple[float, float, float]:
    """Middle over tuned (perplexity), or tuned less middle, with its 95 % interval; above 1 or 0: half is won back."""
    middle = (dense.value + pruned.value) / 2
    if column == "average":
        value, spread = tuned.value - middle, Z95 * error_of_sum((1, -0.5, -0.5), (tuned, dense, pruned))
        return value, value - spread, value + spread
    error = math.hypot(error_of(dense), error_of(pruned)) / 2
    value, spread = middle / tuned.value, Z95 * math.hypot(error / middle, error_of(tuned) / tuned.value)
    return value, value * math.exp(-spread), value * math.exp(spread)


def _control(model: str, found: Found) -> str:
    """What the same tuning does to the dense model, in a sentence."""
    dense, tuned = found[State(False)], found[State(True)]
    ppl, average = (f"{{:.{digits}f}} to {{:.{digits}f}}" for digits in (2, 1))
    from_to = [
        form.format(dense[name].value, tuned[name].value)
        for name, form in zip(COLUMNS, (ppl, average), strict=True)
        if name in dense and name in tuned
    ]
    return f"Control: the dense {model}, tuned as long, goes from {' (perplexity) and from '.join(from_to)} (points)."
