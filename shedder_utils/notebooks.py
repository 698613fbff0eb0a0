"""Running the notebooks: papermill executes them in order, and what they compute is recorded as they go.

A notebook names the studies that it computes in its metadata (`shedder: {studies: [...]}`) and takes its settings from
one cell tagged `parameters`. It runs where one of them is chosen, or all of them if it sets them beside each other
(`together: true`); one that names none shows what is there, and always runs. All notebooks of a run share one Python
process, since importing torch, transformers and lm-eval takes longer than many a notebook; each starts with nothing
defined.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import profiles, report
from .errors import ProfileError, ShedderError
from .files import ROOT, in_project
from .freshness import is_fresh, made_from, mark
from .profiles import RELEASED, Profile
from .schedule import Schedule, choosing, steps

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager

FOLDER = ROOT / "notebooks"
KERNEL_OPTIONS = ["--HistoryManager.hist_file=:memory:", "--IPKernelApp.log_level=ERROR"]
"""Nothing is kept of what a kernel executes; that its loopback is not encrypted is no news."""
NO_WIDGETS = "ignore:IProgress not found"
"""Progress bars of a run are lines on stderr."""
ENDED = "its Python process ended: killed, most often for want of memory"


class NotebookError(ShedderError):
    """A notebook failed. where: its name and cell; why: the last line of what went wrong; target: as far as it ran."""

    def __init__(self, where: str, why: str, target: Path) -> None:
        super().__init__(f"{where}: {why}; see {target}")
        self.why = why


def run(
    profile: str, *, models: Sequence[str] = (), studies: Sequence[str] = (), output: str | Path = "runs"
) -> list[Path]:
    """Execute the notebooks of some studies, or all; return the tables and figures they leave.

    profile: a name or a path; models: names in it, none for all; output: the folder for records, tables, figures and
    executed notebooks. A study that no notebook shows is computed before them. What fails does not keep the rest from
    running, unless one notebook after the other fails in the same way. Raises ProfileError for a model or study that
    the profile does not have, and in the end ShedderError if something failed, with the last line of the first.
    """
    settings = profiles.load(profile)
    _known("model", models, settings.models)
    _known("study", studies, settings.study_names)
    chosen, unshown = _chosen(settings, models, studies), _unshown(settings, studies)
    print(f"profile {settings.name}: {settings.title}", file=sys.stderr)
    print(
        f"models: {', '.join(models or settings.models)}; notebooks: {', '.join(f.stem for f in chosen)}",
        file=sys.stderr,
    )
    what = computed(settings, models, studies)
    schedule = Schedule(settings, output, models=models, studies=what)
    print(*schedule.lines(), sep="\n", file=sys.stderr)
    parameters = {"profile": profile, "models": ",".join(models), "output": str(output)}
    with choosing(models, what):
        failed = _compute(unshown, schedule, output) if unshown else []
        failures = _execute_stale(chosen, schedule, parameters)
    built = report.build(profile, output)
    if failures:
        raise ShedderError(f"{len(failures)} of {len(chosen)} notebooks failed; the first: {failures[0]}")
    if failed:
        raise ShedderError(f"not computed: {failed[0]}")
    return built


def computed(profile: Profile, models: Sequence[str] = (), studies: Sequence[str] = ()) -> list[str]:
    """The studies that `run` computes for those that are asked for: a notebook computes all that it names."""
    named = {name for names in _chosen(profile, models, studies).values() for name in names}
    return [name for name in profile.study_names if name in {*named, *_unshown(profile, studies)}]


def _chosen(profile: Profile, models: Sequence[str], studies: Sequence[str]) -> dict[Path, set[str]]:
    """The notebooks that a run of some models and studies executes, and the studies that each computes."""
    wanted, found = set(studies or profile.study_names), dict[Path, set[str]]()
    for file, metadata in _metadata().items():
        named = set(metadata["studies"])
        asked = named <= wanted if metadata.get("together") else named & wanted
        if not named or (asked and steps(profile, models, list(named))):
            found[file] = named
    return found


def _unshown(profile: Profile, studies: Sequence[str]) -> list[str]:
    """The studies asked for that no notebook shows: pruning studies, and the orders that the authors released."""
    shown = {name for metadata in _metadata().values() for name in metadata["studies"]}
    known = [*profile.studies, *([RELEASED] if profile.released else [])]
    return [name for name in studies or known if name in known and name not in shown]


def _compute(names: Sequence[str], schedule: Schedule, output: str | Path) -> list[str]:
    """Compute what is left of some studies, and return how some failed: that keeps no other from being computed.

    Of what is no error of ours the traceback is shown.
    """
    import torch

    from .studies import pruning, released_orders
    from .workbench import Workbench

    profile, left, failures = schedule.profile, set(schedule.left), list[str]()
    for name in names:
        compute: Callable[[Workbench], object] = released_orders if name == RELEASED else partial(pruning, study=name)
        for model in profile.models:
            if left & set(steps(profile, [model], [name])):
                try:
                    compute(Workbench(profile, model, output))
                except Exception as error:
                    if not isinstance(error, ShedderError):
                        traceback.print_exc()
                    print(f"error: {error}", file=sys.stderr, flush=True)
                    failures.append(f"{name}, {model}: {str(error) or type(error).__name__}")
    gc.collect()
    torch.cuda.empty_cache()  # the notebooks run in another process, which needs the memory of the GPU
    return failures


def _execute_stale(chosen: dict[Path, set[str]], schedule: Schedule, parameters: dict[str, str]) -> list[str]:
    """Execute those notebooks that a new run would change: what they show is not recorded, or was made from other.

    Returns how some failed.
    """
    settings, left = schedule.profile, set(schedule.left)
    folder = in_project(parameters["output"]) / "notebooks" / settings.name
    wanted = {file: made_from(file, settings, parameters) for file in chosen}
    stale = [
        file
        for file, named in chosen.items()
        if left & set(steps(settings, studies=list(named))) or not is_fresh(folder / file.name, wanted[file])
    ]
    if not stale:
        print(f"Nothing to do: all runs are recorded, and the notebooks in {folder} show them.", file=sys.stderr)
        return []
    failures: list[NotebookError] = []
    with _kernel(settings.threads) as kernel:
        for number, file in enumerate(stale, 1):
            print(f"[{number}/{len(stale)}] {file.stem}", file=sys.stderr, flush=True)
            try:
                execute(file, folder / file.name, parameters, kernel)
            except NotebookError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                again = bool(failures) and failures[-1].why == error.why
                failures.append(error)
                if again:
                    break
            else:
                mark(folder / file.name, wanted[file])
    return list(map(str, failures))


def execute(notebook: Path, target: Path, parameters: dict[str, Any], kernel: AsyncKernelManager | None = None) -> None:
    """Execute one notebook into `target`, from the project's root, in a running kernel or one of its own.

    Raises ProfileError for a parameter that it does not have, NotebookError with the last line of what went wrong.
    """
    import papermill
    from jupyter_core.utils import run_sync
    from nbclient.exceptions import DeadKernelError
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
        if kernel is not None:  # what failed stays in its memory, and a GPU's; after an error of CUDA nothing runs
            run_sync(kernel.restart_kernel)(now=True)
        raise NotebookError(
            f"{notebook.name}, cell {error.exec_count}", f"{error.ename}: {error.evalue}", target
        ) from error
    except DeadKernelError as error:
        raise NotebookError(notebook.name, ENDED, target) from error
    _tidy(target)


@contextmanager
def _kernel(threads: int | None = None) -> Iterator[AsyncKernelManager]:
    """A Python kernel in the project's root, for as long as the body runs; nothing is kept of what it executes.

    Its manager is one of asyncio's: with another, nbclient waits for ever for a process that was killed.
    threads: that torch and the kernels of scans take there, by default as many as they would.
    """
    from jupyter_client.manager import AsyncKernelManager
    from jupyter_core.utils import run_sync

    environment = {"PYTHONWARNINGS": NO_WIDGETS} | os.environ
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    kernel = AsyncKernelManager(kernel_name="python3")
    run_sync(kernel.start_kernel)(cwd=str(ROOT), env=environment, extra_arguments=KERNEL_OPTIONS)
    try:
        yield kernel
    finally:
        run_sync(kernel.shutdown_kernel)(now=True)


def _empty(kernel: AsyncKernelManager) -> None:
    """Drop all that a kernel's user has defined, and count its cells from 1 again; imported modules stay loaded.

    A kernel whose process has ended gets a new one.
    """
    from jupyter_core.utils import run_sync

    if not run_sync(kernel.is_alive)():
        run_sync(kernel.restart_kernel)(now=True)
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


def _metadata() -> dict[Path, dict[str, Any]]:
    """What each notebook says of itself: `studies`, and whether it takes them `together`."""
    files = sorted(FOLDER.glob("[0-9]*.ipynb"))
    return {file: json.loads(file.read_text(encoding="utf-8"))["metadata"]["shedder"] for file in files}


def _known(what: str, names: Sequence[str], there: Collection[str]) -> None:
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ProfileError(f"{what} {unknown[0]!r} is not in the profile: expected one of {', '.join(there)}")
