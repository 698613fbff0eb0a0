"""`search --per` and `--until`: what components save, counted or timed before a search, and checked after it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import PlanError
from ..plan import Plan, Stage
from ..resuming import another_search
from ..savings import MEASURED, UNITS, Budget, Savings, wanted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Per = Annotated[
    str,
    typer.Option(
        help="Weigh what the loss rises against what goes: parameters, bytes (moved for a token), prefill or decode, "
        "timed on this machine."
    ),
]
Until = Annotated[
    str,
    typer.Option(
        help='Stop as soon as so much is saved: "parameters 10%", "decode 1.3x". With --kinds it takes the place of '
        "--steps; --stages say how many may go at most."
    ),
]
PromptTokens = Annotated[int, typer.Option(help="For timing and bytes: tokens of the prompt.", min=1)]
NewTokens = Annotated[int, typer.Option(help="For timing: tokens after it.", min=2)]
Batches = Annotated[int, typer.Option(help="For timing: rounds that count.", min=1)]


def rules(
    model: PreTrainedModel,
    stages: Sequence[Stage],
    metric: str,
    per: str,
    until: str,
    begun: Path,
    timing: dict[str, Any],
) -> dict[str, Any]:
    """`per` and `until` as `search` takes them; a search that goes on keeps the savings that it began with.

    begun: the file of a search that was stopped, if it is there; timing: see `component_costs.savings`.
    Raises PlanError, before anything is timed, for an unknown unit, a malformed budget, a metric that cannot be
    weighed, stages that ask for more than there is, and a search that was begun with other timing.
    """
    from ..candidates import check_stages
    from ..component_costs import savings
    from ..distributed import on_first

    if per and per not in UNITS:
        raise PlanError(f"savings in {per!r} are unknown: expected one of {', '.join(UNITS)}")
    if per and metric != "perplexity":
        raise PlanError(f"search metric {metric!r} cannot be weighed against {per}: expected perplexity")
    units = dict.fromkeys(unit for unit in (per, wanted(until)[0] if until else "") if unit)
    check_stages(model, stages)
    known = on_first(lambda: _begun_with(begun, timing)) if units else {}
    missing = [unit for unit in units if unit not in known]
    if missing:
        kinds = [kind for stage in stages for kind in stage.kinds]
        known |= on_first(lambda: savings(model, kinds, missing, **timing))
    found: dict[str, Any] = {"per": known[per]} if per else {}
    return found | ({"until": Budget(text=until, savings=known[wanted(until)[0]])} if until else {})


def _begun_with(file: Path, timing: dict[str, Any]) -> dict[str, Savings]:
    """The savings by which a search was begun, by unit. Raises PlanError for those of other timing."""
    made = Plan.load(file).provenance if file.exists() else {}
    found = [Savings.model_validate(made["per"])] if "per" in made else []
    found += [Budget.model_validate(made["until"]).savings] if "until" in made else []
    for savings in found:
        for name, value in savings.timing.items():
            if value != (asked := timing.get(name, value)):
                raise another_search(file, name, value, asked)
    return {savings.unit: savings for savings in found}


def saved(model: PreTrainedModel, plan: Plan, rules: dict[str, Any], timing: dict[str, Any]) -> dict[str, Any]:
    """By unit, what a plan saves; of times, in seconds, the speedup as predicted, and as measured when extracted."""
    counted: list[Savings] = [rule.savings if isinstance(rule, Budget) else rule for rule in rules.values()]
    found: dict[str, dict[str, float]] = {
        savings.unit: {"whole": savings.whole, "saved": savings.of(plan.gone), "share": savings.share(plan.gone)}
        for savings in counted
    }
    timed = {savings.unit: savings for savings in counted if savings.unit in MEASURED}
    if timed and plan.removals:
        from ..benchmark import benchmark
        from ..surgery import extract

        timings = benchmark({"dense": model, "pruned": extract(model, plan)}, **timing)
        for unit, savings in timed.items():
            speedup = timings.speedup("pruned", unit)
            found[unit] |= {
                "predicted": savings.speedup(plan.gone), "measured": speedup.value, "low": speedup.low,
                "high": speedup.high,
            }  # fmt: skip
    return found
