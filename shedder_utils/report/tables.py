"""Tables 1 and 2 of the paper (sections 4.3.1 and 4.3.2): scores after the removal of Mamba blocks, and of SSMs.

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
from .rendering import DASH, Table
from .runs import BLOCKS, SSMS, Runs, error_of

STUDIES = {1: BLOCKS, 2: SSMS}
WHAT = {1: "Mamba blocks", 2: "SSMs"}
HEADINGS = {
    "ratio": "Ratio %", "ppl": "LAMBADA ppl ↓", "lambada_openai": "LAMBADA", "hellaswag": "HellaSwag",
    "piqa": "PIQA", "arc_easy": "ARC-e", "arc_challenge": "ARC-c", "winogrande": "WinoGrande", "openbookqa": "OBQA",
    "average": "Average",
}  # fmt: skip
NOTE = (
    "Accuracies and their average in points, ± one standard error; ratio: share of the parameters removed. "
    f"{DASH}: not reported, not run. Verdict: yours against recorded."
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
    """One model after n removals, beside the row of the paper that it stands for."""

    model: str
    paper_model: str
    n_removed: int
    layers: int | None
    stands_for: int
    cells: tuple[Cell, ...]

    @property
    def verdict(self) -> str:
        """The cells' verdicts in one: the columns that differ, else the weakest agreement there is."""
        differing = [HEADINGS[cell.column] for cell in self.cells if cell.verdict == "differs"]
        if differing:
            return f"differs: {', '.join(differing)}"
        verdicts = {cell.verdict for cell in self.cells}
        return next(known for known in ("not run", "not recorded", "within 2 stderr", "same") if known in verdicts)


def models(number: int, profile: Profile) -> dict[str, str]:
    """The profile's models that stand for one of this table, in the paper's order, with the paper's names."""
    order = list(dict.fromkeys(row.labels["model"] for row in paper.rows(number)))
    shown = {name: model.paper for name, model in profile.models.items() if model.paper in order}
    return dict(sorted(shown.items(), key=lambda pair: order.index(pair[1])))


def pruning_table(number: int, yours: Runs, recorded: Runs) -> Table:
    """Table 1 (Mamba blocks) or 2 (SSMs), one row for each of the paper's, three lines for each row.

    Its frame has one line for each cell: model, pruned, of, stands_for, column, paper, recorded, recorded_stderr,
    yours, yours_stderr, difference, verdict. Raises DataError for another number, and if the profile lacks the study.
    """
    if number not in STUDIES or STUDIES[number] not in yours.profile.studies:
        raise DataError(f"table {number}: expected one of {available(yours.profile)} with profile {yours.profile.name}")
    lines = list(_lines(number, yours, recorded))
    columns = [HEADINGS[column] for column in _columns(number)]
    header = ("Model", f"{WHAT[number]} removed", "Source", *columns, "Verdict")
    title = f"Table {number}. Training-free removal of {WHAT[number]}: paper, recorded, yours ({yours.profile.title})"
    rows = tuple(row for line in lines for row in _wide(line))
    return Table(f"table_{number}", title, NOTE, header, rows, _tidy(lines))


def available(profile: Profile) -> list[int]:
    """The numbers of the tables that a profile's studies fill."""
    return [number for number, study in STUDIES.items() if study in profile.studies]


def _columns(number: int) -> list[str]:
    return ["ratio", *paper.columns()] if number == 1 else paper.columns()


def _lines(number: int, yours: Runs, recorded: Runs) -> Iterator[Line]:
    study = yours.profile.studies[STUDIES[number]]
    for model, paper_model in models(number, yours.profile).items():
        layers = yours.layers(model) or recorded.layers(model)
        for n_removed, stands_for in zip(study.evaluate, study.stands_for, strict=True):
            reported = paper_values(number, paper_model, stands_for)
            ours, theirs = _values(number, yours, model, n_removed), _values(number, recorded, model, n_removed)
            cells = (Cell(name, reported.get(name), theirs.get(name), ours.get(name)) for name in _columns(number))
            yield Line(model, paper_model, n_removed, layers, stands_for, tuple(cells))


def paper_values(number: int, model: str, pruned: int) -> dict[str, float | None]:
    """A row of the paper's table with its ratio; empty where the paper has no such row."""
    for row in paper.rows(number):
        if (row.labels["model"], row.labels["pruned"]) == (model, pruned):
            return {"ratio": float(row.labels["ratio"]), **row.values} if "ratio" in row.labels else dict(row.values)
    return {}


def _values(number: int, runs: Runs, model: str, n_removed: int) -> dict[str, Metric]:
    """Scores by column, with the share of parameters that the removals take, in percent."""
    scores = runs.scores(STUDIES[number], model, n_removed)
    record, plan = runs.evaluated(STUDIES[number], model, n_removed), runs.plan(STUDIES[number], model)
    if record is None:
        return {}
    gone = sum(removal.parameters for removal in plan.removals[:n_removed]) if plan else 0
    return {"ratio": Metric(value=100 * gone / record.model.parameters_dense), **scores}


def _tidy(lines: list[Line]) -> pd.DataFrame:
    """One line for each cell."""
    rows = [
        {
            "model": line.model, "pruned": line.n_removed, "of": line.layers, "stands_for": line.stands_for,
            "column": cell.column, "paper": cell.paper,
            "recorded": cell.recorded.value if cell.recorded else None,
            "recorded_stderr": cell.recorded.stderr if cell.recorded else None,
            "yours": cell.yours.value if cell.yours else None,
            "yours_stderr": cell.yours.stderr if cell.yours else None,
            "difference": cell.difference, "verdict": cell.verdict,
        }
        for line in lines
        for cell in line.cells
    ]  # fmt: skip
    numbers = ["paper", "recorded", "recorded_stderr", "yours", "yours_stderr", "difference"]
    return pd.DataFrame(rows).astype({"of": "Int64", **dict.fromkeys(numbers, "float64")})


def _wide(line: Line) -> Iterator[tuple[str, ...]]:
    """The three lines of a row: paper, recorded, yours."""
    blocks = paper.models()[line.paper_model]["blocks"]
    reported = (DASH if cell.paper is None else f"{cell.paper:.{cell.digits}f}" for cell in line.cells)
    yield (line.paper_model, f"{line.stands_for} of {blocks}", "paper", *reported, "")
    count = f"{line.n_removed} of {line.layers or DASH}"
    yield (line.model, count, "recorded", *(_text(cell.recorded, cell.digits) for cell in line.cells), "")
    yield (line.model, count, "yours", *(_text(cell.yours, cell.digits) for cell in line.cells), line.verdict)


def _text(metric: Metric | None, digits: int) -> str:
    """A measured number, with its standard error where it has one."""
    if metric is None:
        return DASH
    error = error_of(metric)
    return f"{metric.value:.{digits}f}" + ("" if math.isnan(error) else f" ± {error:.{digits}f}")
