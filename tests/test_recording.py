"""Recording: a finished run becomes the recorded one, whole and without a trace of this machine, or nothing changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from typer.testing import CliRunner
from world import AS_IN_THE_PAPER, RISES_AS_IN_THE_PAPER, World, small_profile

from shedder_utils import profiles, recording, records, report
from shedder_utils.__main__ import app
from shedder_utils.errors import RecordError
from shedder_utils.provenance import Code
from shedder_utils.report.verify import verify

NAME = "01_some.ipynb"
HTML = '<style>#T_a1b2c_row0 {}</style><table id="T_a1b2c"></table>'


def notebook(executed: bool, *outputs: Any) -> Any:
    """Prose, parameters and one cell with outputs; an executed copy has more of what papermill leaves."""
    parameters = new_code_cell('profile = "small"', metadata={"tags": ["parameters"]})
    injected = new_code_cell('output = "elsewhere"', metadata={"tags": ["injected-parameters"]})
    code = new_code_cell("show()", outputs=list(outputs) if executed else [])
    cells = [new_markdown_cell("Old prose." if executed else "New prose."), parameters]
    found = new_notebook(cells=[*cells, injected, code] if executed else [*cells, code])
    found.metadata["shedder"] = {"studies": ["block_pruning"]}
    if executed:
        found.metadata["language_info"] = {"name": "python", "version": "3.11.7"}
        code.execution_count = 7
    return found


def stream(text: str, name: str = "stdout") -> Any:
    return new_output("stream", name=name, text=text)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A project with one notebook that has no outputs yet, and a record of an earlier run."""
    folder = tmp_path / "project"
    old = World(folder / "results", profiles.load(small_profile(tmp_path)))
    old.store("old_study", "pocket-mamba", "scores", metrics={})
    (folder / "notebooks").mkdir()
    nbformat.write(notebook(executed=False), folder / "notebooks" / NAME)
    (folder / "README.md").write_text("Prose.\n<!-- models: from records -->\n<!-- end -->\n")
    return folder


@pytest.fixture
def world(tmp_path: Path) -> World:
    profile = profiles.load(small_profile(tmp_path))
    return World(tmp_path / "runs", profile, loss=AS_IN_THE_PAPER, rise=RISES_AS_IN_THE_PAPER, dirty=False).finish()


@pytest.fixture
def record(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`recording.record` with notebooks that run in no time, and tables alone for a report."""
    monkeypatch.setattr(recording, "code_version", lambda: Code(commit="c" * 40, dirty=False))
    monkeypatch.setattr(report.figures, "available", lambda _: [])

    def run(*outputs: Any) -> list[Path]:
        def execute(_: str, output: Path) -> None:
            assert (base / "results" / "small" / "dense").exists(), "notebooks show what is recorded"
            target = Path(output) / "notebooks" / "small" / NAME
            target.parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook(True, *outputs), target)

        monkeypatch.setattr(recording.notebooks, "run", execute)
        return recording.record(str(tmp_path / "small.yaml"), tmp_path / "runs", base)

    return run


def test_a_finished_run_becomes_the_recorded_one(record, world, base):
    written = record(stream("one\n"), stream("progress", "stderr"), stream("two\n"))
    assert all(path.exists() and path.is_relative_to(base) for path in written)
    ours, theirs = ({f.relative_to(root): f.read_bytes() for f in root.rglob("small/**/*.json")}
                    for root in (world.root, base / "results"))  # fmt: skip
    assert {name: text for name, text in ours.items() if "notebooks" not in str(name)} == theirs
    cells = nbformat.read(base / "notebooks" / NAME, as_version=4).cells
    assert [cell.source for cell in cells] == ["New prose.", 'profile = "small"', "show()"]
    assert [output.text for output in cells[2].outputs] == ["one\ntwo\n"]
    assert [cell.execution_count for cell in cells[1:]] == [1, 2]
    assert "| recorded |" in (base / "figures" / "small" / "table_1.md").read_text()
    assert not [finding for finding in verify(world.profile, world.root, base) if finding.level != "note"]


def test_the_command_names_the_files_written(monkeypatch):
    written = [Path("results", name) for name in ("one.json", "manifest.json")]
    monkeypatch.setattr(recording, "record", lambda *_: written)
    ran = CliRunner().invoke(app, ["record", "--profile", "small"])
    assert ran.stderr == "".join(f"{file}\n" for file in written)
    assert json.loads(ran.stdout) == {"profile": "small", "files": [str(file) for file in written]}


def test_the_same_run_recorded_twice_leaves_the_same_bytes(record, world, base):
    shown = new_output("display_data", data={"text/html": HTML, "image/png": "AA/tmp/0xdeadbeef"})
    shown["data"]["text/plain"] = "<Styler at 0x7f470f7f2f50>"
    record(shown)
    before = {path: path.read_bytes() for path in base.rglob("*.*") if path.is_file()}
    shown["data"]["text/html"] = HTML.replace("a1b2c", "00fff")
    shown["data"]["text/plain"] = "<Styler at 0x7f470f7f0000>"
    record(shown)
    assert {path: path.read_bytes() for path in before} == before
    assert '#T_2_0_row0 {}</style><table id=\\"T_2_0\\"' in (base / "notebooks" / NAME).read_text()


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        (stream(f"see {Path.home()}/runs"), "of this machine only"),
        (stream("<Model object at 0x7f3c2a10bd90>"), "of this machine only"),
        (new_output("error", ename="ValueError", evalue="no"), "failed with ValueError: no"),
    ],
    ids=["path", "address", "error"],
)
def test_outputs_that_must_not_be_are_refused(record, world, output, complaint):
    with pytest.raises(RecordError, match=rf"^{NAME}, cell 2: .*{complaint}"):
        record(output)


def test_code_that_changed_since_is_refused(record, world, base):
    changed = notebook(executed=False)
    changed.cells[2].source = "show_more()"
    nbformat.write(changed, base / "notebooks" / NAME)
    with pytest.raises(RecordError, match=f"{NAME}: its code was changed since it ran"):
        record()


def unfinished(world: World, _: pytest.MonkeyPatch) -> None:
    records.path(world.root, "small", "block_pruning", "pocket-mamba", "03_removed").unlink()


def broken(world: World, _: pytest.MonkeyPatch) -> None:
    file = records.path(world.root, "small", "block_pruning", "pocket-mamba", "03_removed")
    file.write_text(file.read_text().replace("400", "401"))


def changed_then(world: World, _: pytest.MonkeyPatch) -> None:
    world.dirty = True
    world.store("dense", "pocket-mamba", "scores", metrics=world.metrics("dense", "pocket-mamba", 0))


def changed_now(_: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "code_version", lambda: Code(commit="c" * 40, dirty=True))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (unfinished, "1 runs are missing, such as block_pruning/pocket-mamba/03_removed"),
        (broken, "was changed after it was written"),
        (changed_then, "scores.json: was made by code that differs from its commit"),
        (changed_now, "the package differs from its commit"),
    ],
)
def test_a_run_that_is_not_clean_is_refused_and_nothing_changes(record, world, base, monkeypatch, spoil, complaint):
    spoil(world, monkeypatch)
    before = {path: path.read_bytes() for path in base.rglob("*.*") if path.is_file()}
    with pytest.raises(RecordError, match=complaint):
        record()
    assert {path: path.read_bytes() for path in base.rglob("*.*") if path.is_file()} == before


def test_notebooks_of_another_profile_stay_as_they_are(world, base, tmp_path):
    before = (base / "notebooks" / NAME).read_bytes()
    other = world.profile.model_copy(update={"name": "other"})
    assert recording.record_notebooks(other, tmp_path, base) == []
    assert (base / "notebooks" / NAME).read_bytes() == before


def test_the_manifest_names_every_file_once(record, world, base):
    record()
    listed = json.loads((base / "results" / "manifest.json").read_text())["files"]
    there = {path.relative_to(base).as_posix() for path in base.rglob("*.*") if path.is_file()}
    assert set(listed) == there - {"results/manifest.json", "README.md"}
