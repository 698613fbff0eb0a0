"""Half precision: a profile runs in it, and a search departs from float32's order where float32 ties candidates."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from shedder_utils import Stage, calibrate, load_model, perplexity, profiles, records, removed, search, studies
from shedder_utils.recovery_study import recovery
from shedder_utils.statistics import ROUNDING
from shedder_utils.workbench import Workbench

ORDERS = [
    ("pocket-mamba", "ssm", 3), ("pocket-mamba2", "ssm", 1), ("pocket-zamba2", "mamba_block", 1),
    ("pocket-hymba", "hymba_block", 3), ("pocket-falcon-mamba", "ssm", 1),
]  # fmt: skip
"""A model of each family, what is removed of it, and in how many steps."""


@pytest.mark.parametrize(("ref", "kind", "steps"), ORDERS)
def test_the_order_of_bfloat16_departs_from_float32s_at_a_tie(ref: str, kind: str, steps: int) -> None:
    model, tokenizer = load_model(ref)
    calibration = calibrate("pocket-instructions", tokenizer, samples=16, sequence_length=128)
    model.bfloat16().float()  # the same weights in both
    exact = search(model, calibration, Stage(kind, steps), progress=False)
    half = search(model.bfloat16(), calibration, Stage(kind, steps), progress=False)
    model.float()
    close = [
        math.log(ours) == pytest.approx(math.log(theirs), abs=ROUNDING["bfloat16"])
        for ours, theirs in zip(half.scores, exact.scores, strict=True)
    ]
    for place, (one, other) in enumerate(zip(exact.gone, half.gone, strict=True)):
        assert close[place]
        assert close[place + 1]
        if one != other:
            with removed(model, [*exact.gone[:place], other]):
                costs = math.log(perplexity(model, calibration)) - math.log(exact.scores[place + 1])
            assert -ROUNDING["float32"] <= costs <= ROUNDING["bfloat16"]
            break


def test_a_profile_in_bfloat16_searches_scores_times_and_tunes(tmp_path: Path) -> None:
    content, name = yaml.safe_load((profiles.FOLDER / "smoke.yaml").read_text()), "smoke-mamba2"
    content["models"][name] = {"ref": "pocket-mamba2", "family": "Mamba-2", "paper": "mamba2-2.7b"}
    file = tmp_path / "half.yaml"
    file.write_text(yaml.safe_dump(content | {"dtype": "bfloat16"}))
    bench = Workbench(file, name, tmp_path / "runs")
    scores = studies.pruning(bench, "ssm_pruning")
    speed, tuned = studies.speed(bench, 7), recovery(bench, 10)
    found = records.find(tmp_path / "runs")
    assert {record.study for record in found} == {"dense", "ssm_pruning", "speed", "recovery"}
    assert {record.model.dtype for record in found} == {"bfloat16"}
    for record in (*scores.values(), speed, *tuned.values()):
        assert all(math.isfinite(metric.value) for metric in record.metrics.values())
    assert speed.metrics["0/bytes"].value == 2 * scores[0].model.parameters_dense
    losses = [record.metrics["held_out_loss/4"].value for state, record in tuned.items() if "tuned" in state]
    assert len(losses) == 2
    assert all(0 < loss < 2 for loss in losses)  # of 8.3 nats for a model that knows nothing
