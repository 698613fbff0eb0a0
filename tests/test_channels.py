"""MLP channels: their order, their removal a group at a time (Algorithm 2), and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from shedder_utils import (
    Calibration,
    Component,
    Plan,
    PlanError,
    Stage,
    components,
    extract,
    load_model,
    perplexity,
    removed,
    save_pruned,
    search,
)
from shedder_utils.channels import order_channels
from shedder_utils.components import Cut
from shedder_utils.families import family_of, random_model

IDS = torch.randint(1, 97, (5, 12), generator=torch.Generator().manual_seed(2))
WIDTH = {"zamba2": 128, "hymba": 64}


def model_with_mlps(family: str) -> PreTrainedModel:
    """A random model whose MLP channels differ in strength."""
    model = random_model(family=family, layers=5, hidden_size=32, seed=0, vocab_size=97)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=list(WIDTH))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    model = model_with_mlps(request.param)
    assert family_of(model).channels(model) == WIDTH[request.param]
    return model


@pytest.fixture
def few() -> Calibration:
    return Calibration(list(IDS.split(3)))


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS, use_cache=False).logits


def norms(model: PreTrainedModel) -> list[Tensor]:
    """The L1 norm of gate and up rows of every MLP, (I,) each."""
    return [sum(w.abs().sum(1) for w in mlp.gate_up) for mlp in family_of(model).channel_weights(model)]


def test_ordering_sorts_the_channels_and_changes_no_logit(model: PreTrainedModel) -> None:
    before, unsorted = logits(model), norms(model)
    order_channels(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    for old, new in zip(unsorted, norms(model), strict=True):
        torch.testing.assert_close(new, old.sort(descending=True).values)
        assert not torch.equal(old, new)


def test_ordering_decides_which_channels_go(model: PreTrainedModel) -> None:
    gone = [(Component("mlp_channels", 1), 32)]
    with removed(model, gone):
        last = logits(model)
    order_channels(model)
    with removed(model, gone):
        assert (logits(model) - last).abs().max() > 1e-3


def test_a_plan_fits_only_models_ordered_alike(model: PreTrainedModel, few: Calibration, tmp_path: Path) -> None:
    as_it_was, group = copy.deepcopy(model), WIDTH[model.config.model_type] // 4
    unordered = search(as_it_was, few, Stage("mlp_channels", 1, group), progress=False)
    order_channels(model)
    plan = search(model, few, Stage("mlp_channels", 2, group), progress=False)
    with pytest.raises(PlanError, match=r"with mlp_channels ordered, this one has nothing: order_channels\(model"):
        extract(as_it_was, plan)
    with pytest.raises(PlanError, match="with nothing ordered, this one has mlp_channels"):
        extract(model, unordered)
    save_pruned(extract(model, plan), tmp_path)
    assert perplexity(load_model(tmp_path, tokenizer=False)[0], few) == pytest.approx(plan.scores[-1], rel=1e-5)


def test_models_without_mlps_are_refused() -> None:
    with pytest.raises(PlanError, match="a mamba2 model has no MLP"):
        order_channels(random_model(family="mamba2", layers=2, hidden_size=32, seed=0, vocab_size=97))


def test_removing_step_by_step_equals_zeroed_channels(model: PreTrainedModel) -> None:
    weights = family_of(model).channel_weights(model)[0]  # the MLP of position or layer 0
    for kept in (model.config.intermediate_size - 8, 24, 1):
        component = Component("mlp_channels", 0)
        others = components(model, "mlp")[1:]
        with removed(model, [*others, (component, kept)]):
            pruned = logits(model)
        full = weights.down.clone()
        weights.down[:, kept:] = 0
        with removed(model, others):
            torch.testing.assert_close(pruned, logits(model), rtol=1e-4, atol=1e-4)
        weights.down.copy_(full)


def test_the_search_takes_groups_from_one_mlp_at_a_time(model: PreTrainedModel, few: Calibration) -> None:
    group, width = 16, family_of(model).channels(model)
    plan = search(model, few, Stage("mlp_channels", 6, group), method="plain", progress=False)
    left = dict.fromkeys(components(model, "mlp_channels"), width)
    for removal in plan.removals:
        scores = {}
        for component, kept in left.items():
            others = [(c, n) for c, n in left.items() if n < width and c != component]
            if kept > group:
                with removed(model, [*others, (component, kept - group)]):
                    scores[component] = perplexity(model, few)
        assert removal.component == min(scores, key=scores.__getitem__)
        assert removal.score == pytest.approx(min(scores.values()), rel=1e-6)
        assert removal.kept == left[removal.component] - group
        assert removal.parameters == group * 3 * 32
        left[removal.component] = removal.kept
    assert dict(plan.gone) == {component: kept for component, kept in left.items() if kept < width}


def test_an_mlp_keeps_its_last_group(few: Calibration) -> None:
    model = model_with_mlps("zamba2")
    plan = search(model, few, Stage("mlp_channels", 9, 32), progress=False)
    assert dict(plan.gone) == {Component("mlp_channels", position): 32 for position in range(3)}
    with pytest.raises(PlanError, match="10 removals of mlp_channels were asked for, the model has 9"):
        search(model, few, Stage("mlp_channels", 10, 32), progress=False)


def test_what_is_cut_leaves_room_for_other_kinds(few: Calibration) -> None:
    """An MLP that has lost channels is no candidate as a whole; one that is gone has no channels to lose."""
    model = model_with_mlps("zamba2")
    stages = [Stage("mlp", 1), Stage("mlp_channels", 2, 64), Stage(("mha", "mlp"), 3)]
    plan = search(model, few, stages, progress=False)
    mlps = [component.index for component in plan.components if component.kind in ("mlp", "mlp_channels")]
    assert sorted(mlps) == [0, 1, 2]
    with pytest.raises(PlanError, match="nothing is left to remove of mlp"):
        search(model, few, [Stage("mlp_channels", 3, 64), Stage("mlp", 1)], progress=False)


def test_plans_keep_the_channels(few: Calibration, tmp_path: object) -> None:
    model = model_with_mlps("zamba2")
    plan = search(model, few, [Stage("mha", 1), Stage("mlp_channels", 3, 32)], progress=False)
    file = f"{tmp_path}/plan.json"
    plan.save(file)
    assert Plan.load(file) == plan
    assert plan.gone[0] == Cut(plan.components[0])
    assert [str(cut) for cut in Plan(removals=plan.removals[1:2]).gone] == [f"{plan.components[1]}/96"]
    with removed(model, Plan.load(file).gone):
        assert perplexity(model, few) == plan.scores[-1]
    with removed(model, plan.first(2).gone):
        assert perplexity(model, few) == plan.scores[2]


@pytest.mark.parametrize(
    ("gone", "complaint"),
    [
        ([Component("mlp_channels", 0)], "mlp_channels:0 keeps 0 of 128 channels: expected 1 to 127"),
        ([(Component("mlp_channels", 0), 128)], "mlp_channels:0 keeps 128 of 128 channels"),
        ([(Component("mlp_channels", 0), -1)], "mlp_channels:0 keeps -1 of 128 channels"),
        ([(Component("mlp_channels", 3), 64)], "mlp_channels:3 is not in this zamba2 model, which has 3"),
        ([(Component("mha", 0), 64)], "mha:0 goes whole, 64 channels to keep were given"),
        ([(Component("mlp_channels", 0), 64), (Component("mlp_channels", 0), 32)], "is removed 2 times"),
    ],
)
def test_wrong_numbers_of_channels_are_refused(gone: list, complaint: str) -> None:
    with pytest.raises(PlanError, match=complaint) as caught, removed(model_with_mlps("zamba2"), gone):
        pytest.fail("the body ran")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("group", "method"), [(48, "fast"), (1024, "plain")])
def test_a_group_that_does_not_divide_the_width_is_refused(few: Calibration, group: int, method: str) -> None:
    with pytest.raises(PlanError, match=f"group {group} does not divide the 128 channels of mlp_channels:0"):
        search(model_with_mlps("zamba2"), few, Stage("mlp_channels", 1, group), method=method, progress=False)
