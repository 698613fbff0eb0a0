"""Costs: what is counted is what a hand count gives, and what is removed is no longer counted."""

from __future__ import annotations

import pytest
import torch

from shedder_utils.components import Component
from shedder_utils.costs import cache_bytes, costs
from shedder_utils.families import random_model
from shedder_utils.removal import removed

TOKENS, D, E, V, K, RANK, N = 12, 32, 64, 48, 4, 2, 16


def model(family: str, layers: int = 2):
    return random_model(family=family, layers=layers, hidden_size=D, seed=0, vocab_size=V)


def test_a_mamba_model_costs_what_a_hand_count_gives() -> None:
    found = costs(model("mamba"), TOKENS)
    weights = 2 * D * E + K * E + E * (RANK + 2 * N) + RANK * E + E * D
    layer = 2 * TOKENS * weights + 7 * TOKENS * E * N
    assert found.flops == 2 * layer + 2 * D * V  # the logits of the last token alone
    assert found.weight_bytes == 4 * model("mamba").num_parameters()  # tied, so read once, as the head
    assert found.cache_bytes == 4 * 2 * (E * K + E * N)
    assert found.decode_bytes == found.weight_bytes + 2 * found.cache_bytes  # states are read and written


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2", "zamba2", "hymba"])
def test_removal_saves_arithmetic_weights_and_cache(family: str) -> None:
    dense = model(family, 8 if family == "zamba2" else 6)
    before = costs(dense, TOKENS)
    index = dense.config.num_hidden_layers - 1
    with removed(dense, [Component("ssm", index)]):
        without_ssm = costs(dense, TOKENS)
    with removed(dense, [Component("hymba_block" if family == "hymba" else "mamba_block", index)]):
        without_block = costs(dense, TOKENS)
    for less in ("flops", "weight_bytes", "cache_bytes"):
        assert getattr(without_block, less) < getattr(without_ssm, less) < getattr(before, less), less


def test_a_shared_block_is_read_at_each_of_its_places() -> None:
    zamba2 = model("zamba2", 8)
    block = zamba2.model.layers[2].shared_transformer
    shared = sum(p.numel() for name, p in block.named_parameters() if "adapter" not in name)
    once = costs(zamba2, TOKENS).weight_bytes - 4 * zamba2.num_parameters()
    assert shared * 4 * 0.9 < once < shared * 4 * 1.1  # three places, two blocks: one block is read twice


def test_the_cache_of_a_prompt_is_counted_whole() -> None:
    hymba = model("hymba", 6)
    cache = hymba(torch.zeros((1, TOKENS), dtype=torch.int64), use_cache=True).past_key_values
    attending = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    keys = sum(layer.keys.nbytes + layer.values.nbytes for layer in attending)
    assert 0 < keys < cache_bytes(cache)
    found = costs(hymba, TOKENS)
    assert found.attention_bytes == keys
    assert found.decode_bytes == found.weight_bytes + 2 * (found.cache_bytes - keys) + keys  # old keys are only read
