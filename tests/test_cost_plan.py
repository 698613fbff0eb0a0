"""The cost plan: sizes and passes as published, without a download, and what is done as the records say."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

from shedder_utils import (
    Calibration,
    ProfileError,
    Stage,
    adapters,
    cost_plan,
    devices,
    paper,
    profiles,
    search,
    shapes,
    studies,
)
from shedder_utils.__main__ import app
from shedder_utils.cost_plan import CostPlan, Device, Job
from shedder_utils.costs import costs
from shedder_utils.families import random_model
from shedder_utils.passes import candidates_by_step
from shedder_utils.recipe import Recipe
from shedder_utils.schedule import Schedule
from shedder_utils.workbench import Workbench

STORED = {"falcon-mamba-7b": 7_272_665_088, "zamba2-2.7b": 2_662_214_560}
"""Parameters that paper.yaml does not give: Zamba2's without its shared blocks repeated."""


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The cache of the Hub is empty, and whatever asks the Hub fails at once."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))


@pytest.fixture(scope="module")
def of_paper(tmp_path_factory: pytest.TempPathFactory) -> CostPlan:
    """The plan of the paper's profile, with nothing done."""
    profile = profiles.load("paper")
    return CostPlan(profile, Schedule(profile, tmp_path_factory.mktemp("runs")))


@pytest.mark.parametrize("name", paper.models())
def test_shapes_are_the_published_ones(name: str) -> None:
    model, published = shapes.without_weights(profiles.load("paper").models[name]), paper.models()[name]
    assert next(model.parameters()).is_meta
    assert model.num_parameters() == published.get("parameters", STORED.get(name))
    assert len(shapes.work_per_token(model, 512).layers) == published["blocks"]


def test_the_laptops_shapes_and_downloads_are_the_published_ones(tmp_path: Path) -> None:
    profile = profiles.load("laptop")
    counts = {name: shapes.without_weights(model).num_parameters() for name, model in profile.models.items()}
    assert counts == {"mamba-130m": 129_135_360, "mamba2-130m": 128_989_632}
    plan = CostPlan(profile, Schedule(profile, tmp_path))
    assert plan.downloads == {"mamba-130m": 0.5, "mamba2-130m": 0.3}
    assert {(job.study, job.model) for job in plan.jobs if job.what == "search"} >= {
        ("ssm_pruning", "mamba-130m"), ("ssm_pruning", "mamba2-130m"), ("joint_decode", "mamba2-130m")
    }  # fmt: skip


def test_passes_are_those_that_the_paper_needs(of_paper: CostPlan) -> None:
    passes = {(job.study, job.model): job.passes for job in of_paper.jobs if job.what == "search"}
    assert passes["block_pruning", "mamba-2.8b"] == 805
    assert passes["ssm_pruning", "mamba2-2.7b"] == 1260
    assert passes["hymba_pruning", "hymba-1.5b"] == sum(17 - step for step in range(8))
    assert passes["zamba2_parts", "zamba2-2.7b"] == sum(72 - step for step in range(12))
    later = 20 * 9 + sum(54 - step for step in range(18))  # what goes before is taken over from zamba2_parts
    assert passes["zamba2_channels_10", "zamba2-2.7b"] == passes["zamba2_channels_15", "zamba2-2.7b"] == later


def test_what_no_search_before_has_found_is_searched(tmp_path: Path) -> None:
    profile = profiles.load("paper")
    wanted = {"models": ["zamba2-2.7b"], "studies": ["recovery"]}
    (first, second) = (job for job in CostPlan(profile, Schedule(profile, tmp_path, **wanted)).jobs if job.passes)
    later = 20 * 9 + sum(54 - step for step in range(18))
    assert (first.study, first.passes) == ("zamba2_channels_10", 72 + 71 + 70 + later)
    more = sum(72 - step for step in range(3, 8))
    assert (second.study, second.passes) == ("zamba2_channels_15", more + later)


def test_passes_of_strategies_are_what_each_measures(of_paper: CostPlan) -> None:
    jobs = {job.study: job for job in of_paper.jobs if job.what not in ("evaluation", "2 evaluations")}
    assert jobs["by_kl"].passes == sum(64 - step for step in range(14))
    assert jobs["by_one_shot"].passes == 64
    assert jobs["by_taylor"].passes == jobs["by_random"].passes == 0
    assert jobs["by_random"].flops == 0 < jobs["by_taylor"].flops < jobs["by_kl"].flops
    assert jobs["joint_decode"].passes == sum(128 - step for step in range(20))
    draws = profiles.load("paper").certainty.draws
    assert jobs["certainty"].passes == len(draws) * (64 + 64 + 63 + 62)
    evaluated = {job.study: job.what for job in of_paper.jobs if "evaluation" in job.what}
    assert (evaluated["joint_decode"], evaluated["by_kl"]) == ("2 evaluations", "evaluation")


def test_released_orders_are_evaluated_and_not_searched(of_paper: CostPlan) -> None:
    jobs = {job.model: job for job in of_paper.jobs if job.study == "released"}
    assert {model: job.what.split()[0] for model, job in jobs.items()} == {
        "mamba-2.8b": "2", "mamba2-2.7b": "4", "zamba2-2.7b": "4", "hymba-1.5b": "2"
    }  # fmt: skip
    assert not any(job.passes for job in jobs.values())
    assert "released" not in of_paper.not_counted


def test_models_that_are_timed_together_are_in_memory_together(of_paper: CostPlan) -> None:
    timed = {(job.study, job.model): job for job in of_paper.jobs if job.what == "timed together"}
    assert {place: round(job.gib) for place, job in timed.items() if place[1] == "mamba2-2.7b"} == {
        ("speed", "mamba2-2.7b"): 4 * 5, ("pareto", "mamba2-2.7b"): 8 * 5
    }  # fmt: skip
    assert {"speed", "pareto"} <= set(of_paper.not_counted)
    small, large, _ = of_paper.devices
    assert small.gib < timed["pareto", "mamba2-2.7b"].gib < large.gib


def test_passes_are_those_of_the_plain_search() -> None:
    model = random_model(family="mamba2", layers=4, hidden_size=32, seed=0, vocab_size=40)
    stages, calibration = [Stage("ssm", 1), Stage("ssm", 1)], Calibration([torch.arange(16).view(2, 8)])
    found = search(model, calibration, stages, method="plain", progress=False)
    settings = tuple(profiles.StageSettings(kinds=stage.kinds, steps=stage.steps) for stage in stages)
    counts = candidates_by_step(model, profiles.Study(table=1, stages=settings, rows={}))
    assert counts == [4, 3]
    assert found.provenance["passes"] == sum(counts)
    assert found.provenance["layer_runs_plain"] == sum(counts) * 4 * calibration.sequences


PARTS = {"kinds": ["mamba_block", "mlp", "mha"]}
BEYOND = {
    "further": {"stages": [{**PARTS, "steps": 3}]},
    "of_other_data": {"stages": [{**PARTS, "steps": 2}], "samples": 2},
    "by_kl": {"stages": [{**PARTS, "steps": 1}], "metric": "kl"},
    "by_kl_further": {"stages": [{**PARTS, "steps": 2}], "metric": "kl"},
    "once": {"stages": [{**PARTS, "steps": 1}], "one_shot": True},
    "once_further": {"stages": [{**PARTS, "steps": 3}], "one_shot": True},
    "parameters": {"stages": [{**PARTS, "steps": 1}], "per": "parameters"},
    "parameters_further": {"stages": [{**PARTS, "steps": 2}], "per": "parameters"},
    "weights": {"stages": [{**PARTS, "steps": 2}], "metric": "magnitude"},
}
"""Searches beyond the paper that begin as another does, or seem to."""
TAKEN_OVER = {
    "zamba2_channels_10": 1, "further": 2, "by_kl_further": 1, "once_further": 1, "parameters_further": 1
}  # fmt: skip


def test_passes_and_prefixes_are_those_that_the_studies_make(tmp_path: Path) -> None:
    content = yaml.safe_load((profiles.FOLDER / "smoke.yaml").read_text())
    model, paper = "smoke-zamba2", ("zamba2_blocks", "zamba2_parts", "zamba2_channels_10")
    wanted = (*paper, *BEYOND)
    content["calibration"] |= {"samples": 1, "sequence_length": 16, "batch_size": 16}
    content["speed"] |= {"prompt_tokens": 8}
    content |= {
        "certainty": None,
        "pareto": None,
        "beyond": {n: {**s, "rows": {model: [1]}} for n, s in BEYOND.items()},
    }
    file = tmp_path / "smoke.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    profile = profiles.load(file)
    plan = CostPlan(profile, Schedule(profile, tmp_path, models=[model], studies=wanted))
    planned = {job.study: job for job in plan.jobs if job.what == "search"}
    bench = Workbench(file, model, tmp_path / "runs")
    made = {study: studies.removal_order(bench, study).provenance for study in wanted}
    taken = {study: found["taken_over"]["removals"] for study, found in made.items() if "taken_over" in found}
    assert taken == TAKEN_OVER
    passes = {study: found.get("passes", 0) for study, found in made.items()}
    at_most = passes.pop("zamba2_channels_10")
    assert passes == {study: planned[study].passes for study in passes}
    assert 0 < at_most <= planned["zamba2_channels_10"].passes
    whole, begun = planned["zamba2_parts"].flops, planned["further"].flops
    assert 0 < begun < 0.6 * whole
    assert planned["by_kl"].flops + planned["by_kl_further"].flops == pytest.approx(whole)


PEAK = """
import torch
from shedder_utils import Calibration, Stage, kernels, search
from shedder_utils.families import random_model
from shedder_utils.passes import candidates_by_step
from shedder_utils.provenance import _status_mib, peak_mib, reset_peak
from shedder_utils.search_memory import search_memory

torch.set_num_threads(1)
kernels.install()
model = random_model(family="mamba", layers=8, hidden_size=32, seed=0, vocab_size=97)
ids = torch.randint(0, 97, (48, 1024), generator=torch.Generator().manual_seed(1))
search(model, Calibration([ids[:2, :32]]), Stage("ssm", 1), progress=False)
reset_peak()
before = _status_mib("VmRSS")
search(model, Calibration(list(ids.split(4))), Stage("ssm", 1), progress=False, memory_gib=1.0)
settings = {"sequences": 48, "sequence_length": 1024, "batch_size": 4, "memory_gib": 1.0}
planned = search_memory(model, [Stage("ssm", 1)], **settings)
print(peak_mib() - before, (planned.total - planned.model) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a part of a process's life")
def test_memory_is_what_a_process_takes() -> None:
    ran = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    measured, planned = map(float, ran.stdout.split())
    assert planned > 200
    assert measured == pytest.approx(planned, rel=0.2)


SCORED_AND_TUNED = """
import copy
import ctypes
import sys

import torch

from shedder_utils import recover, studies
from shedder_utils.evaluation import evaluate
from shedder_utils.provenance import _status_mib, peak_mib, reset_peak
from shedder_utils.workbench import Workbench

torch.set_num_threads(1)
bench = Workbench(sys.argv[1], "smoke-mamba2", sys.argv[2])
weights = sum(one.nbytes for one in bench.model.parameters()) / 2**20
(table,) = bench.profile.recovery.tables.values()
work = [
    lambda: studies.scores_of(bench, bench.model),
    lambda: recover(copy.deepcopy(bench.model), bench.tokenizer, "pocket-instructions", inplace=True, progress=False,
                    **table.recipe.settings),
]
evaluate(bench.model, bench.tokenizer, bench.profile.evaluation.task_names, limit=2, batch_size=2)
for option in (-3, -1):
    ctypes.CDLL(None).mallopt(option, 2**17)  # what is freed goes back at once: what is kept is not in the plan
for do in work:
    reset_peak()
    before = _status_mib("VmRSS")
    do()
    print(peak_mib() - before + weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a part of a process's life")
def test_scores_and_tunings_take_the_memory_that_is_planned(tmp_path: Path) -> None:
    content = yaml.safe_load((profiles.FOLDER / "smoke.yaml").read_text())
    name, recipe = "smoke-mamba2", content["recovery"]["tables"][10]
    recipe["recipe"] |= {"steps": 3, "batch_size": 4, "max_length": 256, "evaluate_every": 3}
    content["models"][name]["random"] |= {"layers": 12, "hidden_size": 512}
    content["evaluation"] |= {"limit": 16, "batch_size": 16, "tasks": content["evaluation"]["tasks"][:4]}
    content["evaluation"]["prose"] |= {"samples": 1, "batch_size": 16, "sequence_length": 256}
    file = tmp_path / "larger.yaml"
    file.write_text(yaml.safe_dump(content | {"recovery": {**content["recovery"], "tables": {10: recipe}}}))
    plan = CostPlan(profiles.load(file), Schedule(profiles.load(file), tmp_path, models=[name]))
    planned = [next(job.gib * 1024 for job in plan.jobs if what in job.what) for what in ("evaluation", "tuning")]
    ran = subprocess.run(
        [sys.executable, "-c", SCORED_AND_TUNED, str(file), str(tmp_path)], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    measured = [float(line) for line in ran.stdout.splitlines() if line[0].isdigit()]
    assert measured == [pytest.approx(peak, rel=0.2) for peak in planned]


def test_work_is_what_a_pass_counts() -> None:
    for family in ("mamba", "mamba2", "hymba"):
        model = random_model(family=family, layers=4, hidden_size=32, seed=0, vocab_size=40)
        counted = costs(model, 32).flops
        work = shapes.work_per_token(model, 32)
        ours = 32 * sum(work.layers) + work.head  # the count has the logits of the last token alone
        assert ours == pytest.approx(counted, rel=0.3 if family == "hymba" else 0.02), family


def test_downloads_memory_and_hours(of_paper: CostPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_paper.downloads["mamba-2.8b"] == 11.1
    tuned_gb = (2 * (4 + 8) + 4) * paper.models()["mamba2-2.7b"]["parameters"] / 1e9
    assert of_paper.checkpoints_gb == pytest.approx(tuned_gb)
    assert 0 < of_paper.disk_gb - sum(of_paper.downloads.values()) - tuned_gb < 1
    counts = {name: published.get("parameters", STORED.get(name)) for name, published in paper.models().items()}
    for job in of_paper.jobs:
        assert 2 * counts[job.model] / 2**30 < job.gib < (80 if job.study in ("recovery", "pareto") else 32), job
    tuned = {job.model for job in of_paper.jobs if job.study == "recovery"}
    assert tuned == {"mamba2-2.7b", "zamba2-2.7b", "hymba-1.5b"}
    hours = [sum(device.hours(job) for job in of_paper.jobs) for device in of_paper.devices]
    assert 0.5 < hours[2] < hours[1] < hours[0] < 200


def test_hours_are_the_larger_of_arithmetic_and_traffic() -> None:
    device = Device("x", half_flops=1e12, single_flops=1e11, bytes=1e9, gib=1)
    job = Job("study", "model", "search", passes=1, flops=3.6e15, bytes=0.0, gib=1.0)
    assert device.hours(job) == pytest.approx(1 / cost_plan.EFFICIENCY)
    assert device.hours(replace(job, single=True)) == pytest.approx(10 / cost_plan.EFFICIENCY)
    assert device.hours(replace(job, bytes=3.6e13)) == pytest.approx(10 / cost_plan.BANDWIDTH)


@pytest.mark.parametrize("family", ["mamba2", "zamba2", "hymba"])
def test_trained_parameters_are_those_of_the_adapters(family: str) -> None:
    model = random_model(family=family, layers=6, hidden_size=32, seed=0, vocab_size=40)
    targets = ("input", "output", "mlp") if family == "hymba" else ("input", "output")
    recipe = Recipe.of(method="lora", rank=4, targets=targets)
    planned = shapes.trained_parameters(model, recipe)
    assert shapes.trained_parameters(model, Recipe.of(method="full")) == model.num_parameters()
    adapters.attach(model, recipe)
    assert 0 < planned == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_tunings_that_are_done_need_no_disk(of_paper: CostPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [step for step in of_paper.schedule.left if (step.study, step.model) != ("recovery", "mamba2-2.7b")]
    monkeypatch.setattr(Schedule, "left", left)
    assert 0 < of_paper.checkpoints_gb < 5


def test_a_model_that_is_here_is_not_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cost_plan.is_here("pocket-mamba2")
    assert not cost_plan.is_here("state-spaces/mamba-2.8b")
    monkeypatch.setattr(cost_plan, "try_to_load_from_cache", lambda *_, **__: str(tmp_path / "config.json"))
    assert cost_plan.is_here("state-spaces/mamba-2.8b")


def test_the_memory_of_a_models_largest_search_is_shown_as_it_adds_up(tmp_path: Path) -> None:
    options = ["--profile", "paper", "--models", "mamba-2.8b,mamba2-2.7b", "--output", str(tmp_path)]
    ran = CliRunner().invoke(app, ["plan", *options])
    assert ran.exit_code == 0, ran.output
    jobs = [job for job in json.loads(ran.stdout)["jobs"] if job["memory"]]
    assert "with the kernels of mamba_ssm (make setup-gpu)" in ran.stderr
    shown = [line for line in ran.stderr.splitlines() if line.startswith("memory of ")]
    assert len(shown) == 2
    for line, model in zip(shown, ("mamba-2.8b", "mamba2-2.7b"), strict=True):
        largest = max((job for job in jobs if job["model"] == model), key=lambda job: job["gib"])
        parts = {name: size / 2**30 for name, size in largest["memory"].items()}
        added = [f"{name} {parts[name]:.2f}" for name in ("model", "kept", "copies") if parts[name]]
        assert line.startswith(f"memory of {model}, {largest['study']}: {added[0]} + streams {parts['stack']:.2f} + ")
        assert f" + {' + '.join(added[1:])} + layer " in line
        assert line.endswith(f" = {largest['gib']:.2f} GiB")
        total = sum(parts[name] for name in ("model", "stack", "kept", "copies"))
        total += max(parts["layer"], parts["logits"])
        assert largest["gib"] == pytest.approx(total)


def test_models_and_studies_narrow_the_plan(tmp_path: Path) -> None:
    profile = profiles.load("paper")
    wanted = {"models": ["mamba-2.8b"], "studies": ["ssm_pruning"]}
    plan = CostPlan(profile, Schedule(profile, tmp_path, **wanted), **wanted)
    assert {(job.study, job.model) for job in plan.jobs} == {("dense", "mamba-2.8b"), ("ssm_pruning", "mamba-2.8b")}
    with pytest.raises(ProfileError, match="model 'mamba-3b' is not in the profile: expected one of"):
        CostPlan(profile, Schedule(profile, tmp_path), ["mamba-3b"])


@pytest.mark.parametrize(("gib", "too_large"), [(80, ""), (24, ", these do not: recovery of mamba2-2.7b")])
def test_jobs_that_do_not_fit_the_gpu_here_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: int, too_large: str
) -> None:
    monkeypatch.setattr(devices, "device_error", lambda _: None)
    monkeypatch.setattr(devices, "slow_scan", lambda _: None)
    gpu = SimpleNamespace(name="NVIDIA A100", total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: gpu)
    wanted = ["--models", "mamba2-2.7b", "--studies", "ssm_pruning,recovery"]
    ran = CliRunner().invoke(app, ["plan", "--profile", "paper", *wanted, "--output", str(tmp_path)])
    assert ran.exit_code == 0, ran.output
    jobs = json.loads(ran.stdout)["jobs"]
    fitting = sum(job["gib"] <= gib for job in jobs)
    assert (fitting == len(jobs)) == (not too_large)
    assert f"on the NVIDIA A100 here {fitting} of {len(jobs)} jobs fit{too_large}\n" in ran.stderr


def test_a_hub_model_needs_its_shape() -> None:
    settings = profiles.ProfileModel(family="Mamba-1", paper="mamba-2.8b", ref="someone/mamba")
    with pytest.raises(ProfileError, match="expected its 'shape' in the profile"):
        shapes.without_weights(settings)
