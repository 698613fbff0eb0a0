"""The inventory of a model: what can be removed, and what each kind of component weighs (figure 1)."""

from __future__ import annotations

import pandas as pd
from transformers import PreTrainedModel

from .families import family_of


def describe(model: PreTrainedModel) -> pd.DataFrame:
    """One row for each removable kind, and one for the whole model.

    Columns: count, parameters of one component (the mean), parameters of all, and their share of the model's unique
    parameters. A component weighs what is left without a reader when it alone is gone.
    """
    family = family_of(model)
    total = model.num_parameters()
    rows = []
    for kind in family.kinds:
        weights = [family.dead_parameters(model, c) for c in family.components(model) if c.kind == kind]
        rows.append((kind, len(weights), sum(weights) / len(weights), sum(weights), sum(weights) / total))
    rows.append(("model", 1, total, total, 1.0))
    return pd.DataFrame(rows, columns=["kind", "count", "parameters_each", "parameters", "share"]).set_index("kind")
