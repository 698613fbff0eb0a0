"""Instruction data in Alpaca's schema, as token ids to tune on (section 4.5 of the paper).

A row has the columns instruction, input (may be empty) and output. It becomes Alpaca's prompt, the output and the end
token, cut at a length. Pocket instructions, files and data sets of the Hub all take this path.

B batch, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from . import hub
from .calibration import POOLS, UNREADABLE, text_of
from .errors import DataError
from .pocket.instructions import WITH_INPUT, WITHOUT_INPUT

Rows = Sequence[Mapping[str, Any]]
IGNORED = -100
"""The label of a token that the loss does not count, as in torch and transformers."""


@dataclass(frozen=True)
class Example:
    """The token ids of one row, of which the first `n_prompt` are the prompt's."""

    ids: tuple[int, ...]
    n_prompt: int


@dataclass(frozen=True)
class Instructions:
    """What is trained on and what is held out; `name` says where it is from."""

    name: str
    train: list[Example]
    held_out: list[Example]

    @property
    def fingerprint(self) -> str:
        """sha256 of all token ids and of what is held out."""
        content = [[(example.ids, example.n_prompt) for example in part] for part in (self.train, self.held_out)]
        return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def instructions(
    source: str | Path | Rows | Instructions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    held_out: int,
    seed: int,
) -> Instructions:
    """Read rows, tokenise them and hold some out, drawn with `seed`.

    source: a data name ("pocket-instructions"), a .json, .jsonl or .jsonl.gz file, a data set of the Hub
    ("yahma/alpaca-cleaned", with a revision after "@"), or a list of rows. Rows of which nothing but the prompt fits
    into max_length tokens are left out. Raises DataError if the source cannot be read, is not in Alpaca's schema, or is
    too small. Instructions that are read already are given back.
    """
    if isinstance(source, Instructions):
        return source
    name = str(source) if isinstance(source, (str, Path)) else "rows"
    rows = _read(source) if isinstance(source, (str, Path)) else list(source)
    examples = _examples(rows, tokenizer, max_length, name)
    fitting = [example for example in examples if len(example.ids) > example.n_prompt]
    if len(fitting) <= held_out:
        raise DataError(
            f"recovery data {name}: {len(fitting)} of {len(rows)} rows have a response within {max_length} tokens, and "
            f"{held_out} were to be held out: hold out fewer, or allow longer rows"
        )
    apart = set(random.Random(seed).sample(range(len(fitting)), held_out))
    parts: tuple[list[Example], list[Example]] = ([], [])
    for index, example in enumerate(fitting):
        parts[index in apart].append(example)
    return Instructions(name, *parts)


def prompt_of(row: Mapping[str, Any]) -> str:
    """A row in Alpaca's prompt, up to where the response begins."""
    given = row.get("input") or ""
    return (WITH_INPUT if given else WITHOUT_INPUT).format(instruction=row["instruction"], input=given)


def collate(examples: Sequence[Example], loss_on: str) -> dict[str, Tensor]:
    """A batch: input_ids (B, L) int64, padded on the right, and labels (B, L), IGNORED where the loss does not count.

    loss_on: "all" or "response". Models read a sequence from left to right, so padding behind it needs no mask.
    """
    length = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.int64)
    labels = torch.full_like(ids, IGNORED)
    for i, example in enumerate(examples):
        tokens = torch.tensor(example.ids)
        begin = example.n_prompt if loss_on == "response" else 0
        ids[i, : len(tokens)] = tokens
        labels[i, begin : len(tokens)] = tokens[begin:]
    return {"input_ids": ids, "labels": labels}


def _examples(rows: Sequence[Any], tokenizer: PreTrainedTokenizerBase, max_length: int, name: str) -> list[Example]:
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or not all(isinstance(row.get(key), str) for key in ("instruction", "output")):
            raise DataError(
                f"recovery data {name}, row {i}: expected Alpaca's columns instruction, input and output as texts"
            )
    prompts = [prompt_of(row) for row in rows]
    wholes = [prompt + row["output"] for prompt, row in zip(prompts, rows, strict=True)]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [
        Example(tuple([*ids, *end][:max_length]), len(prompt_ids))
        for ids, prompt_ids in zip(_tokens(tokenizer, wholes), _tokens(tokenizer, prompts), strict=True)
    ]


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of texts, each begun as the tokenizer begins one, and without an end token."""
    found: list[list[int]] = tokenizer(texts, verbose=False).input_ids if texts else []
    return [ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids for ids in found]


def _read(source: str | Path) -> list[Any]:
    """The rows of a named pool, of a file or of a data set of the Hub."""
    file = POOLS.get(str(source), Path(source))
    if not file.suffix.startswith(".json") and file.suffix != ".gz":
        return _from_hub(str(source))
    try:
        text = text_of(file)
        lines = (line for line in text.split("\n") if line.strip())
        rows = json.loads(text) if ".json" in file.suffixes else [json.loads(line) for line in lines]
    except UNREADABLE as error:
        raise DataError(f"recovery data {source}: cannot be read ({error}): expected a file or a data name") from error
    except ValueError as error:
        raise DataError(f"recovery data {source}: is not whole JSON ({error})") from error
    if not isinstance(rows, list):
        raise DataError(f"recovery data {source}: expected a list of rows, found a {type(rows).__name__}")
    return rows


def _from_hub(name: str) -> list[Any]:
    """The training split of a data set, "owner/name" or "owner/name@revision"."""
    from datasets import load_dataset

    repository, revision = hub.pinned(name)
    advice = f"expected a .json or .jsonl file, pocket-instructions or a data set of the Hub; {hub.AGAIN}"
    with hub.checked(f"recovery data {name}", repository, DataError, "dataset", advice):
        return list(load_dataset(repository, split="train", revision=revision))
