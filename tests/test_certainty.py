"""Paired errors against the formula, rank correlations against scipy, and what one draw finds of a small model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import random_model
from scipy import stats

from shedder_utils import Calibration, Component, DataError, Stage, perplexity, removed, search
from shedder_utils.certainty import beginning, finding, losses_alone
from shedder_utils.statistics import correlations, kendall, paired, spearman, within_error

GENERATOR = torch.Generator().manual_seed(5)
DRAWS = {
    name: Calibration(list(torch.randint(0, 97, (n, 24), generator=GENERATOR).split(3)))
    for name, n in (("a", 6), ("b", 6), ("c", 3))
}


def test_a_paired_difference_has_the_error_of_the_mean_difference() -> None:
    own, other = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 1.0, 2.0])
    difference = paired(own, other)
    assert difference.mean == pytest.approx(1.0)
    assert difference.stderr == pytest.approx(1 / math.sqrt(3))
    assert difference.within_error
    assert not paired(own + 10, other).within_error


def test_candidates_within_error_are_found_by_their_differences_not_their_spread() -> None:
    noise = 10 * torch.randn(50, generator=GENERATOR)
    small = 0.01 * torch.randn(50, generator=GENERATOR)
    values = torch.stack([noise, noise + 0.1, noise + small - small.mean(), noise])
    assert within_error(values, 0) == [2, 3]  # 0.1 more everywhere is more, whatever the sequences differ
    assert within_error(values[:, :1], 0) == []


@pytest.mark.parametrize("levels", [1000, 4])
def test_rank_correlations_are_scipys(levels: int) -> None:
    a, b = torch.randint(0, levels, (2, 30), generator=GENERATOR).tolist()
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert kendall(a, b) == pytest.approx(stats.kendalltau(a, b).statistic)
    assert math.isnan(spearman(a, [1] * 30))
    assert math.isnan(kendall(a, [1] * 30))


def test_orders_that_share_a_part_are_compared() -> None:
    found = correlations({"x": ["p", "q", "r"], "y": ["p", "q", "r"], "z": ["r", "s", "t"]})
    assert found.loc[("x", "y")].tolist() == pytest.approx([1, 1, 1])
    rho, tau, shared = found.loc[("x", "z")]
    assert shared == pytest.approx(1 / 3)
    assert rho == pytest.approx(stats.spearmanr([0, 1, 2, 3, 3], [3, 3, 0, 1, 2]).statistic)
    assert tau == pytest.approx(stats.kendalltau([0, 1, 2, 3, 3], [3, 3, 0, 1, 2]).statistic)


def test_ties_within_error_are_reported_with_the_plan() -> None:
    model = random_model("mamba")
    with torch.no_grad():
        for layer in model.backbone.layers:  # blocks that add nothing are not told apart
            layer.mixer.out_proj.weight.zero_()
    for settings in ({"method": "plain"}, {"metric": "block_influence"}, {"metric": "random"}):
        plan = search(model, DRAWS["a"], Stage("mamba_block", 2), progress=False, **settings)
        first, second = plan.components
        others = [f"mamba_block:{index}" for index in range(6) if index != first.index]
        expected = [
            {"removal": 1, "chosen": str(first), "number": 5, "rivals": others},
            {"removal": 2, "chosen": str(second), "number": 4, "rivals": [o for o in others if o != str(second)]},
        ]
        assert plan.provenance["ties_within_error"] == ([] if "random" in settings.values() else expected)


def test_a_draw_finds_a_plan_and_what_it_leaves(tmp_path: Path) -> None:
    model, stage, checkpoint = random_model("mamba2"), Stage("ssm", 3), tmp_path / "a.json"
    held_out = Calibration([torch.randint(0, 97, (2, 24), generator=GENERATOR)])
    found = finding(model, DRAWS["a"], stage, held_out=held_out, after=(0, 3), checkpoint=checkpoint, progress=False)
    assert found.plan.components == search(model, DRAWS["a"], stage, progress=False).components
    assert min(found.alone, key=found.alone.__getitem__) == str(found.plan.components[0])
    assert found.left.at[0, "perplexity"] == perplexity(model, held_out)
    with removed(model, found.plan.gone):
        assert found.left.at[3, "perplexity"] == perplexity(model, held_out)
    assert checkpoint.exists()


def test_the_first_step_ranks_components_as_full_passes_do() -> None:
    model = random_model("mamba2")
    found = losses_alone(model, DRAWS["a"], Stage(("mamba_block", "ssm"), 1))
    assert len(found) == 12
    for component in map(Component.parse, ("mamba_block:0", "ssm:3", "mamba_block:5")):
        with removed(model, [component]):
            assert found[str(component)] == pytest.approx(math.log(perplexity(model, DRAWS["a"])), rel=1e-5)


def test_a_draw_is_the_beginning_of_its_text() -> None:
    whole = DRAWS["a"]
    part = beginning(whole, 4)
    assert torch.equal(torch.cat(part.batches), torch.cat(whole.batches)[:4])
    assert [len(batch) for batch in part.batches] == [3, 1]
    with pytest.raises(DataError, match="has 6 sequences, 7 were asked for"):
        beginning(whole, 7)
