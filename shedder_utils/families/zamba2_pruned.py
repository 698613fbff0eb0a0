"""What pruning leaves of Zamba2's layers: stand-ins for what is gone, and the model without what does nothing.

    plain:   h <- h + mamba(norm(h))
    hybrid:  h <- h + mamba(norm(h + t)),  t = linear(T([h, e]))

B batch, L tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.models.zamba2 import modeling_zamba2

from .mamba2 import Mamba2MixerWithoutSSM
from .untying import renew_ties


class Zamba2MixerWithoutSSM(Mamba2MixerWithoutSSM):
    """Zamba2's mixer without its scan: Mamba-2's, with the functions of Zamba2's modeling file."""

    modeling = modeling_zamba2


class SkippedMamba(nn.Module):
    """Norm and mixer are gone: h in a plain layer, h + t in a hybrid one."""

    def forward(
        self, hidden_states: Tensor, *_: Any, transformer_hidden_states: Tensor | None = None, **__: Any
    ) -> Tensor:
        return hidden_states if transformer_hidden_states is None else hidden_states + transformer_hidden_states


class SkippedAttention(nn.Module):
    """The attention and its norm are gone: h, the first `width` features of [h, e], passes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.counts = width, True

    def forward(
        self, hidden_states: Tensor, layer_idx: int, past_key_values: Cache | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        if self.counts:
            _count_tokens(past_key_values, hidden_states, layer_idx)
        return hidden_states[..., : self.width], None


class SkippedMLP(nn.Module):
    """The MLP and its norm are gone: the attention's output passes."""

    def forward(self, hidden_states: Tensor, layer_idx: int | None = None) -> Tensor:
        return hidden_states


class SkippedTransformer(nn.Module):
    """The whole Transformer block is gone and adds nothing."""

    counts = True

    def forward(self, hidden_states: Tensor, layer_idx: int, past_key_values: Cache | None = None, **_: Any) -> None:
        if self.counts:
            _count_tokens(past_key_values, hidden_states, layer_idx)


def _count_tokens(cache: Cache | None, hidden: Tensor, layer_idx: int) -> None:
    """Store one number for each token in place of keys and values.

    transformers takes positions and masks from the length of the first attention's cache, be it this one. A model that
    is pruned for good needs that only where no attention is left, and then in one layer.
    """
    if cache is not None:
        blank = hidden.new_zeros(len(hidden), 1, hidden.shape[1], 1)
        cache.update(blank, blank, layer_idx)


def compact(model: PreTrainedModel) -> None:
    """Drop what does nothing, for good, and number the rest anew; shared parameters stay shared.

    A plain layer without its Mamba block goes, a hybrid one without its Transformer block becomes a plain one. The
    cache has keys and values only where there is attention; where none is left, one layer counts tokens.
    """
    layers, config = model.model.layers, model.config
    positions = {layers[index]: position for position, index in enumerate(config.hybrid_layer_ids)}
    with_keys = [layer for layer in positions if _attends(layer)] or list(positions)[:1]
    left = (_left_of(layer, layer in with_keys) for layer in layers)
    kept = [layer for layer in left if layer is not None]
    for index, layer in enumerate(kept):
        decoder: Any = decoder_of(layer)
        if not isinstance(decoder, SkippedMamba):
            decoder.layer_idx = decoder.mamba.layer_idx = index
    model.model.layers = nn.ModuleList(kept).train(model.training)
    config.num_hidden_layers = len(kept)
    config.layers_block_type = [_cache_type(layer, layer in with_keys) for layer in kept]
    config.hybrid_layer_ids = [index for index, layer in enumerate(kept) if layer in positions]
    model.model.layers_block_type = config.layers_block_type
    numbers = {index: positions[kept[index]] for index in config.hybrid_layer_ids}
    for part in ("self_attn", "feed_forward"):
        _number_adapters(model, numbers, part)
    renew_ties(model)


def decoder_of(layer: nn.Module) -> nn.Module:
    """Norm and mixer of a layer: the layer itself, or its part behind the Transformer block."""
    return getattr(layer, "mamba_decoder", layer)


def _attends(layer: nn.Module) -> bool:
    """Whether a hybrid layer has its attention."""
    return isinstance(getattr(layer.shared_transformer, "self_attn", None), modeling_zamba2.Zamba2Attention)


def _left_of(layer: nn.Module, counts: bool) -> nn.Module | None:
    """A layer without what does nothing in it; None if that is all. counts: it must count tokens if need be."""
    for module in layer.modules():
        if isinstance(module, SkippedAttention | SkippedTransformer):
            module.counts = counts
    if not counts and isinstance(getattr(layer, "shared_transformer", None), SkippedTransformer):
        layer = decoder_of(layer)
    return None if isinstance(layer, SkippedMamba) else layer


def _cache_type(layer: nn.Module, has_keys: bool) -> str:
    """transformers' name for what a layer keeps in the cache."""
    if not has_keys:
        return "linear_attention"
    return "full_attention" if isinstance(decoder_of(layer), SkippedMamba) else "hybrid"


def _number_adapters(model: PreTrainedModel, numbers: Mapping[int, int], part: str) -> None:
    """Tell a part of the Transformer blocks which layer has which position; drop adapters that no position reads.

    numbers: the hybrid position of each layer that has a Transformer block.
    """
    readers = {}
    for index, position in numbers.items():
        module = getattr(model.model.layers[index].shared_transformer, part, None)
        if hasattr(module, "layer_dic"):  # not what is skipped, nor a narrow MLP with its own adapter
            module.layer_dic = {index: position}
            readers[position] = module
    for module in readers.values():
        for adapters in module.children():
            if isinstance(adapters, nn.ModuleList):
                for unread in set(range(len(adapters))).difference(readers):
                    adapters[unread] = nn.Identity()
