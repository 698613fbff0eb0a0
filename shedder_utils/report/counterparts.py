"""Which rows of the paper's tables 1 to 12 a profile's rows stand for, and which ones it has no counterpart of."""

from __future__ import annotations

from .. import paper
from ..profiles import Profile, RecoveryRow, Study

ABSENT = "not in this profile"
"""The verdict on a row that only the paper has."""
BOTH = "recorded, yours"
"""The source of the one line that stands for both where there is neither."""


def target_of(study: Study, n_removed: int) -> str:
    """The kinds that went in the first n removals of a study: "&" within a stage, "+" between stages (table 3)."""
    begun = [stage for i, stage in enumerate(study.stages) if sum(s.steps for s in study.stages[:i]) < n_removed]
    return " + ".join(" & ".join(stage.kinds) for stage in begun) or "dense"


def paper_values(number: int, model: str, stands_for: float, target: str) -> dict[str, float | None]:
    """A row of one of the paper's tables 1 to 5 with its ratio; empty where the paper has no such row."""
    row = next((row for row in paper.rows(number) if is_pruned(row, model, stands_for, target)), None)
    return {} if row is None else with_ratio(row)


def with_ratio(row: paper.Row) -> dict[str, float | None]:
    """The values of a row of the paper, the ratio before them where it has one."""
    return {"ratio": float(row.labels["ratio"]), **row.values} if "ratio" in row.labels else dict(row.values)


def is_pruned(row: paper.Row, model: str, stands_for: float, target: str) -> bool:
    """Whether a row of tables 1 to 5 is that of a model, a number of removals or a ratio, and the kinds removed."""
    labels = row.labels
    if labels["model"] != model or labels.get("pruned", labels.get("ratio")) != stands_for:
        return False
    return target == "dense" or labels.get("kind", labels.get("target")) == target


def timed_as(row: paper.Row) -> int | str:
    """By what a profile names a row of tables 6 to 9: its number of removals, or its state."""
    name = row.labels.get("pruned", row.labels.get("state"))
    return name if isinstance(name, int) else str(name)


def is_tuned(row: paper.Row, own: RecoveryRow) -> bool:
    """Whether a profile's row stands for one of tables 10 to 12; 10 and 12 have but one pruned model each."""
    return own.stands_for is not None and row.labels.get("ratio", own.stands_for) == own.stands_for


def absent(number: int, profile: Profile) -> list[paper.Row]:
    """The paper's rows of a table that no row of the profile stands for, of the models that the profile has there."""
    covered = _covered(number, profile)
    shown = {row.labels["model"] for row in covered}
    return [row for row in paper.rows(number) if row.labels["model"] in shown and row not in covered]


def absent_models(number: int, profile: Profile) -> list[str]:
    """The paper's models of a table that the profile has no model for."""
    shown = {row.labels["model"] for row in _covered(number, profile)}
    named = dict.fromkeys(row.labels["model"] for row in paper.rows(number))
    return [str(model) for model in named if model not in shown]


def _covered(number: int, profile: Profile) -> list[paper.Row]:
    """The paper's rows of a table that rows of the profile stand for."""
    rows = paper.rows(number)
    if number <= 5:
        places = [
            (profile.models[model].paper, stands_for, target_of(study, n))
            for study in profile.studies.values()
            if study.table == number
            for model, own in study.rows.items()
            for n, stands_for in own.items()
        ]
        return [row for row in rows if any(is_pruned(row, *place) for place in places)]
    if number <= 9:
        timed = profile.speed.tables.get(number) if profile.speed else None
        return [row for row in rows if timed and timed_as(row) in timed.rows.values()]
    tuned = profile.recovery.tables.get(number) if profile.recovery else None
    if tuned is None:
        return []
    return [row for row in rows if row.labels["state"] == "dense" or any(is_tuned(row, own) for own in tuned.rows)]


def words(row: paper.Row) -> str:
    """A row of the paper in words, without its model: what it has removed, and of how many."""
    labels = row.labels
    blocks = paper.models()[str(labels["model"])]["blocks"]
    if "state" in labels:
        state = str(labels["state"]).replace("_", " ")
        return f"{state}, {labels['ratio']:g} %" if "ratio" in labels else state
    if "pruned" in labels:
        return f"{labels['kind']}: {labels['pruned']} of {blocks}"
    return f"{labels['target']}, {labels['ratio']:g} %"
