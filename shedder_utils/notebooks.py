"""Running the notebooks: papermill executes them in order, and what they compute is recorded as they go.

A notebook names the studies it shows in its metadata (`shedder: {studies: [...]}`) and takes its settings from one
cell tagged `parameters`. All notebooks of a run share one Python process, since importing torch, transformers and
lm-eval takes longer than many a notebook; each starts with nothing defined.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import profiles, report
from .errors import ProfileError, ShedderError
from .files import ROOT, in_project
from .freshness import is_fresh, made_from, mark
from .profiles import Profile
from .schedule import Schedule

if TYPE_CHECKING:
    from jupyter_client.manager import KernelManager

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
    _known("study", studies, settings.study_names)
    wanted = set(studies or settings.study_names)
    chosen = [file for file in sorted(FOLDER.glob("[0-9]*.ipynb")) if wanted & set(_studies(file))]
    print(f"profile {settings.name}: {settings.title}", file=sys.stderr)
    print(
        f"models: {', '.join(models or settings.models)}; notebooks: {', '.join(f.stem for f in chosen)}",
        file=sys.stderr,
    )
    print(*Schedule(settings, output, models=models, studies=studies).lines(), sep="\n", file=sys.stderr)
    parameters = {"profile": profile, "models": ",".join(models), "output": str(output)}
    _execute_stale(chosen, settings, parameters)
    return report.build(profile, output)


def _execute_stale(chosen: Sequence[Path], settings: Profile, parameters: dict[str, str]) -> None:
    """Execute those notebooks that a new run would change: what they show is not recorded, or was made from other."""
    folder, models = in_project(parameters["output"]) / "notebooks" / settings.name, parameters["models"].split(",")
    left = Schedule(settings, parameters["output"], models=list(filter(None, models))).left
    waiting = {step.part_of for step in left}
    wanted = {file: made_from(file, settings, parameters) for file in chosen}
    stale = [
        file for file in chosen if waiting & {None, *_studies(file)} or not is_fresh(folder / file.name, wanted[file])
    ]
    if not stale:
        print(f"Nothing to do: all runs are recorded, and the notebooks in {folder} show them.", file=sys.stderr)
        return
    with _kernel() as kernel:
        for number, file in enumerate(stale, 1):
            print(f"[{number}/{len(stale)}] {file.stem}", file=sys.stderr, flush=True)
            execute(file, folder / file.name, parameters, kernel)
            mark(folder / file.name, wanted[file])


def execute(notebook: Path, target: Path, parameters: dict[str, Any], kernel: KernelManager | None = None) -> None:
    """Execute one notebook into `target`, from the project's root, in a running kernel or one of its own.

    Raises ProfileError for a parameter that it does not have, ShedderError with the last line of what went wrong.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    known = papermill.inspect_notebook(str(notebook))
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        raise ProfileError(f"{notebook.name}: no parameter {unknown[0]!r}, expected one of {', '.join(known)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if kernel is not None:
        _empty(kernel)
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
            km=kernel,
            progress_bar=False,
            stderr_file=sys.stderr,
        )
    except PapermillExecutionError as error:
        what = f"{notebook.name}, cell {error.exec_count}: {error.ename}: {error.evalue}"
        raise ShedderError(f"{what}; see {target}") from error
    _tidy(target)


@contextmanager
def _kernel() -> Iterator[KernelManager]:
    """A Python kernel in the project's root, for as long as the body runs; nothing is kept of what it executes."""
    from jupyter_client.manager import KernelManager

    kernel = KernelManager(kernel_name="python3")
    kernel.start_kernel(cwd=str(ROOT), extra_arguments=["--HistoryManager.hist_file=:memory:"])
    try:
        yield kernel
    finally:
        kernel.shutdown_kernel(now=True)


def _empty(kernel: KernelManager) -> None:
    """Drop all that a kernel's user has defined, and count its cells from 1 again; imported modules stay loaded."""
    client = kernel.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=300)
        client.execute_interactive("get_ipython().reset(); __import__('gc').collect()", silent=True)
    finally:
        client.stop_channels()


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


def _known(what: str, names: Sequence[str], there: Collection[str]) -> None:
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ProfileError(f"{what} {unknown[0]!r} is not in the profile: expected one of {', '.join(there)}")
