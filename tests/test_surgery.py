"""`extract()` against `removed()`, caches and generation, folders read back here and in stock transformers."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import allocated, random_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Zamba2Config, Zamba2ForCausalLM
from transformers.cache_utils import Cache

from shedder_utils import (
    ModelError,
    Plan,
    PlanError,
    Removal,
    extract,
    families,
    kernels,
    load_model,
    removed,
    save_pruned,
)
from shedder_utils.components import PARTS, Cut
from shedder_utils.evaluation import Score
from shedder_utils.families import family_of
from shedder_utils.families.untying import untie
from shedder_utils.hymba import HymbaConfig, HymbaForCausalLM
from shedder_utils.loading import fingerprint, identity
from shedder_utils.removal import is_masked

IDS = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(2))
PADDED = torch.ones_like(IDS)
PADDED[0, :5] = 0
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOLERANCE = 1e-5
"""Of the norm of a difference in the norm of what it differs from."""
SIZE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48,
    "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
LAYERS = ["hybrid" if index in (1, 3, 4, 6) else "linear_attention" for index in range(7)]
CONFIGS = {
    "zamba2": Zamba2Config(
        **SIZE, num_hidden_layers=7, layers_block_type=LAYERS, n_mamba_heads=4, mamba_d_state=16, mamba_ngroups=2,
        chunk_size=8, num_attention_heads=2, num_mem_blocks=2, adapter_rank=4,
    ),
    "zamba2_rope": Zamba2Config(
        **SIZE, num_hidden_layers=7, layers_block_type=LAYERS, n_mamba_heads=4, mamba_d_state=16, chunk_size=8,
        num_attention_heads=2, num_mem_blocks=2, adapter_rank=4, use_mem_rope=True, use_shared_attention_adapter=True,
    ),
    "hymba": HymbaConfig(
        **SIZE, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2, num_memory_tokens=4,
        sliding_window=6, mamba_d_state=8, global_attn_idx=[0, 3, 7], kv_reuse_group=[[1, 2], [4, 5, 6]],
        max_position_embeddings=64, orig_max_position_embeddings=16, all_blocks_removable=True,
    ),
}  # fmt: skip
MAMBA = [
    "mamba_block:0",
    "ssm:1 ssm:5",
    "mamba_block:1 ssm:2 mamba_block:5 ssm:4",
    " ".join(f"ssm:{i}" for i in range(6)),
]
ALL_BLOCKS = " ".join(f"mamba_block:{i}" for i in range(6))
ZAMBA2 = [
    "mamba_block:0 mamba_block:5",
    "mamba_block:1 mamba_block:6 ssm:0 ssm:3",
    "mha:0",
    "mlp:1 mlp:3 mlp_channels:2/16",
    "mha:1 mlp:1 mamba_block:3 mlp_channels:0/32 mlp_channels:2/40",
    "transformer_block:0 mamba_block:1 mha:2",
    "mha:0 mha:1 mha:2 mha:3",
    "transformer_block:0 transformer_block:1 transformer_block:2 transformer_block:3 mamba_block:1 mamba_block:2",
    "mamba_block:0 mamba_block:4 mha:0 mlp:1 mlp_channels:2/16 transformer_block:3 ssm:6",
]
HYMBA = [
    "hymba_block:0 hymba_block:7",
    "attention:0 attention:2 ssm:2 ssm:3",
    "attention:4 ssm:4 attention:5 mlp_channels:6/16",
    "hymba_block:5 hymba_block:2 hymba_block:1 mlp:1 mlp:2 mlp:5",
    "hymba_block:0 mlp:0 mlp:3 mlp_channels:1/32 ssm:1 attention:7 mlp_channels:7/1",
    " ".join(f"ssm:{i}" for i in range(8)),
]
CASES = [
    *((family, gone) for family in ("mamba", "falcon_mamba", "mamba2") for gone in MAMBA[1:]),
    ("mamba2", ALL_BLOCKS),
    *(("zamba2", gone) for gone in ZAMBA2),
    *(("zamba2_rope", gone) for gone in ZAMBA2[4:]),
    *(("hymba", gone) for gone in HYMBA),
]
SOME = [
    ("mamba", MAMBA[2]), ("falcon_mamba", MAMBA[2]), ("mamba2", MAMBA[2]), ("zamba2", ZAMBA2[4]),
    ("zamba2", ZAMBA2[-1]), ("hymba", HYMBA[3]), ("hymba", HYMBA[4]),
]  # fmt: skip


def build(family: str) -> PreTrainedModel:
    """A random model whose every tensor matters."""
    if family not in CONFIGS:
        return random_model(family)
    kernels.install()
    torch.manual_seed(0)
    model_class = HymbaForCausalLM if family == "hymba" else Zamba2ForCausalLM
    model = model_class(copy.deepcopy(CONFIGS[family])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    family_of(model).prepare(model)
    return model


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def plan_of(model: PreTrainedModel, gone: str) -> Plan:
    removals = [Removal(component=cut.component, kept=cut.kept or None) for cut in map(Cut.parse, gone.split())]
    return Plan(removals=removals, model=identity(model))


@torch.no_grad()
def logits(model: PreTrainedModel, mask: Tensor | None = None) -> Tensor:
    return model(IDS, attention_mask=mask, use_cache=False).logits


def caching(model: PreTrainedModel) -> str:
    return "past_key_values" if model.config.model_type in ("zamba2", "hymba") else "cache_params"


@torch.no_grad()
def step_by_step(model: PreTrainedModel, mask: Tensor, prompt: int = 7) -> tuple[Tensor, Cache]:
    """Logits of a prefill and of one token after the other, and the cache in the end."""
    held, has_attention = caching(model), model.config.model_type in ("zamba2", "hymba")
    output = model(IDS[:, :prompt], attention_mask=mask[:, :prompt], use_cache=True)
    parts = [output.logits]
    for end in range(prompt + 1, IDS.shape[1] + 1):
        output = model(
            IDS[:, end - 1 : end], attention_mask=mask[:, :end] if has_attention else None, use_cache=True,
            **{held: output[held]},
        )  # fmt: skip
        parts.append(output.logits)
    return torch.cat(parts, dim=1), output[held]


def size(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def held_tensors(cache: Cache, *names: str) -> list[Tensor]:
    found = [getattr(layer, name, None) for layer in cache.layers for name in names]
    tensors = [t for part in found for t in (part.values() if isinstance(part, dict) else [part])]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


@pytest.mark.parametrize(("family", "gone"), CASES)
def test_extracted_equals_removed_in_prefill_and_in_cached_decode(family: str, gone: str) -> None:
    model = build(family)
    plan = plan_of(model, gone)
    before, marks = logits(model), fingerprint(model)
    with removed(model, plan.gone):
        wanted, wanted_padded = logits(model), logits(model, PADDED)
    pruned = extract(model, plan)
    assert type(pruned) is type(model)
    assert pruned is not model
    real = PADDED.bool()
    assert error(logits(pruned), wanted) < TOLERANCE
    assert error(logits(pruned, PADDED), wanted_padded) < TOLERANCE
    assert error(step_by_step(pruned, torch.ones_like(IDS))[0], wanted) < TOLERANCE
    assert error(step_by_step(pruned, PADDED)[0][real], wanted_padded[real]) < TOLERANCE
    assert (wanted - before).abs().max() > 0.01
    assert fingerprint(model) == marks
    assert not hasattr(model.config, "pruned")
    pruned.tie_weights()
    torch.testing.assert_close(logits(pruned), wanted, **CLOSE)


@pytest.mark.parametrize(("family", "gone"), CASES)
def test_what_is_left_is_what_a_gradient_reaches(family: str, gone: str) -> None:
    model = build(family)
    plan = plan_of(model, gone)
    with removed(model, plan.gone):
        model(IDS, use_cache=False).logits.square().sum().backward()
        read = sum(parameter.numel() for parameter in model.parameters() if parameter.grad is not None)
    pruned = extract(model, plan)
    pruned(IDS, use_cache=False).logits.square().sum().backward()
    assert [name for name, parameter in pruned.named_parameters() if not parameter.grad.any()] == []
    unread = 32 * (2 * 8 + 2 * 16) * ("attention:4 ssm:4 attention:5" in gone and "attention:6" in gone)
    assert pruned.num_parameters() == read - unread
    assert pruned.config.pruned["parameters"] == model.num_parameters()
    for parameter in pruned.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2", "zamba2", "zamba2_rope", "hymba"])
def test_one_component_takes_what_is_dead_without_it(family: str) -> None:
    model = build(family)
    for component in family_of(model).components(model):
        removable = component.kind not in PARTS and not family_of(model).conflict(model, [component])
        if component.index in (1, 3) and removable:
            pruned = extract(model, plan_of(model, str(component)))
            dead = family_of(model).dead_parameters(model, component)
            assert model.num_parameters() - pruned.num_parameters() == dead, str(component)


def test_a_plan_takes_what_the_formulas_say() -> None:
    """Where nothing is shared: the sum over components of what is dead without each, or of its channels that go."""
    plans = [(family, gone) for family in ("mamba", "falcon_mamba", "mamba2") for gone in (*MAMBA, ALL_BLOCKS)]
    plans += [(family, gone) for family in ("zamba2", "zamba2_rope") for gone in ZAMBA2]
    plans += [("hymba", gone) for gone in (HYMBA[0], *HYMBA[3:])]
    for family, gone in plans:
        model = build(family)
        if "zamba2" in family:
            untie(model)
        plan, own = plan_of(model, gone), family_of(model)
        parts = [cut for cut in plan.gone if cut.component.kind in PARTS]
        expected = own.parameters_removed(model, parts)
        expected += sum(own.dead_parameters(model, cut.component) for cut in plan.gone if cut not in parts)
        if all(cut.component.kind == "mamba_block" for cut in plan.gone):
            assert expected == own.parameters_removed(model, plan.gone)
        assert model.num_parameters() - extract(model, plan).num_parameters() == expected, (family, gone)


def test_keys_and_values_that_nobody_reads_are_not_made() -> None:
    model = build("hymba")
    extracted = {
        gone: extract(model, plan_of(model, gone))
        for gone in ("attention:1", "attention:1 attention:2", "attention:1 hymba_block:2")
    }
    keys_and_values = 2 * 8 + 2 * 16
    rows = [pruned.model.layers[1].mamba.in_proj.out_features for pruned in extracted.values()]
    assert rows == [keys_and_values + 2 * 64, 2 * 64, 2 * 64]
    for gone, pruned in extracted.items():
        with removed(model, plan_of(model, gone).gone):
            torch.testing.assert_close(logits(pruned), logits(model), **CLOSE)


@pytest.mark.parametrize(
    ("family", "gone", "scans", "convolutions", "keys"),
    [
        ("mamba", MAMBA[2], 2, 4, 0),
        ("falcon_mamba", MAMBA[3], 0, 6, 0),
        ("mamba2", MAMBA[2], 2, 4, 0),
        ("mamba2", ALL_BLOCKS, 0, 0, 0),
        ("zamba2", ZAMBA2[1], 3, 5, 4),
        ("zamba2", ZAMBA2[5], 6, 6, 2),
        ("zamba2", ZAMBA2[7], 5, 5, 1),  # a counter of tokens, where no attention is left
        ("hymba", HYMBA[1], 6, 7, 4),
        ("hymba", HYMBA[3], 5, 5, 4),
    ],
)
def test_the_cache_holds_what_is_left(family: str, gone: str, scans: int, convolutions: int, keys: int) -> None:
    model = build(family)
    pruned = extract(model, plan_of(model, gone))
    dense, cache = (step_by_step(m, torch.ones_like(IDS))[1] for m in (model, pruned))
    assert len(cache.layers) == pruned.config.num_hidden_layers == len(family_of(pruned).layers(pruned))
    assert len(held_tensors(cache, "recurrent_states")) == scans
    assert len(held_tensors(cache, "conv_states")) == convolutions
    assert len(held_tensors(cache, "keys")) == keys
    if keys == 1:
        assert held_tensors(cache, "keys")[0].shape == (2, 1, IDS.shape[1], 1)
    everything = ("recurrent_states", "conv_states", "keys", "values")
    sizes = [sum(tensor.nbytes for tensor in held_tensors(c, *everything)) for c in (dense, cache)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize(("family", "gone"), [*SOME, ("zamba2_rope", ZAMBA2[5]), ("zamba2_rope", ZAMBA2[7])])
def test_generation(family: str, gone: str) -> None:
    model = build(family)
    plan = plan_of(model, gone)
    pruned = extract(model, plan)
    settings = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "attention_mask": PADDED}
    greedy = pruned.generate(IDS, do_sample=False, use_cache=True, **settings)
    assert torch.equal(greedy, pruned.generate(IDS, do_sample=False, use_cache=False, **settings))
    one = pruned.generate(IDS[1:], do_sample=False, **settings | {"attention_mask": PADDED[1:]})
    assert torch.equal(one[0], greedy[1])
    torch.manual_seed(5)
    sampled = pruned.generate(IDS, do_sample=True, **settings)
    with removed(model, plan.gone):
        assert torch.equal(greedy, model.generate(IDS, do_sample=False, **settings))
        torch.manual_seed(5)
        assert torch.equal(sampled, model.generate(IDS, do_sample=True, **settings))
    assert not torch.equal(sampled, greedy)
    cached, uncached = (
        pruned.generate(IDS, num_beams=2, do_sample=False, use_cache=cache, **settings) for cache in (True, False)
    )
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("gone", MAMBA[1:])
@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2"])
def test_generation_without_ssms_is_that_of_the_uncached_forward(family: str, gone: str, batch: int) -> None:
    model = build(family)
    pruned = extract(model, plan_of(model, gone))
    prompts = torch.randint(1, 97, (batch, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(prompts)
    mask[1:, :4] = 0
    settings = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    generated = pruned.generate(prompts, attention_mask=mask, **settings)
    mask = torch.cat([mask, torch.ones(batch, 6, dtype=torch.int64)], dim=1)
    with torch.no_grad():
        forward = pruned(generated, attention_mask=mask, use_cache=False).logits
    assert torch.equal(forward[:, 8:-1].argmax(-1), generated[:, 9:])


@pytest.mark.parametrize(("family", "gone"), SOME)
def test_in_place_is_the_same_model(family: str, gone: str) -> None:
    model = build(family)
    plan = plan_of(model, gone)
    copied = extract(model, plan)
    kept = {id(parameter) for parameter in model.parameters()}
    pruned = extract(model, plan, inplace=True)
    assert pruned is model
    assert fingerprint(pruned) == fingerprint(copied)
    assert pruned.config.to_dict() == copied.config.to_dict()
    assert torch.equal(logits(pruned), logits(copied))
    assert kept.intersection(id(parameter) for parameter in pruned.parameters())
    for parameter in pruned.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes


HELD_ONCE = [
    *SOME,
    *((family, MAMBA[3]) for family in ("mamba", "falcon_mamba", "mamba2")),
    *((f, " ".join(f"inner_channels:{i}/48 states:{i}/6" for i in range(6))) for f in ("mamba", "falcon_mamba")),
    ("mamba2", " ".join(f"heads:{i}/2 states:{i}/12" for i in range(6))),
    ("mamba2", " ".join(f"heads:{i}/2 ssm:{i}" for i in range(6))),
    ("zamba2", " ".join(f"heads:{i}/2 states:{i}/12" for i in range(7))),
    ("zamba2", " ".join(f"mlp_channels:{i}/40" for i in range(4))),
    ("hymba", " ".join(f"attention:{i} mlp_channels:{i}/40" for i in range(8))),
]


@pytest.mark.parametrize(("family", "gone"), HELD_ONCE)
def test_in_place_never_holds_two_copies_of_a_layer(family: str, gone: str) -> None:
    """Beside what a plan adds, where it parts layers that shared a block."""
    model, pruned = build(family), []
    plan = plan_of(model, gone)
    largest = max(map(size, family_of(model).layers(model)))
    peak = allocated(lambda: pruned.append(extract(copy.deepcopy(model), plan, inplace=True)))
    assert peak - size(model) < largest + max(0, size(pruned[0]) - size(model))


def test_shared_blocks_stay_shared() -> None:
    pruned = extract(build("zamba2"), plan_of(build("zamba2"), "mlp_channels:0/16 mamba_block:0 mha:1"))
    blocks = [layer.shared_transformer for layer in pruned.model.layers if hasattr(layer, "shared_transformer")]
    assert blocks[0].self_attn.q_proj.weight is blocks[2].self_attn.q_proj.weight
    assert blocks[1].feed_forward.down_proj.weight is blocks[3].feed_forward.down_proj.weight
    assert blocks[0].feed_forward.down.weight.shape == (32, 16)
    assert blocks[2].feed_forward.down_proj.weight.shape == (32, 48)
    adapters = blocks[2].feed_forward.gate_up_proj_adapter_list
    assert [len(list(adapter.parameters())) for adapter in adapters] == [0, 0, 2, 0]


@pytest.mark.parametrize(("family", "gone"), SOME)
def test_extracted_models_train(family: str, gone: str) -> None:
    pruned = extract(build(family), plan_of(build(family), gone)).train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = pruned(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize(("family", "gone"), SOME)
def test_extracted_models_change_precision(family: str, gone: str, dtype: torch.dtype, tolerance: float) -> None:
    pruned = extract(build(family), plan_of(build(family), gone))
    wanted = logits(pruned)
    pruned = pruned.half() if dtype == torch.float16 else pruned.to(dtype)
    assert {parameter.dtype for parameter in pruned.parameters()} == {dtype}
    assert error(logits(pruned), wanted) < tolerance
    assert error(step_by_step(pruned, torch.ones_like(IDS))[0], wanted) < tolerance


def test_masking_is_noticed() -> None:
    model = build("mamba2")
    plan = plan_of(model, "ssm:1")
    assert not is_masked(model)
    with removed(model, plan.gone):
        with removed(model, []):
            assert is_masked(model)
        with removed(model, plan_of(model, "ssm:2").gone):
            pass
        assert is_masked(model)
        with pytest.raises(ModelError, match=r"masked right now: leave the block of removed\(\)"):
            extract(model, plan)
    assert not is_masked(model)
    assert not is_masked(extract(model, plan))
    with removed(model, []):
        assert not is_masked(model)


def test_what_does_not_fit_is_refused_and_nothing_is_changed() -> None:
    model = build("mamba2")
    marks = fingerprint(model)
    for change, message in [
        ({"type": "mamba"}, "type mamba, this one has mamba2"),
        ({"layers": 64}, "layers 64, this one has 6"),
        ({"parameters": 7, "ref": "some/model"}, "parameters 7, this one has .*: load some/model"),
    ]:
        plan = plan_of(model, "ssm:1")
        plan.model |= change
        with pytest.raises(PlanError, match=message) as caught:
            extract(model, plan, inplace=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(PlanError, match="ssm:6 is not in this mamba2 model"):
        extract(model, plan_of(model, "ssm:6"), inplace=True)
    with pytest.raises(PlanError, match="a list is not a plan"):
        extract(model, [Cut.parse("ssm:1")])  # type: ignore[arg-type]
    assert fingerprint(model) == marks
    pruned = extract(model, plan_of(model, "ssm:1"))
    with pytest.raises(ModelError, match="pruned already: make one plan"):
        extract(pruned, Plan.from_released({"pruned_ssm_idx": [2]}))
    with pytest.raises(ModelError, match=r"not pruned for good: extract\(\) it first"):
        save_pruned(model, "nowhere")
    with (
        removed(pruned, [Cut.parse("ssm:2")]),
        pytest.raises(ModelError, match=r"not pruned for good: extract\(\) it first"),
    ):
        save_pruned(pruned, "nowhere")


@pytest.mark.parametrize("name", ["mlp_channels:1/", "mlp_channels:1/0", "mlp_channels:1/x", "ssm"])
def test_malformed_cuts_are_refused(name: str) -> None:
    assert str(Cut.parse("mlp_channels:1/48")) == "mlp_channels:1/48"
    with pytest.raises(PlanError, match="malformed"):
        Cut.parse(name)


SAVED = [*SOME, ("mamba", MAMBA[3]), ("falcon_mamba", MAMBA[0]), ("zamba2_rope", ZAMBA2[7]), ("hymba", HYMBA[1])]


@pytest.mark.parametrize(
    ("family", "gone", "dtype"),
    [*((*case, torch.float32) for case in SAVED), *((*case, torch.bfloat16) for case in SOME[2:5])],
)
def test_a_saved_model_is_read_back_bit_for_bit(family: str, gone: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(family).to(dtype)
    pruned = extract(model, plan_of(model, gone))
    save_pruned(pruned, tmp_path)
    again, _ = load_model(tmp_path, dtype=dtype, tokenizer=False)
    assert type(again) is type(model)
    assert fingerprint(again) == fingerprint(pruned)
    assert torch.equal(logits(again, PADDED), logits(pruned, PADDED))
    assert torch.equal(*(step_by_step(m, PADDED)[0] for m in (again, pruned)))
    assert again.config.pruned == pruned.config.pruned
    assert again.num_parameters() == pruned.num_parameters()
    assert Plan.model_validate(again.config.pruned["plan"]).gone == [Cut.parse(name) for name in gone.split()]
    if family == "mamba":  # without the package's own way of saving too
        again.save_pretrained(tmp_path / "again")
        assert fingerprint(load_model(tmp_path / "again", dtype=dtype, tokenizer=False)[0]) == fingerprint(pruned)


@pytest.mark.parametrize(
    ("family", "gone", "left"),
    [
        ("mamba2", "ssm:3 mamba_block:1 states:4/8", [{}, None, {}, {"ssm": 0}, {"states": 8}, {}]),
        (
            "zamba2",
            "mamba_block:0 mamba_block:3 mha:1 mlp_channels:2/16 heads:6/2 states:6/8",
            [None, {}, {}, {"mamba_block": 0, "mha": 0}, {"mlp_channels": 16}, {}, {"heads": 2, "states": 8}],
        ),
        ("hymba", HYMBA[3], [{}, None, None, {}, {}, None, {}, {}]),
    ],
)
def test_the_configuration_says_what_is_left_of_each_layer(
    family: str, gone: str, left: list[dict[str, int] | None], tmp_path: Path
) -> None:
    model = build(family)
    save_pruned(extract(model, plan_of(model, gone)), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    layers = [{"layer": number} | parts for number, parts in enumerate(left) if parts is not None]
    assert settings["pruned"]["layers"] == layers
    assert settings["num_hidden_layers"] == len(layers)


def test_the_model_card_says_what_went_and_what_is_left(tmp_path: Path) -> None:
    model = build("zamba2")
    plan = plan_of(model, "mamba_block:0 mlp_channels:2/16 mamba_block:5")
    plan.dense_score = 3.0
    plan.removals[-1] = plan.removals[-1].model_copy(update={"score": 3.25, "parameters": 1234})
    plan.model["ref"] = "some/base-model"
    plan.calibration = {"name": "some-texts", "sequences": 7, "tokens": 1792, "fingerprint": "abc123"}
    pruned = extract(model, plan)
    save_pruned(pruned, tmp_path, scores={("some_task", "acc"): Score(0.625, 0.021, 500)})
    card = (tmp_path / "README.md").read_text()
    for line in (
        "base_model: some/base-model",
        f"Parameters: {pruned.num_parameters():,} of {model.num_parameters():,}",
        "| 0 | nothing | 3 | |",
        "| 1 | mamba_block:0 (a residual layer: norm and mixer) | – | – |",
        "| 2 | mlp_channels:2/16 (the last channels of an MLP) | – | – |",
        "| 3 | mamba_block:5 (a residual layer: norm and mixer) | 3.25 | 1,234 |",
        "Calibration: some-texts, 7 sequences, 1,792 tokens, sha256 of the token ids abc123.",
        "| some_task | acc | 0.625 ± 0.021 | 500 |",
        "model, tokenizer = load_model(folder)",
        "those of some/base-model, whose licence holds",
    ):
        assert line in card, line
    assert "AutoModelForCausalLM" not in card


def test_the_model_card_of_a_plan_without_scores_names_what_went(tmp_path: Path) -> None:
    pruned = extract(build("mamba"), Plan.from_released({"pruned_mamba_block_idx": [3, 1]}))
    save_pruned(pruned, tmp_path)
    card = (tmp_path / "README.md").read_text()
    order = [card.index(f"mamba_block:{index} (") for index in (3, 1)]
    assert order == sorted(order)
    assert "Calibration:" not in card
    assert "## Scores" not in card
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card


def test_the_tokenizer_goes_with_the_model(tmp_path: Path) -> None:
    model, tokenizer = load_model("pocket-mamba2")
    save_pruned(extract(model, plan_of(model, "ssm:1"), inplace=True), tmp_path)
    assert load_model(tmp_path)[1]("Anna went home").input_ids == tokenizer("Anna went home").input_ids


def test_a_folder_that_would_lose_or_hide_a_model_is_refused(tmp_path: Path) -> None:
    build("mamba2").save_pretrained(tmp_path / "dense")
    dense, _ = load_model(tmp_path / "dense", tokenizer=False)
    marks = fingerprint(dense)
    pruned = extract(dense, plan_of(dense, "ssm:1"))
    with pytest.raises(ModelError, match="holds the model that the new one is made from: choose another"):
        save_pruned(pruned, tmp_path / "other" / ".." / "dense")
    assert fingerprint(load_model(tmp_path / "dense", tokenizer=False)[0]) == marks
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds LoRA adapters, which load_model would look for first"):
        save_pruned(pruned, tmp_path / "tuned")


def damage(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    model = build("mamba2")
    save_pruned(extract(model, plan_of(model, "ssm:1")), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["pruned"]
    for pruned, message in [
        (record | {"removed": ["ssm:1", "ssm:2"]}, "tensors, such as backbone.layers.2.mixer"),
        (record | {"removed": []}, "tensors, such as backbone.layers.1.mixer"),
        (record | {"removed": ["ssm:9"]}, "ssm:9 is not in this mamba2 model"),
        (record | {"removed": ["ssm"]}, "'pruned' is malformed"),
        ({"removed": []}, "'pruned' is malformed"),
    ]:
        damage(tmp_path, pruned=pruned)
        with pytest.raises((ModelError, PlanError), match=message) as caught:
            load_model(tmp_path, tokenizer=False)
        assert "\n" not in str(caught.value)
    damage(tmp_path, pruned=record, model_type="pruned_gpt2")
    with pytest.raises(ModelError, match="'gpt2', which is not covered"):
        load_model(tmp_path, tokenizer=False)


PORTABLE = [
    ("mamba", MAMBA[2]), ("falcon_mamba", MAMBA[2]), ("mamba2", MAMBA[2]), ("mamba2", MAMBA[3]),
    ("zamba2", "mamba_block:0 ssm:1 ssm:5 mamba_block:2"),
]  # fmt: skip
STOCK = [
    *((family, "mamba_block:0 mamba_block:4") for family in ("mamba", "falcon_mamba", "mamba2")),
    ("zamba2", ZAMBA2[0]),
]
IN_STOCK = """
import sys
sys.modules["shedder_utils"] = None  # any import of it fails
import torch
from transformers import AutoConfig, AutoModelForCausalLM
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    if folder.endswith("unknown"):
        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except ValueError as error:
            assert "model type `pruned_" in str(error), error
            continue
        raise AssertionError(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), (folder, info)
    expected = torch.load(folder + "/expected.pt")
    with torch.no_grad():
        found = model.eval()(expected["ids"], attention_mask=expected["mask"], use_cache=False).logits
    torch.testing.assert_close(found, expected["logits"], rtol=1e-4, atol=1e-4)
try:
    import shedder_utils
except ImportError:
    print("without the package")
"""


def test_stock_transformers_reads_what_it_can_and_refuses_the_rest(tmp_path: Path) -> None:
    folders = []
    for family, gone in [*STOCK, *PORTABLE]:
        model = build(family)
        for name, parameter in model.named_parameters():
            if family == "zamba2" and name.endswith("dt_bias"):
                torch.nn.init.constant_(parameter, -9.0)  # steps below the floor that transformers gives new models
        pruned = extract(model, plan_of(model, gone))
        folder = tmp_path / f"{len(folders)}"
        save_pruned(pruned, folder, portable="ssm" in gone)
        torch.save({"ids": IDS, "mask": PADDED, "logits": logits(pruned, PADDED)}, folder / "expected.pt")
        again = load_model(folder, tokenizer=False)[0]
        assert fingerprint(again) == fingerprint(pruned)
        assert torch.equal(logits(again), logits(pruned))
        assert again.config.pruned == pruned.config.pruned
        assert "or without this package" in (folder / "README.md").read_text()
        folders.append(str(folder))
    for family, gone in [("mamba", "ssm:1"), ("zamba2", "mamba_block:1"), ("hymba", HYMBA[0])]:
        model = build(family)
        folders.append(str(tmp_path / f"{family}_unknown"))
        save_pruned(extract(model, plan_of(model, gone)), folders[-1])
    run = subprocess.run([sys.executable, "-c", IN_STOCK, *folders], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "without the package" in run.stdout


@pytest.mark.parametrize(
    ("family", "gone", "named"),
    [
        ("zamba2", "ssm:0 mlp:2", "zamba2 model without mlp:2 cannot"),
        ("zamba2", "mamba_block:1", "mamba_block:1"),
        ("hymba", "ssm:1", "hymba model without SSMs cannot"),
        ("hymba", "hymba_block:0 ssm:1", "hymba_block:0"),
    ],
)
def test_what_stock_transformers_has_no_class_for_is_not_portable(
    family: str, gone: str, named: str, tmp_path: Path
) -> None:
    model = build(family)
    with pytest.raises(PlanError, match=f"{named}.*cannot be portable|{named}") as caught:
        save_pruned(extract(model, plan_of(model, gone)), tmp_path / "new", portable=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_untied_zamba2_is_pruned_and_read_back(tmp_path: Path) -> None:
    model = build("zamba2")
    untie(model)
    plan = plan_of(model, ZAMBA2[4])
    with removed(model, plan.gone):
        wanted = logits(model)
    pruned = extract(model, plan)
    torch.testing.assert_close(logits(pruned), wanted, **CLOSE)
    save_pruned(pruned, tmp_path)
    assert torch.equal(logits(load_model(tmp_path, tokenizer=False)[0]), logits(pruned))


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2", "zamba2", "hymba"])
def test_a_pruned_model_is_gone_when_nobody_has_it(family: str) -> None:
    model = families.random_model(family=family, layers=8, hidden_size=32, seed=0, vocab_size=50)
    gc.collect()
    gc.disable()
    try:
        pruned = extract(model, Plan(removals=[Removal(component="ssm:1")]))
        weight = weakref.ref(pruned.get_output_embeddings().weight)
        del pruned
        assert weight() is None
    finally:
        gc.enable()
