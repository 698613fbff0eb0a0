"""Loading models: by pocket name, by folder or by Hub id, strictly, without running any code that comes with them."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import kernels
from .errors import ModelError
from .families import FAMILIES
from .pocket.prose import POCKET


def load_model(
    ref: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    tokenizer: str | Path | bool | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The model and tokenizer behind a reference, in evaluation mode, with this package's scans where they apply.

    ref: a pocket name ("pocket-mamba2"), a folder in Hugging Face format, or a Hub id. dtype: None takes float32 on a
    CPU, else the checkpoint's own. tokenizer: None takes the one beside the weights, a reference takes that one, False
    loads none (the second result is then None). Weights must be safetensors.

    Raises ModelError if the reference cannot be found or read, its architecture is not covered, or a tensor is missing,
    left over or misshapen.
    """
    kernels.install()
    folder = _resolve(ref)
    config = _config(folder, revision)
    if dtype is None:
        dtype = torch.float32 if torch.device(device).type == "cpu" else config.dtype or torch.float32
    model = _weights(folder, config, dtype, revision).to(device).eval()
    model.config._name_or_path = str(ref)
    return model, _tokenizer(folder, tokenizer, revision)


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 of a model's type and of all its tensors: names, shapes, types and values."""
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def identity(model: PreTrainedModel) -> dict[str, Any]:
    """What a plan keeps of the model it was made for."""
    return {
        "ref": model.config._name_or_path,
        "type": model.config.model_type,
        "layers": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model),
    }


def _resolve(ref: str | Path) -> str:
    """A folder for pocket names and paths; anything else is left to the Hub."""
    shipped = POCKET / "models" / str(ref)
    if str(ref).startswith("pocket-"):
        if not shipped.is_dir():
            there = sorted(folder.name for folder in (POCKET / "models").glob("*"))
            raise ModelError(
                f"pocket model {ref!r} does not exist in {POCKET / 'models'}: expected one of {', '.join(there)}"
            )
        return str(shipped)
    return str(ref)


def _config(folder: str, revision: str | None) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model {folder}: no usable configuration ({_first_line(error)}): check the name or path"
        ) from error
    if config.model_type not in FAMILIES:
        covered = ", ".join(FAMILIES)
        raise ModelError(
            f"model {folder} is of type {config.model_type!r}, which is not covered: expected one of {covered}"
        )
    return config


def _weights(folder: str, config: PretrainedConfig, dtype: torch.dtype, revision: str | None) -> PreTrainedModel:
    reports = logging.getLogger("transformers.modeling_utils")
    level = reports.level
    reports.setLevel(logging.ERROR)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, revision=revision, use_safetensors=True, trust_remote_code=False,
            output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"model {folder}: weights cannot be read ({_first_line(error)}): expected whole safetensors"
        ) from error
    finally:
        reports.setLevel(level)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        found = sorted(str(key) for key in info[problem])
        if found:
            what = problem.replace("_", " ").replace("keys", "tensors")
            raise ModelError(
                f"model {folder}: {len(found)} {what}, such as {found[0]}: expected a whole checkpoint of this shape"
            )
    return model


def _tokenizer(folder: str, wanted: str | Path | bool | None, revision: str | None) -> PreTrainedTokenizerBase | None:
    if wanted is False:
        return None
    beside = wanted is None or wanted is True
    try:
        return AutoTokenizer.from_pretrained(folder if beside else str(wanted), revision=revision if beside else None)
    except (OSError, ValueError) as error:
        raise ModelError(f"tokenizer of {folder}: cannot be read ({_first_line(error)}): pass tokenizer=") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")[:160]
