"""Studies on random models: what is recorded, what is not repeated, and what survives a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from shedder_utils import Plan, ProfileError, RecordError, beyond_study, profiles, records, studies
from shedder_utils.workbench import Workbench

KILLED = """
import os, signal, sys
import torch
from shedder_utils import records, studies
from shedder_utils.workbench import Workbench
torch.set_num_threads(1)
write, left = records.write, int(sys.argv[2])
def write_and_die(root, record):
    global left
    path = write(root, record)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return path
records.write = write_and_die
studies.pruning(Workbench("smoke", "smoke-mamba2", sys.argv[1]), "ssm_pruning")
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, records.Record]]:
    """The SSM study of a random Mamba-2, run once."""
    output = tmp_path_factory.mktemp("runs")
    return output, studies.pruning(Workbench("smoke", "smoke-mamba2", output), "ssm_pruning")


def results(root: Path) -> dict[str, tuple]:
    """What the records under a folder say, without when and how fast."""
    return {f"{r.study}/{r.setting}": (r.metrics, r.plan, r.inputs, r.model) for r in records.find(root)}


def test_a_study_records_its_search_and_its_scores(done: tuple[Path, dict[int, records.Record]]) -> None:
    output, rows = done
    assert set(results(output)) == {
        "dense/scores", "ssm_pruning/search", "ssm_pruning/01_removed", "ssm_pruning/02_removed"
    }  # fmt: skip
    plan = studies.removal_order(Workbench("smoke", "smoke-mamba2", output), "ssm_pruning")
    assert list(rows) == [0, 1, 2]
    for n, row in rows.items():
        assert list(row.model.removals) == [str(component) for component in plan.components[:n]]
        assert {"pocket_lambada/perplexity", "pocket_piqa/acc_norm", "prose/perplexity"} <= set(row.metrics)
        assert row.metrics["pocket_arc_easy/acc"].n == 4
        assert row.environment.scan == "shedder-numba"
    assert (
        rows[2].model.parameters < rows[1].model.parameters < rows[0].model.parameters == rows[0].model.parameters_dense
    )
    assert not list(output.rglob("*.part"))


def test_what_is_recorded_is_not_run_again(
    done: tuple[Path, dict[int, records.Record]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rows = done
    for name in ("search", "evaluate"):
        monkeypatch.setattr(studies, name, lambda *_, **__: pytest.fail("ran again"))
    assert studies.pruning(Workbench("smoke", "smoke-mamba2", output), "ssm_pruning") == rows


@pytest.mark.parametrize("written", [1, 3])
def test_a_killed_study_goes_on(done: tuple[Path, dict[int, records.Record]], tmp_path: Path, written: int) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), str(written)],
        capture_output=True,
        env={**os.environ, "TQDM_DISABLE": "1"},
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert len(results(tmp_path)) == written
    studies.pruning(Workbench("smoke", "smoke-mamba2", tmp_path), "ssm_pruning")
    assert results(tmp_path) == results(done[0])
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "run",
    [lambda bench: studies.removal_order(bench, "ssm_pruning"), beyond_study.certainty],
    ids=["order", "certainty"],
)
def test_a_search_is_kept_until_it_is_recorded(
    run: Callable[[Workbench], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(root: Path, record: records.Record) -> None:
        raise RecordError("no space left on device")

    bench = Workbench("smoke", "smoke-mamba2", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(records, "write", full)
        with pytest.raises(RecordError, match="no space left"):
            run(bench)
    (kept,) = tmp_path.rglob("*.part")
    plan = Plan.load(kept)
    assert len(plan) == sum(stage.steps for stage in plan.stages)
    run(bench)
    assert plan.scores in [Plan.model_validate(record.plan).scores for record in records.find(tmp_path)]
    assert not list(tmp_path.rglob("*.part"))


def test_a_record_that_was_edited_stops_the_study(done: tuple[Path, dict[int, records.Record]]) -> None:
    file = records.path(done[0], "smoke", "ssm_pruning", "smoke-mamba2", "01_removed")
    text = file.read_text()
    file.write_text(text.replace('"n": 4', '"n": 5', 1))
    try:
        with pytest.raises(RecordError, match="was changed after it was written"):
            studies.pruning(Workbench("smoke", "smoke-mamba2", done[0]), "ssm_pruning")
    finally:
        file.write_text(text)


def test_unknown_models_and_studies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no model 'pocket-mamba'"):
        Workbench("smoke", "pocket-mamba", tmp_path)
    with pytest.raises(ProfileError, match="no study 'layer_pruning'"):
        studies.pruning(Workbench("smoke", "smoke-mamba", tmp_path), "layer_pruning")


def test_one_model_at_a_time_is_on_the_accelerator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moves = []
    profile = profiles.load("smoke").model_copy(update={"device": "cuda"})
    benches = {name: Workbench(profile, name, tmp_path) for name in ("smoke-mamba", "smoke-mamba2")}
    monkeypatch.setattr(PreTrainedModel, "to", lambda model, device: moves.append((model.config.model_type, device)))
    for name in ("smoke-mamba", "smoke-mamba", "smoke-mamba2", "smoke-mamba2", "smoke-mamba"):
        assert benches[name].tokenizer is not None
        assert benches[name].model.config.model_type == name.removeprefix("smoke-")
    assert moves == [("mamba", "cpu"), ("mamba2", "cpu"), ("mamba", "cuda")]
