"""The inventory of a model: what can be removed, and what each kind of component weighs, keeps and computes (figure 1).

B batch, L tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import pandas as pd
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .components import Component, cuts
from .costs import Costs, costs
from .families import family_of
from .removal import prune

COLUMNS = (
    "kind", "count", "parameters_each", "parameters", "share", "parameters_apart", "bytes", "cache_bytes",
    "flops_per_token",
)  # fmt: skip


def describe(model: PreTrainedModel, *, tokens: int = 512) -> pd.DataFrame:
    """One row for each kind that can be removed, and one for the whole model.

    count: components. parameters: of all of them, unique ones; parameters_each: the mean; share: of the model's. A
    component weighs what is left without a reader when it alone is gone, so that blocks which several layers share
    weigh nothing but their adapters. parameters_apart: with a private copy for each layer, its adapter merged; where
    the model's is the larger number, it shares. bytes: of the unique parameters, on disk. cache_bytes, flops_per_token:
    of one prompt of `tokens` tokens, and per token of its prefill; a kind's are what goes when all of the kind go.
    """
    family, total, itemsize = family_of(model), model.num_parameters(), model.dtype.itemsize
    dense, rows = _costs(_outline(model), tokens), []
    for kind in family.kinds:
        found = [component for component in family.components(model) if component.kind == kind]
        if found:
            weight = sum(family.dead_parameters(model, component) for component in found)
            apart = sum(family.parameters_apart(model, component) for component in found)
            sizes = (weight / len(found), weight, weight / total, apart, weight * itemsize)
            rows.append((kind, len(found), *sizes, *_freed(model, found, dense, tokens)))
    size, apart = sum(parameter.nbytes for parameter in model.parameters()), family.parameters_apart(model)
    rows.append(("model", 1, total, total, 1.0, apart, size, dense.cache_bytes, dense.flops / tokens))
    return pd.DataFrame(rows, columns=COLUMNS).set_index("kind")


def _freed(model: PreTrainedModel, gone: Sequence[Component], dense: Costs, tokens: int) -> tuple[int, float]:
    """Bytes of cache and FLOPs per token that go with all components of a kind.

    Of MLP channels one has to stay: what goes with the others is scaled to all of them.
    """
    channels = family_of(model).channels(model) if gone[0].kind == "mlp_channels" else 0
    outline = _outline(model)
    prune(outline, [(component, 1) for component in gone] if channels else gone)
    left = _costs(outline, tokens)
    scale = channels / (channels - 1) if channels else 1.0
    return dense.cache_bytes - left.cache_bytes, scale * (dense.flops - left.flops) / tokens


def _costs(outline: PreTrainedModel, tokens: int) -> Costs:
    """`costs`, without transformers' warnings that it has no fast kernel for the meta device."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return costs(outline, tokens)
    finally:
        logging.set_verbosity(verbosity)


def _outline(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose tensors are on torch's meta device; what is shared stays shared."""
    parameters = {id(parameter): nn.Parameter(parameter.to("meta")) for parameter in model.parameters()}
    buffers = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    return copy.deepcopy(model, parameters | buffers)


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
