"""Settings of the pruning studies: what may go, how it is chosen, and after how many removals a model is scored."""

from collections.abc import Collection, Mapping
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from .. import paper
from ..components import KINDS, PARTS
from ..plan import Plan, Stage
from ..savings import UNITS
from .strict import Settings

RELEASED = "released"
"""The name of the study of the orders that the paper's authors released."""


class StageSettings(Settings):
    """One stage of a search: the kinds that compete, how many removals, and parts, such as heads, removed at a time."""

    kinds: tuple[str, ...]
    steps: PositiveInt
    group: PositiveInt | None = None

    @model_validator(mode="after")
    def _check(self) -> "StageSettings":
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"kind {kind!r} is unknown, expected one of {', '.join(KINDS)}")
        if (self.group is not None) != bool(PARTS.keys() & set(self.kinds)):
            raise ValueError(f"group: expected with {', '.join(PARTS)}, and with no other kind")
        return self


class _Search(Settings):
    """What is removed: the stages of a search, and what it asks beside them."""

    stages: tuple[StageSettings, ...]

    @property
    def plan_stages(self) -> list[Stage]:
        """The stages as `search` takes them."""
        return [Stage(**stage.model_dump(exclude_none=True)) for stage in self.stages]

    @property
    def steps(self) -> int:
        """The removals of all stages."""
        return sum(stage.steps for stage in self.stages)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of all stages, in order."""
        return tuple(dict.fromkeys(kind for stage in self.stages for kind in stage.kinds))

    @property
    def options(self) -> dict[str, Any]:
        """What it asks of `search` beside its stages, where that differs from the paper's."""
        return {}

    def _check_rows(self, rows: Mapping[str, Collection[int]]) -> None:
        for model, numbers in rows.items():
            if list(numbers) != sorted(numbers) or max(numbers, default=0) > self.steps:
                raise ValueError(f"rows of {model}, {list(numbers)}: expected rising numbers up to {self.steps} steps")


class Study(_Search):
    """A pruning study: one search, and evaluations after some of its removals.

    table: the table of the paper that it fills. rows: for each model, after how many removals it is evaluated, and the
    row of the paper that each stands beside: the same share of a deeper model, by the paper's number of removals, or
    in table 3 by its ratio.
    """

    table: PositiveInt
    rows: dict[str, dict[NonNegativeInt, float]]

    @model_validator(mode="after")
    def _check(self) -> "Study":
        self._check_rows(self.rows)
        return self


class Strategy(_Search):
    """A pruning study that the paper does not have: other ways to choose, or other kinds.

    rows: for each model, after how many removals it is evaluated. samples: calibration texts, in place of the profile's
    number. metric, one_shot, per: as for `search`; per is the name of a unit (`savings.UNITS`).
    """

    rows: dict[str, tuple[PositiveInt, ...]]
    samples: PositiveInt | None = None
    metric: str = "perplexity"
    one_shot: bool = False
    per: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As of every search: its metric, whether it ranks once, and what it weighs losses against."""
        given = {"metric": self.metric, "one_shot": self.one_shot, "per": self.per}
        return {name: value for name, value in given.items() if value != type(self).model_fields[name].default}

    @model_validator(mode="after")
    def _check(self) -> "Strategy":
        if self.per is not None and self.per not in UNITS:
            raise ValueError(f"per {self.per!r}: expected one of {', '.join(UNITS)}")
        self._check_rows(self.rows)
        return self


class ReleasedOrder(Settings):
    """A removal order that the paper's authors released, of which a model is scored without a search.

    order: its name (`paper.plans`). table: the table of the paper that it belongs to. rows: after how many removals the
    model is scored, and the paper's row, if any, by its number of removals, or in table 3 by its ratio. Blocks,
    attention and MLPs count before MLPs that lose channels, and those before SSMs, each MLP once.
    """

    order: str
    model: str
    table: PositiveInt
    rows: dict[PositiveInt, float | None] = Field(min_length=1)

    @property
    def plan(self) -> Plan:
        """The order."""
        return paper.plan(self.order)

    def setting(self, n_removed: int) -> str:
        """The name in records of the scores after n removals."""
        return f"{self.order}_{n_removed:02d}_removed"

    @model_validator(mode="after")
    def _check(self) -> "ReleasedOrder":
        if self.order not in paper.plans():
            raise ValueError(f"order {self.order!r} is unknown, expected one of {', '.join(paper.plans())}")
        if max(self.rows) > len(self.plan):
            raise ValueError(f"rows of {self.order}, {list(self.rows)}: it has {len(self.plan)} removals")
        return self
