"""Devices: whether torch can compute on one, and a warning where models run on a GPU without kernels made for it."""

from __future__ import annotations

import torch


def device_error(device: str | torch.device) -> str | None:
    """What computing on a device fails with, in one line, or None where it works.

    A build of torch may have no CUDA, or none that the driver knows, or no code for this GPU, which only shows when
    something is computed there.
    """
    try:
        (torch.zeros(1, device=device) + 1).item()
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build without CUDA
        return str(error).strip().split("\n")[0].rstrip(".:")
    return None


def slow_scan(device: str | torch.device) -> str | None:
    """The line that warns of models on a GPU without the kernels of mamba_ssm; None where they run, and on a CPU."""
    from . import kernels

    if torch.device(device).type != "cuda" or kernels.active(device) == "mamba_ssm":
        return None
    return (
        "WARNING: the kernels of mamba_ssm do not run here; transformers' fallback goes from token to token and takes "
        "days in place of hours, and gigabytes more: make setup-gpu, and see python -m shedder_utils doctor with a "
        "--profile for GPUs"
    )
