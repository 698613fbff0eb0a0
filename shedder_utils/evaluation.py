"""Evaluation: lm-eval's own numbers, with their standard errors, for a model in memory.

The model runs through lm-eval's `evaluate` and `HFLM`; several processes share the
items (`harness.py`). Its `simple_evaluate` would read the thousands of task files that come with it and describe
the whole machine each time a model is scored, which takes longer than scoring a small one. Which metric of a task is a
column of the paper's tables stands in a profile (`paper.yaml`, metric_seven).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .distributed import on_first
from .errors import DataError
from .importance import finite
from .lm_eval_tasks import loaded_tasks
from .removal import is_masked
from .statistics import packed

if TYPE_CHECKING:
    from collections.abc import Iterator

AS_THE_PAPER: Any = {"add_bos_token": False, "softmax_dtype": "float32"}
"""No begin token before a prompt, as in lm-eval 0.4.2, which the paper used (`docs/lm_eval_versions.md`): since then
the tokenizer decides, and Zamba2's and Hymba's would add one. Log-probabilities in float32, whatever the model's."""
BOOTSTRAP = 1000
"""Resamples behind the standard error of lambada's perplexity; the accuracies' are closed formulas."""


@dataclass(frozen=True)
class Score:
    """One metric of one task: its value as lm-eval gives it, its standard error, and the number of items.

    items: of an accuracy, which items were answered rightly, as `statistics.packed` writes it.
    """

    value: float
    stderr: float
    n: int
    items: str | None = None


Scores = dict[tuple[str, str], Score]
"""Scores by task and metric, such as ("pocket_piqa", "acc_norm"), and of a task with filters of its own by
("gsm8k", "exact_match,strict-match"). A group that lm-eval gives a mean of has scores beside those of its tasks."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int | str = "auto",
) -> Scores:
    """Score a model with lm-eval, zero-shot, on pocket tasks or lm-eval's own.

    limit: items per task, None for all. batch_size: sequences at a time; "auto" lets lm-eval find one. Where accelerate
    or torchrun started several processes (`distributed.start`), every one has to call this, and gets the same scores.
    Raises DataError for a task that does not exist, whose data cannot be read, or that has no metric, and ModelError
    where the logits of a model that is not masked are no numbers, for lm-eval would score them all the same.
    """
    import lm_eval

    from .harness import Harness

    on_first(lambda: bool(loaded_tasks(tuple(tasks))))  # the others find its data in the cache
    loaded = loaded_tasks(tuple(tasks))
    with _quick(), nullcontext() if is_masked(model) else _refusing_overflow(model):
        harness = Harness(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=str(model.device), **AS_THE_PAPER
        )  # fmt: skip
        results = lm_eval.evaluate(
            lm=harness, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=True
        )
    samples = results["samples"]
    scores = {name: _scores(found, samples.get(name)) for name, found in results["results"].items()}
    for task in samples:
        if not scores[task]:
            raise DataError(f"task {task}: lm-eval reports no metric of it: check its filters, or leave it out")
    return {(name, metric): score for name, found in scores.items() for metric, score in found.items()}


def _scores(found: dict[str, Any], samples: list[dict[str, Any]] | None) -> dict[str, Score]:
    """By metric, what lm-eval reports for a task, or for a group, which has no samples; "none" is no filter."""
    scores = {}
    for key in (key for key in found if "," in key and "_stderr," not in key):
        metric, _, chosen = key.rpartition(",")
        n = found.get("sample_count", {}).get(key, found["sample_len"])
        items = None if samples is None else _items([one for one in samples if one["filter"] == chosen], metric)
        stderr = _stderr(found[f"{metric}_stderr,{chosen}"])
        scores[metric if chosen == "none" else key] = Score(found[key], stderr, n, items)
    return scores


def _items(samples: list[dict[str, Any]], metric: str) -> str | None:
    """What a metric is on each item, in the order of the task, if it is 0 or 1 everywhere."""
    values = [sample.get(metric, float("nan")) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
    return packed(values) if all(value in (0, 1) for value in values) else None


def _stderr(value: float | str) -> float:
    return float("nan") if value == "N/A" else float(value)


@contextmanager
def _refusing_overflow(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the first batch of logits that are not all finite raises ModelError."""

    def check(_: object, __: object, output: Any) -> None:
        finite(model, output.logits.mean(dtype=torch.float32).item(), "the mean logit")

    hook = model.register_forward_hook(check)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _quick() -> Iterator[None]:
    """Keep lm-eval from starting workers for its bootstrap, and from compiling the templates of a task for every item.

    For a small model either takes about as long as the scoring. The numbers are the same.
    """
    from lm_eval.utils import env

    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    env.from_string = cache(env.from_string)
    try:
        yield
    finally:
        del env.from_string
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
