"""Running the notebooks: papermill executes them in order, and what they compute is recorded as they go.

A notebook names the studies it shows in its metadata (`shedder: {studies: [...]}`) and takes its settings from one
cell tagged `parameters`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import profiles, report
from .errors import ProfileError, ShedderError
from .files import ROOT, in_project

FOLDER = ROOT / "notebooks"


def run(
    profile: str, *, models: Sequence[str] = (), studies: Sequence[str] = (), output: str | Path = "runs"
) -> list[Path]:
    """Execute the notebooks of some studies, or all; return the tables and figures they leave.

    profile: a name or a path; models: names in it, none for all; output: the folder for records, tables, figures and
    executed notebooks. Raises ProfileError for a model or study that the profile does not have, and ShedderError for
    a notebook that fails, with its last line.
    """
    settings = profiles.load(profile)
    _known("model", models, settings.models)
    _known("study", studies, settings.studies)
    wanted = set(studies or settings.studies)
    chosen = [file for file in sorted(FOLDER.glob("[0-9]*.ipynb")) if wanted & set(_studies(file))]
    print(f"profile {settings.name}: {settings.title}", file=sys.stderr)
    print(
        f"models: {', '.join(models or settings.models)}; notebooks: {', '.join(f.stem for f in chosen)}",
        file=sys.stderr,
    )
    for number, file in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {file.stem}", file=sys.stderr, flush=True)
        parameters = {"profile": profile, "models": ",".join(models), "output": str(output)}
        execute(file, in_project(output) / "notebooks" / settings.name / file.name, parameters)
    return report.build(profile, output)


def execute(notebook: Path, target: Path, parameters: dict[str, Any]) -> None:
    """Execute one notebook into `target`, from the project's root.

    Raises ProfileError for a parameter that it does not have, ShedderError with the last line of what went wrong.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    known = papermill.inspect_notebook(str(notebook))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ProfileError(f"{notebook.name}: no parameter {unknown[0]!r}, expected one of {', '.join(known)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            str(notebook),
            str(target),
            {
                name: value
                for name, value in parameters.items()
                if repr(value) != known[name]["default"].replace('"', "'")
            },
            cwd=str(ROOT),
            kernel_name="python3",
            progress_bar=False,
            stderr_file=sys.stderr,
        )
    except PapermillExecutionError as error:
        what = f"{notebook.name}, cell {error.exec_count}: {error.ename}: {error.evalue}"
        raise ShedderError(f"{what}; see {target}") from error
    _tidy(target)


def _tidy(notebook: Path) -> None:
    """Keep an executed notebook's results; drop progress bars, warnings and what papermill notes of this machine."""
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    content.metadata.pop("papermill", None)
    for cell in content.cells:
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        cell.metadata.pop("exception", None)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(content, notebook)


def _studies(notebook: Path) -> list[str]:
    """The studies that a notebook shows."""
    import nbformat

    metadata = nbformat.read(notebook, as_version=4).metadata
    return list(metadata.get("shedder", {}).get("studies", []))


def _known(what: str, names: Sequence[str], there: dict[str, Any]) -> None:
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ProfileError(f"{what} {unknown[0]!r} is not in the profile: expected one of {', '.join(there)}")
