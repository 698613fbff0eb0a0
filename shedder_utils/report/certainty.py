"""How sure is the order? What searches with other draws, sizes and sources of calibration data agree on.

The paper does not ask. A draw is a source of text, a number of sequences and a seed; a record holds what one draw
finds (`beyond_study.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from statistics import fmean, stdev

import pandas as pd

from ..errors import DataError
from ..plan import Plan
from ..profiles import CERTAINTY, Certainty, Profile
from ..profiles.beyond import Draw
from ..records import Record
from ..statistics import correlations
from .beyond import KINDS, SOURCES
from .rendering import DASH, Table
from .runs import Runs

COMPARED: dict[str, Callable[[Draw, Draw], bool]] = {
    "another draw": lambda a, b: a.seed != b.seed and (a.source, a.sequences) == (b.source, b.sequences),
    "another size": lambda a, b: a.seed != b.seed and a.source == b.source and a.sequences != b.sequences,
    "another text": lambda a, b: a.seed != b.seed and a.source != b.source,
}
"""Which pairs of draws are compared."""


def orders(yours: Runs, recorded: Runs) -> Table:
    """How far orders agree that other calibration data give: other draws of one text, other sizes, another text.

    The frame has one line for each model, comparison and source: pairs, spearman with least and most, shared.
    """
    settings = _settings(yours.profile)
    draws, rows, lines = settings.draws, [], []
    for model in settings.models:
        for what, compared in COMPARED.items():
            pairs = [(one, other) for one, other in combinations(draws, 2) if compared(draws[one], draws[other])]
            for source, runs in zip(SOURCES, (recorded, yours), strict=True):
                agreement = _agreement(runs, model, pairs)
                lines.append({"model": model, "compared": what, "source": source, **agreement})
                rows.append((model, what, f"{agreement['pairs']}", source, *_agreement_cells(agreement)))
    header = ("Model", "Compared", "Pairs", "Source", "Rank correlation", f"Of the first {settings.steps} in common")
    note = (
        "Spearman's correlation of the orders in which the dense model misses its components, one removed at a time; "
        "its mean, least and most over pairs of draws with different seeds. In common: the share of a search's "
        f"removals that two draws agree on. {DASH}: not run."
    )
    title = f"How sure is the order of {KINDS[settings.kind]}? ({yours.profile.title})"
    return Table("table_certainty", title, note, header, tuple(rows), pd.DataFrame(lines), yours.given, recorded.given)


def _settings(profile: Profile) -> Certainty:
    if profile.certainty is None:
        raise DataError(f"certainty: profile {profile.name} has no such study")
    return profile.certainty


def _agreement(runs: Runs, model: str, pairs: Sequence[tuple[str, str]]) -> dict[str, object]:
    found = [pair for name in pairs if (pair := _pair(runs, model, *name)) is not None]
    if not found:
        return {"pairs": 0, "spearman": None, "low": None, "high": None, "shared": None}
    rhos = [rho for rho, _ in found]
    return {"pairs": len(found), "spearman": fmean(rhos), "low": min(rhos), "high": max(rhos),
            "shared": fmean(shared for _, shared in found)}  # fmt: skip


def _pair(runs: Runs, model: str, first: str, second: str) -> tuple[float, float] | None:
    """The rank correlation of two draws over all components, and the share of their removals in common."""
    records = [runs.at(CERTAINTY, model, name) for name in (first, second)]
    if None in records:
        return None
    rankings, plans = {}, {}
    for name, record in zip((first, second), records, strict=True):
        assert record is not None
        alone = {key: metric.value for key, metric in record.metrics.items() if key.startswith("alone/")}
        rankings[name] = sorted(alone, key=alone.__getitem__)
        plans[name] = [str(component) for component in Plan.model_validate(record.plan).components]
    shared = correlations(plans)["shared"].iloc[0]
    return float(correlations(rankings)["spearman"].iloc[0]), float(shared)


def _agreement_cells(agreement: dict[str, object]) -> tuple[str, str]:
    if not agreement["pairs"]:
        return DASH, DASH
    rho, low, high, shared = (agreement[name] for name in ("spearman", "low", "high", "shared"))
    return f"{rho:.2f} [{low:.2f}, {high:.2f}]", f"{shared:.0%}"


def spread(yours: Runs, recorded: Runs) -> Table:
    """What the draws of one source and size leave: the perplexity of prose after the same number of removals.

    The frame has one line for each model, source of text, size and source of numbers: n, mean, std, least, most, ties.
    """
    settings = _settings(yours.profile)
    rows, lines = [], []
    for model in settings.models:
        for text, sequences in ((text, size) for text in settings.sources for size in settings.sequences):
            names = [name for name, d in settings.draws.items() if (d.source, d.sequences) == (text, sequences)]
            for source, runs in zip(SOURCES, (recorded, yours), strict=True):
                found = _left([r for name in names if (r := runs.at(CERTAINTY, model, name)) is not None])
                lines.append({"model": model, "text": text, "sequences": sequences, "source": source, **found})
                rows.append((model, text, f"{sequences}", source, *_left_cells(found)))
    header = (
        "Model",
        "Calibrated on",
        "Sequences",
        "Source",
        "Prose perplexity",
        "Least to most",
        "Choices within error",
    )
    note = (
        f"After {settings.steps} removals: mean over draws ± their standard deviation. Within error: choices with a "
        f"rival that the calibration data cannot tell from the chosen one, the mean over draws. {DASH}: not run."
    )
    title = f"What the draws leave ({yours.profile.title})"
    return Table("table_spread", title, note, header, tuple(rows), pd.DataFrame(lines), yours.given, recorded.given)


def _left(found: Sequence[Record]) -> dict[str, float | int | None]:
    values = [record.metrics["prose/perplexity"].value for record in found]
    ties = [len(Plan.model_validate(record.plan).provenance["ties_within_error"]) for record in found]
    if not values:
        return {"n": 0, "mean": None, "std": None, "least": None, "most": None, "ties": None}
    return {"n": len(values), "mean": fmean(values), "std": stdev(values) if len(values) > 1 else math.nan,
            "least": min(values), "most": max(values), "ties": fmean(ties)}  # fmt: skip


def _left_cells(found: dict[str, float | int | None]) -> tuple[str, str, str]:
    if not found["n"]:
        return DASH, DASH, DASH
    mean, std, least, most, ties = (found[name] for name in ("mean", "std", "least", "most", "ties"))
    return f"{mean:.2f} ± {std:.2f}", f"{least:.2f} to {most:.2f}", f"{ties:.1f}"
