"""What Mamba, Falcon-Mamba and Mamba-2 have in common: a stack of residual layers, each a norm and a mixer.

    h <- h + mixer(norm(h))

Removing a Mamba block leaves h as it is. Removing the SSM leaves the mixer's convolution, gate and projections. Finer
kinds leave a narrower mixer (`narrow_ssm.py`).

B batch, L tokens, D model width, E inner width, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from ..components import Component
from .base import Stream, Substitution
from .finer_kinds import WIDTHS, FinerKinds


class SkippedLayer(nn.Module):
    """What stands where a whole residual layer was: hidden states (B, L, D) pass unchanged."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class MixerWithoutSSM(nn.Module):
    """A mixer whose scan has given way to its input: y = silu(conv(x)), then gate and output projection.

    It holds only what is still read, sharing memory with the dense mixer it is made from, and keeps the convolution's
    state, but no recurrent one, in the cache. Equal to the dense mixer with B = 0 and D = 1.
    """

    modeling: ModuleType
    """The transformers module whose convolution functions run, so that installed kernels serve here as well."""

    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.dense = type(mixer)
        self.layer_idx = mixer.layer_idx
        self.conv_kernel_size = mixer.conv_kernel_size
        self.intermediate_size = mixer.intermediate_size
        self.activation = mixer.activation
        self.act = mixer.act
        self.in_proj = first_rows(mixer.in_proj, 2 * mixer.intermediate_size)
        self.conv1d = first_channels(mixer.conv1d, mixer.intermediate_size)
        self.out_proj = mixer.out_proj
        self.train(mixer.training)

    def with_idle_scan(self, config: PretrainedConfig) -> dict[str, Tensor]:
        """The tensors of the dense mixer that computes the same: its scan has B = 0 and D = 1, so y is x."""
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in self.dense(config, self.layer_idx).state_dict().items()}
        weight = self.in_proj.weight
        dense = {name: torch.zeros(shape, dtype=weight.dtype, device=weight.device) for name, shape in shapes.items()}
        for name, tensor in self.state_dict().items():
            dense[name][: len(tensor)] = tensor
        dense["D"].fill_(1.0)
        return dense

    def convolve(self, x: Tensor, cache_params: Cache | None) -> Tensor:
        """silu(conv(x)) for x (B, E, L), continuing from and updating the convolution's state in the cache."""
        weight, bias, length = self.conv1d.weight.squeeze(1), self.conv1d.bias, x.shape[-1]
        if cache_params is None:
            return self.modeling.causal_conv1d_fn(x, weight, bias, activation=self.activation)
        state = cache_params.get_conv_state(self.layer_idx, state_idx=0)
        if state is not None and length == 1 and not cache_params.is_recording_past(self.layer_idx):
            return self.modeling.causal_conv1d_update(x, state, weight, bias, activation=self.activation)
        x = cache_params.update_conv_state(x, self.layer_idx, conv_kernel_size=self.conv_kernel_size)
        return self.modeling.causal_conv1d_fn(x, weight, bias, activation=self.activation)[..., -length:]


class MambaLike(FinerKinds):
    """The family's common part; a subclass names its mixer without SSM and what is dead in it."""

    kinds = ("mamba_block", "ssm")
    mixer_without_ssm: type[MixerWithoutSSM]

    def prepare(self, model: PreTrainedModel) -> None:
        """Take off a hook of transformers for an older name of the embeddings, of no use in a model that is filled.

        It is bound to the model that it hangs on: with it, neither a model nor a copy is freed, on a GPU, say, before
        Python looks for cycles.
        """
        backbone: Any = model.base_model
        backbone._load_state_dict_pre_hooks.clear()

    @abstractmethod
    def dead_in_mixer(self, mixer: nn.Module) -> int:
        """Parameters of a mixer that nothing reads when its SSM is gone."""

    def components(self, model: PreTrainedModel) -> list[Component]:
        found = []
        for index, layer in enumerate(self.layers(model)):
            without_ssm = isinstance(getattr(layer, "mixer", None), MixerWithoutSSM)
            found += [Component(kind, index) for kind in self.kinds if kind != "ssm" or not without_ssm]
            found += self.finer_components(model, index)
        return found

    def mixer(self, model: PreTrainedModel, index: int) -> Any:
        return self.layers(model)[index].mixer

    def layer_of(self, model: PreTrainedModel, component: Component) -> int:
        return component.index

    def substitutions(self, model: PreTrainedModel, components: Mapping[Component, int]) -> list[Substitution]:
        layers = self.layers(model)
        mixers = self.pruned_mixers(model, components)
        skipped = [component.index for component in components if component.kind == "mamba_block"]
        return [
            *(Substitution(layers, str(i), SkippedLayer().train(layers[i].training)) for i in skipped),
            *(Substitution(layers[index], "mixer", mixer) for index, mixer in mixers.items()),
        ]

    def compact(self, model: PreTrainedModel) -> None:
        layers: Any = self.layers(model)
        for index in reversed(range(len(layers))):
            if isinstance(layers[index], SkippedLayer):
                del layers[index]
        for index, layer in enumerate(layers):
            layer.layer_idx = layer.mixer.layer_idx = index
        model.config.num_hidden_layers = len(layers)

    def stock_without(self, model: PreTrainedModel, component: Component) -> bool:
        return component.kind == "mamba_block"

    def parameters(self, model: PreTrainedModel, component: Component) -> int:
        return 0 if component.kind == "ssm" else self.dead_parameters(model, component)

    def dead_parameters(self, model: PreTrainedModel, component: Component) -> int:
        if component.kind in WIDTHS:
            return self.whole_parameters(model, component)
        layer = self.layers(model)[component.index]
        if component.kind == "ssm":
            return self.dead_in_mixer(layer.mixer)
        return sum(parameter.numel() for parameter in layer.parameters())

    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        return model.backbone.layers

    def start(self, model: PreTrainedModel, ids: Tensor) -> Stream:
        return {"hidden": model.backbone.embeddings(ids)}

    def step(self, model: PreTrainedModel, layer: nn.Module, stream: Stream) -> Stream:
        return {"hidden": layer(stream["hidden"])}

    def finish(self, model: PreTrainedModel, stream: Stream) -> Tensor:
        return model.backbone.norm_f(stream["hidden"])

    def stream_bytes(self, model: PreTrainedModel, tokens: int) -> int:
        """The stream of a model in half precision is in float32 all the same, if its configuration says so."""
        itemsize = 4 if model.config.residual_in_fp32 else model.dtype.itemsize
        return tokens * model.config.hidden_size * itemsize


def first_rows(linear: nn.Linear, rows: int) -> nn.Linear:
    """The linear layer that computes the first outputs only, sharing memory with `linear`."""
    part = nn.Linear(linear.in_features, rows, bias=linear.bias is not None, device="meta")
    part.weight = shared(linear.weight, rows)
    if linear.bias is not None:
        part.bias = shared(linear.bias, rows)
    return part


def first_channels(conv: nn.Conv1d, channels: int) -> nn.Conv1d:
    """The depthwise convolution of the first channels only, sharing memory with `conv`."""
    part = nn.Conv1d(channels, channels, conv.kernel_size[0], groups=channels, padding=conv.padding[0],
                     bias=conv.bias is not None, device="meta")  # fmt: skip
    part.weight = shared(conv.weight, channels)
    if conv.bias is not None:
        part.bias = shared(conv.bias, channels)
    return part


def shared(parameter: Tensor, rows: int) -> nn.Parameter:
    """The first rows of a parameter, as a parameter on the same memory."""
    with torch.no_grad():
        return nn.Parameter(parameter[:rows], requires_grad=parameter.requires_grad)
