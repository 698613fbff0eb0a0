"""The tokenizer of a model: the one beside its weights, else that of the published models; and the files it is in."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from . import hub
from .errors import ModelError

GPT_NEOX = "EleutherAI/gpt-neox-20b@c292233c833e336628618a88a648727eb3dff0a7"
PUBLISHED = {
    "mamba": GPT_NEOX,
    "mamba2": GPT_NEOX,
    "falcon_mamba": "tiiuae/falcon-mamba-7b",
    "zamba2": "Zyphra/Zamba2-2.7B",
    "hymba": "nvidia/Hymba-1.5B-Base",
}
"""The tokenizer that the published models of each type were trained with: a Hub id, and its commit after "@"."""
FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja")
"""Where a tokenizer and its chat template are kept, as patterns."""


def tokenizer_for(
    folder: str, config: PretrainedConfig, wanted: str | Path | bool | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model in a folder: `wanted` as `load_model` takes it.

    Says on stderr where the published one stands in. Raises ModelError for one that cannot be read, and for a published
    one that has more tokens than the model.
    """
    if wanted is False:
        return None
    source, revision, published = str(wanted), None, False
    if wanted is None or wanted is True:
        published = not any(Path(folder, name).is_file() for name in ("tokenizer_config.json", "tokenizer.json"))
        source, revision = hub.pinned(PUBLISHED[config.model_type]) if published else (folder, None)
    with hub.checked(f"tokenizer {source} for {folder}", source, ModelError, advice=f"pass tokenizer=, or {hub.AGAIN}"):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    if published and len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"model {folder} has no tokenizer beside it, and {config.vocab_size} tokens, where {source} has "
            f"{len(tokenizer)}: pass tokenizer="
        )
    if published:
        print(f"model {config._name_or_path} has no tokenizer beside it: taking {source}", file=sys.stderr)
    return tokenizer


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what there is of a tokenizer beside a model's weights."""
    for pattern in FILES:
        for file in source.glob(pattern):
            shutil.copy(file, folder)
