"""Calibration batches: drawn, joined and cut as the release does it; bad sources are refused."""

from __future__ import annotations

import dataclasses
import gzip
import json
import random
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from shedder_utils import Calibration, DataError, calibrate, public_texts
from shedder_utils.instructions import instructions
from shedder_utils.pocket.prose import POCKET
from shedder_utils.pocket.tokenizer import load_tokenizer

TEXTS = [f"Story {i}: Anna is in the garden and Ben is in the kitchen." for i in range(40)]


def test_samples_are_joined_tokenised_as_one_stream_and_cut() -> None:
    tokenizer = load_tokenizer()
    calibration = calibrate(TEXTS, tokenizer, samples=10, sequence_length=16, batch_size=3, seed=7)
    random.seed(7)
    ids = tokenizer("\n\n".join(random.sample(TEXTS, 10))).input_ids
    whole = len(ids) // 16
    assert torch.cat(calibration.batches).flatten().tolist() == ids[: 16 * whole]
    assert [len(batch) for batch in calibration.batches[:-1]] == [3] * (len(calibration.batches) - 1)
    assert (calibration.sequences, calibration.tokens) == (whole, 16 * whole)


def with_a_beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same, but that it begins a text with <|endoftext|>, as those of Zamba2 and Hymba do with their own."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    begin = (tokenizer.bos_token, tokenizer.bos_token_id)
    backend.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=begin[0], eos_token=begin[0])


def test_the_stream_begins_as_the_tokenizer_begins_a_text() -> None:
    settings = {"samples": 10, "sequence_length": 16, "seed": 7}
    without = calibrate(TEXTS, load_tokenizer(), **settings)
    begun = calibrate(TEXTS, with_a_beginning(load_tokenizer()), **settings)
    first, second = (torch.cat(one.batches).flatten().tolist() for one in (without, begun))
    assert second == [load_tokenizer().bos_token_id, *first][: len(second)]
    assert begun.fingerprint != without.fingerprint


@pytest.mark.parametrize("name", [folder.name for folder in sorted((POCKET / "models").iterdir())])
def test_no_pocket_tokenizer_adds_tokens(name: str) -> None:
    tokenizer = load_tokenizer(POCKET / "models" / name)
    assert tokenizer(TEXTS[0]).input_ids == tokenizer(TEXTS[0], add_special_tokens=False).input_ids


def test_the_fingerprint_is_that_of_the_ids() -> None:
    tokenizer = load_tokenizer()
    first, again = (calibrate(TEXTS, tokenizer, samples=10, sequence_length=16, seed=7) for _ in range(2))
    other = calibrate(TEXTS, tokenizer, samples=10, sequence_length=16, seed=8)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.fingerprint == Calibration(first.batches).fingerprint


def test_files_and_named_sources_are_read(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    plain, rows = tmp_path / "texts.txt", tmp_path / "texts.jsonl"
    plain.write_text("\n\n".join(TEXTS))
    rows.write_text("".join(f'{{"text": "{text}"}}\n' for text in TEXTS))
    settings = {"samples": 10, "sequence_length": 16, "seed": 7}
    expected = calibrate(TEXTS, tokenizer, **settings).fingerprint
    assert calibrate(plain, tokenizer, **settings).fingerprint == expected
    assert calibrate(str(rows), tokenizer, **settings).fingerprint == expected
    assert calibrate("pocket-instructions", tokenizer, samples=256, sequence_length=256).sequences > 20
    assert calibrate("pocket-prose", tokenizer, samples=1, sequence_length=256).source["name"] == "pocket-prose"


@pytest.mark.parametrize("ending", ["txt", "jsonl", "txt.gz", "jsonl.gz"])
def test_lines_end_where_the_file_ends_them(tmp_path: Path, ending: str) -> None:
    """Windows' line ends are read as any, and a separator of Unicode within a text ends no line."""
    texts = [f"Anna saw{mark}lamp {i}." for i, mark in enumerate(" \u2028\u2029\x85" * 3)]
    rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts] if "jsonl" in ending else texts
    content = "\r\n\r\n".join(rows).encode()
    file, settings = tmp_path / f"texts.{ending}", {"samples": 12, "sequence_length": 16}
    file.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    tokenizer = load_tokenizer()
    assert calibrate(file, tokenizer, **settings).fingerprint == calibrate(texts, tokenizer, **settings).fingerprint


PACKED = gzip.compress(b'{"text": "Anna has the lamp."}\n', mtime=0)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("rows.jsonl", b'{"text": "Anna."}\n{"text": null}\n', "expected texts, found a NoneType among them"),
        ("rows.jsonl", b'{"text": 7}\n', "expected texts, found a int among them"),
        ("rows.json", b'[{"text": "Anna."}]', "rows.json: expected a file that ends in .txt, .jsonl, .txt.gz, "),
        ("rows.csv", b"text\nAnna.\n", "rows.csv: expected a file that ends in"),
        ("rows.jsonl.gz", b'{"text": "Anna."}\n', r"cannot be read \(Not a gzipped file"),
        ("rows.jsonl.gz", PACKED[:-9], r"cannot be read \(Compressed file ended before"),
        ("rows.jsonl.gz", PACKED[:10] + b"\xff" * 9 + PACKED[19:], r"cannot be read \(Error -3 while decompressing"),
    ],
)
def test_files_that_cannot_do_are_refused(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        calibrate(file, load_tokenizer(), samples=1, sequence_length=4)


def test_damaged_instructions_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(PACKED[:-9])
    with pytest.raises(DataError, match=r"rows.jsonl.gz: cannot be read \(Compressed file ended before"):
        instructions(file, load_tokenizer(), max_length=64, held_out=1, seed=0)


@pytest.mark.parametrize(
    ("source", "samples", "complaint"),
    [
        (TEXTS, 41, "has 40 texts, 41 were asked for"),
        (TEXTS[:1], 1, "less than one sequence"),
        ("nowhere.jsonl", 1, r"nowhere.jsonl: cannot be read \(.*No such file"),
        ("alpacca", 1, "alpacca: expected a file that ends in .*, or one of pocket-instructions, pocket-prose, alpaca"),
    ],
)
def test_sources_that_cannot_do_are_refused(source: str | list[str], samples: int, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        calibrate(source, load_tokenizer(), samples=samples, sequence_length=128)


def in_place_of_the_hub(monkeypatch: pytest.MonkeyPatch, name: str, file: Path) -> None:
    """Read a data name from a local JSON file, split and drawn as ever."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(file.parent))
    local = dataclasses.replace(
        public_texts.SOURCES[name], repository="json", configuration=None, revision=None, split="train", files=str(file)
    )
    monkeypatch.setitem(public_texts.SOURCES, name, local)


def test_alpaca_is_split_and_drawn_as_the_release_does_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, tokenizer = tmp_path / "alpaca.json", load_tokenizer()
    prompt = "Below is an instruction.\n\n### Instruction:\nCount to {n}.\n\n### Response:\n1 to {n}"
    rows = [{"instruction": f"Count to {n}.", "text": prompt.format(n=n)} for n in range(100)]
    file.write_text(json.dumps(rows))
    in_place_of_the_hub(monkeypatch, "alpaca", file)
    whole = load_dataset("json", data_files=str(file), split="train")
    pool = whole.train_test_split(0.2, seed=42)["test"].train_test_split(0.5, seed=42)["train"]["text"]
    assert public_texts.public_texts("alpaca") == list(pool)
    assert len(pool) == 10
    random.seed(42)
    expected = "\n\n".join(pool[i] for i in random.sample(range(10), 6))
    calibration = calibrate("alpaca", tokenizer, samples=6, sequence_length=32)
    ids = tokenizer(expected).input_ids
    assert torch.cat(calibration.batches).flatten().tolist() == ids[: calibration.tokens]
    assert calibration.source["name"] == "alpaca"


def test_empty_rows_do_not_count_and_an_unreadable_source_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "texts.json"
    file.write_text(json.dumps([{"text": ""}, {"text": " = Title = "}, {"text": "Prose."}]))
    in_place_of_the_hub(monkeypatch, "wikitext-2", file)
    assert public_texts.public_texts("wikitext-2") == [" = Title = ", "Prose."]
    file.write_text(json.dumps([{"words": "Prose."}]))
    with pytest.raises(DataError, match=r"data wikitext-2: json cannot be read \(.*\): check the connection"):
        public_texts.public_texts("wikitext-2")


def test_rows_without_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "x"}\n')
    with pytest.raises(DataError, match="a column 'text'"):
        calibrate(file, load_tokenizer(), samples=1, sequence_length=8)


@pytest.mark.parametrize("batches", [[], [torch.zeros(3, dtype=torch.int64)], [torch.zeros(2, 1, dtype=torch.int64)]])
def test_batches_without_a_next_token_are_refused(batches: list[torch.Tensor]) -> None:
    with pytest.raises(DataError, match="expected at least one"):
        Calibration(batches)
