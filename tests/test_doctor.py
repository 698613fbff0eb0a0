"""The doctor: what is here, which scan will run, and the line that mends what is not."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from shedder_utils import doctor, kernels, profiles


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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        doctor, "_import_error", lambda module: None if module == "numba" else "ImportError: no such symbol"
    )
    remedies = missing(doctor.examine(profiles.load("paper")))
    assert remedies["mamba-ssm"] == "pip install --no-build-isolation -r requirements/gpu.txt"
    assert "environment.yml" in remedies["GPU"]
    assert not missing(doctor.examine(profiles.load("pocket")))


def test_a_missing_and_an_old_package_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: ["torch>=99", "no-such-package>=1", "numba>=0.1"])
    findings = doctor.examine()
    assert missing(findings) == {"torch>=99": "make setup", "no-such-package>=1": "make setup"}
    assert found(findings)["no-such-package>=1"] == "found none"


def test_models_of_the_hub_say_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shedder_utils.cost_plan.is_here", lambda ref, revision: "mamba2" in ref)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    findings = doctor.examine(profiles.load("laptop"))
    assert found(findings)["mamba2-130m"] == "here"
    assert found(findings)["mamba-130m"] == "not here: 0.5 GB from state-spaces/mamba-130m at the first run"
    assert missing(findings)["mamba-130m"] == "unset HF_HUB_OFFLINE"
