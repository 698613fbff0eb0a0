"""Components: the parts of a model that pruning can remove, named by a kind and an index.

The kinds are the granularities of the paper (section 3.2, figure 1), and finer ones of the mixers of Mamba models.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .errors import PlanError

KINDS = {
    "mamba_block": "a residual layer: norm and mixer",
    "ssm": "the state space model inside a mixer",
    "mha": "the attention of a Transformer block",
    "mlp": "the MLP of a Transformer block",
    "transformer_block": "a Transformer block: attention and MLP",
    "hymba_block": "the hybrid heads of a Hymba layer",
    "attention": "the attention heads of a Hymba layer",
    "mlp_channels": "the last channels of an MLP",
    "inner_channels": "the last inner channels of a Mamba-1 mixer",
    "heads": "the last heads of a Mamba-2 mixer",
    "states": "the last dimensions of a mixer's state",
}
"""What each kind is; the last three are finer than the paper's. Components go whole, except of the kinds in `PARTS`."""

PARTS = {"mlp_channels": "channels", "inner_channels": "channels", "heads": "heads", "states": "dimensions"}
"""The kinds whose components lose parts, and what these are: the index is the MLP's, or the mixer's layer."""

WITHIN = {
    "ssm": ("mamba_block", "hymba_block"),
    "attention": ("hymba_block",),
    "mha": ("transformer_block",),
    "mlp": ("transformer_block",),
    "mlp_channels": ("mlp", "transformer_block"),
    "inner_channels": ("mamba_block",),
    "heads": ("mamba_block",),
    "states": ("mamba_block", "ssm"),
}
"""The kinds whose component of the same index holds one of this kind."""


@dataclass(frozen=True, order=True)
class Component:
    """One removable part: `Component("ssm", 17)`, written `ssm:17`.

    kind: a key of `KINDS`; index: int from 0, in the numbering of the unpruned model.
    Raises PlanError for an unknown kind or a negative index.
    """

    kind: str
    index: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise PlanError(f"kind {self.kind!r} is unknown: expected one of {', '.join(KINDS)}")
        if isinstance(self.index, bool) or not isinstance(self.index, int) or self.index < 0:
            raise PlanError(f"{self.kind}: index {self.index!r} is not an integer from 0 up")

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"

    @classmethod
    def parse(cls, text: str) -> Component:
        """The component that `str` wrote.

        >>> Component.parse("ssm:17")
        Component(kind='ssm', index=17)
        """
        kind, colon, index = text.partition(":")
        if not (colon and index.isdecimal()):
            raise PlanError(f"component {text!r} is malformed: expected 'kind:index', for example 'ssm:17'")
        return cls(kind, int(index))

    def within(self, other: Component) -> bool:
        """Whether this lies in another component, so that it goes when that goes."""
        return self.index == other.index and other.kind in WITHIN.get(self.kind, ())


class Cut(NamedTuple):
    """A component and what stays of it: the pair (component, kept), written `ssm:17` or `mlp_channels:3/2048`.

    kept: channels, heads or dimensions that stay, for the kinds in `PARTS`; 0 for the others, which go whole.
    """

    component: Component
    kept: int = 0

    def __str__(self) -> str:
        return f"{self.component}/{self.kept}" if self.kept else str(self.component)

    @classmethod
    def parse(cls, text: str) -> Cut:
        """The cut that `str` wrote. Raises PlanError for any other text."""
        component, slash, kept = text.partition("/")
        if slash and not (kept.isdecimal() and int(kept)):
            raise PlanError(f"cut {text!r} is malformed: expected what stays after '/', as in mlp_channels:3/2048")
        return cls(Component.parse(component), int(kept or 0))


def cuts(gone: Iterable[Component | tuple[Component, int]]) -> list[Cut]:
    """Components and (component, kept) pairs as cuts."""
    return [Cut(item) if isinstance(item, Component) else Cut(*item) for item in gone]
