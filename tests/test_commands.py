"""The command line: each command once from end to end, and mistakes that end in one line."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.main import get_command

from shedder_utils import Plan, PlanError, RecordError, load_model, paper
from shedder_utils.__main__ import app, main
from shedder_utils.benchmark import PHASES
from shedder_utils.commands.options import finish, stages_of
from shedder_utils.commands.pruning import METRICS
from shedder_utils.components import KINDS
from shedder_utils.families import random_model
from shedder_utils.pocket.tokenizer import load_tokenizer

TEXT = ["--calibration", "pocket-instructions", "--samples", "8", "--sequence-length", "32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Mamba-2 with the pocket tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "tiny", load_tokenizer()
    model = random_model(family="mamba2", layers=4, hidden_size=32, seed=0, vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def call(*arguments: object) -> tuple[Any, str, str]:
    """Runs a command in this process; returns what it ends with, and what it says on stdout and on stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["shedder_utils", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
    return ended.value.code, out.getvalue(), err.getvalue()


def run(*arguments: object) -> dict[str, Any]:
    """What a command says on stdout, which is one line of JSON."""
    code, out, _ = call(*arguments)
    assert not code, code
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.fixture(scope="module")
def plan(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan of a search in two stages."""
    file = tmp_path_factory.mktemp("plans") / "plan.json"
    code, out, err = call("search", tiny, "--output", file, *TEXT, "--stages", "mamba_block: 1 + ssm: 2")
    assert not code, err
    found = Plan.load(file)
    assert json.loads(out) == {
        "plan": str(file), "removals": [str(c) for c in found.components], "scores": found.scores
    }  # fmt: skip
    assert "searching on" in err
    return file


def test_search_finds_a_plan_and_leaves_nothing_else(plan: Path) -> None:
    kinds = [component.kind for component in Plan.load(plan).components]
    assert kinds == ["mamba_block", "ssm", "ssm"]
    assert list(plan.parent.iterdir()) == [plan]


def test_kinds_with_steps_are_one_stage(tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "texts.txt"
    text.write_text("\n\n".join(f"Anna has {n} apples, and Ben has {n + 1}." for n in range(60)))
    options = ["--calibration", text, "--samples", 50, "--sequence-length", 64, "--method", "plain"]
    said = run("search", tiny, "--kinds", "mamba_block, ssm", "--steps", 1, "--output", tmp_path / "p.json", *options)
    stage = Plan.load(said["plan"]).stages[0]
    assert (stage.kinds, stage.steps) == (("mamba_block", "ssm"), 1)


def test_extract_evaluate_and_benchmark(tiny: Path, plan: Path, tmp_path: Path) -> None:
    small, scores = tmp_path / "small", tmp_path / "scores.json"
    said = run("extract", tiny, plan, small, "--first", 2)
    model, tokenizer = load_model(small)
    assert tokenizer is not None
    assert said["parameters"] == model.num_parameters() < said["parameters_dense"]
    assert said["removed"] == [str(cut) for cut in Plan.load(plan).first(2).gone]

    said = run("evaluate", small, "--tasks", "pocket_piqa", "--limit", 2, "--batch-size", 2, "--output", scores)
    assert said["scores"]["pocket_piqa"]["acc"]["n"] == 2
    assert json.loads(scores.read_text()) == said

    run("extract", tiny, plan, small, "--first", 2, "--scores", scores, "--overwrite")
    shown = said["scores"]["pocket_piqa"]["acc"]
    card = (small / "README.md").read_text()
    assert f"| pocket_piqa | acc | {shown['value']:.4g} ± {shown['stderr']:.2g} | 2 |" in card
    others, _, _ = call("extract", tiny, plan, tmp_path / "other", "--scores", scores)
    assert "scores.json are of a model with" in others
    assert not (tmp_path / "other").exists()

    said = run("benchmark", tiny, small, "--prompt-tokens", 8, "--new-tokens", 2, "--batches", 2)
    dense, pruned, again = said["models"][str(tiny)], said["models"][str(small)], said["again"]
    assert set(dense) == set(pruned) == set(again) == {"prefill", "decode", "peak_mib"}
    assert dense["decode"]["speedup"] == dense["decode"]["ideal"] == again["decode"]["ideal"] == 1
    assert all(found["ms_25"] <= found["ms"] <= found["ms_75"] for found in (pruned["prefill"], again["decode"]))
    assert all(pruned[phase]["low"] <= pruned[phase]["speedup"] <= pruned[phase]["high"] for phase in PHASES)
    assert all(pruned[phase]["ideal"] > 1 for phase in PHASES)
    assert pruned["peak_mib"] is None or pruned["peak_mib"] > 50


def test_recover(tiny: Path, plan: Path, tmp_path: Path) -> None:
    small, tuned = tmp_path / "small", tmp_path / "tuned"
    run("extract", tiny, plan, small)
    options = ["--steps", 1, "--batch-size", 2, "--max-length", 64, "--held-out", 2, "--method", "lora"]
    said = run("recover", small, "--data", "pocket-instructions", "--output", tuned, *options)
    assert said["parameters"] == load_model(tuned)[0].num_parameters() == load_model(small)[0].num_parameters()
    assert said["recovery"]["recipe"]["steps"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"small", "tuned"}
    again = ["recover", small, "--data", "pocket-instructions", "--output", tuned, *options]
    assert "tuned is not empty: choose another, or pass --overwrite" in call(*again)[0]
    (tmp_path / ".tuned.part").mkdir()  # as a tuning leaves it that is stopped while it writes its result
    assert run(*again)["recovery"] == said["recovery"]
    said = call("recover", small, "--data", "pocket-instructions", "--output", small, "--overwrite")[0]
    assert "small holds the model that the new one is made from" in said


def test_extract_keeps_the_checkpoints_own_numbers(tiny: Path, plan: Path, tmp_path: Path) -> None:
    load_model(tiny, dtype=torch.bfloat16, tokenizer=False)[0].save_pretrained(tmp_path / "coarse")
    for options, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):
        small = tmp_path / f"small{len(options)}"
        run("extract", tmp_path / "coarse", plan, small, *options)
        tensors = load_file(small / "model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {dtype}


def test_extract_writes_over_nothing_unasked(tiny: Path, plan: Path, tmp_path: Path) -> None:
    own, notes = shutil.copytree(tiny, tmp_path / "own"), tmp_path / "notes"
    weights = (own / "model.safetensors").read_bytes()
    notes.mkdir()
    (notes / "README.md").write_text("mine")

    def refused(*arguments: object) -> str:
        said, out, err = call("extract", own, plan, *arguments)
        assert said.startswith("error: ")
        assert "\n" not in said
        assert (out, err) == ("", "")  # before anything is loaded
        return said

    for options in ([], ["--overwrite"]):
        assert "own holds the model that the new one is made from" in refused(own, *options)
    assert "notes is not empty: choose another, or pass --overwrite" in refused(notes)
    assert "README.md is a file: expected a folder" in refused(notes / "README.md", "--overwrite")
    assert (notes / "README.md").read_text() == "mine"
    run("extract", own, plan, notes, "--overwrite")
    (notes / "adapter_config.json").write_text("{}")
    assert "notes holds LoRA adapters" in refused(notes, "--overwrite")
    assert (own / "model.safetensors").read_bytes() == weights


def test_a_pruned_model_is_not_searched(tiny: Path, plan: Path, tmp_path: Path) -> None:
    run("extract", tiny, plan, tmp_path / "small")
    options = ["--kinds", "ssm", "--steps", 1, "--output", tmp_path / "again.json"]
    said, _, err = call("search", tmp_path / "small", *TEXT, *options)
    assert "search: this model is pruned already: make one plan" in said
    assert "searching on" not in err


def test_extract_portable_and_from_a_released_file(tiny: Path, tmp_path: Path) -> None:
    released = tmp_path / "released.json"
    released.write_text(json.dumps({"pruned_ssm_idx": [3, 1]}))
    said = run("extract", tiny, released, tmp_path / "small", "--portable")
    assert said["removed"] == ["ssm:3", "ssm:1"]
    assert json.loads((tmp_path / "small" / "config.json").read_text())["model_type"] == "mamba2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "TINY", "nowhere.json", "x"], "plan nowhere.json cannot be read"),
        (["extract", "nowhere", "PLAN", "x"], "model nowhere"),
        (["extract", "TINY", "PLAN", "x", "--first", "9"], "the plan has 3 removals, 9 were asked for"),
        (["extract", "TINY", "PLAN", "x", "--dtype", "int8"], "dtype 'int8' is unknown"),
        (["extract", "TINY", "PLAN", "x", "--scores", "nowhere.json"], "scores nowhere.json cannot be read"),
        (["extract", "TINY", "PLAN", "x", "--scores", "PLAN"], "expected what evaluate --output writes"),
        (["search", "TINY", *TEXT, "--output", "x", "--kinds", "ssms", "--steps", "1"], "kind 'ssms' is unknown"),
        (["search", "TINY", *TEXT, "--output", "x"], "expected one of --stages and --kinds"),
        (["search", "TINY", *TEXT, "--output", "x", "--stages", "ssm: 9"], "the model has 4"),
        (["evaluate", "TINY", "--tasks", "pocket_piqa", "--batch-size", "0"], "batch size '0'"),
        (["evaluate", "TINY", "--tasks", "pocket_pica", "--limit", "1"], "task 'pocket_pica' does not exist"),
        (["recover", "TINY", "--data", "nowhere.json", "--output", "x"], "recovery data nowhere.json: cannot be read"),
        (["recover", "TINY", "--data", "x", "--output", "x", "--method", "half"], "method"),
        (["benchmark", "TINY"], "expected a dense model and others"),
    ],
)
def test_a_mistake_is_one_line(tiny: Path, plan: Path, arguments: list[str], message: str) -> None:
    said, out, _ = call(*({"TINY": tiny, "PLAN": plan}.get(argument, argument) for argument in arguments))
    assert said.startswith("error: ")
    assert not out
    assert message in said
    assert "\n" not in said


@pytest.mark.parametrize(
    "command",
    [
        ["evaluate", "TINY", "--tasks", "pocket_piqa"], ["benchmark", "TINY", "other"],
        ["search", "TINY", "--kinds", "ssm", "--steps", "1", *TEXT],
    ],
)  # fmt: skip
@pytest.mark.parametrize("output", [".", "/", "FOLDER", "FOLDER/file/scores.json"])
def test_results_need_a_place_before_a_model_is_loaded(
    tiny: Path, tmp_path: Path, command: list[str], output: str
) -> None:
    (tmp_path / "file").write_text("mine")
    arguments = [str(tiny) if argument == "TINY" else argument for argument in command]
    said, out, err = call(*arguments, "--output", output.replace("FOLDER", str(tmp_path)))
    assert "cannot be written: expected a file in a folder that may be written to" in said
    assert (out, err) == ("", "")


def test_results_that_cannot_be_stored_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RecordError):
        finish({"scores": 1}, tmp_path)
    assert json.loads(capsys.readouterr().out) == {"scores": 1}


@pytest.mark.parametrize("arguments", [["search", "TINY", "--steps", "-1"], ["exract"], ["evaluate", "TINY"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err


def test_as_a_program_a_mistake_exits_with_1() -> None:
    command = [sys.executable, "-m", "shedder_utils", "plan", "--profile", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: profile nowhere: not found")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", [command.name for command in app.registered_commands])
def test_every_command_explains_itself(name: str) -> None:
    code, out, _ = call(name, "--help")
    assert not code
    assert "Usage" in out
    parameters = get_command(app).commands[name].params  # type: ignore[attr-defined]
    assert not [parameter.name for parameter in parameters if not parameter.help]


def test_the_help_of_search_names_kinds_and_metrics() -> None:
    assert import_module("shedder_utils.search").METRICS == METRICS
    out = call("search", "--help")[1]
    assert all(name in out for name in (*KINDS, *METRICS))


def test_the_plan_says_what_its_hours_leave_out(tmp_path: Path) -> None:
    options = ["--profile", "smoke", "--models", "smoke-mamba2", "--output", tmp_path]
    code, out, err = call("plan", *options)
    assert not code, err
    assert json.loads(out)["not_counted"][0] == "inventory"
    (line,) = (line for line in err.splitlines() if "do not count" in line)
    assert all(f" {name}" in line for name in ("inventory", "speed", "pareto", "savings of joint_decode"))
    assert {line.split()[-1] for line in err.splitlines() if "timed together" in line} == {"fits"}
    code, out, err = call("plan", *options, "--studies", "ssm_pruning")
    assert not json.loads(out)["not_counted"]
    assert "do not count" not in err


def test_a_run_on_a_gpu_without_kernels_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shedder_utils.notebooks.run", lambda *_, **__: [])
    monkeypatch.setattr("shedder_utils.kernels.active", lambda device: "transformers")
    assert call("run", "--profile", "paper")[2].startswith("WARNING: the kernels of mamba_ssm do not run here")
    assert not call("run", "--profile", "laptop")[2]
    monkeypatch.setattr("shedder_utils.kernels.active", lambda device: "mamba_ssm")
    assert not call("run", "--profile", "paper")[2]


def test_stages_are_read_as_table_3_writes_them() -> None:
    targets = {row.labels["target"] for row in paper.rows(3)} - {"dense"}
    for target in targets:
        text = " + ".join(f"{part}: 2" for part in target.split(" + "))
        assert " + ".join(" & ".join(stage.kinds) for stage in stages_of(text)) == target
    assert [stage.group for stage in stages_of("mlp_channels: 20 x 512 + ssm: 1")] == [512, 1024]


@pytest.mark.parametrize("text", ["", "ssm", "ssm: x", "ssm: 3 +", "ssm: 3 x", "ssm: -1"])
def test_malformed_stages_are_refused(text: str) -> None:
    with pytest.raises(PlanError, match="is malformed: expected 'kind & kind: steps'"):
        stages_of(text)
