"""The selective scan of Mamba-1 on the CPU, as one differentiable function.

    h[t] = exp(delta[t] * A) * h[t-1] + delta[t] * u[t] * B[t],   y[t] = (C[t] . h[t] + D * u[t]) * silu(z[t])

with delta = softplus(dt + dt_bias). The forward keeps the state every 32 steps; the backward recomputes the states in
between. The kernels (`scan_kernels.py`) hold states as (B, N, E), and A transposed and scaled by log2(e), so that exp
becomes exp2.
B batch, L tokens, E inner width, N state size.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import scan_kernels
from .layout import aligned, needs_gradient, pad_channels


class _SelectiveScan(torch.autograd.Function):
    """The scan as autograd sees it: E a multiple of 16, A (N, E) scaled by log2(e), states (B, N, E)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        u, dt, A, B, C, D, z, bias, initial, use_softplus, keep = inputs
        batch, L, E = u.shape
        N = A.shape[0]
        u, dt, B, C, z, initial = (aligned(x) for x in (u, dt, B, C, z, initial))
        y, last = torch.empty(batch, L, E), torch.empty(batch, N, E)
        saved = torch.empty(batch, -(-L // scan_kernels.CHUNK) * N, E) if keep else None
        groups = -(-E // (16 * scan_kernels.BLOCKS))
        scan_kernels.forward(
            batch * groups,
            (groups, L, E, N, use_softplus),
            (u, dt, A, B, C, D, z, bias, initial, y, saved, last),
            scratch=scan_kernels.forward_scratch(N),
            work=batch * L * E * N * 24 // 16,
        )
        if keep:
            ctx.save_for_backward(u, dt, A, B, C, D, z, bias, saved)
            ctx.use_softplus = use_softplus
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> Any:
        u, dt, A, B, C, D, z, bias, saved = ctx.saved_tensors
        batch, L, E = u.shape
        N = A.shape[0]
        # Enough tasks for many cores, from the shape alone: the order of sums, hence the result, is always the same.
        groups = min(-(-E // 64), -(-16 // batch))
        du, ddt, dz = (
            torch.empty(batch, L, E),
            torch.empty(batch, L, E),
            None if z is None else torch.empty(batch, L, E),
        )
        dA, dinitial, dD, dbias = (torch.empty(batch, *shape) for shape in ((N, E), (N, E), (E,), (E,)))
        dB, dC = torch.empty(groups * batch, L, N), torch.empty(groups * batch, L, N)
        scan_kernels.backward(
            batch * groups,
            (groups, batch, L, E, N, ctx.use_softplus),
            (
                u,
                dt,
                A,
                B,
                C,
                D,
                z,
                bias,
                saved,
                aligned(dy),
                aligned(dlast),
                du,
                ddt,
                dA,
                dB,
                dC,
                dD,
                dz,
                dbias,
                dinitial,
            ),
            scratch=scan_kernels.backward_scratch(N, -(-E // 16 // groups)),
            work=batch * L * E * N * 4,
        )
        dB, dC = (partial.view(groups, batch, L, N).sum(0) for partial in (dB, dC))
        return du, ddt, dA.sum(0) * math.log(2), dB, dC, dD.sum(0), dz, dbias.sum(0), dinitial, None, None


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The Mamba-1 recurrence (Gu and Dao 2023, algorithm 2), differentiable in every tensor.

    Args: u, dt, z (B, L, E); A (E, N), negative; B, C (B, L, N); D, dt_bias (E,); initial_state (B, E, N), zero if
    None. CPU tensors of float32, bfloat16 or float16; arithmetic is in float32.
    Returns: y (B, L, E) in u's dtype, and the state after the last token (B, E, N) in float32.
    Matches mamba_ssm's `selective_scan_fn`, here with the channels last.
    """
    batch, _, E = u.shape
    width = E + -E % 16
    zeros = u.new_zeros(width, dtype=torch.float32)
    start = zeros.new_zeros(batch, A.shape[1], width) if initial_state is None else initial_state.transpose(1, 2)
    arguments = (
        pad_channels(u),
        pad_channels(dt),
        pad_channels((A.float() * math.log2(math.e)).t()).contiguous(),
        B.float(),
        C.float(),
        zeros if D is None else pad_channels(D).contiguous(),
        None if z is None else pad_channels(z),
        zeros if dt_bias is None else pad_channels(dt_bias).contiguous(),
        pad_channels(start),
    )
    y, last = _SelectiveScan.apply(*arguments, softplus, needs_gradient(*arguments))
    return y[..., :E].to(u.dtype), last[..., :E].transpose(1, 2)
