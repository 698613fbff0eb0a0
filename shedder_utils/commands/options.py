"""What the commands share: their common options, stages written as text, and the line of results."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..components import KINDS
from ..errors import ModelError, PlanError, RecordError
from ..files import write_atomically
from ..plan import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Model = Annotated[str, typer.Argument(help="A pocket name, a checkpoint's folder, or a Hub id.", show_default=False)]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, cuda:1, ...")]
Dtype = Annotated[
    str,
    typer.Option(help="float32, bfloat16 or float16; else float32 on a CPU, the checkpoint's own on a GPU."),
]
Tokenizer = Annotated[
    str, typer.Option(help="The tokenizer's folder or Hub id, where none is beside the weights.", show_default=False)
]
DTYPES = ("float32", "bfloat16", "float16")
STAGE = re.compile(r"(?P<kinds>[\w\s&,]+):\s*(?P<steps>\d+)\s*(x\s*(?P<group>\d+))?")


def loaded(ref: str, device: str, dtype: str, tokenizer: str = "") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and tokenizer that the command line names.

    Raises ModelError for an unknown type of numbers, and for a model without a tokenizer.
    """
    model, found = _load(ref, device, dtype, tokenizer or None)
    if found is None:
        raise ModelError(f"model {ref} has no tokenizer: pass --tokenizer")
    return model, found


def weights(ref: str, device: str, dtype: str) -> PreTrainedModel:
    """The model alone. Raises ModelError for an unknown type of numbers."""
    return _load(ref, device, dtype, False)[0]


def _load(ref: str, device: str, dtype: str, tokenizer: str | bool | None) -> Any:
    import torch

    from .. import distributed
    from ..devices import slow_scan
    from ..loading import load_model

    if dtype and dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown: expected one of {', '.join(DTYPES)}")
    if distributed.rank() == 0:
        say(f"loading {ref}")
    found = load_model(ref, device=device, dtype=getattr(torch, dtype) if dtype else None, tokenizer=tokenizer)
    if warning := slow_scan(device):
        say(warning)
    return found


def stages_of(text: str) -> list[Stage]:
    """The stages of a search, as table 3 writes them: kinds that compete joined by "&", stages by "+".

    MLP channels go in groups of 1024, or as many as stand after an "x", and so do inner channels, heads and states.
    Raises PlanError for any other text.

    >>> [(stage.kinds, stage.steps) for stage in stages_of("mamba_block & mlp: 3 + ssm: 4")]
    [(('mamba_block', 'mlp'), 3), (('ssm',), 4)]
    >>> stages_of("mlp_channels: 20 x 512")[0].group
    512
    """
    return [_stage(part.strip()) for part in text.split("+")]


def _stage(text: str) -> Stage:
    found = STAGE.fullmatch(text)
    if found is None:
        raise PlanError(f"stage {text!r} is malformed: expected 'kind & kind: steps', for example 'mamba_block: 7'")
    kinds = [kind.strip() for kind in re.split("[&,]", found["kinds"])]
    for kind in kinds:
        if kind not in KINDS:
            raise PlanError(f"kind {kind!r} is unknown: expected one of {', '.join(KINDS)}")
    return Stage(kinds, int(found["steps"]), **({"group": int(found["group"])} if found["group"] else {}))


def say(line: str) -> None:
    """Progress, for people: on stderr."""
    print(line, file=sys.stderr, flush=True)


def check_output(file: Path | None) -> None:
    """Refuse, before any work, a file for results that cannot be written. Raises RecordError."""
    if file is None:
        return
    folder = next(filter(os.path.exists, file.absolute().parents), file)
    if os.path.isdir(file) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise RecordError(f"output {file} cannot be written: expected a file in a folder that may be written to")


def finish(result: dict[str, Any], output: Path | None = None) -> None:
    """Results, for programs: one line of JSON on stdout, then the same in a file if one was asked for."""
    plain = _finite(result)
    print(json.dumps(plain))
    if output is not None:
        write_atomically(output, json.dumps(plain, indent=2) + "\n")


def _finite(value: Any) -> Any:
    """Values that JSON has: no NaN, no infinity."""
    if isinstance(value, dict):
        return {str(name): _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
