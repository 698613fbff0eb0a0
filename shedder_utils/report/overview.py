"""Figure 1 of the paper: what can be removed from each model, drawn from the inventories of real models.

Every dashed outline is a kind of component; one drawn inside another goes with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..components import WITHIN
from ..records import Record
from .runs import Runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WORDS = {
    "mamba_block": "Mamba block", "ssm": "SSM", "transformer_block": "Transformer block", "mha": "MHA", "mlp": "MLP",
    "hymba_block": "Hymba block", "attention": "attention",
}  # fmt: skip
PER_ROW = 3
PADDING, HEADROOM = 0.035, 0.17


@dataclass(frozen=True)
class Part:
    """One kind of component of a model: how many there are, and what they hold of its parameters, from 0 to 1."""

    kind: str
    count: int
    share: float

    def __str__(self) -> str:
        channels = "\nwhole, or by channels" if self.kind == "mlp" else ""
        return f"{WORDS[self.kind]}\n{self.count} × {self.share / self.count:.2%}{channels}"


def draw(runs: Runs, width: float) -> tuple[Figure, tuple[Record, ...]]:
    """The figure, `width` inches wide, and the inventories that it shows."""
    from matplotlib.figure import Figure

    found = {model: runs.of("inventory", model) for model in runs.profile.models}
    drawn = {model: records[0] for model, records in found.items() if records}
    rows = -(-max(len(drawn), 1) // PER_ROW)
    figure = Figure(figsize=(width, 2.4 * rows))
    columns = PER_ROW if rows > 1 else max(len(drawn), 1)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.set_axis_off()
    for axes, (model, record) in zip(panels, drawn.items(), strict=False):
        axes.set_title(f"{model}\n{record.model.parameters_dense:,} parameters")
        parts = _parts(record)
        tops = [kind for kind in parts if not _holders(kind, parts)]
        for kind, box in zip(tops, _beside(tops, (0.0, 0.0, 1.0, 1.0)), strict=True):
            _outline(axes, parts, kind, box)
    return figure, tuple(drawn.values())


def _parts(record: Record) -> dict[str, Part]:
    counts = [name.removesuffix("/count") for name in record.metrics if name.endswith("/count")]
    kinds = [kind for kind in counts if kind in WORDS]
    total = record.model.parameters_dense
    return {
        kind: Part(kind, int(record.metrics[f"{kind}/count"].value), record.metrics[f"{kind}/parameters"].value / total)
        for kind in kinds
    }


def _holders(kind: str, parts: Mapping[str, Part]) -> list[str]:
    return [holder for holder in WITHIN.get(kind, ()) if holder in parts]


Box = tuple[float, float, float, float]


def _outline(axes: Axes, parts: Mapping[str, Part], kind: str, box: Box) -> None:
    """A component's outline with its name, and those of what lies directly in it."""
    from matplotlib.patches import FancyBboxPatch

    x, y, width, height = box
    inset = (x + PADDING / 2, y + PADDING / 2, width - PADDING, height - PADDING)
    rounded = "round,pad=0,rounding_size=0.02"
    axes.add_patch(FancyBboxPatch(inset[:2], *inset[2:], boxstyle=rounded, facecolor="#0072B2", alpha=0.12))
    axes.add_patch(FancyBboxPatch(inset[:2], *inset[2:], boxstyle=rounded, linestyle="--", fill=False))
    inside = [other for other in parts if _holders(other, parts)[:1] == [kind]]
    middle = y + height / 2 if not inside else y + height - PADDING - HEADROOM / 2
    axes.text(x + width / 2, middle, str(parts[kind]), ha="center", va="center", fontsize=6.5)
    below = (inset[0], inset[1], inset[2], inset[3] - HEADROOM)
    for other, part in zip(inside, _beside(inside, below), strict=True):
        _outline(axes, parts, other, part)


def _beside(kinds: Sequence[str], box: Box) -> Iterator[Box]:
    """Equal boxes, one for each kind, on top of each other in a high box, else side by side."""
    x, y, width, height = box
    n = max(len(kinds), 1)
    for i in range(len(kinds)):
        if height > 0.9:
            yield x, y + height * (n - 1 - i) / n, width, height / n
        else:
            yield x + width * i / n, y, width / n, height
