"""The architectures: one module each. `family_of(model)` is the way in."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ..errors import ModelError
from .base import ChannelWeights, Family, Stream, Substitution
from .hymba import Hymba
from .mamba import Mamba
from .mamba2 import Mamba2
from .zamba2 import Zamba2

__all__ = ["FAMILIES", "ChannelWeights", "Family", "Stream", "Substitution", "family_of", "random_model"]

FAMILIES: dict[str, Family] = {
    model_type: family for family in (Mamba(), Mamba2(), Zamba2(), Hymba()) for model_type in family.models
}
"""The family of each transformers model type."""


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model. Raises ModelError for an architecture that none covers."""
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ModelError(f"model type {model_type!r} is not covered: expected one of {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def random_model(*, family: str, layers: int, hidden_size: int, seed: int, vocab_size: int) -> PreTrainedModel:
    """An untrained model of a transformers model type, in evaluation mode: the same for the same seed.

    Raises ModelError for an architecture that none of the families covers.
    """
    if family not in FAMILIES:
        raise ModelError(f"model type {family!r} is not covered: expected one of {', '.join(FAMILIES)}")
    shape = {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "vocab_size": vocab_size,
        "tie_word_embeddings": True,
    }
    own = _SHAPES[family](layers, hidden_size) if family in _SHAPES else {}
    config: PretrainedConfig = AutoConfig.for_model(
        family, **shape, **own, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
    FAMILIES[family].prepare(model)
    return model


def _mamba2_shape(layers: int, hidden_size: int) -> dict[str, Any]:
    return {"num_heads": 2 * hidden_size // 16, "head_dim": 16, "n_groups": 1, "state_size": 16}


def _zamba2_shape(layers: int, hidden_size: int) -> dict[str, Any]:
    """Three hybrid layers, spread evenly, which two Transformer blocks serve in turn."""
    hybrid = {layers * part // 4 for part in (1, 2, 3)}
    return {
        "layers_block_type": ["hybrid" if index in hybrid else "linear_attention" for index in range(layers)],
        "n_mamba_heads": 2 * hidden_size // 16,
        "mamba_d_state": 16,
        "num_attention_heads": max(1, hidden_size // 16),
        "num_mem_blocks": 2,
        "adapter_rank": 8,
    }


def _hymba_shape(layers: int, hidden_size: int) -> dict[str, Any]:
    """First, middle and last layer global, the others in groups that share keys and values, as in the 1.5B."""
    return {
        "num_attention_heads": 2 * max(1, hidden_size // 32),
        "num_key_value_heads": max(1, hidden_size // 32),
        "intermediate_size": 2 * hidden_size,
        "num_memory_tokens": 8,
        "sliding_window": 16,
    }


_SHAPES = {"mamba2": _mamba2_shape, "zamba2": _zamba2_shape, "hymba": _hymba_shape}
"""What a random model's configuration has beside the common part, from its layers and width."""
