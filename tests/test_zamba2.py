"""Zamba2: removal against a plain implementation, untying, parameter counts of the 2.7B, and the search."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Zamba2Config, Zamba2ForCausalLM

from shedder_utils import Calibration, Component, PlanError, Stage, components, kernels, removed, search
from shedder_utils.components import cuts
from shedder_utils.families import family_of, random_model
from shedder_utils.families.untying import untie
from shedder_utils.inventory import describe, ratio
from shedder_utils.kernels import slices
from shedder_utils.loading import fingerprint

HYBRID = [1, 3, 4, 6]  # positions 0 and 2 share one Transformer block, 1 and 3 the other
LAYERS = ["hybrid" if index in HYBRID else "linear_attention" for index in range(7)]
IDS = torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(2))
PADDED = torch.ones_like(IDS)
PADDED[0, :4] = 0
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def zamba2(*, rope: bool = False, layers: list[str] = LAYERS) -> PreTrainedModel:
    """A random Zamba2 whose every tensor matters."""
    kernels.install()
    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=97, hidden_size=32, num_hidden_layers=len(layers), layers_block_type=layers, intermediate_size=64,
        n_mamba_heads=4, mamba_d_state=16, mamba_ngroups=2, chunk_size=8, num_attention_heads=2, num_mem_blocks=2,
        adapter_rank=4, use_mem_rope=rope, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = Zamba2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    family_of(model).prepare(model)
    return model


def parse(*names: str) -> list[Component | tuple[Component, int]]:
    """Components by name; "mlp_channels:1/32" keeps 32 channels."""
    parts = (name.partition("/") for name in names)
    return [(Component.parse(name), int(kept)) if kept else Component.parse(name) for name, _, kept in parts]


@torch.no_grad()
def logits(model: PreTrainedModel, mask: Tensor | None = None) -> Tensor:
    return model(IDS, attention_mask=mask, use_cache=False).logits


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def transformer(model: PreTrainedModel, position: int, h: Tensor, e: Tensor, gone: dict[str, int]) -> Tensor:
    """A shared Transformer block at one hybrid position, from its formulas."""
    w = model.model.layers[HYBRID[position]].shared_transformer
    if f"mha:{position}" not in gone:
        n = rms_norm(torch.cat([h, e], -1), w.input_layernorm.weight)
        q, k, v = (
            (n @ getattr(w.self_attn, f"{name}_proj").weight.T).unflatten(-1, (2, 32)).transpose(1, 2) for name in "qkv"
        )
        scores = q @ k.transpose(2, 3) / 16**0.5
        future = torch.ones(IDS.shape[1], IDS.shape[1]).triu(1).bool()
        a = (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = a @ w.self_attn.o_proj.weight.T
    if f"mlp:{position}" in gone:
        return h
    n = rms_norm(h, w.pre_ff_layernorm.weight)
    first, second = w.feed_forward.gate_up_proj_adapter_list[position]
    gate, up = (n @ (w.feed_forward.gate_up_proj.weight + second.weight @ first.weight).T).chunk(2, -1)
    inner = torch.nn.functional.gelu(gate) * up
    inner[..., gone.get(f"mlp_channels:{position}", 64) :] = 0
    return inner @ w.feed_forward.down_proj.weight.T


@torch.no_grad()
def expected(model: PreTrainedModel, without: Iterable[Component | tuple[Component, int]] = ()) -> Tensor:
    """Logits from the model's formulas; the mixers alone are the model's own."""
    gone = {str(component): kept for component, kept in cuts(without)}
    e = h = model.model.embed_tokens(IDS)
    for index, layer in enumerate(model.model.layers):
        t, decoder = torch.zeros_like(h), layer
        if index in HYBRID:
            decoder, position = layer.mamba_decoder, HYBRID.index(index)
            if f"transformer_block:{position}" not in gone:
                t = transformer(model, position, h, e, gone) @ layer.linear.weight.T
        if f"mamba_block:{index}" in gone:
            h = h + t
        else:
            h = h + decoder.mamba(rms_norm(h + t, decoder.input_layernorm.weight))
    return rms_norm(h, model.model.final_layernorm.weight) @ model.model.embed_tokens.weight.T


def with_b_zero_and_d_one(model: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    dense = copy.deepcopy(model)
    for index in layers:
        mixer = getattr(dense.model.layers[index], "mamba_decoder", dense.model.layers[index]).mamba
        with torch.no_grad():
            mixer.D.fill_(1.0)
            mixer.in_proj.weight[128:160] = 0
            mixer.conv1d.weight[64:96] = 0
            mixer.conv1d.bias[64:96] = 0
    return dense


REMOVALS = [
    ["mamba_block:0"],
    ["mamba_block:1"],
    ["mamba_block:3", "mamba_block:5", "mamba_block:6"],
    ["mha:0"],
    ["mha:1", "mha:3"],
    ["mlp:2"],
    ["mha:1", "mlp:1", "mlp:3"],
    ["transformer_block:0"],
    ["transformer_block:3", "mamba_block:6"],
    ["mlp_channels:0/32"],
    ["mlp_channels:1/1", "mlp_channels:2/63", "mha:2"],
    ["mamba_block:0", "mamba_block:4", "mha:0", "mlp:1", "mlp_channels:2/16", "transformer_block:3"],
]


def test_the_formulas_are_the_model() -> None:
    model = zamba2()
    torch.testing.assert_close(expected(model), logits(model), **CLOSE)


@pytest.mark.parametrize("gone", REMOVALS, ids=" ".join)
def test_removal_equals_the_formulas_without_the_components(gone: list[str]) -> None:
    model = zamba2()
    with removed(model, parse(*gone)):
        pruned = logits(model)
    torch.testing.assert_close(pruned, expected(model, parse(*gone)), **CLOSE)
    assert (pruned - logits(model)).abs().max() > 0.02


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("gone", [[0], [1], [2, 3, 6], list(range(7))])
def test_without_ssms_equals_b_zero_and_d_one(gone: list[int], padded: bool) -> None:
    model, mask = zamba2(), PADDED if padded else None
    with removed(model, [Component("ssm", index) for index in gone]):
        pruned = logits(model, mask)
        kernels.uninstall()
        stock = logits(model, mask)
        kernels.install()
    torch.testing.assert_close(pruned, logits(with_b_zero_and_d_one(model, gone), mask), **CLOSE)
    torch.testing.assert_close(pruned, stock, **CLOSE)
    assert (pruned - logits(model, mask)).abs().max() > 0.02


def test_without_a_transformer_block_equals_a_zeroed_linear() -> None:
    model = zamba2()
    with removed(model, parse("transformer_block:2")):
        pruned = logits(model, PADDED)
    torch.nn.init.zeros_(model.model.layers[4].linear.weight)
    torch.testing.assert_close(pruned, logits(model, PADDED), **CLOSE)


def test_without_channels_equals_zeroed_weights_in_an_untied_model() -> None:
    model = zamba2()
    with removed(model, parse("mlp_channels:2/40")):
        pruned = logits(model)
    untie(model)
    with torch.no_grad():
        model.model.layers[4].shared_transformer.feed_forward.down_proj.weight[:, 40:] = 0
    torch.testing.assert_close(pruned, logits(model), **CLOSE)


@pytest.mark.parametrize(("gone", "pieces"), [([], [3] * 7 + [1]), (["mlp_channels:2/40"], [5, 5, 5, 5, 2])])
def test_a_wide_mlp_in_slices_of_tokens_equals_the_whole(
    monkeypatch: pytest.MonkeyPatch, gone: list[str], pieces: list[int]
) -> None:
    model, tokens = zamba2(), []
    model.model.layers[4].shared_transformer.feed_forward.act_fn.register_forward_pre_hook(
        lambda _, inputs: tokens.append(inputs[0].shape[:-1].numel())
    )
    with removed(model, parse(*gone)):
        whole = logits(model)
        monkeypatch.setattr(slices, "CACHE", 5 * 80 * 4)  # of gate and up for five tokens with 40 channels
        sliced = logits(model)
        model(IDS).logits.sum().backward()
    torch.testing.assert_close(sliced, whole, rtol=1e-5, atol=1e-5)
    assert tokens == [IDS.numel(), *pieces, IDS.numel()], "in one piece, in slices, in one piece with gradients"


@pytest.mark.parametrize(
    ("outer", "inner", "both"),
    [
        (["mha:1"], ["mlp:1"], ["mha:1", "mlp:1"]),
        (["mlp_channels:0/48"], ["mlp_channels:0/32"], ["mlp_channels:0/32"]),
        (["transformer_block:1"], ["mamba_block:3"], ["transformer_block:1", "mamba_block:3"]),
        (["mamba_block:3"], ["transformer_block:1"], ["transformer_block:1", "mamba_block:3"]),
    ],
)
def test_removal_within_removal(outer: list[str], inner: list[str], both: list[str]) -> None:
    model = zamba2()
    with removed(model, parse(*outer)), removed(model, parse(*inner)):
        nested = logits(model)
    with removed(model, parse(*both)):
        assert torch.equal(nested, logits(model))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_restored_bit_for_bit(fails: bool) -> None:
    model = zamba2()
    before, modules, marks = logits(model), list(model.modules()), fingerprint(model)
    for gone in (REMOVALS[-1], REMOVALS[-2], [str(c) for c in components(model, "ssm")]):
        try:
            with removed(model, parse(*gone)), removed(model, parse("mlp:3" if "mha:2" in gone else "mamba_block:2")):
                assert list(model.modules()) != modules
                if fails:
                    raise KeyboardInterrupt
        except KeyboardInterrupt:
            assert fails
    assert torch.equal(logits(model), before)
    assert list(model.modules()) == modules
    assert fingerprint(model) == marks


def test_removal_shares_memory_with_the_model() -> None:
    model = zamba2()
    memory = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    with removed(model, parse("ssm:0", "mha:0", "mlp:1", "mlp_channels:2/16", "transformer_block:3", "mamba_block:5")):
        assert {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} <= memory


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize(
    "gone",
    [
        ["mha:0"],
        ["transformer_block:0"],
        ["mha:0", "mha:1", "mha:2", "mha:3"],
        ["mamba_block:1", "mamba_block:2", "ssm:0", "ssm:3", "ssm:6", "mha:1", "mlp:0", "mlp_channels:2/16"],
        ["mamba_block:6", "transformer_block:3"],
    ],
    ids=" ".join,
)
def test_generation_with_a_cache_equals_generation_without(gone: list[str], rope: bool) -> None:
    model = zamba2(rope=rope)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True,
                "return_dict_in_generate": True, "attention_mask": PADDED}  # fmt: skip
    with removed(model, parse(*gone)):
        cached = model.generate(IDS, use_cache=True, **settings)
        uncached = model.generate(IDS, use_cache=False, **settings)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rope", [False, True])
@torch.no_grad()
def test_layer_by_layer_equals_the_model(rope: bool, attention: str) -> None:
    model, gone = zamba2(rope=rope), parse("mha:0", "mamba_block:3", "transformer_block:2", "mlp_channels:3/8")
    model.set_attn_implementation(attention)
    family = family_of(model)
    for without in ([], gone):
        with removed(model, without):
            stream = family.start(model, IDS)
            for layer in family.layers(model):
                stream = family.step(model, layer, stream)
            assert all(len(tensor) == len(IDS) for tensor in stream.values())
            torch.testing.assert_close(model.lm_head(family.finish(model, stream)), logits(model), **CLOSE)


def test_components_are_in_depth_order() -> None:
    model = zamba2()
    assert [str(c) for c in components(model)][2:9] == [
        "mamba_block:1", "ssm:1", "mha:0", "mlp:0", "transformer_block:0", "mlp_channels:0", "mamba_block:2"
    ]  # fmt: skip
    assert len(components(model)) == 2 * 7 + 4 * 4
    assert random_model(family="zamba2", layers=6, hidden_size=32, seed=0, vocab_size=97).config.num_mem_blocks == 2


@pytest.mark.parametrize("positions", [[0], [1, 2], None])
def test_untying_keeps_the_logits(positions: list[int] | None) -> None:
    model = zamba2()
    before, stored = logits(model), model.num_parameters()
    untie(model, positions)
    torch.testing.assert_close(logits(model), before, **CLOSE)
    untied, per_block = logits(model), 3 * 64 * 64 + 64 * 32 + 3 * 64 * 32 + 64 + 32
    model.tie_weights()
    assert torch.equal(logits(model), untied)
    adapter = 4 * (32 + 128)
    copies, merged = {1: (1, 1), 2: (2, 2), 4: (2, 4)}[len(positions or HYBRID)]
    assert model.num_parameters() == stored + copies * per_block - merged * adapter


def test_an_untied_position_stands_alone() -> None:
    model = zamba2()
    untie(model, [0])
    with torch.no_grad():
        model.model.layers[HYBRID[0]].shared_transformer.feed_forward.down_proj.weight.zero_()
    weights = [model.model.layers[index].shared_transformer.feed_forward.down_proj.weight for index in HYBRID]
    assert [bool(weight.any()) for weight in weights] == [False, True, True, True]
    assert weights[1] is weights[3]
    assert weights[0] is not weights[2]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_untied_model_loads_in_stock_transformers(tmp_path: Path) -> None:
    model = zamba2()
    untie(model)
    model.save_pretrained(tmp_path)
    loaded, info = Zamba2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    family_of(loaded).prepare(loaded)
    assert torch.equal(logits(loaded.eval()), logits(model))


@pytest.mark.parametrize("name", ["mamba_block:2", "mamba_block:3", "mha:0", "mlp:1", "transformer_block:3"])
@pytest.mark.parametrize("untied", [[], [1, 2, 3]])
def test_no_gradient_reaches_what_is_called_dead(name: str, untied: list[int]) -> None:
    model = zamba2()
    untie(model, untied)
    component = Component.parse(name)
    dead = family_of(model).dead_parameters(model, component)
    parameters = list(model.parameters())
    with removed(model, [component]):
        model(IDS, use_cache=False).logits.sum().backward()
    assert sum(parameter.numel() for parameter in parameters if parameter.grad is None) == dead


@pytest.fixture(scope="module")
def published() -> PreTrainedModel:
    """Zamba2-2.7B without memory for its weights."""
    config = Zamba2Config(n_mamba_heads=80, num_mem_blocks=2)
    with torch.device("meta"):
        model = Zamba2ForCausalLM(config)
    model.tie_weights()
    return model


BLOCKS = [Component("mamba_block", index) for index in range(54)]
MLPS = [Component("mlp", index) for index in (6, 7, 8)]
CHANNELS = {
    10: {0: 3072, 1: 4096, 2: 8192, 4: 6144, 5: 9216},
    15: {0: 3072, 1: 4096, 2: 7168, 4: 6144},
}
SSMS = [Component("ssm", index) for index in range(33, 51)]


def channels(which: int) -> list[tuple[Component, int]]:
    return [(Component("mlp_channels", position), kept) for position, kept in CHANNELS[which].items()]


@pytest.mark.parametrize(
    ("gone", "percent"),
    [
        (BLOCKS[:7], "10.3846"),
        (BLOCKS[:14], "20.7693"),
        ([*MLPS, *channels(10)], "10.2708"),
        ([*MLPS, *channels(10), *SSMS], "10.2708"),
        ([*BLOCKS[:5], *MLPS, *channels(15)], "15.4802"),
        ([*BLOCKS[:4], *MLPS], "10.3300"),
        ([*BLOCKS[:9], *MLPS], "15.5394"),
        (SSMS, "0.0000"),
    ],
)
def test_ratios_of_the_published_model(published: PreTrainedModel, gone: list[Component], percent: str) -> None:
    assert f"{100 * ratio(published, gone):.4f}" == percent


def test_parameters_of_the_published_model(published: PreTrainedModel) -> None:
    family, table = family_of(published), describe(published)
    assert published.num_parameters() == 2_662_214_560
    assert published.config.hybrid_layer_ids == [6, 12, 18, 24, 30, 36, 42, 47, 51]
    assert family.parameters(published, Component("mamba_block", 6)) == 39_888_240
    assert family.parameters(published, Component("mha", 0)) == 91_750_400
    assert family.parameters(published, Component("mlp", 0)) == 78_643_200
    assert family.parameters(published, Component("transformer_block", 0)) == 170_401_280 + 6_553_600
    assert table.loc["ssm", "parameters_each"] == 533_360
    assert table.loc["mha", "parameters"] == 0  # each block serves several positions
    untied = copy.deepcopy(published)
    untie(untied)
    assert untied.num_parameters() == 3_828_481_440
    assert family.parameters_in_ratio(untied, MLPS) == family.parameters_in_ratio(published, MLPS) == 3_828_481_440
    assert family.dead_parameters(untied, Component("transformer_block", 8)) == 170_401_280 + 6_553_600


@pytest.fixture
def few() -> Calibration:
    """Five short sequences in batches of three and two."""
    return Calibration(list(torch.randint(0, 97, (5, 10), generator=torch.Generator().manual_seed(1)).split(3)))


CHANNEL_STAGE = Stage("mlp_channels", 4, group=16)
SPACES = {
    "mamba_block": [Stage("mamba_block", 3)],
    "ssm": [Stage("ssm", 3)],
    "mha": [Stage("mha", 3)],
    "mlp": [Stage("mlp", 4)],
    "transformer_block": [Stage("transformer_block", 3)],
    "mlp_channels": [Stage("mlp_channels", 5, group=16)],
    "mamba_block & transformer_block": [Stage(("mamba_block", "transformer_block"), 4)],
    "mamba_block & mlp & mha + mlp_channels + ssm": [
        Stage(("mamba_block", "mlp", "mha"), 3), CHANNEL_STAGE, Stage("ssm", 2)
    ],
    "mha + mamba_block & mlp & mlp_channels": [Stage("mha", 1), Stage(("mamba_block", "mlp", "mlp_channels"), 4, 32)],
}  # fmt: skip


@pytest.mark.parametrize("space", SPACES)
def test_fast_finds_the_plan_of_plain(few: Calibration, space: str) -> None:
    model = zamba2()
    before = fingerprint(model)
    plain = search(model, few, SPACES[space], method="plain", progress=False)
    for memory_gib in (1.0, 1e-5):
        fast = search(model, few, SPACES[space], progress=False, memory_gib=memory_gib)
        assert fast.model_dump(exclude={"provenance"}) == plain.model_dump(exclude={"provenance"})
    with removed(model, plain.gone), torch.no_grad():
        losses = [model(batch, labels=batch, use_cache=False).loss for batch in few.batches]
    assert all(loss.isfinite() for loss in losses)
    assert fingerprint(model) == before


@pytest.mark.parametrize("kind", ["mamba_block", "ssm"])
def test_fast_runs_at_most_60_percent_of_the_layers(few: Calibration, kind: str) -> None:
    model = zamba2(layers=4 * LAYERS)
    cost = search(model, Calibration([few.batches[1]]), Stage(kind, 4), progress=False).provenance
    assert cost["layer_runs"] <= 0.6 * cost["layer_runs_plain"]


@pytest.mark.parametrize(
    ("gone", "complaint"),
    [
        (["mha:4"], "mha:4 is not in this zamba2 model, which has 4"),
        (["ssm:7"], "ssm:7 is not in this zamba2 model, which has 7"),
        (["hymba_block:0"], "hymba_block:0 is not in this zamba2"),
        (["transformer_block:1", "mlp:1"], "mlp:1 lies in transformer_block:1"),
        (["mha:1", "transformer_block:1"], "mha:1 lies in transformer_block:1"),
        (["mlp_channels:2/16", "mlp:2"], "mlp_channels:2 lies in mlp:2"),
        (["mamba_block:3", "ssm:3"], "ssm:3 lies in mamba_block:3"),
        (["mha:0", "mha:0"], "mha:0 is removed 2 times"),
    ],
)
def test_what_cannot_go_is_refused_before_anything_changes(gone: list[str], complaint: str) -> None:
    model = zamba2()
    modules = list(model.modules())
    with pytest.raises(PlanError, match=complaint) as caught, removed(model, parse(*gone)):
        pytest.fail("the body ran")
    assert "\n" not in str(caught.value)
    assert list(model.modules()) == modules


def test_attention_and_mlp_of_a_position_can_both_go() -> None:
    model = zamba2()
    with removed(model, parse("mha:0", "mlp:0", "ssm:1", "mamba_block:3", "mha:1")):
        assert logits(model).isfinite().all()


def test_tying_again_leaves_a_masked_model_as_it_is() -> None:
    model = random_model(family="zamba2", layers=8, hidden_size=32, seed=0, vocab_size=64)
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))
    dense = model(ids, use_cache=False).logits
    for gone in ([(Component("mlp_channels", 1), 32)], [Component("mlp", 1), Component("mha", 0)]):
        with removed(model, gone):
            masked = model(ids, use_cache=False).logits
            model.tie_weights()
            assert torch.equal(model(ids, use_cache=False).logits, masked)
    model.tie_weights()
    assert torch.equal(model(ids, use_cache=False).logits, dense)
