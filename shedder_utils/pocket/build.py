"""Makes the pocket world's files anew: `python -m shedder_utils.pocket.build` writes tokenizer, tasks and instructions.

The files are the same on every run, so the committed ones can be checked against the code that made them.
"""

from __future__ import annotations

import json
from pathlib import Path

from shedder_utils.pocket.instructions import instruction_rows
from shedder_utils.pocket.prose import POCKET
from shedder_utils.pocket.tasks import write_tasks
from shedder_utils.pocket.tokenizer import train_tokenizer


def write_tokenizer(folder: Path) -> None:
    """Train the tokenizer and save it as a standard folder, its class under the name that every transformers has."""
    train_tokenizer().save_pretrained(str(folder))
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    config.write_text(json.dumps(settings, indent=2) + "\n")


def write_instructions(folder: Path) -> None:
    """Write the instructions of both splits as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        lines = (json.dumps(row) + "\n" for row in instruction_rows(split))
        (folder / f"{split}.jsonl").write_text("".join(lines))


def build(folder: Path = POCKET) -> None:
    """Write everything that is generated."""
    write_tokenizer(folder / "tokenizer")
    write_tasks(folder / "tasks")
    write_instructions(folder / "instructions")


if __name__ == "__main__":
    build()
