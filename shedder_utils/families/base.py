"""What every family of models tells the rest of the package.

A family knows one architecture: which components it has, what takes a component's place, how many parameters go with
it, and how to step through the layers one at a time. Nothing outside this folder knows a module path.

B batch, L tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..components import Component

Stream = dict[str, Tensor]
"""What flows from layer to layer: tensors by name, each with the batch first. "hidden" is (B, L, D)."""


@dataclass(frozen=True)
class Substitution:
    """One change to a model: `parent`'s child `name` gives way to `replacement`."""

    parent: nn.Module
    name: str
    replacement: nn.Module


class Family(ABC):
    """One architecture. `models`: the transformers model types it covers; `kinds`: what is removable, in order."""

    models: tuple[str, ...]
    kinds: tuple[str, ...]

    @abstractmethod
    def components(self, model: PreTrainedModel) -> list[Component]:
        """Everything removable, in depth order."""

    @abstractmethod
    def layer_of(self, model: PreTrainedModel, component: Component) -> int:
        """The index of the layer that holds a component."""

    @abstractmethod
    def substitutions(self, model: PreTrainedModel, components: Sequence[Component]) -> list[Substitution]:
        """What to change so that the model computes without these components. Parameters are shared, not copied."""

    @abstractmethod
    def parameters(self, model: PreTrainedModel, component: Component) -> int:
        """How many parameters a removal takes from the model, as the paper's ratios count them."""

    @abstractmethod
    def dead_parameters(self, model: PreTrainedModel, component: Component) -> int:
        """How many parameters are left without a reader when the component is gone."""

    @abstractmethod
    def layers(self, model: PreTrainedModel) -> nn.ModuleList:
        """The layers, in order; a substituted one is its replacement."""

    @abstractmethod
    def start(self, model: PreTrainedModel, ids: Tensor) -> Stream:
        """The stream before the first layer, for token ids (B, L) int64."""

    @abstractmethod
    def step(self, model: PreTrainedModel, layer: nn.Module, stream: Stream) -> Stream:
        """The stream after one layer, without a cache."""

    @abstractmethod
    def finish(self, model: PreTrainedModel, stream: Stream) -> Tensor:
        """Logits (B, L, V) from the stream after the last layer."""
