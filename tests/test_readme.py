"""The README: its tables are those of the records, its snippets and commands run, its links and targets exist."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from shedder_utils import load_model
from shedder_utils.__main__ import main
from shedder_utils.report import readme

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language; "" for those without one."""
    return [block for name, block in FENCED.findall(text) if name == language]


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the recorded runs at hand."""
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_number_is_that_of_the_records() -> None:
    assert set(readme.BLOCKS) == {found["name"] for found in readme.BLOCK.finditer(TEXT)}
    assert readme.rendered(TEXT) == TEXT, "out of date: python -m shedder_utils.report.readme"


def test_a_changed_number_is_noticed() -> None:
    number = next(iter(re.findall(r"\d+ minutes of computing", TEXT)))
    assert readme.rendered(TEXT.replace(number, "1" + number)) == TEXT


def test_the_python_snippets_run(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for snippet in blocks(TEXT, "python"):
        assert len([line for line in snippet.split("\n") if line.strip()]) <= 12
        exec(compile(snippet, "README.md", "exec"), names)
    assert len(eval(snippet.rstrip().splitlines()[-1], names)), "the last snippet shows its rows"
    assert "speedup" in capsys.readouterr().out
    pruned, _ = load_model("pocket-mamba2-less-3")
    assert pruned.num_parameters() < names["model"].num_parameters()  # type: ignore[attr-defined]


def test_the_commands_run(elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [line for block in blocks(TEXT, "") for line in block.splitlines() if line.startswith("python -m")]
    assert 4 <= len(commands) <= 10
    for command in commands:
        python, option, module, *arguments = shlex.split(command)
        assert (python, option, module) == ("python", "-m", "shedder_utils")
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code, (command, ended.value.code)
        json.loads(capsys.readouterr().out)
    assert load_model(elsewhere / "tuned")[0].num_parameters() == load_model(elsewhere / "less-3")[0].num_parameters()


@pytest.mark.parametrize("text", [TEXT, GUIDE], ids=["README", "CONTRIBUTING"])
def test_links_files_and_targets_exist(text: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / link).exists(), link
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)\b", " ".join(re.findall(r"`[^`]+`", text)))) <= targets
    for name in re.findall(r"`((?:shedder_utils|tests|notebooks|pocket|requirements)/[\w./]*)`", text):
        assert (ROOT / name).exists(), name


def test_unofficial_is_said_plainly() -> None:
    assert "**Unofficial.**" in TEXT.split("\n## ")[0]
