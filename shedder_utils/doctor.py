"""Doctor: what is installed here, which scan will run, and what a profile still lacks, with the line that mends it."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

from .devices import device_error
from .files import ROOT
from .profiles import Profile

PROJECT = "mamba-shedder-companion"
KERNELS = {"mamba-ssm": "mamba_ssm", "causal-conv1d": "causal_conv1d"}
"""The packages of GPU kernels, and the module that fails to import where they were not built."""
SHOWN = ("torch", "transformers", "lm-eval", "datasets", "peft", "numba", *KERNELS)
INSTALL = "make clean, then make setup; with conda: conda env update -f environment.yml"
INSTALL_KERNELS = "make setup-gpu"
REBUILD_KERNELS = "build them for this GPU: requirements/gpu.txt says how"
REPLACE_TORCH = (
    "on a machine with an NVIDIA GPU: make clean, then make setup-gpu; for an older GPU or driver with "
    "TORCH_INDEX=<address of PyTorch's index for an older CUDA>"
)


@dataclass(frozen=True)
class Finding:
    """One thing looked at: what was found, and if it is not as needed, the line that mends it."""

    name: str
    found: str
    remedy: str | None = None


def examine(profile: Profile | None = None) -> list[Finding]:
    """Everything that bears on a run; remedies are for what the profile needs, or for any run if none is given."""
    on_gpu = profile is not None and profile.device == "cuda"
    findings = [
        Finding("python", f"{platform.python_version()} in {sys.prefix}"), *_packages(), *_kernels(on_gpu),
        _scan(on_gpu), _gpu(on_gpu),
        Finding("threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores"), Finding("memory", _memory()),
    ]  # fmt: skip
    return findings + (_models(profile) if profile else [])


def scan(device: str) -> str:
    """Which scan will run on a device: the kernels of mamba_ssm, this package's own, or transformers' fallback."""
    if device == "cuda":
        return (
            "mamba_ssm"
            if all(_import_error(module) is None for module in KERNELS.values())
            else "transformers fallback"
        )
    if os.environ.get("SHEDDER_SCAN") == "off":
        return "transformers fallback (SHEDDER_SCAN is off)"
    return "shedder-numba" if _import_error("numba") is None else "transformers fallback"


def _scan(on_gpu: bool) -> Finding:
    """Which scan will run, and what a kernel fails with on this GPU if it was built for others."""
    name = scan("cuda" if on_gpu else "cpu")
    error = _launch_error() if name == "mamba_ssm" and torch.cuda.is_available() else None
    return Finding("scan", f"{name}, which fails here: {error}", REBUILD_KERNELS) if error else Finding("scan", name)


def _launch_error() -> str | None:
    """What the smallest launches fail with, in one line, or None.

    One is of CUDA's, built for certain GPUs, as both packages are; one is of Triton's, which wants a compiler here.
    """
    try:
        ones = torch.ones(1, 8, 4, device="cuda")
        import_module("causal_conv1d").causal_conv1d_fn(ones, ones[0]).sum().item()
        x, state = ones[..., 0], ones.new_ones(1, 8, 16)
        update = import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update
        update(state, x, x, -state[0], state[:, 0], state[:, 0], D=x[0], dt_bias=x[0]).sum().item()
    except Exception as error:  # Triton raises many kinds
        return str(error).split("\n")[0]
    return None


def _packages() -> list[Finding]:
    """The versions of what matters, and whatever the project requires and is missing or too old."""
    shown = [Finding(name, _version(name) or "not installed") for name in SHOWN if name not in KERNELS]
    wrong = []
    for requirement in map(Requirement, _requirements()):
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(Finding(str(requirement), f"found {found or 'none'}", INSTALL))
    return shown + wrong


def _requirements() -> list[str]:
    try:
        return [line for line in requires(PROJECT) or [] if "extra ==" not in line]
    except PackageNotFoundError:
        return []


def _kernels(needed: bool) -> list[Finding]:
    findings = []
    for name, module in KERNELS.items():
        found = _version(name)
        error = _import_error(module)
        state = (
            "not installed" if found is None else found if error is None else f"{found}, which does not import: {error}"
        )
        findings.append(Finding(name, state, INSTALL_KERNELS if needed and error else None))
    return findings


def _gpu(needed: bool) -> Finding:
    """Which GPUs there are, and what computing on them fails with."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = ", ".join(
        f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, compute capability {gpu.major}.{gpu.minor}" for gpu in gpus
    )
    error, ours = device_error("cuda"), f"torch {torch.__version__}"
    if error is None:
        return Finding("GPU", found)
    found = f"{found}, on which {ours} fails: {error}" if gpus else f"none that {ours} can use: {error}"
    return Finding("GPU", found, REPLACE_TORCH if needed else None)


def _models(profile: Profile) -> list[Finding]:
    """The profile's models that are not here yet, and whether they would come."""
    from .cost_plan import is_here

    here = {name: model for name, model in profile.models.items() if model.ref and is_here(model.ref, model.revision)}
    absent = {name: model for name, model in profile.models.items() if model.ref and name not in here}
    findings = [Finding(name, "here") for name in here]
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    remedy = "unset HF_HUB_OFFLINE" if offline else None
    return findings + [
        Finding(name, f"not here: {model.download_gb:g} GB from {model.ref} at the first run", remedy)
        for name, model in absent.items()
    ]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    """What importing a module fails with, in one line, or None: compiled ones may be installed and still fail."""
    try:
        import_module(module)
    except Exception as error:  # a broken extension may raise anything, and a check-up goes on to the next finding
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _memory() -> str:
    """Memory of the machine, GiB."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError):
        return "unknown"
    return f"{total:.0f} GiB; the project lies in {ROOT}"
