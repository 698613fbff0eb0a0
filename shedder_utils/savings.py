"""Savings: what the removal of a component saves, so that a search can weigh it against what the model loses by it.

The paper leaves the joint choice among components that differ in cost to future work. Here a saving is counted in one
of four units, whatever does not go with any component (embedding, head) staying in the whole:

    parameters  that nothing reads any more; a block that several layers share counts for each of them
    bytes       that one decoded token moves: weights, states, keys and values
    prefill     seconds of a prompt on this machine
    decode      seconds of one decoded token on this machine

`component_costs.py` makes them.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .components import Component, Cut
from .errors import NothingLeftError, PlanError

MEASURED = ("prefill", "decode")
UNITS = ("parameters", "bytes", *MEASURED)
BUDGET = re.compile(r"(?P<unit>\w+)\s+(?P<number>\d+(\.\d+)?)\s*(?P<sign>%|x)")


class Savings(BaseModel):
    """What goes with each component, in one unit.

    whole: what the dense model takes; each: by component, such as "ssm:17"; parts: of the kinds that lose parts, such
    as `mlp_channels`, how many a component has, and then `each` is what one of them saves. Savings add up.
    timing: of what `component_costs.savings` was told, all that these savings depend on, such as prompt_tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: str
    whole: float = Field(gt=0)
    each: dict[str, float]
    parts: dict[str, int] = {}
    timing: dict[str, int] = Field(default={}, exclude_if=lambda timing: not timing)

    def __str__(self) -> str:
        digest = hashlib.sha256(self.model_dump_json().encode()).hexdigest()
        return f"{self.unit} (savings {digest[:12]})"

    def text(self, amount: float) -> str:
        """An amount in the unit as it is shown: times in milliseconds."""
        return f"{1e3 * amount:.3f} ms" if self.unit in MEASURED else f"{amount:,.0f}"

    def of(self, gone: Sequence[Cut]) -> float:
        """What the removal of components saves. Raises PlanError for one that was not weighed."""
        return sum(self._saved(component, self._width(component) - kept) for component, kept in gone)

    def further(self, gone: Sequence[Cut], candidate: Cut) -> float:
        """What a candidate saves beyond what is gone: exactly as much as another one whose saving is the same."""
        before = dict(gone).get(candidate.component, self._width(candidate.component))
        return self._saved(candidate.component, before - candidate.kept)

    def _width(self, component: Component) -> int:
        """How many parts a component has; one that goes whole is one."""
        return self.parts.get(component.kind, 1)

    def _saved(self, component: Component, parts: int) -> float:
        if str(component) not in self.each:
            raise PlanError(f"{component} has no saving in {self.unit}: weigh the kinds of every stage")
        return parts * self.each[str(component)]

    def share(self, gone: Sequence[Cut]) -> float:
        """The share of the whole that goes with components."""
        return self.of(gone) / self.whole

    def speedup(self, gone: Sequence[Cut]) -> float:
        """How many times less the model takes without components; inf where all of it is said to go."""
        left = self.whole - self.of(gone)
        return self.whole / left if left > 0 else math.inf


class Budget(BaseModel):
    """How much a search is to save: it stops as soon as that is reached.

    text: "parameters 10%" for a tenth less, "decode 1.3x" for 1.3 times faster; savings: in the unit of the text.
    Raises PlanError for any other text, and for savings in another unit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str
    savings: Savings

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if (unit := wanted(self.text)[0]) != self.savings.unit:
            raise PlanError(
                f"budget {self.text!r} is in {unit}, the savings are in {self.savings.unit}: weigh by {unit}"
            )
        return self

    def __str__(self) -> str:
        return f"{self.text}, by {self.savings}"

    def reached(self, gone: Sequence[Cut]) -> bool:
        """Whether the removal of components saves enough."""
        return self.savings.share(gone) >= wanted(self.text)[1]


def wanted(text: str) -> tuple[str, float]:
    """The unit of a budget, and the share of the whole that is to go. Raises PlanError for what is no budget.

    >>> wanted("parameters 10%"), wanted("decode 2x")
    (('parameters', 0.1), ('decode', 0.5))
    """
    found = BUDGET.fullmatch(text.strip())
    unit, share = (found["unit"], _share(float(found["number"]), found["sign"])) if found else ("", 0.0)
    if unit not in UNITS or not 0 < share < 1:
        raise PlanError(
            f"budget {text!r} is malformed: expected one of {', '.join(UNITS)} and how much is to go, "
            "for example 'parameters 10%' or 'decode 1.3x'"
        )
    return unit, share


def _share(number: float, sign: str) -> float:
    return number / 100 if sign == "%" else 1 - 1 / max(number, 1.0)


def standing(rise: float, saving: float) -> tuple[float, float, float]:
    """Where a candidate stands, the lowest first: by the rise of the loss for each unit that it saves.

    Those that do not raise it cost nothing: among them the one that saves most goes, and of equals the one with the
    lowest loss. Where all save the same, that is the order of the losses. rise: of the mean calibration loss, in nats.
    """
    return max(rise, 0.0) / saving, -saving, rise


def worth_removing(per: Savings | None, gone: Sequence[Cut], candidates: Sequence[Cut]) -> list[Cut]:
    """The candidates that save something, or all where nothing is counted. Raises NothingLeftError where none does."""
    left = [cut for cut in candidates if per is None or per.further(gone, cut) > 0]
    if per is not None and not left:
        raise NothingLeftError(
            f"none of the {len(candidates)} candidates that are left saves any {per.unit}: ask for less"
        )
    return left


def saving_no_less(per: Savings | None, gone: Sequence[Cut], best: Cut, others: Sequence[Cut]) -> list[Cut]:
    """Those of other candidates that save as much as the best one, or all where nothing is counted."""
    return [cut for cut in others if per is None or per.further(gone, cut) >= per.further(gone, best)]
