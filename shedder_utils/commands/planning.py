"""`plan` and `doctor`: what a profile takes, and what this machine has for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import profiles
from .options import finish, say

if TYPE_CHECKING:
    from ..cost_plan import CostPlan, Device, Job


def plan_profile(
    profile: Annotated[str, typer.Option(help="A profile's name, or the path of a YAML file.")] = profiles.DEFAULT,
    models: Annotated[str, typer.Option(help="Only these models of the profile, separated by commas.")] = "",
    studies: Annotated[str, typer.Option(help="Only these studies, separated by commas.")] = "",
    output: Annotated[Path, typer.Option(help="The folder with your records, to see what is done.")] = Path("runs"),
) -> None:
    """Say what a profile downloads, computes and holds in memory, and how long it takes, before any of it starts."""
    from ..cost_plan import CostPlan
    from ..notebooks import computed
    from ..schedule import Schedule

    settings = profiles.load(profile)
    wanted = [[name.strip() for name in text.split(",") if name.strip()] for text in (models, studies)]
    schedule = Schedule(settings, output, models=wanted[0], studies=computed(settings, *wanted))
    plan = CostPlan(settings, schedule, *wanted)
    for line in _lines(plan):
        say(line)
    devices = {device.name: sum(map(device.hours, plan.jobs)) for device in plan.devices}
    seconds = schedule.seconds_left()
    finish(
        {
            "profile": settings.name, "runs": len(schedule.steps), "left": len(schedule.left),
            "download_gb": sum(plan.downloads.values()), "disk_gb": plan.disk_gb, "hours": devices,
            "minutes_as_recorded": None if seconds is None else seconds / 60, "jobs": [asdict(j) for j in plan.jobs],
            "not_counted": plan.not_counted,
        }
    )  # fmt: skip


def _lines(plan: CostPlan) -> Iterator[str]:
    """The plan for people: downloads, one line for each study of each model, the sum, and what is done."""
    from ..cost_plan import BANDWIDTH, DATA_GB, EFFICIENCY

    yield f"profile {plan.profile.name}: {plan.profile.title}"
    parts = ", ".join(f"{name} {size:g} GB" for name, size in plan.downloads.items())
    tuning = f", {plan.checkpoints_gb:.1f} of them while a tuning runs" if plan.checkpoints_gb >= 1 else ""
    parts = f"{parts}, data sets {DATA_GB:g} GB" if parts else "nothing"
    yield f"download: {parts}; disk: {plan.disk_gb:.1f} GB{tuning}"
    heads = "".join(f"{device.name:>14}" for device in plan.devices)
    yield f"{'study':20} {'model':20} {'':16} {'passes':>7} {'PFLOP':>9} {'GiB':>6}{heads}"
    for job in plan.jobs:
        hours = "".join(f"{_hours(job, device):>14}" for device in plan.devices)
        passes = f"{job.passes:,}" if job.passes else ""
        yield f"{job.study:20} {job.model:20} {job.what:16} {passes:>7} {job.flops / 1e15:9.3g} {job.gib:6.1f}{hours}"
    total = "".join(f"{sum(map(device.hours, plan.jobs)):12.2f} h" for device in plan.devices)
    yield f"{'all':20} {'':20} {'':16} {'':7} {sum(job.flops for job in plan.jobs) / 1e15:9.3g} {'':6}{total}"
    yield "passes: of Algorithm 1, one for each candidate of each step, at most where one kind takes from another"
    yield f"hours: at {EFFICIENCY:.0%} of a device's peak arithmetic, {BANDWIDTH:.0%} of its memory traffic"
    if plan.profile.device == "cuda":
        yield "hours and GiB: with the kernels of mamba_ssm (make setup-gpu), which a V100 needs built for it;"
        yield "there the scans of Mamba-2 and Zamba2 take longer than these hours: Triton leaves its tensor cores idle"
    if plan.not_counted:
        yield f"hours do not count what is timed or listed: {', '.join(plan.not_counted)}"
    yield from _memory(plan)
    yield from _found(plan)
    yield f"to do: {plan.schedule.summary()}"


def _memory(plan: CostPlan) -> Iterator[str]:
    """How the memory of each model's largest search adds up."""
    searches = [job for job in plan.jobs if job.memory is not None]
    for model in dict.fromkeys(job.model for job in searches):
        largest = max((job for job in searches if job.model == model), key=lambda job: job.gib)
        yield f"memory of {model}, {largest.study}: {largest.memory}"


def _hours(job: Job, device: Device) -> str:
    from ..cost_plan import TIMED

    if job.gib > device.gib:
        return "too small"
    return "fits" if job.what == TIMED else f"{device.hours(job):.2f} h"


def _found(plan: CostPlan) -> Iterator[str]:
    """Which of the jobs fit the GPU that is here, if the profile wants one, and whether they would run as planned."""
    import torch

    from ..devices import device_error, slow_scan

    if plan.profile.device != "cuda":
        return
    if error := device_error("cuda"):
        doctor = f"python -m shedder_utils doctor --profile {plan.profile.name}"
        yield f"this machine has no GPU that torch can use ({error}): see {doctor}"
        return
    gpu = torch.cuda.get_device_properties(0)
    too_large = [f"{job.study} of {job.model}" for job in plan.jobs if job.gib > gpu.total_memory / 2**30]
    yield f"on the {gpu.name} here {len(plan.jobs) - len(too_large)} of {len(plan.jobs)} jobs fit" + (
        f", these do not: {', '.join(dict.fromkeys(too_large))}" if too_large else ""
    )
    yield from filter(None, [slow_scan("cuda")])


def warn_of_slow_scan(profile: str) -> None:
    """One loud line where a profile's models would run on a GPU without the kernels of mamba_ssm."""
    if profiles.load(profile).device == "cuda":
        from ..devices import slow_scan

        if warning := slow_scan("cuda"):
            say(warning)


def examine_machine(
    profile: Annotated[str, typer.Option(help="Also what this profile needs: a name, or the path of a file.")] = "",
) -> None:
    """Say what is installed, which scan will run, and what a profile lacks, with the line that installs it."""
    from ..doctor import examine

    findings = examine(profiles.load(profile) if profile else None)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        say(f"{finding.name:{width}}  {finding.found}")
        if finding.remedy:
            say(f"{'':{width}}  -> {finding.remedy}")
    missing = [finding.name for finding in findings if finding.remedy]
    say(f"missing: {', '.join(missing)}" if missing else "nothing is missing")
    finish({"found": {f.name: f.found for f in findings}, "missing": {f.name: f.remedy for f in findings if f.remedy}})


COMMANDS: dict[str, Callable[..., None]] = {"plan": plan_profile, "doctor": examine_machine}
