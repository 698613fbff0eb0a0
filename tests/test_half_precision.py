"""Half precision: where a search departs from float32's order, it does so between candidates that float32 ties."""

from __future__ import annotations

import math

import pytest

from shedder_utils import Stage, calibrate, load_model, perplexity, removed, search
from shedder_utils.statistics import ROUNDING

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
    for place, (one, other) in enumerate(zip(exact.gone, half.gone, strict=True)):
        assert math.log(half.scores[place]) == pytest.approx(math.log(exact.scores[place]), abs=ROUNDING["bfloat16"])
        if one != other:
            with removed(model, [*exact.gone[:place], other]):
                costs = math.log(perplexity(model, calibration)) - math.log(exact.scores[place + 1])
            assert 0 <= costs <= ROUNDING["bfloat16"]
            break
