"""Recording, for maintainers: a finished run becomes the recorded one, in one step that is ready to be committed.

Records go to `results/`, tables and figures are drawn from them, and the notebooks are run once more: they find
everything computed, so their outputs show the recorded numbers on both sides. Only outputs are taken over, prose and
code of the committed notebooks stay. Last, the tables of the README and the manifest are written.
"""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from . import manifest, notebooks, profiles, records, report
from .errors import RecordError
from .files import ROOT, in_project, write_atomically
from .profiles import Profile
from .provenance import code_version
from .records import Record
from .report import readme
from .schedule import Schedule

MACHINE = re.compile(
    "|".join(map(re.escape, {str(ROOT), str(Path.home()) + "/", gettempdir() + "/"})) + r"|0x[0-9a-f]{8,}"
)
"""What an output must not hold: paths of this machine, and addresses of objects."""
RANDOM_ID = re.compile(r"\bT_[0-9a-f]{5}(?![0-9a-f])")
"""The identifier that pandas gives to a styled table, another one each time."""


def record(profile: str = profiles.DEFAULT, root: str | Path = "runs", base: Path = ROOT) -> list[Path]:
    """Make the run under `root` the recorded one, and return the files written.

    base: the folder that holds `results`, `figures` and `notebooks`. Raises RecordError for a run that is not
    finished, or that was made by code which differs from its commit, before anything is changed.
    """
    settings = profiles.load(profile)
    found = _finished(settings, in_project(root))
    _committed(found, root)
    written = _copy(found, settings, base / "results")
    written += report.build(settings, base / "results", base / "results", base / "figures" / settings.name)
    notebooks.run(profile, output=root)
    written += record_notebooks(settings, in_project(root) / "notebooks" / settings.name, base)
    return [*written, readme.write(base), manifest.write(base)]


def _finished(profile: Profile, root: Path) -> list[Record]:
    """All records of a profile under a root. Raises RecordError if one is missing, broken or out of place."""
    left = Schedule(profile, root).left
    if left:
        raise RecordError(f"{root}: {len(left)} runs are missing, such as {'/'.join(left[0].place)}; run them first")
    return records.find(root, profile=profile.name)


def _committed(found: list[Record], root: str | Path) -> None:
    """Raises RecordError unless the code that runs now, and that of every record, is some commit's."""
    if code_version().dirty is not False:
        raise RecordError("the package differs from its commit: commit first, then record")
    for one in found:
        if one.code.dirty is not False:
            place = records.path(root, one.profile, one.study, one.model.name, one.setting)
            raise RecordError(f"{place}: was made by code that differs from its commit; delete it and run again")


def _copy(found: list[Record], profile: Profile, results: Path) -> list[Path]:
    """Write the records under `results`, and delete those of the profile that the run does not have."""
    written = [records.write(results, one) for one in found]
    for file in (results / profile.name).rglob("*.json"):
        if file not in written:
            file.unlink()
    return written


def record_notebooks(profile: Profile, folder: Path, base: Path = ROOT) -> list[Path]:
    """Give the notebooks of a profile the outputs of those executed in `folder`, and return those written.

    A notebook belongs to the profile that its own `profile` parameter names. Raises RecordError for one whose outputs
    hold an error or a path of this machine.
    """
    import nbformat

    written = []
    for file in sorted((base / "notebooks").glob("[0-9]*.ipynb")):
        kept = nbformat.read(file, as_version=4)
        own = any(f'profile = "{profile.name}"' in cell.source for cell in kept.cells if cell.cell_type == "code")
        if own and (folder / file.name).exists():
            transfer(nbformat.read(folder / file.name, as_version=4), kept, file.name)
            write_atomically(file, nbformat.writes(kept).rstrip("\n") + "\n")
            written.append(file)
    return written


def transfer(executed: Any, kept: Any, name: str) -> None:
    """Put the outputs of an executed notebook into the one that is kept, in a form that differs only with the results.

    executed, kept: nbformat notebooks. Raises RecordError if their code differs, or for an output that must not be.
    """
    done = [
        cell
        for cell in executed.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    if [cell.source for cell in done] != [cell.source for cell in code]:
        raise RecordError(f"{name}: its code was changed since it ran; run it again")
    for number, (old, new) in enumerate(zip(code, done, strict=True), 1):
        old.execution_count = number
        old.outputs = [_normal(output, (number, i), name) for i, output in enumerate(_merged(new.outputs))]
    kept.metadata["language_info"] = {"name": "python"}


def _merged(outputs: list[Any]) -> list[Any]:
    """Outputs without stderr, and with the pieces of stdout, whose number is up to chance, put together."""
    found: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stderr":
            continue
        if output.output_type == "stream" and found and found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def _normal(output: Any, place: tuple[int, int], name: str) -> Any:
    """An output that says nothing of when and where it was made; place: the numbers of its cell, and of it there."""
    number, i = place
    if output.output_type == "error":
        raise RecordError(f"{name}, cell {number}: failed with {output.ename}: {output.evalue}")
    if "execution_count" in output:
        output.execution_count = number
    data = output.get("data", {})
    if "text/html" in data:
        data["text/html"] = RANDOM_ID.sub(f"T_{number}_{i}", data["text/html"])
        if "text/plain" in data:  # of a styled table no more than its class and address
            data["text/plain"] = re.sub(r" at 0x[0-9a-f]+", "", data["text/plain"])
    for text in [output.get("text", ""), *(content for kind, content in data.items() if kind.startswith("text/"))]:
        found = MACHINE.search(text)
        if found:
            raise RecordError(f"{name}, cell {number}: its output holds {found[0]!r}, which is of this machine only")
    return output
