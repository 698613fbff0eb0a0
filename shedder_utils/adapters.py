"""LoRA adapters through peft, on the projections where their effect is in every forward path.

peft refuses out_proj in models of the Mamba types, because fused kernels bypass it there; while adapters train here,
those kernels do not run (`kernels/fused.py`), and elsewhere the mixers call their projections as modules. What is read
by its weight alone, such as dt_proj, is never a target. Adapters that stay apart are saved by `model.save_pretrained`
in peft's own format, with the name of the model they belong to, and read back by `load_model`.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .errors import ModelError
from .families import family_of
from .recipe import Recipe

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "default"
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before each tensor's name in a file."""


def attach(model: PreTrainedModel, recipe: Recipe) -> None:
    """Give a model new adapters, which do nothing yet, and freeze all else, in place.

    Raises ModelError if the model has no projection of a role, or one of them shares its weight with another.
    """
    from peft import LoraConfig

    names = _targets(model, recipe.targets or ())
    _check_private(model, names)
    size: dict[str, Any] = {"r": recipe.rank, "lora_alpha": recipe.alpha}
    base = model.config._name_or_path
    config = LoraConfig(target_modules=names, task_type="CAUSAL_LM", base_model_name_or_path=base, **size)
    _inject(model, config)


def has_adapters(model: PreTrainedModel) -> bool:
    """Whether a model has adapters that are not merged."""
    return bool(model._hf_peft_config_loaded)


def merge(model: PreTrainedModel) -> None:
    """Add each adapter to the weight it belongs to, in place, and leave an ordinary model."""
    from peft.tuners.lora import LoraLayer

    for name, layer in [pair for pair in model.named_modules() if isinstance(pair[1], LoraLayer)]:
        layer.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.get_base_layer())
    for holder in (model, family_of(model).layers(model)):
        vars(holder).pop("peft_config", None)
    model._hf_peft_config_loaded = False
    model.requires_grad_(True)


def base_of(folder: str) -> str | None:
    """The model that the adapters in a folder belong to; None for a folder without adapters, or none at all.

    Raises ModelError for adapters that do not say so.
    """
    from peft import PeftConfig

    if not Path(folder, SETTINGS).is_file():
        return None
    try:
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"adapters {folder}: {SETTINGS} cannot be read ({error})") from error
    if not base:
        raise ModelError(f"adapters {folder}: {SETTINGS} does not name the model they belong to")
    return str(base)


def load(model: PreTrainedModel, folder: str) -> None:
    """Give a model the adapters that `save_pretrained` wrote to a folder, in place.

    Raises ModelError if they cannot be read, or do not fit the model tensor by tensor.
    """
    from peft import LoraConfig

    try:
        config, found = LoraConfig.from_pretrained(folder), load_file(Path(folder, WEIGHTS))
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ModelError(f"adapters {folder}: cannot be read ({error})") from error
    _inject(model, config)
    tensors = {_in_model(key): tensor for key, tensor in found.items()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if ".lora_" in name}
    found_shapes = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted(name for name in {*shapes, *tensors} if shapes.get(name) != found_shapes.get(name))
    if wrong:
        raise ModelError(
            f"adapters {folder}: {len(wrong)} tensors are missing, left over or misshapen, such as {wrong[0]}: "
            f"expected those of {model.config._name_or_path}"
        )
    model.load_state_dict(tensors, strict=False)
    model.requires_grad_(False).eval()


def _targets(model: PreTrainedModel, roles: tuple[str, ...]) -> list[str]:
    """The names of a model's linear modules of some roles."""
    projections = family_of(model).projections
    absent = [role for role in roles if role not in projections]
    if absent:
        raise ModelError(
            f"LoRA: a {model.config.model_type} model has no projections of role {absent[0]!r}: expected some of "
            f"{', '.join(projections)}"
        )
    return [name for role in roles for name in projections[role]]


def _check_private(model: PreTrainedModel, names: list[str]) -> None:
    """Refuse a target whose weight serves several modules: their adapters could not be merged into it."""
    weights = {
        name: id(module.weight)
        for name, module in family_of(model).layers(model).named_modules()
        if name.rpartition(".")[2] in names
    }
    counts = Counter(weights.values())
    shared = [name for name, weight in weights.items() if counts[weight] > 1]
    if shared:
        raise ModelError(
            f"LoRA: layers.{shared[0]} shares its weight with {counts[weights[shared[0]]] - 1} other layers, so no "
            "adapter of its own could be merged: leave out 'mlp', or tune with method='full'"
        )


def _inject(model: PreTrainedModel, config: LoraConfig) -> None:
    """Put adapters into the layers, in float32 whatever the model is in, and tell transformers of them.

    Into the layers and not the model, whose type is all that peft's refusal looks at.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, family_of(model).layers(model), NAME)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    marked: Any = model
    marked._hf_peft_config_loaded, marked.peft_config = True, {NAME: config}


def _in_model(key: str) -> str:
    """The name in the model of a tensor in a file."""
    layer, lora, rest = key.removeprefix(PREFIX).partition(".lora_")
    kind, _, last = rest.partition(".")
    return f"{layer}{lora}{kind}.{NAME}.{last}"
