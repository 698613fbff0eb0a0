"""The curves of recovery tuning, which the paper does not show: held-out loss by step, pruned models and the control.

A panel for each model. Solid: pruned and tuned; dashed: the dense model tuned by the same recipe, whose start is the
dense model's loss. A ring marks the state that was kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import DataError
from ..profiles import RecoveryTable
from ..records import Record
from .figures import LOOKS, OTHER, PAGE, Drawing, style
from .recovery import State, available, evaluated, states
from .runs import Runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME, POINTS = "figure_recovery", "held_out_loss/"
CONTROL = "#4d4d4d"
CAPTION = (
    "Recovery tuning: loss on held-out instructions against updates. Solid: pruned models; dashed: the dense model, "
    "tuned by the same recipe; dotted: the dense model before. Rings: what was kept."
)


def draw(runs: Runs) -> Drawing:
    """The figure. Raises DataError for a profile that tunes no model."""
    from matplotlib.figure import Figure

    if runs.profile.recovery is None or not available(runs.profile):
        raise DataError(f"recovery curves: profile {runs.profile.name} tunes no model")
    tables = runs.profile.recovery.tables
    with style():
        figure = Figure(figsize=(PAGE, 3.3))
        panels = figure.subplots(1, len(tables), squeeze=False)[0]
        drawn = [record for axes, number in zip(panels, sorted(tables), strict=True)
                 for record in _panel(axes, runs, tables[number])]  # fmt: skip
        panels[0].set_ylabel("held-out loss, nats")
        return Drawing(NAME, figure, CAPTION, tuple(drawn))


def _panel(axes: Axes, runs: Runs, about: RecoveryTable) -> list[Record]:
    """The curves of one model; the records drawn."""
    look = LOOKS.get(runs.profile.models[about.model].family, OTHER)
    found = {state: evaluated(runs, about.model, state) for state in states(about) if state.tuned}
    drawn = {state: record for state, record in found.items() if record is not None}
    for (state, record), shade in zip(drawn.items(), (1.0, 1.0, 0.55, 0.3), strict=False):
        pruned: dict[str, Any] = {"linestyle": "-", "color": look.color, "alpha": shade}
        options = pruned if state.row else {"linestyle": "--", "color": CONTROL}
        _curve(axes, record, str(State(False, state.row)), look.marker, options)
    axes.set_title(f"{about.model} ({about.recipe.method})", color=look.color)
    axes.set_xlabel("updates")
    if State(True) in drawn:
        axes.axhline(losses(drawn[State(True)])[0], color=CONTROL, linestyle=":")
    if drawn:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=6)
    else:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center")
    return list(drawn.values())


def _curve(axes: Axes, record: Record, label: str, marker: str, options: dict[str, Any]) -> None:
    points, best = losses(record), int(record.metrics["best_step"].value)
    axes.plot(list(points), list(points.values()), marker=marker, markersize=2.5, label=label, **options)
    axes.plot([best], [points[best]], marker="o", markersize=7, fillstyle="none", color=options["color"])


def losses(record: Record) -> dict[int, float]:
    """The held-out losses of a tuning by step."""
    found = {
        int(name.removeprefix(POINTS)): metric.value
        for name, metric in record.metrics.items()
        if name.startswith(POINTS)
    }
    return dict(sorted(found.items()))
