"""The data sets: the real ids, configurations, splits and columns, with a few made-up rows each, as the Hub keeps them.

Tables are parquet or JSON, and the README's front matter says which file belongs to which configuration and split.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import yaml
from pyarrow import parquet

from shedder_utils.pocket.instructions import WITHOUT_INPUT

Row = dict[str, Any]
NAMES = ("Anna", "Ben", "Clara", "Dan", "Emma", "Finn")
THINGS = ("lamp", "book", "apple", "stone", "coat", "cup")
PLACES = ("garden", "kitchen", "barn", "house", "field", "forest")


def sentence(rng: random.Random) -> str:
    return f"{rng.choice(NAMES)} took the {rng.choice(THINGS)} to the {rng.choice(PLACES)}."


def instruction(rng: random.Random) -> Row:
    """As little text as a study's draws need, like `prose`."""
    row = {"instruction": f"Count to {rng.randint(2, 99)}.", "input": "", "output": sentence(rng)}
    return row | {"text": f"### Instruction:\n{row['instruction']}\n\n### Response:\n{row['output']}"}


def cleaned_instruction(rng: random.Random) -> Row:
    row = instruction(rng)
    return {name: row[name] for name in ("output", "input", "instruction")}


def prose(rng: random.Random) -> Row:
    return {"text": rng.choice(("", " = Title = \n", f" {sentence(rng)} {sentence(rng)} \n"))}


def passage(rng: random.Random) -> Row:
    return {"text": f"{sentence(rng)} {sentence(rng)} So it is in the {rng.choice(PLACES)}"}


def ending(rng: random.Random) -> Row:
    first, then = sentence(rng), rng.choice(NAMES)
    return {
        "ind": rng.randint(0, 999), "activity_label": "Carrying things", "ctx_a": first, "ctx_b": then,
        "ctx": f"{first} {then}", "endings": [f"goes to the {place}." for place in rng.sample(PLACES, 4)],
        "source_id": f"activitynet~v_{rng.randint(0, 999)}", "split": "val", "split_type": "indomain",
        "label": str(rng.randrange(4)),
    }  # fmt: skip


def goal(rng: random.Random) -> Row:
    return {
        "goal": f"To carry the {rng.choice(THINGS)}", "sol1": f"use the {rng.choice(THINGS)}",
        "sol2": f"go to the {rng.choice(PLACES)}", "label": rng.randrange(2),
    }  # fmt: skip


def question(rng: random.Random) -> Row:
    choices = {"text": rng.sample(PLACES, 4), "label": list("ABCD")}
    return {"id": f"Q_{rng.randint(0, 9999)}", "question": f"{sentence(rng)} Where is it?", "choices": choices,
            "answerKey": rng.choice("ABCD")}  # fmt: skip


def stem(rng: random.Random) -> Row:
    row = question(rng)
    return {"id": row["id"], "question_stem": row["question"], "choices": row["choices"], "answerKey": row["answerKey"]}


def blank(rng: random.Random) -> Row:
    one, other = rng.sample(NAMES, 2)
    text = f"{one} gave {other} the {rng.choice(THINGS)} because _ needed it."
    return {"sentence": text, "option1": one, "option2": other, "answer": rng.choice("12")}


def page(rng: random.Random) -> Row:
    return {
        "text": f"{sentence(rng)} {sentence(rng)}",
        "timestamp": "2019-04-25T12:57:54Z",
        "url": "https://example.org",
    }


def newspaper(rng: random.Random) -> Row:
    return {"sentence": sentence(rng).lower().removesuffix(".")}


THREE = {"train": 12, "validation": 12, "test": 12}
DATA: dict[str, tuple[Callable[[random.Random], Row], dict[str, dict[str, int]], str]] = {
    "tatsu-lab/alpaca": (instruction, {"default": {"train": 2600}}, "parquet"),
    "yahma/alpaca-cleaned": (cleaned_instruction, {"default": {"train": 2200}}, "json"),
    "Salesforce/wikitext": (
        prose, {f"wikitext-{size}-raw-v1": {"test": 1000, "validation": 20} for size in (103, 2)}, "parquet"
    ),
    "allenai/c4": (page, {"en": {"train": 12, "validation": 600}}, "json.gz"),
    "ptb-text-only/ptb_text_only": (newspaper, {"penn_treebank": {"test": 600, "validation": 20}}, "converted"),
    "EleutherAI/lambada_openai": (passage, {"default": {"test": 12}, "en": {"test": 12}}, "jsonl"),
    "Rowan/hellaswag": (ending, {"default": THREE}, "parquet"),
    "baber/piqa": (goal, {"default": THREE}, "parquet"),
    "allenai/ai2_arc": (question, {"ARC-Challenge": THREE, "ARC-Easy": THREE}, "parquet"),
    "allenai/winogrande": (blank, {f"winogrande_{size}": THREE for size in ("debug", "xl")}, "parquet"),
    "allenai/openbookqa": (stem, {"additional": THREE, "main": THREE}, "parquet"),
}  # fmt: skip
"""By id: how a row is made, how many there are in each configuration and split, and the format."""


UNREAD = ("allenai/c4", "ptb-text-only/ptb_text_only")
"""Data that no profile names."""


def build_data(folder: Path) -> None:
    """Write all data sets into `folder/datasets/<owner>/<name>/`."""
    for name, (make, configurations, kind) in DATA.items():
        rng, repository, described = random.Random(name), folder / "datasets" / name, []
        for configuration, splits in configurations.items():
            files = []
            for split, n_rows in splits.items():
                path = _path(configuration, split, kind)
                _write(repository / path, [make(rng) for _ in range(n_rows)], kind)
                files.append({"split": split, "path": path})
            described.append({"config_name": configuration, "data_files": files})
        if kind != "converted":
            (repository / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': described})}---\n\n# {name}\n")


def _path(configuration: str, split: str, kind: str) -> str:
    """Where a split lies: c4 in many files, of which there is one here, a conversion in a folder for each split."""
    if kind == "json.gz":
        return f"{configuration}/c4-{split}.00000-of-00008.{kind}"
    if kind == "converted":
        return f"{configuration}/{split}/0000.parquet"
    return f"{'data' if configuration == 'default' else configuration}/{split}-00000-of-00001.{kind}"


def _write(file: Path, rows: list[Row], kind: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if kind in ("parquet", "converted"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif kind == "json":
        file.write_text(json.dumps(rows))
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        file.write_bytes(gzip.compress(lines, mtime=0) if kind == "json.gz" else lines)


def corpus() -> Iterator[str]:
    """Text that tokenizers are trained on: of what the profiles read, so that its tokens are as many as they need."""
    read = (make for name, (make, _, _) in DATA.items() if name not in UNREAD)
    for make in read:
        rng = random.Random(0)
        for _ in range(40):
            yield WITHOUT_INPUT
            yield from (value for value in make(rng).values() if isinstance(value, str))
