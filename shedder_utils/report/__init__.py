"""Tables, figures and verdicts, made from records alone: the paper's numbers, the recorded ones and yours.

What a notebook calls takes a profile (a name, the path of a YAML file, or a loaded one) and the root of the records.
What has no record yet shows as not run; a broken record raises RecordError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .. import profiles
from ..files import in_project
from ..profiles import Profile
from . import (
    beyond,
    certainty,
    claims,
    figures,
    hyperparameters,
    origin,
    pareto,
    recovery,
    recovery_curves,
    released,
    speed,
    speedups,
    tables,
)
from .evidence import Verdict, Verdicts
from .figures import Drawing
from .rendering import Table
from .runs import Runs

__all__ = ["Drawing", "Table", "Verdict", "Verdicts", "build", "figure", "provenance", "table", "verdicts"]


BEYOND: dict[int | str, Callable[[Runs, Runs], Table]] = {
    "strategies": beyond.strategies, "joint": beyond.joint, "certainty": certainty.orders, "spread": certainty.spread,
    "released": released.table,
}  # fmt: skip
"""The tables of what the paper did not ask, and of the orders that its authors released."""


def table(
    number: int | str,
    profile: str | Path | Profile = profiles.DEFAULT,
    root: str | Path = "runs",
    recorded: str | Path = "results",
) -> Table:
    """Tables 1 to 5 (scores of pruned models): the paper, the records under `recorded`, and those under `root`.

    6 to 9 (speed of pruned models) likewise, and further ones of the profile by name; "freed" is what removal frees of
    each of them. 10 to 12: recovery tuning. Table 13 has the paper's hyperparameters and the profile's. Beyond the
    paper: "strategies", "joint" (search), "certainty" (of an order) and "spread" (of what is left); "released": the
    authors' own orders.

    Raises DataError for a table that the profile's studies do not fill.
    """
    settings = profiles.load(profile)
    if number == 13:
        return hyperparameters.table(settings)
    if number == "freed":
        return speedups.freed(Runs(settings, root))
    if number in BEYOND:
        return BEYOND[number](Runs(settings, root), Runs(settings, recorded))
    if number in range(10, 13):
        return recovery.table(int(number), Runs(settings, root), Runs(settings, recorded))
    if number in range(6, 10) or isinstance(number, str):
        return speed.table(number, Runs(settings, root), Runs(settings, recorded))
    return tables.pruning_table(number, Runs(settings, root), Runs(settings, recorded))


def figure(number: int | str, profile: str | Path | Profile = profiles.DEFAULT, root: str | Path = "runs") -> Drawing:
    """Figure 1 (what is removable), 2 (Mamba blocks), 3 (SSMs), 4 (calibration perplexity), or one that is named.

    Those are "speedup", "recovery", and "pareto": accuracy against measured time for all strategies.

    Its `.figure` is matplotlib's. Raises DataError for a figure that the profile's studies do not fill.
    """
    runs = Runs(profiles.load(profile), root)
    named = {"recovery": recovery_curves.draw, "pareto": pareto.draw}
    return named[number](runs) if number in named else figures.draw(number, runs)


def verdicts(
    ids: Sequence[str] | None = None, profile: str | Path | Profile = profiles.DEFAULT, root: str | Path = "runs"
) -> Verdicts:
    """The verdicts on some of the paper's claims, such as ["C1"], or on all."""
    return claims.judge(Runs(profiles.load(profile), root), ids)


def provenance(profile: str | Path | Profile, root: str | Path, study: str) -> Table:
    """Weights, data, versions, machine, cost and code behind a study's numbers, one column for each model."""
    return origin.provenance(Runs(profiles.load(profile), root), study)


def build(
    profile: str | Path | Profile = profiles.DEFAULT,
    root: str | Path = "runs",
    recorded: str | Path = "results",
    folder: str | Path | None = None,
) -> list[Path]:
    """Write all tables and figures of a profile's studies, and the verdicts; return the paths.

    folder: where to; None is `<root>/figures/<profile>`.
    """
    settings = profiles.load(profile)
    yours = Runs(settings, root)
    theirs = Runs(settings, recorded)
    target = in_project(Path(root, "figures", settings.name) if folder is None else folder)
    shown: list[Table | Drawing | Verdicts] = [
        *(tables.pruning_table(number, yours.fresh(), theirs.fresh()) for number in tables.available(settings)),
        *(speed.table(number, yours.fresh(), theirs.fresh()) for number in speed.available(settings)),
        *([speedups.freed(yours.fresh())] if speed.available(settings) else []),
        *(recovery.table(number, yours.fresh(), theirs.fresh()) for number in recovery.available(settings)),
        *(BEYOND[name](yours.fresh(), theirs.fresh()) for name in _beyond(settings)),
        hyperparameters.table(settings),
        *(figures.draw(number, yours) for number in figures.available(yours)),
        *([recovery_curves.draw(yours)] if settings.recovery else []),
        *([pareto.draw(yours)] if settings.pareto else []),
        claims.judge(yours),
    ]
    return [path for item in shown for path in item.save(target)]


def _beyond(profile: Profile) -> list[str]:
    """Which of `BEYOND` a profile fills."""
    on_strategies = ["strategies", "joint"] if profile.pareto else []
    on_orders = ["certainty", "spread"] if profile.certainty else []
    return on_strategies + on_orders + (["released"] if profile.released else [])
