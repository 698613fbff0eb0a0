"""Inputs that our scans do not take, handed on to what transformers chose: a package's kernel, or its PyTorch function.

transformers calls whatever it chose with the arguments as they come. Those of mamba_ssm 2.3.2.post1 and causal_conv1d
1.6.2.post1 have other names and places than those of its PyTorch functions: tensors that come first agree in their
places, all others are to be named.

B batch, C channels of a convolution, L tokens.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
ALIGNED = 8
"""How many numbers causal_conv1d reads at once from input whose channels lie beside each other."""


def chosen_for_device(original: Function) -> Function:
    """What transformers chose, where kernels can run; elsewhere its PyTorch function, as kernels read a GPU's memory.

    Packed sequences always go to its choice, since the PyTorch functions would run them together.
    """
    in_torch = inspect.unwrap(original)

    @functools.wraps(original)
    def chosen(x: Tensor, *inputs: Any, **options: Any) -> Any:
        return (original if on_gpu(x) or packed(options) else in_torch)(x, *inputs, **options)

    return chosen


def on_gpu(x: Tensor) -> bool:
    """Whether a package's kernel can read a tensor."""
    return x.is_cuda


def packed(options: dict[str, Any]) -> bool:
    """Whether rows hold several sequences each, which a scan has to keep apart."""
    return options.get("seq_idx") is not None or options.get("cu_seqlens") is not None


def readable(x: Tensor) -> Tensor:
    """A convolution's input (B, C, L), copied if causal_conv1d would refuse it.

    Of a transposed part of a projection it reads channels beside each other, and wants numbers of channels and strides
    that are multiples of 8 (csrc/causal_conv1d.cpp), which narrowed mixers may not have. Tokens beside each other it
    takes in any number.
    """
    places = (x.shape[1], x.stride(0), x.stride(2), x.storage_offset())
    if x.stride(1) != 1 or not any(place % ALIGNED for place in places):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def package_of(function: Function) -> str:
    """The package that a function of a modeling file runs, ours around it set aside: "mamba_ssm", or "transformers"."""
    behind = (inspect.getclosurevars(layer).nonlocals.get("implementation") for layer in _layers(function))
    chosen = next((found for found in behind if found is not None), None)
    return str(getattr(chosen, "__module__", "")).split(".")[0]


def _layers(function: Function) -> Iterator[Function]:
    """A function, and what it wraps, from the outside inwards."""
    layer: Function | None = function
    while layer is not None:
        yield layer
        layer = getattr(layer, "__wrapped__", None)
