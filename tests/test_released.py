"""What the authors released: pruned checkpoints are the models that `removed()` makes, and their plans are ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import native_reference as reference
import pytest
import torch
from transformers import PreTrainedModel, Zamba2Config, Zamba2ForCausalLM

from shedder_utils import Component, DataError, ModelError, Plan, PlanError, components, describe, paper, removed
from shedder_utils.families import native, random_model
from shedder_utils.inventory import ratio
from shedder_utils.loading import fingerprint, load_model
from shedder_utils.removal import prune

IDS = torch.randint(0, 45, (2, 14), generator=torch.Generator().manual_seed(5))
ZAMBA2 = {
    "pruned_mamba_block_idx": [4, 1],
    "pruned_mha_idx": [1],
    "pruned_mlp_idx": [2, 0],
    "pruned_mlp_channels": {"0": 64, "1": 48, "2": 64},
    "pruned_ssm_idx": [5, 3],
}
HYMBA = {
    "pruned_self_attn_idx": [3],
    "pruned_ssm_idx": [7, 1],
    "pruned_hymba_block_idx": [22, 2],
    "pruned_moe_idx": [9],
    "pruned_mlp_channels": {"0": 5504, "4": 3456},
}


def load(folder: Path) -> PreTrainedModel:
    return load_model(folder, tokenizer=False)[0]


def lacking(kind: str, blocks: tuple[int, ...] = (), ssms: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """The tensors of a native checkpoint without those that the release leaves out."""
    absent = tuple(f"backbone.layers.{index}." for index in blocks)
    absent += tuple(f"backbone.layers.{index}.mixer.{name}" for index in ssms for name in ("D", "dt_bias"))
    tensors = reference.random_tensors(kind)
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(absent)}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize(
    ("kind", "blocks", "ssms"),
    [
        ("Mamba1", (1, 3), ()),
        ("Mamba1", (0, 1, 2), ()),
        ("Mamba2", (0,), ()),
        ("Mamba2", (), (0, 2)),
        ("Mamba2", (1,), (0, 3)),
        ("Mamba2", (), (0, 1, 2, 3)),
        ("Mamba2", (2, 3), (0, 1)),
    ],
)
def test_a_released_checkpoint_is_the_pruned_model(
    kind: str, blocks: tuple[int, ...], ssms: tuple[int, ...], tmp_path: Path
) -> None:
    gone = [*(Component("mamba_block", index) for index in blocks), *(Component("ssm", index) for index in ssms)]
    dense = load(reference.write(tmp_path / "dense", kind, reference.random_tensors(kind)))
    pruned = load(reference.write(tmp_path / "pruned", kind, lacking(kind, blocks, ssms)))
    with removed(dense, gone):
        wanted = logits(dense)
        n_parameters = dense.num_parameters()
    torch.testing.assert_close(logits(pruned), wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(wanted, logits(dense), atol=1e-2)
    assert pruned.num_parameters() == n_parameters
    assert pruned.config.num_hidden_layers == 4 - len(blocks)
    assert pruned.config.pruned == {
        "removed": [str(component) for component in sorted_by_layer(gone)],
        "parameters": dense.num_parameters(),
        "dense": {"num_hidden_layers": 4} if blocks else {},
        "layers": [{"layer": n} | ({"ssm": 0} if n in ssms else {}) for n in range(4) if n not in blocks],
    }


def sorted_by_layer(gone: list[Component]) -> list[Component]:
    return sorted(gone, key=lambda component: component.index)


@pytest.mark.parametrize(("kind", "blocks", "ssms"), [("Mamba1", (1,), ()), ("Mamba2", (3,), (0, 2))])
def test_a_released_checkpoint_generates(
    kind: str, blocks: tuple[int, ...], ssms: tuple[int, ...], tmp_path: Path
) -> None:
    model = load(reference.write(tmp_path, kind, lacking(kind, blocks, ssms)))
    ids = IDS[:1]
    for _ in range(6):
        with torch.no_grad():
            following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, following], dim=1)
    generated = model.generate(
        IDS[:1], attention_mask=torch.ones_like(IDS[:1]), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert generated.tolist() == ids.tolist()


def test_what_is_gone_cannot_be_removed_again(tmp_path: Path) -> None:
    model = load(reference.write(tmp_path, "Mamba2", lacking("Mamba2", (0,), (2,))))
    assert [str(component) for component in components(model)] == [
        "mamba_block:0", "ssm:0", "mamba_block:1", "mamba_block:2", "ssm:2"
    ]  # fmt: skip
    assert describe(model)["count"].to_dict() == {"mamba_block": 3, "ssm": 2, "model": 1}
    with pytest.raises(PlanError, match="ssm:1 is not in this mamba2 model"), removed(model, [Component("ssm", 1)]):
        pass


def test_a_checkpoint_without_blocks_is_saved_as_any_other(tmp_path: Path) -> None:
    model = load(reference.write(tmp_path / "released", "Mamba1", lacking("Mamba1", (0, 2))))
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert fingerprint(again) == fingerprint(model)
    assert again.config.pruned == model.config.pruned
    assert again.config.pruned["removed"] == ["mamba_block:0", "mamba_block:2"]


@pytest.mark.parametrize(
    ("kind", "absent", "message"),
    [
        ("Mamba1", ["1.mixer.D"], "1 missing tensors, such as backbone.layers.1.mixer.D"),
        ("Mamba2", ["1.mixer.D"], "1 missing tensors, such as backbone.layers.1.mixer.D"),
        ("Mamba2", ["1.mixer.D", "1.mixer.dt_bias", "1.mixer.A_log"], "3 missing tensors"),
        ("Mamba2", ["0.", "2.norm"], "1 missing tensors, such as backbone.layers.2.norm.weight"),
        ("Mamba1", ["0.", "1.", "2.", "3."], "40 missing tensors"),
    ],
)
def test_gaps_that_mean_nothing_are_refused(kind: str, absent: list[str], message: str, tmp_path: Path) -> None:
    prefixes = tuple(f"backbone.layers.{name}" for name in absent)
    tensors = {name: t for name, t in reference.random_tensors(kind).items() if not name.startswith(prefixes)}
    with pytest.raises(ModelError, match=message):
        load(reference.write(tmp_path, kind, tensors))


def removals(plan: Plan) -> list[tuple[str, int | None, int]]:
    return [(str(removal.component), removal.kept, removal.stage) for removal in plan.removals]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"pruned_mamba_block_idx": [2, 6, 5]}, [("mamba_block:2", None, 0), ("mamba_block:6", None, 0),
                                                  ("mamba_block:5", None, 0)]),
        ({"pruned_ssm_idx": [63, 54]}, [("ssm:63", None, 0), ("ssm:54", None, 0)]),
        (ZAMBA2, [("mamba_block:4", None, 0), ("mamba_block:1", None, 0), ("mha:1", None, 0), ("mlp:2", None, 0),
                  ("mlp:0", None, 0), ("mlp_channels:1", 48, 1), ("ssm:5", None, 2), ("ssm:3", None, 2)]),
        (HYMBA, [("hymba_block:22", None, 0), ("hymba_block:2", None, 0), ("attention:3", None, 0),
                 ("mlp:9", None, 0), ("mlp_channels:4", 3456, 1), ("ssm:7", None, 2), ("ssm:1", None, 2)]),
        ({"pruned_mlp_channels": {"10": 4096, "2": 10240, "3": 1024}},
         [("mlp_channels:3", 1024, 0), ("mlp_channels:10", 4096, 0)]),
        ({"pruned_mamba_block_idx": []}, []),
    ],
)  # fmt: skip
def test_released_plans_are_read(
    content: dict[str, Any], expected: list[tuple[str, int | None, int]], tmp_path: Path
) -> None:
    assert removals(Plan.from_released(content)) == expected
    (tmp_path / "pruning_config.json").write_text(json.dumps(content))
    assert removals(Plan.from_released(tmp_path / "pruning_config.json")) == expected


def test_a_released_plan_fits_the_models_and_is_saved(tmp_path: Path) -> None:
    model = random_model(family="zamba2", layers=8, hidden_size=16, seed=1, vocab_size=45)
    dense, half = logits(model), model.config.intermediate_size // 2
    plan = Plan.from_released(ZAMBA2 | {"pruned_mlp_channels": {"1": half}})
    with removed(model, plan.gone):
        assert not torch.allclose(logits(model), dense, atol=1e-4)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "it is empty: expected pruned_mamba_block_idx"),
        ({"pruned_head_idx": [1]}, "key 'pruned_head_idx' is unknown"),
        ({"pruned_ssm_idx": 3}, "pruned_ssm_idx: 3 is not a list of indices"),
        ({"pruned_ssm_idx": [3, -1]}, r"pruned_ssm_idx: \[3, -1\] is not a list of indices"),
        ({"pruned_ssm_idx": [True]}, "is not a list of indices"),
        ({"pruned_mha_idx": [3, 1, 3]}, "pruned_mha_idx: 3 is removed more than once"),
        ({"pruned_mlp_channels": [4096]}, r"\[4096\] is not a map from MLP to width"),
        ({"pruned_mlp_channels": {"a": 4096}}, "'a': 4096 is not an MLP and its width"),
        ({"pruned_mlp_channels": {"1": 0}}, "'1': 0 is not an MLP and its width"),
    ],
)
def test_malformed_released_plans_are_refused(content: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    for source in (content, path):
        with pytest.raises(PlanError, match=message) as caught:
            Plan.from_released(source)
        assert "\n" not in str(caught.value)


def test_files_that_are_no_released_plan_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be read"):
        Plan.from_released(tmp_path / "nowhere.json")
    for text, message in (("{", "is not JSON"), ("[1]", "holds a list")):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(PlanError, match=message):
            Plan.from_released(str(tmp_path / "plan.json"))


def full_size(**settings: Any) -> PreTrainedModel:
    """A state-spaces model of full size, without memory for its parameters."""
    config = native.configuration({"d_model": 2560, "n_layer": 64, "vocab_size": 50277} | settings, "full size")
    with torch.device("meta"):
        model = native.model_class(config)(config)
    model.tie_weights()
    return model


def full_size_zamba2() -> PreTrainedModel:
    with torch.device("meta"):
        model = Zamba2ForCausalLM(Zamba2Config(n_mamba_heads=80, num_mem_blocks=2))
    model.tie_weights()
    return model


def percent(model: PreTrainedModel, plan: Plan) -> float:
    """Percent of the parameters that go, as the paper counts them."""
    return round(100 * ratio(model, plan.gone), 2)


def test_the_papers_plans_have_the_papers_ratios() -> None:
    assert paper.plans() == ["mamba-2.8b", "mamba2-2.7b", "zamba2-2.7b-10", "zamba2-2.7b-15", "hymba-1.5b"]
    mamba, mamba2 = full_size(), full_size(ssm_cfg={"layer": "Mamba2"}, pad_vocab_size_multiple=16)
    plan = paper.plan("mamba-2.8b")
    assert [percent(mamba, plan.first(n)) for n in (7, 14)] == [10.43, 20.86]
    assert [percent(mamba2, plan.first(n)) for n in (7, 14)] == [10.42, 20.83]
    assert percent(mamba2, paper.plan("mamba2-2.7b")) == 0.0
    zamba2 = full_size_zamba2()
    assert [percent(zamba2, paper.plan(f"zamba2-2.7b-{n}")) for n in (10, 15)] == [10.27, 15.48]


def test_the_papers_plans_are_its_orders() -> None:
    assert [c.index for c in paper.plan("mamba-2.8b").components[:4]] == [2, 6, 12, 5]
    assert len(paper.plan("mamba2-2.7b")) == 24
    assert paper.plan("hymba-1.5b").components[2] == Component("hymba_block", 15)
    zamba2 = paper.plan("zamba2-2.7b-15")
    assert zamba2.model == {"ref": "Zyphra/Zamba2-2.7B"}
    assert {str(r.component): r.kept for r in zamba2.removals if r.kept} == {
        "mlp_channels:0": 3072, "mlp_channels:1": 4096, "mlp_channels:2": 7168, "mlp_channels:4": 6144
    }  # fmt: skip
    with pytest.raises(DataError, match=r"no plan 'zamba2-2.7b': expected one of mamba-2.8b"):
        paper.plan("zamba2-2.7b")


def test_hymbas_released_plan_removes_the_heads_of_a_model_of_its_depth() -> None:
    """The oracle: output projections that are zero."""
    model = random_model(family="hymba", layers=32, hidden_size=32, seed=1, vocab_size=45)
    dense = logits(model)
    with removed(model, paper.plan("hymba-1.5b").gone):
        pruned = logits(model)
    assert torch.equal(logits(model), dense)
    assert not torch.allclose(pruned, dense, atol=1e-3)
    with torch.no_grad():
        for index in (2, 22, 15, 28, 10, 24, 26):
            model.model.layers[index].mamba.out_proj.weight.zero_()
    torch.testing.assert_close(pruned, logits(model), rtol=1e-4, atol=1e-5)


def test_the_released_model_of_2_2_billion_has_its_parameters() -> None:
    """Mamba-Shedder-Mamba-2.2B: 14 blocks of Mamba-2.8B are gone."""
    model = full_size()
    prune(model, paper.plan("mamba-2.8b").components)
    assert model.num_parameters() == 2_190_927_360
    assert model.config.num_hidden_layers == 50
