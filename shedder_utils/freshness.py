"""Whether an executed notebook is as a new run would leave it, so that a second run can do nothing.

Its metadata says what it was made from: one fingerprint of the notebook itself, its parameters, the profile, the code
of this package, what ships in `pocket/`, and the recorded runs that it shows beside yours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import ROOT
from .profiles import Profile

KEY = "made_from"


def made_from(notebook: Path, profile: Profile, parameters: dict[str, Any]) -> str:
    """sha256 of everything that an executed notebook depends on, apart from versions of other packages."""
    digest = hashlib.sha256(json.dumps(_sources(notebook)).encode())
    digest.update(profile.model_dump_json().encode())
    digest.update(json.dumps(parameters, sort_keys=True).encode())
    for file in _files(profile):
        digest.update(f"{file.relative_to(ROOT).as_posix()} {file.stat().st_size} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _sources(notebook: Path) -> list[list[str]]:
    """Kind and text of each cell."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [[cell["cell_type"], "".join(cell["source"])] for cell in cells]


def _files(profile: Profile) -> Iterator[Path]:
    for folder, pattern in (("shedder_utils", "*.py"), ("pocket", "*"), (f"results/{profile.name}", "*.json")):
        yield from sorted(file for file in (ROOT / folder).rglob(pattern) if file.is_file())


def mark(executed: Path, fingerprint: str) -> None:
    """Note in an executed notebook what it was made from."""
    import nbformat

    content = nbformat.read(executed, as_version=4)
    content.metadata["shedder"] = {**content.metadata.get("shedder", {}), KEY: fingerprint}
    nbformat.write(content, executed)


def is_fresh(executed: Path, fingerprint: str) -> bool:
    """Whether an executed notebook exists and was made from the same."""
    try:
        metadata = json.loads(executed.read_text(encoding="utf-8"))["metadata"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(metadata.get("shedder", {}).get(KEY) == fingerprint)
