"""Evaluation: lm-eval's own numbers, with their standard errors, for a model in memory.

The model runs through lm-eval's `simple_evaluate` and `HFLM`; nothing of the harness is replaced. Which metric of a
task is a column of the paper's tables stands in a profile (`paper.yaml`, metric_seven).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import DataError
from .pocket.tasks import TASKS, task_configs

if TYPE_CHECKING:
    from collections.abc import Iterator

BOOTSTRAP = 1000
"""Resamples behind the standard error of lambada's perplexity; the accuracies' are closed formulas."""


@dataclass(frozen=True)
class Score:
    """One metric of one task: its value as lm-eval gives it, its standard error, and the number of items."""

    value: float
    stderr: float
    n: int


Scores = dict[tuple[str, str], Score]
"""Scores by task and metric, such as ("pocket_piqa", "acc_norm")."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int | str = "auto",
) -> Scores:
    """Score a model with lm-eval, zero-shot, on pocket tasks or lm-eval's own.

    limit: items per task, None for all. batch_size: sequences at a time; "auto" lets lm-eval find one.
    Raises DataError for a task that does not exist.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device))
        results = lm_eval.simple_evaluate(
            harness, tasks=_resolve(tasks), num_fewshot=0, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False,
            verbosity="ERROR",
        )  # fmt: skip
    return {
        (task, metric): Score(value, _stderr(found[f"{metric}_stderr,none"]), results["n-samples"][task]["effective"])
        for task, found in results["results"].items()
        for metric, value in _metrics(found)
    }


def _resolve(tasks: Sequence[str]) -> list[str | dict[str, Any]]:
    """Pocket tasks as configurations with absolute paths, lm-eval's own by name."""
    from lm_eval.tasks import TaskManager

    own = [task for task in tasks if task not in TASKS]
    if own:
        known = TaskManager().all_tasks
        unknown = [task for task in own if task not in known]
        if unknown:
            raise DataError(
                f"task {unknown[0]!r} does not exist: expected one of {', '.join(TASKS)} or a task of lm-eval"
            )
    return [*task_configs(tuple(task for task in tasks if task in TASKS)), *own]


def _metrics(found: dict[str, Any]) -> list[tuple[str, float]]:
    """The metrics among what lm-eval reports for a task, without their standard errors."""
    return [
        (key.split(",")[0], value) for key, value in found.items() if key.endswith(",none") and "_stderr" not in key
    ]


def _stderr(value: float | str) -> float:
    return float("nan") if value == "N/A" else float(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval from forking workers for its bootstrap: a thousand resamples take less than starting them."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
