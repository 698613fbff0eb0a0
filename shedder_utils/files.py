"""Files: where the project is, and writing one whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from .errors import RecordError

ROOT = Path(__file__).resolve().parents[1]
"""The project's folder, which holds `notebooks/`, `pocket/`, `results/` and `runs/`."""


def in_project(path: str | Path) -> Path:
    """A relative path from the project's root, so that notebooks find the records from any folder."""
    return ROOT / path


def write_atomically(target: Path, text: str) -> None:
    """Replace `target` by a file with this text; at any moment it is the old one or the new one, whole.

    Raises RecordError when it cannot be stored, such as on a full disk; what was there stays.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RecordError(f"{target}: cannot be stored ({error.strerror}); what was there before is kept") from error
