"""Hymba: attention and Mamba heads side by side in every layer, then an MLP.

    h <- h + out_proj((norm1(a) + norm2(y)) / 2),  a from the attention, y from the SSM
    h <- h + mlp(norm(h))

What removal leaves of a layer, as in the authors' release:

    hymba_block    its MLP; only where no layer that stays reuses its keys and values
    attention      out_proj(norm2(y)); keys and values that other layers reuse are still made
    ssm            out_proj(norm1(a)); convolution and gate go with the scan
    both of them   out_proj(silu(conv(x))), without gate and norm
    mlp            its hybrid heads
    mlp_channels   the first channels of its MLP

B batch, T tokens with the meta tokens, D model width, V vocabulary.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..components import Component
from ..hymba import HymbaConfig, HymbaForCausalLM
from ..hymba.mixer import HymbaMixer, KeysValues, Pass
from .base import ChannelWeights, Family, Stream, Substitution
from .narrow_mlp import NarrowMLP, rows

AutoConfig.register("hymba", HymbaConfig)
AutoModelForCausalLM.register(HymbaConfig, HymbaForCausalLM)

OF_SSM = ("x_proj", "dt_proj", "A_log", "D", "dt_layernorm", "B_layernorm", "C_layernorm")
"""What of a mixer only the scan reads."""


class PrunedMixer(HymbaMixer):
    """Hybrid heads without attention, without the SSM, or without both.

    It holds only what is still read, sharing memory with the mixer it is made from.
    """

    gone: frozenset[str]
    dense: weakref.ref[HymbaMixer]
    """Where a further removal starts; whoever will undo this one keeps it alive."""

    def __init__(self, mixer: HymbaMixer, gone: Iterable[str]) -> None:
        nn.Module.__init__(self)
        self.gone = frozenset(gone) | (mixer.gone if isinstance(mixer, PrunedMixer) else frozenset())
        dense = mixer.dense() if isinstance(mixer, PrunedMixer) else mixer
        self.dense = weakref.ref(dense)
        self.config, self.layer_idx = dense.config, dense.layer_idx
        self.reuses, self.is_global = dense.reuses, dense.is_global
        parts = self._parts()
        widths: dict[str, int] = dense.widths
        self.widths = {part: widths[part] for part in parts}
        begin = list(accumulate(widths.values(), initial=0))[list(widths).index(parts[0])]
        self.in_proj = rows(dense.in_proj, begin, begin + sum(self.widths.values()))
        for name in self._children():
            setattr(self, name, getattr(dense, name))
        self.train(dense.training)

    def forget_dense(self, keys_read: bool) -> None:
        """Stay pruned for good; keys and values are made no more if no layer reads them."""
        del self.dense
        begin = 0 if keys_read else sum(self.widths.pop(part, 0) for part in ("k", "v"))
        if begin:
            self.in_proj = rows(self.in_proj, begin, self.in_proj.out_features)

    def _parts(self) -> list[str]:
        """The parts of the projection that are still read."""
        attends, scans = "attention" not in self.gone, "ssm" not in self.gone
        needed = {"q": attends, "x": scans or not attends, "gate": scans}
        needed["k"] = needed["v"] = attends or bool(self.config.reused_by(self.layer_idx))
        return [part for part in ("q", "k", "v", "x", "gate") if needed[part]]

    def _children(self) -> list[str]:
        names = ["out_proj"]
        if "attention" not in self.gone:
            names.append("pre_avg_layernorm1")
        else:
            names.append("conv1d")
            if "ssm" not in self.gone:
                names += ["pre_avg_layernorm2", *OF_SSM]
        return names

    def forward(self, u: Tensor, here: Pass, shared: KeysValues | None) -> tuple[Tensor, KeysValues | None]:
        """As HymbaMixer's."""
        parts = self.project(u)
        if "k" in parts and not self.reuses:
            shared = self.keys_and_values(parts["k"], parts["v"], here)
        if "attention" not in self.gone:
            inner = self.pre_avg_layernorm1(self.attention(parts["q"], shared, here))
        else:
            inner = self.convolution(parts["x"], here)
            if "ssm" not in self.gone:
                inner = self.pre_avg_layernorm2(self.ssm(inner, parts["gate"], here))
        return self.out_proj(inner), shared


class Hymba(Family):
    """Hymba."""

    models = ("hymba",)
    kinds = ("hymba_block", "attention", "ssm", "mlp", "mlp_channels")
    projections = {**Family.projections, "mlp": ("up_proj", "up", "down_proj", "down")}  # noqa: RUF012

    def components(self, model: PreTrainedModel) -> list[Component]:
        """Of layers that share keys and values only the last one's block, if not `all_blocks_removable`.

        Nothing more of a model that is pruned for good.
        """
        if hasattr(model.config, "pruned"):
            return []
        return [
            Component(kind, index)
            for index in range(model.config.num_hidden_layers)
            for kind in self.kinds
            if kind != "hymba_block" or model.config.all_blocks_removable or index == model.config.group_of(index)[-1]
        ]

    def conflict(self, model: PreTrainedModel, components: Iterable[Component]) -> str | None:
        blocks = {component.index for component in components if component.kind == "hymba_block"}
        for index in sorted(blocks.intersection(range(model.config.num_hidden_layers))):
            group, layers = model.config.group_of(index), self.layers(model)
            reused_by = model.config.reused_by(index)
            readers = [other for other in reused_by if other not in blocks and layers[other].mamba is not None]
            if readers:
                listed = " and ".join(map(str, readers))
                return f"hymba_block:{index} cannot go: layer {listed} reuses its keys and values; keep it"
            if index != group[-1] and not model.config.all_blocks_removable:
                return (
                    f"hymba_block:{index} cannot go: of the layers {group}, which share keys and values, only the last "
                    "is removable; set all_blocks_removable in the model's configuration to allow it"
                )
        return None

    def layer_of(self, model: PreTrainedModel, component: Component) -> int:
        return component.index

    def substitutions(self, model: PreTrainedModel, components: Mapping[Component, int]) -> list[Substitution]:
        found, gone = [], defaultdict(set)
        for component, kept in components.items():
            layer = self.layers(model)[component.index]
            if component.kind == "hymba_block":
                found += [Substitution(layer, "input_layernorm", None), Substitution(layer, "mamba", None)]
            elif component.kind == "mlp":
                found += [Substitution(layer, "pre_moe_layernorm", None), Substitution(layer, "moe", None)]
            elif component.kind == "mlp_channels":
                found.append(Substitution(layer, "moe", _narrow(layer.moe).first(kept)))
            else:
                gone[component.index].add(component.kind)
        for index, kinds in gone.items():
            layer = self.layers(model)[index]
            found.append(Substitution(layer, "mamba", PrunedMixer(layer.mamba, kinds)))
        return found

    def compact(self, model: PreTrainedModel) -> None:
        layers: Any = self.layers(model)
        config = model.config
        kept = [index for index, layer in enumerate(layers) if layer.mamba is not None or layer.moe is not None]
        attending = {
            config.group_of(index)[0]
            for index, layer in enumerate(layers)
            if layer.mamba is not None and "q" in layer.mamba.widths
        }
        for index, layer in enumerate(layers):
            if isinstance(layer.mamba, PrunedMixer):
                layer.mamba.forget_dense(keys_read=config.group_of(index)[0] in attending)
        number = {index: new for new, index in enumerate(kept)}
        for index, new in number.items():
            layers[index].layer_idx = new
            if layers[index].mamba is not None:
                layers[index].mamba.layer_idx = new
        model.model.layers = nn.ModuleList([layers[index] for index in kept]).train(model.training)
        groups = ([number[index] for index in group if index in number] for group in config.kv_reuse_group)
        config.num_hidden_layers = len(kept)
        config.global_attn_idx = [number[index] for index in config.global_attn_idx if index in number]
        config.kv_reuse_group = [group for group in groups if group]

    def parameters(self, model: PreTrainedModel, component: Component) -> int:
        """Norms before the heads and before the MLP do not count, nor does what is left within pruned heads."""
        layer = self.layers(model)[component.index]
        if component.kind == "mlp_channels":
            return self.channels(model) * self.channel_parameters(model)
        return {"hymba_block": _count(layer.mamba), "mlp": _count(layer.moe)}.get(component.kind, 0)

    def flops_beside_weights(self, module: nn.Module, tokens: int) -> float:
        """The scan as in Mamba-1; in the attention, scores and their product with the values of all tokens in sight."""
        if not isinstance(module, HymbaMixer):
            return 0.0
        config, scan = module.config, 7.0 * tokens * module.A_log[0].numel() if hasattr(module, "A_log") else 0.0
        if "q" not in module.widths:
            return scan
        window = tokens if module.is_global else min(tokens, config.sliding_window + config.num_memory_tokens)
        in_sight = window * (window + 1) / 2 + (tokens - window) * window
        heads = config.num_attention_heads
        return scan + 2.0 * heads * (config.kq_head_dim + config.v_head_dim) * in_sight

    def dead_parameters(self, model: PreTrainedModel, component: Component) -> int:
        layer = self.layers(model)[component.index]
        if component.kind == "hymba_block":
            return _count(layer.mamba) + _count(layer.input_layernorm)
        if component.kind == "mlp":
            return _count(layer.moe) + _count(layer.pre_moe_layernorm)
        if component.kind == "mlp_channels":
            return _count(layer.moe)
        return _count(layer.mamba) - _count(PrunedMixer(layer.mamba, [component.kind]))

    def channel_weights(self, model: PreTrainedModel) -> list[ChannelWeights]:
        mlps = [layer.moe.experts[0] for layer in self.layers(model)]
        return [
            ChannelWeights([mlp.gate_proj.weight.data, mlp.up_proj.weight.data], [], mlp.down_proj.weight.data)
            for mlp in mlps
        ]

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        return model.model.layers

    def start(self, model: PreTrainedModel, ids: Tensor) -> Stream:
        return {"hidden": model.model.with_meta_tokens(model.model.embed_tokens(ids), None)}

    def step(self, model: PreTrainedModel, layer: nn.Module, stream: Stream) -> Stream:
        """Keys and values travel with the stream as long as a layer to come reuses them, in memory of their own."""
        here = model.model.this_pass(stream["hidden"], None, None, first=True)
        shared = (stream["keys"], stream["values"]) if "keys" in stream else None
        hidden, shared = layer(stream["hidden"], here, shared)
        if shared is None or not self._reused_later(model, layer.layer_idx):
            return {"hidden": hidden}
        return {"hidden": hidden, "keys": shared[0].contiguous(), "values": shared[1].contiguous()}

    def _reused_later(self, model: PreTrainedModel, index: int) -> bool:
        """Whether a layer after this one, its block not removed, reuses the keys and values of this one's group."""
        later = [other for other in model.config.group_of(index) if other > index]
        return any(self.layers(model)[other].mamba is not None for other in later)

    def finish(self, model: PreTrainedModel, stream: Stream) -> Tensor:
        return model.model.final_layernorm(stream["hidden"][:, model.config.num_memory_tokens :])

    def stream_bytes(self, model: PreTrainedModel, tokens: int) -> int:
        """With the meta tokens, and the keys and values that later layers reuse."""
        config = model.config
        keys_values = config.num_key_value_heads * (config.kq_head_dim + config.v_head_dim)
        shared = keys_values if any(len(group) > 1 for group in config.kv_reuse_group) else 0
        return (tokens + config.num_memory_tokens) * (config.hidden_size + shared) * model.dtype.itemsize


def _narrow(moe: nn.Module) -> NarrowMLP:
    """The MLP of a layer as one that channels can be taken from; itself if it is so already."""
    if isinstance(moe, NarrowMLP):
        return moe
    mlp = moe.experts[0]
    return NarrowMLP(mlp.gate_proj, mlp.up_proj, mlp.down_proj, F.silu).train(moe.training)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
