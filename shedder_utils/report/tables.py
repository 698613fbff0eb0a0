"""Tables 1 to 5 of the paper (sections 4.3.1 to 4.3.4): scores after the removal of blocks, SSMs and parts of blocks.

Three numbers stand beside each other in every cell: the paper's, the recorded one and yours. Yours is judged against
the recorded one, which the same inputs made; the paper's models are others unless the profile says so, and whether its
claims hold is the subject of `claims.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd

from .. import paper
from ..errors import DataError
from ..profiles import Profile
from ..records import Metric
from .counterparts import ABSENT, BOTH, absent, is_pruned, paper_values, target_of, with_ratio
from .rendering import DASH, Table
from .runs import Runs, error_of

WHAT = {
    1: "Mamba blocks", 2: "SSMs", 3: "components at several granularities", 4: "Hymba blocks", 5: "Mamba blocks or SSMs"
}  # fmt: skip
HEADINGS = {
    "ratio": "Ratio %", "ppl": "LAMBADA ppl ↓", "lambada_openai": "LAMBADA", "hellaswag": "HellaSwag",
    "piqa": "PIQA", "arc_easy": "ARC-e", "arc_challenge": "ARC-c", "winogrande": "WinoGrande", "openbookqa": "OBQA",
    "average": "Average",
}  # fmt: skip
NOTE = (
    "Accuracies and their average in points, ± one standard error. "
    f"{DASH}: not reported, not run. Difference: yours less recorded, and the verdict on it."
)
RATIO = (
    "Ratio: share of the parameters removed; a block that several layers share counts once for each of them, as in the "
    "paper, though it is stored once. "
)
Values = Mapping[str, Metric]


@dataclass(frozen=True)
class Cell:
    """One number three times: in the paper, as recorded, and yours."""

    column: str
    paper: float | None
    recorded: Metric | None
    yours: Metric | None

    @property
    def digits(self) -> int:
        """Decimals shown: perplexities and ratios to 0.01, accuracies to 0.1 point."""
        return 2 if self.column in ("ppl", "ratio") else 1

    @property
    def difference(self) -> float | None:
        """Yours less recorded."""
        return self.yours.value - self.recorded.value if self.yours and self.recorded else None

    @property
    def verdict(self) -> str:
        """Yours against recorded: the same to rounding, within two standard errors of it, or not."""
        if self.yours is None:
            return "not run"
        if self.recorded is None or self.difference is None:
            return "not recorded"
        if self.yours.value == self.recorded.value or abs(self.difference) < 0.5 * 10**-self.digits:
            return "same"
        return "within 2 stderr" if abs(self.difference) <= 2 * error_of(self.recorded) else "differs"


@dataclass(frozen=True)
class Line:
    """One model after n removals, beside the row of the paper that it stands for.

    target: the kinds that went, in the words of table 3. n_removed: None where only the paper has the row. stands_for:
    the paper's number of removals; in table 3, its ratio.
    """

    model: str
    paper_model: str
    target: str
    n_removed: int | None
    layers: int | None
    stands_for: float
    cells: tuple[Cell, ...]

    @property
    def verdict(self) -> str:
        """The cells' verdicts in one: the columns that differ, else the weakest agreement there is."""
        if self.n_removed is None:
            return ABSENT
        differing = [HEADINGS[cell.column] for cell in self.cells if cell.verdict == "differs"]
        if differing:
            return f"differs: {', '.join(differing)}"
        verdicts = {cell.verdict for cell in self.cells}
        return next(known for known in ("not run", "not recorded", "within 2 stderr", "same") if known in verdicts)


def models(number: int, profile: Profile) -> dict[str, str]:
    """The profile's models that stand for one of this table, in the paper's order, with the paper's names."""
    order = list(dict.fromkeys(row.labels["model"] for row in paper.rows(number)))
    studied = {model for study in profile.studies.values() if study.table == number for model in study.rows}
    shown = {name: model.paper for name, model in profile.models.items() if name in studied}
    return dict(sorted(shown.items(), key=lambda pair: order.index(pair[1])))


def pruning_table(number: int, yours: Runs, recorded: Runs) -> Table:
    """Table 1 (Mamba blocks), 2 (SSMs), 3 (granularities of Zamba2), 4 (Hymba) or 5 (Falcon-Mamba).

    Each of the paper's rows has four lines, or two where the profile has none that stands for it. The frame has one
    line for each cell: model, target, pruned, of, stands_for, column, paper, recorded, recorded_stderr, yours,
    yours_stderr, difference, verdict. Raises DataError for another number, and if the profile lacks the studies.
    """
    if number not in available(yours.profile):
        raise DataError(f"table {number}: expected one of {available(yours.profile)} with profile {yours.profile.name}")
    found = [*_lines(number, yours, recorded), *_only_the_papers(number, yours.profile)]
    lines = sorted(found, key=lambda line: _place(number, line))
    columns = [HEADINGS[column] for column in _columns(number)]
    note = RATIO + NOTE if "ratio" in _columns(number) else NOTE
    header = ("Model", "Removed", "Source", *columns, "Verdict")
    title = f"Table {number}. Training-free removal of {WHAT[number]}: paper, recorded, yours ({yours.profile.title})"
    rows = tuple(row for line in lines for row in _wide(number, line))
    return Table(f"table_{number}", title, note, header, rows, _tidy(lines), yours.given, recorded.given)


def available(profile: Profile) -> list[int]:
    """The numbers of the tables that a profile's studies fill."""
    return sorted({study.table for study in profile.studies.values()} & set(WHAT))


def _columns(number: int) -> list[str]:
    row = paper.rows(number)[0]
    return [*(["ratio"] if "ratio" in row.labels else []), *row.values]


def _lines(number: int, yours: Runs, recorded: Runs) -> Iterator[Line]:
    for name in yours.studies(number):
        study = yours.profile.studies[name]
        for model, rows in study.rows.items():
            paper_model, layers = yours.profile.models[model].paper, yours.layers(model) or recorded.layers(model)
            for n_removed, stands_for in rows.items():
                target = target_of(study, n_removed)
                reported = paper_values(number, paper_model, stands_for, target)
                ours, theirs = (_values(runs, name, model, n_removed) for runs in (yours, recorded))
                cells = (Cell(name, reported.get(name), theirs.get(name), ours.get(name)) for name in _columns(number))
                yield Line(model, paper_model, target, n_removed, layers, stands_for, tuple(cells))


def _only_the_papers(number: int, profile: Profile) -> Iterator[Line]:
    """The paper's rows that no row of the profile stands for."""
    own = {model.paper: name for name, model in profile.models.items()}
    for row in absent(number, profile):
        labels, values = row.labels, with_ratio(row)
        model, target = str(labels["model"]), str(labels.get("kind", labels.get("target")))
        cells = tuple(Cell(name, values[name], None, None) for name in _columns(number))
        yield Line(own[model], model, target, None, None, float(labels.get("pruned", labels.get("ratio", 0))), cells)


def _place(number: int, line: Line) -> int:
    """Where the paper has a line's row."""
    places = (
        place
        for place, row in enumerate(paper.rows(number))
        if is_pruned(row, line.paper_model, line.stands_for, line.target)
    )
    return next(places, len(paper.rows(number)))


def _values(runs: Runs, study: str, model: str, n_removed: int) -> dict[str, Metric]:
    """Scores by column, with the share of parameters removed in percent."""
    record = runs.evaluated(study, model, n_removed)
    if record is None:
        return {}
    return {"ratio": Metric(value=100 * record.model.ratio), **runs.scores(study, model, n_removed)}


def _tidy(lines: list[Line]) -> pd.DataFrame:
    """One line for each cell."""
    rows = [
        {
            "model": line.model, "target": line.target, "pruned": line.n_removed, "of": line.layers,
            "stands_for": line.stands_for, "column": cell.column, "paper": cell.paper,
            "recorded": cell.recorded.value if cell.recorded else None,
            "recorded_stderr": cell.recorded.stderr if cell.recorded else None,
            "yours": cell.yours.value if cell.yours else None,
            "yours_stderr": cell.yours.stderr if cell.yours else None,
            "difference": cell.difference, "verdict": ABSENT if line.n_removed is None else cell.verdict,
        }
        for line in lines
        for cell in line.cells
    ]  # fmt: skip
    numbers = ["paper", "recorded", "recorded_stderr", "yours", "yours_stderr", "difference"]
    return pd.DataFrame(rows).astype({"pruned": "Int64", "of": "Int64", **dict.fromkeys(numbers, "float64")})


def _wide(number: int, line: Line) -> Iterator[tuple[str, ...]]:
    """The lines of a row: paper, recorded, yours, difference; paper alone is followed by dashes."""
    blocks = paper.models()[line.paper_model]["blocks"]
    paper_count, count = f"{line.stands_for:g} of {blocks}", f"{line.n_removed} of {line.layers or DASH}"
    if number == 3:
        paper_count, count = line.target, f"{line.target}: {line.n_removed}"
    elif number == 5:
        paper_count, count = f"{line.target}: {paper_count}", f"{line.target}: {count}"
    reported = (DASH if cell.paper is None else f"{cell.paper:.{cell.digits}f}" for cell in line.cells)
    yield (line.paper_model, paper_count, "paper", *reported, "")
    if line.n_removed is None:
        yield (line.model, DASH, BOTH, *(DASH for _ in line.cells), line.verdict)
        return
    yield (line.model, count, "recorded", *(text_of(cell.recorded, cell.digits) for cell in line.cells), "")
    yield (line.model, count, "yours", *(text_of(cell.yours, cell.digits) for cell in line.cells), "")
    yield (line.model, count, "difference", *map(difference_of, line.cells), line.verdict)


def difference_of(cell: Cell) -> str:
    """Yours less recorded; an infinity less itself is none."""
    if cell.difference is None or math.isnan(cell.difference):
        return DASH
    return f"{cell.difference:+.{cell.digits}f}"


def text_of(metric: Metric | None, digits: int) -> str:
    """A measured number, with its standard error where it has one."""
    if metric is None:
        return DASH
    error = error_of(metric)
    return f"{metric.value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
