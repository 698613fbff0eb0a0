"""What every family of models tells the rest of the package.

A family knows one architecture: which components it has, what takes a component's place, how many parameters go with
it, and how to step through the layers one at a time. Nothing outside this folder knows a module path.

B batch, L tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..components import PARTS, Component, Cut

Stream = dict[str, Tensor]
"""What flows from layer to layer: tensors by name, each with the batch first. "hidden" is (B, L, D)."""


@dataclass(frozen=True)
class Substitution:
    """One change to a model: `parent`'s child `name` gives way to `replacement`, or to None where that is skipped."""

    parent: nn.Module
    name: str
    replacement: nn.Module | None


@dataclass(frozen=True)
class ChannelWeights:
    """One MLP's tensors by channel, on the model's own memory: I channels.

    gate_up: the gate and up projections (I, D); others: what else has a row for each channel, (I, ...); down: (D, I).
    """

    gate_up: list[Tensor]
    others: list[Tensor]
    down: Tensor


class Family(ABC):
    """One architecture. `models`: the transformers model types it covers; `kinds`: what is removable, in order;
    `finer`: kinds finer than the paper's, which are removable too, where they are asked for."""

    models: tuple[str, ...]
    kinds: tuple[str, ...]
    finer: tuple[str, ...] = ()
    projections: Mapping[str, tuple[str, ...]] = MappingProxyType({"input": ("in_proj",), "output": ("out_proj",)})
    """The names of a layer's linear modules by role, which every forward path calls as modules: LoRA's targets."""

    def prepare(self, model: PreTrainedModel) -> None:  # noqa: B027
        """Set what a model just built or loaded needs in order to compute as its authors' code does."""

    @abstractmethod
    def components(self, model: PreTrainedModel) -> list[Component]:
        """Everything removable, in depth order, of finer kinds too."""

    def conflict(self, model: PreTrainedModel, components: Iterable[Component]) -> str | None:
        """Why these components cannot go together, in one line; None if they can."""
        return None

    @abstractmethod
    def layer_of(self, model: PreTrainedModel, component: Component) -> int:
        """The index of the layer that holds a component."""

    @abstractmethod
    def substitutions(self, model: PreTrainedModel, components: Mapping[Component, int]) -> list[Substitution]:
        """What to change so that the model computes without these components. Parameters are shared, not copied.

        components: each with what stays of it (channels, heads, ...; 0 for the kinds that go whole). The model may
        already be without others, and a component of the kinds in `PARTS` without some of its parts.
        """

    @abstractmethod
    def compact(self, model: PreTrainedModel) -> None:
        """Drop what does nothing in a model whose substitutions stay for good, and number the layers anew, in place.

        The configuration then gives a cache the right entries.
        """

    def stock_without(self, model: PreTrainedModel, component: Component) -> bool:
        """Whether transformers' own class holds a model pruned of this component, numbered as in the dense model."""
        return False

    @abstractmethod
    def parameters(self, model: PreTrainedModel, component: Component) -> int:
        """How many parameters a removal takes from the model, as the paper's ratios count them."""

    def parameters_in_ratio(self, model: PreTrainedModel, components: Iterable[Component]) -> int:
        """How many parameters the dense model has where a paper's ratio for the removal of these components counts."""
        return model.num_parameters()

    def parameters_removed(self, model: PreTrainedModel, gone: Iterable[Cut]) -> int:
        """How many parameters several removals take from the model, as the paper's ratios count them."""
        return sum(
            (self.channels(model, cut.component.kind) - cut.kept) * self.channel_parameters(model, cut.component.kind)
            if cut.component.kind in PARTS
            else self.parameters(model, cut.component)
            for cut in gone
        )

    def channels(self, model: PreTrainedModel, kind: str = "mlp_channels") -> int:
        """How many parts a component of a kind in `PARTS` has before any goes: the channels of an MLP."""
        return model.config.intermediate_size

    def together(self, model: PreTrainedModel, kind: str) -> int:
        """How many parts of a component of a kind in `PARTS` can only go together."""
        return 1

    def channel_parameters(self, model: PreTrainedModel, kind: str = "mlp_channels") -> int:
        """How many parameters one part has: of an MLP channel, a row of gate, a row of up, a column of down."""
        return 3 * model.config.hidden_size

    def channel_weights(self, model: PreTrainedModel) -> list[ChannelWeights]:
        """The tensors of every MLP, each once."""
        return []

    @abstractmethod
    def dead_parameters(self, model: PreTrainedModel, component: Component) -> int:
        """How many parameters are left without a reader when the component is gone."""

    def parameters_apart(self, model: PreTrainedModel, component: Component | None = None) -> int:
        """How many parameters a component, or the whole model, has where every layer has a private copy of what it
        shares with others, its adapters merged."""
        return model.num_parameters() if component is None else self.dead_parameters(model, component)

    def flops_beside_weights(self, module: nn.Module, tokens: int) -> float:
        """Multiplications and additions of one call of a module that are not those of a weight: scans, attention."""
        return 0.0

    @abstractmethod
    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The layers, in order; a substituted one is its replacement."""

    def read_by(self, model: PreTrainedModel, index: int) -> list[nn.Parameter]:
        """The parameters that a layer reads: of what it shares with others, not what only these read."""
        return list(self.layers(model)[index].parameters())

    @abstractmethod
    def start(self, model: PreTrainedModel, ids: Tensor) -> Stream:
        """The stream before the first layer, for token ids (B, L) int64."""

    @abstractmethod
    def step(self, model: PreTrainedModel, layer: nn.Module, stream: Stream) -> Stream:
        """The stream after one layer, without a cache."""

    @abstractmethod
    def finish(self, model: PreTrainedModel, stream: Stream) -> Tensor:
        """What the vocabulary projection reads, (B, L, D), from the stream after the last layer."""

    def stream_bytes(self, model: PreTrainedModel, tokens: int) -> int:
        """What the stream of one sequence of so many tokens takes at most between two layers."""
        return tokens * model.config.hidden_size * model.dtype.itemsize
