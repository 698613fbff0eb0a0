"""Studies of what the paper did not ask: how sure an order is, and what each strategy buys in speed.

The other importances, the joint search and the finer kinds are pruning studies like any other (`studies.py`).
"""

from __future__ import annotations

from typing import Any

from .benchmark import benchmark
from .calibration import calibrate
from .certainty import beginning, finding
from .errors import ProfileError
from .plan import Plan, Stage
from .profiles import CERTAINTY, PARETO
from .records import Metric, Outcome, Record, Request
from .studies import facts, removal_order, speeds
from .surgery import extract
from .workbench import Workbench


def certainty(bench: Workbench) -> dict[str, Record]:
    """One search of the model with each calibration data: how it ranks all components, its plan, and what that leaves.

    Returns the records by draw. Metrics are the mean calibration loss without each component alone, such as
    "alone/mamba_block:3", and the perplexity of the held-out prose after all removals. Raises ProfileError for a model
    that the study is not about.
    """
    settings = bench.profile.certainty
    if settings is None or bench.name not in settings.models:
        raise ProfileError(f"certainty is not about {bench.name} in profile {bench.profile.name}")
    return {name: _draw(bench, name) for name in settings.draws}


def _draw(bench: Workbench, name: str) -> Record:
    """The record of one draw of calibration data."""
    settings = bench.profile.certainty
    assert settings is not None
    draw = settings.draws[name]
    asked: dict[str, Any] = {
        "source": draw.source, "samples": settings.sources[draw.source], "seed": draw.seed,
        "sequence_length": settings.sequence_length, "batch_size": settings.batch_size,
    }  # fmt: skip
    calibration = beginning(calibrate(tokenizer=bench.tokenizer, **asked), draw.sequences)
    spec = {"kind": settings.kind, "steps": settings.steps, "calibration": asked, "sequences": draw.sequences,
            "prose": bench.profile.evaluation.prose.model_dump()}  # fmt: skip

    def compute(request: Request) -> Outcome:
        found = finding(
            bench.model, calibration, Stage(settings.kind, settings.steps), held_out=bench.prose,
            after=[settings.steps], checkpoint=bench.checkpoint(request), memory_gib=bench.profile.search_gib,
        )  # fmt: skip
        metrics = {f"alone/{component}": Metric(value=loss) for component, loss in found.alone.items()}
        left = float(found.left.at[settings.steps, "perplexity"])
        metrics["prose/perplexity"] = Metric(value=left, n=bench.prose.sequences)
        return Outcome(metrics=metrics, plan=found.plan.model_dump(mode="json"))

    data = {"calibration": facts(calibration), "prose": facts(bench.prose)}
    record = bench.record(CERTAINTY, name, spec, data, [], compute)
    bench.checkpoint(record).unlink(missing_ok=True)
    return record


def pareto(bench: Workbench) -> Record:
    """Prefill and decode of the model less what each study removes in each of its rows, all timed in one run.

    Metrics are by study, removals and phase, such as "joint_decode/8/decode/speedup"; see `studies.speed`. Raises
    ProfileError for a model that the study is not about.
    """
    settings = bench.profile.pareto
    if settings is None or bench.name != settings.model:
        raise ProfileError(f"pareto is not about {bench.name} in profile {bench.profile.name}")
    plans = {f"{study}/{n}": plan for study in settings.studies for n, plan in _rows(bench, study).items()}
    timing = settings.model_dump(include={"prompt_tokens", "new_tokens", "batches"})
    orders = {name: [str(cut) for cut in plan.gone] for name, plan in plans.items()}

    def compute(_: Request) -> Outcome:
        models = {"dense": bench.model, **{name: extract(bench.model, plan) for name, plan in plans.items()}}
        return Outcome(metrics=speeds(benchmark(models, **timing)))

    return bench.record(PARETO, "speed", {**timing, "orders": orders}, {}, [], compute)


def _rows(bench: Workbench, study: str) -> dict[int, Plan]:
    """The removals of a study in each of its rows, by their number."""
    plan = removal_order(bench, study)
    return {n: plan.first(n) for n in bench.profile.searches[study].rows[bench.name] if n}
