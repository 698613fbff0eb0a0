"""Public texts: data sets of the Hub that calibration and held-out perplexity are drawn from, pinned to a revision.

wikitext-2, c4 and ptb are what perplexity is usually measured on. Alpaca is split as the paper's release splits it
(`paper.yaml`, hyperparameters): 80 to 20, then the 20 % halved, each time with seed 42; the first half is the pool. Its
column `text` has the prompt and the response.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import hub
from .errors import DataError

SPLIT_SEED = 42


@dataclass(frozen=True)
class PublicTexts:
    """One column of a data set: repository and revision on the Hub, configuration and split.

    held_out_tenth: only the tenth of the rows that the release draws from. files: of the split, where they are not all
    that the configuration names.
    """

    repository: str
    revision: str | None
    split: str
    configuration: str | None = None
    column: str = "text"
    held_out_tenth: bool = False
    files: str | None = None


SOURCES = {
    "alpaca": PublicTexts(
        "tatsu-lab/alpaca", "dce01c9b08f87459cf36a430d809084718273017", "train", held_out_tenth=True
    ),
    "wikitext-2": PublicTexts(
        "Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", "test", "wikitext-2-raw-v1"
    ),
    "c4": PublicTexts(
        "allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", "validation",
        files="en/c4-validation.00000-of-00008.json.gz",
    ),
    "ptb": PublicTexts(
        "ptb-text-only/ptb_text_only", "refs/convert/parquet", "test", column="sentence",
        files="penn_treebank/test/*.parquet",
    ),
}  # fmt: skip
"""The data names that a profile can give, beside those of `calibration.POOLS`.

Of c4 the first file of the validation split, as pruning papers commonly take it. The Penn Treebank comes with a script,
which is not run: the Hub's own conversion is read, which has no commit that stays.
"""


def public_texts(name: str) -> list[str]:
    """The texts of a data name, without empty ones. Raises DataError if the data set cannot be read."""
    from datasets import load_dataset

    source = SOURCES[name]
    with hub.checked(f"data {name}: {source.repository}", source.repository, DataError, "dataset"):
        rows = load_dataset(
            source.repository, source.configuration, split=source.split, revision=source.revision,
            data_files={source.split: source.files} if source.files else None,
        )  # fmt: skip
        if source.held_out_tenth:
            fifth = rows.train_test_split(test_size=0.2, seed=SPLIT_SEED)["test"]
            rows = fifth.train_test_split(test_size=0.5, seed=SPLIT_SEED)["train"]
        return [text for text in rows[source.column] if text.strip()]
