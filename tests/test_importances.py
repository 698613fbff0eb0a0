"""Other importances: each against its definition, by another way of computing it, and searches that use them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import random_model
from test_hymba import CONFIG
from test_zamba2 import zamba2
from transformers import PreTrainedModel

from shedder_utils import Calibration, Component, PlanError, Stage, components, families, kernels, removed, search
from shedder_utils.components import Cut
from shedder_utils.families import family_of
from shedder_utils.hymba import HymbaForCausalLM
from shedder_utils.importance import MEASURES, evaluating, full_pass, perplexity
from shedder_utils.rankings import RANKINGS
from shedder_utils.search import METRICS


def hymba() -> PreTrainedModel:
    kernels.install()
    torch.manual_seed(0)
    return HymbaForCausalLM(copy.deepcopy(CONFIG)).eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "mamba": lambda: random_model("mamba"),
    "falcon_mamba": lambda: random_model("falcon_mamba"),
    "mamba2": lambda: random_model("mamba2"),
    "zamba2": zamba2,
    "hymba": hymba,
}
IDS = torch.randint(0, 97, (3, 16), generator=torch.Generator().manual_seed(1))
FEW = Calibration(list(IDS.split(2)))


def cuts(model: PreTrainedModel) -> list[Cut]:
    """Everything that can go from a model; half of an MLP's channels."""
    half = family_of(model).channels(model) // 2 if "mlp_channels" in family_of(model).kinds else 0
    return [Cut(c, half if c.kind == "mlp_channels" else 0) for c in components(model)]


def scores(model: PreTrainedModel, metric: str, gone: list[Cut] | None = None) -> dict[str, float]:
    """A metric's score of every candidate that is left, by name."""
    left = [cut for cut in cuts(model) if all(cut.component.index != other.component.index for other in gone or [])]
    with evaluating(model), removed(model, gone or []):
        values = RANKINGS[metric](model, FEW, left, 0)
    return {str(cut): score for cut, score in zip(left, values.mean(dim=1).tolist(), strict=True)}


def losses_moved(model: PreTrainedModel, cut: Cut, share: float) -> torch.Tensor:
    """Each sequence's loss, if the stream after a component's layer moves by a share towards that without it."""
    family, place, found = family_of(model), family_of(model).layer_of(model, cut.component), []
    for batch in FEW.batches:
        stream = family.start(model, batch)
        for index in range(len(family.layers(model))):
            after = family.step(model, family.layers(model)[index], stream)
            if index == place:
                with removed(model, [cut]):
                    without = family.step(model, family.layers(model)[index], stream)
                after = {name: after[name] + share * (without[name] - after[name]) for name in after}
            stream = after
        found.append(MEASURES["perplexity"]().values(model, family.finish(model, stream), batch, 0))
    return torch.cat(found)


@pytest.mark.parametrize("family", MODELS)
def test_taylor_is_the_slope_of_the_loss_towards_the_removal(family: str) -> None:
    model, step = MODELS[family](), 0.001
    found, everything = scores(model, "taylor"), cuts(model)
    for cut in everything[:: max(1, len(everything) // 6)]:
        with torch.no_grad():
            slope = (losses_moved(model, cut, step) - losses_moved(model, cut, -step)) / (2 * step)
        assert found[str(cut)] == pytest.approx(slope.abs().mean().item(), rel=0.01, abs=1e-3), cut


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.005), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("family", ["mamba2", "zamba2", "hymba"])
def test_taylor_keeps_small_gradients_in_half_precision(family: str, dtype: torch.dtype, tolerance: float) -> None:
    """The last norm makes them 10,000 times smaller, and with them every score."""
    model = families.random_model(family=family, layers=4, hidden_size=32, seed=0, vocab_size=97)
    last = [module for name, module in model.base_model.named_children() if "norm" in name][-1]
    with torch.no_grad():
        last.weight.mul_(1e-4)
    found = scores(model.to(dtype), "taylor")
    exact = scores(model.float(), "taylor")
    largest = max(exact.values())
    assert 0 < largest < 1e-4
    assert found == pytest.approx(exact, rel=0, abs=tolerance * largest)


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
def test_block_influence_is_the_turn_from_a_layers_input_to_its_output(family: str) -> None:
    model = MODELS[family]()
    turned: dict[int, list[torch.Tensor]] = {index: [] for index in range(6)}
    found = scores(model, "block_influence")
    for index, layer in enumerate(model.backbone.layers):
        layer.register_forward_hook(
            lambda _, before, after, seen=turned[index]: seen.append(
                1 - torch.cosine_similarity(before[0], after, dim=-1)
            )
        )
    with torch.no_grad():
        model(IDS, use_cache=False)
    for index, seen in turned.items():
        assert found[f"mamba_block:{index}"] == pytest.approx(seen[0].mean().item(), abs=1e-5)
        assert found[f"ssm:{index}"] > 0


@pytest.mark.parametrize("family", MODELS)
def test_magnitude_is_the_norm_of_what_goes(family: str) -> None:
    model = MODELS[family]()
    found = scores(model, "magnitude")
    assert all(score > 0 for score in found.values())
    layer = family_of(model).layers(model)[2]
    if family in ("mamba", "falcon_mamba", "mamba2"):
        whole = sum(parameter.abs().sum().item() for parameter in layer.parameters())
        assert found["mamba_block:2"] == pytest.approx(whole, rel=1e-6)
    if family == "mamba":
        mixer = layer.mixer
        dead = [*mixer.x_proj.parameters(), *mixer.dt_proj.parameters(), mixer.A_log, mixer.D]
        assert found["ssm:2"] == pytest.approx(sum(weight.abs().sum().item() for weight in dead), rel=1e-6)
    if family == "hymba":
        mlp, half = layer.moe.experts[0], layer.moe.experts[0].gate_proj.out_features // 2
        rows = (mlp.gate_proj.weight[half:], mlp.up_proj.weight[half:], mlp.down_proj.weight[:, half:])
        expected = sum(weight.abs().sum().item() for weight in rows)
        assert found[f"mlp_channels:2/{half}"] == pytest.approx(expected, rel=1e-5)


def test_magnitude_leaves_out_what_a_shared_block_has_for_other_positions() -> None:
    model = zamba2()  # positions 0 and 2 share a block
    before = scores(model, "magnitude")
    for name, parameter in model.named_parameters():
        if "_adapter_list.2." in name:
            parameter.data.mul_(1000)
    after = scores(model, "magnitude")
    changed = {name for name, score in after.items() if score != pytest.approx(before[name])}
    assert changed == {"mlp:2", "mlp_channels:2/32", "transformer_block:2"}


def test_divergence_is_that_of_the_next_tokens_distribution() -> None:
    model, gone = random_model("mamba2"), [Component("ssm", 2)]
    measure = MEASURES["kl"]()
    with torch.no_grad():
        measure.prepare(model, FEW)
        assert full_pass(model, FEW, measure).tolist() == [0.0] * 3
        p = model(IDS, use_cache=False).logits.double().softmax(-1)[:, :-1]
        with removed(model, gone):
            q = model(IDS, use_cache=False).logits.double().softmax(-1)[:, :-1]
            found = full_pass(model, FEW, measure)
    torch.testing.assert_close(found, (p * (p / q).log()).sum(-1).mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_fast_finds_the_plan_of_plain_by_divergence(family: str) -> None:
    model = MODELS[family]()
    kind = family_of(model).kinds[0]
    plans = [search(model, FEW, Stage(kind, 2), metric="kl", method=m, progress=False) for m in ("fast", "plain")]
    assert plans[0].removals == plans[1].removals
    assert plans[0].dense_score == 0.0
    assert 0 < plans[0].removals[0].score < float("inf")


@pytest.mark.parametrize("method", ["fast", "plain"])
def test_one_shot_takes_candidates_as_ranked_in_the_dense_model(method: str) -> None:
    model = random_model("mamba")
    plan = search(model, FEW, Stage("ssm", 4), method=method, one_shot=True, progress=False)
    alone = {}
    for component in components(model, "ssm"):
        with removed(model, [component]):
            alone[component] = perplexity(model, FEW)
    assert plan.components == sorted(alone, key=alone.__getitem__)[:4]
    assert [removal.score for removal in plan.removals] == [alone[component] for component in plan.components]


@pytest.mark.parametrize("metric", [metric for metric in METRICS if metric != "perplexity"])
@pytest.mark.parametrize("family", ["zamba2", "hymba"])
def test_every_metric_ranks_every_kind_together(family: str, metric: str) -> None:
    model = MODELS[family]()
    stages = [Stage(family_of(model).kinds, 3, 16), Stage("mlp_channels", 1, 16)]
    plan = search(model, FEW, stages, metric=metric, progress=False)
    assert len(plan) == 4
    assert all(isinstance(removal.score, float) and removal.score == removal.score for removal in plan.removals)
    assert (plan.dense_score is None) == (metric in RANKINGS)
    assert plan.provenance["metric"] == metric


def test_a_ranking_takes_what_is_gone_into_account() -> None:
    model, gone = random_model("mamba2"), [Cut(Component("mamba_block", 0))]
    for metric in ("taylor", "block_influence"):
        dense, later = scores(model, metric), scores(model, metric, gone)
        assert all(later[name] != dense[name] for name in later)


def test_random_orders_follow_their_seed() -> None:
    model, stage = random_model("mamba"), Stage("mamba_block", 6)
    plans = [search(model, FEW, stage, metric="random", seed=seed, progress=False) for seed in (0, 0, 1, 2)]
    orders = [tuple(plan.components) for plan in plans]
    assert orders[0] == orders[1]
    assert len(set(orders)) == 3


def test_channels_can_be_ranked_once() -> None:
    model = zamba2()
    plan = search(model, FEW, Stage("mlp_channels", 6, 16), metric="magnitude", one_shot=True, progress=False)
    assert len(plan) == 6
    with pytest.raises(PlanError, match="does not divide"):
        search(model, FEW, Stage("mlp_channels", 1, 48), metric="magnitude", progress=False)
