"""The Pareto figure: average accuracy against the measured time of one decoded token, for all strategies on one model.

The line joins the strategies that no other one beats in both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..profiles import PARETO, Strategy, Study
from ..records import Record
from .beyond import Point, chosen_by, kinds_of, points
from .figures import COLUMN, PAGE, Drawing, style
from .runs import Runs, error_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "figure_pareto"
BY_KIND = {
    "mamba_block": ("#0072B2", "o"),
    "ssm": ("#D55E00", "s"),
    "heads": ("#009E73", "^"),
    "states": ("#CC79A7", "v"),
}
JOINT, OTHER = ("black", "*"), ("#56B4E9", "P")
IMPORTANCES = ("D", "X", "P", "p", "h", "d", "<", ">")
GREY = "#7f7f7f"
CAPTION = (
    "Average accuracy against the measured time of one decoded token on {model}, all strategies timed in one run. "
    "Numbers: how many components are gone. Bars: one standard error. Line: what no other strategy beats in both."
)


def draw(runs: Runs) -> Drawing:
    """The figure. Raises DataError for a profile that names no strategies."""
    from matplotlib.figure import Figure

    found = points(runs)
    shown = [point for point in found if point.seconds is not None and "average" in point.scores]
    with style():
        figure = Figure(figsize=(PAGE, COLUMN))
        axes = figure.subplots()
        _strategies(axes, runs, shown)
        front = frontier(shown)
        axes.plot([_ms(p) for p in front], [_average(p) for p in front], color=GREY, linewidth=0.8, zorder=1)
        axes.set_xlabel("milliseconds for one decoded token")
        axes.set_ylabel("average accuracy, points")
        if shown:
            figure.legend(loc="outside right upper", fontsize=6.5)
        else:
            axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
        model = runs.profile.pareto.model if runs.profile.pareto else ""
        return Drawing(NAME, figure, CAPTION.format(model=model), tuple(_records(runs, model, shown)))


def frontier(shown: Sequence[Point]) -> list[Point]:
    """The points that no other one beats in time and in accuracy, the fastest first."""
    best: list[Point] = []
    for point in sorted(shown, key=lambda point: (_ms(point), -_average(point))):
        if not best or _average(point) > _average(best[-1]):
            best.append(point)
    return best


def _strategies(axes: Axes, runs: Runs, shown: Sequence[Point]) -> None:
    """Each study with a colour and marker of its own; what chooses blocks by another importance is hollow."""
    markers = iter(IMPORTANCES)
    for study in dict.fromkeys(point.study for point in shown):
        own = [point for point in shown if point.study == study]
        settings = runs.profile.searches.get(study)
        color, marker, label = (GREY, "o", "dense") if settings is None else _look(settings)
        hollow = study in runs.profile.beyond and marker == "o"
        axes.errorbar(
            [_ms(p) for p in own], [_average(p) for p in own], [error_of(p.scores["average"]) for p in own],
            color=color, marker=next(markers, "x") if hollow else marker, linestyle="", label=label, elinewidth=0.7,
            markerfacecolor="white" if hollow else color, markersize=9 if marker == "*" else 5,
        )  # fmt: skip
        for point in own:
            if point.n_removed and not hollow:
                axes.annotate(f"{point.n_removed}", (_ms(point), _average(point)), (4, 3), textcoords="offset points",
                              fontsize=6, color=color)  # fmt: skip


def _look(settings: Study | Strategy) -> tuple[str, str, str]:
    """Colour, marker and label of a study."""
    label = f"{kinds_of(settings)}, {chosen_by(settings)}"
    color, marker = JOINT if len(settings.kinds) > 1 else BY_KIND.get(settings.kinds[0], OTHER)
    return color, marker, label


def _ms(point: Point) -> float:
    return 1e3 * (point.seconds or 0.0)


def _average(point: Point) -> float:
    return point.scores["average"].value


def _records(runs: Runs, model: str, shown: Sequence[Point]) -> Iterator[Record]:
    """The records drawn."""
    timed = runs.at(PARETO, model, "speed")
    if timed is not None:
        yield timed
    for point in shown:
        record = runs.evaluated(point.study, model, point.n_removed)
        if record is not None:
            yield record
