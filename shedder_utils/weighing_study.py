"""What the components of a model save, as a study's search weighs them: counted or timed once, and recorded."""

from __future__ import annotations

from typing import Any

from .component_costs import savings
from .components import PARTS, Component
from .families import family_of
from .profiles import SAVINGS
from .records import Metric, Outcome, Record, Request
from .savings import MEASURED, Savings
from .workbench import Workbench

WHOLE = "model"
TIMING = {"prompt_tokens": 512, "new_tokens": 8, "batches": 12}
"""How components are timed, after the prompt that the profile measures speed with, if it does."""


def recorded_savings(bench: Workbench, study: str) -> Savings:
    """What each component of a study's kinds saves, in the unit by which the study chooses.

    Metrics are by component, such as "decode/ssm:17/seconds" or "bytes/ssm:17", and "model" for the whole. Times are
    of the machine, so another machine may find another order of removals.
    """
    settings = bench.profile.beyond[study]
    unit = str(settings.per)
    speed = bench.profile.speed
    timing: dict[str, Any] = TIMING | ({"prompt_tokens": speed.prompt_tokens} if speed else {})
    spec = {"unit": unit, "kinds": settings.kinds, **timing}

    def compute(_: Request) -> Outcome:
        found = savings(bench.model, settings.kinds, [unit], **timing)[unit]
        values = {WHOLE: found.whole, **found.each}
        return Outcome(metrics={_name(unit, part): Metric(value=value) for part, value in values.items()})

    return _read(bench, unit, bench.record(study, SAVINGS, spec, {}, [], compute))


def _read(bench: Workbench, unit: str, record: Record) -> Savings:
    """The savings that a record holds."""
    found = {name.split("/")[1]: metric.value for name, metric in record.metrics.items()}
    whole = found.pop(WHOLE)
    kinds = dict.fromkeys(Component.parse(name).kind for name in found)
    parts = {kind: family_of(bench.model).channels(bench.model, kind) for kind in kinds if kind in PARTS}
    return Savings(unit=unit, whole=whole, each=found, parts=parts)


def _name(unit: str, part: str) -> str:
    return f"{unit}/{part}/seconds" if unit in MEASURED else f"{unit}/{part}"


def search_options(bench: Workbench, study: str) -> dict[str, Any]:
    """What a study asks of `search` beside its stages, as `search` takes it."""
    options = bench.profile.beyond[study].options if study in bench.profile.beyond else {}
    return options | ({"per": recorded_savings(bench, study)} if "per" in options else {})
