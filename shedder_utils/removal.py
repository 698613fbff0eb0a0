"""Removal: what can go from a model, the model as if it were gone, and the model without it for good.

`removed()` swaps modules for their pruned counterparts and puts the originals back. It is what the search scores and
what `extract` must equal (sections 3.2 and 3.3 of the paper). `prune()` never puts them back.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn
from transformers import PreTrainedModel

from .components import PARTS, Component, Cut, cuts
from .errors import PlanError
from .families import family_of

_MASKED: WeakSet[PreTrainedModel] = WeakSet()


def components(model: PreTrainedModel, kinds: str | Iterable[str] | None = None) -> list[Component]:
    """What can be removed from a model, in depth order; of one kind or several, by default of all that the paper has.

    Raises PlanError for a kind that the model does not have.
    """
    family = family_of(model)
    wanted = family.kinds if kinds is None else (kinds,) if isinstance(kinds, str) else tuple(kinds)
    known = (*family.kinds, *family.finer)
    unknown = [kind for kind in wanted if kind not in known]
    if unknown:
        expected = ", ".join(known)
        raise PlanError(f"a {model.config.model_type} model has no {unknown[0]!r} to remove: expected {expected}")
    return [component for component in family.components(model) if component.kind in wanted]


def check(model: PreTrainedModel, gone: Iterable[Component | tuple[Component, int]]) -> None:
    """Refuse components that cannot go together from a model.

    Raises PlanError for one that the model does not have, one removed twice, one inside another that goes too, one that
    what stays cannot do without, a number of parts to keep (channels, heads, dimensions) that is not below the width,
    and a model with adapters.
    """
    if model._hf_peft_config_loaded:
        raise PlanError("this model has LoRA adapters, which removal would not see: merge them first")
    family, kept = family_of(model), cuts(gone)
    there, counts = set(family.components(model)), Counter(component for component, _ in kept)
    if conflict := family.conflict(model, counts):
        raise PlanError(conflict)
    for component, count in counts.items():
        if component not in there:
            n = sum(other.kind == component.kind for other in there)
            raise PlanError(
                f"{component} is not in this {model.config.model_type} model, which has {n} components of that kind: "
                "was the plan made for another model?"
            )
        if count > 1:
            raise PlanError(f"{component} is removed {count} times: remove it once")
        for other in counts:
            if component.within(other):
                raise PlanError(f"{component} lies in {other}, which is removed too: drop one of them")
    for component, left in kept:
        if component.kind in PARTS:
            _check_kept(model, component, left)
        elif left:
            raise PlanError(f"{component} goes whole, {left} channels to keep were given: expected none")


def _check_kept(model: PreTrainedModel, component: Component, kept: int) -> None:
    width, together = (how(model, component.kind) for how in (family_of(model).channels, family_of(model).together))
    keeps = f"{component} keeps {kept} of {width} {PARTS[component.kind]}"
    if not 0 < kept < width:
        raise PlanError(f"{keeps}: expected 1 to {width - 1}, in a pair (component, kept)")
    if kept % together:
        raise PlanError(f"{keeps}: expected a multiple of {together}, the groups with their own B and C")


@contextmanager
def removed(
    model: PreTrainedModel, components: Iterable[Component | tuple[Component, int]]
) -> Iterator[PreTrainedModel]:
    """Inside, `model` computes as if the components were gone; afterwards it is bit for bit what it was.

    components: may be none; for kinds that lose parts (`components.PARTS`), pairs of a component and the number of
    parts that stay. The pruned counterparts share the model's parameters, but for mixers without some of their heads,
    channels or states, which hold copies of what stays. Raises PlanError (see `check`) before anything changes.
    """
    gone = cuts(components)
    check(model, gone)
    originals: list[tuple[nn.Module, str, nn.Module]] = []
    outermost = bool(gone) and not is_masked(model)
    try:
        if outermost:
            _MASKED.add(model)
            model.tie_weights = _leave_ties_alone  # type: ignore[method-assign]
        for change in family_of(model).substitutions(model, dict(gone)):
            originals.append((change.parent, change.name, getattr(change.parent, change.name)))
            setattr(change.parent, change.name, change.replacement)
        yield model
    finally:
        for parent, name, original in reversed(originals):
            setattr(parent, name, original)
        if outermost:
            _MASKED.discard(model)
            vars(model).pop("tie_weights")


def _leave_ties_alone(*_: object, **__: object) -> None:
    """In place of a masked model's `tie_weights`, which others call and which would tie stand-ins to other tensors."""


def is_masked(model: PreTrainedModel) -> bool:
    """Whether a model is inside `removed()` right now, and so still carries what it computes without."""
    return model in _MASKED


def prune(model: PreTrainedModel, gone: Iterable[Component | tuple[Component, int]]) -> None:
    """Take components from a model for good, in place; `gone` as for `removed`.

    Raises PlanError (see `check`) before anything changes.
    """
    gone = cuts(gone)
    check(model, gone)
    dense = model.num_parameters()
    for together in _by_layer(model, gone).values():  # what a layer loses is free before any of the next is copied
        for change in family_of(model).substitutions(model, together):
            setattr(change.parent, change.name, change.replacement)
    settle(model, gone, dense)


def _by_layer(model: PreTrainedModel, gone: Iterable[Cut]) -> dict[int, dict[Component, int]]:
    """What goes from each layer, with the parts that stay of it."""
    found: dict[int, dict[Component, int]] = defaultdict(dict)
    for component, kept in gone:
        found[family_of(model).layer_of(model, component)][component] = kept
    return found


def settle(model: PreTrainedModel, gone: Iterable[Cut], dense_parameters: int) -> None:
    """Make a model that computes without components one that does not have them, in place.

    Layers that do nothing go, the rest and their cache entries are numbered anew, and every parameter has memory of its
    own size. `config.pruned` says what went, in the numbering of the dense model; how many parameters that had; which
    of its settings are others now; and for each layer that is left its number there, and how much is left of what it
    has lost, by kind: 0 of what went whole.
    """
    config: Any = model.config
    family, before, lost = family_of(model), config.to_dict(), _by_layer(model, gone)
    numbers = {part: n for n, layer in enumerate(family.layers(model)) for part in (layer, *layer.children())}
    family.compact(model)
    for parameter in model.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone()
    after = config.to_dict()
    config.pruned = {
        "removed": [str(cut) for cut in gone],
        "parameters": dense_parameters,
        "dense": {name: value for name, value in before.items() if value != after[name]},
        "layers": [
            {"layer": number, **{component.kind: kept for component, kept in lost[number].items()}}
            for number in (numbers[layer] for layer in family.layers(model))
        ],
    }
