"""The Mamba-2 recurrence (SSD) on the CPU, as one differentiable function.

    h[t] = exp(delta[t] * A) * h[t-1] + delta[t] * x[t] B[t]^T,   y[t] = C[t] . h[t] + D * x[t]

with one decay per head and delta = clamp(softplus(dt + dt_bias)). On a CPU the plain recurrence beats the chunked
matrix form: no exponential is left in the inner loop, and no matrix of token pairs is ever formed. torch computes delta
and the decays (one number per token and head); the kernels (`ssd_kernels.py`) do the rest. The forward keeps the state
every 32 steps; the backward recomputes the states in between.
B batch, L tokens, H heads, P head width, G groups, N state size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ssd_kernels
from .layout import aligned, needs_gradient, pad_channels


class _Recurrence(torch.autograd.Function):
    """The recurrence as autograd sees it: P and N multiples of 16, x (B, L, H*P), B and C (B, L, G*N), states (B, H*P,
    N)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        x, delta, decay, B, C, D, initial, groups, keep = inputs
        batch, L, H = delta.shape
        E, N = x.shape[-1], initial.shape[-1]
        x, B, C, initial = (aligned(tensor) for tensor in (x, B, C, initial))
        y, last = torch.empty(batch, L, E), torch.empty(batch, E, N)
        saved = torch.empty(batch, -(-L // ssd_kernels.CHUNK) * E, N) if keep else None
        ssd_kernels.forward(
            batch * H * -(-E // H // 32),
            (L, H, E // H, N, groups),
            (x, delta, decay, B, C, D, initial, y, saved, last),
            scratch=ssd_kernels.forward_scratch(N),
            work=batch * L * E * N * 4 // 16,
        )
        if keep:
            ctx.save_for_backward(x, delta, decay, B, C, D, saved)
            ctx.groups = groups
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> Any:
        x, delta, decay, B, C, D, saved = ctx.saved_tensors
        batch, L, H = delta.shape
        E, N, G = x.shape[-1], saved.shape[-1], ctx.groups
        # Enough tasks for many cores, from the shape alone: the order of sums, hence the result, is always the same.
        parts = min(H // G, -(-16 // (batch * G)))
        dx, ddelta, ddecay, dD = (
            torch.empty(batch, L, E),
            torch.empty(batch, L, H),
            torch.empty(batch, L, H),
            torch.empty(batch, H),
        )
        dB, dC, dinitial = (
            torch.empty(parts * batch, L, G * N),
            torch.empty(parts * batch, L, G * N),
            torch.empty(batch, E, N),
        )
        ssd_kernels.backward(
            batch * G * parts,
            (parts, batch, L, H, E // H, N, G),
            (
                x,
                delta,
                decay,
                B,
                C,
                D,
                saved,
                aligned(dy),
                dlast.contiguous(),
                dx,
                ddelta,
                ddecay,
                dB,
                dC,
                dD,
                dinitial,
            ),
            scratch=ssd_kernels.backward_scratch(N),
            work=batch * L * E * N,
        )
        dB, dC = (partial.view(parts, batch, L, G * N).sum(0) for partial in (dB, dC))
        return dx, ddelta, ddecay, dB, dC, dD.sum(0), dinitial, None, None


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    softplus: bool = True,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The Mamba-2 recurrence (Dao and Gu 2024, SSD), differentiable in every tensor.

    Args: x (B, L, H, P); dt (B, L, H); A (H,), negative; B, C (B, L, G, N); D, dt_bias (H,); initial_state (B, H, P,
    N), zero if None; dt_limit clamps the step size after softplus. CPU tensors of float32, bfloat16 or float16;
    arithmetic is in float32.
    Returns: y (B, L, H, P) in x's dtype, and the state after the last token (B, H, P, N) in float32.
    Matches mamba_ssm's `mamba_chunk_scan_combined` (without z: Mamba-2's gate belongs to the norm behind it).
    """
    batch, L, H, P = x.shape
    G, N = B.shape[2:]
    delta = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    if softplus:
        delta = F.softplus(delta)
    delta = torch.clamp(delta, *dt_limit).contiguous()
    decay = torch.exp(delta * A.float())
    x_16, B_16, C_16 = pad_channels(x), pad_channels(B), pad_channels(C)
    shape = batch, H, x_16.shape[-1], B_16.shape[-1]
    if initial_state is None:
        start = delta.new_zeros(shape)
    else:
        start = F.pad(initial_state.float(), (0, shape[3] - N, 0, shape[2] - P))
    skip = delta.new_zeros(H) if D is None else D.float().contiguous()
    arguments = (x_16.flatten(2), delta, decay, B_16.flatten(2), C_16.flatten(2), skip, start.flatten(1, 2))
    y, last = _Recurrence.apply(*arguments, G, needs_gradient(*arguments))
    return y.view(batch, L, H, -1)[..., :P].to(x.dtype), last.view(shape)[:, :, :P, :N]
