"""Provenance: on which machine, with which versions and code a number was made, and what it cost."""

import platform
import resource
import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "lm_eval": "lm_eval",
    "numba": "numba",
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
    "shedder_utils": "mamba-shedder-companion",
}


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Environment(_Facts):
    """Versions, hardware and the scan that ran: what may move a number without being an input of it.

    mamba_ssm, causal_conv1d: not in a record where they are not installed.
    """

    python: str
    torch: str | None
    transformers: str | None
    lm_eval: str | None
    numba: str | None
    mamba_ssm: str | None = Field(default=None, exclude_if=lambda version: version is None)
    causal_conv1d: str | None = Field(default=None, exclude_if=lambda version: version is None)
    shedder_utils: str | None
    device: str
    cpu: str
    threads: int
    scan: str


class Code(_Facts):
    """The commit of this package's code; dirty when it was changed since. Both None outside a checkout."""

    commit: str | None
    dirty: bool | None


class Cost(_Facts):
    """Wall time in seconds, and the peak of the process's resident memory in MiB, with the model it holds."""

    seconds: float
    peak_mib: float


def environment(device: str = "cpu") -> Environment:
    """Describe this machine and its versions.

    device: where it computed, such as "cuda:0"; a GPU is described by its name.
    """
    import torch

    from . import kernels

    versions = {name: _version(package) for name, package in PACKAGES.items()}
    return Environment(
        python=platform.python_version(),
        device=torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        cpu=_cpu_name(),
        scan=kernels.active(device),
        threads=torch.get_num_threads(),
        **versions,
    )


def code_version() -> Code:
    """The checkout's commit, and whether the package's code differs from it; an installed copy has neither."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return Code(commit=None, dirty=None)
    commit = _git("rev-parse", "HEAD")
    return Code(commit=commit or None, dirty=bool(_git("status", "--porcelain", "--", ".")))


class Meter:
    """Context manager that measures what its body costs; `.cost` is there when the body ends."""

    cost: Cost

    def __enter__(self) -> "Meter":
        global _earlier_mib
        reset_peak()
        _earlier_mib = 0.0
        self._started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        seconds = time.perf_counter() - self._started
        self.cost = Cost(seconds=round(seconds, 3), peak_mib=round(max(_earlier_mib, peak_mib()), 1))


_earlier_mib = 0.0
"""The highest of the peaks that were reset inside the body of a `Meter`."""


def reset_peak() -> bool:
    """Start the kernel's high-water mark anew; False where it cannot be: then the mark is that of the whole process.

    What earlier work has freed is given back first, so that it does not count. Computing is slower for a moment then.
    Only Linux starts it anew, and not every build of it, so what it holds afterwards is looked at: a mark that began
    now is what the process holds now, but for the few MiB that the kernel's counters lag behind.
    """
    global _earlier_mib
    from .kernels.memory import give_back_freed_memory

    _earlier_mib = max(_earlier_mib, peak_mib())
    give_back_freed_memory()
    if sys.platform != "linux":
        return False
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_mib() < _status_mib("VmRSS") + 16


def peak_mib() -> float:
    """The highest resident memory of the process, in MiB, since `reset_peak`."""
    if sys.platform == "linux":
        return _status_mib("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _status_mib(field: str) -> float:
    return int(_proc_field("/proc/self/status", field).removesuffix(" kB")) / 1024


def _cpu_name() -> str:
    if sys.platform == "linux":
        return _proc_field("/proc/cpuinfo", "model name") or platform.machine()
    return platform.processor() or platform.machine()


def _proc_field(path: str, field: str) -> str:
    """The first value of a field in one of Linux' "field: value" files; empty when it is not there."""
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == field:
            return value.strip()
    return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git in the package's folder; None when git is missing or refuses."""
    try:
        run = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
