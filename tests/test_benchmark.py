"""The benchmark: its statistics, what it refuses, and that prefill and decode run as they say."""

from __future__ import annotations

import pytest
import torch
from benchmarks import bench_removal

from shedder_utils import ModelError, Plan, extract, provenance
from shedder_utils.benchmark import PHASES, Timings, _CudaMeter, benchmark
from shedder_utils.components import Component
from shedder_utils.costs import Costs, costs
from shedder_utils.families import random_model
from shedder_utils.removal import removed


def test_speedup_is_the_median_of_the_rounds_ratios() -> None:
    seconds = {"dense": {"decode": [2.0, 4.0, 9.0]}, "pruned": {"decode": [1.0, 1.0, 3.0]}}
    found = Timings("dense", seconds).speedup("pruned", "decode")
    assert (found.value, found.low, found.high) == (3.0, 2.0, 4.0)
    assert Timings("dense", seconds).speedup("dense", "decode").value == 1.0


def test_every_round_runs_every_model_and_the_reference_twice() -> None:
    dense = random_model(family="mamba2", layers=2, hidden_size=32, seed=0, vocab_size=48)
    small = random_model(family="mamba2", layers=1, hidden_size=32, seed=0, vocab_size=48)
    lengths: list[tuple[int, int]] = []
    for model in (dense, small):
        model.register_forward_pre_hook(lambda m, args: lengths.append((m.config.num_hidden_layers, args[0].shape[1])))
    timings = benchmark({"dense": dense, "small": small}, prompt_tokens=5, new_tokens=3, batches=2, warmup=1)
    run = {layers: [(layers, 5), (layers, 1), (layers, 1)] for layers in (1, 2)}
    counted = [step for layers in (1, 2) for step in run[layers][:2]]  # what each costs, once
    assert sorted(lengths) == sorted(4 * 2 * run[2] + 4 * run[1] + counted)
    rounds = {name: len(seconds["prefill"]) for name, seconds in timings.seconds.items()}
    assert rounds == {"dense": 2, "small": 2, "dense again": 2}
    ratios = list(timings.table().loc[("dense", "prefill")].index)[-5:]
    assert ratios == ["speedup", "low", "high", "ideal", "peak_mib"]
    if provenance.reset_peak():
        assert min(timings.peak_mib.values()) > 50  # a process with torch in it
    assert not any(torch.tensor(s).le(0).any() for phases in timings.seconds.values() for s in phases.values())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_ideal_is_what_a_model_no_longer_computes_and_moves(batch_size: int) -> None:
    dense = random_model(family="mamba2", layers=3, hidden_size=32, seed=0, vocab_size=48)
    small = extract(dense, Plan(removals=[{"component": Component("ssm", 1)}]))
    timings = benchmark(
        {"dense": dense, "small": small}, prompt_tokens=5, new_tokens=2, batches=1, warmup=0, batch_size=batch_size
    )
    work = {name: costs(model, 5) for name, model in (("dense", dense), ("small", small))}
    moved = {name: cost.weight_bytes + batch_size * 2 * cost.cache_bytes for name, cost in work.items()}
    wanted = {"prefill": work["dense"].flops / work["small"].flops, "decode": moved["dense"] / moved["small"]}
    assert min(wanted.values()) > 1
    found = timings.table()["ideal"]
    assert found["small"].to_dict() == pytest.approx(wanted)
    assert found["dense"].to_dict() == found["dense again"].to_dict() == {"prefill": 1.0, "decode": 1.0}


def test_the_second_run_of_the_reference_is_compared_like_any_other_model() -> None:
    """The A/A comparison: two runs of one model, whose interval holds 1.00 unless they differ beyond their spread."""
    noise = torch.rand(2, 40, generator=torch.Generator().manual_seed(0)) + 10
    seconds = {name: {"decode": row.tolist()} for name, row in zip(("dense", "dense again"), noise, strict=True)}
    same = Timings("dense", seconds).speedup("dense again", "decode")
    assert same.low <= 1.0 <= same.high
    slow = {**seconds, "dense again": {"decode": (1.2 * noise[1]).tolist()}}
    assert Timings("dense", slow).speedup("dense again", "decode").high < 1.0


@pytest.mark.skipif(not provenance.reset_peak(), reason="this kernel does not begin a process's peak anew")
def test_memory_that_one_model_needs_is_not_counted_for_another() -> None:
    small = random_model(family="mamba2", layers=1, hidden_size=32, seed=0, vocab_size=48)
    hungry = random_model(family="mamba2", layers=1, hidden_size=32, seed=1, vocab_size=48)
    hungry.register_forward_pre_hook(lambda *_: torch.ones(64, 2**20).sum() and None)  # 256 MiB, given back at once
    found = benchmark({"small": small, "hungry": hungry}, prompt_tokens=4, new_tokens=2, batches=1, warmup=1).peak_mib
    assert found["hungry"] > found["small again"] + 200


def test_a_peak_that_the_system_cannot_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(family="mamba2", layers=1, hidden_size=32, seed=0, vocab_size=48)
    monkeypatch.setattr(provenance, "_status_mib", {"VmHWM": 900.0, "VmRSS": 600.0}.__getitem__)
    timings = benchmark({"dense": model}, prompt_tokens=4, new_tokens=2, batches=1, warmup=0)
    assert timings.peak_mib == {}
    assert timings.table()["peak_mib"].isna().all()


def test_a_gpus_times_are_of_the_stream_where_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the current device's, where nothing may be going on."""
    streams: list[str | None] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str | None = None) -> None:
            streams.append(stream)

        def elapsed_time(self, later: Event) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    meter = _CudaMeter(torch.device("cuda:1"))
    meter.mark()
    meter.mark()
    assert streams == ["stream of cuda:1"] * 2
    assert meter.seconds() == [0.002]


def test_what_cannot_be_timed_is_refused() -> None:
    dense = random_model(family="mamba", layers=2, hidden_size=32, seed=0, vocab_size=48)
    with pytest.raises(ModelError, match="2 or more"):
        benchmark({"dense": dense}, new_tokens=1)
    with removed(dense, [Component("ssm", 0)]), pytest.raises(ModelError, match="masked"):
        benchmark({"dense": dense})


@pytest.mark.parametrize(
    ("blocks", "again", "options", "said"),
    [
        (3.0, 4.0, [], []),
        (3.5, 4.0, [], [f"MISSED tiny, blocks, {one}: share 0.857 of the ideal, the aim is 0.95" for one in PHASES]),
        (3.0, 5.0, [], [f"MISSED tiny, dense again, {one}: [0.800, 0.800] does not contain 1.00" for one in PHASES]),
        (3.5, 5.0, ["--quick"], []),
    ],
    ids=["good", "too slow", "not the same", "quick"],
)
def test_the_measurement_of_removal_fails_where_an_aim_is_missed(
    blocks: float, again: float, options: list[str], said: list[str],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    seconds = {"dense": 4.0, "blocks": blocks, "SSMs": 4.0, "dense again": again}
    timings = Timings(
        "dense", {name: {phase: [value] * 3 for phase in PHASES} for name, value in seconds.items()},
        work={name: Costs(size, size, 0, 0) for name, size in (("dense", 4), ("blocks", 3), ("SSMs", 4))},
    )  # fmt: skip
    tiny = random_model(family="mamba2", layers=4, hidden_size=32, seed=0, vocab_size=48)
    monkeypatch.setattr(bench_removal, "MODELS", {"tiny": lambda: tiny})
    monkeypatch.setattr(bench_removal, "benchmark", lambda *_, **__: timings)
    with pytest.raises(SystemExit) as ended:
        bench_removal.main(["--threads", "1", *options])
    assert bool(ended.value.code) == bool(said)
    assert capsys.readouterr().out.splitlines()[6:] == said
