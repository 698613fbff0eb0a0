"""`search`, `extract` and `recover`: from a model to a smaller one that is tuned again (sections 3.3, 3.2 and 4.5)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from ..components import KINDS, PARTS
from ..errors import BudgetMissedError, ModelError, PlanError
from ..plan import Plan, Stage
from . import weighing
from .measuring import scores_in
from .options import Device, Dtype, Model, Tokenizer, check_output, finish, loaded, say, stages_of, weights
from .weighing import Batches, NewTokens, Per, PromptTokens, Until

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Write into a folder that is not empty.")]
METRICS = ("perplexity", "kl", "block_influence", "taylor", "magnitude", "random")
"""Those of `search.METRICS`, which is slow to import."""


def search_plan(
    model: Model,
    calibration: Annotated[
        str, typer.Option(help="Text to measure perplexity on: a .jsonl, .txt or a data name such as alpaca.")
    ],
    output: Annotated[Path, typer.Option(help="The JSON file for the plan.")],
    stages: Annotated[
        str,
        typer.Option(
            help='What competes and how many go: "mamba_block & mlp: 3 + mlp_channels: 20 x 1024 + ssm: 4"; after the '
            "x, how many parts go at a time."
        ),
    ] = "",
    kinds: Annotated[
        str,
        typer.Option(
            help=f"For a single stage: the kinds that compete, separated by commas. There are {', '.join(KINDS)}. "
            f"{', '.join(PARTS)} go 1024 parts at a time here; --stages takes another number, 'heads: 4 x 2'."
        ),
    ] = "",
    steps: Annotated[int, typer.Option(help="With --kinds: how many removals.", min=0)] = 0,
    samples: Annotated[int, typer.Option(help="How many texts are drawn.", min=1)] = 256,
    sequence_length: Annotated[int, typer.Option(help="Tokens of each sequence.", min=2)] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences of each batch.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 42,
    method: Annotated[str, typer.Option(help='"fast" (one sweep a step) or "plain" (Algorithm 1), the same plan.')] = (
        "fast"
    ),
    metric: Annotated[
        str, typer.Option(help=f"What is measured: {', '.join(METRICS)}; others than perplexity are baselines.")
    ] = "perplexity",
    one_shot: Annotated[
        bool, typer.Option("--one-shot", help="Rank every candidate once, in the dense model.")
    ] = False,
    memory_gib: Annotated[
        float | None,
        typer.Option(
            help="GiB the fast search may hold beside the model; else an eighth of what is free, half on GPUs."
        ),
    ] = None,
    per: Per = "",
    until: Until = "",
    prompt_tokens: PromptTokens = 512,
    new_tokens: NewTokens = 16,
    batches: Batches = 10,
    tokenizer: Tokenizer = "",
    device: Device = "cpu",
    dtype: Dtype = "",
) -> None:
    """Find which parts of a model it misses least, one after the other, and write them down as a plan.

    A search that was stopped goes on from its last step when the same command is given again. torchrun spreads it over
    processes and machines, with the same plan. For example:

    python -m shedder_utils search pocket-mamba2 --kinds ssm --steps 4 --calibration pocket-instructions --samples 32
    --output plan.json

    Parts that differ in cost compete fairly with --per, and --until says how much is wanted in place of a number:

    python -m shedder_utils search pocket-mamba2 --kinds mamba_block,ssm --per decode --until "decode 1.3x"
    --calibration pocket-instructions --output plan.json
    """
    from .. import distributed
    from ..calibration import calibrate
    from ..candidates import removals
    from ..search import search
    from ..surgery import check_dense

    check_output(output)
    wanted = stages_of(_one_stage(stages, kinds, steps, until))
    device = distributed.start(device)
    try:
        dense, its_tokenizer = loaded(model, device, dtype, tokenizer)
        check_dense(dense, "search")
        if until and kinds and not steps:
            wanted = [Stage(stage.kinds, removals(dense, stage)) for stage in wanted]
        settings = {"samples": samples, "sequence_length": sequence_length, "batch_size": batch_size, "seed": seed}
        data = calibrate(calibration, its_tokenizer, **settings)
        part = output.with_name(f".{output.name}.part")
        first = distributed.rank() == 0
        if first:
            say(f"searching on {data.tokens} tokens" + (f", going on from {part}" if part.exists() else ""))
        timing = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batches": batches}
        rules = weighing.rules(dense, wanted, metric, per, until, part, timing)
        try:
            plan = search(
                dense, data, wanted, method=method, metric=metric, one_shot=one_shot, memory_gib=memory_gib,
                checkpoint=part, progress=first, **rules,
            )  # fmt: skip
        except BudgetMissedError:
            if first and kinds and not steps:  # it took all that there is: no more steps can go on from it
                part.unlink(missing_ok=True)
            raise
        if first:
            plan.save(output)
            part.unlink(missing_ok=True)
            found = {"plan": str(output), "removals": [str(c) for c in plan.components], "scores": plan.scores}
            finish(found | ({"saved": weighing.saved(dense, plan, rules, timing)} if rules else {}))
    finally:
        distributed.stop()


def extract_model(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="A plan of `search`, or a file that the paper's authors released.")],
    folder: Annotated[Path, typer.Argument(help="Where the smaller model goes.")],
    first: Annotated[int | None, typer.Option(help="Only the first removals of the plan.", min=0)] = None,
    portable: Annotated[
        bool, typer.Option("--portable", help="Loads without this package: SSMs stay in the file as scans that idle.")
    ] = False,
    scores: Annotated[
        Path | None, typer.Option(help="For the model card: what `evaluate --output` wrote of this smaller model.")
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16; else the checkpoint's own.")] = "",
) -> None:
    """Take what a plan names out of a model for good, and save what is left as a checkpoint."""
    from ..loading import load_model
    from ..surgery import extract, save_pruned

    _check_target(folder, model, overwrite)
    wanted = _plan(plan)
    wanted = wanted if first is None else wanted.first(first)
    if dtype:
        pruned = weights(model, device, dtype)
    else:
        say(f"loading {model}")
        pruned, _ = load_model(model, device=device, dtype="auto", tokenizer=False)
    before = pruned.num_parameters()
    pruned = extract(pruned, wanted, inplace=True)
    save_pruned(pruned, folder, portable=portable, scores=None if scores is None else scores_in(scores, pruned))
    finish(
        {
            "folder": str(folder), "removed": [str(cut) for cut in wanted.gone],
            "parameters_dense": before, "parameters": pruned.num_parameters(),
        }
    )  # fmt: skip


def recover_model(
    folder: Annotated[str, typer.Argument(help="The pruned model: a folder of `extract`.", show_default=False)],
    data: Annotated[
        str, typer.Option(help="Instructions in Alpaca's schema: a .json or .jsonl, a data name or a Hub id.")
    ],
    output: Annotated[Path, typer.Option(help="Where the tuned model goes.")],
    method: Annotated[str, typer.Option(help='"full" trains all weights, "lora" adapters that are merged.')] = "full",
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates, in place of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows at a time.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest learning rate.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row; the rest is cut off.")] = None,
    held_out: Annotated[int | None, typer.Option(help="Rows that are never trained on.")] = None,
    overwrite: Overwrite = False,
    tokenizer: Tokenizer = "",
    device: Device = "cpu",
    dtype: Annotated[
        str, typer.Option(help="float32; for lora bfloat16 too, and on a GPU the checkpoint's own if none is given.")
    ] = "",
) -> None:
    """Tune a pruned model for a short while; what is not given is as the paper has it for the method.

    A tuning that was stopped goes on from its last checkpoint when the same command is given again.
    """
    from ..recovery import recover
    from ..surgery import save_pruned

    settings = {
        "epochs": epochs, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate,
        "max_length": max_length, "held_out": held_out,
    }  # fmt: skip
    given: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
    part = output.parent / f".{output.name}.part"
    _check_target(output, folder, overwrite or part.exists())
    dtype = dtype or ("float32" if method == "full" else "")
    model, its_tokenizer = loaded(folder, device, dtype, tokenizer)
    tuned = recover(model, its_tokenizer, data, method=cast(Any, method), checkpoint=part, inplace=True, **given)
    if hasattr(tuned.config, "pruned"):
        save_pruned(tuned, output)
    else:
        tuned.save_pretrained(output)
    its_tokenizer.save_pretrained(output)
    shutil.rmtree(part)
    finish({"folder": str(output), "parameters": tuned.num_parameters(), "recovery": tuned.config.recovery})


def _one_stage(stages: str, kinds: str, steps: int, until: str) -> str:
    """The stages as text, whichever way they were given."""
    if bool(stages) == bool(kinds):
        raise PlanError("what to remove: expected one of --stages and --kinds with --steps")
    if stages and steps:
        raise PlanError(f"--steps {steps} goes with --kinds: --stages say how many go themselves, as in 'ssm: 4'")
    if kinds and not steps and not until:
        raise PlanError(f"how much to remove of {kinds}: expected --steps or --until")
    return stages or f"{kinds}: {steps}"


def _check_target(folder: Path, base: str, overwrite: bool) -> None:
    """Refuse, before any work, a place for a model made from `base` that is taken, unless it may be overwritten."""
    from ..surgery import check_target

    check_target(folder, base)
    if folder.is_file():
        raise ModelError(f"{folder} is a file: expected a folder")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ModelError(f"folder {folder} is not empty: choose another, or pass --overwrite")


def _plan(file: Path) -> Plan:
    """A plan of this package, or one in the format of the authors' release."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Plan.load(file)
    released = isinstance(content, dict) and any(name.startswith("pruned_") for name in content)
    return Plan.from_released(file) if released else Plan.load(file)


COMMANDS: dict[str, Callable[..., None]] = {"search": search_plan, "extract": extract_model, "recover": recover_model}
