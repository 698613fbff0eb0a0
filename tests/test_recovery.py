"""Recovery tuning: every adapter trains and shows in every forward path, the best is kept, a kill loses nothing."""

from __future__ import annotations

import copy
import gc
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.mamba2 import modeling_mamba2
from world import World

from shedder_utils import (
    DataError,
    ModelError,
    Plan,
    PlanError,
    ProfileError,
    RecordError,
    Removal,
    components,
    extract,
    kernels,
    load_model,
    paper,
    profiles,
    records,
    recover,
    recovery,
    recovery_study,
    removed,
    report,
    save_pruned,
    studies,
    tuning,
)
from shedder_utils.adapters import attach, has_adapters, merge
from shedder_utils.families import random_model
from shedder_utils.instructions import IGNORED, Example, collate, instructions, prompt_of
from shedder_utils.plan import Stage
from shedder_utils.recipe import Recipe
from shedder_utils.records import Metric
from shedder_utils.workbench import Workbench

NOUNS = ("lamp", "brush", "axe", "needle", "ladder", "boat", "coat", "key", "drum", "rope")
ROWS = [
    {"instruction": f"Name the {noun}.", "input": f"A {noun} is here." * (i % 2), "output": f"The {noun} is {other}."}
    for i, (noun, other) in enumerate((noun, other) for noun in NOUNS for other in ("old", "new", "red"))
]  # fmt: skip
WORDS = sorted({word for row in ROWS for word in (prompt_of(row) + row["output"]).replace(".", " .").split()})
KINDS = {"mamba": "ssm", "falcon_mamba": "ssm", "mamba2": "ssm", "zamba2": "mamba_block", "hymba": "hymba_block"}
SMALL = {
    "steps": 6, "batch_size": 2, "held_out": 4, "evaluate_every": 2, "warmup_steps": 1, "learning_rate": 0.01,
    "max_length": 64, "progress": False,
}  # fmt: skip
LORA = {**SMALL, "method": "lora", "rank": 2, "alpha": 4, "loss_on": "all"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word each, with a start-free text and an end token."""
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unknown>", *WORDS, "#"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<unknown>", pad_token="<end>")


def dense(family: str) -> PreTrainedModel:
    kernels.install()
    return random_model(family=family, layers=4, hidden_size=32, seed=0, vocab_size=len(WORDS) + 3)


def pruned(family: str) -> PreTrainedModel:
    model = dense(family)
    gone = components(model, KINDS[family])[-1]
    return extract(model, Plan(removals=[Removal(component=str(gone))], stages=[Stage(KINDS[family], 1)]))


def tokens(model: PreTrainedModel) -> torch.Tensor:
    return torch.randint(2, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(3))


def paths(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The logits of the last token: in training, in evaluation, and in decoding from a cache."""
    ids, found = tokens(model), {}
    with torch.no_grad():
        found["training"] = model.train()(ids, use_cache=False).logits[:, -1]
        found["evaluation"] = model.eval()(ids, use_cache=False).logits[:, -1]
        before = model(ids[:, :-1], use_cache=True)
        name = "cache_params" if "cache_params" in before else "past_key_values"
        found["decoding"] = model(ids[:, -1:], use_cache=True, **{name: before[name]}).logits[:, -1]
    return found


def held_out_loss(model: PreTrainedModel, tokenizer: Any, recipe: Recipe) -> float:
    """The mean loss of the rows that a tuning with this recipe does not train on."""
    held_out = {name: getattr(recipe, name) for name in ("max_length", "held_out", "seed")}
    batch = collate(instructions(ROWS, tokenizer, **held_out).held_out, recipe.loss_on)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], use_cache=False).logits
    total, count = tuning.cross_entropy(logits, batch["labels"])
    return total.item() / count


def same_weights(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("make", [dense, pruned])
@pytest.mark.parametrize("family", list(KINDS))
def test_every_adapter_has_a_gradient_and_shows_in_every_path(family: str, make: Any) -> None:
    model = make(family)
    plain = paths(model)
    targets = ("input", "output", "mlp") if family == "hymba" else ("input", "output")
    attach(model, Recipe.of(method="lora", rank=2, alpha=4, targets=targets))
    adapters = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    n_layers = model.config.num_hidden_layers
    assert len(adapters) >= 2 * n_layers
    assert all(".lora_" in name for name in adapters)
    torch.manual_seed(1)
    for name, tensor in adapters.items():
        if ".lora_B." in name:
            with torch.no_grad():
                tensor.normal_()
            for path, logits in paths(model).items():
                assert (logits - plain[path]).abs().max() > 1e-5, (name, path)
            torch.nn.init.zeros_(tensor)
    for tensor in adapters.values():
        torch.nn.init.normal_(tensor, std=0.1)
    assert kernels.active() == "shedder-numba"
    model.train()(tokens(model), use_cache=False).logits.square().mean().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in adapters.values())
    adapted = paths(model)
    for path in ("training", "decoding"):
        torch.testing.assert_close(adapted[path], adapted["evaluation"], atol=1e-4, rtol=1e-4)
    merge(model)
    for path, logits in paths(model).items():
        torch.testing.assert_close(logits, adapted[path], atol=1e-4, rtol=1e-4)
    assert not has_adapters(model)
    assert not any("lora" in name for name in model.state_dict())
    assert all(tensor.requires_grad for tensor in model.parameters())


def test_adapters_of_a_coarse_model_are_trained_in_float32(tokenizer: Any) -> None:
    model = dense("mamba2").bfloat16()
    tuned = recover(model, tokenizer, ROWS, merge=False, **LORA)
    trained = [tensor for name, tensor in tuned.named_parameters() if ".lora_" in name]
    assert {tensor.dtype for tensor in trained} == {torch.float32}
    assert tuned.config.recovery["best_step"] > 0
    merge(tuned)
    assert {tensor.dtype for tensor in tuned.parameters()} == {torch.bfloat16}
    assert not same_weights(tuned, model)


@pytest.mark.parametrize(("method", "family"), [("full", "zamba2"), ("full", "falcon_mamba"), ("lora", "hymba")])
def test_tuning_lowers_the_held_out_loss_and_leaves_the_model_alone(tokenizer: Any, method: str, family: str) -> None:
    model = pruned(family)
    before, state = paths(model), random.getstate()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tuned = recover(model, tokenizer, ROWS, **{**(LORA if method == "lora" else SMALL), "method": method})
    assert torch.equal(torch.rand(3), expected)
    assert random.getstate() == state
    losses = [point["held_out_loss"] for point in tuned.config.recovery["points"] if "held_out_loss" in point]
    assert len(losses) == 4
    assert losses[-1] < 0.97 * losses[0]
    assert tuned.config.recovery["best_step"] == 6
    assert tuned.config.recovery["stopped"] is None
    assert not tuned.training
    recipe = Recipe(**tuned.config.recovery["recipe"])
    measured = [held_out_loss(one, tokenizer, recipe) for one in (model, tuned)]
    assert measured == pytest.approx([losses[0], min(losses)], rel=1e-3)
    assert tuned.num_parameters() == model.num_parameters()
    assert all(torch.equal(logits, before[path]) for path, logits in paths(model).items())


def test_fused_kernels_stay_out_of_the_way(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With mamba_ssm, training calls one kernel with the raw weight of out_proj: stand in for that."""

    def fused(projected: torch.Tensor, *_: Any, outproj_weight: torch.Tensor, **__: Any) -> torch.Tensor:
        return projected[..., : outproj_weight.shape[1]] @ outproj_weight.T

    kernels.install()
    monkeypatch.setattr(modeling_mamba2, "mamba2_split_conv1d_scan_combined", fused)
    recover(dense("mamba2"), tokenizer, ROWS, **LORA)
    assert modeling_mamba2.mamba2_split_conv1d_scan_combined is fused
    monkeypatch.setattr(recovery, "unfused", nullcontext)
    with pytest.raises(ModelError, match=r"no gradient reaches .*out_proj\.lora_B"):
        recover(dense("mamba2"), tokenizer, ROWS, **LORA)


def test_a_killed_tuning_ends_as_if_nothing_had_happened(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Stopped three times: before any checkpoint, after one, and after the last step."""
    whole = recover(pruned("mamba2"), tokenizer, ROWS, **SMALL)
    loss, calls = tuning.Tuning.compute_loss, 0

    def stop_at(call: int) -> None:
        def interrupted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
            return loss(*arguments, **options)

        monkeypatch.setattr(tuning.Tuning, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            recover(pruned("mamba2"), tokenizer, ROWS, checkpoint=tmp_path, **SMALL)
        monkeypatch.setattr(tuning.Tuning, "compute_loss", loss)

    stop_at(1)
    stop_at(5)
    half = tmp_path / "checkpoint-99"
    half.mkdir()  # as a kill in the middle of writing leaves it
    resumed = recover(pruned("mamba2"), tokenizer, ROWS, checkpoint=tmp_path, **SMALL)
    assert resumed.config.recovery == whole.config.recovery
    assert same_weights(resumed, whole)
    monkeypatch.setattr(tuning.Tuning, "run", lambda *_: pytest.fail("trained again"))
    again = recover(pruned("mamba2"), tokenizer, ROWS, checkpoint=tmp_path, **SMALL)
    assert same_weights(again, whole)
    with pytest.raises(RecordError, match="of another tuning, with another recipe"):
        recover(pruned("mamba2"), tokenizer, ROWS, checkpoint=tmp_path, **{**SMALL, "seed": 7})
    with pytest.raises(RecordError, match="with another model"):
        recover(dense("mamba2"), tokenizer, ROWS, checkpoint=tmp_path, **SMALL)


def test_lora_resumes_as_well(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    whole, loss = recover(dense("hymba"), tokenizer, ROWS, **LORA), tuning.Tuning.compute_loss

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return loss(self, *arguments, **options)

    monkeypatch.setattr(tuning.Tuning, "compute_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recover(dense("hymba"), tokenizer, ROWS, checkpoint=tmp_path, **LORA)
    monkeypatch.setattr(tuning.Tuning, "compute_loss", loss)
    assert same_weights(recover(dense("hymba"), tokenizer, ROWS, checkpoint=tmp_path, **LORA), whole)


@pytest.mark.parametrize("rate", [1e9, 1.0])
def test_a_diverging_tuning_stops_with_one_line_and_keeps_the_best(tokenizer: Any, capsys: Any, rate: float) -> None:
    """The first rate leads to losses that are no numbers, the second to ones far above the start."""
    model = dense("mamba2")
    tuned = recover(model, tokenizer, ROWS, **{**SMALL, "learning_rate": rate, "steps": 20})
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recover:")]
    assert len(said) == 1
    assert "stopped at step" in said[0]
    assert said[0].endswith("kept step 0")
    assert same_weights(tuned, model)
    assert tuned.config.recovery["stopped"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_before_any_update_is_one_line(tokenizer: Any, monkeypatch: Any, loss: float) -> None:
    monkeypatch.setattr(tuning.Tuning, "_held_out_loss", lambda self: loss)
    with pytest.raises(ModelError, match=f"the held-out loss is {loss} before any update") as found:
        recover(dense("mamba2"), tokenizer, ROWS, **SMALL)
    assert "\n" not in str(found.value)


def test_progress_shows_both_losses_and_the_time_left(tokenizer: Any, capsys: Any) -> None:
    recover(dense("mamba2"), tokenizer, ROWS, **{**SMALL, "progress": True})
    lines = re.findall(r"recover: [^\r\n]* (\d)/6 \[\d\d:\d\d<\d\d:\d\d, ([^\r\n]*)\]", capsys.readouterr().err)
    assert {"2", "4", "6"} <= {step for step, _ in lines}
    assert re.search(r"held_out_loss=\d[\d.]*, loss=\d", lines[-1][1])


def test_a_tuning_is_the_same_recipe_on_any_number_of_gpus(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    recipe, arguments = Recipe.of(**{name: SMALL[name] for name in ("steps", "batch_size")}), tuning._arguments
    rows = instructions(ROWS, tokenizer, max_length=64, held_out=4, seed=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(tuning, "_arguments", lambda recipe, folder, _, start: arguments(recipe, folder, False, start))
    args = tuning.Tuning(dense("mamba"), recipe, rows, tmp_path, None, progress=False).args
    assert not args.use_cpu
    assert args.n_gpu <= 1
    assert args.train_batch_size == recipe.batch_size


def test_nothing_holds_the_optimizer_after_a_tuning(tokenizer: Any, monkeypatch: Any) -> None:
    """It is twice the weights: the next tuning needs that memory, before the garbage collector finds any cycle."""
    create, made = tuning.Tuning.create_optimizer, []

    def noted(self: Any, *arguments: Any) -> torch.optim.Optimizer:
        optimizer = create(self, *arguments)
        made.append(weakref.ref(optimizer))
        return optimizer

    monkeypatch.setattr(tuning.Tuning, "create_optimizer", noted)
    gc.disable()
    try:
        model = recover(dense("mamba"), tokenizer, ROWS, **SMALL)
        assert [found() for found in made] == [None]
        assert all(parameter.grad is None for parameter in model.parameters())
    finally:
        gc.enable()


def test_patience_and_the_best_step(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted, kept = iter([3.0, 2.0, 2.5, 2.4, 1.0]), []
    monkeypatch.setattr(tuning.Tuning, "_held_out_loss", lambda self: next(scripted))
    save = tuning.save_trained

    def noted(model: PreTrainedModel, file: Path) -> None:
        if file.name == tuning.BEST:
            kept.append(copy.deepcopy(model))
        save(model, file)

    monkeypatch.setattr(tuning, "save_trained", noted)
    tuned = recover(dense("mamba"), tokenizer, ROWS, **{**SMALL, "steps": 20, "patience": 2})
    assert tuned.config.recovery["best_step"] == 2
    assert [same_weights(tuned, one) for one in kept] == [False, True]
    assert "step 6: 2 held-out losses in a row were no better than 2.000" in tuned.config.recovery["stopped"]


def test_distillation_aims_at_the_dense_model(tokenizer: Any) -> None:
    teacher = recover(dense("mamba2"), tokenizer, ROWS, **{**SMALL, "steps": 12})
    aimed = recover(pruned("mamba2"), tokenizer, ROWS, distill=teacher, **{**SMALL, "steps": 12})
    losses = [point["loss"] for point in aimed.config.recovery["points"] if "loss" in point]
    assert losses[-1] < 0.7 * losses[0]
    itself = recover(teacher, tokenizer, ROWS, distill=teacher, **{**SMALL, "steps": 2, "learning_rate": 1e-12})
    assert all(abs(point["loss"]) < 1e-5 for point in itself.config.recovery["points"] if "loss" in point)
    other = random_model(family="mamba2", layers=2, hidden_size=32, seed=0, vocab_size=50)
    with pytest.raises(ModelError, match="expected a model with the same vocabulary"):
        recover(teacher, tokenizer, ROWS, distill=other, **SMALL)
    with pytest.raises(ModelError, match="the model to distil from is on meta, this one on cpu"):
        recover(teacher, tokenizer, ROWS, distill=copy.deepcopy(teacher).to("meta"), **SMALL)


def test_tuned_models_reload_with_equal_logits(tokenizer: Any, tmp_path: Path) -> None:
    def reloads(model: PreTrainedModel, folder: str) -> None:
        back, _ = load_model(tmp_path / folder, tokenizer=False)
        assert all(torch.equal(logits, paths(model)[path]) for path, logits in paths(back).items())

    control = recover(dense("mamba2"), tokenizer, ROWS, **SMALL)
    control.save_pretrained(tmp_path / "full-dense")
    reloads(control, "full-dense")
    for method, settings in (("full", SMALL), ("merged", LORA)):
        tuned = recover(pruned("hymba"), tokenizer, ROWS, **settings)
        save_pruned(tuned, tmp_path / method)
        reloads(tuned, method)
    save_pruned(pruned("mamba2"), tmp_path / "pruned")
    base, _ = load_model(tmp_path / "pruned", tokenizer=False)
    adapted = recover(base, tokenizer, ROWS, merge=False, **LORA)
    adapted.save_pretrained(tmp_path / "adapters")
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    reloads(adapted, "adapters")
    with pytest.raises(PlanError, match="LoRA adapters"), removed(adapted, components(adapted)[:1]):
        pass
    with pytest.raises(ModelError, match="save_pruned: this model has LoRA adapters"):
        save_pruned(adapted, tmp_path / "both")
    with pytest.raises(ModelError, match="has adapters already"):
        recover(adapted, tokenizer, ROWS, **SMALL)
    save_pruned(pruned("mamba"), tmp_path / "pruned")
    with pytest.raises(ModelError, match="missing, left over or misshapen"):
        load_model(tmp_path / "adapters", tokenizer=False)


def test_rows_of_any_source_become_the_same_examples(tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    lines = "\n".join(map(json.dumps, ROWS))
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    (tmp_path / "rows.jsonl").write_text(lines)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    asked = []
    hub = lambda name, split, revision: (asked.append((name, split, revision)), ROWS)[1]  # noqa: E731
    monkeypatch.setattr("datasets.load_dataset", hub)
    files = [tmp_path / f"rows.{ending}" for ending in ("json", "jsonl", "jsonl.gz")]
    options = {"max_length": 64, "held_out": 5, "seed": 1}
    found = [instructions(source, tokenizer, **options) for source in (ROWS, *files, "yahma/alpaca-cleaned@abc")]
    assert asked == [("yahma/alpaca-cleaned", "train", "abc")]
    assert len({one.fingerprint for one in found}) == 1
    assert (len(found[0].train), len(found[0].held_out)) == (len(ROWS) - 5, 5)
    assert not {one.ids for one in found[0].train} & {one.ids for one in found[0].held_out}
    assert instructions(ROWS, tokenizer, **{**options, "seed": 2}).fingerprint != found[0].fingerprint


def test_the_prompt_is_alpacas_and_the_response_ends(tokenizer: Any) -> None:
    row = ROWS[1]
    assert "paired with an input" in prompt_of(row)
    assert prompt_of(row).endswith("### Input:\nA lamp is here.\n\n### Response:\n")
    assert "### Input" not in prompt_of({"instruction": "Say it.", "output": "it"})
    example = instructions([row] * 2, tokenizer, max_length=99, held_out=1, seed=0).train[0]
    assert tokenizer.decode(example.ids[example.n_prompt :]) == "The lamp is new .<end>".replace("<end>", " <end>")
    cut = instructions([row] * 2, tokenizer, max_length=example.n_prompt + 2, held_out=1, seed=0).train[0]
    assert cut.ids == example.ids[: example.n_prompt + 2]


def test_what_the_loss_counts() -> None:
    long, short = Example((5, 6, 7, 8), 2), Example((9, 4), 1)
    everything, response = (collate([long, short], loss_on) for loss_on in ("all", "response"))
    assert everything["input_ids"].tolist() == response["input_ids"].tolist() == [[5, 6, 7, 8], [9, 4, 0, 0]]
    assert everything["labels"].tolist() == [[5, 6, 7, 8], [9, 4, IGNORED, IGNORED]]
    assert response["labels"].tolist() == [[IGNORED, IGNORED, 7, 8], [IGNORED, 4, IGNORED, IGNORED]]
    logits = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    total, count = tuning.cross_entropy(logits, response["labels"])
    expected = -logits.log_softmax(-1)[[0, 0, 1], [1, 2, 0], [7, 8, 4]].sum()
    assert count == 3
    torch.testing.assert_close(total, expected)


def test_the_defaults_are_the_papers(tokenizer: Any, tmp_path: Path) -> None:
    theirs = paper.hyperparameters()["recovery"]
    for method, model in (("full", "mamba2-2.7b"), ("lora", "zamba2-2.7b")):
        ours = Recipe.of(method=method)
        for name in ("epochs", "batch_size", "learning_rate"):
            assert getattr(ours, name) == theirs[model][name]
        assert (ours.max_length, ours.held_out, ours.warmup_steps) == tuple(
            theirs[name] for name in ("max_length", "held_out", "warmup_steps")
        )
    lora = theirs["zamba2-2.7b"]
    assert (ours.rank, ours.alpha, ours.targets) == (lora["r"], lora["alpha"], ("input", "output"))
    assert (Recipe.of(method="full").patience, ours.patience) == (None, None)
    rows = instructions(ROWS, tokenizer, max_length=64, held_out=4, seed=0)
    optimizer = tuning.Tuning(dense("mamba"), ours, rows, tmp_path, None, progress=False).create_optimizer()
    assert type(optimizer).__name__.lower() == theirs["optimizer"] == "adamw"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"batchsize": 3}, "unknown key 'batchsize', expected one of method, epochs"),
        ({"rank": 4}, "rank belongs to method 'lora'"),
        ({"learning_rate": -1.0}, "learning_rate: Input should be greater than 0"),
        ({"method": "half"}, "method: Input should be 'full' or 'lora'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tokenizer: Any, settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        recover(dense("mamba"), tokenizer, ROWS, **settings)


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (ROWS[:4], "4 of 4 rows have a response within 64 tokens, and 4 were to be held out"),
        ([*ROWS, {"text": "no columns"}], "rows, row 30: expected Alpaca's columns"),
        ("nowhere.jsonl", "nowhere.jsonl: cannot be read"),
    ],
)
def test_data_that_does_not_fit_is_refused(tokenizer: Any, source: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        recover(dense("mamba"), tokenizer, source, **SMALL)


def test_models_that_cannot_be_trained_so_are_refused(tokenizer: Any) -> None:
    model = dense("mamba2")
    with pytest.raises(ModelError, match="masked right now"), removed(model, components(model)[:1]):
        recover(model, tokenizer, ROWS, **SMALL)
    for coarse, settings in ((torch.float16, SMALL), (torch.float16, LORA), (torch.bfloat16, SMALL)):
        with pytest.raises(ModelError, match=f"weights are {str(coarse)[6:]}, too coarse to train: load with"):
            recover(dense("mamba2").to(coarse), tokenizer, ROWS, **settings)
    with pytest.raises(ModelError, match="no projections of role 'mlp': expected some of input, output"):
        recover(model, tokenizer, ROWS, **{**LORA, "targets": ("mlp",)})
    with pytest.raises(ModelError, match=r"shares its weight with 1 other"):
        recover(dense("zamba2"), tokenizer, ROWS, **{**LORA, "targets": ("input", "mlp")})
    with pytest.raises(ModelError, match="name their model by its folder"):
        recover(pruned("mamba2"), tokenizer, ROWS, merge=False, **LORA)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The recovery study of smoke's Mamba-2, with scores that cost nothing."""
    output = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "scores_of", scores)
        patch.setattr(recovery_study, "scores_of", scores)
        return output, recovery_study.recovery(Workbench("smoke", "smoke-mamba2", output), 10)


def scores(bench: Workbench, model: PreTrainedModel) -> dict[str, Metric]:
    """Perplexity 8, or 9 once a model is tuned, and an accuracy of a half."""
    perplexity = 9.0 if hasattr(model.config, "recovery") else 8.0
    found = {
        f"{column.task}/{column.metric}": perplexity if column.metric == "perplexity" else 0.5
        for column in bench.profile.evaluation.tasks
    }
    return {name: Metric(value=value, stderr=0.01, n=4) for name, value in found.items()}


def test_the_study_records_every_state_with_its_losses(done: tuple[Path, dict[str, Any]], monkeypatch: Any) -> None:
    output, found = done
    assert list(found) == ["dense", "ssm_pruning_02", "dense_tuned", "ssm_pruning_02_tuned"]
    tuned = found["ssm_pruning_02_tuned"]
    assert tuned.model.removals == found["ssm_pruning_02"].model.removals
    assert tuned.model.parameters == found["ssm_pruning_02"].model.parameters < tuned.model.parameters_dense
    assert {"held_out_loss/0", "held_out_loss/2", "held_out_loss/4", "loss/4", "best_step"} <= set(tuned.metrics)
    assert tuned.spec["recipe"]["steps"] == 4
    assert tuned.data["instructions"].name == "pocket-instructions"
    assert not list(output.rglob("*.part"))
    monkeypatch.setattr(recovery_study, "recover", lambda *_, **__: pytest.fail("ran again"))
    assert recovery_study.recovery(Workbench("smoke", "smoke-mamba2", output), 10) == found
    with pytest.raises(ProfileError, match="table 11 is not about smoke-mamba2"):
        recovery_study.recovery(Workbench("smoke", "smoke-mamba2", output), 11)


def test_the_table_has_paper_record_and_yours(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    frame = report.table(10, "smoke", done[0], tmp_path).frame.set_index(["state", "column"])
    lost = frame.loc["less 2 (ssm_pruning), tuned", "ppl"]
    assert (lost["paper"], frame.loc["less 2 (ssm_pruning)", "ppl"]["paper"]) == (4.44, 5.89)
    assert frame.loc["dense", "average"]["paper"] == 60.2
    assert frame["verdict"].unique().tolist() == ["not recorded"]
    assert {path.name for path in report.table(11, "smoke", done[0], tmp_path).save(tmp_path)} >= {
        "table_11.md", "table_11.csv", "table_11.tex"
    }  # fmt: skip
    drawing = report.figure("recovery", "smoke", done[0])
    assert len(drawing.records) == 2
    assert "not run" in report.table(12, "smoke", tmp_path, tmp_path).to_markdown()


KILLED = """
import os, signal, sys
import torch
from shedder_utils import recovery_study, studies, tuning
from shedder_utils.workbench import Workbench
torch.set_num_threads(1)
loss, left = tuning.Tuning.compute_loss, 4
def die(*arguments, **options):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return loss(*arguments, **options)
tuning.Tuning.compute_loss = die
from test_recovery import scores
studies.scores_of = recovery_study.scores_of = scores
recovery_study.recovery(Workbench("smoke", "smoke-mamba2", sys.argv[1]), 10)
"""


def test_a_killed_study_goes_on(done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: Any) -> None:
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONPATH": str(Path(__file__).parent)}
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, env=environment)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert list(tmp_path.rglob("*.part/checkpoint-2"))
    monkeypatch.setattr(studies, "scores_of", scores)
    monkeypatch.setattr(recovery_study, "scores_of", scores)
    found = recovery_study.recovery(Workbench("smoke", "smoke-mamba2", tmp_path), 10)
    assert {name: record.metrics for name, record in found.items()} == {
        name: record.metrics for name, record in done[1].items()
    }


def test_a_tuning_is_kept_until_it_is_recorded(
    done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: Any
) -> None:
    def full(root: Path, record: records.Record) -> None:
        raise RecordError("no space left on device")

    monkeypatch.setattr(recovery_study, "scores_of", scores)
    shutil.copytree(done[0], tmp_path, dirs_exist_ok=True)
    place = records.path(tmp_path, "smoke", "recovery", "smoke-mamba2", "ssm_pruning_02_tuned")
    place.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(records, "write", full)
        with pytest.raises(RecordError, match="no space left"):
            recovery_study.recovery(Workbench("smoke", "smoke-mamba2", tmp_path), 10)
    monkeypatch.setattr(tuning.Tuning, "run", lambda *_: pytest.fail("trained again"))
    recovery_study.recovery(Workbench("smoke", "smoke-mamba2", tmp_path), 10)
    assert records.read(place).metrics == done[1]["ssm_pruning_02_tuned"].metrics
    assert not list(tmp_path.rglob("*.part"))


def tuned_world(root: Path, back: float, rate: float) -> World:
    """The pocket profile's records, where each removal costs `rate` and tuning gives a share `back` of that back."""
    lost = {(study, "pocket-mamba2"): rate for study in ("ssm_pruning", "block_pruning")}
    world = World(root, loss=lost, rise={place: 5 * rate for place in lost}).write()
    for table in world.profile.recovery.tables.values():
        before = {"dense": ("dense", table.model, "scores")}
        before |= {row.state: (row.study, table.model, f"{row.removed:02d}_removed") for row in table.rows}
        found = {state: records.read(records.path(root, "pocket", *place)) for state, place in before.items()}
        for state, start in found.items():
            curve = {"held_out_loss/0": 2.0, "held_out_loss/40": 1.0, "best_step": 40.0}
            metrics = {name: Metric(value=value) for name, value in curve.items()}
            for name, metric in start.metrics.items():
                value = metric.value + back * (found["dense"].metrics[name].value - metric.value)
                metrics[name] = metric.model_copy(update={"value": value})
            changes = {"study": "recovery", "setting": f"{state}_tuned", "metrics": metrics}
            records.write(root, start.model_copy(update=changes))
    return world


@pytest.mark.parametrize(
    ("back", "rate", "verdict", "why"),
    [
        (1.0, 0.01, "reproduced", "Of 4 comparisons, 4 speak for the claim"),
        (0.1, 0.01, "not shown at this scale", "0 speak for the claim with 95 % confidence, 4 against it"),
        (1.0, 0.0, "not shown at this scale", "Pruning cost nothing that these items show"),
    ],
)
def test_the_verdict_follows_the_numbers(tmp_path: Path, back: float, rate: float, verdict: str, why: str) -> None:
    world = tuned_world(tmp_path, back, rate)
    found = report.verdicts(["C11"], world.profile, world.root).items[0]
    assert found.verdict == verdict
    assert why in found.why
    assert "Control: the dense pocket-mamba2, tuned as long, goes from 3.00 to 3.00" in found.why
    shares = report.table(10, world.profile, world.root, tmp_path / "none").frame["won_back"].dropna()
    assert len(shares) == (4 if rate else 0)
    assert shares.tolist() == pytest.approx([back] * len(shares))


def test_a_tuning_from_other_removals_does_not_count(tmp_path: Path) -> None:
    world = tuned_world(tmp_path, 1.0, 0.01)
    file = records.path(world.root, "pocket", "recovery", "pocket-mamba2", "ssm_pruning_08_tuned")
    record = records.read(file)
    model = record.model.model_copy(update={"removals": record.model.removals[::-1]})
    records.write(world.root, record.model_copy(update={"model": model}))
    found = report.verdicts(["C11"], world.profile, world.root).items[0]
    assert found.verdict == "not run"
    assert "no evaluation of pocket-mamba2, less 8 (ssm_pruning), tuned" in found.why


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"rows": [{"study": "ssm_pruning", "removed": 7}]}, "smoke-mamba2 with 7 removed is no row of a study"),
        ({"recipe": {"method": "lora", "dropout": 0.1}}, "unknown key 'dropout', expected one of method"),
    ],
)
def test_a_profile_that_does_not_fit_is_refused(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    content = profiles.load("smoke").model_dump(exclude_none=True)
    content["recovery"]["tables"] = {10: {**content["recovery"]["tables"][10], **change}}
    (tmp_path / "profile.yaml").write_text(json.dumps(content))
    with pytest.raises(ProfileError, match=complaint):
        profiles.load(tmp_path / "profile.yaml")
