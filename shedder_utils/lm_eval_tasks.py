"""lm-eval's tasks with their data: the pocket ones, and those that come with it, whose data are pinned to a commit."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from . import hub
from .errors import DataError
from .pocket.tasks import TASKS, task_configs, tasks_fingerprint
from .records import DataFacts

REVISIONS = {
    "EleutherAI/lambada_openai": "900124bf3b8235c6daf21033af9948b3f07346c4",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "baber/piqa": "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "allenai/winogrande": "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    "allenai/openbookqa": "388097ea7776314e93a529163e0fea805b8a6454",
}
"""The commit of each data set behind the paper's seven tasks. Other tasks of lm-eval get what the Hub has."""


@cache
def loaded_tasks(tasks: tuple[str, ...]) -> Any:
    """Pocket tasks and lm-eval's own as it loads them, zero-shot: once in a process, for all models that are scored.

    Raises DataError for a task that does not exist, or whose data cannot be read.
    """
    from lm_eval.tasks import TaskManager

    own = [task for task in tasks if task not in TASKS]
    manager = _lm_evals() if own else TaskManager(include_defaults=False)
    unknown = [task for task in own if task not in manager.all_tasks]
    if unknown:
        raise DataError(f"task {unknown[0]!r} does not exist: expected one of {', '.join(TASKS)} or a task of lm-eval")
    loaded = manager.load(list(task_configs(tuple(task for task in tasks if task in TASKS))))
    for name in own:
        for part, found in from_hub(manager, name).items():
            loaded[part].update(found)
    for task in loaded["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    return loaded


def task_facts(names: Sequence[str]) -> DataFacts:
    """What a record keeps of the tasks' data: of pocket tasks their files, of lm-eval's own the items to be answered.

    The revision is each data set with the commit that it was read at. Raises DataError as `loaded_tasks` does: data
    have to be there even where all scores are recorded, for a record is only good for the same items.
    """
    pocket = tuple(name for name in names if name in TASKS)
    fingerprint, revisions = tasks_fingerprint(pocket), dict[str, None]()
    if len(pocket) < len(names):
        digest = hashlib.sha256(fingerprint.encode())
        for name, task in loaded_tasks(tuple(names))["tasks"].items():
            if name not in TASKS:
                digest.update(f"{name}:{_items_fingerprint(task)}".encode())
                if commit := _commit(task):
                    revisions[f"{task.DATASET_PATH}@{commit}"] = None
        fingerprint = digest.hexdigest()
    return DataFacts(name=", ".join(names), revision=", ".join(revisions) or None, fingerprint=fingerprint)


def _commit(task: Any) -> str | None:
    """The commit that a task's data were read at, after which `datasets` names its folder; None for local files."""
    files = [file for split in task.dataset.values() for file in getattr(split, "cache_files", [])]
    folders = {Path(file["filename"]).parent.name for file in files}
    return next((name for name in sorted(folders) if re.fullmatch(r"[0-9a-f]{40}", name)), None)


@cache
def _items_fingerprint(task: Any) -> str:
    """sha256 of the items that a task asks for, in their order."""
    digest = hashlib.sha256()
    for item in task.eval_docs:
        digest.update(json.dumps(item, sort_keys=True, default=str).encode())
    return digest.hexdigest()


@cache
def _lm_evals() -> Any:
    """All tasks that come with lm-eval, by name: it reads 14,000 files for that, which takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def from_hub(manager: Any, name: str) -> Any:
    """A task of lm-eval, or a group of them, with its data. Raises DataError if the data cannot be read."""
    source = str((manager.task_index[name].cfg or {}).get("dataset_path", name))
    with hub.checked(f"task {name}: {source}", source, DataError, "dataset"), _pinned():
        return manager.load([name])


@contextmanager
def _pinned() -> Iterator[None]:
    """Inside, data sets are read at their commit, for which lm-eval has a setting in its task files only."""
    import datasets

    load = datasets.load_dataset

    def at_commit(path: str, *arguments: Any, **options: Any) -> Any:
        return load(path, *arguments, **{"revision": REVISIONS.get(path), **options})

    datasets.load_dataset = at_commit
    try:
        yield
    finally:
        datasets.load_dataset = load
