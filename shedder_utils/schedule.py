"""Schedule: which runs a profile asks for, which of them are there, and what the others will cost.

Costs are those of the recorded run; once some of your own runs are there, scaled by how long these took beside the
recorded ones. No model is loaded, so a run counts as done when its record is there: whether its inputs have changed
since is found out, and the run repeated, when its turn comes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import records
from .files import in_project
from .profiles import CERTAINTY, DENSE, INVENTORY, PARETO, RECOVERY, RELEASED, SAVINGS, SEARCH, SPEED, Profile
from .records import Record

LEAST = 10.0
"""Seconds of recorded runs below which the ratio of your times to the recorded ones says nothing."""
CHOICE = "SHEDDER_CHOICE"
"""The variable of the environment in which a process finds what is run: models and studies, as JSON."""


@dataclass(frozen=True, order=True)
class Step:
    """One run: where its record lies."""

    study: str
    model: str
    setting: str

    @property
    def place(self) -> tuple[str, str, str]:
        """Study, model and setting."""
        return self.study, self.model, self.setting


def steps(profile: Profile, models: Sequence[str] = (), studies: Sequence[str] = ()) -> list[Step]:
    """All runs of a profile, each once, or those that some models and studies take."""
    wanted = (step for name, step in _by_study(profile) if not studies or name in studies)
    return list(dict.fromkeys(step for step in wanted if not models or step.model in models))


def _by_study(profile: Profile) -> Iterator[tuple[str, Step]]:
    """Every run by the study that takes it; more than one takes a search, or the scores of a dense model."""
    for model in profile.models:
        yield INVENTORY, Step(INVENTORY, model, "components")
        yield DENSE, Step(DENSE, model, "scores")
        yield DENSE, Step(DENSE, model, "without_ssms")
    for name, study in profile.searches.items():
        for model, rows in study.rows.items():
            yield from ((name, step) for step in _search(profile, name, model))
            yield from ((name, _scores(name, model, n)) for n in rows)
    for order in profile.released:
        yield from ((RELEASED, Step(RELEASED, order.model, order.setting(n))) for n in order.rows)
    for number, table in profile.speed.tables.items() if profile.speed else ():
        yield SPEED, Step(table.study, table.model, SEARCH)
        yield SPEED, Step(SPEED, table.model, f"table_{number}")
    for tuned in profile.recovery.tables.values() if profile.recovery else ():
        yield RECOVERY, Step(DENSE, tuned.model, "scores")
        yield RECOVERY, Step(RECOVERY, tuned.model, "dense_tuned")
        for row in tuned.rows:
            yield RECOVERY, Step(row.study, tuned.model, SEARCH)
            yield RECOVERY, _scores(row.study, tuned.model, row.removed)
            yield RECOVERY, Step(RECOVERY, tuned.model, f"{row.state}_tuned")
    if profile.certainty:
        for model in profile.certainty.models:
            yield from ((CERTAINTY, Step(CERTAINTY, model, draw)) for draw in profile.certainty.draws)
    if profile.pareto:
        for name in profile.pareto.studies:
            yield from ((PARETO, step) for step in _search(profile, name, profile.pareto.model))
        yield PARETO, Step(PARETO, profile.pareto.model, "speed")


def _search(profile: Profile, study: str, model: str) -> Iterator[Step]:
    if study in profile.beyond and profile.beyond[study].per:
        yield Step(study, model, SAVINGS)
    yield Step(study, model, SEARCH)


def _scores(study: str, model: str, n_removed: int) -> Step:
    return Step(study, model, f"{n_removed:02d}_removed") if n_removed else Step(DENSE, model, "scores")


class Schedule:
    """The runs of a profile beside the records under `output` and the recorded ones.

    models, studies: only those; none for all. Raises RecordError for a broken record.
    """

    def __init__(
        self,
        profile: Profile,
        output: str | Path = "runs",
        recorded: str | Path = "results",
        models: Sequence[str] = (),
        studies: Sequence[str] = (),
    ) -> None:
        self.profile, self.steps = profile, steps(profile, models, studies)
        self._done, self._recorded = (_by_step(profile, root, self.steps) for root in (output, recorded))

    @property
    def left(self) -> list[Step]:
        """The runs without a record."""
        return [step for step in self.steps if step not in self._done]

    @property
    def pace(self) -> float:
        """How many times as long as recorded the runs that are done took; 1 while that cannot be told."""
        both = [step for step in self._done if step in self._recorded and self._done[step] != self._recorded[step]]
        ours, theirs = (sum(found[step].cost.seconds for step in both) for found in (self._done, self._recorded))
        return ours / theirs if theirs > LEAST else 1.0

    def seconds_left(self) -> float | None:
        """What the runs without a record will take, as far as they are recorded; None if none of them is."""
        known = [self._recorded[step].cost.seconds for step in self.left if step in self._recorded]
        return self.pace * sum(known) if known or not self.left else None

    def lines(self) -> Iterator[str]:
        """What is to be done: for each study its runs, those done, and minutes and memory as recorded; then the sum."""
        yield f"{'study':24}{'runs':>6}{'done':>6}{'minutes':>9}{'memory':>10}"
        for study in dict.fromkeys(step.study for step in self.steps):
            yield self._line(study, [step for step in self.steps if step.study == study])
        yield self._line("all", self.steps)
        machines = {f"{run.environment.cpu}, threads: {run.environment.threads}" for run in self._recorded.values()}
        measured = "; ".join(sorted(machines))
        yield (f"Minutes and memory as recorded ({measured}); loading models comes on top."
               if machines else "Nothing is recorded for this profile, so its cost is not known.")  # fmt: skip
        yield f"To do: {self.summary()}"

    def _line(self, study: str, wanted: list[Step]) -> str:
        known = [self._recorded[step].cost for step in wanted if step in self._recorded]
        minutes = f"{sum(cost.seconds for cost in known) / 60:.1f}" if known else "?"
        memory = f"{max(cost.peak_mib for cost in known) / 1024:.1f} GiB" if known else "?"
        partly = "" if len(known) in (0, len(wanted)) else f"   (recorded: {len(known)} of {len(wanted)} runs)"
        n_done = sum(step in self._done for step in wanted)
        return f"{study:24}{len(wanted):6}{n_done:6}{minutes:>9}{memory:>10}{partly}"

    def summary(self) -> str:
        """How many runs are left and how long they will take."""
        if not self.left:
            return f"nothing, all {len(self.steps)} runs are recorded"
        seconds, unknown = self.seconds_left(), sum(step not in self._recorded for step in self.left)
        time = "time not known" if seconds is None else f"about {duration(seconds)}"
        more = f", and {unknown} runs whose cost is not known" if unknown and seconds is not None else ""
        return f"{len(self.left)} of {len(self.steps)} runs, {time}{more}"


@contextmanager
def choosing(models: Sequence[str], studies: Sequence[str]) -> Iterator[None]:
    """While the body runs, progress here and in processes started from here says what is left of these alone."""
    os.environ[CHOICE] = json.dumps({"models": list(models), "studies": list(studies)})
    try:
        yield
    finally:
        del os.environ[CHOICE]


def report_progress(profile: Profile, output: str | Path, record: Record) -> None:
    """One line on stderr after a run: what it was, how long it took, and what is left of what was chosen."""
    what = f"{record.study}, {record.model.name}, {record.setting}"
    took = f"{duration(record.cost.seconds)}, {record.cost.peak_mib:,.0f} MiB"
    left = Schedule(profile, output, **json.loads(os.environ.get(CHOICE, "{}"))).summary()
    print(f"{what}: {took}. Left: {left}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time in words, to the second below two minutes and to the minute above."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _by_step(profile: Profile, root: str | Path, wanted: Sequence[Step]) -> dict[Step, Record]:
    files = {step: records.path(in_project(root), profile.name, *step.place) for step in wanted}
    return {step: records.read(file) for step, file in files.items() if file.exists()}
