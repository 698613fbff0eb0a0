"""Putting the CPU scans in the place of transformers' PyTorch fallbacks, and taking them out again.

Each modeling file of transformers has its own `mamba_selective_scan`, `mamba2_chunk_scan`, `causal_conv1d_fn` and
one-token updates, which its mixers look up as module globals at every call. `install()` replaces these attributes, so
that all models of these classes, those already built included, use our scans. Of its classes it replaces the `forward`
of RMS norms, seven passes over the memory, by torch's single one, of mixers for one token (decode.py) and of wide MLPs
(slices.py). Inputs that ours do not handle (another device, float64, an activation other than SiLU, packed sequences,
tracing by torch.compile) go on to the original function (packages.py).
"""

import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from . import decode
from .conv import causal_conv
from .fused import whole_mixer
from .memory import keep_freed_memory
from .packages import chosen_for_device, package_of, packed, readable
from .selective_scan import selective_scan
from .simd import LANES
from .slices import in_slices
from .ssd import ssd
from .step import can_update, state_update, window_update

Function = Callable[..., Any]
_FAMILIES = ("mamba", "falcon_mamba", "mamba2", "zamba2")
SCANS = ("mamba_selective_scan", "mamba2_chunk_scan")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_originals: dict[tuple[Any, str], Function] = {}
"""What was there before: by the module or class, and the name of its attribute."""


def _supported(*tensors: Tensor | None) -> bool:
    present = [x for x in tensors if x is not None]
    return all(x.device.type == "cpu" and x.dtype in _DTYPES for x in present) and not torch.compiler.is_compiling()


def _float32(*tensors: Tensor | None) -> bool:
    floats = all(x is None or (x.dtype == torch.float32 and x.device.type == "cpu") for x in tensors)
    return floats and not torch.compiler.is_compiling()


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
        if hidden_states.is_meta:  # there are shapes only, for which the original would go from token to token
            y, state = torch.empty_like(hidden_states), A.new_empty(len(hidden_states), *A.shape, dtype=torch.float32)
            return (y, state) if return_last_state else y
        if packed(options) or not _supported(hidden_states, dt, A, B, C, D, z, delta_bias):
            options |= {"delta_softplus": delta_softplus, "return_last_state": return_last_state}
            return original(hidden_states, dt, A, B, C, D=D, z=z, delta_bias=delta_bias, **options)
        u, dt, B, C = (x.transpose(1, 2) for x in (hidden_states.float(), dt, B, C))
        gate = None if z is None else z.transpose(1, 2)
        y, state = selective_scan(u, dt, A, B, C, D, gate, delta_bias, delta_softplus)
        return (y.transpose(1, 2), state.contiguous()) if return_last_state else y.transpose(1, 2)

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
        if packed(options) or not _supported(hidden_states, dt, A, B, C, D, dt_bias, initial_states):
            options |= {"D": D, "dt_bias": dt_bias, "dt_softplus": dt_softplus, "dt_limit": dt_limit}
            options |= {"initial_states": initial_states, "return_final_states": return_final_states}
            return original(hidden_states, dt, A, B, C, chunk_size, **options)
        y, state = ssd(hidden_states.float(), dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial_states)
        return (y, state) if return_final_states else y

    return scan


def _causal_conv1d_fn(original: Function) -> Function:
    @functools.wraps(original)
    def convolution(
        hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **options: Any
    ) -> Tensor:
        if packed(options) or activation not in ("silu", "swish", None) or not _supported(hidden_states, weight, bias):
            return original(readable(hidden_states), weight, bias=bias, activation=activation, **options)
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
            options |= {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus}
            return original(state, hidden_states, dt, A, B, C, **options)
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
        by_head = A.stride()[1:] == (0, 0) and dt.stride(-1) == 0 and P % LANES == 0
        supported = by_head and _supported(state, hidden_states, dt, A, B, C, D, dt_bias, z)
        if not supported or D is None or dt_bias is None or not can_update(state, H * P, N):
            options |= {"D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": dt_softplus}
            return original(state, hidden_states, dt, A, B, C, **options)
        gate = None if z is None else z.flatten(1)
        x, steps, decays = hidden_states.flatten(1), dt[..., 0], A[:, 0, 0]
        y = state_update(state.view(-1, H * P, N), x, steps, decays, B, C, D[:, 0], gate, dt_bias[:, 0], dt_softplus)
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
            return original(hidden_states, conv_state, weight, bias=bias, activation=activation)
        y = window_update(conv_state, hidden_states[..., 0], weight, bias, activation is not None)
        return y[..., None].to(hidden_states.dtype)

    return update


def _rms_norm(original: Function) -> Function:
    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        weight = self._parameters.get("weight")  # Falcon-Mamba's norms on B, C and dt have none
        eps = self.eps if weight is None else self.variance_epsilon
        if not _float32(hidden_states, weight):
            return original(self, hidden_states)
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], weight, eps)

    return forward


def _gated_rms_norm(original: Function) -> Function:
    @functools.wraps(original)
    def forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        weight = self.weight
        if gate is None or not _float32(hidden_states, gate, weight):
            return original(self, hidden_states, gate)
        gated, eps = hidden_states * F.silu(gate), self.variance_epsilon
        if self.group_size == weight.numel():
            return F.rms_norm(gated, weight.shape, weight, eps)
        groups = gated.unflatten(-1, (-1, self.group_size))
        return weight * F.rms_norm(groups, groups.shape[-1:], eps=eps).flatten(-2)

    return forward


def _mixer(original: Function) -> Function:
    @functools.wraps(original)
    def forward(
        self: nn.Module,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        if cache_params is None or not decode.can_step(self, hidden_states, cache_params, attention_mask):
            return original(self, hidden_states, cache_params, attention_mask, **options)
        return decode.step(self, hidden_states, cache_params)

    return forward


_REPLACEMENTS: dict[str, Callable[[Function], Function]] = {
    "mamba_selective_scan": _mamba_selective_scan,
    "mamba2_chunk_scan": _mamba2_chunk_scan,
    "causal_conv1d_fn": _causal_conv1d_fn,
    "mamba_selective_state_update": _mamba_selective_state_update,
    "mamba2_selective_state_update": _mamba2_selective_state_update,
    "causal_conv1d_update": _causal_conv1d_update,
    "mamba_inner_fn": whole_mixer,
    "mamba2_split_conv1d_scan_combined": whole_mixer,
}


def _mlp(original: Function) -> Function:
    return in_slices(original, "down_proj")


_CLASSES = {"RMSNorm": _rms_norm, "RMSNormGated": _gated_rms_norm, "Mixer": _mixer, "MLP": _mlp}
"""What takes the place of a class's `forward`, by the end of the class's name."""


def _replaceable() -> Iterator[tuple[Any, str, Callable[[Function], Function]]]:
    """The functions in transformers' loaded modeling files, and classes of the covered ones: place, name and ours."""
    covered = [importlib.import_module(f"transformers.models.{family}.modeling_{family}") for family in _FAMILIES]
    for place, module in list(sys.modules.items()):
        if place.startswith("transformers.models.") and ".modeling_" in place:
            yield from ((module, name, _around(ours)) for name, ours in _REPLACEMENTS.items() if name in vars(module))
    for module in covered:
        for name, found in vars(module).items():
            for end, ours in _CLASSES.items():
                if name.endswith(end) and found.__module__ == module.__name__:
                    yield found, "forward", ours


def _around(ours: Callable[[Function], Function]) -> Callable[[Function], Function]:
    return lambda original: ours(chosen_for_device(original))


def install() -> None:
    """Use our scans in every loaded transformers model; call again after loading further modeling modules.

    Also lets the process keep freed memory (see memory.py), which outlasts `uninstall`. Does nothing when the
    environment variable SHEDDER_SCAN is "off".
    """
    if os.environ.get("SHEDDER_SCAN") == "off":
        return
    keep_freed_memory()
    for place, name, ours in _replaceable():
        if (place, name) not in _originals:
            _originals[place, name] = getattr(place, name)
            setattr(place, name, ours(_originals[place, name]))


def uninstall() -> None:
    """Give transformers its own functions back."""
    while _originals:
        (place, name), original = _originals.popitem()
        setattr(place, name, original)


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


def active(device: str | torch.device = "cpu") -> str:
    """Which scan runs on a device, for records: "shedder-numba", "mamba_ssm" or "transformers".

    Ours is for CPUs. On others transformers takes the kernels of mamba_ssm if it could import them, for each of its
    modeling files at the time when that was imported.
    """
    if torch.device(device).type == "cpu":
        return "shedder-numba" if _originals else "transformers"
    modules = [importlib.import_module(f"transformers.models.{family}.modeling_{family}") for family in _FAMILIES]
    scans = [vars(module)[name] for module in modules for name in SCANS if name in vars(module)]
    return "mamba_ssm" if all(package_of(scan) == "mamba_ssm" for scan in scans) else "transformers"
