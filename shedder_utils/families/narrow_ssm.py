"""Mixers with only their first heads, inner channels or states: kinds finer than the paper's, which ends at the SSM.

What goes is 0 in the dense mixer:

    inner_channels  Mamba-1: x after the convolution, in a channel
    heads           Mamba-2: x after the convolution, in the channels of a head; the first of each group stay
    states          B and C after the projection (Mamba-2: the convolution), in a dimension of the state, of each group

Here it is cut off, with all that only it is read by: rows and columns of projections, channels of the convolution,
gates, steps, decays and skips. Where a norm follows, the zeros count in its mean square: Mamba-2's gated norm divides
by its dense width, and so do Falcon-Mamba's norms on B and C. So a head that gives 0 can go without any change, and a
dense model with zeros in those rows and biases computes the same. On a CPU, widths that are multiples of 16 decode
fastest.

B batch, L tokens, D model width, E inner width, N state size, H heads, P head width, G groups, R rank of the step, K
convolution taps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.zamba2 import modeling_zamba2


class _KernelByKernel:
    """A mixer that never asks for mamba_ssm's fused kernel of training, which has norms of the dense kind inside.

    A mixer asks in training alone, and does nothing else then.
    """

    training = property(lambda self: False, lambda self, mode: None)


class _Mamba(_KernelByKernel, modeling_mamba.MambaMixer):
    pass


class _FalconMamba(_KernelByKernel, modeling_falcon_mamba.FalconMambaMixer):
    pass


class _Mamba2(_KernelByKernel, modeling_mamba2.Mamba2Mixer):
    pass


class _Zamba2(_KernelByKernel, modeling_zamba2.Zamba2MambaMixer):
    pass


class _ZerosCount:
    """An RMS norm whose mean square counts what is gone as zeros: it divides by the dense width.

    scale: the root of dense by present width; the norm's epsilon has its square as a factor already.
    """

    scale = 1.0

    def forward(self, *inputs: Tensor) -> Tensor:
        return super().forward(*inputs) * self.scale  # type: ignore[misc]


class _Mamba2Norm(_ZerosCount, modeling_mamba2.MambaRMSNormGated):
    pass


class _Zamba2Norm(_ZerosCount, modeling_zamba2.Zamba2RMSNormGated):
    pass


class _FalconMambaNorm(_ZerosCount, modeling_falcon_mamba.FalconMambaWeightlessRMSNorm):
    pass


_NARROW = {own.__mro__[2]: own for own in (_Mamba, _FalconMamba, _Mamba2, _Zamba2, _Mamba2Norm, _Zamba2Norm,
                                           _FalconMambaNorm)}  # fmt: skip
"""The class that a narrow module has, by transformers' own."""


@dataclass(frozen=True)
class Kept:
    """What stays of a mixer, as indices in the order in which it stays; None for all.

    inner: of the E channels; heads: of H; states: of the G N rows of B, and of C.
    """

    inner: Tensor | None = None
    heads: Tensor | None = None
    states: Tensor | None = None


def first(mixer: Any, kept: Mapping[str, int]) -> Kept:
    """The first of a mixer's inner channels, heads and states, as many as `kept` says: equally many in each group."""
    found, groups = Kept(), getattr(mixer, "n_groups", 1)
    if "inner_channels" in kept:
        found = Kept(inner=torch.arange(kept["inner_channels"]))
    if "heads" in kept:
        heads = torch.arange(kept["heads"] // groups).expand(groups, -1)
        found = _with_channels(mixer, _in_each(heads, mixer.num_heads // groups))
    if "states" in kept:
        states = torch.arange(kept["states"]).expand(groups, -1)
        found = replace(found, states=_in_each(states, mixer.ssm_state_size))
    return found


def strongest_first(mixer: Any, kind: str) -> Kept:
    """All inner channels, heads or states, by the L1 norm of the rows that make them (x and gate, or B and C): in each
    group the largest first."""
    E, groups, from_input = mixer.intermediate_size, getattr(mixer, "n_groups", 1), _norms(mixer.in_proj)
    if kind == "inner_channels":
        return Kept(inner=_descending(from_input.view(2, 1, E)))
    if kind == "heads":
        return _with_channels(mixer, _descending(from_input[: 2 * E].view(2, groups, -1, mixer.head_dim).sum(-1)))
    width = 2 * groups * mixer.ssm_state_size
    norms = _norms(mixer.x_proj)[-width:] if hasattr(mixer, "x_proj") else from_input[2 * E : 2 * E + width]
    return Kept(states=_descending(norms.view(2, groups, -1)))


def _norms(linear: nn.Linear) -> Tensor:
    """The L1 norm of each row."""
    return linear.weight.detach().float().abs().sum(dim=1).cpu()


def _descending(norms: Tensor) -> Tensor:
    """The order of parts in their groups, from norms (2, G, parts of a group)."""
    return _in_each(norms.sum(dim=0).argsort(descending=True, stable=True), norms.shape[-1])


def _in_each(index: Tensor, size: int) -> Tensor:
    """Indices in groups of a size (G, n), as indices in all of them, (G n)."""
    return (index + size * torch.arange(len(index))[:, None]).flatten()


def _with_channels(mixer: Any, heads: Tensor) -> Kept:
    """Heads, with all their channels."""
    return Kept(inner=(heads[:, None] * mixer.head_dim + torch.arange(mixer.head_dim)).flatten(), heads=heads)


@torch.no_grad()
def order(mixer: nn.Module, kind: str) -> None:
    """Sort a dense mixer's inner channels, heads or states, strongest first, in place: it computes the same."""
    for name, sorted_parameter in narrow(mixer, strongest_first(mixer, kind)).named_parameters():
        mixer.get_parameter(name).copy_(sorted_parameter)


@torch.no_grad()
def narrow(mixer: Any, kept: Kept) -> nn.Module:
    """The mixer of what stays, with or without its SSM: a copy where it is smaller, the same tensors elsewhere."""
    twin = _alike(mixer)
    rows, columns = _rows(mixer, kept), _columns(mixer, kept)
    for name, part in (*mixer.named_children(), *mixer.named_parameters(recurse=False)):
        index = _stacked(rows.get(name, []))
        setattr(twin, name, _part(part, index, columns.get(name)))
    groups = getattr(mixer, "n_groups", 1)
    if kept.inner is not None:
        twin.intermediate_size = len(kept.inner)
        if hasattr(mixer, "norm"):
            twin.norm.group_size = len(kept.inner) // groups
            _count_zeros(twin.norm, mixer.norm.group_size / twin.norm.group_size)
    if kept.heads is not None:
        twin.num_heads = len(kept.heads)
    if kept.states is not None:
        twin.ssm_state_size = len(kept.states) // groups
        for name in ("b_layernorm", "c_layernorm"):
            if hasattr(mixer, name):
                setattr(twin, name, norm := _alike(getattr(mixer, name)))
                norm.weight = norm.weight[kept.states.to(norm.weight.device)]
                _count_zeros(norm, mixer.ssm_state_size / twin.ssm_state_size)
    if hasattr(mixer, "conv_dim"):
        twin.conv_dim = twin.conv1d.out_channels
    return twin


Block = tuple[int, Tensor | None]
"""A part of a dimension: its width, and which of it stay."""


def _rows(mixer: Any, kept: Kept) -> dict[str, list[Block]]:
    """What the first dimension of each tensor of a mixer is made of."""
    inner: Block = (mixer.intermediate_size, kept.inner)
    if not hasattr(mixer, "A_log"):  # its SSM is gone
        return {"in_proj": [inner, inner], "conv1d": [inner], "norm": [inner]}
    states: Block = (mixer.ssm_state_size * getattr(mixer, "n_groups", 1), kept.states)
    if hasattr(mixer, "x_proj"):
        step: Block = (mixer.time_step_rank, None)
        found = {"in_proj": [inner, inner], "x_proj": [step, states, states]}
        return found | {name: [inner] for name in ("conv1d", "dt_proj", "A_log", "D")}
    heads: Block = (mixer.num_heads, kept.heads)
    found = {"in_proj": [inner, inner, states, states, heads], "conv1d": [inner, states, states], "norm": [inner]}
    return found | {name: [heads] for name in ("A_log", "D", "dt_bias")}


def _columns(mixer: Any, kept: Kept) -> dict[str, Tensor | None]:
    """What stays of the second dimension of each tensor of a mixer."""
    one_decay = hasattr(mixer, "num_heads")
    return {"out_proj": kept.inner, "x_proj": kept.inner, "A_log": None if one_decay else kept.states}


def _stacked(blocks: Sequence[Block]) -> Tensor | None:
    """What stays of blocks below each other; None for all."""
    if all(index is None for _, index in blocks):
        return None
    begins = accumulate((width for width, _ in blocks), initial=0)
    parts = (begin + (torch.arange(width) if index is None else index)
             for begin, (width, index) in zip(begins, blocks, strict=False))  # fmt: skip
    return torch.cat(list(parts))


def _part(part: Any, rows: Tensor | None, columns: Tensor | None) -> Any:
    """Rows and columns of a parameter, or of a module's weight and bias; itself where all of them stay."""
    if rows is None and columns is None:
        return part
    if isinstance(part, nn.Parameter):
        return _taken(part, rows, columns)
    twin = _alike(part)
    twin.weight = _taken(part.weight, rows, columns)
    if getattr(part, "bias", None) is not None:
        twin.bias = _taken(part.bias, rows, None)
    if isinstance(part, nn.Linear):
        twin.out_features, twin.in_features = twin.weight.shape
    elif isinstance(part, nn.Conv1d):
        twin.in_channels = twin.out_channels = twin.groups = len(twin.weight)
    return twin


def _taken(parameter: Tensor, rows: Tensor | None, columns: Tensor | None) -> nn.Parameter:
    found = parameter
    for dimension, index in enumerate((rows, columns)):
        if index is not None:
            found = found.index_select(dimension, index.to(found.device))
    return nn.Parameter(found, requires_grad=parameter.requires_grad)


def _alike(module: Any) -> Any:
    """A module of the narrow class with the same parts and settings: the parts are shared, dictionaries of them not."""
    twin = copy.copy(module)
    vars(twin).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    twin.__class__ = _NARROW.get(type(module), type(module))
    return twin


def _count_zeros(norm: Any, ratio: float) -> None:
    """Let a norm that has become narrower divide by the width it had, `ratio` times its own."""
    epsilon = "eps" if hasattr(norm, "eps") else "variance_epsilon"
    setattr(norm, epsilon, getattr(norm, epsilon) * ratio)
    norm.scale *= math.sqrt(ratio)
