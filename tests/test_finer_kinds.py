"""Heads, inner channels and states: zeros as the oracle, extraction, search, accounting, order, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_model_of
from test_surgery import IDS, PADDED, TOLERANCE, error, logits, plan_of, step_by_step
from test_surgery import build as build_stock
from torch import nn
from transformers import Mamba2Config, MambaConfig, PreTrainedModel
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.zamba2 import modeling_zamba2

from shedder_utils import (
    Calibration,
    Component,
    ModelError,
    Plan,
    PlanError,
    Removal,
    Stage,
    components,
    describe,
    extract,
    kernels,
    load_model,
    perplexity,
    removed,
    save_pruned,
    search,
)
from shedder_utils.channels import order_channels
from shedder_utils.components import Cut
from shedder_utils.families import family_of, random_model
from shedder_utils.inventory import parameters_removed
from shedder_utils.loading import fingerprint

SIZE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "pad_token_id": 0, "bos_token_id": 0,
        "eos_token_id": 0, "use_bias": True}  # fmt: skip
WITH_BIASES = {
    "mamba_biased": MambaConfig(**SIZE, state_size=6, expand=1),
    "mamba2_biased": Mamba2Config(**SIZE, state_size=12, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
}
FUSED = {
    modeling_mamba: "mamba_inner_fn", modeling_falcon_mamba: "mamba_inner_fn",
    modeling_mamba2: "mamba2_split_conv1d_scan_combined", modeling_zamba2: "mamba2_split_conv1d_scan_combined",
}  # fmt: skip
FINER = {
    "mamba": ("inner_channels", "states"), "falcon_mamba": ("inner_channels", "states"), "mamba2": ("heads", "states"),
    "zamba2": ("heads", "states"),
}  # fmt: skip
ALONE = [
    *((family, cut) for family in ("mamba", "falcon_mamba") for cut in ("inner_channels:1/41", "states:2/5")),
    *(("mamba_biased", cut) for cut in ("inner_channels:3/1", "states:0/1")),
    *(("mamba2", cut) for cut in ("heads:1/2", "states:2/7", "states:3/1")),
    *(("mamba2_biased", cut) for cut in ("heads:1/7", "heads:2/1", "states:0/5")),
    *(("zamba2", cut) for cut in ("heads:0/2", "heads:3/2", "states:4/9")),
]
"""One cut each; layers 3 and 4 of the Zamba2 model are hybrid. Widths that 16 does not divide among them."""
TOGETHER = [
    *((f, "states:0/3 inner_channels:0/48 inner_channels:2/37 mamba_block:1") for f in ("mamba", "falcon_mamba")),
    *((f, "inner_channels:1/50 ssm:1 states:3/5 ssm:4 inner_channels:4/16") for f in ("mamba", "falcon_mamba")),
    ("mamba2", "heads:0/2 mamba_block:1 states:0/8 heads:4/2 states:5/3"),
    ("mamba2_biased", "heads:1/3 ssm:1 ssm:2 heads:2/6 states:3/5 heads:3/5"),
    ("zamba2", "heads:0/2 states:0/8 heads:3/2 mha:1 mlp:2 mamba_block:5 mlp_channels:0/16"),
    ("zamba2", "ssm:1 heads:1/2 transformer_block:0 mamba_block:0 states:6/5 heads:6/2"),
]


def build(family: str) -> PreTrainedModel:
    """A random model whose every tensor matters."""
    return random_model_of(WITH_BIASES[family]) if family in WITH_BIASES else build_stock(family)


def mixer_of(model: PreTrainedModel, index: int) -> Any:
    if model.config.model_type != "zamba2":
        return model.backbone.layers[index].mixer
    layer = model.model.layers[index]
    return getattr(layer, "mamba_decoder", layer).mamba


@torch.no_grad()
def with_zeros(model: PreTrainedModel, cut: Cut) -> PreTrainedModel:
    """A dense model in which a cut's last parts give 0: x after its convolution, or B and C."""
    dense = copy.deepcopy(model)
    mixer = mixer_of(dense, cut.component.index)
    E, N, groups = mixer.intermediate_size, mixer.ssm_state_size, getattr(mixer, "n_groups", 1)
    if cut.component.kind == "inner_channels":
        gone = [torch.arange(cut.kept, E)]
    elif cut.component.kind == "heads":
        gone = [torch.arange(E).view(groups, -1)[:, cut.kept * mixer.head_dim // groups :].flatten()]
    else:
        begins = (mixer.time_step_rank,) if hasattr(mixer, "x_proj") else (E,)
        states = torch.arange(groups * N).view(groups, N)[:, cut.kept :].flatten()
        gone = [begin + part * groups * N + states for begin in begins for part in (0, 1)]
    for rows in gone:
        if cut.component.kind == "states" and hasattr(mixer, "x_proj"):
            mixer.x_proj.weight[rows] = 0
        else:
            mixer.conv1d.weight[rows] = 0
            mixer.conv1d.bias[rows] = 0
    return dense


@pytest.mark.parametrize(("family", "cut"), ALONE)
def test_without_parts_equals_zeros_in_the_dense_model(family: str, cut: str) -> None:
    model, gone = build(family), Cut.parse(cut)
    before, marks, modules = logits(model), fingerprint(model), list(model.modules())
    with removed(model, [gone]):
        found, padded = logits(model), logits(model, PADDED)
    dense = with_zeros(model, gone)
    assert error(found, logits(dense)) < TOLERANCE
    assert error(padded, logits(dense, PADDED)) < TOLERANCE
    assert error(found, before) > 100 * TOLERANCE
    assert torch.equal(logits(model), before)
    assert fingerprint(model) == marks
    assert list(model.modules()) == modules


@pytest.mark.parametrize(("family", "gone"), [*ALONE, *TOGETHER])
def test_extracted_and_loaded_it_computes_the_same(family: str, gone: str, tmp_path: Path) -> None:
    model = build(family)
    plan = plan_of(model, gone)
    with removed(model, plan.gone):
        wanted, padded = logits(model), logits(model, PADDED)
    pruned = extract(model, plan)
    save_pruned(pruned, tmp_path)
    for smaller in (pruned, load_model(tmp_path, tokenizer=False)[0]):
        assert error(logits(smaller), wanted) < TOLERANCE
        assert error(logits(smaller, PADDED), padded) < TOLERANCE
        assert error(step_by_step(smaller, torch.ones_like(IDS))[0], wanted) < TOLERANCE
        assert error(step_by_step(smaller, PADDED)[0][PADDED.bool()], padded[PADDED.bool()]) < TOLERANCE
    for parameter in pruned.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
    assert "/number left" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(("family", "gone"), [case for case in [*ALONE, *TOGETHER] if "ssm" not in case[1]])
def test_what_goes_is_counted_to_the_last_parameter(family: str, gone: str) -> None:
    model = build(family)
    own = [cut for cut in map(Cut.parse, gone.split()) if cut.component.kind in FINER[model.config.model_type]]
    plan = plan_of(model, " ".join(map(str, own)))
    assert parameters_removed(model, own) == model.num_parameters() - extract(model, plan).num_parameters()
    assert parameters_removed(model, plan_of(model, gone).gone) > parameters_removed(model, own) or gone == str(own[0])


def test_shapes_and_caches_shrink() -> None:
    mamba = extract(build("mamba"), plan_of(build("mamba"), "inner_channels:0/41 states:0/5"))
    shapes = {name: tuple(p.shape) for name, p in mamba.backbone.layers[0].mixer.named_parameters()}
    assert shapes == {
        "in_proj.weight": (82, 32), "conv1d.weight": (41, 1, 4), "conv1d.bias": (41,), "x_proj.weight": (2 + 10, 41),
        "dt_proj.weight": (41, 2), "dt_proj.bias": (41,), "A_log": (41, 5), "D": (41,), "out_proj.weight": (32, 41),
    }  # fmt: skip
    mamba2 = extract(build("mamba2"), plan_of(build("mamba2"), "heads:0/2 states:0/7"))
    shapes = {name: tuple(p.shape) for name, p in mamba2.backbone.layers[0].mixer.named_parameters()}
    assert shapes == {
        "in_proj.weight": (32 + 32 + 28 + 2, 32), "conv1d.weight": (60, 1, 4), "conv1d.bias": (60,), "A_log": (2,),
        "D": (2,), "dt_bias": (2,), "norm.weight": (32,), "out_proj.weight": (32, 32),
    }  # fmt: skip
    held = [step_by_step(model, torch.ones_like(IDS))[1] for model in (mamba, mamba2)]
    assert [tuple(cache.get_recurrent_state(0, 0).shape) for cache in held] == [(2, 41, 5), (2, 2, 16, 7)]
    assert [tuple(cache.get_conv_state(0, 0).shape) for cache in held] == [(2, 41, 4), (2, 60, 4)]


def test_a_head_that_gives_nothing_goes_without_a_trace() -> None:
    model = with_zeros(build("mamba2"), Cut.parse("heads:2/2"))
    before = logits(model)
    with removed(model, [Cut.parse("heads:2/2")]):
        assert error(logits(model), before) < TOLERANCE


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2_biased", "zamba2"])
def test_the_scans_take_uneven_widths(family: str) -> None:
    model = build(family)
    wide, states = ("heads", 2) if "2" in family else ("inner_channels", 37), 5
    with removed(model, [(Component(wide[0], 1), wide[1]), (Component("states", 1), states)]):
        ours, decoded = logits(model), step_by_step(model, torch.ones_like(IDS))[0]
        kernels.uninstall()
        try:
            stock = logits(model)
        finally:
            kernels.install()
    assert error(ours, stock) < TOLERANCE
    assert error(decoded, stock) < TOLERANCE


@pytest.mark.parametrize(("family", "gone"), [TOGETHER[0], TOGETHER[1], TOGETHER[4], TOGETHER[6]])
def test_training_goes_around_fused_kernels(family: str, gone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside them the norms would be of the dense kind. A mixer that is whole still asks for them."""
    model = build(family)
    asked: list[int] = []
    for module, name in FUSED.items():
        monkeypatch.setattr(module, name, lambda *_, **__: asked.append(1))
    narrowed = extract(model, plan_of(model, gone)).train()
    narrowed(IDS, use_cache=False).logits.square().sum().backward()
    assert [name for name, parameter in narrowed.named_parameters() if not parameter.grad.any()] == []
    whole = [m for m in narrowed.modules() if type(m).__name__.endswith("Mixer")]
    assert len(asked) == len(whole) < model.config.num_hidden_layers
    narrowed.eval()
    assert not any(module.training for module in narrowed.modules())


@pytest.fixture
def few() -> Calibration:
    return Calibration(list(IDS.split(1)))


@pytest.mark.parametrize(
    ("family", "stages"),
    [
        ("mamba", [Stage("inner_channels", 2, 13)]),
        ("falcon_mamba", [Stage("states", 2, 2), Stage("inner_channels", 2, 16)]),
        ("mamba2", [Stage("states", 2, 8), Stage("heads", 2, 2)]),
        ("mamba2_biased", [Stage(("mamba_block", "ssm", "heads"), 3, 4), Stage(("heads", "states"), 2, 4)]),
        ("zamba2", [Stage(("heads", "mlp"), 2, 2), Stage("states", 2, 8)]),
    ],
)
def test_fast_finds_the_plan_of_plain(family: str, stages: list[Stage], few: Calibration, tmp_path: Path) -> None:
    if family == "mamba":
        model = random_model(family="mamba", layers=4, hidden_size=26, seed=0, vocab_size=97)  # 52 = 4 x 13 channels
    else:
        model = build(family)
    fast, plain = (search(model, few, stages, method=method, progress=False) for method in ("fast", "plain"))
    assert fast.components == plain.components
    assert [removal.kept for removal in fast.removals] == [removal.kept for removal in plain.removals]
    assert fast.scores == pytest.approx(plain.scores, rel=1e-5)
    assert sum(removal.parameters for removal in fast.removals) == parameters_removed(model, fast.gone)
    fast.save(tmp_path / "plan.json")
    pruned = extract(model, Plan.load(tmp_path / "plan.json"))
    assert perplexity(pruned, few) == pytest.approx(plain.scores[-1], rel=1e-5)


def test_parts_go_a_group_at_a_time_until_one_group_is_left(few: Calibration) -> None:
    model = build("mamba2")
    plan = search(model, few, Stage("heads", 6, 2), progress=False)
    assert dict(plan.gone) == {Component("heads", layer): 2 for layer in range(6)}
    with pytest.raises(PlanError, match="7 removals of heads were asked for, the model has 6"):
        search(model, few, Stage("heads", 7, 2), progress=False)


@pytest.mark.parametrize("family", list(FINER))
def test_finer_kinds_are_there_where_they_are_asked_for(family: str) -> None:
    model = build(family)
    finer = FINER[family]
    assert not {component.kind for component in components(model)} & set(finer)
    assert set(finer).isdisjoint(family_of(model).kinds)
    assert [str(component) for component in components(model, ("ssm", *finer))][:4] == [
        "ssm:0", f"{finer[0]}:0", f"{finer[1]}:0", "ssm:1"
    ]  # fmt: skip
    pruned = extract(model, plan_of(model, f"{finer[0]}:0/2"))
    assert components(pruned, finer) == []
    assert sum(parameter.numel() for parameter in pruned.parameters()) == pruned.num_parameters()


def test_the_inventory_of_finer_kinds() -> None:
    D, E, N, R, K, H, P, G, tokens = 32, 64, 8, 2, 4, 4, 16, 2, 8
    found = describe(build("mamba"), tokens=tokens, kinds=("inner_channels", "states"))
    assert found.index.tolist() == ["inner_channels", "states", "model"]
    channel, state = 2 * D + K + 1 + R + 2 * N + R + 1 + N + 1 + D, 3 * E
    assert found["parameters_each"].tolist()[:2] == [E * channel, N * state]
    assert found["cache_bytes"].tolist()[:2] == [6 * 4 * E * (N + K), 6 * 4 * E * N]
    flops = [2 * E * (2 * D + K + R + 2 * N + R + D) + 7 * E * N, 2 * E * 2 * N + 7 * E * N]
    assert found["flops_per_token"].tolist()[:2] == pytest.approx([6 * count for count in flops])
    found, N = describe(build("mamba2"), tokens=tokens, kinds=("heads", "states")), 16
    head, state = D * (2 * P + 1) + P * (K + 1) + 3 + P + P * D, 2 * G * (D + K + 1)
    assert found["parameters"].tolist()[:2] == [6 * H * head, 6 * N * state]
    assert found["cache_bytes"].tolist()[:2] == [6 * 4 * H * P * (N + K), 6 * 4 * (H * P * N + 2 * G * N * K)]
    flops = [2 * H * (D * (2 * P + 1) + P * K + P * D) + 5 * H * P * N, 2 * 2 * G * N * (D + K) + 5 * H * P * N]
    assert found["flops_per_token"].tolist()[:2] == pytest.approx([6 * count for count in flops])


@pytest.mark.parametrize(
    ("family", "kind"), [(family, kind) for family in [*FINER, *WITH_BIASES] for kind in FINER[family.split("_b")[0]]]
)
def test_ordering_changes_no_logit_and_puts_the_weakest_last(family: str, kind: str) -> None:
    model = build(family)
    layers, width = range(model.config.num_hidden_layers), family_of(model).channels(model, kind)
    gone = [Cut(Component(kind, layer), 2) for layer in layers]
    before = logits(model)
    with removed(model, gone):
        unordered = logits(model)
    order_channels(model, kind)
    assert error(logits(model), before) < TOLERANCE
    for layer in layers:
        mixer = mixer_of(model, layer)
        E, groups = mixer.intermediate_size, getattr(mixer, "n_groups", 1)
        if kind == "states":
            made_in = mixer.x_proj.weight[2:] if hasattr(mixer, "x_proj") else mixer.in_proj.weight[2 * E :]
            norms = made_in[: 2 * groups * width].abs().sum(1).view(2, groups, width).sum(0)
        else:
            norms = mixer.in_proj.weight[: 2 * E].abs().sum(1).view(2, groups, width // groups, -1).sum((0, 3))
        torch.testing.assert_close(norms, norms.sort(dim=1, descending=True).values)
    with removed(model, gone):
        assert error(logits(model), unordered) > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("family", "gone", "message"),
    [
        (
            "mamba2",
            "heads:0/1",
            "heads:0 keeps 1 of 4 heads: expected a multiple of 2, the groups with their own B and C",
        ),
        ("mamba2", "heads:0/4", "heads:0 keeps 4 of 4 heads: expected 1 to 3"),
        ("mamba2", "states:0", "states:0 keeps 0 of 16 dimensions: expected 1 to 15"),
        ("mamba2", "states:2/8 ssm:2", "states:2 lies in ssm:2, which is removed too"),
        ("mamba", "inner_channels:2/8 mamba_block:2", "inner_channels:2 lies in mamba_block:2, which is removed too"),
        ("mamba", "inner_channels:6/8", "inner_channels:6 is not in this mamba model, which has 6 components"),
        ("mamba", "heads:0/2", "heads:0 is not in this mamba model, which has 0 components of that kind"),
        ("zamba2", "inner_channels:0/2", "inner_channels:0 is not in this zamba2 model"),
        ("hymba", "states:0/2", "states:0 is not in this hymba model"),
    ],
)
def test_what_cannot_go_is_refused_in_one_line(family: str, gone: str, message: str) -> None:
    model = build(family)
    before = logits(model)
    with pytest.raises(PlanError, match=message) as caught, removed(model, map(Cut.parse, gone.split())):
        pass
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (Stage("heads", 1, 1), "group 1 of heads:0: expected a multiple of 2"),
        (Stage("heads", 1, 3), "group 3 does not divide the 4 heads of heads:0"),
        (Stage("states", 1), "group 1024 does not divide the 16 dimensions of states:0"),
        (
            Stage("inner_channels", 1, 2),
            "a mamba2 model has no 'inner_channels' to remove: expected mamba_block, ssm, h",
        ),
    ],
)
def test_stages_that_cannot_be_are_refused_before_work(stage: Stage, message: str, few: Calibration) -> None:
    with pytest.raises(PlanError, match=message):
        search(build("mamba2"), few, stage, progress=False)


def test_what_else_is_refused(tmp_path: Path) -> None:
    model = build("mamba")
    pruned = extract(model, Plan(removals=[Removal(component=Component("states", 1), kept=3)]))
    with pytest.raises(PlanError, match="a mamba model without states:1 cannot be portable"):
        save_pruned(pruned, tmp_path, portable=True)
    save_pruned(pruned, tmp_path)
    settings = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(settings.replace("states:1/3", "states:1/4"))
    with pytest.raises(ModelError, match=r"mismatched tensors, such as .*layers\.1\.mixer"):
        load_model(tmp_path, tokenizer=False)
    for kind, name in (("heads", "mamba"), ("states", "hymba"), ("ssm", "mamba2")):
        with pytest.raises(PlanError, match=f"this {name} model has no '{kind}' that could be ordered"):
            order_channels(build(name), kind)


def test_a_hook_on_a_narrow_mixer_is_not_on_the_whole_one() -> None:
    model, called = build("mamba"), []
    whole: nn.Module = mixer_of(model, 1)
    with removed(model, [Cut.parse("inner_channels:1/16")]):
        mixer_of(model, 1).register_forward_hook(lambda *_: called.append(1))
        logits(model)
    logits(model)
    assert (len(called), len(whole._forward_hooks)) == (1, 0)
