"""Putting the CPU scans in the place of transformers' PyTorch fallbacks, and taking them out again.

Each modeling file of transformers has its own `mamba_selective_scan`, `mamba2_chunk_scan`, `causal_conv1d_fn` and
one-token updates, which its mixers look up as module globals at every call. `install()` replaces these attributes, so
that all models of these classes, those already built included, use our scans; no class is touched. Inputs our scans do
not handle (another device, float64, an activation other than SiLU, packed sequences, tracing by torch.compile) go on to
the original function.
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .conv import causal_conv
from .memory import keep_freed_memory
from .selective_scan import selective_scan
from .simd import LANES
from .ssd import ssd
from .step import can_update, state_update, window_update

Function = Callable[..., Any]
_FAMILIES = ("mamba", "falcon_mamba", "mamba2", "zamba2")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_originals: dict[tuple[ModuleType, str], Function] = {}


def _supported(*tensors: Tensor | None) -> bool:
    present = [x for x in tensors if x is not None]
    return all(x.device.type == "cpu" and x.dtype in _DTYPES for x in present) and not torch.compiler.is_compiling()


def _packed(arguments: dict[str, Any]) -> bool:
    return arguments.get("seq_idx") is not None or arguments.get("cu_seqlens") is not None


def _mamba_selective_scan(original: Function) -> Function:
    @functools.wraps(original)
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **options: Any,
    ) -> Any:
        if _packed(options) or not _supported(hidden_states, dt, A, B, C, D, z, delta_bias):
            return original(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, return_last_state, **options)
        u, dt, B, C = (x.transpose(1, 2) for x in (hidden_states.float(), dt, B, C))
        gate = None if z is None else z.transpose(1, 2)
        y, state = selective_scan(u, dt, A, B, C, D, gate, delta_bias, delta_softplus)
        return (y.transpose(1, 2), state) if return_last_state else y.transpose(1, 2)

    return scan


def _mamba2_chunk_scan(original: Function) -> Function:
    @functools.wraps(original)
    def scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **options: Any,
    ) -> Any:
        if _packed(options) or not _supported(hidden_states, dt, A, B, C, D, dt_bias, initial_states):
            return original(
                hidden_states,
                dt,
                A,
                B,
                C,
                chunk_size,
                D,
                dt_bias,
                initial_states,
                dt_softplus,
                dt_limit,
                return_final_states,
                **options,
            )
        y, state = ssd(hidden_states.float(), dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial_states)
        return (y, state) if return_final_states else y

    return scan


def _causal_conv1d_fn(original: Function) -> Function:
    @functools.wraps(original)
    def convolution(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **options: Any
    ) -> Tensor:
        if _packed(options) or activation not in ("silu", "swish", None) or not _supported(hidden_states, weight, bias):
            return original(hidden_states, weight, bias, activation, **options)
        return causal_conv(hidden_states.transpose(1, 2), weight, bias, activation is not None).transpose(1, 2)

    return convolution


def _mamba_selective_state_update(original: Function) -> Function:
    @functools.wraps(original)
    def update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        supported = _supported(state, hidden_states, dt, A, B, C, D, dt_bias, z)
        if not supported or D is None or dt_bias is None or not can_update(state, *A.shape):
            return original(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **options)
        y = state_update(state, hidden_states, dt, A, B[:, None], C[:, None], D, z, dt_bias, dt_softplus)
        return y.to(hidden_states.dtype)

    return update


def _mamba2_selective_state_update(original: Function) -> Function:
    @functools.wraps(original)
    def update(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        H, P, N = state.shape[1:]
        supported = _supported(state, hidden_states, dt, A, B, C, D, dt_bias, z) and A.stride()[1:] == (0, 0)
        if not supported or D is None or dt_bias is None or not can_update(state, H * P, N):
            return original(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z, **options)
        gate = None if z is None else z.flatten(1)
        decay = A[..., 0].flatten()  # one per head, repeated over its channels
        x, dt, D, dt_bias = hidden_states.flatten(1), dt.flatten(1), D.flatten(), dt_bias.flatten()
        y = state_update(state.view(-1, H * P, N), x, dt, decay, B, C, D, gate, dt_bias, dt_softplus)
        return y.view(hidden_states.shape).to(hidden_states.dtype)

    return update


def _causal_conv1d_update(original: Function) -> Function:
    @functools.wraps(original)
    def update(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        channels, length = hidden_states.shape[1:]
        supported = _supported(hidden_states, conv_state, weight, bias) and activation in ("silu", "swish", None)
        one_token = length == 1 and conv_state.shape[-1] == weight.shape[-1]
        if not supported or not one_token or bias is None or not can_update(conv_state, channels, LANES):
            return original(hidden_states, conv_state, weight, bias, activation)
        y = window_update(conv_state, hidden_states[..., 0], weight, bias, activation is not None)
        return y[..., None].to(hidden_states.dtype)

    return update


_REPLACEMENTS: dict[str, Callable[[Function], Function]] = {
    "mamba_selective_scan": _mamba_selective_scan,
    "mamba2_chunk_scan": _mamba2_chunk_scan,
    "causal_conv1d_fn": _causal_conv1d_fn,
    "mamba_selective_state_update": _mamba_selective_state_update,
    "mamba2_selective_state_update": _mamba2_selective_state_update,
    "causal_conv1d_update": _causal_conv1d_update,
}


def _modeling_modules() -> list[ModuleType]:
    for family in _FAMILIES:
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return [m for name, m in sys.modules.items() if name.startswith("transformers.models.") and ".modeling_" in name]


def install() -> None:
    """Use our scans in every loaded transformers model; call again after loading further modeling modules.

    Also lets the process keep freed memory (see memory.py), which outlasts `uninstall`. Does nothing when the
    environment variable SHEDDER_SCAN is "off".
    """
    if os.environ.get("SHEDDER_SCAN") == "off":
        return
    keep_freed_memory()
    for module in _modeling_modules():
        for name, replacement in _REPLACEMENTS.items():
            if name in vars(module) and (module, name) not in _originals:
                _originals[module, name] = vars(module)[name]
                setattr(module, name, replacement(_originals[module, name]))


def uninstall() -> None:
    """Give transformers its own functions back."""
    while _originals:
        (module, name), original = _originals.popitem()
        setattr(module, name, original)


@contextmanager
def installed() -> Iterator[None]:
    """Our scans inside, what was there before outside."""
    before = bool(_originals)
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def active() -> str:
    """Which scan runs on the CPU, for records: "shedder-numba" or "transformers"."""
    return "shedder-numba" if _originals else "transformers"
