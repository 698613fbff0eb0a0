"""`evaluate` and `benchmark`: how good a model is, and how fast beside another (sections 4.3 and 4.4)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import DataError, ModelError
from .options import Device, Dtype, Model, Tokenizer, finish, loaded, say, weights

if TYPE_CHECKING:
    from ..benchmark import Timings

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
    """Score a model, dense or pruned, with lm-eval: every metric with its standard error and number of items."""
    from ..evaluation import evaluate

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    size = int(batch_size) if batch_size.isdecimal() else batch_size
    if not names or size == 0 or (isinstance(size, str) and size != "auto"):
        raise DataError(f"tasks {tasks!r}, batch size {batch_size!r}: expected names, and a number from 1 or 'auto'")
    scored, its_tokenizer = loaded(model, device, dtype, tokenizer)
    say(f"evaluating {', '.join(names)}")
    scores: dict[str, dict[str, Any]] = {}
    for (task, metric), score in evaluate(scored, its_tokenizer, names, limit=limit, batch_size=size).items():
        scores.setdefault(task, {})[metric] = {"value": score.value, "stderr": score.stderr, "n": score.n}
    finish({"model": model, "parameters": scored.num_parameters(), "scores": scores}, output)


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
    """Time models against the first of them, interleaved: prefill and decode, with the interval of each speedup."""
    from ..benchmark import benchmark

    if len(models) < 2 or len(set(models)) < len(models):
        raise ModelError(f"benchmark: {', '.join(models)}: expected a dense model and others to compare with it")
    timings = benchmark(
        {ref: weights(ref, device, dtype) for ref in models},
        prompt_tokens=prompt_tokens, new_tokens=new_tokens, batches=batches, batch_size=batch_size,
    )  # fmt: skip
    finish({"dense": models[0], "models": {ref: _phases(timings, ref) for ref in models}}, output)


def _phases(timings: Timings, model: str) -> dict[str, Any]:
    """Median milliseconds and speedup of a model, by phase."""
    phases = {}
    for phase, seconds in timings.seconds[model].items():
        speedup = timings.speedup(model, phase)
        phases[phase] = {
            "ms": 1e3 * median(seconds), "speedup": speedup.value, "low": speedup.low, "high": speedup.high
        }  # fmt: skip
    return phases


COMMANDS: dict[str, Callable[..., None]] = {"evaluate": evaluate_model, "benchmark": benchmark_models}
