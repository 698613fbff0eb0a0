"""What removal buys, in one figure and one table for all models that are timed (beside section 4.4 of the paper).

The figure sets measured speedups against the share of the work that is gone, of the arithmetic in prefill and of the
memory traffic in decode, so that one line is the ideal of every model. The table tells what removal frees.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pandas as pd

from ..records import Record
from .rendering import DASH, Table
from .runs import Runs
from .speed import PHASES, Measured, measured, record_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .figures import Look

WORK = {"prefill": "arithmetic", "decode": "memory traffic"}
SIZES = {"parameters": ("Parameters", 1.0, "{:,.0f}"), "bytes": ("On disk, MiB", 2.0**20, "{:,.2f}"),
         "weight_bytes": ("Weights read per token, MiB", 2.0**20, "{:,.2f}"),
         "cache_bytes": ("Cache, KiB", 2.0**10, "{:,.1f}")}  # fmt: skip
"""By metric: the column's heading, its unit in the metric's, and its form."""
NOTE = (
    "In brackets: the change against the dense model. Weights read per token: a block that several layers share is "
    "read for each of them. Cache: after the prompt, batch 1. Where less is shared than before, a pruned model can "
    f"have more parameters than the dense one. {DASH}: not recorded."
)


def draw(runs: Runs, width: float, look: Callable[[Runs, str], Look]) -> tuple[Figure, tuple[Record, ...]]:
    """The figure, `width` inches wide, and the records that it shows; look: how a model's family is drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.1))
    panels = figure.subplots(1, len(PHASES), sharey=True)
    for axes, phase in zip(panels, PHASES, strict=True):
        _ideal(axes, _series(runs, phase))
        for (model, number), points in _series(runs, phase).items():
            share = [100 * (1 - 1 / (point.ideal or 1.0)) for point in points]
            value = [point.value for point in points]
            bars = [[point.value - point.low for point in points], [point.high - point.value for point in points]]
            style, label = look(runs, model), f"{model} ({number})"
            axes.errorbar(share, value, bars, color=style.color, marker=style.marker, linestyle="", label=label)
        axes.set_title(phase)
        axes.set_xlabel(f"{WORK[phase]} removed, %")
    panels[0].set_ylabel("times as fast as the dense model")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return figure, runs.given


def _series(runs: Runs, phase: str) -> dict[tuple[str, str], list[Measured]]:
    """The measured points of each model and table, in order of removals, the dense model left out."""
    found = {}
    for number, settings in runs.profile.speed.tables.items() if runs.profile.speed else ():
        points = [measured(runs, number, str(n)).get(phase) for n in sorted(settings.rows) if n]
        label = f"table {number}" if isinstance(number, int) else number
        if shown := [point for point in points if point and point.ideal]:
            found[settings.model, label] = shown
    return found


def _ideal(axes: Axes, series: dict[tuple[str, str], list[Measured]]) -> None:
    """The line 1 / (1 - share), a little further than the last point."""
    ideals = [point.ideal or 1.0 for points in series.values() for point in points]
    last = 110 * (1 - 1 / max(ideals, default=1.2))
    share = [last * i / 50 for i in range(51)]
    axes.plot(share, [1 / (1 - x / 100) for x in share], color="black", linestyle="--", linewidth=1, label="ideal")
    if not ideals:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")


def freed(runs: Runs) -> Table:
    """What removal frees of each timed model: parameters, bytes on disk, weights read per token, cache.

    Its frame has one line for each model of each table: model, table, removed, and the four numbers.
    """
    lines = list(_lines(runs))
    dense = {(line["model"], line["table"]): line for line in lines if line["removed"] == 0}
    rows = []
    for line in lines:
        before = dense.get((line["model"], line["table"]), {})
        cells = (_cell(line[name], before.get(name), name) for name in SIZES)
        rows.append((str(line["model"]), str(line["removed"]) if line["removed"] else "none", *cells))
    header = ("Model", "Removed", *(heading for heading, _, _ in SIZES.values()))
    title = f"What removal frees ({runs.profile.title})"
    return Table("table_freed", title, NOTE, header, tuple(rows), pd.DataFrame(lines), runs.given)


def _lines(runs: Runs) -> Iterator[dict[str, str | int | float | None]]:
    for number, settings in runs.profile.speed.tables.items() if runs.profile.speed else ():
        record = record_of(runs, number)
        for n in sorted(settings.rows):
            metrics = record.metrics if record else {}
            found = {name: metrics.get(f"{n}/{name}") for name in SIZES}
            numbers = {name: metric.value if metric else None for name, metric in found.items()}
            yield {"model": settings.model, "table": str(number), "removed": n, **numbers}


def _cell(value: object, before: object, name: str) -> str:
    if not isinstance(value, float):
        return DASH
    _, unit, form = SIZES[name]
    change = f" ({value / before - 1:+.1%})" if isinstance(before, float) and value != before else ""
    return form.format(value / unit) + change
