"""Component costs: what the removal of each component saves, counted from shapes or measured on this machine.

Components of one kind and shape cost the same, so each such class is weighed once: half of it is taken out, and what
that saves is shared out among the half. So a difference stands out from the noise of a clock, and a component's
share of what all layers have in common, such as the start of an operation, is part of its saving.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from transformers import PreTrainedModel

from .benchmark import Timings, benchmark
from .components import PARTS, Component, Cut
from .errors import PlanError
from .families import family_of
from .inventory import costs_without
from .plan import Plan, Removal
from .removal import components
from .savings import MEASURED, Savings
from .surgery import extract

DENSE, VARIANT = "dense", "variant"
DEPENDS_ON: dict[str, tuple[str, ...]] = {"parameters": (), "bytes": ("prompt_tokens",)}
"""By unit, the settings that savings depend on; those that are measured depend on all."""


def savings(
    model: PreTrainedModel,
    kinds: Iterable[str],
    units: Iterable[str],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 16,
    batches: int = 10,
    progress: bool = True,
) -> dict[str, Savings]:
    """What the components of some kinds save, by unit (`savings.UNITS`).

    prompt_tokens, new_tokens, batches, progress: as for `benchmark`, which times the dense model and a variant
    interleaved, for one class of components after the other, so that no more than these two are held; both phases come
    from one run. "bytes" are those after the same prompt.
    Raises PlanError for components that cannot be weighed because each needs others to go first.
    """
    units, kinds = list(units), tuple(dict.fromkeys(kinds))
    classes = alike(model, kinds, prompt_tokens)
    found = {}
    if "parameters" in units:
        found["parameters"] = _parameters(model, classes)
    if "bytes" in units:
        found["bytes"] = _bytes(model, classes, prompt_tokens)
    if any(unit in MEASURED for unit in units):
        timings = [
            benchmark(
                {DENSE: model, VARIANT: extract(model, _plan(_half(model, group)))}, prompt_tokens=prompt_tokens,
                new_tokens=new_tokens, batches=batches, progress=progress,
            )
            for group in classes
        ]  # fmt: skip
        found |= {unit: _measured(model, classes, timings, unit) for unit in MEASURED if unit in units}
    timing = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batches": batches}
    settings = {unit: {name: timing[name] for name in DEPENDS_ON.get(unit, timing)} for unit in units}
    return {unit: found[unit].model_copy(update={"timing": settings[unit]}) for unit in units}


def alike(model: PreTrainedModel, kinds: Iterable[str], prompt_tokens: int = 512) -> list[list[Component]]:
    """The components of some kinds in classes: of one kind, in layers of one shape that compute as much."""
    family, classes = family_of(model), defaultdict(list)
    for component in components(model, kinds):
        layer = family.layers(model)[family.layer_of(model, component)]
        beside_weights = sum(family.flops_beside_weights(module, prompt_tokens) for module in layer.modules())
        classes[component.kind, repr(layer), beside_weights].append(component)
    return list(classes.values())


def _half(model: PreTrainedModel, group: Sequence[Component]) -> list[Cut]:
    """Every second component of a class, as far as they can go together; of kinds that lose parts, half of these.

    Raises PlanError for a class of which none can go before others have.
    """
    conflict, chosen = family_of(model).conflict, list[Component]()
    for component in [component for component in group if conflict(model, [component]) is None][::2]:
        if conflict(model, [*chosen, component]) is None:
            chosen.append(component)
    if not chosen:
        raise PlanError(
            f"{' and '.join(map(str, group))} cannot be weighed, none can be taken out alone: "
            f"{conflict(model, group[:1])}, or weigh by parameters, which need no measurement"
        )
    return [Cut(component, _half_of_parts(model, component.kind)) for component in chosen]


def _half_of_parts(model: PreTrainedModel, kind: str) -> int:
    """How many parts stay when half of them go, as far as they can go apart; 0 for kinds that go whole."""
    if kind not in PARTS:
        return 0
    family = family_of(model)
    together = family.together(model, kind)
    return max(family.channels(model, kind) // 2 // together, 1) * together


def _plan(cuts: Sequence[Cut]) -> Plan:
    return Plan(removals=[Removal(component=component, kept=kept or None) for component, kept in cuts])


def _parameters(model: PreTrainedModel, classes: Sequence[Sequence[Component]]) -> Savings:
    family = family_of(model)
    each: dict[str, float] = {}
    for component in (component for group in classes for component in group):
        each[str(component)] = (
            family.channel_parameters(model, component.kind)
            if component.kind in PARTS
            else family.parameters_apart(model, component)
        )
    whole = family.parameters_apart(model)
    return Savings(unit="parameters", whole=whole, each=each, parts=_widths(model, classes))


def _bytes(model: PreTrainedModel, classes: Sequence[Sequence[Component]], prompt_tokens: int) -> Savings:
    whole, saved = costs_without(model, [], prompt_tokens).decode_bytes, []
    for group in classes:
        saved.append(whole - costs_without(model, _half(model, group), prompt_tokens).decode_bytes)
    return _shared_out(model, classes, "bytes", whole, saved)


def _measured(
    model: PreTrainedModel, classes: Sequence[Sequence[Component]], timings: Sequence[Timings], unit: str
) -> Savings:
    """Seconds: the medians over rounds of the dense model's time, and of its differences to each variant's."""
    dense, variants = (np.array([run.seconds[name][unit] for run in timings]) for name in (DENSE, VARIANT))
    return _shared_out(model, classes, unit, float(np.median(dense)), np.median(dense - variants, axis=1).tolist())


def _shared_out(
    model: PreTrainedModel, classes: Sequence[Sequence[Component]], unit: str, whole: float, saved: Sequence[float]
) -> Savings:
    """What each component saves, or each of its parts, from what half of its class does."""
    each, widths = {}, _widths(model, classes)
    for group, amount in zip(classes, saved, strict=True):
        out = sum(widths.get(component.kind, 1) - kept for component, kept in _half(model, group))
        each.update({str(component): amount / out for component in group})
    return Savings(unit=unit, whole=whole, each=each, parts=widths)


def _widths(model: PreTrainedModel, classes: Sequence[Sequence[Component]]) -> dict[str, int]:
    """Of the kinds that lose parts, how many a component has."""
    kinds = dict.fromkeys(group[0].kind for group in classes)
    return {kind: family_of(model).channels(model, kind) for kind in kinds if kind in PARTS}
