"""Where the numbers of a study come from: weights, data, versions, machine, cost and code, model by model."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from ..errors import DataError
from ..provenance import Environment
from ..records import Record
from ..schedule import steps
from .rendering import DASH, Table
from .runs import Runs

VERSIONS = ("python", "torch", "transformers", "lm_eval", "numba")
OF_KERNELS = ("mamba_ssm", "causal_conv1d")


def provenance(runs: Runs, study: str) -> Table:
    """What a study's records and the dense evaluation beside them were made from, one column for each model.

    Its frame has one line for each model. Raises DataError for a study that the profile does not have.
    """
    known = runs.profile.study_names
    if study not in known:
        raise DataError(f"study {study!r}: expected one of {', '.join(known)} with profile {runs.profile.name}")
    studies = list(dict.fromkeys(["dense", study]))
    about = dict.fromkeys(step.model for step in steps(runs.profile, studies=[study]))
    found = {model: [record for name in studies for record in runs.of(name, model)] for model in about}
    facts = {model: _facts(of_model) if of_model else {} for model, of_model in found.items()}
    labels = list(dict.fromkeys(label for of_model in facts.values() for label in of_model)) or ["runs"]
    rows = tuple((label, *(facts[model].get(label, DASH) for model in facts)) for label in labels)
    frame = pd.DataFrame([{"model": model, **of_model} for model, of_model in facts.items()])
    note = "Fingerprints are the first 12 digits of a sha256; seconds are summed over the runs."
    return Table(f"provenance_{study}", f"Where the numbers of {study} come from", note, ("", *facts), rows, frame)


def _facts(found: list[Record]) -> dict[str, str]:
    """The facts of a model's records; where they disagree, all that occur."""
    roles = sorted({role for record in found for role in record.data})
    data = {role: [record.data[role] for record in found if role in record.data] for role in roles}
    machines = [run.environment for run in found]
    return {
        "weights": _all(f"{run.model.ref} {run.model.fingerprint[:12]}, {run.model.dtype}" for run in found),
        "parameters": _all(f"{run.model.parameters_dense:,}" for run in found),
        **{f"data: {role}": _all(f"{one.name} {one.fingerprint[:12]}" for one in data[role]) for role in roles},
        "versions": _all(map(_versions, machines)),
        "device": _all(f"{machine.device}: {machine.cpu}, {machine.threads} threads" for machine in machines),
        "scan": _all(machine.scan for machine in machines),
        "runs": f"{len(found)}",
        "seconds": f"{sum(run.cost.seconds for run in found):.0f}",
        "peak memory": f"{max(run.cost.peak_mib for run in found):,.0f} MiB",
        "commit": _all(_commit(run) for run in found),
    }


def _versions(machine: Environment) -> str:
    kernels = [name for name in OF_KERNELS if getattr(machine, name)]
    return ", ".join(f"{name} {getattr(machine, name) or DASH}" for name in (*VERSIONS, *kernels))


def _commit(record: Record) -> str:
    changed = " with changes" if record.code.dirty else ""
    return f"{record.code.commit[:12]}{changed}" if record.code.commit else DASH


def _all(values: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(values))
