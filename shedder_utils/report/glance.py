"""Everything at a glance: claims, averages, costs, what was not run, the errata of the paper, and the profiles.

All of it comes from records and from the paper; no model is loaded. What was not run shows as such.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from .. import paper, profiles
from ..profiles import Profile
from ..records import Record
from ..schedule import Schedule, steps
from . import claims as tests
from . import recovery, speed, tables
from .counterparts import absent, absent_models, words
from .evidence import Advantage, Verdict
from .released import table as released_orders
from .rendering import DASH, Table
from .runs import Runs


def claims(profile: str | Path | Profile, root: str | Path = "runs", recorded: str | Path = "results") -> Table:
    """The paper's claims, one line for each: the number that tells most, paper beside recorded beside yours."""
    settings = profiles.load(profile)
    theirs, ours = (tests.judge(Runs(settings, place)).items for place in (recorded, root))
    rows = tuple(_claim(*pair) for pair in zip(theirs, ours, strict=True))
    header = ("Id", "Claim", "Measured", "Paper", "Recorded", "Yours", "Verdict", "Notebook", "Minutes")
    note = (
        "Of several numbers one is shown: rather one that the paper has too, among those rather one against the claim, "
        "then the one at the most removals, then one clearly below the paper's; `report.verdicts` has all. "
        "Verdict: recorded, and yours where it is another. Minutes: what the runs behind it took, searches included."
    )
    frame = pd.DataFrame(rows, columns=header)
    own, others = (tuple(record for item in items for record in item.records) for items in (ours, theirs))
    title = f"Claims at a glance ({settings.title})"
    return Table("claims_at_a_glance", title, note, header, rows, frame, own, others)


def _claim(theirs: Verdict, ours: Verdict) -> tuple[str, ...]:
    telling, own = _telling(theirs), _telling(ours)
    known = telling or own
    reported = DASH if known is None or known.paper is None else known.text(known.paper)
    verdict = theirs.verdict if ours.verdict == theirs.verdict else f"{theirs.verdict}; yours: {ours.verdict}"
    minutes = sum(record.cost.seconds for record in theirs.records or ours.records) / 60
    link = f"[{ours.notebook[:2]}]({ours.notebook}.ipynb)"
    what = f"{known.measure}, {known.removed}" if known else DASH
    numbers = (what, reported, _number(telling), _number(own))
    return (ours.id, ours.text, *numbers, f"**{verdict}**", link, f"{minutes:.0f}" if minutes else DASH)


def _telling(verdict: Verdict) -> Advantage | None:
    """One that the paper has, if any; then one against the claim; at the most removals; clearly below the paper's."""

    def rank(number: Advantage) -> tuple[bool, bool, int, bool]:
        below = number.paper is not None and number.high < number.paper
        return number.paper is not None, number.outcome == "against", number.n_removed, below

    return max(verdict.numbers, key=rank, default=None)


def _number(number: Advantage | None) -> str:
    return DASH if number is None else number.with_interval


def verdicts_by_profile(recorded: str | Path = "results") -> Table:
    """The verdict on each claim from the recorded runs of each profile that has any."""
    runs = [Runs(profiles.load(name), recorded) for name in profiles.names()]
    judged = {one.profile.name: tests.judge(one).items for one in runs if one.all()}
    rows = tuple((claim.id, *(items[i].verdict for items in judged.values())) for i, claim in enumerate(paper.claims()))
    header = ("Claim", *judged)
    note = "Only profiles with recorded runs are shown."
    frame = pd.DataFrame(rows, columns=header)
    return Table("verdicts_by_profile", "Verdicts by profile, recorded runs", note, header, rows, frame)


def averages(profile: str | Path | Profile, root: str | Path = "runs", recorded: str | Path = "results") -> Table:
    """Tables 1 to 5 in one: the average accuracy in each of their rows, paper beside recorded beside yours."""
    settings = profiles.load(profile)
    yours, theirs = Runs(settings, root), Runs(settings, recorded)
    frames = [tables.pruning_table(n, yours, theirs).frame.assign(table=n) for n in tables.available(settings)]
    frame = pd.concat(frames) if frames else pd.DataFrame(columns=["column"])
    frame = frame[frame["column"] == "average"].reset_index(drop=True)
    rows = tuple(
        (f"{row['table']}", row["model"], row["target"], DASH if pd.isna(row["pruned"]) else f"{row['pruned']}",
         *(DASH if pd.isna(row[name]) else f"{row[name]:.1f}" for name in ("paper", "recorded", "yours")),
         DASH if pd.isna(row["difference"]) else f"{row['difference']:+.1f}", row["verdict"])
        for _, row in frame.iterrows()
    )  # fmt: skip
    header = ("Table", "Model", "Removed", "Count", "Paper", "Recorded", "Yours", "Difference", "Verdict")
    note = f"Points. The paper's models are other ones unless the profile says so. {DASH}: not reported, not run."
    title = f"Average accuracy at a glance ({settings.title})"
    return Table("averages", title, note, header, rows, frame, yours.given, theirs.given)


def released(
    profile: str | Path | Profile, root: str | Path = "runs", recorded: str | Path = "results"
) -> Table | None:
    """The orders that the paper's authors released, their numbers beside yours; None where the profile scores none."""
    settings = profiles.load(profile)
    return released_orders(Runs(settings, root), Runs(settings, recorded)) if settings.released else None


def costs(profile: str | Path | Profile, root: str | Path = "runs", recorded: str | Path = "results") -> Table:
    """What each study took, recorded and yours: runs, minutes, and the largest peak of memory."""
    settings = profiles.load(profile)
    found = {"recorded": Runs(settings, recorded), "yours": Runs(settings, root)}
    places = dict.fromkeys((step.study, step.model) for step in steps(settings))
    rows = []
    for study in dict.fromkeys(study for study, _ in places):
        models = [model for other, model in places if other == study]
        cells = (_cost([run for model in models for run in runs.of(study, model)]) for runs in found.values())
        rows.append((study, *(cell for three in cells for cell in three)))
    header = ("Study", *(f"{what}, {whose}" for whose in found for what in ("Runs", "minutes", "peak memory")))
    machines = "; ".join(f"{whose}: {_machines(runs)}" for whose, runs in found.items())
    note = f"Without the time to load models. {machines}."
    return Table("costs", "What it cost", note, header, tuple(rows), pd.DataFrame(rows, columns=header))


def _cost(found: list[Record]) -> tuple[str, str, str]:
    if not found:
        return DASH, DASH, DASH
    seconds, peak = sum(run.cost.seconds for run in found), max(run.cost.peak_mib for run in found)
    return f"{len(found)}", f"{seconds / 60:.1f}", f"{peak / 1024:.1f} GiB"


def _machines(runs: Runs) -> str:
    machines = (run.environment for run in runs.all())
    return " and ".join(sorted({f"{one.device}, {one.cpu}, threads: {one.threads}" for one in machines})) or "not run"


def not_run(profile: str | Path | Profile, root: str | Path = "runs") -> Table:
    """What these records cannot speak about: tables and rows of the paper without a study, runs without a record,
    claims without a test.
    """
    settings = profiles.load(profile)
    rows = tuple(_not_run(settings, root)) or (("all", "everything that the profile asks for was run"),)
    header = ("What", "Why")
    frame = pd.DataFrame(rows, columns=header)
    return Table("not_run", f"What was not run ({settings.title})", "", header, rows, frame)


def _not_run(profile: Profile, root: str | Path) -> Iterator[tuple[str, str]]:
    filled = {*tables.available(profile), *speed.available(profile), *recovery.available(profile)}
    for number in sorted(set(range(1, 13)) - filled):
        yield f"Table {number}", f"no study of profile {profile.name} fills it"
    for number in sorted(set(range(1, 13)) & filled):
        yield from _left_out(number, profile)
    left = Schedule(profile, root).left
    for study in dict.fromkeys(step.study for step in left):
        missing = [f"{step.model} ({step.setting.replace('_', ' ')})" for step in left if step.study == study]
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        yield f"Runs of {study}", f"no record of {shown}"
    for item in tests.judge(Runs(profile, root)).items:
        if item.verdict == "not run":
            yield f"Claim {item.id}", item.why


def _left_out(number: int, profile: Profile) -> Iterator[tuple[str, str]]:
    """Models and rows of one of the paper's tables that a profile has no counterpart of."""
    if models := absent_models(number, profile):
        yield f"Models of table {number}", f"profile {profile.name} has none that stands for {', '.join(models)}"
    if rows := absent(number, profile):
        named = "; ".join(f"{row.labels['model']}, {words(row)}" for row in rows)
        yield f"Rows of table {number}", f"no row of profile {profile.name} stands for {named}"


def errata() -> Table:
    """Where the paper disagrees with itself or with the files that its authors released."""
    rows = tuple((f"{n}", text) for n, text in enumerate(paper.errata(), 1))
    header = ("No.", "Erratum")
    note = (
        "The numbers of the paper stand in every table here as it prints them, but for the 15.8 of table 1, which has "
        "the two decimals of its column, and the totals of errata 3 and 4, which are corrected."
    )
    return Table(
        "errata", "Where the paper disagrees with itself or with its release", note, header, rows, pd.DataFrame(rows)
    )


def compared_profiles() -> Table:
    """What differs between the profiles that ship with this project, one column for each."""
    found = [profiles.load(name) for name in profiles.names()]
    facts = [_facts(profile) for profile in found]
    rows = tuple((label, *(fact[label] for fact in facts)) for label in facts[0])
    header = ("", *(profile.name for profile in found))
    return Table("profiles", "What differs between the profiles", "", header, rows, pd.DataFrame(facts))


def _facts(profile: Profile) -> dict[str, str]:
    calibration, evaluation = profile.calibration, profile.evaluation
    counts = {name: max((n for rows in study.rows.values() for n in rows), default=0)
              for name, study in profile.studies.items()}  # fmt: skip
    lengths = [f"{calibration.sequence_length} tokens"] + [
        f"for {name} {model.calibration.sequence_length}" for name, model in profile.models.items() if model.calibration
    ]
    return {
        "what": profile.title,
        "models": ", ".join(f"{name} for {model.paper}" for name, model in profile.models.items()),
        "the paper's own models": "yes" if profile.papers_own_models else "no",
        "calibration": f"{calibration.source}: {calibration.samples} texts, joined and cut into sequences of "
        + ", ".join(lengths),
        "seed": f"{calibration.seed}",
        "tasks": ", ".join(evaluation.task_names),
        "items of each task": "all" if evaluation.limit is None else f"the first {evaluation.limit}",
        "studies, scored after at most": ", ".join(f"{name} {n}" for name, n in counts.items()),
        "speed": f"prompts of {profile.speed.prompt_tokens} tokens, {profile.speed.batches} rounds"
        if profile.speed else DASH,
    }  # fmt: skip
