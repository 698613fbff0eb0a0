"""What `test_distributed` starts through torchrun: searches on every rank, of which two are not the same on all.

In the last one rank 1 is killed.

python -m torch.distributed.run --nproc-per-node 2 tests/search_ranks.py FOLDER
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import random_model

from shedder_utils import Calibration, Plan, PlanError, ShedderError, Stage, distributed, search
from shedder_utils.savings import Savings

IDS = torch.randint(0, 97, (7, 24), generator=torch.Generator().manual_seed(1))
CALIBRATION = Calibration(list(IDS.split(2)), {"name": "random"})
BOTH = [Stage("mamba_block", 2), Stage(("mamba_block", "ssm"), 2)]
SEARCHES: dict[str, dict[str, Any]] = {
    "fast": {"stages": BOTH},
    "plain": {"stages": Stage("ssm", 2), "method": "plain"},
    "kl": {"stages": Stage("mamba_block", 2), "metric": "kl"},
    "taylor": {"stages": Stage("ssm", 2), "metric": "taylor", "one_shot": True},
    "killed": {"stages": BOTH},
}


def unlike(rank: int) -> dict[str, dict[str, Any]]:
    """Searches that differ from rank to rank: each draws with a seed of its own, or has timed by itself."""
    timed = Savings(unit="decode", whole=9.0, each={f"ssm:{index}": 1.0 + rank for index in range(6)})
    return {"seeds": {"metric": "random", "seed": 42 + rank}, "savings": {"per": timed}}


def run(name: str, folder: Path) -> Plan:
    """One of the searches, with a checkpoint."""
    return search(random_model("mamba2"), CALIBRATION, checkpoint=folder / name, **SEARCHES[name])


def die_after_two_removals() -> None:
    """Make this process kill itself in the middle of its next search."""
    searching = importlib.import_module("shedder_utils.search")._Search
    advance = searching.advance

    def mortal(under_way: Any, stage: int) -> None:
        if len(under_way.plan) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        advance(under_way, stage)

    searching.advance = mortal


def main(folder: Path) -> None:
    """All searches; every rank writes the plan that it got, or why it was refused."""
    torch.set_num_threads(1)
    distributed.start()
    try:
        for name, options in unlike(distributed.rank()).items():
            try:
                search(random_model("mamba2"), CALIBRATION, Stage("ssm", 1), **options)
            except PlanError as error:
                (folder / f"{name}.rank{distributed.rank()}").write_text(str(error))
        for name in SEARCHES:
            if name == "killed" and distributed.rank() == 1:
                die_after_two_removals()
            run(name, folder).save(folder / f"{name}.rank{distributed.rank()}")
    finally:
        distributed.stop()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except ShedderError as error:
        sys.exit(f"error: {error}")
