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

from .components import PARTS, Component, cuts
from .costs import Costs, costs
from .families import family_of
from .removal import components, prune

COLUMNS = (
    "kind", "count", "parameters_each", "parameters", "share", "parameters_apart", "bytes", "cache_bytes",
    "flops_per_token",
)  # fmt: skip


def describe(model: PreTrainedModel, *, tokens: int = 512, kinds: Sequence[str] | None = None) -> pd.DataFrame:
    """One row for each kind that can be removed, and one for the whole model.

    kinds: which, finer ones among them; by default those that the paper has.
    count: components. parameters: of all of them, unique ones; parameters_each: the mean; share: of the model's. A
    component weighs what is left without a reader when it alone is gone, so that blocks which several layers share
    weigh nothing but their adapters. parameters_apart: with a private copy for each layer, its adapter merged; where
    the model's is the larger number, it shares. bytes: of the unique parameters, on disk. cache_bytes, flops_per_token:
    of one prompt of `tokens` tokens, and per token of its prefill; a kind's are what goes when all of the kind go.
    """
    family, total, itemsize = family_of(model), model.num_parameters(), model.dtype.itemsize
    dense, rows = _costs(_outline(model), tokens), []
    for kind in family.kinds if kinds is None else kinds:
        if found := components(model, kind):
            weight = sum(family.dead_parameters(model, component) for component in found)
            apart = sum(family.parameters_apart(model, component) for component in found)
            sizes = (weight / len(found), weight, weight / total, apart, weight * itemsize)
            rows.append((kind, len(found), *sizes, *_freed(model, found, dense, tokens)))
    size, apart = sum(parameter.nbytes for parameter in model.parameters()), family.parameters_apart(model)
    rows.append(("model", 1, total, total, 1.0, apart, size, dense.cache_bytes, dense.flops / tokens))
    return pd.DataFrame(rows, columns=COLUMNS).set_index("kind")


def _freed(model: PreTrainedModel, gone: Sequence[Component], dense: Costs, tokens: int) -> tuple[int, float]:
    """Bytes of cache and FLOPs per token that go with all components of a kind.

    Of MLP channels and other parts some have to stay: what goes with the others is scaled to all of them.
    """
    family, kind, least, scale = family_of(model), gone[0].kind, 0, 1.0
    if kind in PARTS:
        channels, least = family.channels(model, kind), family.together(model, kind)
        scale = channels / (channels - least)
    left = costs_without(model, [(component, least) for component in gone], tokens)
    return round(scale * (dense.cache_bytes - left.cache_bytes)), scale * (dense.flops - left.flops) / tokens


def costs_without(model: PreTrainedModel, gone: Iterable[Component | tuple[Component, int]], tokens: int) -> Costs:
    """What a prompt of so many tokens, and a token after it, cost without components; `gone` as for `removed`."""
    outline = _outline(model)
    prune(outline, gone)
    return _costs(outline, tokens)


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
    return family_of(model).parameters_removed(model, cuts(gone))


def ratio(model: PreTrainedModel, gone: Iterable[Component | tuple[Component, int]]) -> float:
    """The pruning ratio of the paper's tables, from 0 to 1; `gone` as for `removed`."""
    gone = cuts(gone)
    dense = family_of(model).parameters_in_ratio(model, [component for component, _ in gone])
    return parameters_removed(model, gone) / dense
