"""The Hugging Face Hub: what is fetched from it is of one commit, whole, and has the hashes that the Hub announced.

Over plain HTTP huggingface_hub compares sizes only. Its cache names each file by the announced hash (sha256 of a large
file, git's of a small one), so the content can be checked against the name. What is damaged is deleted, that the next
run fetches it anew. Anything that goes wrong is one line; a run that it ends keeps what it recorded, and goes on when
it is started again.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx2
from huggingface_hub import constants, snapshot_download

from .errors import ModelError, ShedderError

CHECKPOINT = ("*.json", "*.model", "*.txt", "*.jinja", "*.safetensors")
"""The files of a checkpoint that are read: settings, tokenizer, chat template, weights. Code is not among them."""
BINARY = "pytorch_model.bin"
"""What a checkpoint of mamba_ssm has in the place of safetensors."""
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
AGAIN = "check the connection to the Hub and run again, what is recorded stays"


@dataclass(frozen=True)
class Snapshot:
    """A repository at one commit: a folder of the cache."""

    folder: Path
    commit: str


def fetch(ref: str, revision: str | None = None) -> Snapshot | None:
    """The checkpoint behind a Hub id, downloaded where the cache lacks it; None for what is not a Hub id.

    revision: a branch, tag or commit. Without the Hub a whole snapshot in the cache will do. Raises ModelError if the
    checkpoint cannot be fetched, and if a file has not the hash that the Hub gave.
    """
    if not REPOSITORY.fullmatch(ref) or Path(ref).exists():
        return None
    what = f"model {ref}"
    with one_line(what, ModelError):
        folder = Path(_download(ref, revision, CHECKPOINT))
        if not list(folder.glob("*.safetensors")):
            folder = Path(_download(ref, folder.name, (*CHECKPOINT, BINARY)))
    _refuse_damaged(what, _damaged(folder), ModelError)
    return Snapshot(folder, folder.name)


def pinned(name: str) -> tuple[str, str | None]:
    """The repository and the revision of "owner/name@revision"; None where a name has no revision."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def cached(ref: str, commit: str | None) -> Path | None:
    """The folder of the cache with a Hub id at a commit, without asking the Hub; None where there is none."""
    folder = _cache_of("model", ref) / str(commit)
    return folder if commit and folder.is_dir() else None


def _cache_of(kind: Literal["model", "dataset"], repository: str) -> Path:
    """Where the cache keeps the snapshots of a repository."""
    return Path(constants.HF_HUB_CACHE, f"{kind}s--{repository.replace('/', '--')}", "snapshots")


def _download(repository: str, revision: str | None, patterns: tuple[str, ...]) -> str:
    return snapshot_download(repository, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"])


@contextmanager
def checked(
    what: str,
    repository: str,
    error: type[ShedderError],
    kind: Literal["model", "dataset"] = "model",
    advice: str = AGAIN,
) -> Iterator[None]:
    """Inside, another library reads a repository; afterwards the files it fetched are checked.

    what, advice: how errors call it, and what they advise. Raises `error` in one line for what the library fails with,
    or for a damaged file; of a data set, what was made from its files is deleted with it.
    """
    try:
        with one_line(what, error, advice):
            yield
    finally:
        damaged = _damaged(_cache_of(kind, repository))
        if damaged and kind == "dataset":
            _forget_tables(repository)
        _refuse_damaged(what, damaged, error)


@contextmanager
def one_line(what: str, error: type[ShedderError], advice: str = AGAIN) -> Iterator[None]:
    """Turn what libraries raise when the Hub fails them into `error`, with the reason in one line."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, KeyError, httpx2.HTTPError, DatasetsError) as reason:
        raise error(f"{what} cannot be read ({_first_line(reason)}): {advice}") from reason


def _damaged(folder: Path) -> list[Path]:
    """The files in a folder of the cache whose content does not have the hash that they are stored under."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and not _intact(file.resolve())]


def _intact(stored: Path) -> bool:
    """Whether a stored file has the hash in its name; True for one that is not named by a hash."""
    if re.fullmatch(r"[0-9a-f]{64}", stored.name):
        with stored.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest() == stored.name
    if re.fullmatch(r"[0-9a-f]{40}", stored.name):
        header = f"blob {stored.stat().st_size}\0".encode()
        return hashlib.sha1(header + stored.read_bytes()).hexdigest() == stored.name
    return True


def _refuse_damaged(what: str, damaged: list[Path], error: type[ShedderError]) -> None:
    """Delete damaged files and raise `error`, if there are any."""
    for file in damaged:
        file.resolve().unlink(missing_ok=True)
        file.unlink(missing_ok=True)
    if damaged:
        raise error(
            f"{what}: {damaged[0].name} was fetched, but does not have the hash that the Hub announced: it is deleted, "
            "run again"
        )


def _forget_tables(repository: str) -> None:
    """Delete what `datasets` made of a data set's files."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, name = repository.split("/")
    shutil.rmtree(Path(config.HF_DATASETS_CACHE, f"{owner}___{camelcase_to_snakecase(name)}"), ignore_errors=True)


def _first_line(reason: BaseException) -> str:
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    return lines[0].rstrip(".:")[:200]
