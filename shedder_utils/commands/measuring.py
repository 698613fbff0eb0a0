"""`evaluate` and `benchmark`: how good a model is, and how fast beside another (sections 4.3 and 4.4)."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, ModelError
from .options import Device, Dtype, Model, Tokenizer, check_output, finish, loaded, say, weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..benchmark import Timings
    from ..evaluation import Scores

Output = Annotated[Path | None, typer.Option(help="A JSON file for the results.", show_default=False)]


def evaluate_model(
    model: Model,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-eval or pocket tasks, separated by commas.")],
    limit: Annotated[int | None, typer.Option(help="Items of each task; without it, all.", min=1)] = None,
    batch_size: Annotated[str, typer.Option(help='Sequences at a time; "auto" tries.')] = "8",
    output: Output = None,
    tokenizer: Tokenizer = "",
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """Score a model, dense or pruned, with lm-eval: every metric with its standard error and number of items.

    accelerate and torchrun spread it over GPUs: accelerate launch --multi_gpu -m shedder_utils evaluate ...
    """
    from .. import distributed
    from ..evaluation import evaluate

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    size = int(batch_size) if batch_size.isdecimal() else batch_size
    if not names or size == 0 or (isinstance(size, str) and size != "auto"):
        raise DataError(f"tasks {tasks!r}, batch size {batch_size!r}: expected names, and a number from 1 or 'auto'")
    check_output(output)
    device = distributed.start(device)
    try:
        scored, its_tokenizer = loaded(model, device, dtype, tokenizer)
        first = distributed.rank() == 0
        if first:
            say(f"evaluating {', '.join(names)}")
        with redirect_stdout(sys.stderr):  # lm-eval prints there
            found = evaluate(scored, its_tokenizer, names, limit=limit, batch_size=size)
        scores: dict[str, dict[str, Any]] = {}
        for (task, metric), score in found.items():
            scores.setdefault(task, {})[metric] = {"value": score.value, "stderr": score.stderr, "n": score.n}
        if first:
            finish({"model": model, "parameters": scored.num_parameters(), "scores": scores}, output)
    finally:
        distributed.stop()


def scores_in(file: Path, model: PreTrainedModel) -> Scores:
    """What `evaluate --output` wrote of this model. Raises DataError for any other file, and for another model's."""
    from ..evaluation import Score

    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        scored = content["parameters"]
        scores = {
            (task, metric): Score(_number(score["value"]), _number(score["stderr"]), score["n"])
            for task, found in content["scores"].items()
            for metric, score in found.items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"scores {file} cannot be read ({error!r}): expected what evaluate --output writes") from error
    if scored != model.num_parameters():
        raise DataError(
            f"scores {file} are of a model with {scored} parameters, this one has {model.num_parameters()}: "
            "evaluate what this plan leaves"
        )
    return scores


def _number(value: float | None) -> float:
    """NaN for null, which stands for it in JSON."""
    return math.nan if value is None else value


def benchmark_models(
    models: Annotated[list[str], typer.Argument(help="The dense model, then those to compare with it.")],
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt that prefill reads.", min=1)] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens after it; all but the first are decode.", min=2)] = 16,
    batches: Annotated[int, typer.Option(help="Rounds that count.", min=1)] = 10,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.", min=1)] = 1,
    output: Output = None,
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """Time models against the first of them, interleaved: prefill and decode, each speedup beside the ideal.

    "again" is the first model's second run, which should be as fast as its first.
    """
    from ..benchmark import AGAIN, benchmark

    if len(models) < 2 or len(set(models)) < len(models):
        raise ModelError(f"benchmark: {', '.join(models)}: expected a dense model and others to compare with it")
    check_output(output)
    timings = benchmark(
        {ref: weights(ref, device, dtype) for ref in models},
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, batches=batches, batch_size=batch_size,
    )  # fmt: skip
    found = {"dense": models[0], "models": {ref: _measured(timings, ref) for ref in models}}
    finish({**found, "again": _measured(timings, models[0] + AGAIN)}, output)


def _measured(timings: Timings, model: str) -> dict[str, Any]:
    """Of a model: by phase quartiles in milliseconds ("ms" is the median), the speedup, and the ideal; peak memory."""
    rows = timings.table().drop(columns="peak_mib").rename(columns={"ms_median": "ms"}).loc[model]
    return {**rows.to_dict("index"), "peak_mib": timings.peak_mib.get(model)}


COMMANDS: dict[str, Callable[..., None]] = {"evaluate": evaluate_model, "benchmark": benchmark_models}
