"""The model card of a pruned model, as Markdown: what went and in which order, what that left, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .components import KINDS, Cut
from .evaluation import Score
from .plan import Plan

OWN = ("from shedder_utils import load_model", "model, tokenizer = load_model(folder)")
STOCK = (
    "", "# or without this package", "from transformers import AutoModelForCausalLM",
    "model = AutoModelForCausalLM.from_pretrained(folder)",
)  # fmt: skip


def model_card(model: PreTrainedModel, *, in_stock: bool, scores: Mapping[tuple[str, str], Score] | None = None) -> str:
    """The card of a model that `extract` returned, from the plan in its configuration.

    in_stock: whether it loads in stock transformers. scores: of `evaluate`, on this model.
    """
    record, kind = model.config.pruned, model.config.model_type
    plan = Plan.model_validate(record.get("plan", {}))
    base = str(plan.model.get("ref") or model.config._name_or_path)
    before, after = record["parameters"], model.num_parameters()
    lines = [
        "---", *_metadata(kind, base), "---", "",
        f"# {Path(base).name or kind}, pruned", "",
        f"A {kind} model ({base or 'unnamed'}) without components that it can do without, found as in Mamba-Shedder "
        "(Muñoz, Yuan and Jain, 2025).", "",
        f"Parameters: {after:,} of {before:,} ({after / before:.1%}).", "",
        "## What was removed", "", *_removals(plan, record["removed"]), "",
        "In this order. Numbers are those of the dense model's layers, of its hybrid positions for parts of Zamba2's "
        "Transformer blocks; `mlp_channels` are given as MLP/channels left, `inner_channels`, `heads` and `states` as "
        "layer/number left.", "",
        *_calibration(plan.calibration),
        *_scores(scores or {}),
        "## Loading", "", "```python", *OWN, *(STOCK if in_stock else ()), "```", "",
        "## Licence", "",
        f"The weights are part of those of {base or 'the dense model'}, whose licence holds for them too.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _metadata(kind: str, base: str) -> list[str]:
    """The card's YAML; the base model where it has a place on the Hub."""
    on_hub = base.count("/") == 1 and not Path(base).exists()
    tags = [f"- {tag}" for tag in ("mamba-shedder", "pruned", kind)]
    return [*([f"base_model: {base}"] if on_hub else []), "library_name: transformers", "tags:", *tags]


def _removals(plan: Plan, removed: list[str]) -> Iterator[str]:
    """A table with a line for each removal: what, the calibration score after it, and its parameters.

    removed: what went, for a model whose plan is not known.
    """
    metric = plan.provenance.get("metric", "perplexity")
    yield f"| | removed | calibration {metric} after it | parameters |"
    yield "|---|---|---|---|"
    yield f"| 0 | nothing | {_number(plan.dense_score)} | |"
    steps = [(Cut(one.component, one.kept or 0), one.score, one.parameters) for one in plan.removals]
    for number, (cut, score, parameters) in enumerate(steps or [(Cut.parse(name), None, 0) for name in removed], 1):
        what = f"{cut} ({KINDS[cut.component.kind]})"
        yield f"| {number} | {what} | {_number(score)} | {f'{parameters:,}' if parameters else '–'} |"


def _number(score: float | None) -> str:
    return "–" if score is None else f"{score:.4g}"


def _calibration(facts: Mapping[str, Any]) -> list[str]:
    if "fingerprint" not in facts:
        return []
    size = f"{facts['sequences']} sequences, {facts['tokens']:,} tokens, " if "sequences" in facts else ""
    return [f"Calibration: {facts.get('name', 'texts')}, {size}sha256 of the token ids {facts['fingerprint']}.", ""]


def _scores(scores: Mapping[tuple[str, str], Score]) -> list[str]:
    """A table of lm-eval's scores; nothing without any."""
    if not scores:
        return []
    lines = [
        f"| {task} | {metric} | {score.value:.4g} ± {score.stderr:.2g} | {score.n} |"
        for (task, metric), score in scores.items()
    ]
    return ["## Scores", "", "| task | metric | value | items |", "|---|---|---|---|", *lines, ""]
