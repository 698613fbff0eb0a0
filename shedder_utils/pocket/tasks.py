"""The seven pocket tasks as lm-eval reads them: pocket/tasks/*.yaml with the items beside them as JSON lines.

The items are drawn with fixed seeds and kept only while no simple heuristic (the first, the last or the most often
named choice, always the same position) gets more than its chance share of them right. Output types, prompts and metrics
are those of lm-eval's lambada, hellaswag, piqa, arc_easy, arc_challenge, winogrande and openbookqa.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shedder_utils.errors import DataError
from shedder_utils.pocket.items import Item, Pairs, Row, make_item, requests
from shedder_utils.pocket.prose import POCKET

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

N_ITEMS = 400
_ACC = "  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
_ACC_NORM = _ACC.replace("acc", "acc_norm")
_PERPLEXITY = "  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
_ARC = r"""output_type: multiple_choice
doc_to_text: "Question: {{question}}\nAnswer:"
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
"""
# lm-eval's own fields for each task, then its metrics.
_BODIES = {
    "pocket_lambada": r"""output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
""",
    "pocket_hellaswag": r"""output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: choices
""",
    "pocket_piqa": r"""output_type: multiple_choice
doc_to_text: "Question: {{goal}}\nAnswer:"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
""",
    "pocket_arc_easy": _ARC,
    "pocket_arc_challenge": _ARC,
    "pocket_winogrande": r"""output_type: multiple_choice
doc_to_text: "{{answer|int - 1}}"
doc_to_target: "{{sentence.split('_')[1].strip()}}"
doc_to_choice: "{{[sentence.split('_')[0] + option1, sentence.split('_')[0] + option2]}}"
""",
    "pocket_openbookqa": r"""output_type: multiple_choice
doc_to_text: question_stem
doc_to_target: "{{choices.label.index(answerKey)}}"
doc_to_choice: "{{choices.text}}"
""",
}
_METRICS = {name: _ACC + _ACC_NORM for name in _BODIES} | {
    "pocket_lambada": _PERPLEXITY + _ACC,
    "pocket_winogrande": _ACC,
}
TASKS = tuple(_BODIES)
CHANCE = {name: 0.5 if name in ("pocket_piqa", "pocket_winogrande") else 0.25 for name in TASKS}


def task_yaml(task: str) -> str:
    """The task's YAML. Its data file is relative to the project's root; `task_configs` makes it absolute."""
    return (
        f"task: {task}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: pocket/tasks/{task}.jsonl\n"
        f"test_split: test\n{_BODIES[task]}metric_list:\n{_METRICS[task]}metadata:\n  version: 1.0\n"
    )


def task_configs(tasks: tuple[str, ...] = TASKS, folder: Path = POCKET / "tasks") -> list[dict[str, Any]]:
    """The tasks' YAML as dictionaries for lm-eval, with absolute data files: they load from any working directory.

    Raises DataError for a task that does not exist.
    """
    import yaml

    configs = []
    for task in tasks:
        if not (folder / f"{task}.yaml").is_file():
            raise DataError(f"task {task!r}: expected one of {', '.join(TASKS)} in {folder}")
        config = yaml.safe_load((folder / f"{task}.yaml").read_text())
        config["dataset_kwargs"]["data_files"] = {"test": str(folder / f"{task}.jsonl")}
        configs.append(config)
    return configs


def heuristics(item: Item) -> dict[str, bool]:
    """Whether each simple way to answer gets the item right: by position, or by when or how often a choice is named."""
    named = [_clue(item, option) for option in item.options]
    words = item.passage.replace(".", "").split()
    first = [words.index(word) for word in named]
    last = [len(words) - words[::-1].index(word) for word in named]
    count = [words.count(word) for word in named]
    gold = item.gold
    return {f"position {i}": gold == i for i in range(len(named))} | {
        "first named": first[gold] == min(first),
        "last named": last[gold] == max(last),
        "most often named": count[gold] == max(count) and count.count(max(count)) < len(count),
        "least often named": count[gold] == min(count) and count.count(min(count)) < len(count),
    }


def _clue(item: Item, option: str) -> str:
    """The word of the passage that stands for a choice: the choice, or what leads to it by common knowledge."""
    if item.query.form != "knowledge":
        return option
    tables = [known.table for known in item.scene.kind.knowledge if option in known.table.values()]
    return next(thing for thing in item.scene.things if tables[0][thing] == option)


def make_rows(task: str, n_items: int = N_ITEMS) -> list[Row]:
    """The task's items: the same on every call, no heuristic right in more than its chance share of them."""
    rng = random.Random(f"evaluation {task}")
    limit = CHANCE[task] * n_items
    hits: Counter[str] = Counter()
    rows: list[Row] = []
    while len(rows) < n_items:
        item = make_item(task, rng)
        right = [name for name, hit in heuristics(item).items() if hit]
        if all(hits[name] < limit for name in right):
            hits.update(right)
            rows.append(item.row)
    return rows


def write_tasks(folder: Path = POCKET / "tasks") -> None:
    """Write every task's YAML and JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        (folder / f"{task}.yaml").write_text(task_yaml(task))
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows(task)))


def tasks_fingerprint(tasks: tuple[str, ...], folder: Path = POCKET / "tasks") -> str:
    """sha256 of the YAML and items of some pocket tasks: the same files score the same things."""
    digest = hashlib.sha256()
    for task in tasks:
        for suffix in ("yaml", "jsonl"):
            digest.update((folder / f"{task}.{suffix}").read_bytes())
    return digest.hexdigest()


def load_rows(task: str, folder: Path = POCKET / "tasks") -> list[Row]:
    """The committed items of a task."""
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Pairs, batch_size: int = 50
) -> list[tuple[float, bool]]:
    """The log-likelihood of each continuation after its context, in nats, and whether it is the greedy one.

    Pairs that differ in the last token only share one pass through the model.
    """
    lengths = [len(tokenizer.encode(context)) for context, _ in pairs]
    texts = [tuple(tokenizer.encode(context + continuation)) for context, continuation in pairs]
    keep = max(len(text) - length for text, length in zip(texts, lengths, strict=True))
    inputs = list(dict.fromkeys(text[:-1] for text in texts))
    tails: dict[tuple[int, ...], torch.Tensor] = {}
    for start in range(0, len(inputs), batch_size):
        part = inputs[start : start + batch_size]
        width = max(map(len, part))
        ids = torch.tensor([[*row, *[tokenizer.pad_token_id] * (width - len(row))] for row in part])
        logits = model(ids.to(model.device)).logits
        for row, row_logits in zip(part, logits, strict=True):
            tails[row] = row_logits[len(row) - keep : len(row)].float().log_softmax(-1).cpu()
    scores = []
    for text, length in zip(texts, lengths, strict=True):
        target = torch.tensor(text[length:])
        tail = tails[text[:-1]][-len(target) :]
        scores.append((tail.gather(1, target[:, None]).sum().item(), bool((tail.argmax(1) == target).all())))
    return scores


def quick_accuracy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, task: str, limit: int = 100) -> float:
    """Accuracy on a task's first items without lm-eval, to watch a training; lambada's is that of the greedy word."""
    items = [requests(task, row) for row in load_rows(task)[:limit]]
    scores = iter(log_likelihoods(model, tokenizer, [pair for pairs, _ in items for pair in pairs]))
    hits = 0
    for pairs, gold in items:
        mine = [next(scores) for _ in pairs]
        hits += mine[0][1] if task == "pocket_lambada" else mine.index(max(mine)) == gold
    return hits / len(items)
