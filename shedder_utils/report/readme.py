"""The README's tables, from recorded runs: each stands between two marks, so that no number in it is written by hand.

`make record` writes them anew; a test compares them with the records.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from .. import profiles
from ..files import ROOT, write_atomically
from . import glance
from .rendering import DASH, markdown
from .runs import Runs, error_of

BLOCK = re.compile(r"(?P<begin><!-- (?P<name>\w+): [^>]*-->\n).*?(?P<end><!-- end -->)", re.DOTALL)


def write(base: Path = ROOT) -> Path:
    """Bring the README's tables up to date with `results/`, and return its path."""
    file = base / "README.md"
    write_atomically(file, rendered(file.read_text(encoding="utf-8"), base / "results"))
    return file


def rendered(text: str, recorded: str | Path = "results", profile: str = profiles.DEFAULT) -> str:
    """A text with each block between marks as the records have it. Raises KeyError for a block of another name."""
    return BLOCK.sub(lambda found: f"{found['begin']}{BLOCKS[found['name']](profile, recorded)}\n{found['end']}", text)


def claims(profile: str, recorded: str | Path) -> str:
    """The paper's claims: its number, the recorded one, the verdict, where it is told, and what it took."""
    rows = [
        (name, claim, what, reported, ours, verdict, link.replace("](", "](notebooks/"), minutes)
        for name, claim, what, reported, ours, _, verdict, link, minutes in glance.claims(
            profile, recorded, recorded
        ).rows
    ]
    header = ("", "The paper's claim", "Measured", "Paper", "Recorded", "Verdict", "Notebook", "Minutes")
    return markdown(header, rows).strip()


def models(profile: str, recorded: str | Path) -> str:
    """The small models: size, and what they know before anything is removed, beside what guessing gives."""
    runs = Runs(profiles.load(profile), recorded)
    rows = []
    for name, settings in runs.profile.models.items():
        record, average = runs.at("dense", name, "scores"), runs.dense(name).get("average")
        size = f"{record.model.parameters_dense / 1e6:.1f} M" if record else DASH
        known = f"{average.value:.1f} ± {error_of(average):.1f}" if average else DASH
        tasks, guessing = len(runs.profile.accuracies_of(name)), f"{100 * runs.profile.chance_of(name):.0f}"
        rows.append((f"`{name}`", settings.paper, size, f"{tasks}", known, guessing))
    header = ("Model", "Stands for", "Parameters", "Tasks", "Average accuracy, % ± standard error", "Guessing, %")
    return markdown(header, rows).strip()


def cost(profile: str, recorded: str | Path) -> str:
    """What the recorded run took, in one sentence."""
    found = Runs(profiles.load(profile), recorded).all()
    minutes, peak = sum(r.cost.seconds for r in found) / 60, max((r.cost.peak_mib for r in found), default=0.0)
    machines = sorted({f"{r.environment.cpu}, threads: {r.environment.threads}" for r in found})
    return (
        f"The recorded run of `{profile}` has {len(found)} runs: {minutes:.0f} minutes of computing and a peak of "
        f"{peak / 1024:.1f} GiB ({'; '.join(machines)})."
    )


BLOCKS: dict[str, Callable[[str, str | Path], str]] = {"claims": claims, "models": models, "cost": cost}


if __name__ == "__main__":
    print(write())
