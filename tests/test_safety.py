"""Safety: nothing that comes with a checkpoint runs, whatever its folder holds, and the code asks for nothing else."""

from __future__ import annotations

import ast
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shedder_utils import ModelError, load_model
from shedder_utils.families import random_model
from shedder_utils.pocket.tokenizer import load_tokenizer

PACKAGE = Path(__file__).parents[1] / "shedder_utils"
CALLS = [
    (file.relative_to(PACKAGE), node)
    for file in sorted(PACKAGE.rglob("*.py"))
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, ast.Call)
]


def name_of(call: ast.Call) -> str:
    """The name of what is called, such as "torch.load"."""
    return ast.unparse(call.func)


def keyword(call: ast.Call, name: str) -> Any:
    """The constant that a call gives for a keyword; None if it gives none."""
    found = [word.value for word in call.keywords if word.arg == name]
    return ast.literal_eval(found[0]) if found else None


def test_no_profile_is_special_to_the_code() -> None:
    names = {file.stem for file in (PACKAGE / "profiles").glob("*.yaml")}
    assert "smoke" in names
    decides = (ast.Compare, ast.match_case, ast.arguments)
    found = [
        (file.relative_to(PACKAGE), ast.unparse(node))
        for file in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, decides)
        and {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)} & names
    ]
    assert not found


def test_tensors_alone_are_unpickled() -> None:
    loads = [(file, call) for file, call in CALLS if name_of(call) == "torch.load"]
    assert loads
    assert all(keyword(call, "weights_only") is True for _, call in loads), loads


def test_nothing_else_runs_what_a_file_says() -> None:
    forbidden = ("pickle.load", "pickle.loads", "eval", "exec", "joblib.load", "yaml.load", "torch.hub.load")
    assert not [(file, name_of(call)) for file, call in CALLS if name_of(call) in forbidden]
    assert not [file for file, call in CALLS if keyword(call, "allow_pickle")]


def test_code_beside_a_checkpoint_is_never_asked_for() -> None:
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    automatic = [
        (file, call) for file, call in CALLS
        if name_of(call) in [f"{name}.from_pretrained" for name in classes] and file.parts[0] != "pocket"
    ]  # fmt: skip
    assert automatic
    assert all(keyword(call, "trust_remote_code") is False for _, call in automatic), automatic
    given = [keyword(call, "trust_remote_code") for _, call in CALLS]
    assert True not in given


class Payload:
    """Unpickling it creates a file: harmless, and seen."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint of a random Mamba-2 in the format of transformers."""
    model = random_model(family="mamba2", layers=2, hidden_size=32, seed=0, vocab_size=len(load_tokenizer()))
    model.save_pretrained(tmp_path / "model")
    load_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def code_that_leaves(trace: Path) -> str:
    """A module that creates a file when it is imported."""
    return f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Model: pass\nclass Config: pass\n"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_payload_in_the_weights_does_not_run(folder: Path, tmp_path: Path, name: str, writer: str) -> None:
    trace, weights = tmp_path / "ran", load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    loaded = {**weights, "payload": Payload(trace)}
    if writer == "torch":
        torch.save(loaded, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(loaded))
    with pytest.raises(ModelError, match="expected whole safetensors"):
        load_model(folder)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists(), "the payload does nothing, so its absence proves nothing"


def test_a_payload_beside_whole_weights_is_not_read(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(trace)))
    load_model(folder)
    assert not trace.exists()


@pytest.mark.parametrize("model_type", ["mamba2", "someones_own"])
def test_code_in_a_checkpoint_does_not_run(folder: Path, tmp_path: Path, model_type: str) -> None:
    trace = tmp_path / "ran"
    (folder / "modeling_own.py").write_text(code_that_leaves(trace))
    own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    edit(folder / "config.json", model_type=model_type, auto_map=own)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling_own.Model", None]})
    if model_type == "mamba2":
        assert type(load_model(folder)[0]).__module__.startswith("transformers.")
    else:
        with pytest.raises(ModelError):
            load_model(folder)
    assert not trace.exists()
    exec((folder / "modeling_own.py").read_text())
    assert trace.exists(), "the code does nothing, so its absence proves nothing"
