"""What the project says about versions agrees everywhere, and the lock is complete."""

import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distributions, requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from shedder_utils import doctor

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
REQUIREMENTS = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
CUDA = ("cuda-", "nvidia-", "triton")  # come with some builds of torch, in versions that it fixes itself


def locked(name: str = "cpu.txt") -> list[tuple[str, str]]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9a-z.]*)", line) for line in lines if not line.startswith("#")]
    assert all(pins), "every line of the lock is one exact version, without a local label"
    return [(canonicalize_name(pin[1]), pin[2]) for pin in pins if pin]


LOCK = dict(locked())


def test_lock_names_each_package_once():
    assert len(LOCK) == len(locked())


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_lock_and_conda_satisfy_the_project(requirement):
    conda = {canonicalize_name(pin.name): pin for pin in map(Requirement, CONDA["dependencies"][-1]["pip"])}
    version = LOCK[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(version)
    assert conda[canonicalize_name(requirement.name)].specifier == SpecifierSet(f"=={version}")


@pytest.mark.parametrize("package", sorted(LOCK))
def test_lock_has_what_each_package_needs(package):
    try:
        needs = [Requirement(line) for line in requires(package) or []]
    except PackageNotFoundError:
        pytest.skip("not for this platform")
    for need in needs:
        name = canonicalize_name(need.name)
        if (need.marker is None or need.marker.evaluate({"extra": ""})) and not name.startswith(CUDA):
            assert need.specifier.contains(LOCK[name], prereleases=True), f"{package} needs {need}"


def test_gpu_kernels_go_with_the_rest():
    """The second step on a GPU changes nothing that the first one set, and is what the instructions name."""
    kernels, text = dict(locked("gpu.txt")), (ROOT / "environment.yml").read_text()
    conda = {canonicalize_name(pin.name): pin for pin in map(Requirement, CONDA["dependencies"][-1]["pip"])}
    assert {"mamba-ssm", "causal-conv1d"} <= kernels.keys()
    assert kernels["mamba-ssm"] == "2.3.2.post1"
    for name, version in kernels.items():
        assert name not in LOCK or LOCK[name] == version
        assert name not in conda or conda[name].specifier.contains(version)
    assert "-r requirements/gpu.txt" in text
    assert "-r requirements/gpu.txt" in doctor.INSTALL_KERNELS
    assert all("MAMBA_KEEP_CUDA_BUILD=TRUE" in part for part in (text, (ROOT / "requirements" / "gpu.txt").read_text()))


def test_gpu_kernels_resolve_with_what_is_here(tmp_path):
    """pip finds all that they need, beside the versions of the lock and of no other; nothing is built or installed."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-build-isolation", "--retries", "0",
               "--timeout", "30", "--report", str(report), "-r", str(ROOT / "requirements" / "gpu.txt"),
               "-c", str(ROOT / "requirements" / "cpu.txt")]  # fmt: skip
    without_cuda = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"}  # else nvcc is looked for
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | without_cuda)
    if re.search(r"from versions: none|No module named pip", ran.stderr):
        pytest.skip(f"no package index: {ran.stderr.strip().splitlines()[-1]}")
    assert ran.returncode == 0, ran.stderr
    wanted = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    versions = {canonicalize_name(item["name"]): item["version"] for item in wanted}
    assert versions.items() >= {name: v for name, v in locked("gpu.txt") if name not in installed()}.items()
    assert not versions.keys() & LOCK.keys() - {"ninja"}


def installed() -> set[str]:
    return {canonicalize_name(one.name) for one in distributions()}


def test_python_versions_agree():
    python = next(line for line in CONDA["dependencies"] if str(line).startswith("python="))
    supported = SpecifierSet(PROJECT["requires-python"])
    assert supported.contains(python.removeprefix("python="))
    assert [minor for minor in range(8, 20) if supported.contains(f"3.{minor}")] == [11, 12, 13]
    assert "(3, 11) <= sys.version_info[:2] <= (3, 13)" in (ROOT / "Makefile").read_text()


def test_citation_names_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]


def test_every_make_target_is_explained():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)[1].split()
    assert re.findall(r"^([a-z]+):.*## \S", text, re.MULTILINE) == phony
