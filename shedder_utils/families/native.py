"""Native checkpoints: what mamba_ssm writes, and what the paper's authors released in that format.

The state-spaces models that the paper prunes come as mamba_ssm saves them: a config.json without a model type, and
tensors that are named as in transformers, but for the embedding. The vocabulary is padded to a multiple.

The released pruned checkpoints keep the config.json of the dense model, and lack tensors: all those of a layer where
its Mamba block was removed, D and dt_bias of a Mamba-2 layer where its SSM was. Loaded, they are models without those
components: fewer layers, numbered anew, and mixers without a scan, as `removal.prune` makes them.
"""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from ..components import Component
from ..errors import ModelError
from . import family_of

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
EMBEDDING, HEAD = "backbone.embeddings.weight", "lm_head.weight"
WITHOUT_SSM = {"mixer.D", "mixer.dt_bias"}
"""What a released checkpoint lacks in a Mamba-2 layer without its SSM."""


@dataclass(frozen=True)
class Layout:
    """Settings of mamba_ssm, by name: where they go in transformers, and what they are when absent.

    names: the setting of transformers; defaults: of mamba_ssm; fixed: the one value that transformers' classes cover;
    unread: what bears on training or on kernels only.
    """

    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    fixed: Mapping[str, Any]
    unread: Collection[str]

    def translated(self, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The settings under transformers' names. Raises ModelError for one that is unknown or not covered."""
        for name, value in settings.items():
            if name in self.fixed and value != self.fixed[name]:
                raise ModelError(f"{where}: {name} {value!r} is not covered: expected {self.fixed[name]!r}")
            if name not in self.names and name not in self.fixed and name not in self.unread:
                raise ModelError(f"{where}: setting {name!r} is unknown: expected {', '.join(sorted(self.names))}")
        return {new: settings.get(name, self.defaults[name]) for name, new in self.names.items()}


MODEL = Layout(
    names={
        "d_model": "hidden_size", "n_layer": "num_hidden_layers", "vocab_size": "vocab_size", "ssm_cfg": "ssm_cfg",
        "residual_in_fp32": "residual_in_fp32", "pad_vocab_size_multiple": "pad",
        "tie_embeddings": "tie_word_embeddings",
    },
    defaults={
        "d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "residual_in_fp32": True,
        "pad_vocab_size_multiple": 8, "tie_embeddings": True,
    },
    fixed={"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True},
    unread=("attn_cfg", "fused_add_norm"),
)  # fmt: skip
MIXERS = {
    "Mamba1": Layout(
        names={
            "d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_rank": "time_step_rank",
            "conv_bias": "use_conv_bias", "bias": "use_bias",
        },
        defaults={"d_state": 16, "d_conv": 4, "expand": 2, "dt_rank": "auto", "conv_bias": True, "bias": False},
        fixed={},
        unread=("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"),
    ),
    "Mamba2": Layout(
        names={
            "d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "headdim": "head_dim",
            "ngroups": "n_groups", "dt_limit": "time_step_limit", "chunk_size": "chunk_size",
            "conv_bias": "use_conv_bias", "bias": "use_bias",
        },
        defaults={
            "d_state": 128, "d_conv": 4, "expand": 2, "headdim": 64, "ngroups": 1, "dt_limit": (0.0, float("inf")),
            "chunk_size": 256, "conv_bias": True, "bias": False,
        },
        fixed={"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False},
        unread=("conv_init", "A_init_range", "dt_min", "dt_max", "dt_init_floor", "use_mem_eff_path"),
    ),
}  # fmt: skip


def is_native(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json is one of mamba_ssm."""
    return "model_type" not in settings and {"d_model", "n_layer"} <= settings.keys()


def configuration(settings: Mapping[str, Any], where: str) -> PretrainedConfig:
    """The transformers configuration of a native config.json.

    where: what errors call it. Raises ModelError for settings that are unknown, malformed, or not covered by
    transformers' classes (attention layers, MLPs, LayerNorm).
    """
    shape = MODEL.translated({name: value for name, value in settings.items() if not name.startswith("_")}, where)
    pad, mixer = shape.pop("pad"), dict(shape.pop("ssm_cfg"))
    kind = mixer.pop("layer", "Mamba1")
    if kind not in MIXERS:
        raise ModelError(f"{where}: ssm_cfg layer {kind!r} is not covered: expected one of {', '.join(MIXERS)}")
    shape |= MIXERS[kind].translated(mixer, f"{where}: ssm_cfg")
    shape |= {"layer_norm_epsilon": 1e-5, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    try:
        shape["vocab_size"] = -(-shape["vocab_size"] // pad) * pad
        if kind == "Mamba1":
            return MambaConfig(**shape)
        return Mamba2Config(**shape, num_heads=shape["expand"] * shape["hidden_size"] // shape["head_dim"])
    except (ArithmeticError, StrictDataclassError, TypeError, ValueError) as error:
        raise ModelError(f"{where}: not a usable configuration ({' '.join(str(error).split())[:200]})") from error


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of transformers for a configuration that `configuration` made."""
    return MambaForCausalLM if isinstance(config, MambaConfig) else Mamba2ForCausalLM


def tensors(folder: str, config: PretrainedConfig) -> dict[str, Tensor]:
    """The tensors of a native checkpoint under transformers' names, as stored, on the CPU.

    Safetensors are preferred; a .bin is read without running anything in it.
    Raises ModelError if there are none, if there is more than tensors in them, or if the head differs from the
    embedding that it is tied to.
    """
    found = {name.replace("backbone.embedding.", "backbone.embeddings."): tensor
             for name, tensor in _read(folder).items()}  # fmt: skip
    if config.tie_word_embeddings and HEAD in found:
        head = found.pop(HEAD)
        if not torch.equal(found.setdefault(EMBEDDING, head), head):
            raise ModelError(f"model {folder}: {HEAD} differs from the embedding, and config.json ties them")
    return found


def missing_components(model: PreTrainedModel, missing: Iterable[str]) -> tuple[list[Component], list[str]]:
    """What the missing tensors of a released checkpoint say was removed, and those that say nothing.

    Returns the components in depth order, and the names of tensors that should have been there. A checkpoint without
    any layer is not a pruned one.
    """
    by_layer, rest = defaultdict(set), []
    for name in missing:
        inside = re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)", name)
        if inside:
            by_layer[int(inside[1])].add(inside[2])
        else:
            rest.append(name)
    layers, gone = family_of(model).layers(model), []
    blocks = [
        index for index, names in by_layer.items() if names == {name for name, _ in layers[index].named_parameters()}
    ]
    for index, names in by_layer.items():
        if index in blocks and len(blocks) < len(layers):
            gone.append(Component("mamba_block", index))
        elif names == WITHOUT_SSM:
            gone.append(Component("ssm", index))
        else:
            rest += [f"backbone.layers.{index}.{name}" for name in names]
    gone.sort(key=lambda component: component.index)
    return gone, rest


def _read(folder: str) -> dict[str, Tensor]:
    path = next((str(path) for name in WEIGHTS if (path := Path(folder, name)).is_file()), None)
    if path is None:
        raise ModelError(f"model {folder}: no weights: expected {' or '.join(WEIGHTS)} beside config.json")
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"model {folder}: {path} is damaged or holds more than tensors, which is not run: "
            "expected safetensors, or a .bin with tensors only"
        ) from error
    if not (isinstance(found, dict) and all(isinstance(tensor, Tensor) for tensor in found.values())):
        raise ModelError(f"model {folder}: {path} holds no tensors by name: expected a state dictionary")
    return found
