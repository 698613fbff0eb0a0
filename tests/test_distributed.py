"""Searches and evaluations with two ranks: the plan and scores of one, and what is left when a rank dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import search_ranks
import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from test_commands import TEXT, call, run, tiny  # noqa: F401

from shedder_utils import ModelError, Plan, ShedderError, distributed, harness

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The folder that two ranks wrote to, and how torchrun ended after one of them was killed."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [*TORCHRUN, search_ranks.__file__, str(folder)]
    return folder, subprocess.run(command, capture_output=True, text=True)


def content(plan: Plan) -> str:
    """A plan's JSON but for how it was found."""
    return plan.model_dump_json(exclude={"provenance"})


@pytest.mark.parametrize("name", [name for name in search_ranks.SEARCHES if name != "killed"])
def test_two_ranks_find_the_plan_of_one(
    ended: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, name: str
) -> None:
    folder, run = ended
    assert (folder / f"{name}.rank0").exists(), run.stderr
    one = search_ranks.run(name, tmp_path)
    for file in (name, f"{name}.rank0", f"{name}.rank1"):
        two = Plan.load(folder / file)
        assert content(two) == content(one)
        assert two.provenance["ranks"] == 2
        assert two.provenance.get("layer_runs") == one.provenance.get("layer_runs")
        assert two.provenance["ties_within_error"] == one.provenance["ties_within_error"]


def test_only_the_first_rank_shows_progress(ended: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, run = ended
    shown = [line for line in run.stderr.replace("\r", "\n").split("\n") if "removal 1 of 4:" in line and " 0%" in line]
    assert len(shown) == 2  # of the searches that ask for four removals, one line each


@pytest.mark.parametrize(
    ("name", "difference"), [("seeds", "seed is 43, expected 42"), ("savings", "per is decode (savings ")]
)
def test_ranks_with_different_searches_are_refused_on_all(
    ended: tuple[Path, subprocess.CompletedProcess[str]], name: str, difference: str
) -> None:
    folder, run = ended
    for rank in (0, 1):
        said = folder / f"{name}.rank{rank}"
        assert said.exists(), run.stderr
        assert f"rank 1 was given another search than rank 0: {difference}" in said.read_text()


def test_a_rank_that_dies_ends_the_run_and_the_search_goes_on(
    ended: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder, run = ended
    assert run.returncode != 0
    assert "error: rank 0 of 2 stops: another process of this run has ended" in run.stderr
    assert "a search goes on from its last step" in run.stderr
    assert not (folder / "killed.rank0").exists()
    assert len(Plan.load(folder / "killed")) == 2
    whole = search_ranks.run("fast", tmp_path)
    assert content(search_ranks.run("killed", folder)) == content(whole)
    assert json.loads((folder / "killed").read_text())["provenance"]["ranks"] == 2  # as it was begun


def test_the_command_finds_the_plan_of_one_and_says_so_once(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    search = ["search", tiny, *TEXT, "--batch-size", 2, "--stages", "mamba_block: 1 + ssm: 2", "--output"]
    file = tmp_path / "two.json"
    command = [*TORCHRUN, "-m", "shedder_utils", *map(str, [*search, file])]
    two = subprocess.run(command, capture_output=True, text=True)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("\n") == 1
    assert json.loads(two.stdout) == {**run(*search, tmp_path / "one.json"), "plan": str(file)}
    assert two.stderr.count("searching on") == 1
    plan = Plan.load(file)
    assert content(plan) == content(Plan.load(tmp_path / "one.json"))
    assert plan.provenance["ranks"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"one.json", "two.json"}


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--main_process_port", "0"]  # fmt: skip
SCORED = ["--tasks", "pocket_lambada,pocket_piqa,pocket_winogrande", "--limit", "7", "--batch-size", "4"]


def test_evaluate_shares_the_items_and_finds_the_scores_of_one(tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    command = [*ACCELERATE, "-m", "shedder_utils", "evaluate", tiny, *SCORED, "--output", tmp_path / "two.json"]
    nobodys = os.environ | {"HF_HOME": str(tmp_path)}  # where accelerate looks for a configuration
    two = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=nobodys)
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("\n") == 1
    assert two.stderr.count("evaluating pocket_lambada") == 1
    assert "do not launch via accelerate" not in two.stderr
    one = run("evaluate", tiny, *SCORED)
    found = json.loads((tmp_path / "two.json").read_text())
    assert found == json.loads(two.stdout)
    assert found["scores"].keys() == one["scores"].keys()
    for task, metrics in one["scores"].items():
        assert found["scores"][task] == {name: pytest.approx(score, rel=1e-5) for name, score in metrics.items()}


@pytest.mark.parametrize(
    "command",
    [
        ["benchmark", "MODEL", "OTHER"], ["run", "--profile", "smoke"], ["extract", "MODEL", "PLAN", "FOLDER"],
        ["recover", "MODEL", "--output", "FOLDER"], ["report"],
    ],
)  # fmt: skip
def test_what_is_not_shared_is_refused_under_torchrun(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    code, out, _ = call(*command)
    assert (code, out) == (
        "error: torchrun or accelerate started several processes, which only search and evaluate can share: give this "
        "command to python alone",
        "",
    )


@pytest.mark.parametrize("ranks", [2, 3])
def test_every_rank_gets_all_answers_and_no_item_is_torn(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    requests = [Instance("loglikelihood", {}, (f"{n}", f"{k}"), k, ("task", n, 1)) for n in (0, 1, 2, 4) for k in "ab"]
    told: list[dict[int, Any]] = []
    shares: list[list[Any]] = []

    def answer(own: list[Any], disable_tqdm: bool) -> list[str]:
        shares.append([one.doc_id for one in own])
        return ["".join(one.args) for one in own]

    def whole(found: dict[int, Any]) -> list[Any]:
        told.append(found)
        everything = {number: value for part in told for number, value in part.items()}
        return [everything.get(number, [None, None]) for number in range(4)]

    monkeypatch.setattr(harness, "gathered", whole)
    monkeypatch.setattr(distributed, "ranks", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        answers = harness._dealt(answer, requests, False)
    assert answers == ["0a", "0b", "1a", "1b", "2a", "2b", "4a", "4b"]
    assert shares == [[doc for doc in [0, 1, 2, 4][rank::ranks] for _ in "ab"] for rank in range(ranks)]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, timedelta]]:
    """What is asked for by a process that torchrun started as the second on a node with two GPUs."""
    asked: list[tuple[str, timedelta]] = []
    monkeypatch.setattr(dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: asked.append((backend, timeout)))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    return asked


@pytest.mark.parametrize(("device", "own"), [("cpu", "cpu"), ("cuda", "cuda:1")])
def test_ranks_wait_for_those_with_work_left_on_every_device(
    groups: list[tuple[str, timedelta]], device: str, own: str
) -> None:
    assert distributed.start(device) == own
    ((backend, timeout),) = groups
    assert backend == "gloo"
    assert timeout > timedelta(days=1)


def test_a_gpu_that_all_ranks_would_share_is_refused(groups: list[Any]) -> None:
    with pytest.raises(ModelError, match="device cuda:0 under torchrun: expected cuda, of which each"):
        distributed.start("cuda:0")
    assert not groups


def test_without_torchrun_nothing_changes() -> None:
    assert distributed.start("cpu") == "cpu"
    assert (distributed.rank(), distributed.ranks()) == (0, 1)
    assert distributed.mine("abc") == [(0, "a"), (1, "b"), (2, "c")]
    assert distributed.gathered({2: "c", 0: "a"}) == ["a", "c"]
    with pytest.raises(ShedderError, match="as it is"):
        distributed.on_first(lambda: (_ for _ in ()).throw(ShedderError("as it is")))
    distributed.stop()
