"""The recovery study (section 4.5 of the paper, tables 10 to 12): what a short tuning gives back to pruned models.

As a control the dense model is tuned by the same recipe: what it gains comes from the data, not from recovery. Every
result is a record, under the study "recovery"; a tuning that was stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import copy
import shutil
from typing import Any

from .errors import ProfileError
from .instructions import Instructions, instructions
from .plan import Plan
from .profiles import RECOVERY
from .recipe import Recipe
from .records import DataFacts, Metric, Outcome, Record, Request
from .recovery import recover
from .studies import dense, evaluation_inputs, pruned_scores, removal_order, scores_of
from .surgery import extract
from .workbench import Workbench


def recovery(bench: Workbench, table: int) -> dict[str, Record]:
    """One of tables 10 to 12: the scores of the model dense, dense and tuned, pruned, and pruned and tuned.

    Returns the records by state: "dense", "dense_tuned", and for each row such as "ssm_pruning_08" and
    "ssm_pruning_08_tuned". Those of tunings also have the losses, such as "held_out_loss/50" for step 50 and
    "loss/10" for the mean of the steps up to 10, and "best_step". Raises ProfileError for a table that is not about
    this model.
    """
    settings = bench.profile.recovery
    if settings is None or table not in settings.tables or settings.tables[table].model != bench.name:
        raise ProfileError(f"table {table} is not about {bench.name} in profile {bench.profile.name}")
    about = settings.tables[table]
    recipe = about.recipe
    data = instructions(
        settings.source, bench.tokenizer, max_length=recipe.max_length, held_out=recipe.held_out, seed=recipe.seed
    )
    found = {"dense": dense(bench)}
    for row in about.rows:
        found[row.state] = pruned_scores(bench, row.study, row.removed)
    found["dense_tuned"] = _tuned(bench, data, recipe, "dense_tuned", None)
    for row in about.rows:
        plan = removal_order(bench, row.study).first(row.removed)
        found[f"{row.state}_tuned"] = _tuned(bench, data, recipe, f"{row.state}_tuned", plan)
    return found


def _tuned(bench: Workbench, rows: Instructions, recipe: Recipe, setting: str, plan: Plan | None) -> Record:
    """The record of one tuning: the losses on the way, and the scores of the state that is kept."""
    spec, data = evaluation_inputs(bench)
    data = {**data, "instructions": DataFacts(name=rows.name, fingerprint=rows.fingerprint)}

    def compute(request: Request) -> Outcome:
        checkpoint = bench.checkpoint(request)
        start = copy.deepcopy(bench.model) if plan is None else extract(bench.model, plan)
        tuned = recover(start.float(), bench.tokenizer, rows, checkpoint=checkpoint, inplace=True, **recipe.settings)
        metrics = {**_losses(tuned.config.recovery), **scores_of(bench, tuned.to(bench.model.dtype))}
        return Outcome(metrics=metrics)

    gone = plan.gone if plan else []
    record = bench.record(RECOVERY, setting, {**spec, "recipe": recipe.settings}, data, gone, compute)
    shutil.rmtree(bench.checkpoint(record), ignore_errors=True)
    return record


def _losses(outcome: dict[str, Any]) -> dict[str, Metric]:
    """The points of a tuning's curves as metrics."""
    found = {
        f"{name}/{point['step']:.0f}": point[name]
        for point in outcome["points"]
        for name in ("loss", "held_out_loss")
        if name in point
    }
    found["best_step"] = outcome["best_step"]
    return {name: Metric(value=float(value)) for name, value in found.items()}
