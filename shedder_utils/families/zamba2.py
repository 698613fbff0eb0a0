"""Zamba2: Mamba-2 layers, some of them hybrid: a Transformer block feeds their Mamba mixer.

    plain:   h <- h + mamba(norm(h))
    hybrid:  h <- h + mamba(norm(h + t)),  t = linear(T([h, e]))

e is the token embedding. T is norm, attention, norm, MLP, with no residual of its own. A few Transformer blocks serve
the hybrid layers in turn. `mamba_block`, `ssm`, `heads` and `states` count layers; `mha`, `mlp`, `transformer_block`
and `mlp_channels` count hybrid positions, as the authors' release does. What removal leaves:

    mamba_block        h <- h, or h <- h + t in a hybrid layer
    ssm                the Mamba-2 mixer without its scan (mamba2.py)
    heads, states      a narrower Mamba-2 mixer (narrow_ssm.py)
    mha, mlp           T without that branch and its norm; without both, t = linear(h)
    transformer_block  no t, and no `linear`
    mlp_channels       the first channels of the MLP at this position alone

All of it works on the shared blocks: each position has modules of its own, whose parameters are shared. Private
copies are for models that stay pruned (`untying.py`).

B batch, L tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.zamba2 import modeling_zamba2

from ..components import Component
from .base import ChannelWeights, Stream, Substitution
from .finer_kinds import WIDTHS, FinerKinds, Mamba2Shape
from .mamba2 import dead_without_ssm, scan_flops
from .narrow_mlp import NarrowMLP, rows
from .zamba2_pruned import (
    SkippedAttention,
    SkippedMamba,
    SkippedMLP,
    SkippedTransformer,
    Zamba2MixerWithoutSSM,
    compact,
    decoder_of,
)

IN_TRANSFORMER = ("mha", "mlp", "transformer_block", "mlp_channels")
NO_FLOOR = 1e-30
"""A step size that none is below; not 0, whose logarithm transformers takes for new models."""


class Zamba2(FinerKinds):
    """Zamba2 with shared or untied Transformer blocks."""

    models = ("zamba2",)
    kinds = ("mamba_block", "ssm", *IN_TRANSFORMER)
    finer = ("heads", "states")
    mixer_without_ssm = Zamba2MixerWithoutSSM
    projections = {**FinerKinds.projections, "mlp": ("gate_up_proj", "gate", "up", "down_proj", "down")}  # noqa: RUF012

    def prepare(self, model: PreTrainedModel) -> None:
        """Take the floor off the step size, as in Zyphra's own code.

        transformers clamps it to time_step_min over a sequence but not in one-token decoding, which then disagree. The
        configuration follows, so that a saved model has the same logits in stock transformers.
        """
        config: Any = model.config
        config.time_step_min = NO_FLOOR
        for layer in self.layers(model):
            if not isinstance(decoder := decoder_of(layer), SkippedMamba):
                decoder.mamba.time_step_limit = (0.0, float("inf"))

    def components(self, model: PreTrainedModel) -> list[Component]:
        """Nothing more of a model that is pruned for good."""
        if hasattr(model.config, "pruned"):
            return []
        found, position = [], 0
        for index, layer_type in enumerate(model.config.layers_block_type):
            found += [Component("mamba_block", index), Component("ssm", index), *self.finer_components(model, index)]
            if layer_type == "hybrid":
                found += [Component(kind, position) for kind in IN_TRANSFORMER]
                position += 1
        return found

    def layer_of(self, model: PreTrainedModel, component: Component) -> int:
        if component.kind in IN_TRANSFORMER:
            return model.config.hybrid_layer_ids[component.index]
        return component.index

    def substitutions(self, model: PreTrainedModel, components: Mapping[Component, int]) -> list[Substitution]:
        layers = self.layers(model)
        mixers = self.pruned_mixers(model, components)
        changes = [(decoder_of(layers[index]), "mamba", mixer) for index, mixer in mixers.items()]
        for component, kept in components.items():
            if component.kind in ("mamba_block", *IN_TRANSFORMER):
                changes += self._changes(model, component, kept)
        return [Substitution(parent, name, change.train(parent.training)) for parent, name, change in changes]

    def mixer(self, model: PreTrainedModel, index: int) -> Any:
        return decoder_of(self.layers(model)[index]).mamba

    def shape(self, config: Any) -> Mamba2Shape:
        return Mamba2Shape(
            D=config.hidden_size, H=config.n_mamba_heads, P=config.mamba_headdim, N=config.mamba_d_state,
            G=config.mamba_ngroups, K=config.mamba_d_conv, bias=config.add_bias_linear, conv_bias=True,
        )  # fmt: skip

    def _changes(self, model: PreTrainedModel, component: Component, kept: int) -> list[tuple[Any, str, nn.Module]]:
        """The children to replace: (parent, name, replacement)."""
        layers, index = self.layers(model), self.layer_of(model, component)
        layer, decoder = layers[index], decoder_of(layers[index])
        if component.kind == "mamba_block":
            parent, name = (layers, str(index)) if decoder is layer else (layer, "mamba_decoder")
            return [(parent, name, SkippedMamba())]
        if component.kind == "transformer_block":
            return [(layer, "shared_transformer", SkippedTransformer()), (layer, "linear", nn.Identity())]
        block = layer.shared_transformer
        if component.kind == "mha":
            attention = SkippedAttention(model.config.hidden_size)
            return [(block, "input_layernorm", nn.Identity()), (block, "self_attn", attention)]
        if component.kind == "mlp":
            return [(block, "pre_ff_layernorm", nn.Identity()), (block, "feed_forward", SkippedMLP())]
        return [(block, "feed_forward", _split(block.feed_forward, component.index).first(kept))]

    def compact(self, model: PreTrainedModel) -> None:
        compact(model)

    def stock_without(self, model: PreTrainedModel, component: Component) -> bool:
        """Plain layers alone: a hybrid one without its Mamba block has no place in transformers' class."""
        types = model.config.pruned["dense"].get("layers_block_type", model.config.layers_block_type)
        return component.kind == "mamba_block" and types[component.index] != "hybrid"

    def parameters(self, model: PreTrainedModel, component: Component) -> int:
        """Shared blocks count at every position, their adapters merged; norms of a branch and SSMs do not count."""
        layer = self.layers(model)[self.layer_of(model, component)]
        if component.kind == "mamba_block":
            return _count(decoder_of(layer).parameters())
        if component.kind == "mlp_channels":
            return model.config.intermediate_size * self.channel_parameters(model)
        if component.kind == "ssm":
            return 0
        if component.kind in WIDTHS:
            return self.whole_parameters(model, component)
        block = layer.shared_transformer
        if component.kind == "transformer_block":
            return _merged(block) + _merged(layer.linear)
        return _merged(block.self_attn if component.kind == "mha" else block.feed_forward)

    def parameters_in_ratio(self, model: PreTrainedModel, components: Iterable[Component]) -> int:
        """All blocks untied and merged if the plan touches one; else as Zyphra's own files count them.

        There each shared block has a full set of adapters, its own and those of the others' positions. Table 1's
        10.38 % and table 3's 10.27 and 15.48 % follow.
        """
        named = dict(model.named_parameters())
        if any(component.kind in IN_TRANSFORMER for component in components):
            outside = _count(p for name, p in named.items() if ".shared_transformer." not in name)
            hybrid = (self.layers(model)[index] for index in model.config.hybrid_layer_ids)
            return outside + sum(_merged(layer.shared_transformer) for layer in hybrid)
        adapters = _count(p for name, p in named.items() if "_adapter_list." in name)
        return _count(named.values()) + (model.config.num_mem_blocks - 1) * adapters

    def parameters_apart(self, model: PreTrainedModel, component: Component | None = None) -> int:
        if component is None:
            hybrid: Iterable[Any] = (layer for layer in self.layers(model) if layer is not decoder_of(layer))
            named = model.named_parameters()
            outside = _count(parameter for name, parameter in named if ".shared_transformer." not in name)
            return outside + sum(_merged(layer.shared_transformer) for layer in hybrid)
        layer = self.layers(model)[self.layer_of(model, component)]
        if component.kind not in IN_TRANSFORMER:
            return self.dead_parameters(model, component)
        block = layer.shared_transformer
        parts = {
            "mha": (block.self_attn, block.input_layernorm), "mlp": (block.feed_forward, block.pre_ff_layernorm),
            "mlp_channels": (block.feed_forward,), "transformer_block": (block, layer.linear),
        }  # fmt: skip
        return sum(map(_merged, parts[component.kind]))

    def flops_beside_weights(self, module: nn.Module, tokens: int) -> float:
        """The scan as in Mamba-2; in the attention, scores and their product with the values at every earlier token."""
        if isinstance(module, modeling_zamba2.Zamba2Attention):
            return 2.0 * module.attention_hidden_size * tokens * (tokens + 1)
        return scan_flops(module, tokens)

    def dead_parameters(self, model: PreTrainedModel, component: Component) -> int:
        layer = self.layers(model)[self.layer_of(model, component)]
        if component.kind == "mamba_block":
            return _count(decoder_of(layer).parameters())
        if component.kind == "ssm":
            return dead_without_ssm(decoder_of(layer).mamba)
        if component.kind in WIDTHS:
            return self.whole_parameters(model, component)
        if component.kind == "transformer_block":
            own = _count(layer.linear.parameters())
            return own + self._dead(model, component.index, "")
        branch = {"mha": ("self_attn.", "input_layernorm."), "mlp": ("feed_forward.", "pre_ff_layernorm.")}
        return sum(self._dead(model, component.index, part) for part in branch.get(component.kind, ("feed_forward.",)))

    def _dead(self, model: PreTrainedModel, position: int, part: str) -> int:
        """Parameters of a Transformer block's part that no other position reads."""
        mine, others = {}, set()
        for other, index in enumerate(model.config.hybrid_layer_ids):
            read = _read_at(other, self.layers(model)[index].shared_transformer)
            if other == position:
                mine = {id(parameter): parameter for name, parameter in read.items() if name.startswith(part)}
            else:
                others |= {id(parameter) for parameter in read.values()}
        return _count(parameter for key, parameter in mine.items() if key not in others)

    def channel_weights(self, model: PreTrainedModel) -> list[ChannelWeights]:
        found = {}
        for index in model.config.hybrid_layer_ids:
            mlp = self.layers(model)[index].shared_transformer.feed_forward
            width = mlp.intermediate_size
            adapters = [p for name, p in mlp.gate_up_proj_adapter_list.named_parameters() if name.endswith(".1.weight")]
            fused = [mlp.gate_up_proj.weight, mlp.gate_up_proj.bias, *adapters]
            halves = [part for tensor in fused if tensor is not None for part in tensor.data.split(width)]
            found[id(mlp.down_proj.weight)] = ChannelWeights(halves[:2], halves[2:], mlp.down_proj.weight.data)
        return list(found.values())

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        return model.model.layers

    def read_by(self, model: PreTrainedModel, index: int) -> list[nn.Parameter]:
        hybrid = list(model.config.hybrid_layer_ids)
        return list(_read_at(hybrid.index(index) if index in hybrid else 0, self.layers(model)[index]).values())

    def start(self, model: PreTrainedModel, ids: Tensor) -> Stream:
        embedded = model.model.embed_tokens(ids)
        return {"hidden": embedded, "embedded": embedded}

    def step(self, model: PreTrainedModel, layer: nn.Module, stream: Stream) -> Stream:
        hidden, embedded, index, mask, rope = stream["hidden"], stream["embedded"], None, None, None
        if layer is not decoder_of(layer):
            index = self._index(model, layer)
            positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
            mask = modeling_zamba2.create_causal_mask(
                config=model.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None,
                position_ids=positions,
            )  # fmt: skip
            if model.config.use_mem_rope:
                rope = model.model.rotary_emb(hidden, position_ids=positions)
        hidden = layer(hidden, embedded, index, None, mask, position_embeddings=rope)
        return {"hidden": hidden, "embedded": embedded}

    def _index(self, model: PreTrainedModel, layer: nn.Module) -> int:
        return next(index for index, other in enumerate(self.layers(model)) if other is layer)

    def finish(self, model: PreTrainedModel, stream: Stream) -> Tensor:
        return model.model.final_layernorm(stream["hidden"])

    def stream_bytes(self, model: PreTrainedModel, tokens: int) -> int:
        """With the token embedding, which every hybrid layer reads."""
        return 2 * super().stream_bytes(model, tokens)


def _split(mlp: nn.Module, position: int) -> NarrowMLP:
    """The MLP of a hybrid position with gate and up apart; itself if it is so already."""
    if isinstance(mlp, NarrowMLP):
        return mlp
    width, (low, high) = mlp.intermediate_size, mlp.gate_up_proj_adapter_list[position]
    gate, up = rows(mlp.gate_up_proj, 0, width), rows(mlp.gate_up_proj, width, 2 * width)
    return NarrowMLP(gate, up, mlp.down_proj, mlp.act_fn, (low, rows(high, 0, width), rows(high, width, 2 * width)))


def _read_at(position: int, block: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a Transformer block, or of its layer, that a hybrid position reads: no other one's adapters."""
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if "_adapter_list." not in name or f"_adapter_list.{position}." in name
    }


def _merged(module: nn.Module) -> int:
    """The parameters of a module whose adapters are merged."""
    return _count(parameter for name, parameter in module.named_parameters() if "_adapter_list." not in name)


def _count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
