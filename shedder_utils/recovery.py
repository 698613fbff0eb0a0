"""Recovery: a short tuning that gives a pruned model back some of what it lost (section 4.5 of the paper).

On transformers' Trainer, all weights or LoRA adapters, on instructions in Alpaca's schema. The state with the lowest
held-out loss is what counts, the untuned one included; a tuning that is killed goes on from its last checkpoint.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import adapters
from .errors import ModelError, RecordError
from .families import family_of
from .files import write_atomically
from .instructions import Instructions, Rows, instructions
from .kernels.fused import unfused
from .loading import fingerprint, local_folder
from .recipe import Method, Recipe
from .removal import is_masked

IDENTITY, OUTCOME = "tuning.json", "outcome.json"


def recover(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path | Rows | Instructions,
    *,
    method: Method = "full",
    distill: PreTrainedModel | None = None,
    checkpoint: str | Path | None = None,
    merge: bool = True,
    inplace: bool = False,
    progress: bool = True,
    **settings: Any,
) -> PreTrainedModel:
    """Tune a model for a short while, as a rule one that `extract` returned.

    data: instructions in Alpaca's schema, a name, path or list: see `instructions.instructions`. method: "full" trains
    all weights, "lora" adapters. settings: those of `Recipe`, such as steps, batch_size, learning_rate, rank; the
    paper's by default. distill: a dense model whose next-token distributions are the aim, in place of the data's
    tokens. checkpoint: a folder for a state every `evaluate_every` steps, from which the same call goes on. merge: add
    adapters to the weights at the end; with False they stay apart, `save_pretrained` writes only them, and `load_model`
    reads them back with the model they name. inplace: tune `model` itself; else it stays as it is and a copy is tuned.

    Returns the model in the state with the lowest held-out loss; `config.recovery` has the recipe and the losses. A
    tuning whose loss is no number or rises above its start says so in one line on stderr, and keeps the best.
    Raises ModelError for a model that cannot be trained so, DataError for data or settings that do not fit, and
    RecordError for a checkpoint of another tuning.
    """
    recipe = Recipe.of(method=method, **settings)
    _check(model, recipe, distill, merge)
    rows = instructions(data, tokenizer, max_length=recipe.max_length, held_out=recipe.held_out, seed=recipe.seed)
    with _folder(checkpoint) as folder, _own_randomness(recipe.seed, model.device):
        if checkpoint is not None:
            _check_same(folder, _identity(model, recipe, rows, distill))
        tuned = model if inplace else copy.deepcopy(model)
        outcome = _tune(tuned, recipe, rows, folder, distill, progress)
    if recipe.method == "lora" and merge:
        adapters.merge(tuned)
    tuned.config.recovery = {"recipe": recipe.settings, "data": rows.name, "fingerprint": rows.fingerprint, **outcome}
    if distill is not None:
        tuned.config.recovery["distilled_from"] = distill.config._name_or_path
    if outcome["stopped"]:
        print(f"recover: stopped at {outcome['stopped']}; kept step {outcome['best_step']}", file=sys.stderr)
    return tuned.eval()


def _tune(
    model: PreTrainedModel,
    recipe: Recipe,
    rows: Instructions,
    folder: Path,
    distill: PreTrainedModel | None,
    progress: bool,
) -> dict[str, Any]:
    """Train a model in place, or load what an earlier call trained to the end; how that went."""
    from .tuning import BEST, Tuning, load_trained

    if recipe.method == "lora":
        adapters.attach(model, recipe)
    finished = folder / OUTCOME
    if finished.exists():
        load_trained(model, folder / BEST)
        return dict(json.loads(finished.read_text(encoding="utf-8")))
    bypass_allowed = recipe.method == "full" and model.device.type != "cpu"  # CPUs have no fused kernels
    with nullcontext() if bypass_allowed else unfused():
        tuning = Tuning(model, recipe, rows, folder, distill, progress)
        tuning.run()
    best = min(tuning.curve, key=lambda point: point["held_out_loss"])
    outcome = {"points": tuning.points, "best_step": best["step"], "stopped": tuning.stopped}
    write_atomically(finished, json.dumps(outcome))
    return outcome


def _check(model: PreTrainedModel, recipe: Recipe, distill: PreTrainedModel | None, merge: bool) -> None:
    """Refuse a model that cannot be trained, or whose adapters nobody could read back."""
    family_of(model)
    if is_masked(model):
        raise ModelError("recover: this model is masked right now: extract() it, and tune what that returns")
    if adapters.has_adapters(model):
        raise ModelError("recover: this model has adapters already: merge them, or load the model without them")
    if model.dtype == torch.float16 or (model.dtype == torch.bfloat16 and recipe.method == "full"):
        found = str(model.dtype).removeprefix("torch.")
        raise ModelError(f"recover: the weights are {found}, too coarse to train: load with dtype=torch.float32")
    if model.device.index:
        raise ModelError(
            f"recover: the model is on {model.device}, and transformers' Trainer takes the first GPU that it sees: set "
            f"CUDA_VISIBLE_DEVICES={model.device.index} and load on cuda"
        )
    if distill is not None and distill.device != model.device:
        raise ModelError(
            f"recover: the model to distil from is on {distill.device}, this one on {model.device}: load both on one"
        )
    if distill is not None and distill.config.vocab_size != model.config.vocab_size:
        raise ModelError(
            f"recover: the model to distil from has {distill.config.vocab_size} tokens, this one "
            f"{model.config.vocab_size}: expected a model with the same vocabulary"
        )
    if recipe.method == "lora" and not merge and hasattr(model.config, "pruned") and not _on_disk(model):
        raise ModelError(
            "recover: adapters that stay apart name their model by its folder, and this pruned one has none: "
            "save_pruned() it, load_model() that folder and tune it, or leave out merge=False"
        )


def _on_disk(model: PreTrainedModel) -> bool:
    """Whether the folder that a model names holds a pruned model."""
    folder = local_folder(model.config._name_or_path)
    return folder is not None and "pruned" in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _identity(
    model: PreTrainedModel, recipe: Recipe, rows: Instructions, distill: PreTrainedModel | None
) -> dict[str, Any]:
    """Everything that decides how a tuning ends."""
    teacher = None if distill is None else fingerprint(distill)
    return {"model": fingerprint(model), "recipe": recipe.settings, "data": rows.fingerprint, "distill": teacher}


def _check_same(folder: Path, identity: dict[str, Any]) -> None:
    """Mark a new folder as that of a tuning. Raises RecordError for one that is another's."""
    file = folder / IDENTITY
    if not file.exists():
        write_atomically(file, json.dumps(identity))
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    differing = [name for name, value in identity.items() if found.get(name) != value]
    if differing:
        raise RecordError(
            f"checkpoint {folder} is of another tuning, with another {differing[0]}: delete it, or choose another"
        )


@contextmanager
def _folder(checkpoint: str | Path | None) -> Iterator[Path]:
    """The folder of a tuning; one that goes with it if none is named."""
    if checkpoint is not None:
        yield Path(checkpoint)
        return
    with TemporaryDirectory(prefix="recover-") as folder:
        yield Path(folder)


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from `seed` inside, on the CPU and a device; outside they go on as if nothing had been drawn."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
