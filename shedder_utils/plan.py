"""Plans: which components go, in which order, and how the model scored after each removal.

A plan is what a search produces (Algorithms 1 and 2) and what everything else consumes. On disk it is JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from . import released
from .components import Component, Cut
from .errors import PlanError
from .files import write_atomically

JsonComponent = Annotated[
    Component,
    BeforeValidator(lambda value: Component.parse(value) if isinstance(value, str) else value),
    PlainSerializer(str),
]


COUNTS = ("passes", "layer_runs", "layer_runs_plain", "layer_runs_reused", "ties")
"""What the provenance of a plan counts, where its metric was measured: see `Plan`."""


class Stage(BaseModel):
    """One stage of a search: the kinds that compete with each other, and how many removals it makes.

    kinds: a kind or a list of them ("&" in table 3; stages that follow each other are its "+");
    steps: removals; group: MLP channels removed at a time, or inner channels, heads or states; for these kinds only.
    Raises PlanError for a group of none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kinds: Annotated[tuple[str, ...], BeforeValidator(lambda kinds: (kinds,) if isinstance(kinds, str) else kinds)]
    steps: int = Field(ge=0)
    group: int = 1024

    def __init__(self, kinds: str | Sequence[str], steps: int, group: int = 1024) -> None:
        super().__init__(kinds=kinds, steps=steps, group=group)

    @model_validator(mode="after")
    def _check(self) -> Stage:
        if self.group < 1:
            kinds = " & ".join(self.kinds)
            raise PlanError(f"stage '{kinds}: {self.steps} x {self.group}' takes nothing: expected x 1 or more")
        return self


def shared_removals(first: Sequence[Stage], second: Sequence[Stage]) -> int:
    """How many removals two searches make alike, by their stages.

    >>> whole, further = Stage("mha", 2), Stage("mha", 5)
    >>> shared_removals([whole, Stage("ssm", 3)], [further])
    2
    >>> shared_removals([whole, Stage("ssm", 3)], [whole, Stage("ssm", 1)])
    3
    """
    shared = 0
    for one, other in zip(first, second, strict=False):
        if one.model_copy(update={"steps": other.steps}) != other:
            break
        shared += min(one.steps, other.steps)
        if one.steps != other.steps:
            break
    return shared


class Removal(BaseModel):
    """One step of a plan.

    component: what went; kept: channels, heads or states left, for kinds that lose parts only; stage: number of its
    stage, from 0; score: what the search chose it by, lower is better (see `Plan`); parameters: how many it takes from
    the model, counted as the paper's ratios count them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    component: JsonComponent
    kept: int | None = None
    stage: int = 0
    score: float | None = None
    parameters: int = 0


class Plan(BaseModel):
    """The ordered removals for one model.

    model: {ref, type, layers, parameters, dtype, fingerprint} of the dense model; calibration: {name, samples, tokens,
    fingerprint, ...}; stages: the stages asked for.

    Scores are those of provenance["metric"]. "perplexity" and "kl" are measured by a full pass after the removal
    (nats for "kl"), and dense_score before any; other metrics are estimates of the component's importance before it
    went, in units of their own, and dense_score is None. With provenance["one_shot"], all scores are those of a
    removal from the dense model.

    provenance: how the plan was made. seed: of "random"; ranks: processes. For what is measured also method; passes:
    candidates that were measured, each by one full pass in Algorithm 1;
    layer_runs: layers evaluated, in layers times sequences; layer_runs_plain: those that Algorithm 1 would take;
    layer_runs_reused: those spared by what was kept; memory_gib: what was allowed to be held; ties:
    candidates within rounding of the best, settled by full passes. ties_within_error: removals whose choice the
    calibration data does not support, each with its rivals, which are as good within 1.96 standard errors of the paired
    difference. taken_over: where the first removals come from, {study, removals, checksum} of a recorded search that
    begins alike; the counts are then those of the others.

    Where cost counts (`savings.py`): per, what each component saves, by which candidates were weighed; until, the
    budget; saved: by unit, what is predicted to be saved after each removal.
    """

    model_config = ConfigDict(extra="forbid")

    removals: list[Removal] = []
    dense_score: float | None = None
    stages: list[Stage] = []
    model: dict[str, Any] = {}
    calibration: dict[str, Any] = {}
    provenance: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.removals)

    @property
    def components(self) -> list[Component]:
        """The removed components in order; one that loses channels again and again appears each time."""
        return [removal.component for removal in self.removals]

    @property
    def gone(self) -> list[Cut]:
        """What `removed` takes for the whole plan: each component once, with the parts that stay at the end."""
        left = {removal.component: removal.kept or 0 for removal in self.removals}
        return [Cut(component, kept) for component, kept in left.items()]

    @property
    def scores(self) -> list[float | None]:
        """The metric with 0, 1, 2, ... removals: what figure 4 draws."""
        return [self.dense_score, *(removal.score for removal in self.removals)]

    def first(self, n: int) -> Plan:
        """The plan that stops after n removals. Raises PlanError if there are fewer."""
        if not 0 <= n <= len(self.removals):
            raise PlanError(f"the plan has {len(self.removals)} removals, {n} were asked for: search further")
        return self.model_copy(update={"removals": self.removals[:n]})

    def save(self, path: str | Path) -> None:
        """Write JSON to `path`, whole or not at all."""
        write_atomically(Path(path), self.model_dump_json(indent=2) + "\n")

    @classmethod
    def from_released(cls, source: str | Path | Mapping[str, Any]) -> Plan:
        """The plan in a JSON file that the paper's authors released, or in its content.

        It has the removals alone: no scores, and no counts of parameters. Raises PlanError: see `released.read`.
        """
        steps = released.read(source)
        where = {} if isinstance(source, Mapping) else {"file": str(source)}
        return cls(
            removals=[Removal(component=step.component, kept=step.kept, stage=step.stage) for step in steps],
            provenance={"method": "released", **where},
        )

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read what `save` wrote. Raises PlanError for a missing or malformed file."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"plan {path} cannot be read ({error.strerror}): check the path") from error
        except (ValidationError, PlanError, UnicodeDecodeError) as error:
            detail = str(error).replace("\n", " ")[:200]
            raise PlanError(f"plan {path} is not a plan of this package: {detail}") from error
