"""The figures of the paper (sections 3.2, 4.3.1, 4.3.2 and 4.6), drawn from records.

Ours is filled and solid, the paper's hollow and dashed. The x axis is the share of the layers, so that models of
different depth compare. Bars are one standard error.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import paper
from ..errors import DataError
from ..records import Record
from . import overview, speedups
from .rendering import save, sidecar
from .runs import BLOCKS, SSMS, Runs, error_of
from .tables import WHAT, models

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("shedder.mplstyle")
PAGE, COLUMN = 6.8, 3.3  # inches
TABLES = {2: 1, 3: 2}  # the tables whose points figures 2 and 3 show
COMPARED = ("mamba-2.8b", "mamba2-2.7b")  # the models of figure 4
GREY = "#4d4d4d"


@dataclass(frozen=True)
class Look:
    """How a model family is drawn everywhere; colours are Okabe and Ito's, which colour-blind readers tell apart."""

    color: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


LOOKS = {
    "Mamba-1": Look("#0072B2", "o", "-"),
    "Mamba-2": Look("#D55E00", "s", "-."),
    "Zamba2": Look("#009E73", "^", ":"),
    "Hymba": Look("#CC79A7", "v", (0, (5, 1))),
    "Falcon-Mamba": Look("#E69F00", "P", (0, (3, 1, 1, 1, 1, 1))),
}  # fmt: skip
OTHER = Look("#000000", "X", "-")


@dataclass(frozen=True)
class Drawing:
    """A finished figure, the records it shows and its caption. Jupyter shows it as it is."""

    name: str
    figure: Figure
    caption: str
    records: tuple[Record, ...] = field(repr=False)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with style():
            self.figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
        return buffer.getvalue()

    def save(self, folder: str | Path) -> list[Path]:
        """Write NAME.png, NAME.pdf and NAME.json, the list of the records drawn. Same records, same bytes."""
        png, pdf = (Path(folder, f"{self.name}.{ending}") for ending in ("png", "pdf"))
        png.parent.mkdir(parents=True, exist_ok=True)
        with style():
            self.figure.savefig(png, metadata={"Software": None})
            self.figure.savefig(pdf, metadata={"Creator": None, "Producer": None, "CreationDate": None})
        texts = {"json": sidecar({"figure": self.name, "caption": self.caption}, self.records)}
        return [png, pdf, *save(texts, folder, self.name)]


@dataclass(frozen=True)
class Curve:
    """Points of one line: share of the layers removed in percent, value and standard error."""

    share: list[float]
    value: list[float]
    error: list[float]


def available(runs: Runs) -> list[int | str]:
    """The figures that a profile's studies fill: the paper's by number, and "speedup"."""
    needs = {number: {table} for number, table in TABLES.items()} | {4: set(TABLES.values())}
    filled = [number for number, tables in needs.items() if all(map(runs.studies, tables))]
    return [1, *filled, *(["speedup"] if runs.profile.speed else [])]


def draw(number: int | str, runs: Runs) -> Drawing:
    """Figure 1 (what is removable), 2 (Mamba blocks), 3 (SSMs), 4 (Mamba-1 against Mamba-2) or "speedup".

    Raises DataError for another.
    """
    if number not in available(runs):
        expected = ", ".join(map(str, available(runs))) or "none"
        raise DataError(f"figure {number}: expected one of {expected} with profile {runs.profile.name}")
    with style():
        whole = {1: _overview, 4: _calibration_figure, "speedup": _speedup_figure}
        return whole[number](runs) if number in whole else _pruning_figure(int(number), runs)


def _overview(runs: Runs) -> Drawing:
    figure, drawn = overview.draw(runs, PAGE)
    caption = (
        "Figure 1. What can be removed from each model: dashed outlines, with the number of such components and the "
        "share of the model's parameters that nothing reads any more when one of them is gone."
    )
    return Drawing("figure_1", figure, caption, drawn)


def _speedup_figure(runs: Runs) -> Drawing:
    figure, drawn = speedups.draw(runs.fresh(), PAGE, _look)
    caption = (
        "Speedup of pruned models against the share of the dense model's work that is gone: arithmetic in prefill, "
        "memory traffic in decode. Dashed: the ideal, 1 / (1 - share). Bars: 95 % intervals. A small model on a CPU "
        "spends its time between the operations, which go with their layer, so it can lie above the line."
    )
    return Drawing("figure_speedup", figure, caption, drawn)


def _pruning_figure(number: int, runs: Runs) -> Drawing:
    """One panel for each model: LAMBADA perplexity on the left axis, average accuracy on the right."""
    from matplotlib.figure import Figure

    table = TABLES[number]
    shown = list(models(table, runs.profile))
    figure = Figure(figsize=(PAGE, 3.1))
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    twins = [left.twinx() for left in axes]
    for twin in twins[1:]:
        twin.sharey(twins[0])
    for model, left, right in zip(shown, axes, twins, strict=True):
        _panel(table, runs, model, left, right)
        right.grid(visible=False)
        right.spines["right"].set(visible=True, color=GREY)
        right.tick_params(labelright=right is twins[-1], colors=GREY)
    _logarithmic(axes[0])
    axes[0].set_ylabel("LAMBADA perplexity")
    twins[-1].set_ylabel("average accuracy, points", color=GREY)
    _legend(figure, [_look(runs, model) for model in shown])
    caption = (
        f"Figure {number}. LAMBADA perplexity and average accuracy against the share of {WHAT[table]} removed. "
        "Filled and solid: this run; hollow and dashed: the paper's larger models. Bars: one standard error."
    )
    return Drawing(f"figure_{number}", figure, caption, tuple(_evaluations(table, runs, shown)))


def _panel(table: int, runs: Runs, model: str, left: Axes, right: Axes) -> None:
    settings, study = runs.profile.models[model], runs.studies(table)[0]
    look, layers = _look(runs, model), runs.layers(model)
    blocks = paper.models()[settings.paper]["blocks"]
    for column, axes, color, marker in (("ppl", left, look.color, look.marker), ("average", right, GREY, "D")):
        reported, ours = _reported(table, settings.paper, blocks, column), _measured(table, runs, model, column)
        hollow: dict[str, Any] = {"linestyle": "--", "markerfacecolor": "white"}
        axes.errorbar(reported.share, reported.value, color=color, marker=marker, **hollow)
        if ours.share:
            axes.errorbar(ours.share, ours.value, ours.error, color=color, marker=marker, linestyle="-")
    left.set_title(f"{model} ({settings.family})\nbeside {settings.paper}", color=look.color)
    ran = [n for n in runs.profile.studies[study].rows[model] if runs.scores(study, model, n)]
    here = f"this run {_counts(ran)} of {layers or 'all'}" if ran else "not run"
    paper_counts = _counts(_paper_counts(table, settings.paper))
    left.set_xlabel(f"{WHAT[table]} removed, % of layers\n{here}\npaper {paper_counts} of {blocks}")


def _paper_counts(table: int, model: str) -> list[int]:
    return [int(row.labels["pruned"]) for row in paper.rows(table) if row.labels["model"] == model]


def _reported(table: int, model: str, blocks: int, column: str) -> Curve:
    """The paper's points of a model, without error."""
    rows = [row for row in paper.rows(table) if row.labels["model"] == model]
    values = {int(row.labels["pruned"]): row.values[column] for row in rows}
    points = [(100 * n / blocks, value) for n, value in values.items() if value is not None]
    return Curve([share for share, _ in points], [value for _, value in points], [0.0] * len(points))


def _measured(table: int, runs: Runs, model: str, column: str) -> Curve:
    """Our points of a model, as far as they were run."""
    study, layers = runs.studies(table)[0], runs.layers(model)
    scores = {n: runs.scores(study, model, n) for n in runs.profile.studies[study].rows[model] if n == 0 or layers}
    points = [(100 * n / (layers or 1), found[column]) for n, found in scores.items() if column in found]
    return Curve([share for share, _ in points], [m.value for _, m in points], [error_of(m) for _, m in points])


def _evaluations(table: int, runs: Runs, shown: Sequence[str]) -> Iterator[Record]:
    study = runs.studies(table)[0]
    for model in shown:
        counts = runs.profile.studies[study].rows[model]
        found = [runs.search(study, model), *(runs.evaluated(study, model, n) for n in counts)]
        yield from (record for record in found if record is not None)


def _legend(figure: Figure, looks: Sequence[Look]) -> None:
    """Below the panels: which marks belong to which axis, and what filled and hollow mean."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.lines import Line2D

    marks = tuple(Line2D([], [], color=look.color, marker=look.marker, linestyle="") for look in looks)
    keys: dict[str, Any] = {
        "perplexity (left axis)": marks,
        "average accuracy (right axis)": Line2D([], [], color=GREY, marker="D", linestyle=""),
        "this run": Line2D([], [], color="black", marker="o", linestyle="-"),
        "paper": Line2D([], [], color="black", marker="o", linestyle="--", markerfacecolor="white"),
    }
    handlers = {tuple: HandlerTuple(ndivide=None)}
    figure.legend(list(keys.values()), list(keys), loc="outside lower center", ncols=len(keys), handler_map=handlers)


def _calibration_figure(runs: Runs) -> Drawing:
    """Calibration perplexity after each removal of the search: Mamba blocks on the left, SSMs on the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PAGE, 3.1))
    drawn: list[Record] = []
    axes = figure.subplots(1, 2, sharey=True)
    for panel, study, what in zip(axes, (BLOCKS, SSMS), ("Mamba blocks", "SSMs"), strict=True):
        drawn += _searches(panel, runs, study)
        panel.set_title(f"{what} removed")
        panel.set_xlabel("% of layers")
    _logarithmic(axes[0])
    axes[0].set_ylabel("calibration perplexity")
    statement = next(claim for claim in paper.claims() if claim.id == "C12")
    caption = f"Figure 4. The paper (section {statement.where.split(',')[0]}) says, without numbers: {statement.text}."
    figure.suptitle(textwrap.fill(caption, 120))
    return Drawing("figure_4", figure, caption, tuple(drawn))


def _searches(axes: Axes, runs: Runs, study: str) -> Iterator[Record]:
    """Draw the search of each model, and give the records drawn."""
    compared = [name for name, model in runs.profile.models.items() if model.paper in COMPARED]
    drawn = [record for model in compared if (record := runs.search(study, model))]
    for model in (record.model.name for record in drawn):
        scores, layers, look = runs.curve(study, model), runs.layers(model) or 1, _look(runs, model)
        share = [100 * n / layers for n in range(len(scores))]
        label = f"{model} ({layers} layers)"
        axes.plot(share, scores, color=look.color, marker=look.marker, linestyle=look.line, label=label)
    if drawn:
        axes.legend(loc="best")
    else:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
    yield from drawn


def _look(runs: Runs, model: str) -> Look:
    return LOOKS.get(runs.profile.models[model].family, OTHER)


def _counts(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _logarithmic(axes: Axes) -> None:
    """A logarithmic y axis, after everything is drawn, with plain numbers at 1, 2, 3, 5 or at whole decades if many."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


@contextmanager
def style() -> Iterator[None]:
    """Everything drawn and saved inside has the project's style, and none of the user's."""
    from matplotlib import style

    with style.context(["default", STYLE]):
        yield
