"""mamba_ssm 2.3.2.post1 and causal_conv1d 1.6.2.post1 as transformers calls them, in plain PyTorch.

Their functions have the packages' own arguments, in the packages' order, and refuse what the packages refuse: shapes,
dtypes, strides. They compute what the kernels compute, token by token.

B batch, E channels, L tokens, N state size, H heads, P head width, G groups, K convolution taps.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations import use_kernel_func_from_hub_with_fallback

from shedder_utils import kernels
from shedder_utils.kernels import decode, packages, patching

INFINITE = float("inf")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
MODELING = [importlib.import_module(f"transformers.models.{family}.modeling_{family}")
            for family in ("mamba", "falcon_mamba", "mamba2", "zamba2")]  # fmt: skip


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False, final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:  # fmt: skip
    assert activation in (None, "silu", "swish")
    assert (seq_idx, initial_states, return_final_states, final_states_out) == (None, None, False, None)
    if x.stride(2) != 1 and x.stride(1) != 1:
        x = x.contiguous()
    if x.stride(1) == 1 and x.stride(2) > 1:
        assert x.shape[1] % 8 == 0, "causal_conv1d only supports channel dimension divisible by 8 for now"
        assert x.stride(2) % 8 == 0 == x.stride(0) % 8, "channel last layout requires strides to be multiples of 8"
        assert x.storage_offset() % 8 == 0, "misaligned address"
    _check_convolution(x, weight, bias)
    return _convolved(F.pad(x, (weight.shape[1] - 1, 0)), weight, bias, activation).to(x.dtype)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert activation in (None, "silu", "swish")
    assert (cache_seqlens, conv_state_indices, conv_state.dtype) == (None, None, x.dtype)
    assert conv_state.shape[:2] == x.shape[:2]
    assert conv_state.shape[2] >= weight.shape[1] - 1
    _check_convolution(x, weight, bias)
    seen = torch.cat([conv_state, x], dim=-1)
    conv_state.copy_(seen[..., -conv_state.shape[2] :])
    return _convolved(seen, weight, bias, activation)[..., -x.shape[2] :].to(x.dtype)


def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, z: Tensor | None = None,
    delta_bias: Tensor | None = None, delta_softplus: bool = False, return_last_state: bool = False,
) -> Any:  # fmt: skip
    (batch, E, L), N = u.shape, A.shape[1]
    assert u.dtype in FLOATS
    assert N <= 256
    assert {x.dtype for x in (delta, B, C, z) if x is not None} == {u.dtype}
    assert {x.dtype for x in (A, D, delta_bias) if x is not None} == {torch.float32}
    assert delta.shape == u.shape == (u if z is None else z).shape
    assert B.shape == C.shape == (batch, N, L)
    assert A.shape[0] == E
    dt = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt
    state, outputs = torch.zeros(batch, E, N), []
    for t in range(L):
        state = state * torch.exp(dt[:, :, t, None] * A) + (dt * u)[:, :, t, None] * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, dim=-1)
    y = y if D is None else y + u * D[:, None]
    y = (y if z is None else y * F.silu(z)).to(u.dtype)
    return (y, state) if return_last_state else y


def mamba_inner_fn(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor, delta_proj_weight: Tensor,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor, B: Tensor | None = None, C: Tensor | None = None,
    D: Tensor | None = None, delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None, delta_softplus: bool = True, checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None, c_rms_weight: Tensor | None = None, dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:  # fmt: skip
    """dt is normed after its projection."""
    assert (B, C, B_proj_bias, C_proj_bias) == (None, None, None, None)
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_fn(x.contiguous(), conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rank, N = delta_proj_weight.shape[1], A.shape[1]
    dt, b, c = F.linear(x.transpose(1, 2), x_proj_weight).split([rank, N, N], dim=-1)
    dt = F.linear(dt, delta_proj_weight)
    dt, b, c = (part if weight is None else F.rms_norm(part, weight.shape, weight, b_c_dt_rms_eps)
                for part, weight in ((dt, dt_rms_weight), (b, b_rms_weight), (c, c_rms_weight)))  # fmt: skip
    dt, b, c = (part.transpose(1, 2) for part in (dt, b, c))
    y = selective_scan_fn(x, dt, A, b, c, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Without heads it takes all channels for those of one head."""
    if state.dim() == 3:
        one_head = (None if part is None else part[:, None] for part in (state, x, dt, B, C, z))
        of_weights = (None if part is None else part[None] for part in (A, D, dt_bias))
        (state, x, dt, B, C, z), (A, D, dt_bias) = one_head, of_weights
        return selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, state_batch_indices)[:, 0]
    (batch, H, P, N), G = state.shape, B.shape[1]
    assert state_batch_indices is None
    assert x.shape == dt.shape == (x if z is None else z).shape == (batch, H, P)
    assert A.shape == (H, P, N)
    assert B.shape == C.shape == (batch, G, N)
    assert {part.shape for part in (D, dt_bias) if part is not None} == {(H, P)}
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias
    dt = F.softplus(dt) if dt_softplus else dt
    B, C = (part.repeat_interleave(H // G, dim=1)[:, :, None] for part in (B, C))
    state.copy_(state * torch.exp(dt[..., None] * A) + (dt * x)[..., None] * B)
    y = (state * C).sum(-1)
    y = y if D is None else y + x * D
    return (y if z is None else y * F.silu(z)).to(x.dtype)


def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, INFINITE), return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Any:  # fmt: skip
    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    assert isinstance(chunk_size, int)
    assert (z, seq_idx, cu_seqlens, return_varlen_states, H % G) == (None, None, None, False, 0)
    assert dt.shape == (batch, L, H)
    assert A.shape == (H,)
    assert B.shape == C.shape == (batch, L, G, N)
    assert D is None or D.shape in ((H,), (H, P))
    assert initial_states is None or initial_states.shape == (batch, H, P, N)
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit)
    b, c = (part.repeat_interleave(H // G, dim=2)[:, :, :, None] for part in (B, C))
    state, outputs = torch.zeros(batch, H, P, N) if initial_states is None else initial_states.float(), []
    for t in range(L):
        state = state * torch.exp(dt[:, t] * A)[..., None, None] + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t]
        outputs.append((state * c[:, t]).sum(-1))
    y = torch.stack(outputs, dim=1)
    y = (y if D is None else y + x * D.view(H, -1)).to(x.dtype)
    return (y, state) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor, A: Tensor, D: Tensor,
    chunk_size: int, initial_states: Tensor | None = None, seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, INFINITE), return_final_states: bool = False, activation: str = "silu",
    rmsnorm_weight: Tensor | None = None, rmsnorm_eps: float = 1e-6, outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None, headdim: int | None = None, ngroups: int = 1, norm_before_gate: bool = True,
) -> Tensor:  # fmt: skip
    assert (initial_states, seq_idx, return_final_states, norm_before_gate) == (None, None, False, False)
    assert headdim is not None
    assert rmsnorm_weight is not None
    E, width = len(A) * headdim, len(conv1d_weight)
    assert width % 8 == 0, "Number of convolution channels is required to be a multiple of 8."
    z, xbc, dt = zxbcdt.split([E, width, len(A)], dim=-1)
    xbc = causal_conv1d_fn(xbc.transpose(1, 2).contiguous(), conv1d_weight, conv1d_bias, activation=activation)
    x, B, C = xbc.transpose(1, 2).split([E, (width - E) // 2, (width - E) // 2], dim=-1)
    x, B, C = x.unflatten(-1, (-1, headdim)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))
    options = {"D": D, "dt_bias": dt_bias, "dt_softplus": True, "dt_limit": dt_limit}
    y = mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, **options).flatten(2) * F.silu(z)
    y = F.rms_norm(y.unflatten(-1, (ngroups, -1)), (E // ngroups,), eps=rmsnorm_eps).flatten(2)
    return F.linear(y * rmsnorm_weight, outproj_weight, outproj_bias)


PLACES = {
    "causal_conv1d": (causal_conv1d_fn, causal_conv1d_update),
    "mamba_ssm": (),
    "mamba_ssm.ops": (),
    "mamba_ssm.ops.selective_scan_interface": (selective_scan_fn, mamba_inner_fn),
    "mamba_ssm.ops.triton": (),
    "mamba_ssm.ops.triton.ssd_combined": (mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined),
    "mamba_ssm.ops.triton.selective_state_update": (selective_state_update,),
}
"""The packages' modules, parents before children, and what is in them."""


@contextmanager
def packages_at_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Inside, transformers has found the packages, and we take no input: all goes where it goes on a GPU.

    Yields how often each kernel was called.
    """
    calls: Counter[str] = Counter()
    kernels.uninstall()
    with monkeypatch.context() as changes:
        for place, functions in PLACES.items():
            _add_module(changes, place, [_counted(function, place, calls) for function in functions])
        for module in MODELING:
            for name, function in list(vars(module).items()):
                chosen = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
                if chosen.get("package") in PLACES:  # what transformers' decorator would make of it now
                    decorator = use_kernel_func_from_hub_with_fallback(chosen["func_name"], chosen["package"])
                    changes.setattr(module, name, decorator(inspect.unwrap(function)))
        changes.setattr(patching, "_supported", lambda *_: False)
        changes.setattr(packages, "on_gpu", lambda _: True)
        changes.setattr(decode, "can_step", lambda *_: False)
        try:
            kernels.install()
            yield calls
        finally:
            kernels.uninstall()
    kernels.install()


def _add_module(changes: pytest.MonkeyPatch, place: str, functions: list[Callable[..., Any]]) -> None:
    module: Any = ModuleType(place)
    module.__spec__, module.__path__ = ModuleSpec(place, None, is_package=True), []
    for function in functions:
        setattr(module, function.__name__, function)
    changes.setitem(sys.modules, place, module)
    parent, _, child = place.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)


def _counted(function: Callable[..., Any], place: str, calls: Counter[str]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted(*inputs: Any, **options: Any) -> Any:
        calls[function.__name__] += 1
        return function(*inputs, **options)

    counted.__module__ = place
    return counted


def _check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    assert x.dtype in FLOATS
    assert weight.dtype in FLOATS
    assert weight.shape[0] == x.shape[1]
    assert 2 <= weight.shape[1] <= 4
    assert bias is None or (bias.shape == weight.shape[:1] and bias.dtype == weight.dtype and bias.stride(-1) == 1)


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    y = F.conv1d(x.to(weight.dtype), weight[:, None], bias, groups=len(weight))
    return y if activation is None else F.silu(y)
