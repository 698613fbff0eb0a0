"""The search: Algorithm 1 by hand, fast against plain, resumption, and what is refused."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model
from tqdm import tqdm
from transformers import PreTrainedModel

from shedder_utils import Calibration, Component, ModelError, Plan, PlanError, Stage, perplexity, removed, search
from shedder_utils.components import Cut, cuts
from shedder_utils.importance import Perplexity, full_pass
from shedder_utils.sweep import Sweep

search_module = importlib.import_module("shedder_utils.search")  # the package's attribute of that name is the function


def without_cost(plan: Plan) -> dict:
    """A plan's content but for how it was found."""
    return plan.model_dump(exclude={"provenance"})


def test_perplexity_is_exp_of_the_mean_of_sequence_means(model: PreTrainedModel, calibration: Calibration) -> None:
    losses = []
    for batch in calibration.batches:
        for ids in batch:
            log_probs = model(ids[None], use_cache=False).logits[0].double().log_softmax(-1)
            losses.append(-log_probs[:-1].gather(1, ids[1:, None]).mean().item())
    assert perplexity(model, calibration) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_plain_is_the_greedy_choice_at_every_step(model: PreTrainedModel, calibration: Calibration) -> None:
    plan = search(model, calibration, Stage("mamba_block", 3), method="plain", progress=False)
    gone: list[Component] = []
    for removal in plan.removals:
        scores = {}
        for candidate in (Component("mamba_block", i) for i in range(6)):
            if candidate not in gone:
                with removed(model, [*gone, candidate]):
                    scores[candidate] = perplexity(model, calibration)
        assert removal.component == min(scores, key=scores.__getitem__)
        assert removal.score == scores[removal.component]
        gone.append(removal.component)
    assert plan.dense_score == perplexity(model, calibration)


@pytest.mark.parametrize(
    "stages",
    [[Stage("mamba_block", 2), Stage("ssm", 3)], [Stage(("mamba_block", "ssm"), 4)]],
    ids=["blocks + ssms", "blocks & ssms"],
)
def test_fast_finds_the_plan_of_plain(model: PreTrainedModel, calibration: Calibration, stages: list[Stage]) -> None:
    plain = search(model, calibration, stages, method="plain", progress=False)
    for memory_gib in (1.0, 3e-4, 1e-4, 1e-12):  # all, half, few or no streams are kept; a few, two on their way
        fast = search(model, calibration, stages, method="fast", progress=False, memory_gib=memory_gib)
        assert without_cost(fast) == without_cost(plain)


@pytest.mark.parametrize("stages", [[], [Stage("mamba_block", 0), Stage("ssm", 1)]], ids=["no stage", "no step"])
def test_a_stage_without_steps_removes_nothing(
    model: PreTrainedModel, calibration: Calibration, stages: list[Stage]
) -> None:
    plain = search(model, calibration, stages, method="plain", progress=False)
    assert without_cost(search(model, calibration, stages, progress=False)) == without_cost(plain)
    assert len(plain) == len(stages[1:])


@pytest.mark.parametrize("kind", ["mamba_block", "ssm"])
def test_fast_runs_fewer_layers(model: PreTrainedModel, calibration: Calibration, kind: str) -> None:
    fast = search(model, calibration, Stage(kind, 3), progress=False)
    plain = search(model, calibration, Stage(kind, 3), method="plain", progress=False)
    assert plain.provenance["layer_runs"] == plain.provenance["layer_runs_plain"] + 6 * calibration.sequences
    assert fast.provenance["layer_runs_plain"] == plain.provenance["layer_runs_plain"]
    assert fast.provenance["layer_runs"] < plain.provenance["layer_runs"]


def test_sweep_scores_equal_full_passes(model: PreTrainedModel, calibration: Calibration) -> None:
    gone = [Component("mamba_block", 2), Component("ssm", 4)]
    candidates = [Cut(Component(kind, i)) for i in (0, 1, 3, 5) for kind in ("mamba_block", "ssm")]
    with torch.no_grad():
        sweep = Sweep(model, calibration, Perplexity(), 1.0)
        values = sweep.values(cuts(gone), candidates, tqdm(disable=True))
        for candidate, found in zip(candidates, values, strict=True):
            with removed(model, [*gone, candidate.component]):
                expected = full_pass(model, calibration, Perplexity())
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_tie_goes_to_the_lowest_index(calibration: Calibration) -> None:
    model = random_model("mamba")
    with torch.no_grad():
        for layer in model.backbone.layers:  # blocks that add nothing: removing one is as good as removing another
            layer.mixer.out_proj.weight.zero_()
    for method in ("plain", "fast"):
        plan = search(model, calibration, Stage("mamba_block", 3), method=method, progress=False)
        assert [removal.component.index for removal in plan.removals] == [0, 1, 2]
        assert plan.scores == [plan.dense_score] * 4
    assert plan.provenance["ties"] == 5 + 4 + 3


STAGES = [Stage("mamba_block", 2), Stage("ssm", 2)]


@pytest.mark.parametrize("steps", range(4))
def test_an_interrupted_search_goes_on(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    whole = search(random_model("mamba2"), calibration, STAGES, progress=False)
    advance = search_module._Search.advance

    def interrupted(run: Any, stage: int) -> None:
        if len(run.plan) == steps:
            raise KeyboardInterrupt
        advance(run, stage)

    settings = {"checkpoint": tmp_path / "plan.json", "progress": False}
    monkeypatch.setattr(search_module._Search, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search(random_model("mamba2"), calibration, STAGES, **settings)
    monkeypatch.undo()
    assert len(Plan.load(settings["checkpoint"])) == steps
    resumed = search(random_model("mamba2"), calibration, STAGES, **settings)
    assert without_cost(resumed) == without_cost(Plan.load(settings["checkpoint"])) == without_cost(whole)


FORKS = """
import os, random, signal
from pathlib import Path
import torch
from conftest import random_model
from shedder_utils import Calibration, Plan, Stage, search

torch.set_num_threads(1)
ids = torch.randint(0, 97, (7, 24), generator=torch.Generator().manual_seed(1))
settings = {{"calibration": Calibration(list(ids.split(3))), "progress": False,
            "stages": [Stage("mamba_block", 2), Stage("ssm", 3)]}}


def attempt(file, last=None):
    "Search in a process of its own, killed at a layer, by its number in all that run; whether it ended by itself."
    if (child := os.fork()) == 0:
        model, ran = random_model("mamba2"), []

        def count(*_):
            ran.append(1)
            if len(ran) == last:
                os.kill(os.getpid(), signal.SIGKILL)

        for layer in model.backbone.layers:
            layer.register_forward_pre_hook(count)
        search(model, checkpoint=file, **settings)
        (folder / "layers").write_text(str(len(ran)))
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


folder, random = Path("{folder}"), random.Random(0)
assert attempt(folder / "whole")
layers = int((folder / "layers").read_text())
for number in range(10):
    file = folder / f"killed-{{number}}"
    assert not attempt(file, random.randint(1, layers))
    print(len(Plan.load(file)) if file.exists() else "nothing", flush=True)
    assert attempt(file)
"""


def test_a_search_killed_at_ten_random_moments_gives_the_same_plan(tmp_path: Path) -> None:
    script = FORKS.format(folder=tmp_path)
    child = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    left = child.stdout.split()
    assert len(left) == 10
    assert len(set(left)) > 1, "killed at different steps"
    for number in range(10):
        assert without_cost(Plan.load(tmp_path / f"killed-{number}")) == without_cost(Plan.load(tmp_path / "whole"))


IDS = torch.randint(0, 97, (7, 24), generator=torch.Generator().manual_seed(1))
SETTINGS = {"calibration": Calibration(list(IDS.split(3)), {"seed": 42}), "stages": Stage("ssm", 1), "progress": False}


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"calibration": Calibration(list(IDS.split(3)), {"seed": 43})}, "calibration seed is 42, expected 43"),
        ({"calibration": Calibration(list(IDS[:6].split(3)), {"seed": 42})}, "calibration sequences is 7, expected 6"),
        ({"calibration": Calibration(list((IDS - 1).abs().split(3)), {"seed": 42})}, "calibration fingerprint is "),
        ({"stages": Stage("ssm", 0)}, "stage 1 steps is 1, expected 0"),
        ({"stages": [Stage("mamba_block", 1), Stage("ssm", 1)]}, "stages is 1, expected 2"),
        ({"metric": "kl"}, "metric is perplexity, expected kl"),
        ({"one_shot": True}, "one_shot is False, expected True"),
        ({"model": random_model("mamba2")}, "model type is mamba, expected mamba2"),
    ],
    ids=["seed", "sequences", "text", "steps", "stages", "metric", "one shot", "model"],
)
def test_a_checkpoint_of_another_search_is_refused(tmp_path: Path, change: dict[str, Any], difference: str) -> None:
    settings = {"model": random_model("mamba"), "checkpoint": tmp_path / "plan.json", **SETTINGS}
    search(**settings)
    before = settings["checkpoint"].read_bytes()
    with pytest.raises(PlanError, match=f"of another search: {difference}.*delete or move it"):
        search(**{**settings, **change})
    assert settings["checkpoint"].read_bytes() == before


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_the_beginning_of_a_search_serves_another_number_of_steps(
    calibration: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    model, file = random_model("mamba2"), tmp_path / "plan.json"
    whole = search(model, calibration, Stage("ssm", steps), progress=False)
    search(model, calibration, Stage("ssm", 4), progress=False, checkpoint=file)
    Plan.load(file).first(2).save(file)  # stopped before its end
    advance, made = search_module._Search.advance, []
    monkeypatch.setattr(search_module._Search, "advance", lambda run, n: made.append(n) or advance(run, n))
    found = search(model, calibration, Stage("ssm", steps), progress=False, checkpoint=file)
    assert without_cost(found) == without_cost(whole)
    assert len(made) == steps - 2


@pytest.mark.parametrize(
    "options", [{}, {"method": "plain"}, {"metric": "kl"}, {"metric": "taylor"}, {"metric": "block_influence"}], ids=str
)
def test_a_device_without_enough_memory_is_one_line(calibration: Calibration, options: dict[str, str]) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation.")

    model = random_model("mamba2")
    model.backbone.layers[1].register_forward_pre_hook(full)
    with pytest.raises(ModelError, match=r"^out of memory.* \(CUDA out of memory. Tried .*: use a smaller batch size"):
        search(model, calibration, Stage("ssm", 1), progress=False, **options)


@pytest.mark.parametrize(
    ("stages", "options", "complaint"),
    [
        ([Stage("mamba_block", 7)], {}, "7 removals of mamba_block were asked for, the model has 6"),
        ([Stage(("mamba_block", "ssm"), 7)], {}, "7 removals of mamba_block & ssm were asked for, the model has 6"),
        ([Stage("mha", 1)], {}, "has no 'mha' to remove"),
        ([Stage("ssm", 1)], {"method": "quick"}, "method 'quick' is unknown"),
        ([Stage("ssm", 1)], {"metric": "loss"}, "metric 'loss' is unknown"),
        ([Stage("mamba_block", 6), Stage("ssm", 1)], {}, "nothing is left to remove of ssm"),
    ],
)
def test_impossible_searches_are_refused(
    calibration: Calibration, stages: list[Stage], options: dict[str, str], complaint: str
) -> None:
    with pytest.raises(PlanError, match=complaint):
        search(random_model("mamba"), calibration, stages, progress=False, **options)


@pytest.mark.parametrize("metric", ["perplexity", "kl", "taylor", "block_influence"])
def test_a_model_that_overflows_is_refused_before_anything_is_removed(
    calibration: Calibration, tmp_path: Path, metric: str
) -> None:
    model, settings = random_model("mamba2"), {"metric": metric, "progress": False}
    with torch.no_grad():
        model.backbone.layers[2].mixer.out_proj.weight.mul_(3e4)
    search(model, calibration, Stage("ssm", 1), **settings)
    overflow = r"^the .+ of mamba2 in float16 is (inf|nan), expected a finite number: .* dtype bfloat16 or float32$"
    for method in ("fast", "plain"):
        with pytest.raises(ModelError, match=overflow):
            search(model.half(), calibration, Stage("ssm", 1), method=method, checkpoint=tmp_path / "plan", **settings)
    assert not list(tmp_path.iterdir())


def test_a_plan_survives_its_file(calibration: Calibration, tmp_path: Path) -> None:
    plan = search(random_model("mamba"), calibration, Stage("mamba_block", 2), progress=False)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.first(1).components == plan.components[:1]
    assert json.loads((tmp_path / "plan.json").read_text())["removals"][0]["component"] == str(plan.components[0])
    with pytest.raises(PlanError, match="3 were asked for"):
        plan.first(3)


@pytest.mark.parametrize("content", ["", "{", '{"removals": [{"component": "ssm"}]}', '{"unknown": 1}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(content)
    with pytest.raises(PlanError, match="is not a plan of this package"):
        Plan.load(file)
