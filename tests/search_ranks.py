"""What `test_distributed` starts through torchrun: searches on every rank; in the last one, rank 1 is killed.

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

from shedder_utils import Calibration, Plan, ShedderError, Stage, distributed, search

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
    """All searches; every rank writes the plan that it got."""
    torch.set_num_threads(1)
    distributed.start()
    try:
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
