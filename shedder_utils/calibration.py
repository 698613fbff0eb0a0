"""Calibration data: the token batches on which a search measures perplexity.

Built as the paper's release builds them (table 13, `paper.yaml`): samples drawn from a pool with a seed, joined by a
blank line, tokenised as one stream, cut into equal sequences; the tail is dropped. The stream has the special tokens
that the tokenizer adds by itself: those of Zamba2 and Hymba begin it with theirs, those of the Mamba models and of the
pocket models add none. Held-out prose is made the same way, as perplexity on wikitext-2 is usually measured.

B batch, L tokens.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .errors import DataError
from .pocket.prose import POCKET
from .public_texts import SOURCES, public_texts

POOLS = {
    "pocket-instructions": POCKET / "instructions" / "train.jsonl",
    "pocket-prose": POCKET / "prose" / "test.jsonl.gz",
}
"""The data names that a profile can give, and the file behind each: one JSON object a line, with a column `text`."""
ENDINGS = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
UNREADABLE = (OSError, EOFError, zlib.error)
"""What `text_of` raises for a file that is not there, cannot be read, or is damaged."""


@dataclass(frozen=True)
class Calibration:
    """Token batches: `batches`, a list of (B, L) int64 tensors; `source` says how they were made."""

    batches: list[Tensor]
    source: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.batches or any(batch.ndim != 2 or batch.shape[1] < 2 for batch in self.batches):
            raise DataError("calibration batches: expected at least one (B, L) tensor of token ids with L of 2 or more")

    @property
    def sequences(self) -> int:
        """How many sequences."""
        return sum(len(batch) for batch in self.batches)

    @property
    def tokens(self) -> int:
        """How many tokens in all."""
        return sum(batch.numel() for batch in self.batches)

    @property
    def fingerprint(self) -> str:
        """sha256 of the token ids and their shapes."""
        digest = hashlib.sha256()
        for batch in self.batches:
            digest.update(repr(tuple(batch.shape)).encode())
            digest.update(batch.to(torch.int64).cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a plan and a record keep of it."""
        return {**self.source, "sequences": self.sequences, "tokens": self.tokens, "fingerprint": self.fingerprint}


def calibrate(
    source: str | Path | Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int = 256,
    sequence_length: int = 2048,
    batch_size: int = 2,
    seed: int = 42,
) -> Calibration:
    """Draw `samples` texts with `seed`, and cut their tokens into batches of (batch_size, sequence_length).

    source: a data name (`POOLS`, or `public_texts.SOURCES` on the Hub), a .jsonl file with a column `text`, a .txt
    file with paragraphs, either of them gzipped (.gz) too, or a list of texts. tokenizer: adds to the stream what it
    adds to any text, such as a token that begins it. The last batch may hold fewer sequences.
    Raises DataError if the source is missing, of another kind or too small.
    """
    pool = list(source) if not isinstance(source, (str, Path)) else _read(source)
    if other := [type(text).__name__ for text in pool if not isinstance(text, str)]:
        raise DataError(f"calibration source {_name(source)}: expected texts, found a {other[0]} among them")
    if len(pool) < samples:
        raise DataError(
            f"calibration source {_name(source)} has {len(pool)} texts, {samples} were asked for: ask for fewer"
        )
    text = "\n\n".join(random.Random(seed).sample(pool, samples))
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    count = len(ids) // sequence_length
    if count == 0:
        raise DataError(
            f"calibration source {_name(source)} gives {len(ids)} tokens, less than one sequence of {sequence_length}: "
            "take more samples or a shorter sequence"
        )
    sequences = ids[: count * sequence_length].view(count, sequence_length)
    settings = {"samples": samples, "sequence_length": sequence_length, "batch_size": batch_size, "seed": seed}
    return Calibration(list(sequences.split(batch_size)), {"name": _name(source), **settings})


def _name(source: str | Path | Sequence[str]) -> str:
    return str(source) if isinstance(source, (str, Path)) else "texts"


def _read(source: str | Path) -> list[str]:
    """The texts of a named pool or of a file."""
    if str(source) in SOURCES:
        return public_texts(str(source))
    file = POOLS.get(str(source), Path(source))
    expected = f"expected a file that ends in {', '.join(ENDINGS)}, or one of {', '.join((*POOLS, *SOURCES))}"
    if not file.name.endswith(ENDINGS):
        raise DataError(f"calibration source {source}: {expected}")
    try:
        content = text_of(file)
        if file.name.removesuffix(".gz").endswith(".jsonl"):
            return [json.loads(line)["text"] for line in content.split("\n") if line.strip()]
    except UNREADABLE as error:
        raise DataError(f"calibration source {source}: cannot be read ({error}): {expected}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"calibration source {source}: expected UTF-8, and in a .jsonl JSON lines with a column 'text'"
        ) from error
    return [paragraph.strip() for paragraph in content.split("\n\n") if paragraph.strip()]


def text_of(file: Path) -> str:
    """The text of a UTF-8 file, gzipped or not; each line ends in a line feed. Raises `UNREADABLE`, ValueError."""
    with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as opened:
        return opened.read()
