"""The models that ship with the project: whole, trained as the recipe says, and searched alike by both methods."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from statistics import fmean

import pytest

from shedder_utils import Stage, calibrate, components, load_model, profiles, records, search
from shedder_utils.files import ROOT
from shedder_utils.pocket.training import CONFIGS, RECIPES, curves

POCKET = profiles.load("pocket")
NAMES = [model.ref for model in POCKET.models.values()]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_what_its_recipe_makes(name: str) -> None:
    model, tokenizer = load_model(name)
    history = json.loads((ROOT / "pocket" / "models" / name / "training.json").read_text())
    assert len(components(model, "ssm")) == CONFIGS[name].num_hidden_layers
    assert 1.5e6 < model.num_parameters() < 4.5e6
    assert tokenizer is not None
    assert len(tokenizer) == model.config.vocab_size == CONFIGS[name].vocab_size
    assert history["recipe"] == json.loads(json.dumps(asdict(RECIPES[name])))
    assert history["curve"][-1]["step"] == RECIPES[name].steps
    assert history["curve"][-1]["loss"] < history["curve"][0]["loss"]


def test_all_models_saw_the_same_tokens() -> None:
    last = curves(["state-spaces/mamba-2.8b", *NAMES]).groupby("model").last()
    assert list(last.index) == sorted(NAMES)
    assert last["tokens"].nunique() == 1


@pytest.mark.parametrize("name", POCKET.models)
def test_without_its_ssms_a_model_scores_as_chance_does(name: str) -> None:
    """The recorded accuracies of the tasks with choices, less chance, in standard errors of their mean."""
    columns = [column for column in POCKET.evaluation.tasks if column.chance and column.column != "lambada_openai"]
    above = {}
    for setting in ("scores", "without_ssms"):
        metrics = records.read(records.path(ROOT / "results", "pocket", "dense", name, setting)).metrics
        scores = [metrics[f"{column.task}/{column.metric}"] for column in columns]
        gain = fmean(score.value - column.chance for score, column in zip(scores, columns, strict=True))
        above[setting] = gain * len(scores) / math.hypot(*(score.stderr for score in scores))
    assert len(columns) == 6
    assert above["scores"] > 10
    assert above["without_ssms"] < 3


def test_models_that_were_not_trained_here_have_no_curve() -> None:
    assert curves(["state-spaces/mamba-2.8b"]).empty


@pytest.mark.parametrize(
    ("name", "study"),
    [(name, study) for study, settings in POCKET.studies.items() for name in settings.rows],
)
def test_fast_finds_the_plan_of_plain_with_fewer_layer_runs(name: str, study: str) -> None:
    model, tokenizer = load_model(name)
    calibration = calibrate("pocket-instructions", tokenizer, samples=2, sequence_length=64, batch_size=8)
    settings = POCKET.studies[study]
    stages = [Stage(**stage.model_dump(exclude_none=True)) for stage in settings.stages]
    fast = search(model, calibration, stages, progress=False)
    plain = search(model, calibration, stages, method="plain", progress=False)
    assert fast.removals == plain.removals
    if "mlp_channels" not in settings.kinds:
        assert fast.provenance["layer_runs"] <= 0.6 * plain.provenance["layer_runs"]
