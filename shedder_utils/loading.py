"""Loading models: by pocket name, by folder or by Hub id, strictly, without running any code that comes with them.

Checkpoints of transformers are read by its own classes; those of mamba_ssm, and the pruned ones that the paper's
authors released, by `families/native.py`. A configuration with an entry `pruned` is that of a model pruned here (see
`surgery.save_pruned`), which is built as the dense one, pruned without any tensors yet, and then filled. Whatever the
format, the result is a transformers model.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.logging import set_tqdm_hook

from . import adapters, hub, kernels
from .components import Component, Cut
from .devices import device_error
from .errors import ModelError, PlanError
from .families import FAMILIES, family_of, native
from .model_tokenizer import tokenizer_for
from .pocket.prose import POCKET
from .removal import prune

BAR_AFTER_S = 5
"""How many seconds a model fills before a progress bar shows."""
PRUNED_TYPE = "pruned_"
"""Before the model type in the configuration of a pruned model that stock transformers has no class for."""


def load_model(
    ref: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["auto"] | None = None,
    revision: str | None = None,
    tokenizer: str | Path | bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model and tokenizer behind a reference, in evaluation mode, with this package's scans where they apply.

    ref: a pocket name ("pocket-mamba2"), a folder in the format of transformers, of mamba_ssm or of `save_pruned`, or
    a Hub id of one of these; or a folder of LoRA adapters (`recover`), which names the model that they belong to.
    dtype: "auto" takes the checkpoint's own, None that too, but float32 on a CPU. tokenizer: None takes the one beside
    the weights, else the one of the published models of this type; a reference takes that one; False loads none (the
    second result is then None). Weights must be safetensors, or with mamba_ssm's config.json a .bin of tensors only.
    revision: of a Hub id; the commit that it stood for is in `config._commit_hash`.

    A checkpoint that the paper's authors released is the pruned model: see `families/native.py`.
    Raises ModelError if the reference cannot be found or read, its architecture is not covered, or a tensor is missing,
    left over or misshapen; and before anything is fetched, if the device is neither a CPU nor CUDA's or torch cannot
    compute on it.
    """
    kernels.install()
    if error := device_error(device):
        raise ModelError(
            f"model {ref}: torch cannot compute on device {str(device)!r} ({error}): choose another, or see what "
            "python -m shedder_utils doctor says with a --profile for GPUs"
        )
    if torch.device(device).type not in ("cpu", "cuda"):
        raise ModelError(f"model {ref}: device {str(device)!r} is not covered: expected cpu or cuda")
    fetched = hub.fetch(_resolve(ref), revision)
    folder = str(fetched.folder) if fetched else _resolve(ref)
    if (base := adapters.base_of(folder)) is not None:
        model, found = load_model(base, device=device, dtype=dtype, tokenizer=tokenizer)
        adapters.load(model, folder)
        return model, found
    settings = _settings(folder)
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    elif dtype == "auto":
        dtype = None
    if native.is_native(settings):
        model = _native(folder, settings, dtype)
    elif "pruned" in settings:
        model = _pruned(folder, settings, dtype)
    else:
        model = _transformers(folder, dtype)
    model = model.to(device).eval()
    family_of(model).prepare(model)
    model.config._name_or_path, model.config._commit_hash = str(ref), fetched.commit if fetched else None
    return model, tokenizer_for(folder, model.config, tokenizer)


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 of a model's type and of all its tensors: names, shapes, types and values."""
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """What a plan keeps of the model it was made for; "ordered" only where parts were (`channels.order_channels`),
    "all_blocks_removable" only where that is set (Hymba)."""
    ordered, all_blocks = (getattr(model.config, name, None) for name in ("ordered_parts", "all_blocks_removable"))
    return {
        "ref": model.config._name_or_path,
        "type": model.config.model_type,
        "layers": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model),
        **({"ordered": ordered} if ordered else {}),
        **({"all_blocks_removable": True} if all_blocks else {}),
    }


def _resolve(ref: str | Path) -> str:
    """A folder for pocket names and paths; anything else is left to the Hub."""
    name = str(ref)
    shipped = POCKET / "models" / name
    if name.startswith("pocket-") and shipped.is_dir():
        return str(shipped)
    if name.startswith("pocket-") and "/" not in name and not Path(name).is_dir():
        there = sorted(folder.name for folder in (POCKET / "models").glob("*"))
        raise ModelError(
            f"pocket model {name!r} does not exist in {POCKET / 'models'}: expected one of {', '.join(there)}, "
            "or a folder of that name"
        )
    return name


def local_folder(ref: str | Path) -> Path | None:
    """The folder behind a reference; None where there is none, as for a Hub id."""
    folder = Path(_resolve(ref))
    return folder if str(ref) and folder.is_dir() else None


def _settings(folder: str) -> dict[str, Any]:
    """The content of config.json."""
    try:
        return PretrainedConfig.get_config_dict(folder)[0]
    except (OSError, ValueError) as error:
        raise _unusable(folder, error) from error


def _transformers(folder: str, dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a transformers checkpoint. dtype: None takes the checkpoint's own."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise _unusable(folder, error) from error
    _check_type(folder, config.model_type)
    return _from_safetensors(AutoModelForCausalLM, folder, config, dtype)


def _check_type(folder: str, model_type: str) -> None:
    if model_type not in FAMILIES:
        covered = ", ".join(FAMILIES)
        raise ModelError(f"model {folder} is of type {model_type!r}, which is not covered: expected one of {covered}")


def _from_safetensors(
    model_class: Any, folder: str, config: PretrainedConfig, dtype: torch.dtype | None
) -> PreTrainedModel:
    try:
        model, info = _filled(
            model_class.from_pretrained, folder, config=config, dtype=dtype or config.dtype or torch.float32,
            use_safetensors=True, trust_remote_code=False,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model {folder}: weights cannot be read ({_first_line(error)}): expected whole safetensors"
        ) from error
    _check_whole(folder, **info)
    return model


def _native(folder: str, settings: Mapping[str, Any], dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a mamba_ssm checkpoint, pruned if tensors say so. dtype: None takes that of the embedding."""
    config = native.configuration(settings, f"model {folder}")
    tensors = native.tensors(folder, config)
    if dtype is None:
        dtype = tensors[native.EMBEDDING].dtype if native.EMBEDDING in tensors else torch.float32
    model, info = _filled(
        native.model_class(config).from_pretrained, None, config=config, dtype=dtype, state_dict=tensors
    )
    gone, info["missing_keys"] = native.missing_components(model, info["missing_keys"])
    _check_whole(folder, **info)
    if gone:
        prune(model, gone)
    return model


def _pruned(folder: str, settings: Mapping[str, Any], dtype: torch.dtype | None) -> PreTrainedModel:
    """The model of a folder that `save_pruned` wrote."""
    record = settings["pruned"]
    try:
        gone, dense, _ = [Cut.parse(cut) for cut in record["removed"]], dict(record["dense"]), record["parameters"]
    except (KeyError, TypeError, ValueError, PlanError) as error:
        raise ModelError(f"model {folder}: config.json: 'pruned' is malformed ({error!r}): save it again") from error
    if record.get("portable"):
        model: Any = _transformers(folder, dtype)
        del model.config.pruned
        prune(model, _ssms_renumbered(gone))
    else:
        model_type = str(settings.get("model_type")).removeprefix(PRUNED_TYPE)
        _check_type(folder, model_type)
        plain = {name: value for name, value in settings.items() if name not in ("pruned", "model_type")}
        try:
            config: Any = CONFIG_MAPPING[model_type].from_dict(plain | dense)
        except (ValueError, TypeError, StrictDataclassError) as error:
            raise _unusable(folder, error) from error
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        model = _from_safetensors(_without(model_class, gone), folder, config, dtype)
        model.__class__ = model_class
    model.config.pruned = {name: value for name, value in record.items() if name != "portable"}
    return model


def _without(model_class: Any, gone: Collection[Cut]) -> Any:
    """A class whose models are built as `model_class`, and pruned before they are filled with tensors."""

    def build(self: Any, config: PretrainedConfig) -> None:
        model_class.__init__(self, config)
        for target, source in self.get_expanded_tied_weights_keys(all_submodels=True).items():
            parent, _, name = target.rpartition(".")
            setattr(self.get_submodule(parent), name, self.get_parameter(source))
        prune(self, gone)

    return type(model_class.__name__, (model_class,), {"__init__": build})


def _ssms_renumbered(gone: Collection[Cut]) -> list[Component]:
    """The SSMs among components, in the numbering of a model that already lacks the Mamba blocks among them."""
    blocks = [component.index for component, _ in gone if component.kind == "mamba_block"]
    ssms = [component.index for component, _ in gone if component.kind == "ssm"]
    return [Component("ssm", index - sum(block < index for block in blocks)) for index in ssms]


def _filled(
    from_pretrained: Callable[..., Any], source: str | None, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with what tensors there are, and what `from_pretrained` says of them, in place of its warnings.

    Its progress bar shows where the filling takes long, and leaves no line behind.
    """
    reports = logging.getLogger("transformers.modeling_utils")
    disabled, reports.disabled = reports.disabled, True
    before = set_tqdm_hook(lambda bar, given, named: bar(*given, **{**named, "delay": BAR_AFTER_S, "leave": False}))
    try:
        return from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    finally:
        set_tqdm_hook(before)
        reports.disabled = disabled


def _check_whole(
    folder: str,
    missing_keys: Collection[Any],
    unexpected_keys: Collection[Any],
    mismatched_keys: Collection[Any],
    **_: Any,
) -> None:
    """Raise ModelError unless every tensor was there, read and of the right shape."""
    problems = {"missing": missing_keys, "unexpected": unexpected_keys, "mismatched": mismatched_keys}
    for problem, keys in problems.items():
        found = sorted(map(_named, keys))
        if found:
            raise ModelError(
                f"model {folder}: {len(found)} {problem} tensors, such as {found[0]}: "
                "expected a whole checkpoint of this shape"
            )


def _named(key: str | tuple[str, Collection[int], Collection[int]]) -> str:
    """A tensor's name; for a mismatched one, with its shape in the checkpoint and in the model."""
    return key if isinstance(key, str) else f"{key[0]} with shape {tuple(key[1])} instead of {tuple(key[2])}"


def _unusable(folder: str, error: Exception) -> ModelError:
    return ModelError(f"model {folder}: no usable configuration ({_first_line(error)}): check the name or path")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".:")[:160]
