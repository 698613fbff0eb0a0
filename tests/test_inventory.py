"""The inventory: parameters, bytes, cache and arithmetic of every kind, against counts made by hand."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import shedder_utils
from shedder_utils import Component, Plan, Removal, describe, extract
from shedder_utils.families import random_model
from shedder_utils.families.untying import untie

TOKENS, LAYERS, D, E, V, K, RANK, N = 12, 8, 32, 64, 48, 4, 2, 16
HEADS, ATTENTION, WIDTH, HYBRID = (
    4,
    64,
    4 * 32,
    3,
)  # of Mamba-2; of Zamba2: width of the attention, of the MLP, positions
SIZES = ["cache_bytes", "flops_per_token"]


def model(family: str) -> PreTrainedModel:
    return random_model(family=family, layers=LAYERS, hidden_size=D, seed=0, vocab_size=V)


def counted(found: PreTrainedModel) -> tuple[int, int]:
    """Parameters and bytes, each tensor once."""
    tensors = {id(tensor): tensor for tensor in found.state_dict(keep_vars=True).values()}.values()
    return sum(tensor.numel() for tensor in tensors), sum(tensor.nbytes for tensor in tensors)


def held(found: PreTrainedModel) -> int:
    """Bytes of the tensors in a cache after a prompt."""
    output = found(torch.zeros((1, TOKENS), dtype=torch.int64), use_cache=True)
    cache = output["cache_params" if "cache_params" in output else "past_key_values"]
    total = 0
    for layer in cache.layers:
        parts = [getattr(layer, name, None) for name in ("conv_states", "recurrent_states", "keys", "values")]
        tensors = [tensor for part in parts for tensor in (part.values() if isinstance(part, dict) else [part])]
        total += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
    return total


def linear_flops(found: PreTrainedModel) -> float:
    """Per token, of the linear layers that are called as modules; the head's are for the last token alone."""
    total, handles = [], []

    def count(module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        total.append(2.0 * module.weight.numel() * output.shape[1])

    for module in found.modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(count))
    found(torch.zeros((1, TOKENS), dtype=torch.int64), use_cache=True, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    return sum(total) / TOKENS


MAMBA_SSM = 2 * (E * (RANK + 2 * N) + RANK * E) + 7 * E * N
MAMBA_BLOCK = MAMBA_SSM + 2 * (2 * D * E + K * E + E * D)
MAMBA2_SSM = 2 * (2 * N + HEADS) * D + 2 * K * 2 * N + 5 * E * N
MAMBA2_BLOCK = MAMBA2_SSM + 2 * (2 * E * D + K * E + E * D)


@pytest.mark.parametrize(
    ("family", "ssm", "block", "window", "dead"),
    [
        ("mamba", MAMBA_SSM, MAMBA_BLOCK, 0, E * (RANK + 2 * N) + RANK * E + E + E * N + E),
        ("falcon_mamba", MAMBA_SSM, MAMBA_BLOCK, 0, E * (RANK + 2 * N) + RANK * E + E + E * N + E),
        ("mamba2", MAMBA2_SSM, MAMBA2_BLOCK, 4 * 2 * N * K, (2 * N + HEADS) * D + 2 * N * (K + 1) + 3 * HEADS),
    ],
)
def test_mamba_blocks_and_ssms(family: str, ssm: int, block: int, window: int, dead: int) -> None:
    """window: bytes of the convolution's state that go with the SSM."""
    found, dense = describe(model(family), tokens=TOKENS), model(family)
    state = 4 * E * N
    assert found.loc["ssm", SIZES].tolist() == [LAYERS * (state + window), LAYERS * ssm]
    assert found.loc["mamba_block", SIZES].tolist() == [LAYERS * (state + window + 4 * K * E), LAYERS * block]
    assert found.loc["ssm", ["count", "parameters", "bytes"]].tolist() == [LAYERS, LAYERS * dead, 4 * LAYERS * dead]
    assert found.loc["model", ["parameters", "bytes"]].tolist() == list(counted(dense))
    assert found.loc["model", SIZES].tolist() == [held(dense), LAYERS * block + 2 * D * V / TOKENS]
    assert found["parameters_apart"].tolist() == found["parameters"].tolist()  # nothing is shared


def test_zamba2s_branches_at_every_place_that_reads_them() -> None:
    dense = model("zamba2")
    found = describe(dense, tokens=TOKENS)
    attention, adapter, mlp = 4 * ATTENTION * ATTENTION - D * ATTENTION, 8 * (D + 2 * WIDTH), 3 * WIDTH * D
    attention = 3 * ATTENTION * ATTENTION + ATTENTION * D
    scores = 2 * ATTENTION * (TOKENS + 1)
    counter = 8 * TOKENS  # where no attention is left, one number for each token and as many again stay
    assert found.loc["mha", SIZES].tolist() == [
        HYBRID * 8 * TOKENS * ATTENTION - counter, HYBRID * (2 * attention + scores)
    ]  # fmt: skip
    assert found.loc["mlp", SIZES].tolist() == [0, HYBRID * 2 * (mlp + adapter)]
    assert found.loc["mlp_channels", "flops_per_token"] == HYBRID * 2 * (mlp + 8 * 2 * WIDTH)
    whole = HYBRID * (2 * (attention + mlp + adapter + D * D) + scores)
    assert found.loc["transformer_block", "flops_per_token"] == whole
    assert found.loc["mha", "parameters_apart"] == HYBRID * (attention + 2 * D)
    assert found.loc["mlp", "parameters_apart"] == HYBRID * (mlp + D)
    assert found.loc["mha", "parameters"] == attention + 2 * D  # of the block that serves a single position
    assert found.loc["model", ["parameters", "bytes"]].tolist() == list(counted(dense))
    assert found.loc["model", "cache_bytes"] == held(dense)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_reader_sees_what_sharing_saves_and_when_pruned_is_larger() -> None:
    tied = model("zamba2")
    private = model("zamba2")
    untie(private)
    narrow = [Removal(component=Component("mlp_channels", position), kept=WIDTH - 8) for position in range(HYBRID)]
    narrowed = extract(tied, Plan(removals=narrow))
    columns = ["parameters", "parameters_apart"]
    before, after, pruned = (
        describe(one, tokens=4).loc["model", columns].tolist() for one in (tied, private, narrowed)
    )
    assert before == [counted(tied)[0], counted(private)[0]]
    assert after == [counted(private)[0]] * 2
    assert pruned[0] == counted(narrowed)[0]
    assert before[0] < pruned[0] < after[0]  # each position has an MLP of its own now


def test_hymbas_halves() -> None:
    dense = model("hymba")
    found = describe(dense, tokens=TOKENS)
    total = TOKENS + dense.config.num_memory_tokens
    mlp = 3 * dense.config.intermediate_size * D
    assert found.loc["mlp", SIZES].tolist() == [0, pytest.approx(LAYERS * 2 * mlp * total / TOKENS)]
    assert found.loc["mlp_channels", "flops_per_token"] == pytest.approx(LAYERS * 2 * mlp * total / TOKENS)
    assert found.loc["ssm", "cache_bytes"] == LAYERS * 4 * E * (N + K)
    gone = [Removal(component=Component("hymba_block", 7))]
    left = extract(dense, Plan(removals=gone))
    assert (
        found.loc["model", "cache_bytes"]
        == held(dense)
        > held(left)
        == describe(left, tokens=TOKENS).loc["model", "cache_bytes"]
    )
    assert found.loc["model", ["parameters", "bytes"]].tolist() == list(counted(dense))


@pytest.mark.parametrize("family", ["zamba2", "hymba"])
def test_linear_layers_are_counted_at_each_call(family: str) -> None:
    """What is not counted by the hooks on linear layers: convolutions, scans, attention, and Hymba's time steps."""
    dense = model(family)
    beside = describe(dense, tokens=TOKENS).loc["model", "flops_per_token"] - linear_flops(dense)
    if family == "zamba2":
        scans = LAYERS * (5 * E * N + 2 * K * (E + 2 * N))
        assert beside == pytest.approx(scans + HYBRID * 2 * ATTENTION * (TOKENS + 1))
    else:
        assert beside > LAYERS * (7 * E * N + 2 * K * E + 2 * RANK * E)


def test_the_model_stays_as_it_is() -> None:
    dense = model("zamba2")
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    describe(dense, tokens=4)
    assert {tensor.device.type for tensor in dense.parameters()} == {"cpu"}
    assert not hasattr(dense.config, "pruned")
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_the_public_names_are_functions_and_classes_not_modules() -> None:
    for name in shedder_utils.__all__:
        assert name == "kernels" or not inspect.ismodule(getattr(shedder_utils, name)), name
