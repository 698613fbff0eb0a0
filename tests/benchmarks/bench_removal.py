"""How much of the ideal speedup a pruned model reaches, with a quarter of its blocks, or of its SSMs, removed.

    python tests/benchmarks/bench_removal.py [--quick] [--batches N] [--threads N] [--output removal.json]

The two pocket models, and random models of the 130M shapes (24 layers, width 768, vocabulary 50,280). Every fourth
component goes. Ideal: the dense model's arithmetic over the pruned one's in prefill, and its memory traffic over the
pruned one's in decode, both with all that stays the same: the head, which reads the whole embedding for each token,
norms, and the cache. A decode step that does not wait for memory but for the many small operations of each layer is
faster than this ideal when layers go, for their operations go with them; share is measured over ideal, and its aim for
blocks is 0.95. The dense model's second run ("again") should be as fast as the first: its interval contains 1.00. Ends
with 1 where one of the two is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from shedder_utils import Plan, Removal, benchmark, components, extract, kernels, load_model
from shedder_utils.benchmark import AGAIN, PHASES, Timings

SIZE = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24, "tie_word_embeddings": True}
WIDTHS = {"state_size": 128, "num_heads": 24, "head_dim": 64, "n_groups": 1}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "pocket-mamba": lambda: load_model("pocket-mamba", tokenizer=False)[0],
    "pocket-mamba2": lambda: load_model("pocket-mamba2", tokenizer=False)[0],
    "mamba-130m shape": lambda: MambaForCausalLM(MambaConfig(**SIZE)).eval(),
    "mamba2-130m shape": lambda: Mamba2ForCausalLM(Mamba2Config(**SIZE, **WIDTHS)).eval(),
}
PROMPT_TOKENS = 512
AIM = 0.95


def without_a_quarter(model: PreTrainedModel, kind: str) -> PreTrainedModel:
    """The model without every fourth component of a kind."""
    return extract(model, Plan(removals=[Removal(component=one) for one in components(model, kind)[1::4]]))


def rows_of(name: str, timings: Timings) -> list[dict[str, Any]]:
    """What was measured beside the ideal, for each pruned model and phase, and for the second dense run."""
    rows = []
    for label in [label for label in timings.seconds if label != timings.reference]:
        for phase in PHASES:
            found, ideal = timings.speedup(label, phase), timings.ideal(label, phase)
            rows.append({
                "model": name, "without": label, "phase": phase, "speedup": found.value, "low": found.low,
                "high": found.high, "ideal": ideal, "share": found.value / ideal,
            })  # fmt: skip
    return rows


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    aim = f"; aim {AIM}" if row["without"] == "blocks" else ""
    print(
        f"{row['model']:18} {row['without']:11} {row['phase']:8} {row['speedup']:5.2f} [{row['low']:.2f}, "
        f"{row['high']:.2f}]   ideal {row['ideal']:.2f}   share {row['share']:.2f}{aim}",
        flush=True,
    )


def misses(rows: list[dict[str, Any]]) -> list[str]:
    """What falls short of its aim: blocks of their share of the ideal, the second dense run of being as fast."""
    found = []
    for row in rows:
        what = f"{row['model']}, {row['without']}, {row['phase']}"
        if row["without"] == "blocks" and row["share"] < AIM:
            found.append(f"{what}: share {row['share']:.3f} of the ideal, the aim is {AIM}")
        if row["without"].endswith(AGAIN) and not row["low"] <= 1.0 <= row["high"]:
            found.append(f"{what}: [{row['low']:.3f}, {row['high']:.3f}] does not contain 1.00")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every model with blocks and with SSMs removed; write the numbers where --output says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds; no aim applies")
    parser.add_argument("--batches", type=int, default=20, help="rounds that count")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="only these")
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    kernels.install()
    rows = []
    for name in options.models:
        torch.manual_seed(0)
        dense = MODELS[name]()
        pruned = {"blocks": without_a_quarter(dense, "mamba_block"), "SSMs": without_a_quarter(dense, "ssm")}
        models = {"dense": dense, **pruned}
        timings = benchmark(models, prompt_tokens=PROMPT_TOKENS, batches=2 if options.quick else options.batches)
        found = rows_of(name, timings)
        for row in found:
            show(row)
        rows += found
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
    missed = [] if options.quick else misses(rows)
    for line in missed:
        print(f"MISSED {line}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
