"""The same recurrences, one token at a time in plain torch: what the fast ones are tested against.

Any dtype (float64 for references), any device, differentiable. Slow: a Python loop over the tokens. B batch, L tokens,
E inner width, N state size, H heads, P head width, G groups, C channels, K taps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Mamba-1's recurrence; arguments and results as in `kernels.selective_scan`, in the inputs' dtype."""
    delta = dt if dt_bias is None else dt + dt_bias
    delta = F.softplus(delta) if softplus else delta
    h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state
    outputs = []
    for t in range(u.shape[1]):
        step = delta[:, t, :, None]  # (B, E, 1)
        h = torch.exp(step * A) * h + step * u[:, t, :, None] * B[:, t, None, :]  # (B, E, N)
        outputs.append((h * C[:, t, None, :]).sum(-1))
    y = torch.stack(outputs, 1)
    y = y if D is None else y + D * u
    return (y if z is None else y * F.silu(z)), h


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
    """Mamba-2's recurrence; arguments and results as in `kernels.ssd`, in the inputs' dtype."""
    batch, L, H, P = x.shape
    delta = dt if dt_bias is None else dt + dt_bias
    delta = F.softplus(delta) if softplus else delta
    delta = delta.clamp(*dt_limit)
    B, C = (matrix.repeat_interleave(H // matrix.shape[2], dim=2) for matrix in (B, C))  # (B, L, H, N)
    h = x.new_zeros(batch, H, P, B.shape[-1]) if initial_state is None else initial_state
    outputs = []
    for t in range(L):
        decay = torch.exp(delta[:, t] * A)[..., None, None]  # (B, H, 1, 1)
        h = decay * h + (delta[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]  # (B, H, P, N)
        outputs.append((h * C[:, t, :, None, :]).sum(-1))
    y = torch.stack(outputs, 1)
    return (y if D is None else y + D[:, None] * x), h


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, silu: bool = True) -> Tensor:
    """Depthwise causal convolution; arguments and results as in `kernels.causal_conv`, in the inputs' dtype."""
    L, K = x.shape[1], weight.shape[1]
    padded = F.pad(x, (0, 0, K - 1, 0))
    a = torch.stack([padded[:, k : k + L] * weight[:, k] for k in range(K)]).sum(0)
    a = a if bias is None else a + bias
    return F.silu(a) if silu else a
