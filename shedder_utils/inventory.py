"""The inventory of a model: what can be removed, and what each kind of component weighs (figure 1)."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd
from transformers import PreTrainedModel

from .components import Component, cuts
from .families import family_of


def describe(model: PreTrainedModel) -> pd.DataFrame:
    """One row for each kind that can be removed, and one for the whole model.

    Columns: count, parameters of one component (the mean), parameters of all, and their share of the model's unique
    parameters. A component weighs what is left without a reader when it alone is gone.
    """
    family = family_of(model)
    total = model.num_parameters()
    rows = []
    for kind in family.kinds:
        weights = [family.dead_parameters(model, c) for c in family.components(model) if c.kind == kind]
        if weights:
            rows.append((kind, len(weights), sum(weights) / len(weights), sum(weights), sum(weights) / total))
    rows.append(("model", 1, total, total, 1.0))
    return pd.DataFrame(rows, columns=["kind", "count", "parameters_each", "parameters", "share"]).set_index("kind")


def parameters_removed(model: PreTrainedModel, gone: Iterable[Component | tuple[Component, int]]) -> int:
    """How many parameters go with components, as the paper's ratios count them; `gone` as for `removed`."""
    family = family_of(model)
    return sum(
        (family.channels(model) - kept) * family.channel_parameters(model)
        if component.kind == "mlp_channels"
        else family.parameters(model, component)
        for component, kept in cuts(gone)
    )


def ratio(model: PreTrainedModel, gone: Iterable[Component | tuple[Component, int]]) -> float:
    """The pruning ratio of the paper's tables, from 0 to 1; `gone` as for `removed`."""
    gone = cuts(gone)
    dense = family_of(model).parameters_in_ratio(model, [component for component, _ in gone])
    return parameters_removed(model, gone) / dense
