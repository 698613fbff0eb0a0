"""Kinds finer than the paper's, in the families that have them: how many there are in a mixer, and what they weigh.

A component of such a kind is all heads, inner channels or states of one mixer, of which some go (`narrow_ssm.py`).

D model width, E inner width, N state size, H heads, P head width, G groups, R rank of the step, K convolution taps.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..components import Component, Cut
from .base import Family
from .narrow_ssm import first, narrow, order

WIDTHS = {"inner_channels": "E", "heads": "H", "states": "N"}
"""The width of a mixer that each kind is."""


@dataclass(frozen=True)
class Mamba1Shape:
    """The widths of a Mamba-1 mixer, and whether its projections and its convolution have biases."""

    D: int
    E: int
    N: int
    R: int
    K: int
    bias: bool
    conv_bias: bool

    @property
    def parameters(self) -> int:
        """in_proj; convolution; x_proj; dt_proj; A_log and D; out_proj."""
        D, E, N, R = self.D, self.E, self.N, self.R
        scan = E * (R + 2 * N) + (R + 1) * E + E * N + E
        return 2 * E * (D + self.bias) + E * (self.K + self.conv_bias) + scan + (E + self.bias) * D


@dataclass(frozen=True)
class Mamba2Shape:
    """The widths of a Mamba-2 mixer, and whether its projections and its convolution have biases."""

    D: int
    H: int
    P: int
    N: int
    G: int
    K: int
    bias: bool
    conv_bias: bool

    @property
    def parameters(self) -> int:
        """in_proj; convolution; A_log, D and dt_bias; norm; out_proj."""
        E, convolved = self.H * self.P, self.H * self.P + 2 * self.G * self.N
        inside = (E + convolved + self.H) * (self.D + self.bias) + convolved * (self.K + self.conv_bias)
        return inside + 3 * self.H + E + (E + self.bias) * self.D


Shape = Mamba1Shape | Mamba2Shape


class FinerKinds(Family):
    """What is common to the families whose mixers can lose heads, inner channels and states."""

    mixer_without_ssm: Callable[[nn.Module], nn.Module]

    @abstractmethod
    def shape(self, config: Any) -> Shape:
        """The mixers of the dense model."""

    def finer_components(self, model: PreTrainedModel, index: int) -> list[Component]:
        """Of a layer; none of a model that is pruned for good."""
        return [] if hasattr(model.config, "pruned") else [Component(kind, index) for kind in self.finer]

    @abstractmethod
    def mixer(self, model: PreTrainedModel, index: int) -> Any:
        """The mixer that a layer has now."""

    def order_parts(self, model: PreTrainedModel, kind: str) -> None:
        """Sort the parts of every mixer that are of a finer kind (see `narrow_ssm.order`), in place."""
        for index in range(len(self.layers(model))):
            order(self.mixer(model, index), kind)

    def pruned_mixers(self, model: PreTrainedModel, components: Mapping[Component, int]) -> dict[int, nn.Module]:
        """By layer, mixers without what components (as for `substitutions`) take from inside them."""
        inside: dict[int, dict[str, int]] = defaultdict(dict)
        for component, kept in components.items():
            if component.kind == "ssm" or component.kind in WIDTHS:
                inside[component.index][component.kind] = kept
        return {index: self._pruned_mixer(self.mixer(model, index), kept) for index, kept in inside.items()}

    def _pruned_mixer(self, mixer: nn.Module, kept: dict[str, int]) -> nn.Module:
        """The mixer with so many parts of each kind; those that stay are copied once, for all kinds together."""
        if "ssm" in kept:
            mixer = self.mixer_without_ssm(mixer)
        return narrow(mixer, first(mixer, kept)) if kept.keys() - {"ssm"} else mixer

    def channels(self, model: PreTrainedModel, kind: str = "mlp_channels") -> int:
        if kind not in WIDTHS:
            return super().channels(model, kind)
        return getattr(self.shape(model.config), WIDTHS[kind])

    def together(self, model: PreTrainedModel, kind: str) -> int:
        """Heads go from all groups alike."""
        shape = self.shape(model.config)
        return shape.G if kind == "heads" and isinstance(shape, Mamba2Shape) else 1

    def channel_parameters(self, model: PreTrainedModel, kind: str = "mlp_channels") -> int:
        if kind not in WIDTHS:
            return super().channel_parameters(model, kind)
        return self._without(model, {WIDTHS[kind]: self.channels(model, kind) - 1})

    def parameters_removed(self, model: PreTrainedModel, gone: Iterable[Cut]) -> int:
        """What a mixer loses of several kinds is counted together: an element of A_log is a channel's and a state's."""
        left: dict[int, dict[str, int]] = defaultdict(dict)
        others = []
        for cut in gone:
            if cut.component.kind in WIDTHS:
                left[cut.component.index][WIDTHS[cut.component.kind]] = cut.kept
            else:
                others.append(cut)
        return super().parameters_removed(model, others) + sum(self._without(model, w) for w in left.values())

    def _without(self, model: PreTrainedModel, left: dict[str, int]) -> int:
        """The parameters that a mixer loses when these widths are left of it."""
        shape = self.shape(model.config)
        return shape.parameters - replace(shape, **left).parameters

    def whole_parameters(self, model: PreTrainedModel, component: Component) -> int:
        """The parameters of all heads, inner channels or states of a mixer."""
        return self._without(model, {WIDTHS[component.kind]: 0})
