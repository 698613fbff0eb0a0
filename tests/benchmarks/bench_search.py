"""The search: fast against plain on the pocket models, same scans, one run. Same plans, layer runs, time and memory.

    python tests/benchmarks/bench_search.py --output search.json

On 32 sequences of 256 tokens, fewer than a study takes, so that plain takes minutes.
Fast runs before plain and again after it, and its mean counts. Models that do not ship are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shedder_utils import Calibration, ModelError, Plan, Stage, calibrate, load_model, perplexity, search
from shedder_utils.provenance import Cost, Meter

SPACES = {
    "pocket-mamba": [Stage("mamba_block", 6)],
    "pocket-mamba2": [Stage("ssm", 9)],
    "pocket-zamba2": [Stage(("mamba_block", "mlp", "mha"), 3), Stage("mlp_channels", 6, group=40), Stage("ssm", 5)],
}
"""What is removed; the last is one of table 3's spaces."""
SEQUENCES, BUDGET_GIB = 32, 0.5


def timed(model: PreTrainedModel, calibration: Calibration, stages: list[Stage], method: str) -> tuple[Plan, Cost]:
    """A search's plan, and what it took."""
    with Meter() as meter:
        plan = search(model, calibration, stages, method=method, memory_gib=BUDGET_GIB)
    return plan, meter.cost


def compare(model: PreTrainedModel, calibration: Calibration, stages: list[Stage]) -> dict[str, Any]:
    """Fast against plain in one space, after a pass that compiles the scans."""
    perplexity(model, Calibration(calibration.batches[:1]))
    (fast, first), (plain, whole), (_, second) = (
        timed(model, calibration, stages, method) for method in ("fast", "plain", "fast")
    )
    fast_s, cost = (first.seconds + second.seconds) / 2, fast.provenance
    return {
        "space": " + ".join(f"{' & '.join(stage.kinds)}: {stage.steps}" for stage in stages),
        "same_plan": fast.removals == plain.removals, "order": [str(component) for component in fast.components],
        "layer_runs": cost["layer_runs"], "layer_runs_plain": plain.provenance["layer_runs"],
        "layer_runs_reused": cost["layer_runs_reused"],
        "fewer_layer_runs": round(plain.provenance["layer_runs"] / cost["layer_runs"], 2), "ties": cost["ties"],
        "fast_s": [first.seconds, second.seconds], "plain_s": whole.seconds,
        "times_faster": round(whole.seconds / fast_s, 2), "budget_gib": BUDGET_GIB,
        "peak_mib": first.peak_mib, "peak_mib_plain": whole.peak_mib,
    }  # fmt: skip


def main() -> None:
    """Compare both methods on every model that ships."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="the first two removals of each stage, 8 sequences")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    rows = []
    for name, stages in SPACES.items():
        try:
            model, tokenizer = load_model(name)
        except ModelError as error:
            print(error)
            continue
        drawn = calibrate("pocket-instructions", tokenizer, samples=256, sequence_length=256, batch_size=4)
        calibration = Calibration(drawn.batches[: (8 if options.quick else SEQUENCES) // 4], drawn.source)
        if options.quick:
            stages = [Stage(stage.kinds, min(2, stage.steps), stage.group) for stage in stages]
        rows.append({"model": name, **compare(model, calibration, stages)})
        print(json.dumps(rows[-1]))
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
