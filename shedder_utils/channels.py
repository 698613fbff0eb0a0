"""The order of MLP channels, and of other parts: which of them are the last, and so the first to go (Algorithm 2).

D model width, I channels.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .errors import PlanError
from .families import family_of
from .families.finer_kinds import FinerKinds
from .removal import components


@torch.no_grad()
def order_channels(model: PreTrainedModel, kind: str = "mlp_channels") -> None:
    """Sort the channels of every MLP by the L1 norm of their gate and up rows, largest first, in place.

    kind: "mlp_channels", or what the mixers of this model have of inner channels, heads and states, which are sorted by
    the rows that make x and its gate, or B and C. The model computes the same, to rounding. Optional before a search,
    as in the authors' release for Hymba; a plan found after it fits only a model so ordered, so the model's
    configuration says that it is (`ordered_parts`). Raises PlanError for a model without MLPs, or without that kind.
    """
    family = family_of(model)
    if isinstance(family, FinerKinds) and kind in family.finer and components(model, kind):
        family.order_parts(model, kind)
        _mark(model, kind)
        return
    if kind != "mlp_channels":
        raise PlanError(f"this {model.config.model_type} model has no {kind!r} that could be ordered")
    mlps = family.channel_weights(model)
    if not mlps:
        raise PlanError(f"a {model.config.model_type} model has no MLP whose channels could be ordered")
    for mlp in mlps:
        norms = torch.stack([weight.float().abs().sum(dim=1) for weight in mlp.gate_up]).sum(dim=0)
        order = norms.argsort(descending=True, stable=True)
        for rows in (*mlp.gate_up, *mlp.others):
            rows.copy_(rows[order])
        mlp.down.copy_(mlp.down[:, order])
    _mark(model, kind)


def _mark(model: PreTrainedModel, kind: str) -> None:
    model.config.ordered_parts = sorted({*getattr(model.config, "ordered_parts", []), kind})
