"""`removed()` against independent oracles, its reversal, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import CONFIGS, random_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from shedder_utils import Component, PlanError, components, removed
from shedder_utils.families import family_of
from shedder_utils.loading import fingerprint

IDS = torch.randint(1, 97, (2, 20), generator=torch.Generator().manual_seed(2))


def logits(model: PreTrainedModel, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False, **inputs).logits


def without_layers(model: PreTrainedModel, gone: set[int]) -> PreTrainedModel:
    """The same model built with fewer layers."""
    config = copy.deepcopy(model.config)
    kept = [i for i in range(config.num_hidden_layers) if i not in gone]
    config.num_hidden_layers = len(kept)
    smaller = type(model)(config).eval()
    smaller.load_state_dict(
        {
            key.replace(f"layers.{old}.", f"layers.{new}."): value
            for new, old in enumerate(kept)
            for key, value in model.state_dict().items()
            if f"layers.{old}." in key
        }
        | {key: value for key, value in model.state_dict().items() if "layers." not in key}
    )
    return smaller


def with_b_zero_and_d_one(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """The dense model whose scans of these layers return their input: B = 0 and D = 1."""
    dense = copy.deepcopy(model)
    for index in layers:
        mixer = dense.backbone.layers[index].mixer
        with torch.no_grad():
            mixer.D.fill_(1.0)
            if hasattr(mixer, "x_proj"):
                rank, state = mixer.time_step_rank, mixer.ssm_state_size
                mixer.x_proj.weight[rank : rank + state] = 0
            else:
                inner, width = mixer.intermediate_size, mixer.n_groups * mixer.ssm_state_size
                mixer.in_proj.weight[2 * inner : 2 * inner + width] = 0
                mixer.conv1d.weight[inner : inner + width] = 0
                mixer.conv1d.bias[inner : inner + width] = 0
    return dense


@pytest.mark.parametrize("gone", [{0}, {5}, {1, 2, 4}, set(range(6))])
def test_without_blocks_equals_the_model_built_without_them(model: PreTrainedModel, gone: set[int]) -> None:
    with removed(model, [Component("mamba_block", index) for index in gone]):
        pruned = logits(model)
    torch.testing.assert_close(pruned, logits(without_layers(model, gone)), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pruned, logits(model), atol=1e-2)


@pytest.mark.parametrize("gone", [[0], [5], [1, 2, 4], list(range(6))])
@pytest.mark.parametrize("padded", [False, True])
def test_without_ssms_equals_b_zero_and_d_one(model: PreTrainedModel, gone: list[int], padded: bool) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    inputs = {"attention_mask": mask} if padded else {}
    with removed(model, [Component("ssm", index) for index in gone]):
        pruned = logits(model, **inputs)
    expected = logits(with_b_zero_and_d_one(model, gone), **inputs)
    torch.testing.assert_close(pruned, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pruned, logits(model, **inputs), atol=1e-2)


def test_generation_with_a_cache_equals_generation_without(model: PreTrainedModel) -> None:
    gone = [Component("mamba_block", 1), Component("ssm", 2), Component("ssm", 5)]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with removed(model, gone):
        cached = model.generate(IDS, use_cache=True, **settings)
        uncached = model.generate(IDS, use_cache=False, **settings)
        cache = model(IDS, use_cache=True).cache_params
    assert torch.equal(cached, uncached)
    assert [cache.get_recurrent_state(i, 0) is None for i in range(6)] == [False, True, True, False, False, True]


def test_the_model_is_restored_bit_for_bit(model: PreTrainedModel) -> None:
    before, modules, marks = logits(model), list(model.modules()), fingerprint(model)
    with removed(model, components(model, "ssm")), removed(model, [Component("mamba_block", 3)]):
        assert list(model.modules()) != modules
    assert torch.equal(logits(model), before)
    assert list(model.modules()) == modules
    assert fingerprint(model) == marks


def test_the_model_is_restored_after_an_exception(model: PreTrainedModel) -> None:
    before = logits(model)
    with pytest.raises(KeyboardInterrupt), removed(model, [Component("mamba_block", 0), Component("ssm", 3)]):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), before)


def test_components_are_in_depth_order(model: PreTrainedModel) -> None:
    assert [str(c) for c in components(model)][:4] == ["mamba_block:0", "ssm:0", "mamba_block:1", "ssm:1"]
    assert components(model, "ssm") == [Component("ssm", index) for index in range(6)]


@pytest.mark.parametrize(
    ("gone", "complaint"),
    [
        (["ssm:6"], "ssm:6 is not in this"),
        (["mlp:0"], "mlp:0 is not in this"),
        (["ssm:1", "ssm:1"], "ssm:1 is removed 2 times"),
        (["mamba_block:2", "ssm:2"], "ssm:2 lies in mamba_block:2"),
    ],
)
def test_what_cannot_go_is_refused_before_anything_changes(gone: list[str], complaint: str) -> None:
    model = random_model("mamba")
    modules = list(model.modules())
    with pytest.raises(PlanError, match=complaint) as caught, removed(model, map(Component.parse, gone)):
        pytest.fail("the body ran")
    assert "\n" not in str(caught.value)
    assert list(model.modules()) == modules


@pytest.mark.parametrize("text", ["ssm", "ssm:-1", "ssm:x", "scan:3", ":3"])
def test_malformed_components_are_refused(text: str) -> None:
    with pytest.raises(PlanError):
        Component.parse(text)


@pytest.mark.parametrize("family", CONFIGS)
def test_no_gradient_reaches_what_is_called_dead(family: str) -> None:
    model = random_model(family)
    mixer = model.backbone.layers[3].mixer
    with torch.no_grad():
        dense = with_b_zero_and_d_one(model, [3])
    scan_only = [
        n for n, _ in mixer.named_parameters() if n.split(".")[0] in ("x_proj", "dt_proj", "A_log", "D", "dt_bias")
    ]
    with removed(model, [Component("ssm", 3)]):
        live: nn.Module = model.backbone.layers[3].mixer
        counted = sum(parameter.numel() for parameter in live.parameters())
        model(IDS, use_cache=False).logits.sum().backward()
        assert all(parameter.grad is not None for parameter in live.parameters())
        assert not set(scan_only) & {name for name, _ in live.named_parameters()}
    total = sum(parameter.numel() for parameter in dense.backbone.layers[3].mixer.parameters())
    assert family_of(model).dead_parameters(model, Component("ssm", 3)) == total - counted
