"""The notebooks: their anatomy, and that all of them run from end to end on random models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from shedder_utils import ProfileError, manifest, notebooks, profiles, records, report
from shedder_utils.report.counterparts import ABSENT
from shedder_utils.report.verify import verify

FILES = sorted(notebooks.FOLDER.glob("*.ipynb"))
POCKET = set(profiles.load("pocket").study_names)
STUDIES = {file: set(nbformat.read(file, as_version=4).metadata["shedder"]["studies"]) for file in FILES}
RECORDED = [file for file in FILES if not STUDIES[file] or STUDIES[file] & POCKET]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_anatomy(file: Path) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    headings = re.findall(r"^## (.+)", prose, re.M)
    assert 15 <= len(notebook.cells) <= 25
    assert sum(len([line for line in cell.source.split("\n") if line.strip()]) for cell in code) <= 60
    assert not any(re.search(r"^\s*(def|class) ", cell.source, re.M) for cell in code)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    assert headings[0] == "The claim"
    assert headings[-3:] == ["What to take away", "Provenance", "Where next"]
    assert "**Cost**" in notebook.cells[0].source
    assert "widgets" not in notebook.metadata


@pytest.mark.parametrize("file", RECORDED, ids=lambda file: file.stem)
def test_outputs_are_committed(file: Path) -> None:
    code = [cell for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert all(cell.execution_count for cell in code)
    assert any("text/markdown" in output.get("data", {}) for output in outputs)
    drawn = sum("report.figure(" in cell.source for cell in code)
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= drawn
    assert not any(output.output_type == "error" for output in outputs)
    assert str(notebooks.ROOT) not in file.read_text()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_links_lead_somewhere(file: Path) -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", file.read_text()):
        assert (file.parent / link).exists(), link


def test_all_run_and_leave_tables_figures_and_themselves(smoke_run: tuple[Path, list[Path]]) -> None:
    output, shown = smoke_run
    assert {path.name for path in shown} >= {
        "table_1.md", "table_1.csv", "table_1.tex", "table_2.md", "figure_2.png",
        "figure_3.pdf", "figure_4.png", "claims.md",
    }  # fmt: skip
    assert all(path.stat().st_size for path in shown)
    assert len(list((output / "notebooks" / "smoke").glob("*.ipynb"))) == len(FILES)


def test_every_table_has_values_of_yours_and_the_run_verifies(
    smoke_run: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    output, _ = smoke_run
    for number in range(1, 13):
        frame = report.table(number, "smoke", output, tmp_path).frame
        own = frame[frame["verdict"] != ABSENT]
        assert set(own["verdict"]) == {"not recorded"}, number
        assert own["yours"].notna().all(), number
    frame = report.table("strategies", "smoke", output, tmp_path).frame
    own = frame[frame["source"] == "yours"]
    assert set(own["study"]) == {"dense", *profiles.load("smoke").pareto.studies}
    assert own[["share", "ppl", "average", "decode"]].notna().all(axis=None)
    assert report.figure("pareto", "smoke", output).records
    manifest.write(tmp_path)
    assert not [finding for finding in verify("smoke", output, tmp_path) if finding.fatal]


def test_models_run_on_as_many_threads_as_the_profile_says(smoke_run: tuple[Path, list[Path]]) -> None:
    output, _ = smoke_run
    assert {record.environment.threads for record in records.find(output)} == {profiles.load("smoke").threads} == {1}


def test_a_report_from_the_same_records_is_the_same(smoke_run: tuple[Path, list[Path]]) -> None:
    output, shown = smoke_run
    before = {path: path.read_bytes() for path in [*shown, *output.glob("smoke/**/*.json")]}
    command = [sys.executable, "-m", "shedder_utils", "report", "--profile", "smoke", "--output", str(output)]
    report = subprocess.run(command, capture_output=True, text=True)
    assert json.loads(report.stdout) == {"profile": "smoke", "files": [str(path) for path in shown]}
    assert report.stderr.endswith("".join(f"{path}\n" for path in shown))
    assert {path: path.read_bytes() for path in before} == before


def test_a_second_run_executes_nothing(
    smoke_run: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output, shown = smoke_run
    monkeypatch.setattr(notebooks, "execute", lambda *_: pytest.fail("ran again"))
    assert notebooks.run("smoke", output=output) == shown
    assert "Nothing to do" in capsys.readouterr().err


def test_notebooks_share_a_process_but_no_names(tmp_path: Path) -> None:
    sources = {"first": "import wave; left = 1", "second": "import sys; ('left' in globals(), 'wave' in sys.modules)"}
    with notebooks._kernel() as kernel:
        for name, source in sources.items():
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
            nbformat.write(notebook, tmp_path / f"{name}.ipynb")
            notebooks.execute(tmp_path / f"{name}.ipynb", tmp_path / "executed" / f"{name}.ipynb", {}, kernel)
    cell = nbformat.read(tmp_path / "executed" / "second.ipynb", as_version=4).cells[0]
    assert cell.execution_count == 1
    assert cell.outputs[0]["data"]["text/plain"] == "(False, True)"


@pytest.mark.parametrize("model", ["smoke-mamba2", "smoke-hymba"])
def test_the_first_notebook_takes_a_model_of_any_family(tmp_path: Path, model: str) -> None:
    parameters = {"profile": "smoke", "models": model, "output": str(tmp_path)}
    notebooks.execute(FILES[0], tmp_path / "executed.ipynb", parameters)
    assert len(list(tmp_path.glob(f"smoke/dense/{model}/*.json"))) == 2


def test_a_notebook_that_fails_says_where_and_why(tmp_path: Path) -> None:
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), tmp_path / "one.ipynb")
    with notebooks._kernel() as kernel, pytest.raises(notebooks.NotebookError) as caught:
        notebooks.execute(tmp_path / "one.ipynb", tmp_path / "executed.ipynb", {}, kernel)
    assert str(caught.value).startswith("one.ipynb, cell 1: ZeroDivisionError: division by zero; see ")


@pytest.mark.parametrize(
    ("end", "complaint"),
    [
        ("import os; os._exit(9)", r"^failing\.ipynb: its Python process ended: .* memory; see "),
        ("1 / 0", r"^failing\.ipynb, cell 1: ZeroDivisionError: division by zero; see "),
    ],
)
def test_after_a_notebook_that_failed_the_next_has_a_new_process(tmp_path: Path, end: str, complaint: str) -> None:
    for name, source in {"failing": f"import wave; {end}", "next": "import sys; 'wave' in sys.modules"}.items():
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), tmp_path / f"{name}.ipynb")
    with notebooks._kernel() as kernel:
        with pytest.raises(notebooks.NotebookError, match=complaint):
            notebooks.execute(tmp_path / "failing.ipynb", tmp_path / "executed.ipynb", {}, kernel)
        notebooks.execute(tmp_path / "next.ipynb", tmp_path / "next.out.ipynb", {}, kernel)
    (cell,) = nbformat.read(tmp_path / "next.out.ipynb", as_version=4).cells
    assert cell.outputs[0]["data"]["text/plain"] == "False"


def test_parameters_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="no parameter 'profil'"):
        notebooks.execute(FILES[0], tmp_path / "out.ipynb", {"profil": "smoke"})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--profile", "poket"], "error: profile poket: not found"),
        (["--profile", "smoke", "--models", "smoke-zamba"], "error: model 'smoke-zamba' is not in the profile"),
        (["--profile", "smoke", "--studies", "tables"], "error: study 'tables' is not in the profile"),
    ],
)
def test_mistakes_on_the_command_line_get_one_line(options: list[str], complaint: str) -> None:
    run = subprocess.run([sys.executable, "-m", "shedder_utils", "run", *options], capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith(complaint)
    assert run.stderr.count("\n") == 1
