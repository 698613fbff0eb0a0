"""What the pocket models are trained on, as a pure function of stage, seed and step in the stage.

First comes a school of recall, in five stages: lists of pairs of words, again and again, of few words, of more and of
all ("few words", "more words", "all words"), then facts of one relation with questions ("pairs"), then dense documents,
facts of several kinds with three questions for each ("recall"). Then "stories", in the tasks' formats, with recall
still; and at last the "mix": stories and recall 55 %, instructions 20 %, real prose 25 %.

Each sequence comes from one source: documents, each after an <|endoftext|>, cut at the sequence's end, or a stretch of
prose. Half the sequences of instructions have a blank line between documents instead, as calibration has.
Letters: B batch, L tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from shedder_utils.pocket.instructions import instruction_document
from shedder_utils.pocket.items import story_document
from shedder_utils.pocket.prose import prose_texts
from shedder_utils.pocket.recall import FEW_WORDS, list_document, pairs_document, recall_document
from shedder_utils.pocket.stories import Document
from shedder_utils.pocket.tokenizer import END

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Share of the sequences that come from each source.
STAGES = {
    "few words": {"few words": 1.0},
    "more words": {"more words": 1.0},
    "all words": {"lists": 1.0},
    "pairs": {"lists": 0.35, "pairs": 0.65},
    "recall": {"lists": 0.1, "pairs": 0.3, "recall": 0.6},
    "stories": {"pairs": 0.05, "recall": 0.25, "stories": 0.7},
    "mix": {"recall": 0.15, "stories": 0.4, "instructions": 0.2, "prose": 0.25},
}
SOURCES: dict[str, Callable[[random.Random], Document]] = {
    "few words": partial(list_document, n_words=FEW_WORDS),
    "more words": partial(list_document, n_words=4 * FEW_WORDS),
    "lists": list_document,
    "pairs": pairs_document,
    "recall": recall_document,
    "stories": story_document,
    "instructions": instruction_document,
}
ANSWER_WEIGHT, TEXT_WEIGHT, PROSE_WEIGHT = 10.0, 0.2, 1.0


def batch(
    stage: str, seed: int, step: int, batch_size: int, length: int, tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) int64 and the weights (B, L) float32 of the losses with which these tokens are predicted."""
    shares = STAGES[stage]
    ids = np.empty((batch_size, length), np.int64)
    weights = np.empty((batch_size, length), np.float32)
    for row in range(batch_size):
        rng = random.Random(f"{stage} {seed} {step} {row}")
        source = rng.choices(tuple(shares), tuple(shares.values()))[0]
        if source == "prose":
            ids[row], weights[row] = _prose(rng, length, tokenizer), PROSE_WEIGHT
        else:
            blank_line = source == "instructions" and rng.random() < 0.5
            ids[row], weights[row] = _documents(rng, SOURCES[source], length, tokenizer, "\n\n" if blank_line else END)
    return torch.from_numpy(ids), torch.from_numpy(weights)


def _documents(
    rng: random.Random,
    make: Callable[[random.Random], Document],
    length: int,
    tokenizer: PreTrainedTokenizerFast,
    separator: str,
) -> tuple[list[int], list[float]]:
    """Documents one after the other, each after the separator, until the sequence is full."""
    before = tokenizer.backend_tokenizer.encode(separator).ids
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) < length:
        document = make(rng)
        encoding = tokenizer.backend_tokenizer.encode(document.text)
        ids += [*before, *encoding.ids]
        weights += [TEXT_WEIGHT] * len(before) + token_weights(document, encoding.offsets)
    return ids[:length], weights[:length]


def token_weights(document: Document, offsets: list[tuple[int, int]]) -> list[float]:
    """The weight of each token from its character span: ANSWER_WEIGHT where it overlaps an answer, else TEXT_WEIGHT."""
    answers = iter((*document.answers, (len(document.text) + 1,) * 2))
    start, end = next(answers)
    weights = []
    for first, last in offsets:
        while first >= end:
            start, end = next(answers)
        weights.append(ANSWER_WEIGHT if last > start else TEXT_WEIGHT)
    return weights


@lru_cache(maxsize=1)
def _prose_stream() -> str:
    return END.join(prose_texts("train"))


def _prose(rng: random.Random, length: int, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """A stretch of the training prose that begins with a word; ten characters for each token are always enough."""
    stream = _prose_stream()
    start = stream.index(" ", rng.randrange(len(stream) - 20 * length))
    ids: list[int] = tokenizer.backend_tokenizer.encode(stream[start : start + 10 * length]).ids
    return ids[:length]
