"""Shapes: models without weights, and what a pass through their layers costs, so that work can be priced beforehand.

L tokens, D model width, E inner width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .errors import ProfileError
from .families import family_of, native, random_model
from .loading import local_folder
from .pocket.tokenizer import load_tokenizer
from .profiles import ProfileModel
from .recipe import Recipe

MULTIPLIED = (nn.Linear, nn.Conv1d)


def without_weights(settings: ProfileModel) -> PreTrainedModel:
    """A profile's model on the meta device: its modules and shapes, no numbers, nothing downloaded.

    Raises ProfileError for a model of the Hub whose shape the profile does not give.
    """
    if settings.random is not None:
        return random_model(**settings.random.model_dump(), vocab_size=len(load_tokenizer())).to("meta")
    config = _configuration(settings)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model.eval()


def _configuration(settings: ProfileModel) -> PretrainedConfig:
    folder: Path | None = local_folder(settings.ref or "")
    if folder is not None:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if settings.shape is None:
        raise ProfileError(f"model {settings.ref}: expected its 'shape' in the profile, as its config.json has it")
    if native.is_native(settings.shape):
        return native.configuration(settings.shape, f"shape of {settings.ref}")
    shape = dict(settings.shape)
    return CONFIG_MAPPING[shape.pop("model_type")].from_dict(shape)


def trained_parameters(model: PreTrainedModel, recipe: Recipe) -> int:
    """How many parameters a tuning trains: all, or the adapters', for which shapes are enough."""
    if recipe.method == "full":
        return int(model.num_parameters())
    family, rank = family_of(model), recipe.rank or 0
    names = {name for role in recipe.targets or () for name in family.projections[role]}
    targets = [m for name, m in family.layers(model).named_modules() if name.rpartition(".")[2] in names]
    return sum(rank * (module.in_features + module.out_features) for module in targets)


@dataclass(frozen=True)
class Work:
    """What one token costs: multiplications and additions of each layer and of the head, and tensors moved.

    layers: one number for each layer; traffic: numbers read and written between the kernels of one layer, about.
    """

    layers: tuple[float, ...]
    head: float
    traffic: float

    @property
    def whole(self) -> float:
        """A pass through the whole model."""
        return sum(self.layers) + self.head


def work_per_token(model: PreTrainedModel, length: int) -> Work:
    """The work for each token of a sequence of `length`: two operations for each weight, and scans and attention.

    Counted from modules and shapes alone, so the model may be on the meta device. An adapter of a shared Transformer
    block counts at each of the block's positions, which is a few per cent too much for Zamba2.
    """
    layers = tuple(_layer_flops(model, layer, length) / length for layer in family_of(model).layers(model))
    head: Any = model.get_output_embeddings()
    return Work(layers, 2.0 * head.weight.numel(), 24.0 * model.config.hidden_size)


def _layer_flops(model: PreTrainedModel, layer: nn.Module, length: int) -> float:
    family = family_of(model)
    weights = sum(m.weight.numel() for m in layer.modules() if isinstance(m, MULTIPLIED))
    return 2.0 * length * weights + sum(family.flops_beside_weights(module, length) for module in layer.modules())
