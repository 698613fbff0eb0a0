"""Untying Zamba2's shared Transformer blocks: a private copy for each hybrid position, with its adapter merged.

The blocks serve the positions in turn; a position differs from the others of its block only by low-rank adapters on
the MLP's gate and up projections (and, in some models, on queries, keys and values). Merged: W + B A.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import skip_init
from transformers import PretrainedConfig, PreTrainedModel


def untie(model: PreTrainedModel, positions: Iterable[int] | None = None) -> None:
    """Give hybrid positions their own Transformer block, in place; the logits stay, to rounding.

    positions: those to untie, all if None; the others go on sharing. With all of them untied, the configuration says
    so, and the saved model loads in stock transformers.
    """
    hybrid = [model.model.layers[index] for index in model.config.hybrid_layer_ids]
    for position in range(len(hybrid)) if positions is None else positions:
        own = _private_copy(hybrid[position].shared_transformer, position, model.config)
        hybrid[position].shared_transformer = own
        for layer in hybrid:  # nobody reads this position's adapter in the blocks that are still shared
            for _, adapters in adapted(layer.shared_transformer):
                if layer.shared_transformer is not own:
                    adapters[position] = nn.Identity()
    renew_ties(model)
    left = [adapters for layer in hybrid for _, adapters in adapted(layer.shared_transformer)]
    if not any(parameter.numel() for adapters in left for parameter in adapters.parameters()):
        model.config.num_mem_blocks, model.config.adapter_rank = len(hybrid), 0


def adapted(block: Any) -> Iterator[tuple[nn.Linear, Any]]:
    """The linear layers of a shared block that have adapters, each with its adapters by position."""
    yield block.feed_forward.gate_up_proj, block.feed_forward.gate_up_proj_adapter_list
    attention = block.self_attn
    if attention.config.use_shared_attention_adapter:
        for name in "qkv":
            yield getattr(attention, f"{name}_proj"), getattr(attention, f"linear_{name}_adapter_list")


@torch.no_grad()
def _private_copy(block: nn.Module, position: int, config: PretrainedConfig) -> nn.Module:
    block = copy.deepcopy(block, {id(config): config})
    for linear, adapters in adapted(block):
        first, second = adapters[position]
        linear.weight.add_(second.weight.float() @ first.weight.float())
        for index in range(len(adapters)):
            adapters[index] = _no_adapter(linear) if index == position else nn.Identity()
    return block


def _no_adapter(linear: nn.Linear) -> nn.Sequential:
    """An adapter of rank 0: what stock transformers builds, and adds as zeros, for adapter_rank 0."""
    kind = {"bias": False, "device": linear.weight.device, "dtype": linear.weight.dtype}
    with warnings.catch_warnings():  # torch finds it odd to initialise nothing
        warnings.simplefilter("ignore", UserWarning)
        return nn.Sequential(
            skip_init(nn.Linear, linear.in_features, 0, **kind), skip_init(nn.Linear, 0, linear.out_features, **kind)
        )


def renew_ties(model: PreTrainedModel) -> None:
    """Say to transformers what is tied now, else its next tie_weights() would tie the private copies again."""
    sources: dict[int, str] = {}
    named = model.model.named_parameters(remove_duplicate=False)
    ties = {name: source for name, tensor in named if (source := sources.setdefault(id(tensor), name)) != name}
    model.model._tied_weights_keys = ties
    model.model.all_tied_weights_keys = model.model.get_expanded_tied_weights_keys(all_submodels=True)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
