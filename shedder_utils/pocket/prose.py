"""The prose corpus that ships with the project, and where the pocket files are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

POCKET = Path(__file__).resolve().parents[2] / "pocket"


def prose_texts(split: str) -> list[str]:
    """The documents of one split: "train", "validation" or "test"."""
    with gzip.open(POCKET / "prose" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]
