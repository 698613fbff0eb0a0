"""The pocket tokenizer: byte-level BPE with 4,096 tokens, trained on the prose corpus and on the pocket world's words.

As in GPT-NeoX a word and the space before it make one token, no space is added silently, and every byte can be written.
<|endoftext|> (id 0) begins and ends documents, <|pad|> (id 1) fills batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from shedder_utils.pocket.instructions import WITH_INPUT, WITHOUT_INPUT
from shedder_utils.pocket.prose import POCKET, prose_texts
from shedder_utils.pocket.world import FILLERS, PURPOSES, answer_words, sentence_forms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY = 4096
END, PAD = "<|endoftext|>", "<|pad|>"
PHRASES = (
    "Facts: Visit: Help: In the end Then Anna went to the garden. Later Ben gave the lamp to Clara. "
    "So she walks to the garden. So he brings the lamp. wants to see asks for a present. What should she do? "
    "go to the ask The person in the garden is stays in the The thing is the The colour of the What colour is "
    "To you need the The one to Who can Where can you She He"
    "\nQuestion: Where is Anna?\nAnswer: garden\nQuestion: What Who How Where\nFacts:\nVisit:\nHelp:"
    "\nRead the story and\nSay where\nList the people\nWrite the words in reverse order."
    "\nTell a very short story about\nComplete the sentence: Here:"
)


def training_texts() -> Iterator[str]:
    """The prose's training split and, a thousand times, the world's words and sentences, so that each word is a token.

    The generators of stories.py have no part in it: they can change while the tokenizer stays as it is.
    """
    yield from prose_texts("train")
    lexicon = " ".join(["", *answer_words(), *FILLERS, *sentence_forms(), *PURPOSES.values(), PHRASES])
    for _ in range(1000):
        yield lexicon
        yield WITH_INPUT + WITHOUT_INPUT


def train_tokenizer() -> PreTrainedTokenizerFast:
    """The pocket tokenizer, trained anew: the same on every run."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        unk_token=END,
        pad_token=PAD,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path | None = None) -> PreTrainedTokenizerFast:
    """The committed pocket tokenizer, or the one in a folder."""
    from transformers import PreTrainedTokenizerFast

    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(folder or POCKET / "tokenizer"))
    return tokenizer
