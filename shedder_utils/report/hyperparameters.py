"""Table 13 of the paper (appendix): the settings of calibration, search and recovery, beside those of a profile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from .. import paper
from ..profiles import Profile
from .rendering import DASH, Table

NOTE = f"The paper's values are those of its table 13 and of the released scripts. {DASH}: no study of this profile."


def table(profile: Profile) -> Table:
    """Table 13, one row for each setting: the paper's value, and this profile's."""
    rows = tuple(_rows(profile))
    frame = pd.DataFrame(rows, columns=["setting", "paper", "profile"])
    title = f"Table 13. Hyperparameters: paper, and profile {profile.name} ({profile.title})"
    return Table("table_13", title, NOTE, ("Setting", "Paper", "This profile"), rows, frame)


def _rows(profile: Profile) -> Iterator[tuple[str, str, str]]:
    theirs, ours = paper.hyperparameters(), profile.calibration
    batch, recovery = theirs["calibration_batch"], theirs["recovery"]
    yield "Calibration data", theirs["calibration_dataset"], ours.source
    yield "Calibration samples", str(theirs["calibration_samples"]), str(ours.samples)
    yield "Sequence length", _text(batch["sequence_length"]), str(ours.sequence_length)
    yield "Calibration batch size", _text(batch["batch_size"]), str(ours.batch_size)
    yield "Calibration seed", "42", str(ours.seed)
    yield "Importance metric", theirs["importance_metric"], "perplexity"
    yield "MLP channels removed at a time", _text(theirs["mlp_channel_group_size"]), _groups(profile)
    yield from _recovery(profile, recovery)


def _recovery(profile: Profile, theirs: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The recipes of the profile's models, under those of the paper's that they stand for."""
    tables = profile.recovery.tables.values() if profile.recovery else ()
    recipes = {profile.models[table.model].paper: table.recipe.settings for table in tables}
    yield "Recovery: dataset", theirs["dataset"], profile.recovery.source if profile.recovery else DASH
    for setting in ("max_length", "held_out", "warmup_steps"):
        found = dict.fromkeys(str(recipe[setting]) for recipe in recipes.values())
        yield f"Recovery: {setting.replace('_', ' ')}", _text(theirs[setting]), ", ".join(found) or DASH
    yield "Recovery: optimizer", theirs["optimizer"], "adamw" if recipes else DASH
    on = _text({model: recipe["loss_on"] for model, recipe in recipes.items()})
    yield "Recovery: tokens in the loss", theirs["prompt_tokens_in_loss"], on or DASH
    for model in paper.models():
        if model in theirs:
            ours = _text(_own(recipes[model])) if model in recipes else DASH
            yield f"Recovery of {model}", _text(theirs[model]), ours


def _own(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe that no row has for all models; steps, where set, stand for epochs."""
    elsewhere = {"max_length", "held_out", "warmup_steps", "loss_on", "seed", "evaluate_every", "weight_decay"}
    elsewhere |= {"epochs"} if "steps" in recipe else set()
    return {name: value for name, value in recipe.items() if name not in elsewhere}


def _groups(profile: Profile) -> str:
    """The group sizes of the profile's channel stages, with their models."""
    found = {
        model: str(stage.group)
        for study in profile.studies.values()
        for stage in study.stages
        if stage.group is not None
        for model in study.rows
    }
    return _text(found) if found else DASH


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {_text(part)}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
