"""The architectures: one module each. `family_of(model)` is the way in."""

from __future__ import annotations

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from ..errors import ModelError
from .base import Family, Stream, Substitution
from .mamba import Mamba
from .mamba2 import Mamba2

__all__ = ["FAMILIES", "Family", "Stream", "Substitution", "family_of", "random_model"]

FAMILIES: dict[str, Family] = {model_type: family for family in (Mamba(), Mamba2()) for model_type in family.models}
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
    heads = (
        {"num_heads": 2 * hidden_size // 16, "head_dim": 16, "n_groups": 1, "state_size": 16}
        if family == "mamba2"
        else {}
    )
    config: PretrainedConfig = AutoConfig.for_model(
        family, **shape, **heads, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config).eval()
