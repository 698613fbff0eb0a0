"""Native mamba_ssm checkpoints of random tensors, and what they compute: plain loops, nothing shared with the package.

E = expand * d_model inner width, N state size, R dt rank, H heads, P head width, G groups, V vocabulary.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

CONFIGS: dict[str, dict[str, Any]] = {
    "Mamba1": {"d_model": 24, "n_layer": 4, "vocab_size": 45, "ssm_cfg": {"d_state": 5}, "rms_norm": True,
               "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8},
    "Mamba2": {"d_model": 24, "n_layer": 4, "vocab_size": 45, "rms_norm": True, "residual_in_fp32": True,
               "ssm_cfg": {"layer": "Mamba2", "d_state": 6, "headdim": 8, "ngroups": 2, "chunk_size": 4},
               "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "fused_add_norm": True,
               "pad_vocab_size_multiple": 16, "tie_embeddings": True},
}  # fmt: skip
ROWS = {"Mamba1": 48, "Mamba2": 48}


def random_tensors(kind: str, *, tied: bool = True) -> dict[str, torch.Tensor]:
    """A state dictionary as mamba_ssm names it."""
    d, layers, ssm = (CONFIGS[kind][name] for name in ("d_model", "n_layer", "ssm_cfg"))
    e, n = 2 * d, ssm["d_state"]
    if kind == "Mamba1":
        rank = math.ceil(d / 16)
        mixer = {"in_proj.weight": (2 * e, d), "conv1d.weight": (e, 1, 4), "conv1d.bias": (e,),
                 "x_proj.weight": (rank + 2 * n, e), "dt_proj.weight": (e, rank), "dt_proj.bias": (e,),
                 "A_log": (e, n), "D": (e,), "out_proj.weight": (d, e)}  # fmt: skip
    else:
        h, g = e // ssm["headdim"], ssm["ngroups"]
        channels = e + 2 * g * n
        mixer = {"in_proj.weight": (e + channels + h, d), "conv1d.weight": (channels, 1, 4), "conv1d.bias": (channels,),
                 "A_log": (h,), "D": (h,), "dt_bias": (h,), "norm.weight": (e,), "out_proj.weight": (d, e)}  # fmt: skip
    shapes = {"backbone.embedding.weight": (ROWS[kind], d), "backbone.norm_f.weight": (d,)}
    for index in range(layers):
        shapes[f"backbone.layers.{index}.norm.weight"] = (d,)
        shapes |= {f"backbone.layers.{index}.mixer.{name}": shape for name, shape in mixer.items()}
    generator = torch.Generator().manual_seed(3)
    tensors = {name: 0.4 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for name in tensors:
        if "norm" in name:
            tensors[name] += 1
    head = tensors["backbone.embedding.weight"]
    return tensors | {"lm_head.weight": head if tied else 0.4 * torch.randn(head.shape, generator=generator)}


def write(
    folder: Path, kind: str, tensors: dict[str, torch.Tensor], file: str = "pytorch_model.bin", **changes: Any
) -> Path:
    """A checkpoint folder as mamba_ssm leaves it; `changes` to its config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind] | changes))
    if file.endswith(".bin"):
        torch.save(tensors, folder / file)
    else:
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / file)
    return folder


def logits(kind: str, tensors: dict[str, torch.Tensor], ids: list[int]) -> np.ndarray:
    """Logits (L, V) of one sequence, float64."""
    t = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    stream = t["backbone.embedding.weight"][ids]
    for index in range(CONFIGS[kind]["n_layer"]):
        layer = f"backbone.layers.{index}."
        mixer = {name.removeprefix(layer + "mixer."): value for name, value in t.items() if layer + "mixer." in name}
        compute = mamba1 if kind == "Mamba1" else mamba2
        stream = stream + compute(CONFIGS[kind]["ssm_cfg"], mixer, rms(stream, t[layer + "norm.weight"]))
    return rms(stream, t["backbone.norm_f.weight"]) @ t["lm_head.weight"].T


def mamba1(ssm: dict[str, Any], w: dict[str, np.ndarray], u: np.ndarray) -> np.ndarray:
    e, n = w["D"].size, ssm["d_state"]
    projected = u @ w["in_proj.weight"].T
    x, z = convolved(projected[:, :e], w), projected[:, e:]
    rank = w["dt_proj.weight"].shape[1]
    state, out = np.zeros((e, n)), np.zeros_like(x)
    for now in range(len(u)):
        parts = w["x_proj.weight"] @ x[now]
        dt = np.logaddexp(0, w["dt_proj.weight"] @ parts[:rank] + w["dt_proj.bias"])
        b, c = parts[rank : rank + n], parts[rank + n :]
        for channel in range(e):
            decay = np.exp(-np.exp(w["A_log"][channel]) * dt[channel])
            state[channel] = decay * state[channel] + dt[channel] * b * x[now, channel]
            out[now, channel] = state[channel] @ c + w["D"][channel] * x[now, channel]
    return (out * silu(z)) @ w["out_proj.weight"].T


def mamba2(ssm: dict[str, Any], w: dict[str, np.ndarray], u: np.ndarray) -> np.ndarray:
    heads, width, groups, n = w["D"].size, ssm["headdim"], ssm["ngroups"], ssm["d_state"]
    e = heads * width
    projected = u @ w["in_proj.weight"].T
    z, dt = projected[:, :e], np.logaddexp(0, projected[:, -heads:] + w["dt_bias"])
    xbc = convolved(projected[:, e:-heads], w)
    state, out = np.zeros((heads, width, n)), np.zeros((len(u), e))
    for now in range(len(u)):
        for head in range(heads):
            group = head // (heads // groups)
            x = xbc[now, head * width : (head + 1) * width]
            b = xbc[now, e + group * n : e + (group + 1) * n]
            c = xbc[now, e + (groups + group) * n : e + (groups + group + 1) * n]
            decay = np.exp(-np.exp(w["A_log"][head]) * dt[now, head])
            state[head] = decay * state[head] + dt[now, head] * np.outer(x, b)
            out[now, head * width : (head + 1) * width] = state[head] @ c + w["D"][head] * x
    gated = (out * silu(z)).reshape(len(u), groups, e // groups)
    return rms(gated, w["norm.weight"].reshape(groups, -1)).reshape(len(u), e) @ w["out_proj.weight"].T


def convolved(x: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    """silu of the causal depthwise convolution of x (L, channels)."""
    kernel = w["conv1d.weight"][:, 0]
    out = np.tile(w["conv1d.bias"], (len(x), 1))
    for now in range(len(x)):
        for back in range(min(now + 1, 4)):
            out[now] += kernel[:, 3 - back] * x[now - back]
    return silu(out)


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
