"""Studies: what each notebook computes, as functions over a profile and a model. Every result is a record.

A run that is recorded with the same inputs is not repeated; a search goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from transformers import PreTrainedModel

from . import profiles
from .benchmark import PHASES, Timings, benchmark
from .calibration import Calibration
from .components import Cut
from .errors import ProfileError
from .evaluation import evaluate
from .importance import perplexity
from .inventory import describe
from .lm_eval_tasks import task_facts
from .plan import Plan
from .prefix import taken_over
from .profiles import DENSE, INVENTORY, RELEASED, SEARCH, SPEED, Profile, Strategy, Study
from .public_texts import SOURCES
from .records import DataFacts, Metric, Outcome, Record, Request
from .removal import components, removed
from .search import search
from .surgery import extract
from .weighing_study import search_options
from .workbench import Workbench


def workbenches(
    profile: str | Path, models: str = "", output: str | Path = "runs", study: str | None = None
) -> dict[str, Workbench]:
    """A workbench for each model of a profile, or for those named in `models`, separated by commas.

    study: only models that this study is about. Raises ProfileError for a model or study that the profile lacks.
    """
    settings = profiles.load(profile)
    names = [name.strip() for name in models.split(",") if name.strip()] or list(settings.models)
    about = settings.models if study is None else _study(settings, study).rows
    return {name: Workbench(profile, name, output) for name in names if name in about or name not in settings.models}


def dense(bench: Workbench) -> Record:
    """The scores of the model as it is: row 0 of every table."""
    return _scores(bench, DENSE, "scores", [])


def without_ssms(bench: Workbench) -> Record:
    """The scores with every SSM gone: what is left of the tasks for a model that remembers nothing by its state."""
    return _scores(bench, DENSE, "without_ssms", [Cut(ssm) for ssm in components(bench.model, ["ssm"])])


def inventory(bench: Workbench) -> Record:
    """What can be removed from the model, and what each kind holds of its parameters: figure 1."""

    def compute(_: Request) -> Outcome:
        kinds = describe(bench.model).drop("model")
        counted = {f"{kind}/{what}": kinds.at[kind, what] for kind in kinds.index for what in ("count", "parameters")}
        return Outcome(metrics={name: Metric(value=float(value)) for name, value in counted.items()})

    return bench.record(INVENTORY, "components", {}, {}, [], compute)


def pruning(bench: Workbench, study: str) -> dict[int, Record]:
    """A study of the profile: search for the removals, then score the model after some of them.

    study: such as "block_pruning" (table 1) or "ssm_pruning" (table 2). Returns the scores' records by number of
    removals; the dense model's is the one at 0. Raises ProfileError for a study that the profile does not have.
    """
    removal_order(bench, study)
    return {n: pruned_scores(bench, study, n) for n in _study(bench.profile, study).rows[bench.name]}


def _study(profile: Profile, name: str) -> Study | Strategy:
    if name not in profile.searches:
        known = ", ".join(profile.searches)
        raise ProfileError(f"profile {profile.name}: no study {name!r}, expected one of {known}")
    return profile.searches[name]


def speed(bench: Workbench, table: int | str) -> Record:
    """Prefill and decode of the model less some of a study's removals, timed against the dense one: tables 6 to 9.

    Metrics are by number of removals and phase, such as "5/decode/speedup", with its interval ("low", "high"), the
    seconds of one prefill and one token, and the ideal speedup; "again" is the dense model's second run. Without a
    phase: parameters, bytes on disk, bytes of the prompt's cache, and peak memory. Raises ProfileError for a table
    that is not about this model.
    """
    settings = bench.profile.speed
    if settings is None or table not in settings.tables or settings.tables[table].model != bench.name:
        raise ProfileError(f"table {table} is not about {bench.name} in profile {bench.profile.name}")
    about = settings.tables[table]
    plan = removal_order(bench, about.study)
    spec = {
        "prompt_tokens": settings.prompt_tokens, "batches": settings.batches, "new_tokens": about.new_tokens,
        "orders": {str(n): [str(cut) for cut in plan.first(n).gone] for n in about.rows},
    }  # fmt: skip

    def compute(_: Request) -> Outcome:
        models = {str(n): extract(bench.model, plan.first(n)) if n else bench.model for n in sorted(about.rows)}
        timings = benchmark(
            models, prompt_tokens=settings.prompt_tokens, new_tokens=about.new_tokens, batches=settings.batches
        )
        return Outcome(metrics=speeds(timings) | _sizes(models))

    return bench.record(SPEED, f"table_{table}", spec, {}, [], compute)


def speeds(timings: Timings) -> dict[str, Metric]:
    """All that a benchmark measured, and the ideal from what each model costs."""
    found: dict[str, float] = {}
    for name, phases in timings.seconds.items():
        for phase, seconds in phases.items():
            measured = timings.speedup(name, phase)
            found |= {
                f"{name}/{phase}/speedup": measured.value,
                f"{name}/{phase}/low": measured.low,
                f"{name}/{phase}/high": measured.high,
                f"{name}/{phase}/seconds": median(seconds),
            }
    for name, cost in timings.work.items():
        found |= {f"{name}/{phase}/ideal": timings.ideal(name, phase) for phase in PHASES}
        found[f"{name}/cache_bytes"] = cost.cache_bytes
        found[f"{name}/weight_bytes"] = cost.weight_bytes
    found |= {f"{name}/peak_mib": peak for name, peak in timings.peak_mib.items()}
    return {name: Metric(value=float(value)) for name, value in found.items()}


def _sizes(models: dict[str, PreTrainedModel]) -> dict[str, Metric]:
    """Unique parameters, and their bytes."""
    sizes = {f"{name}/parameters": model.num_parameters() for name, model in models.items()}
    sizes |= {f"{name}/bytes": sum(one.nbytes for one in model.parameters()) for name, model in models.items()}
    return {name: Metric(value=float(value)) for name, value in sizes.items()}


def removal_order(bench: Workbench, study: str) -> Plan:
    """The plan of a study's search, with the calibration perplexity after each removal (figure 4).

    Its first removals are taken over from another recorded search where that begins alike (`prefix.py`).
    """
    settings = _study(bench.profile, study)
    if bench.name not in settings.rows:
        raise ProfileError(f"study {study} is not about {bench.name}: expected one of {', '.join(settings.rows)}")
    options = search_options(bench, study)
    spec = {
        "stages": [stage.model_dump(mode="json", exclude_none=True) for stage in settings.stages],
        "calibration": bench.profile.calibration_in(study, bench.name).model_dump(),
        **{name: value.model_dump() if name == "per" else value for name, value in options.items()},
    }
    calibration = bench.calibration_in(study)
    data = {"calibration": facts(calibration)}

    def compute(request: Request) -> Outcome:
        checkpoint, stages = bench.checkpoint(request), settings.plan_stages
        if not checkpoint.exists() and (begun := taken_over(request, stages, bench.output)) is not None:
            begun.save(checkpoint)
        plan = search(
            bench.model, calibration, stages, checkpoint=checkpoint, memory_gib=bench.profile.search_gib, **options
        )
        return Outcome(metrics={}, plan=plan.model_dump(mode="json"))

    record = bench.record(study, SEARCH, spec, data, [], compute)
    bench.checkpoint(record).unlink(missing_ok=True)
    return Plan.model_validate(record.plan)


def pruned_scores(bench: Workbench, study: str, n_removed: int) -> Record:
    """The scores after the first n removals of a study."""
    gone = removal_order(bench, study).first(n_removed).gone
    return _scores(bench, study, f"{n_removed:02d}_removed", gone) if n_removed else dense(bench)


def released_orders(bench: Workbench) -> dict[str, Record]:
    """The scores after removals in the orders that the paper's authors released, without a search.

    Returns the records by setting, such as "mamba-2.8b_07_removed". Raises ProfileError for a model that the profile
    scores no such order of, and PlanError if one does not fit the model.
    """
    wanted = [(order, n) for order in bench.profile.released if order.model == bench.name for n in order.rows]
    if not wanted:
        raise ProfileError(f"study {RELEASED} is not about {bench.name} in profile {bench.profile.name}")
    return {
        order.setting(n): _scores(bench, RELEASED, order.setting(n), order.plan.first(n).gone) for order, n in wanted
    }


def _scores(bench: Workbench, study: str, setting: str, gone: Sequence[Cut]) -> Record:
    """The record of lm-eval's scores and the prose perplexity of the model less some components."""

    def compute(_: Request) -> Outcome:
        with removed(bench.model, gone):
            return Outcome(metrics=scores_of(bench, bench.model))

    return bench.record(study, setting, *evaluation_inputs(bench), gone, compute)


def evaluation_inputs(bench: Workbench) -> tuple[dict[str, Any], dict[str, DataFacts]]:
    """The settings and the data behind scores, as a record keeps them."""
    settings = bench.profile.evaluation
    data = {"prose": facts(bench.prose), "tasks": task_facts(settings.task_names)}
    return {"tasks": settings.task_names, "limit": settings.limit, "prose": settings.prose.model_dump()}, data


def scores_of(bench: Workbench, model: PreTrainedModel) -> dict[str, Metric]:
    """lm-eval's scores and the prose perplexity of a model, on the tasks of the profile."""
    settings = bench.profile.evaluation
    scores = evaluate(model, bench.tokenizer, settings.task_names, limit=settings.limit, batch_size=settings.batch_size)
    metrics = {
        f"{task}/{metric}": Metric(value=score.value, stderr=score.stderr, n=score.n, items=score.items)
        for (task, metric), score in scores.items()
    }
    return {**metrics, "prose/perplexity": Metric(value=perplexity(model, bench.prose), n=bench.prose.sequences)}


def facts(data: Calibration) -> DataFacts:
    """What a record keeps of text."""
    source = SOURCES.get(data.source["name"])
    return DataFacts(
        name=data.source["name"], revision=source.revision if source else None, fingerprint=data.fingerprint
    )
