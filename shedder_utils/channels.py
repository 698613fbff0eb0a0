"""The order of MLP channels: which of them are the last, and so the first to go (Algorithm 2).

D model width, I channels.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .errors import PlanError
from .families import family_of


@torch.no_grad()
def order_channels(model: PreTrainedModel) -> None:
    """Sort the channels of every MLP by the L1 norm of their gate and up rows, largest first, in place.

    The model computes the same, to rounding. Optional before a search, as in the authors' release for Hymba.
    Raises PlanError for a model without MLPs.
    """
    mlps = family_of(model).channel_weights(model)
    if not mlps:
        raise PlanError(f"a {model.config.model_type} model has no MLP whose channels could be ordered")
    for mlp in mlps:
        norms = torch.stack([weight.float().abs().sum(dim=1) for weight in mlp.gate_up]).sum(dim=0)
        order = norms.argsort(descending=True, stable=True)
        for rows in (*mlp.gate_up, *mlp.others):
            rows.copy_(rows[order])
        mlp.down.copy_(mlp.down[:, order])
