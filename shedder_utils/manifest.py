"""The manifest: a checksum of every recorded file, so that none can be changed by hand without notice.

It covers records, figures, tables, their sidecars, and the notebooks. Of a notebook it covers the code cells with their
outputs: prose may be edited at any time, code only together with a new run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import RecordError
from .files import ROOT, write_atomically

PLACE = Path("results", "manifest.json")
SUFFIXES = (".json", ".md", ".csv", ".tex", ".png", ".pdf")


def write(base: Path = ROOT) -> Path:
    """Write the manifest of what lies under `base`, and return its path. Raises RecordError: see `checksums`."""
    content = {"schema": 1, "files": checksums(base)}
    write_atomically(base / PLACE, json.dumps(content, indent=1) + "\n")
    return base / PLACE


def checksums(base: Path = ROOT) -> dict[str, str]:
    """sha256 of every recorded file, by its path under `base`. Raises RecordError for a broken notebook."""
    return {file.relative_to(base).as_posix(): _checksum(file) for file in _files(base)}


def changes(base: Path = ROOT) -> Iterator[tuple[str, str]]:
    """The files that are not as the manifest says, each with what is wrong with it.

    Raises RecordError when there is no manifest, or none that can be read.
    """
    expected = _read(base)
    present = {file.relative_to(base).as_posix(): file for file in _files(base)}
    for name in sorted({*expected, *present}):
        if name not in present:
            yield name, "is in the manifest, but it is missing: restore it"
        elif name not in expected:
            yield name, "is not in the manifest: no recorded run made it, delete it"
        else:
            yield from ((name, problem) for problem in _problems(present[name], expected[name]))


def _problems(file: Path, expected: str) -> Iterator[str]:
    try:
        if _checksum(file) != expected:
            yield "was changed after it was recorded: restore it, or record a new run"
    except RecordError as error:
        yield str(error)


def _read(base: Path) -> dict[str, str]:
    file = base / PLACE
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["files"])
    except OSError as error:
        raise RecordError(f"{file}: cannot be read ({error.strerror}); `make record` writes it") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{file}: is not a manifest; restore it, or let `make record` write it again") from error


def _files(base: Path) -> Iterator[Path]:
    for folder in ("figures", "results"):
        found = sorted(file for file in (base / folder).rglob("*") if file.suffix in SUFFIXES)
        yield from (file for file in found if file != base / PLACE)
    yield from sorted((base / "notebooks").glob("[0-9]*.ipynb"))


def _checksum(file: Path) -> str:
    content = _code_and_outputs(file) if file.suffix == ".ipynb" else file.read_bytes()
    return hashlib.sha256(content).hexdigest()


def _code_and_outputs(notebook: Path) -> bytes:
    """The code cells of a notebook as canonical JSON."""
    try:
        cells: list[dict[str, Any]] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        kept = [[_joined(cell["source"]), cell["execution_count"], cell["outputs"]] for cell in code]
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{notebook}: is not a notebook ({error}); restore it") from error
    return json.dumps(kept, sort_keys=True).encode()


def _joined(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)
