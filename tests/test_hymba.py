"""Hymba against its description computed step by step in numpy, its removals, its cache, and the published shape."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from shedder_utils import (
    Calibration,
    Component,
    ModelError,
    PlanError,
    Stage,
    components,
    kernels,
    load_model,
    removed,
    search,
)
from shedder_utils.families import family_of, random_model
from shedder_utils.hymba import HymbaConfig, HymbaForCausalLM
from shedder_utils.loading import fingerprint

META, WINDOW, LAYERS, HEADS, GROUPS, STATE, RANK, WIDTH, CHANNELS = 4, 6, 8, 4, 2, 8, 2, 32, 48
PRODUCER = {2: 1, 5: 4, 6: 4}  # whose keys and values a layer reuses; 0, 3 and 7 are global
CONFIG = HymbaConfig(
    vocab_size=97, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=GROUPS,
    intermediate_size=CHANNELS, num_memory_tokens=META, sliding_window=WINDOW, mamba_d_state=STATE, rms_norm_eps=1e-6,
    global_attn_idx=[0, 3, 7], kv_reuse_group=[[1, 2], [4, 5, 6]], max_position_embeddings=64,
    orig_max_position_embeddings=16, bos_token_id=0, eos_token_id=0, pad_token_id=0,
)  # fmt: skip
IDS = torch.randint(1, 97, (2, 26), generator=torch.Generator().manual_seed(2))
PUBLISHED = {
    "architectures": ["HymbaForCausalLM"], "attention_dropout": 0.0, "attn_hidden_size": -1,
    "attn_implementation": "flex", "attn_implementation_new": "flex",
    "auto_map": {"AutoConfig": "configuration_hymba.HymbaConfig", "AutoModelForCausalLM": "modeling_hymba.X"},
    "bos_token_id": 1, "calc_logits_for_entire_prompt": False, "conv_dim": {str(i): 3200 for i in range(32)},
    "eos_token_id": 2, "global_attn_idx": [0, 15, 31], "hidden_act": "silu", "hidden_size": 1600,
    "initializer_range": 0.02, "intermediate_size": 5504, "kq_head_dim": -1, "kq_norm": "none",
    "kv_reuse_every_i_layer": -1,
    "kv_reuse_group": [
        [1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12], [13, 14], [16, 17, 18], [19, 20], [21, 22], [23, 24],
        [25, 26], [27, 28], [29, 30],
    ],
    "kv_weight_reuse": False, "layer_type": ["h"] * 32, "mamba_conv_bias": True, "mamba_d_conv": 4,
    "mamba_d_state": 16, "mamba_dt_rank": 100, "mamba_expand": 2, "mamba_inner_layernorms": True,
    "mamba_proj_bias": False, "max_position_embeddings": 8192, "memory_tokens_interspersed_every": 0,
    "mlp_hidden_act": "silu", "model_type": "hymba", "num_attention_heads": 25, "num_experts": 1,
    "num_experts_per_tok": 1, "num_hidden_layers": 32, "num_key_value_heads": 5, "num_mamba": 1,
    "num_memory_tokens": 128, "orig_max_position_embeddings": 2048, "output_router_logits": False, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "rope": True, "rope_theta": 10000.0, "rope_type": "ntk", "router_aux_loss_coef": 0.001,
    "seq_length": 8192, "sliding_window": 1024, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.44.0", "use_cache": False, "use_mamba_kernels": True, "v_head_dim": 128,
    "vocab_size": 32001,
}  # fmt: skip


def parse(text: str) -> list[Component]:
    return [Component.parse(part) for part in text.split()]


@pytest.fixture
def model() -> HymbaForCausalLM:
    """A random model whose every tensor matters."""
    kernels.install()
    torch.manual_seed(0)
    model = HymbaForCausalLM(copy.deepcopy(CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def calibration() -> Calibration:
    return Calibration(list(torch.randint(1, 97, (3, 16), generator=torch.Generator().manual_seed(3)).split(2)))


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> HymbaForCausalLM:
    """Hymba-1.5B without values, built from the published config.json."""
    folder = tmp_path_factory.mktemp("hymba")
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


# The description, one token, one head and one channel group at a time, in float64. Nothing here is the package's.


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def turned(x: np.ndarray, place: int) -> np.ndarray:
    """One head (width,) rotated for its place: feature j is paired with feature j + width / 2."""
    half = len(x) // 2
    base = 10000.0 * (2 * 64 / 16 - 1) ** (len(x) / (len(x) - 2))
    out = np.empty_like(x)
    for j in range(half):
        angle = place * base ** (-2 * j / len(x))
        out[j] = x[j] * math.cos(angle) - x[j + half] * math.sin(angle)
        out[j + half] = x[j + half] * math.cos(angle) + x[j] * math.sin(angle)
    return out


def attend(q: np.ndarray, keys: np.ndarray, values: np.ndarray, is_global: bool) -> np.ndarray:
    """(T, H * 16) from q (T, H, 8), keys (T, groups, 8), values (T, groups, 16)."""
    out = np.zeros((len(q), HEADS, values.shape[-1]))
    for i in range(len(q)):
        sees = [j for j in range(i + 1) if is_global or i - j <= WINDOW or j < META]
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = np.array([turned(q[i, head], i) @ keys[j, group] for j in sees]) / math.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[i, head] = sum(w * values[j, group] for w, j in zip(weights / weights.sum(), sees, strict=True))
    return out.reshape(len(q), -1)


def convolve(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    padded = np.vstack([np.zeros((3, x.shape[1])), x])
    return silu(np.array([(padded[t : t + 4] * weight[:, 0].T).sum(0) + bias for t in range(len(x))]))


def scan(x: np.ndarray, gate: np.ndarray, w: dict[str, np.ndarray]) -> np.ndarray:
    state, out = np.zeros((x.shape[1], STATE)), []
    for t in range(len(x)):
        dt, B, C = np.split(x[t] @ w["x_proj.0.weight"].T, [RANK, RANK + STATE])
        dt, B, C = (norm(part, w[f"{n}_layernorm.weight"]) for part, n in ((dt, "dt"), (B, "B"), (C, "C")))
        delta = np.log1p(np.exp(dt @ w["dt_proj.0.weight"].T + w["dt_proj.0.bias"]))
        decay = np.exp(-np.exp(w["A_log.0"]) * delta[:, None])
        state = decay * state + (delta * x[t])[:, None] * B
        out.append((state @ C + w["D.0"] * x[t]) * silu(gate[t]))
    return np.array(out)


def mixer(u: np.ndarray, w: dict[str, np.ndarray], index: int, kept: dict[int, tuple], gone: set[str]) -> np.ndarray:
    p = u @ w["in_proj.weight"].T
    q, x, gate = p[:, :32], p[:, -128:-64], p[:, -64:]
    if index not in PRODUCER:
        k, v = p[:, 32:48].reshape(-1, GROUPS, 8), p[:, 48:80].reshape(-1, GROUPS, 16)
        kept[index] = (np.array([[turned(head, t) for head in k[t]] for t in range(len(k))]), v)
    keys, values = kept[PRODUCER.get(index, index)]
    a = norm(attend(q.reshape(-1, HEADS, 8), keys, values, index in (0, 3, 7)), w["pre_avg_layernorm1.weight"])
    xc = convolve(x, w["conv1d.weight"], w["conv1d.bias"])
    y = norm(scan(xc, gate, w), w["pre_avg_layernorm2.weight"])
    inner = {(): (a + y) / 2, ("attention",): y, ("ssm",): a, ("attention", "ssm"): xc}[tuple(sorted(gone))]
    return inner @ w["out_proj.weight"].T


def described(model: HymbaForCausalLM, ids: torch.Tensor, gone: Iterable[Component] = (), kept: int = 0) -> np.ndarray:
    """Logits (L, V) of one sequence; `kept`: MLP channels that stay where mlp_channels goes."""
    tensors = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}
    gone, shared = set(gone), {}
    h = np.vstack([tensors["model.memory_tokens"], tensors["model.embed_tokens.weight"][ids.numpy()]])
    for i in range(LAYERS):
        here = f"model.layers.{i}."
        w = {name.removeprefix(here): tensor for name, tensor in tensors.items() if name.startswith(here)}
        if Component("hymba_block", i) not in gone:
            heads = {name.removeprefix("mamba."): tensor for name, tensor in w.items() if name.startswith("mamba.")}
            without = {kind for kind in ("attention", "ssm") if Component(kind, i) in gone}
            h = h + mixer(norm(h, w["input_layernorm.weight"]), heads, i, shared, without)
        if Component("mlp", i) not in gone:
            width = kept if Component("mlp_channels", i) in gone else CHANNELS
            n = norm(h, w["pre_moe_layernorm.weight"])
            gate, up, down = (w[f"moe.experts.0.{part}_proj.weight"] for part in ("gate", "up", "down"))
            h = h + (silu(n @ gate[:width].T) * (n @ up[:width].T)) @ down[:, :width].T
    return norm(h, tensors["model.final_layernorm.weight"])[META:] @ tensors["model.embed_tokens.weight"].T


def logits(model: HymbaForCausalLM, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **inputs).logits


def in_pieces(model: HymbaForCausalLM, ids: torch.Tensor, sizes: Iterable[int], **first: Any) -> torch.Tensor:
    """Logits of a sequence read with a cache, so many tokens at a time, then one by one."""
    cache, outputs, begin = None, [], 0
    with torch.no_grad():
        for size in [*sizes, *[1] * (ids.shape[1] - sum(sizes))]:
            inputs = first if cache is None else {}
            output = model(ids[:, begin : begin + size], past_key_values=cache, use_cache=True, **inputs)
            cache, begin = output.past_key_values, begin + size
            outputs.append(output.logits)
    return torch.cat(outputs, dim=1)


def assert_close(actual: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=torch.float32), rtol=1e-4, atol=2e-4)


def test_prefill_equals_the_description(model: HymbaForCausalLM) -> None:
    for row in range(2):
        assert_close(logits(model)[row], described(model, IDS[row]))


@pytest.mark.parametrize("sizes", [(1,), (5,), (20,), (3, 9, 2)], ids=str)
def test_reading_with_a_cache_equals_the_description(model: HymbaForCausalLM, sizes: tuple[int, ...]) -> None:
    assert_close(in_pieces(model, IDS, sizes)[1], described(model, IDS[1]))


def test_the_cache_holds_the_window_and_the_meta_tokens(model: HymbaForCausalLM) -> None:
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
    sizes = [layer.keys.shape[2] if getattr(layer, "keys", None) is not None else 0 for layer in cache.layers]
    everything, some = META + IDS.shape[1], META + WINDOW
    assert sizes == [everything, some, 0, everything, some, 0, 0, everything]
    assert cache.get_seq_length() == IDS.shape[1]


def test_left_padding_changes_nothing(model: HymbaForCausalLM) -> None:
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :9], mask[0, :9] = 0, 0
    expected = described(model, IDS[0, 9:])
    assert_close(logits(model, ids, attention_mask=mask)[0, 9:], expected)
    assert_close(logits(model, ids, attention_mask=mask)[1], described(model, IDS[1]))
    assert_close(in_pieces(model, ids, (11,), attention_mask=mask[:, :11])[0, 9:], expected)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_with_a_cache_equals_generation_without(model: HymbaForCausalLM, beams: int, padded: bool) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0 if padded else 1
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(IDS, attention_mask=mask, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(IDS, attention_mask=mask, use_cache=False, **settings))
    if padded:
        alone = model.generate(IDS[:1, 5:], use_cache=True, **settings)
        assert torch.equal(cached[0, 5:], alone[0])


REMOVALS = {
    "blocks": "hymba_block:2 hymba_block:3",
    "first and last block": "hymba_block:0 hymba_block:7",
    "all free blocks": "hymba_block:0 hymba_block:2 hymba_block:3 hymba_block:6 hymba_block:7",
    "attention of a producer, a consumer, a global layer": "attention:1 attention:6 attention:3",
    "ssms": "ssm:0 ssm:1 ssm:2 ssm:6",
    "attention and ssm together": "attention:0 ssm:0 attention:4 ssm:4 attention:5 ssm:5",
    "mlps": "mlp:0 mlp:4 mlp:6",
    "channels": "mlp_channels:0 mlp_channels:5",
    "some of each": "hymba_block:2 mlp:2 attention:3 ssm:5 mlp_channels:3",
}


@pytest.mark.parametrize("gone", REMOVALS.values(), ids=REMOVALS)
def test_removal_equals_the_description(model: HymbaForCausalLM, gone: str) -> None:
    listed = parse(gone)
    dense, expected = logits(model), described(model, IDS[0], listed, kept=16)
    cut = [(component, 16) if component.kind == "mlp_channels" else component for component in listed]
    with removed(model, cut):
        assert_close(logits(model)[0], expected)
        assert_close(in_pieces(model, IDS[:1], (7,))[0], expected)
        assert not torch.allclose(logits(model), dense, atol=1e-2)
    with removed(model, cut[::2]), removed(model, cut[1::2]):
        assert_close(logits(model)[0], expected)


def test_the_model_is_restored_bit_for_bit(model: HymbaForCausalLM) -> None:
    before, modules, marks = logits(model), list(model.modules()), fingerprint(model)
    with removed(model, parse("hymba_block:2 attention:3 ssm:3 mlp:4")):
        assert list(model.modules()) != modules
        with pytest.raises(KeyboardInterrupt), removed(model, parse("hymba_block:6 ssm:5")):
            raise KeyboardInterrupt
    assert torch.equal(logits(model), before)
    assert list(model.modules()) == modules
    assert fingerprint(model) == marks


@pytest.mark.parametrize(
    ("gone", "complaint"),
    [
        ("hymba_block:1", "hymba_block:1 cannot go: layer 2 reuses its keys and values"),
        ("hymba_block:4 hymba_block:6", "hymba_block:4 cannot go: layer 5 reuses its keys and values"),
        ("hymba_block:5", r"hymba_block:5 cannot go: of the layers \[4, 5, 6\]"),
        ("hymba_block:2 hymba_block:1", r"hymba_block:1 cannot go: of the layers \[1, 2\]"),
        ("hymba_block:2 ssm:2", "ssm:2 lies in hymba_block:2"),
        ("hymba_block:8", "hymba_block:8 is not in this hymba model"),
    ],
)
def test_what_cannot_go_is_refused_before_anything_changes(model: HymbaForCausalLM, gone: str, complaint: str) -> None:
    modules = list(model.modules())
    with pytest.raises(PlanError, match=complaint) as caught, removed(model, parse(gone)):
        pytest.fail("the body ran")
    assert "\n" not in str(caught.value)
    assert list(model.modules()) == modules


def test_such_a_block_may_go_after_the_others_if_that_is_configured(
    model: HymbaForCausalLM, calibration: Calibration
) -> None:
    model.config.all_blocks_removable = True
    with pytest.raises(PlanError, match="layer 5 reuses"), removed(model, parse("hymba_block:4 hymba_block:6")):
        pytest.fail("the body ran")
    gone = parse("hymba_block:2 hymba_block:1 hymba_block:6 hymba_block:4 hymba_block:5")
    with removed(model, gone):
        assert_close(logits(model)[0], described(model, IDS[0], gone))
    plans = [search(model, calibration, Stage("hymba_block", 8), method=m, progress=False) for m in ("plain", "fast")]
    assert plans[0].removals == plans[1].removals
    assert plans[0].components.index(Component("hymba_block", 1)) > plans[0].components.index(
        Component("hymba_block", 2)
    )


@pytest.mark.parametrize(
    ("stages", "memory_gib", "most"),
    [
        ([Stage("hymba_block", 4)], 1.0, 0.6),
        ([Stage("hymba_block", 4)], 1e-12, math.inf),
        ([Stage("ssm", 3)], 1.0, 0.6),
        ([Stage("attention", 3)], 1.0, 0.6),
        ([Stage("mlp", 3)], 1.0, 0.7),
        ([Stage("mlp_channels", 3, 16)], 1.0, 0.7),
        ([Stage(("hymba_block", "attention", "mlp"), 2), Stage("ssm", 2), Stage("mlp_channels", 2, 16)], 1.0, 0.7),
    ],
    ids=["blocks", "blocks, nothing kept", "ssms", "attention", "mlps", "channels", "stages"],
)
def test_fast_finds_the_plan_of_plain(
    model: HymbaForCausalLM, calibration: Calibration, stages: list[Stage], memory_gib: float, most: float
) -> None:
    """`most`: what part of the layer runs of the plain search the fast one may need."""
    plain = search(model, calibration, stages, method="plain", progress=False)
    fast = search(model, calibration, stages, method="fast", progress=False, memory_gib=memory_gib)
    assert fast.removals == plain.removals
    assert fast.dense_score == plain.dense_score
    assert fast.provenance["layer_runs"] <= most * plain.provenance["layer_runs"]


def test_the_published_configuration_gives_the_published_model(published: HymbaForCausalLM) -> None:
    assert type(published) is HymbaForCausalLM
    assert published.num_parameters() == 1_522_797_824
    shapes = {name: tuple(tensor.shape) for name, tensor in published.state_dict().items()}
    assert len(shapes) == 32 * 19 + 4
    assert shapes["model.memory_tokens"] == (128, 1600)
    assert shapes["model.final_layernorm.weight"] == (1600,)
    prefix = "model.layers.2."
    layer = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    assert layer == {
        "input_layernorm.weight": (1600,), "pre_moe_layernorm.weight": (1600,), "mamba.in_proj.weight": (8000, 1600),
        "mamba.conv1d.weight": (3200, 1, 4), "mamba.conv1d.bias": (3200,), "mamba.x_proj.0.weight": (132, 3200),
        "mamba.dt_proj.0.weight": (3200, 100), "mamba.dt_proj.0.bias": (3200,), "mamba.A_log.0": (3200, 16),
        "mamba.D.0": (3200,), "mamba.dt_layernorm.weight": (100,), "mamba.B_layernorm.weight": (16,),
        "mamba.C_layernorm.weight": (16,), "mamba.pre_avg_layernorm1.weight": (3200,),
        "mamba.pre_avg_layernorm2.weight": (3200,), "mamba.out_proj.weight": (1600, 3200),
        "moe.experts.0.gate_proj.weight": (5504, 1600), "moe.experts.0.up_proj.weight": (5504, 1600),
        "moe.experts.0.down_proj.weight": (1600, 5504),
    }  # fmt: skip
    assert shapes["model.layers.1.mamba.in_proj.weight"] == (8960, 1600)


def test_without_lists_the_layers_are_arranged_as_published() -> None:
    config = HymbaConfig()
    assert config.global_attn_idx == PUBLISHED["global_attn_idx"]
    assert config.kv_reuse_group == PUBLISHED["kv_reuse_group"]


def test_accounting_of_the_published_model(published: HymbaForCausalLM) -> None:
    family = family_of(published)
    free = [component.index for component in components(published, "hymba_block")]
    assert free == [0, 2, 4, 6, 8, 10, 12, 14, 15, 18, 20, 22, 24, 26, 28, 30, 31]
    sizes = [family.parameters(published, Component("hymba_block", i)) for i in (2, 22, 15, 28, 10, 24, 26)]
    assert (sum(sizes[:6]), sum(sizes)) == (113_991_192, 132_733_724)
    assert family.dead_parameters(published, Component("ssm", 3)) == 11_059_332
    norm_and_queries = 3200 + 1600 * 1600
    assert family.dead_parameters(published, Component("attention", 3)) == norm_and_queries  # layer 4 reuses k and v
    assert family.dead_parameters(published, Component("attention", 15)) == norm_and_queries + 960 * 1600


@pytest.mark.parametrize("kind", ["attention", "ssm"])
@pytest.mark.parametrize("index", [3, 4, 6])
def test_no_gradient_reaches_what_is_called_dead(model: HymbaForCausalLM, kind: str, index: int) -> None:
    total = sum(parameter.numel() for parameter in model.model.layers[index].mamba.parameters())
    with removed(model, [Component(kind, index)]):
        live = model.model.layers[index].mamba
        logits_ = model(IDS, use_cache=False).logits
        logits_.sum().backward()
        assert all(parameter.grad is not None for parameter in live.parameters())
        left = sum(parameter.numel() for parameter in live.parameters())
    assert family_of(model).dead_parameters(model, Component(kind, index)) == total - left


def test_a_gradient_reaches_every_parameter(model: HymbaForCausalLM) -> None:
    output = model.train()(IDS, labels=IDS)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.past_key_values is None
    output.loss.backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.any()] == []


def test_our_scans_and_those_of_transformers_give_the_same_logits_with_a_cache(model: HymbaForCausalLM) -> None:
    ours = in_pieces(model, IDS, (9,))
    assert kernels.active() == "shedder-numba"
    kernels.uninstall()
    try:
        assert_close(in_pieces(model, IDS, (9,)), ours)
    finally:
        kernels.install()
    assert ours.any()


def test_a_new_model_starts_with_the_scan_of_mamba() -> None:
    model = random_model(family="hymba", layers=6, hidden_size=32, seed=1, vocab_size=97)
    for layer in model.model.layers:
        decay = -torch.exp(layer.mamba.A_log[0])
        torch.testing.assert_close(decay, -torch.arange(1.0, 17.0).expand_as(decay))
        step = torch.nn.functional.softplus(layer.mamba.dt_proj[0].bias)
        assert 0.9e-3 < step.min() < step.max() < 1.1e-1
        assert (layer.mamba.D[0] == 1).all()
    assert model.model.memory_tokens.std().item() == pytest.approx(0.02, rel=0.3)


def test_saving_and_loading_keep_the_logits(model: HymbaForCausalLM, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path, tokenizer=False)
    assert type(again) is HymbaForCausalLM
    assert torch.equal(logits(again), logits(model))
    tensors = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in tensors
    del tensors["model.layers.1.mamba.A_log.0"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing tensors, such as model.layers.1.mamba.A_log.0"):
        load_model(tmp_path, tokenizer=False)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"num_experts": 4}, "num_experts is 4, only 1 is implemented"),
        ({"rope_type": "linear"}, "rope_type is 'linear'"),
        ({"kv_reuse_group": [[1, 3]]}, "is not a run of neighbouring layers"),
        ({"kv_reuse_group": [[14, 15]]}, "is not a run of neighbouring layers"),
        ({"num_attention_heads": 24}, "24 heads must divide"),
    ],
)
def test_a_variant_that_is_not_implemented_is_refused(tmp_path: Path, changed: dict[str, Any], complaint: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | changed))
    with pytest.raises(ModelError, match=complaint) as caught:
        load_model(tmp_path, tokenizer=False)
    assert "\n" not in str(caught.value)
