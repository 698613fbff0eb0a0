"""The rehearsal (`make rehearse`): the paper profile from beginning to end against the stand-in, by the same commands.

What differs from `make reproduce PROFILE=paper` is a copy of the profile with a limit on items and the CPU as device,
on which float16 would be slow, and two variables of the environment: HF_ENDPOINT, and HF_HOME for an empty cache. With
--quick also calibration and prose are short, and then it takes less than an hour rather than three. What was stopped,
or went wrong, lies in `runs/` and is gone on from; what went well is deleted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from shedder_utils import Plan, notebooks, profiles, records
from shedder_utils.candidates import candidates
from shedder_utils.components import PARTS
from shedder_utils.cost_plan import CostPlan, Job
from shedder_utils.files import ROOT
from shedder_utils.profiles import CERTAINTY, SEARCH, Profile, ProfileModel, Strategy, Study
from shedder_utils.schedule import Schedule, duration
from shedder_utils.shapes import without_weights

from .models import build_models
from .server import Hub
from .texts import build_data

COMMANDS = ("plan", "run", "report", "verify")
SHORTER = {"samples": 16, "alpaca": 16, "wikitext-2": 16, "sequence_length": 32}
"""In a quick rehearsal: how many times fewer texts are drawn, of each source, and shorter sequences made of them."""
TUNING = {"held_out": 128, "steps": 8}
"""Of a recipe, in a quick rehearsal: the loss of 2,000 rows alone takes twenty minutes on a CPU."""


def rehearse(folder: Path, *, models: str = "", studies: str = "", limit: int = 2, quick: bool = False) -> list[str]:
    """Run everything in `folder`, or what an earlier call left there; what went wrong, in lines, none if nothing did.

    models, studies: only these of the profile, separated by commas. limit: items per task. quick: with short texts.
    """
    if not (folder / "files").exists():
        shutil.rmtree(folder / "half-built", ignore_errors=True)
        build_models(folder / "half-built")
        build_data(folder / "half-built")
        (folder / "half-built").rename(folder / "files")
    profile, chosen = derived(folder / "paper.yaml", limit, quick), ["--models", models, "--studies", studies]
    problems = []
    with Hub(folder / "files") as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")}
        for command in COMMANDS:
            arguments = ["--profile", str(profile), *(chosen if command in ("plan", "run") else [])]
            arguments += ["--output", str(folder / "runs")] if command != "plan" else []
            started = time.perf_counter()
            run = [sys.executable, "-m", "shedder_utils", command, *arguments]
            finished = subprocess.run(run, env=environment, stdout=subprocess.DEVNULL)
            print(f"{command}: {duration(time.perf_counter() - started)}, {len(hub.requests)} requests", flush=True)
            if finished.returncode:
                problems.append(f"{command} ended with {finished.returncode}")
    settings, wanted = profiles.load(profile), (_names(models), _names(studies))
    schedule = Schedule(settings, folder / "runs", models=wanted[0], studies=notebooks.computed(settings, *wanted))
    problems += [f"{'/'.join(step.place)} is not recorded" for step in schedule.left]
    problems += passes_amiss(CostPlan(settings, schedule, *wanted), folder / "runs")
    _print_summary(folder / "runs")
    return problems


def passes_amiss(plan: CostPlan, runs: Path) -> list[str]:
    """The searches that did not make the passes that were planned.

    Where one kind takes from another, what was planned is what there are at most; how many there are is then counted
    along the order that was found.
    """
    found = []
    for job in plan.jobs:
        for setting, planned, made in _passes(plan.profile, job, runs):
            if made != planned:
                found.append(f"{job.study}, {job.model}{setting}: {made} passes, planned {planned}")
    return found


def _passes(profile: Profile, job: Job, runs: Path) -> Iterator[tuple[str, int, int]]:
    """Of each recorded search of a job which it is, and the passes planned and made."""
    if job.study == CERTAINTY:
        for record in records.find(runs, profile=profile.name, study=CERTAINTY, model=job.model):
            alone = sum(name.startswith("alone/") for name in record.metrics)
            made = Plan.model_validate(record.plan).provenance["passes"] + alone
            yield f", {record.setting}", job.passes // len(profile.certainty.draws), made
    elif job.what == "search" and (file := records.path(runs, profile.name, job.study, job.model, SEARCH)).exists():
        order, settings = Plan.model_validate(records.read(file).plan), profile.searches[job.study]
        made = order.provenance.get("passes", 0)
        exact = not made or settings.options.get("one_shot") or not takes_from_another(settings)
        yield "", job.passes if exact else min(job.passes, passes_along(profile.models[job.model], order)), made


def takes_from_another(study: Study | Strategy) -> bool:
    """Whether what goes first decides what else may: kinds of several sizes, or parts of a component."""
    kinds = {kind for stage in study.stages for kind in stage.kinds}
    return len(kinds) > 1 or bool(PARTS.keys() & kinds)


def passes_along(settings: ProfileModel, order: Plan) -> int:
    """The candidates of each step that a search made itself, with what was gone by then."""
    model, known = without_weights(settings), order.provenance.get("taken_over", {}).get("removals", 0)
    return sum(
        len(candidates(model, order.stages[removal.stage], order.first(step).gone))
        for step, removal in enumerate(order.removals)
        if step >= known
    )


def derived(file: Path, limit: int, quick: bool = False) -> Path:
    """A copy of the paper profile for this machine."""
    content = yaml.safe_load((profiles.FOLDER / "paper.yaml").read_text())
    if quick:
        _shorten(content)
        for table in content["recovery"]["tables"].values():
            table["recipe"] |= TUNING
    content |= {"device": "cpu", "dtype": "float32"}
    content["evaluation"]["limit"] = limit
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def _shorten(settings: Any) -> None:
    """Divide the numbers that `SHORTER` names, wherever they stand."""
    for name, value in settings.items() if isinstance(settings, dict) else enumerate(settings):
        if isinstance(value, dict | list):
            _shorten(value)
        elif name in SHORTER:
            settings[name] = value // SHORTER[name]


def _print_summary(runs: Path) -> None:
    """Records by model and study, and what tables and verdicts say."""
    found = records.find(runs)
    counts = Counter((one.model.name, one.study) for one in found)
    for (model, study), count in sorted(counts.items()):
        seconds = sum(one.cost.seconds for one in found if (one.model.name, one.study) == (model, study))
        print(f"{model}, {study}: {count} records, {duration(seconds)}")
    for file in sorted(runs.glob("figures/*/*.md")):
        print(f"\n{file.name}\n{file.read_text()}")


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="")
    parser.add_argument("--studies", default="")
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="with a few short texts to calibrate on")
    parser.add_argument("--folder", type=Path, help="work here, and keep everything in the end")
    options = parser.parse_args()
    started = time.perf_counter()
    folder = options.folder or ROOT / "runs" / ("rehearsal-quick" if options.quick else "rehearsal")
    print(f"rehearsal: {'goes on' if folder.exists() else 'begins'} in {folder}", flush=True)
    problems = rehearse(
        folder, models=options.models, studies=options.studies, limit=options.limit, quick=options.quick
    )
    if not problems and options.folder is None:
        shutil.rmtree(folder)
    print(f"rehearsal: {duration(time.perf_counter() - started)}", *(problems or ["nothing went wrong"]), sep="\n")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
