"""The search: fast against plain on the pocket models, same scans, one run. Same plans, layer runs, time and memory.

    python tests/benchmarks/bench_search.py [--quick] [--output search.json]

The spaces are those of three studies of the pocket profile, on 32 sequences of 256 tokens, fewer than a study takes, so
that plain takes minutes. Fast runs before plain and again after it, and its mean counts. Models that do not ship are
left out. It ends with 1 where the plans differ, or where fast took more memory than it may: what the process grows by
is held against the streams that the budget allows, a layer at work and a slice of the logits, as `search_memory.py`
adds them up, with a fifth, and 768 MiB for what the heap keeps of freed blocks until the end of a batch (up to 530 MiB
here, whatever the budget). Less than 2.5 times faster is a miss that is said, and no failure.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shedder_utils import Calibration, ModelError, Plan, Stage, calibrate, load_model, perplexity, profiles, search
from shedder_utils.provenance import Meter, peak_mib
from shedder_utils.search_memory import search_memory

SPACES = {"pocket-mamba": ("block_pruning", 6), "pocket-mamba2": ("ssm_pruning", 9),
          "pocket-zamba2": ("zamba2_channels_15", 10)}  # fmt: skip
"""For each model a study, and how many removals of each of its stages are made at most."""
SEQUENCES, LENGTH, BATCH_SIZE, BUDGET_GIB = 32, 256, 4, 1.0
TOLERANCE, HEAP_MIB = 1.2, 768.0
AIM = 2.5
"""How many times faster the fast search should be."""


def stages_of(study: str, most: int) -> list[Stage]:
    """The stages of a study of the pocket profile, with so many removals of each at most."""
    settings = profiles.load("pocket").searches[study]
    return [Stage(stage.kinds, min(most, stage.steps), stage.group) for stage in settings.plan_stages]


def timed(
    model: PreTrainedModel, calibration: Calibration, stages: list[Stage], method: str
) -> tuple[Plan, float, float]:
    """A search's plan, the seconds that it took, and the MiB that the process grew by."""
    with Meter() as meter:
        before = peak_mib()
        plan = search(model, calibration, stages, method=method, memory_gib=BUDGET_GIB)
    return plan, meter.cost.seconds, meter.cost.peak_mib - before


def compare(model: PreTrainedModel, calibration: Calibration, stages: list[Stage]) -> dict[str, Any]:
    """Fast against plain in one space, after a pass that compiles the scans."""
    perplexity(model, Calibration(calibration.batches[:1]))
    planned = search_memory(
        model, stages, sequences=calibration.sequences, sequence_length=LENGTH, batch_size=BATCH_SIZE,
        memory_gib=BUDGET_GIB,
    )  # fmt: skip
    (fast, first, grown), (plain, plain_s, plain_grown), (again, second, grown_again) = (
        timed(model, calibration, stages, method) for method in ("fast", "plain", "fast")
    )
    cost = fast.provenance
    return {
        "space": " + ".join(f"{' & '.join(stage.kinds)}: {stage.steps}" for stage in stages),
        "same_plan": fast.removals == plain.removals == again.removals,
        "order": [str(component) for component in fast.components],
        "layer_runs": cost["layer_runs"], "layer_runs_plain": plain.provenance["layer_runs"],
        "layer_runs_reused": cost["layer_runs_reused"],
        "fewer_layer_runs": round(plain.provenance["layer_runs"] / cost["layer_runs"], 2), "ties": cost["ties"],
        "fast_s": [first, second], "plain_s": plain_s, "times_faster": round(2 * plain_s / (first + second), 2),
        "budget_gib": BUDGET_GIB, "planned_mib": round((planned.total - planned.model) / 2**20, 1),
        "grown_mib": round(max(grown, grown_again), 1), "grown_mib_plain": round(plain_grown, 1),
    }  # fmt: skip


def failures(row: dict[str, Any]) -> list[str]:
    """What must not be, in words."""
    allowed = TOLERANCE * row["planned_mib"] + HEAP_MIB
    found = [] if row["same_plan"] else ["fast and plain found different plans"]
    if row["grown_mib"] > allowed:
        found.append(f"fast took {row['grown_mib']:.0f} MiB, allowed with its budget are {allowed:.0f}")
    return found


def show(row: dict[str, Any], quick: bool) -> None:
    """The numbers of a space, and in words what is wrong with them."""
    print(json.dumps(row))
    for failure in failures(row):
        print(f"FAILED {row['model']}: {failure}")
    if row["times_faster"] < AIM and not quick:
        print(f"MISSED {row['model']}: {row['times_faster']} times faster, the aim is {AIM}")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare both methods on every model that ships."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two removals of each stage, 8 sequences; no aim applies")
    parser.add_argument("--models", nargs="*", choices=SPACES, default=list(SPACES), help="only these")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.models:
        study, most = SPACES[name]
        try:
            model, tokenizer = load_model(name)
        except ModelError as error:
            print(error)
            continue
        drawn = calibrate("pocket-instructions", tokenizer, samples=256, sequence_length=LENGTH, batch_size=BATCH_SIZE)
        calibration = Calibration(drawn.batches[: (8 if options.quick else SEQUENCES) // BATCH_SIZE], drawn.source)
        stages = stages_of(study, min(2, most) if options.quick else most)
        rows.append({"model": name, **compare(model, calibration, stages)})
        show(rows[-1], options.quick)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
    sys.exit(any(failures(row) for row in rows))


if __name__ == "__main__":
    main()
