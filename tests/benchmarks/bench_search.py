"""The search: fast against plain on the pocket models, same scans, one run. Same plans, layer runs and wall time.

    python tests/benchmarks/bench_search.py --output search.json

Plain takes about half an hour on two cores; --quick makes two removals of each kind only.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shedder_utils import Calibration, Plan, Stage, calibrate, load_model, profiles, search


def timed(model: PreTrainedModel, calibration: Calibration, stage: Stage, method: str) -> tuple[Plan, float]:
    """A search's plan and its wall time in seconds."""
    started = time.perf_counter()
    plan = search(model, calibration, stage, method=method)
    return plan, time.perf_counter() - started


def compare(model: PreTrainedModel, calibration: Calibration, stage: Stage) -> dict[str, Any]:
    """Fast against plain for one stage."""
    (fast, fast_s), (plain, plain_s) = (timed(model, calibration, stage, method) for method in ("fast", "plain"))
    return {
        "kind": stage.kinds[0], "steps": stage.steps, "same_plan": fast.removals == plain.removals,
        "order": [component.index for component in fast.components],
        "layer_runs_share": fast.provenance["layer_runs"] / plain.provenance["layer_runs"],
        "ties": fast.provenance["ties"], "fast_s": round(fast_s, 2), "plain_s": round(plain_s, 2),
        "times_faster": round(plain_s / fast_s, 2),
    }  # fmt: skip


def main() -> None:
    """Compare both methods on every model and study of the pocket profile."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two removals of each kind")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args()
    profile = profiles.load("pocket")
    rows = []
    for name in profile.models:
        model, tokenizer = load_model(name)
        calibration = calibrate(tokenizer=tokenizer, **profile.calibration.model_dump())
        for study in profile.studies.values():
            stage = Stage(study.kind, 2 if options.quick else study.steps)
            rows.append({"model": name, **compare(model, calibration, stage)})
            print(json.dumps(rows[-1]))
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
