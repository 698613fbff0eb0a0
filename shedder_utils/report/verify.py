"""Verification: yours against recorded against paper, and whether what is recorded is whole and untouched.

Only what is broken makes it fail: a file changed by hand, a record that is damaged or belongs elsewhere, a figure
without its records, an order of removals that the recorded run's inputs do not explain. Numbers that differ are
reported with the first input that differs, and so is an order that was chosen by times, for these are of a machine; a
result that deviates from the paper is a result.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import manifest, profiles, records
from ..errors import RecordError
from ..files import ROOT, in_project
from ..profiles import Profile
from ..records import Record
from ..schedule import steps
from . import claims, comparison
from .rendering import place as place_of
from .runs import Place, Runs

Level = Literal["broken", "differs", "note"]
TABLE, FIGURE, CLAIMS = ("md", "csv", "tex", "json"), ("png", "pdf", "json"), ("md", "csv", "json")
"""The endings of the files of each."""


@dataclass(frozen=True)
class Finding:
    """Something that verification found: where, what, and how bad it is."""

    level: Level
    where: str
    what: str

    @property
    def fatal(self) -> bool:
        """Whether it makes verification fail."""
        return self.level == "broken"

    def __str__(self) -> str:
        return f"{self.level:8}{self.where}: {self.what}"


def verify(
    profile: str | Path | Profile = profiles.DEFAULT, root: str | Path = "runs", base: Path = ROOT
) -> list[Finding]:
    """What is wrong with, and what differs between, your records under `root` and those recorded under `base`.

    base: the folder that holds `results`, `figures` and `notebooks`. A root without records of the profile is fine:
    then only what is recorded is verified. Raises ProfileError for a profile that does not exist.
    """
    settings = profile if isinstance(profile, Profile) else profiles.load(profile)
    found = list(_untouched(base))
    recorded, problems = _read(settings, base / "results")
    yours, more = _read(settings, in_project(root))
    found += [*problems, *more, *_whole(settings, base, recorded), *_notebooks(settings, base, recorded)]
    if yours and in_project(root) != base / "results":
        found += _compared(yours, recorded)
    else:
        found.append(Finding("note", str(root), "holds no record of this profile: only what is recorded was verified"))
    if not any(finding.fatal for finding in found):
        found += _paper(settings, in_project(root) if yours else base / "results")
    return found


def _untouched(base: Path) -> Iterator[Finding]:
    """Every recorded file is as its run left it."""
    try:
        yield from (Finding("broken", name, problem) for name, problem in manifest.changes(base))
    except RecordError as error:
        yield Finding("broken", manifest.PLACE.as_posix(), str(error).partition(": ")[2])


def _read(profile: Profile, root: Path) -> tuple[dict[Place, Record], list[Finding]]:
    """The sound records of a profile under a root by their places, and what is wrong with the others."""
    sound: dict[Place, Record] = {}
    problems: list[Finding] = []
    for file in sorted(root.glob(f"{profile.name}/*/*/*.json")):
        where = _inside(file)
        try:
            record = records.read(file)
        except RecordError as error:
            problems.append(Finding("broken", where, str(error).removeprefix(f"{file}: ")))
            continue
        problem = _foreign(profile, root, file, record)
        if problem:
            problems.append(Finding("broken", where, problem))
        else:
            sound[record.study, record.model.name, record.setting] = record
    return sound, problems + list(_strangers(root, sound))


def _inside(file: Path) -> str:
    return file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else str(file)


def _foreign(profile: Profile, root: Path, file: Path, record: Record) -> str | None:
    """Why a record does not belong where it lies; None if it does."""
    place = records.path(root, record.profile, record.study, record.model.name, record.setting)
    if place != file:
        return f"holds the record of {_inside(place)}: move or delete it"
    if record.model.name not in profile.models:
        return f"is about {record.model.name}, which profile {profile.name} does not have: delete it"
    if record.inputs != record.inputs_fingerprint():
        return "its inputs are not those of its fingerprint: delete it and run again"
    return None


def _strangers(root: Path, found: dict[Place, Record]) -> Iterator[Finding]:
    """Records of other weights than most of a model's records have."""
    for model in sorted({model for _, model, _ in found}):
        of_model = [record for place, record in found.items() if place[1] == model]
        usual = Counter((record.model.fingerprint, record.model.dtype) for record in of_model).most_common(1)[0][0]
        for record in of_model:
            if (record.model.fingerprint, record.model.dtype) != usual:
                place = records.path(root, record.profile, record.study, model, record.setting)
                own, others = record.model.fingerprint[:12], usual[0][:12]
                what = f"foreign: weights {own}, while the other records of {model} have {others}; run again"
                yield Finding("broken", _inside(place), what)


def _whole(profile: Profile, base: Path, recorded: dict[Place, Record]) -> Iterator[Finding]:
    """Every recorded figure and table is there with all its files, and with the records that it shows."""
    missing = [step for step in steps(profile) if step.place not in recorded]
    if missing:
        first = "/".join(missing[0].place)
        what = f"{len(missing)} of {len(steps(profile))} runs of profile {profile.name} are not recorded, such as"
        yield Finding("note", "results", f"{what} {first}")
    folder = base / "figures" / profile.name
    shown = sorted({file.stem for file in folder.glob("[a-z]*.*")})
    if recorded and not shown:
        yield Finding("broken", _inside(folder), "holds no figures and tables of the recorded runs: `make record`")
    for name in shown:
        drawn = any((folder / f"{name}.{ending}").exists() for ending in ("png", "pdf"))
        for ending in FIGURE if drawn else CLAIMS if name == "claims" else TABLE:
            file = folder / f"{name}.{ending}"
            if not file.exists():
                yield Finding("broken", _inside(file), "is missing: restore it, or let `make record` make it")
            elif ending == "json":
                yield from _sources(file, recorded)


def _sources(sidecar: Path, recorded: dict[Place, Record]) -> Iterator[Finding]:
    """The records that a sidecar names exist, and are those that were shown."""
    where, known = _inside(sidecar), {place_of(record): record for record in recorded.values()}
    try:
        content = json.loads(sidecar.read_text(encoding="utf-8"))
        sources: list[dict[str, Any]] = [*content["records"], *content.get("recorded", [])]
        wanted = {source["record"]: source.get("checksum") for source in sources}
    except (ValueError, KeyError, TypeError):
        yield Finding("broken", where, "is no sidecar: restore it")
        return
    for place, checksum in wanted.items():
        if place not in known:
            yield Finding("broken", where, f"shows results/{place}, which is not there: restore it")
        elif records.checksum(known[place]) != checksum:
            yield Finding("broken", where, f"was made from another results/{place}: make it again with `make record`")


def _notebooks(profile: Profile, base: Path, recorded: dict[Place, Record]) -> Iterator[Finding]:
    """Every notebook of a recorded study, or of none, has outputs in all its cells, none of them an error."""
    done = {study for study, *_ in recorded}
    for file in sorted((base / "notebooks").glob("[0-9]*.ipynb")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue  # reported by the manifest
        shown = set(content["metadata"].get("shedder", {}).get("studies", []))
        code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
        own = any(f'profile = "{profile.name}"' in "".join(cell["source"]) for cell in code)
        if not own or (shown and not shown & done):
            continue
        if not all(cell["execution_count"] for cell in code):
            yield Finding("broken", _inside(file), "was not run from top to bottom: `make record` does so")
        if any(output["output_type"] == "error" for cell in code for output in cell["outputs"]):
            yield Finding("broken", _inside(file), "holds an error among its outputs: run it again")


def _compared(yours: dict[Place, Record], recorded: dict[Place, Record]) -> Iterator[Finding]:
    """Every run that is both yours and recorded."""
    both = [place for place in yours if place in recorded]
    found = [finding for place in both for finding in _pair(yours[place], recorded[place])]
    yield from found
    agreeing = len(both) - len({finding.where for finding in found})
    yield Finding("note", "runs", f"{agreeing} of your {len(yours)} runs agree with the recorded ones")
    if len(both) < len(recorded):
        yield Finding("note", "runs", f"{len(recorded) - len(both)} of {len(recorded)} recorded runs were not run here")


def _pair(yours: Record, recorded: Record) -> Iterator[Finding]:
    """Where two records of one run part, and what explains it."""
    causes = list(comparison.inputs(yours, recorded))
    explained = f"first input that differs: {causes[0]}" if causes else "no input differs"
    if len(causes) > 1:
        explained += f" (also {'; '.join(causes[1:3])}{', ...' if len(causes) > 3 else ''})"
    if yours.plan and recorded.plan:
        parted = comparison.order(yours, recorded)
        if parted:
            what, tied = parted
            same = yours.inputs == recorded.inputs
            level: Level = "broken" if same and not tied else "differs"
            reason = "a tie within rounding" if tied else explained
            yield Finding(level, place_of(yours), f"{what}; {reason}")
    differing = list(comparison.numbers(yours, recorded))
    if differing:
        more = f" (and {len(differing) - 1} more numbers)" if len(differing) > 1 else ""
        yield Finding("differs", place_of(yours), f"{differing[0]}{more}; {explained}")


def _paper(profile: Profile, root: Path) -> Iterator[Finding]:
    """What these records say about the paper's claims."""
    for item in claims.judge(Runs(profile, root)).items:
        yield Finding("note", f"paper, {item.id}", f"{item.verdict}. {item.why}")


def summary(found: Iterable[Finding]) -> str:
    """One line: how much of each level was found."""
    counts = Counter(finding.level for finding in found)
    verdict = "verification failed" if counts["broken"] else "nothing is broken"
    return f"{verdict}: {counts['broken']} broken, {counts['differs']} that differ, {counts['note']} notes"
