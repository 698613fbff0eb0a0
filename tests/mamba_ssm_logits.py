"""The logits of a checkpoint as mamba_ssm's own model computes them on a CPU, in a process of its own.

    python mamba_ssm_logits.py FOLDER IDS     writes FOLDER/logits.pt; IDS: a JSON list

Its loader, its modules, and in the place of its kernels the functions in plain Python that it ships beside them:
`selective_scan_ref`, `ssd_minimal_discrete` and `rms_norm_ref`. A process of its own, because transformers would take
the module that stands in here for compiled kernels.

B batch, L tokens, H heads, P head width, G groups, N state size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.modules["selective_scan_cuda"] = ModuleType("selective_scan_cuda")

from mamba_ssm.models import mixer_seq_simple  # noqa: E402
from mamba_ssm.modules import mamba2, mamba_simple  # noqa: E402
from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete  # noqa: E402
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref  # noqa: E402
from mamba_ssm.ops.triton.layernorm_gated import rms_norm_ref  # noqa: E402


def convolution(x: Tensor, weight: Tensor, bias: Tensor, **_: Any) -> Tensor:
    """silu of the causal depthwise convolution of x (B, channels, L), which mamba_ssm takes from another package."""
    padded = F.pad(x, (weight.shape[1] - 1, 0))
    return F.silu(F.conv1d(padded, weight[:, None], bias, groups=len(weight)))


def scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Tensor, dt_bias: Tensor, **_: Any
) -> Tensor:
    """`ssd_minimal_discrete` of each group, with the step sizes and D that it leaves to its caller; (B, L, H, P)."""
    dt = F.softplus(dt + dt_bias)
    x_dt, A_dt, heads = x * dt[..., None], A * dt, x.shape[2] // B.shape[2]
    groups = zip(x_dt.split(heads, 2), A_dt.split(heads, 2), B.split(1, 2), C.split(1, 2), strict=True)
    parts = [ssd_minimal_discrete(*group, chunk_size)[0] for group in groups]
    return torch.cat(parts, dim=2) + D[:, None] * x


def gated_norm(self: Any, x: Tensor, z: Tensor) -> Tensor:
    """What Mamba-2's norm computes, by the function beside its kernel."""
    options = {"z": z, "eps": self.eps, "group_size": self.group_size, "norm_before_gate": self.norm_before_gate}
    return rms_norm_ref(x, self.weight, self.bias, **options)


def main(folder: Path, ids: list[int]) -> None:
    """Write the logits (L, V) of one sequence."""
    mixer_seq_simple.RMSNorm = torch.nn.RMSNorm
    mamba_simple.selective_scan_fn, mamba_simple.causal_conv1d_fn = selective_scan_ref, None
    mamba2.mamba_chunk_scan_combined, mamba2.causal_conv1d_fn = scan, convolution
    mamba2.RMSNormGated.forward = gated_norm
    model = mixer_seq_simple.MambaLMHeadModel.from_pretrained(str(folder), device="cpu", dtype=torch.float32)
    for layer in model.backbone.layers:
        layer.mixer.use_mem_eff_path = False
    with torch.no_grad():
        torch.save(model(torch.tensor([ids])).logits[0], folder / "logits.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
