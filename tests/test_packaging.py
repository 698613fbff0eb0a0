"""What the project says about versions agrees everywhere, and the lock is complete."""

import json
import os
import re
import shutil
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

from shedder_utils import doctor, profiles

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
    """The second step on a GPU changes nothing that the first one set, finds its build tools there, and is named."""
    kernels, text = dict(locked("gpu.txt")), (ROOT / "environment.yml").read_text()
    conda = {canonicalize_name(pin.name): pin for pin in map(Requirement, CONDA["dependencies"][-1]["pip"])}
    assert {"mamba-ssm", "causal-conv1d"} <= kernels.keys()
    assert kernels["mamba-ssm"] == "2.3.2.post1"
    assert {"packaging", "setuptools", "ninja", "wheel"} <= LOCK.keys() & conda.keys()
    assert all(conda[name].specifier == SpecifierSet(f"=={LOCK[name]}") for name in conda)
    for name, version in kernels.items():
        assert name not in LOCK or LOCK[name] == version
        assert name not in conda or conda[name].specifier.contains(version)
    assert f"\n#   {doctor.INSTALL_KERNELS}\n" in text
    assert doctor.INSTALL_KERNELS in (ROOT / "requirements" / "gpu.txt").read_text()
    assert all("MAMBA_KEEP_CUDA_BUILD=TRUE" in part for part in (text, (ROOT / "requirements" / "gpu.txt").read_text()))


def test_gpu_kernels_resolve_with_what_is_here(tmp_path):
    """pip finds all that they need, beside the versions of the lock and of no other; nothing is built or installed."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--no-build-isolation", "--retries", "3",
               "--timeout", "30", "--report", str(report), "-r", str(ROOT / "requirements" / "gpu.txt"),
               "-c", str(ROOT / "requirements" / "cpu.txt")]  # fmt: skip
    without_cuda = {"MAMBA_SKIP_CUDA_BUILD": "TRUE", "CAUSAL_CONV1D_SKIP_CUDA_BUILD": "TRUE"}  # else nvcc is looked for
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | without_cuda)
    if re.search(r"from versions: none|No module named pip|ReadTimeout|ConnectionError|HTTP error 5\d\d", ran.stderr):
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
    assert re.findall(r"^([a-z-]+):.*## \S", text, re.MULTILINE) == phony


def commands(target, *options, **environment):
    """What make would run for a target."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    inherited = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "CONDA_DEFAULT_ENV")}
    run = ["make", "-n", "--no-print-directory", "-W", "requirements/cpu.txt", *options, target]
    ran = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, env=inherited | environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.replace("\\\n", "").splitlines()


def installs(lines):
    """Into which folder of programs each of them installs, and what."""
    found = [re.fullmatch(r"(\S+)/pip install (.*)", line) for line in lines]
    return [(one[1], one[2].split()[-1]) for one in found if one]


def test_make_takes_an_environment_as_it_is():
    conda = {"CONDA_DEFAULT_ENV": "mamba-shedder", "CONDA_PREFIX": "/conda"}
    chosen = [("/conda", [], conda), ("/mine", ["BIN=/mine/bin"], {}), ("/mine", ["BIN=/mine/bin"], conda)]
    for prefix, options, environment in chosen:
        (line,) = commands("reproduce", *options, **environment)
        assert line.startswith(f"{prefix}/bin/python -m shedder_utils run ")
        assert installs(commands("setup-gpu", *options, **environment)) == [
            (f"{prefix}/bin", "requirements/cpu.txt"), (f"{prefix}/bin", ".")
        ]  # fmt: skip
    assert CONDA["name"] == conda["CONDA_DEFAULT_ENV"]


@pytest.mark.parametrize("environment", [{}, {"CONDA_DEFAULT_ENV": "base", "CONDA_PREFIX": "/conda"}, {"BIN": "/usr"}])
def test_make_sets_up_its_own_environment_otherwise(environment):
    before = [(".venv/bin", "requirements/cpu.txt"), (".venv/bin", ".")]
    lines = commands("setup-gpu", **environment)
    assert installs(lines) == before * 2
    kernels = [line for line in lines if "-r requirements/gpu.txt" in line]
    assert [line.split()[0] for line in kernels] == [".venv/bin/pip"]
    assert "--no-build-isolation" in kernels[0]
    assert "--no-cache-dir" in kernels[0], "a wheel of an earlier build may be for another torch"
    assert installs(commands("reproduce", **environment)) == before


@pytest.mark.parametrize(("target", "command"), [("reproduce", "run"), ("plan", "plan")])
def test_make_hands_on_what_is_to_run(target, command):
    (line,) = commands(target, "BIN=/mine/bin", "PROFILE=paper", "MODELS=one,two", "STUDIES=three")
    expected = f'{command} --profile "paper" --models "one,two" --studies "three"'
    assert line.startswith(f"/mine/bin/python -m shedder_utils {expected} ")


@pytest.mark.parametrize("target", ["report", "verify", "record", "doctor"])
def test_make_hands_on_the_profile(target):
    (line,) = commands(target, "BIN=/mine/bin", "PROFILE=paper")
    assert line.startswith(f'/mine/bin/python -m shedder_utils {target} --profile "paper" ')


def test_make_rehearses_quickly_when_asked_to():
    options = ("BIN=/mine/bin", "MODELS=one,two", "STUDIES=three")
    plain = '/mine/bin/python -m tests.hub --models "one,two" --studies "three"'
    assert [line.rstrip() for line in commands("rehearse", *options)] == [plain]
    assert commands("rehearse", *options, "QUICK=1") == [f"{plain} --quick"]


def test_make_takes_torch_from_the_index_that_is_named():
    locked = [line for line in commands("setup", "TORCH_INDEX=https://some/cpu") if "-r requirements/cpu.txt" in line]
    assert len(locked) == 1
    assert '--extra-index-url "https://some/cpu" ' in locked[0]
    assert not [line for line in commands("setup") if "--extra-index-url" in line]


@pytest.mark.skipif(shutil.which("bash") is None, reason="the example is a script for bash")
def test_a_job_of_a_cluster_runs_what_make_takes(tmp_path):
    job = ROOT / "examples" / "slurm.sh"
    models = re.search(r"^models=\((.+)\)$", job.read_text(), re.MULTILINE)[1].split()
    assert sorted(models) == sorted(profiles.load("paper").models)
    assert f"--array=0-{len(models) - 1}\n" in job.read_text()
    log = re.search(r"^#SBATCH --output=(\S+)$", job.read_text(), re.MULTILINE)[1]
    assert "/" not in log, "SLURM opens the log before the job can make a folder for it"
    for prefix in (".venv", "conda"):
        python = tmp_path / prefix / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nmkdir -p "$9/paper"\necho {prefix} "$@" > "$9/paper/record"\nexit 3\n')
        python.chmod(0o755)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CONDA")}
    conda = {"CONDA_DEFAULT_ENV": CONDA["name"], "CONDA_PREFIX": str(tmp_path / "conda")}
    for environment, prefix in (({}, ".venv"), (conda, "conda")):  # the second job goes on after the first
        given = inherited | environment | {"SLURM_ARRAY_TASK_ID": "1"}
        assert subprocess.run(["bash", str(job)], cwd=tmp_path, env=given).returncode == 3
        record = tmp_path / "runs" / "paper" / "record"
        ran = record.read_text()
        os.utime(record, (0, 0))  # cp takes what is newer, and these jobs end within a tick of the file system's clock
        expected = "run --profile paper --models mamba2-2.7b --output runs/slurm/mamba2-2.7b"
        assert ran == f"{prefix} -m shedder_utils {expected}\n"
