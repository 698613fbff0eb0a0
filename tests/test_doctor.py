"""The doctor: what is here, which scan will run, and the line that mends what is not."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import Tensor

from shedder_utils import devices, doctor, kernels, profiles


def found(findings: list[doctor.Finding]) -> dict[str, str]:
    return {finding.name: finding.found for finding in findings}


def missing(findings: list[doctor.Finding]) -> dict[str, str]:
    return {finding.name: finding.remedy for finding in findings if finding.remedy}


def test_here_nothing_is_missing_for_the_default() -> None:
    findings = doctor.examine(profiles.load("pocket"))
    assert not missing(findings)
    assert found(findings)["torch"] == torch.__version__.split("+")[0] or torch.__version__ in found(findings)["torch"]
    assert found(findings)["pocket-mamba2"] == "here"


def test_the_scan_is_the_one_that_records_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with kernels.installed():
        assert doctor.scan("cpu") == kernels.active()
    monkeypatch.setenv("SHEDDER_SCAN", "off")
    assert doctor.scan("cpu") == "transformers fallback (SHEDDER_SCAN is off)"


def test_gpu_kernels_count_only_if_they_import(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in doctor.KERNELS.values():
        monkeypatch.setitem(sys.modules, module, None)
    assert doctor.scan("cuda") == "transformers fallback"
    for module in doctor.KERNELS.values():
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
    assert doctor.scan("cuda") == "mamba_ssm"
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)
    assert doctor.scan("cuda") == "transformers fallback"


def test_the_paper_wants_a_gpu_and_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(doctor, "device_error", lambda device: "no driver")
    monkeypatch.setattr(
        doctor, "_import_error", lambda module: None if module == "numba" else "ImportError: no such symbol"
    )
    remedies = missing(doctor.examine(profiles.load("paper")))
    assert remedies["mamba-ssm"] == "make setup-gpu"
    assert "make setup-gpu" in remedies["GPU"]
    assert f"none that torch {torch.__version__} can use: no driver" in found(doctor.examine()).values()
    assert not missing(doctor.examine(profiles.load("pocket")))


V100 = SimpleNamespace(name="Tesla V100", total_memory=32 * 2**30, major=7, minor=0)
NO_CODE = "CUDA error: no kernel image is available for execution on the device"


@pytest.fixture
def _on_a_v100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a V100, and tensors that lie on the CPU all the same."""
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: ones(*shape))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: V100)
    monkeypatch.setattr(doctor, "device_error", lambda device: None)
    for module in doctor.KERNELS.values():
        monkeypatch.setitem(sys.modules, module, ModuleType(module))


@pytest.mark.usefixtures("_on_a_v100")
def test_a_gpu_that_torch_has_no_code_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = doctor._gpu(needed=True)
    assert (gpu.found, gpu.remedy) == ("Tesla V100, 32 GiB, compute capability 7.0", None)
    monkeypatch.setattr(doctor, "device_error", lambda device: NO_CODE)
    gpu = doctor._gpu(needed=True)
    assert gpu.found.endswith(f"7.0, on which torch {torch.__version__} fails: {NO_CODE}")
    assert gpu.remedy
    assert "TORCH_INDEX" in gpu.remedy


@pytest.mark.usefixtures("_on_a_v100")
def test_kernels_that_were_built_for_other_gpus_or_have_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def update(
        state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor, dt_bias: Tensor
    ) -> Tensor:
        rows, width, size = state.shape
        assert x.shape == dt.shape == (rows, width)
        assert A.shape == (width, size)
        assert B.shape == C.shape == (rows, size)
        assert D.shape == dt_bias.shape == (width,)
        if not has_compiler:
            raise FileNotFoundError("no C compiler was found")
        return x

    triton = SimpleNamespace(selective_state_update=update)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.selective_state_update", triton)

    def convolution(x: Tensor, weight: Tensor) -> Tensor:
        assert (x.shape[1], 4) == weight.shape  # (B, E, L) and (E, width)
        if built_for_others:
            raise RuntimeError(f"{NO_CODE}\nand more lines")
        return x

    sys.modules["causal_conv1d"].__dict__["causal_conv1d_fn"] = convolution
    built_for_others, has_compiler = False, True
    assert doctor._scan(on_gpu=True) == doctor.Finding("scan", "mamba_ssm")
    has_compiler = False
    assert doctor._scan(on_gpu=True).found == "mamba_ssm, which fails here: no C compiler was found"
    built_for_others = True
    failing = doctor._scan(on_gpu=True)
    assert failing.found == f"mamba_ssm, which fails here: {NO_CODE}"
    assert failing.remedy
    assert "requirements/gpu.txt" in failing.remedy


def test_a_device_is_tried() -> None:
    assert devices.device_error("cpu") is None
    for device in ("cuda:99", "gpu"):
        error = devices.device_error(device)
        assert error
        assert "\n" not in error


def test_a_gpu_without_kernels_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "active", lambda device: "transformers")
    assert devices.slow_scan("cpu") is None
    assert "make setup-gpu" in (devices.slow_scan("cuda:1") or "")
    monkeypatch.setattr(kernels, "active", lambda device: "mamba_ssm")
    assert devices.slow_scan("cuda") is None


def test_a_missing_and_an_old_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: ["torch>=99", "no-such-package>=1", "numba>=0.1"])
    findings = doctor.examine()
    assert missing(findings) == {"torch>=99": doctor.INSTALL, "no-such-package>=1": doctor.INSTALL}
    assert found(findings)["no-such-package>=1"] == "found none"


def test_models_of_the_hub_say_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shedder_utils.cost_plan.is_here", lambda ref, revision: "mamba2" in ref)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    findings = doctor.examine(profiles.load("laptop"))
    assert found(findings)["mamba2-130m"] == "here"
    assert found(findings)["mamba-130m"] == "not here: 0.5 GB from state-spaces/mamba-130m at the first run"
    assert missing(findings)["mamba-130m"] == "unset HF_HUB_OFFLINE"
