"""Surgery: models that no longer have what a plan removes, and folders to keep them in (section 3.2 of the paper).

`removed()` computes without components and still carries them; `extract()` takes them out. Layers that do nothing are
gone, the others and their cache entries numbered anew, and what an absent SSM, branch or channel leaves without a
reader is cut off. The logits stay the same.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from . import adapters, hub
from .components import Component, Cut
from .errors import ModelError, PlanError
from .evaluation import Score
from .families import family_of
from .families.mamba_like import MixerWithoutSSM
from .files import write_atomically
from .loading import PRUNED_TYPE, local_folder
from .model_card import model_card
from .model_tokenizer import copy_tokenizer
from .plan import Plan
from .removal import is_masked, prune, removed, settle


def extract(model: PreTrainedModel, plan: Plan, *, inplace: bool = False) -> PreTrainedModel:
    """A smaller model without what a plan removes: the logits of `removed(model, plan.gone)`, fewer parameters.

    plan: made for this model or for one of its type and shape. inplace: take the components from `model` itself, for
    models that fill the memory; else `model` stays as it is and only what is left of it is copied.
    Returns an ordinary transformers model of the same class; `config.pruned` says what went. Keep it with
    `save_pruned`: where tensors are narrower than its class would have them, only `load_model` reads it back.
    Raises PlanError for a plan that does not fit the model, and ModelError for a model that is pruned or masked.
    """
    check_dense(model, "extract")
    _check_fits(model, plan)
    gone = plan.gone
    if inplace:
        prune(model, gone)
        pruned = model
    else:
        with removed(model, gone):
            pruned = copy.deepcopy(model)
        vars(pruned).pop("tie_weights", None)  # which `removed` has put aside
        settle(pruned, gone, model.num_parameters())
    config: Any = pruned.config
    config.pruned["plan"] = plan.model_dump(mode="json")
    return pruned


def save_pruned(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    portable: bool = False,
    scores: Mapping[tuple[str, str], Score] | None = None,
) -> None:
    """Write a model that `extract` returned: safetensors, what it lacks in config.json, a model card, its tokenizer.

    `load_model` reads it back, with equal logits. Where only whole Mamba blocks went, stock transformers reads it too;
    with `portable` it does so for a model without SSMs as well, which is then stored at dense size with scans that
    return their input (B = 0, D = 1). Of anything else it says that it does not know the model type.
    The model card has the plan's removals and scores; scores: those of `evaluate` on this model, for the card.
    The tokenizer is copied if the model came from a folder or a Hub id that has one.
    Raises ModelError for a model that is not pruned, or only masked, and for a folder that `check_target` refuses;
    PlanError if it cannot be portable.
    """
    record = getattr(model.config, "pruned", None)
    if record is None or is_masked(model):
        raise ModelError("save_pruned: this model is not pruned for good: extract() it first, or use save_pretrained()")
    if adapters.has_adapters(model):
        raise ModelError("save_pruned: this model has LoRA adapters: merge them, or save_pretrained() them alone")
    gone = [Cut.parse(cut).component for cut in record["removed"]]
    stock = [family_of(model).stock_without(model, component) for component in gone]
    if portable:
        _check_portable(model, [component for component, is_stock in zip(gone, stock, strict=True) if not is_stock])
    folder, base = Path(folder), model.config._name_or_path
    check_target(folder, base)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, state_dict=_with_idle_scans(model) if portable else None)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"save_pruned: {folder} cannot be written ({error}): choose another folder") from error
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if portable:
        settings["pruned"]["portable"] = True
    elif not all(stock):
        settings["model_type"] = PRUNED_TYPE + settings["model_type"]
    write_atomically(folder / "config.json", json.dumps(settings, indent=2, sort_keys=True) + "\n")
    write_atomically(folder / "README.md", model_card(model, in_stock=portable or all(stock), scores=scores))
    if source := local_folder(base) or hub.cached(base, getattr(model.config, "_commit_hash", None)):
        copy_tokenizer(source, folder)


def check_target(folder: Path, base: str) -> None:
    """Refuse a folder for a model made from `base` that holds `base` itself, or what would hide the new model.

    Raises ModelError.
    """
    source = local_folder(base)
    if source is not None and source.resolve() == folder.resolve():
        raise ModelError(f"folder {folder} holds the model that the new one is made from: choose another")
    if (folder / adapters.SETTINGS).exists():
        raise ModelError(
            f"folder {folder} holds LoRA adapters, which load_model would look for first: choose another, or delete "
            f"{adapters.SETTINGS} there"
        )


def check_dense(model: PreTrainedModel, what: str) -> None:
    """Refuse a model that is pruned or masked; what: needs a dense one, such as "extract". Raises ModelError."""
    if hasattr(model.config, "pruned"):
        raise ModelError(f"{what}: this model is pruned already: make one plan, and extract it from the dense model")
    if is_masked(model):
        raise ModelError(f"{what}: this model is masked right now: leave the block of removed() first")


def _check_fits(model: PreTrainedModel, plan: Plan) -> None:
    if not isinstance(plan, Plan):
        raise PlanError(f"extract: a {type(plan).__name__} is not a plan: expected one of search() or Plan.load()")
    found = {
        "type": model.config.model_type,
        "layers": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
    }
    for name, value in found.items():
        if plan.model.get(name, value) != value:
            raise PlanError(
                f"the plan is for a model with {name} {plan.model[name]}, this one has {value}: "
                f"load {plan.model.get('ref') or 'the model of the plan'}"
            )
    ordered, wanted = getattr(model.config, "ordered_parts", []), plan.model.get("ordered", [])
    if plan.model and ordered != wanted:
        raise PlanError(
            f"the plan is for a model with {' and '.join(wanted) or 'nothing'} ordered, this one has "
            f"{' and '.join(ordered) or 'nothing'}: order_channels(model, kind) before extract() as before search()"
        )


def _check_portable(model: PreTrainedModel, own: Iterable[Component]) -> None:
    """Refuse a model that lacks more than its SSMs; own: what stock transformers has no class for."""
    other = [str(component) for component in own if component.kind != "ssm"]
    if other or model.config.model_type == "hymba":
        raise PlanError(
            f"save_pruned: a {model.config.model_type} model without {', '.join(other) or 'SSMs'} cannot be portable: "
            "stock transformers covers Mamba blocks that are layers of their own, and SSMs; leave out portable=True"
        )


def _with_idle_scans(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of the model at dense size, its missing scans filled in as ones that return their input."""
    tensors: dict[str, Tensor] = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, MixerWithoutSSM):
            dense = module.with_idle_scan(model.config)
            tensors |= {f"{name}.{part}": tensor for part, tensor in dense.items()}
    return tensors
