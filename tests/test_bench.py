"""The search's benchmark: the spaces are those of studies, and what must not be ends it with 1."""

from __future__ import annotations

import pytest
import torch
from benchmarks import bench_search

from shedder_utils import Calibration

GOOD = {"same_plan": True, "times_faster": 4.0, "planned_mib": 1000.0, "grown_mib": 1960.0}


def test_the_spaces_are_those_of_the_profile() -> None:
    stages = {name: bench_search.stages_of(*space) for name, space in bench_search.SPACES.items()}
    assert [(stage.kinds, stage.steps) for stage in stages["pocket-mamba"]] == [(("mamba_block",), 6)]
    assert [(stage.kinds, stage.steps) for stage in stages["pocket-mamba2"]] == [(("ssm",), 9)]
    assert [stage.steps for stage in stages["pocket-zamba2"]] == [2, 10, 6]
    assert stages["pocket-zamba2"][1].group == 40


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({}, 0, ""),
        ({"same_plan": False}, 1, "FAILED pocket-mamba: fast and plain found different plans"),
        ({"grown_mib": 1970.0}, 1, "FAILED pocket-mamba: fast took 1970 MiB, allowed with its budget are 1968"),
        ({"times_faster": 2.4}, 0, "MISSED pocket-mamba: 2.4 times faster, the aim is 2.5"),
    ],
    ids=["good", "another plan", "too much memory", "too slow"],
)
def test_what_must_not_be_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], change: dict, code: int, said: str
) -> None:
    monkeypatch.setattr(bench_search, "load_model", lambda *_: (None, None))
    monkeypatch.setattr(bench_search, "calibrate", lambda *_, **__: Calibration([torch.zeros(4, 8, dtype=torch.long)]))
    monkeypatch.setattr(bench_search, "compare", lambda *_: GOOD | change)
    with pytest.raises(SystemExit) as ended:
        bench_search.main(["--models", "pocket-mamba"])
    assert int(ended.value.code or 0) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ([said] if said else [])
