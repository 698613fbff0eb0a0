"""Evaluation: lm-eval's numbers equal log-likelihoods computed by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shedder_utils import Calibration, Component, DataError, ModelError, evaluate, removed
from shedder_utils.evaluation import BOOTSTRAP
from shedder_utils.families import random_model
from shedder_utils.importance import perplexity
from shedder_utils.lm_eval_tasks import loaded_tasks, task_facts
from shedder_utils.pocket.items import requests
from shedder_utils.pocket.tasks import load_rows, task_configs, tasks_fingerprint
from shedder_utils.pocket.tokenizer import load_tokenizer
from shedder_utils.statistics import packed

LIMIT = 12


@pytest.fixture(scope="module")
def pocket_like() -> PreTrainedModel:
    return random_model(family="mamba2", layers=4, hidden_size=32, seed=3, vocab_size=len(load_tokenizer()))


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, context: str, continuation: str) -> tuple[float, bool]:
    """Sum of log-probabilities of the continuation's tokens, and whether each is the most likely one."""
    tokenizer = load_tokenizer()
    ids = tokenizer(context + continuation, return_tensors="pt").input_ids
    n = ids.shape[1] - len(tokenizer(context).input_ids)
    log_probs = model(ids, use_cache=False).logits[0, -n - 1 : -1].log_softmax(-1)
    target = ids[0, -n:]
    return log_probs.gather(1, target[:, None]).sum().item(), bool((log_probs.argmax(-1) == target).all())


@pytest.mark.parametrize("task", ["pocket_hellaswag", "pocket_arc_challenge", "pocket_winogrande"])
def test_choices_are_scored_as_by_hand(pocket_like: PreTrainedModel, task: str) -> None:
    hits, normed_hits = [], []
    for row in load_rows(task)[:LIMIT]:
        pairs, gold = requests(task, row)
        sums = [log_likelihood(pocket_like, *pair)[0] for pair in pairs]
        normed = [total / len(continuation.strip()) for total, (_, continuation) in zip(sums, pairs, strict=True)]
        hits.append(sums.index(max(sums)) == gold)
        normed_hits.append(normed.index(max(normed)) == gold)
    scores = evaluate(pocket_like, load_tokenizer(), [task], limit=LIMIT, batch_size=4)
    accuracy = sum(hits) / LIMIT
    assert scores[task, "acc"].value == pytest.approx(accuracy)
    assert scores[task, "acc"].n == LIMIT
    assert scores[task, "acc"].stderr == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (LIMIT - 1)))
    assert scores[task, "acc"].items == packed(hits)
    if (task, "acc_norm") in scores:
        assert scores[task, "acc_norm"].value == pytest.approx(sum(normed_hits) / LIMIT)


def test_perplexity_is_that_of_the_last_words(pocket_like: PreTrainedModel) -> None:
    pairs = [requests("pocket_lambada", row)[0][0] for row in load_rows("pocket_lambada")[:LIMIT]]
    found = [log_likelihood(pocket_like, *pair) for pair in pairs]
    scores = evaluate(pocket_like, load_tokenizer(), ["pocket_lambada"], limit=LIMIT, batch_size=4)
    perplexity = scores["pocket_lambada", "perplexity"]
    assert perplexity.value == pytest.approx(math.exp(-sum(total for total, _ in found) / LIMIT), rel=1e-4)
    assert perplexity.stderr > 0
    assert perplexity.items is None
    assert scores["pocket_lambada", "acc"].value == pytest.approx(sum(greedy for _, greedy in found) / LIMIT)


def test_a_model_with_components_removed_is_what_is_scored(pocket_like: PreTrainedModel) -> None:
    settings = {"tasks": ["pocket_lambada"], "limit": LIMIT, "batch_size": 4}
    dense = evaluate(pocket_like, load_tokenizer(), **settings)
    with removed(pocket_like, [Component("mamba_block", 1)]):
        pruned = evaluate(pocket_like, load_tokenizer(), **settings)
    assert pruned["pocket_lambada", "perplexity"] != dense["pocket_lambada", "perplexity"]
    assert evaluate(pocket_like, load_tokenizer(), **settings) == dense


def test_a_model_that_overflows_has_no_scores(pocket_like: PreTrainedModel) -> None:
    model, settings = copy.deepcopy(pocket_like), {"tasks": ["pocket_lambada"], "limit": 2, "batch_size": 2}
    text = Calibration([torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))])
    with torch.no_grad():
        model.backbone.layers[2].mixer.out_proj.weight.fill_(6e4)
    model.half()
    for score in (lambda: evaluate(model, load_tokenizer(), **settings), lambda: perplexity(model, text)):
        with pytest.raises(ModelError, match=r"^the .* of mamba2 in float16 is .* choose dtype bfloat16 or float32$"):
            score()
    with removed(model, [Component("ssm", 0)]):
        assert perplexity(model, text) == math.inf
        assert evaluate(model, load_tokenizer(), **settings)
    model.float()
    assert math.isfinite(perplexity(model, text))
    assert evaluate(model, load_tokenizer(), **settings)


def test_scores_are_those_of_simple_evaluate(pocket_like: PreTrainedModel) -> None:
    """Tasks loaded once and templates kept change no number of lm-eval's own entry point."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = ("pocket_lambada", "pocket_piqa")
    own = simple_evaluate(
        HFLM(pretrained=pocket_like, tokenizer=load_tokenizer(), batch_size=4, device="cpu"),
        tasks=list(task_configs(tasks)), task_manager=TaskManager(include_defaults=False), num_fewshot=0, limit=LIMIT,
        bootstrap_iters=BOOTSTRAP,
    )["results"]  # fmt: skip
    scores = evaluate(pocket_like, load_tokenizer(), tasks, limit=LIMIT, batch_size=4)
    assert len(scores) == 4
    for (task, metric), score in scores.items():
        assert (score.value, score.stderr) == (own[task][f"{metric},none"], own[task][f"{metric}_stderr,none"])


@pytest.fixture
def of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives lm-eval other tasks than those that come with it."""
    from lm_eval.tasks import TaskManager

    def give(*configs: dict[str, Any]) -> None:
        for i, config in enumerate(configs):
            (tmp_path / f"{i}.yaml").write_text(json.dumps(config))
        manager = TaskManager(include_path=tmp_path, include_defaults=False)
        monkeypatch.setattr("shedder_utils.lm_eval_tasks._lm_evals", lambda: manager)

    return give


def test_a_group_has_the_mean_of_its_tasks(pocket_like: PreTrainedModel, of_lm_eval: Any) -> None:
    tasks = ("pocket_piqa", "pocket_arc_easy")
    of_lm_eval(*task_configs(tasks), {"group": "both", "task": [*tasks], "aggregate_metric_list": [{"metric": "acc"}]})
    scores = evaluate(pocket_like, load_tokenizer(), ["both"], limit=LIMIT, batch_size=4)
    accuracies = [scores[task, "acc"] for task in tasks]
    assert scores["both", "acc"].value == pytest.approx(sum(score.value for score in accuracies) / 2)
    assert scores["both", "acc"].stderr > 0
    assert (scores["both", "acc"].n, scores["both", "acc"].items) == (2 * LIMIT, None)
    assert all(score.items for score in accuracies)


def test_filters_have_scores_of_their_own(pocket_like: PreTrainedModel, of_lm_eval: Any) -> None:
    (piqa,) = task_configs(("pocket_piqa",))
    filters = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("none", "strict")]
    of_lm_eval({**piqa, "task": "filtered", "filter_list": filters}, {**piqa, "task": "silent", "filter_list": []})
    scores = evaluate(pocket_like, load_tokenizer(), ["pocket_piqa", "filtered"], limit=LIMIT, batch_size=4)
    for metric in ("acc", "acc_norm"):
        expected = scores["pocket_piqa", metric]
        assert scores["filtered", metric] == scores["filtered", f"{metric},strict"] == expected
    with pytest.raises(DataError, match="task silent: lm-eval reports no metric of it"):
        evaluate(pocket_like, load_tokenizer(), ["silent"], limit=2, batch_size=2)


def test_a_record_tells_of_other_items(tmp_path: Path, of_lm_eval: Any) -> None:
    (piqa,) = task_configs(("pocket_piqa",))
    rows = load_rows("pocket_piqa")

    def given(name: str, rows: list[Any]) -> dict[str, Any]:
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {**piqa, "task": name, "dataset_kwargs": {"data_files": {"test": str(file)}}}

    other = [*rows[:-1], {**rows[-1], "goal": "To see another goal"}]
    of_lm_eval(given("one", rows), given("other", other))
    facts = {name: task_facts(("pocket_lambada", name)) for name in ("one", "other")}
    loaded_tasks.cache_clear()
    assert facts["one"] == task_facts(("pocket_lambada", "one"))
    assert facts["one"].fingerprint != facts["other"].fingerprint
    of_lm_eval(given("one", other))
    loaded_tasks.cache_clear()
    assert task_facts(("pocket_lambada", "one")).fingerprint != facts["one"].fingerprint
    loaded_tasks.cache_clear()
    pocket = task_facts(("pocket_lambada",))
    assert (pocket.fingerprint, pocket.revision) == (tasks_fingerprint(("pocket_lambada",)), None)


def test_unknown_tasks_are_refused(pocket_like: PreTrainedModel) -> None:
    with pytest.raises(DataError, match="task 'pocket_nothing' does not exist"):
        evaluate(pocket_like, load_tokenizer(), ["pocket_lambada", "pocket_nothing"])
