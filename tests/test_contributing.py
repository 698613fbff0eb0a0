"""CONTRIBUTING: its worked examples do what they say. An architecture is added, and a study."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from test_readme import GUIDE, ROOT, blocks
from transformers import BambaConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

import shedder_utils as shedder
from shedder_utils import Component, kernels, profiles, removed, report, studies
from shedder_utils.families import FAMILIES, family_of
from shedder_utils.workbench import Workbench

LAST = {"mamba_block": "mamba.out_proj", "mlp": "feed_forward.down_proj"}
"""The projection that each kind's branch ends with."""


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """The guide's family, as a module; registered as long as these tests run."""
    code = blocks(GUIDE, "python")[0]
    assert len(code.splitlines()) < 150
    module = ModuleType("bamba")
    exec(compile(code, "CONTRIBUTING.md", "exec"), vars(module))
    yield module
    del FAMILIES["bamba"]


@pytest.fixture
def model(example: ModuleType) -> PreTrainedModel:
    config = BambaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=2,
        num_key_value_heads=1, attn_layer_indices=[2], mamba_n_heads=4, mamba_d_state=8, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    found = AutoModelForCausalLM.from_config(config).eval()
    kernels.install()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return found


IDS = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def test_stepping_gives_the_models_own_logits(model: PreTrainedModel) -> None:
    family = family_of(model)
    with torch.no_grad():
        stream = family.start(model, IDS)
        for layer in family.layers(model):
            stream = family.step(model, layer, stream)
        torch.testing.assert_close(model.lm_head(family.finish(model, stream)), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mamba_block:1", "mamba_block:4", "mlp:0", "mlp:2"])
def test_removal_is_a_last_projection_of_zero(model: PreTrainedModel, name: str) -> None:
    component = Component.parse(name)
    assert [str(c) for c in shedder.components(model)].count(name) == 1
    before = logits(model)
    with removed(model, [component]):
        found = logits(model)
    assert torch.equal(logits(model), before)
    with torch.no_grad():
        model.get_submodule(f"model.layers.{component.index}.{LAST[component.kind]}").weight.zero_()
    torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)


def test_fast_finds_the_plan_of_plain(model: PreTrainedModel) -> None:
    calibration, stages = shedder.Calibration(list(IDS.split(1))), shedder.Stage(("mamba_block", "mlp"), 3)
    fast, plain = (shedder.search(model, calibration, stages, method=m, progress=False) for m in ("fast", "plain"))
    assert fast.components == plain.components
    assert fast.scores == pytest.approx(plain.scores, rel=1e-5)


def test_extracted_and_loaded_again_it_computes_the_same(model: PreTrainedModel, tmp_path: Path) -> None:
    gone = [Component("mamba_block", 3), Component("mlp", 3), Component("mlp", 1)]
    plan = shedder.Plan(removals=[shedder.Removal(component=component) for component in gone])
    with removed(model, gone):
        masked, score = logits(model), shedder.perplexity(model, shedder.Calibration([IDS]))
    pruned = shedder.extract(model, plan)
    dead = sum(family_of(model).parameters(model, component) for component in gone)
    assert pruned.num_parameters() == model.num_parameters() - dead
    shedder.save_pruned(pruned, tmp_path)
    for smaller in (pruned, shedder.load_model(tmp_path, tokenizer=False)[0]):
        torch.testing.assert_close(logits(smaller), masked, rtol=1e-4, atol=1e-5)
        assert shedder.perplexity(smaller, shedder.Calibration([IDS])) == pytest.approx(score, rel=1e-5)
    alike = [m.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=cached) for m, cached in
             ((pruned, True), (pruned, False))]  # fmt: skip
    assert torch.equal(*alike)


def test_the_added_study_runs_and_has_rows_of_the_paper(tmp_path: Path) -> None:
    profile = yaml.safe_load((profiles.FOLDER / "smoke.yaml").read_text())
    ((name, study),) = yaml.safe_load(blocks(GUIDE, "yaml")[0]).items()
    ((model, rows),) = study["rows"].items()
    assert name not in profile["studies"]
    profile["studies"][name] = study
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(profile, sort_keys=False))
    plan = studies.removal_order(Workbench(file, model, tmp_path / "runs"), name)
    assert [component.kind for component in plan.components][2:] == ["mlp_channels", "ssm"]
    frame = report.table(study["table"], file, tmp_path / "runs").frame
    added = frame[frame["stands_for"].isin(rows.values()) & frame["pruned"].isin(rows)]
    assert set(added["pruned"]) == set(rows)
    assert added["paper"].notna().all()


def test_the_whole_rehearsal_is_scheduled() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "rehearsal.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert workflow[True]["schedule"]  # YAML reads the key `on` as a truth value
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make setup", "make rehearse"]
