"""The orders that the paper's authors released, scored without a search: what they published, what is recorded, yours.

Order, model and tasks are the authors', so yours should be their numbers, up to what other versions and kernels bring.
Yours is judged against the number in their files or, where these give none, in the paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from .. import paper
from ..errors import DataError
from ..profiles import ReleasedOrder
from ..records import Metric
from .beyond import KINDS
from .rendering import DASH, Table
from .runs import Runs
from .tables import HEADINGS, Cell, difference_of, text_of

NOTE = (
    "Average accuracy in points, ± one standard error. Release: in the authors' files. Difference and verdict: yours "
    "less the release's number, or the paper's where there is none. Count: an MLP that loses channels is one removal. "
    f"{DASH}: not reported, not run."
)


@dataclass(frozen=True)
class Line:
    """One published number, after n removals of an order: what the release gives, what is recorded, and a cell.

    cell: the paper's number, and yours beside the published one, which stands in it as the recorded one.
    """

    order: ReleasedOrder
    n_removed: int
    release: float | None
    recorded: Metric | None
    cell: Cell

    @property
    def removed(self) -> str:
        """The kinds that are gone, in words."""
        kinds = (component.kind for component in self.order.plan.first(self.n_removed).components)
        return " + ".join(dict.fromkeys(KINDS[kind] for kind in kinds))


def table(yours: Runs, recorded: Runs) -> Table:
    """Perplexity and average accuracy after each row of the released orders, where the authors published them.

    The frame has one line for each number: order, model, removed, count, column, paper, release, recorded,
    recorded_stderr, yours, yours_stderr, difference, verdict. Raises DataError for a profile without such orders.
    """
    if not yours.profile.released:
        raise DataError(f"released: profile {yours.profile.name} has no 'released' that names orders")
    lines = [line for order in yours.profile.released for n in order.rows for line in _lines(order, n, yours, recorded)]
    header = ("Order", "Removed", "Count", "Measured", "Paper", "Release", "Recorded", "Yours", "Difference", "Verdict")
    title = f"The orders that the authors released, scored without a search ({yours.profile.title})"
    frame = pd.DataFrame([_tidy(line) for line in lines])
    return Table("table_released", title, NOTE, header, tuple(map(_row, lines)), frame, yours.given, recorded.given)


def _lines(order: ReleasedOrder, n_removed: int, yours: Runs, recorded: Runs) -> Iterator[Line]:
    printed = _printed(order, n_removed, yours.profile.models[order.model].paper)
    released = paper.released(order.order, n_removed)
    ours, theirs = yours.released(order, n_removed), recorded.released(order, n_removed)
    for column in ("ppl", "average"):
        reported, own = released.get(column, printed.get(column)), ours.get(column)
        if reported is not None:
            published = Metric(value=reported, stderr=own.stderr if own else None)  # of as many items as yours
            cell = Cell(column, printed.get(column), published, own)
            yield Line(order, n_removed, released.get(column), theirs.get(column), cell)


def _printed(order: ReleasedOrder, n_removed: int, model: str) -> dict[str, float | None]:
    """The row of the paper's tables, empty where it has none."""
    stands_for = order.rows[n_removed]
    if stands_for is None:
        return {}
    if order.table != 3:
        return paper.reported(order.table, model, int(stands_for))
    ssms = sum(component.kind == "ssm" for component in order.plan.first(n_removed).components)
    return paper.reported(order.table, model, ratio=stands_for, pruned_ssm=ssms)


def _row(line: Line) -> tuple[str, ...]:
    cell = line.cell
    published = (DASH if value is None else f"{value:.{cell.digits}f}" for value in (cell.paper, line.release))
    measured = (text_of(metric, cell.digits) for metric in (line.recorded, cell.yours))
    place = (line.order.order, line.removed, f"{line.n_removed}", HEADINGS[cell.column])
    return (*place, *published, *measured, difference_of(cell), cell.verdict)


def _tidy(line: Line) -> dict[str, object]:
    cell = line.cell
    return {
        "order": line.order.order, "model": line.order.model, "removed": line.removed, "count": line.n_removed,
        "column": cell.column, "paper": cell.paper, "release": line.release,
        "recorded": line.recorded.value if line.recorded else None,
        "recorded_stderr": line.recorded.stderr if line.recorded else None,
        "yours": cell.yours.value if cell.yours else None,
        "yours_stderr": cell.yours.stderr if cell.yours else None,
        "difference": cell.difference, "verdict": cell.verdict,
    }  # fmt: skip
