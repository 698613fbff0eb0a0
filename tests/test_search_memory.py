"""The memory of a search: the arithmetic against what is allocated, budgets that hold, and a model of full size."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import allocated
from test_importances import MODELS
from tqdm import tqdm
from transformers import MambaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from shedder_utils import Calibration, Component, Stage, kernels, search
from shedder_utils import importance as importance_module
from shedder_utils.components import Cut
from shedder_utils.families import family_of, random_model
from shedder_utils.importance import Perplexity
from shedder_utils.search_memory import GIB, UNPRUNED, Layout, default_gib, layout, search_memory
from shedder_utils.sweep import Sweep
from shedder_utils.variants import Variant, set_aside

PAPER = MambaConfig(vocab_size=50_280, hidden_size=2560, num_hidden_layers=64, state_size=16)
"""Mamba-2.8B."""


@pytest.fixture(autouse=True, scope="module")
def _our_scans() -> None:
    kernels.install()


def kept_bytes(sweep: Sweep) -> int:
    """What a sweep has kept, which lies beside the heap and so is not counted as allocated."""
    variants = [v for by_layer in sweep.kept.values() for stack in by_layer.values() for v in stack.values()]
    unpruned = [v for by_layer in sweep.unpruned.values() for v in by_layer.values()]
    return sum(t.nbytes for v in variants + unpruned for t in v.stream.values())


@pytest.mark.parametrize(
    ("family", "memory_gib"), [("mamba", 1.0), ("mamba2", 2e-3), ("zamba2", 1e-9)], ids=["all", "some", "none"]
)
def test_the_arithmetic_is_what_a_search_takes(family: str, memory_gib: float) -> None:
    model = random_model(family=family, layers=8, hidden_size=32, seed=0, vocab_size=512)
    ids = torch.randint(0, 512, (4, 256), generator=torch.Generator().manual_seed(1))
    stage = Stage(("mamba_block", "ssm"), 1)
    candidates = [Cut(Component(kind, index)) for index in range(8) for kind in stage.kinds]
    sweep = Sweep(model, Calibration(list(ids.split(2))), Perplexity(), memory_gib)
    with torch.no_grad():
        peak = allocated(lambda: sweep.values([], candidates, tqdm(disable=True)))
    settings = {"sequences": 4, "sequence_length": 256, "batch_size": 2, "memory_gib": memory_gib}
    expected = search_memory(model, [stage], **settings)
    assert kept_bytes(sweep) == expected.kept
    assert (expected.kept > 0) == (memory_gib > 1e-9)
    assert peak + expected.kept + expected.model == pytest.approx(expected.total, rel=0.2)


@pytest.mark.parametrize("steps", [8, 40])
def test_copies_of_mixers_without_some_heads_are_counted(steps: int) -> None:
    model = random_model(family="mamba2", layers=8, hidden_size=64, seed=0, vocab_size=64)
    heads = family_of(model).channels(model, "heads")
    *gone, last = (Cut(Component("heads", layer), heads - 1) for layer in range(8))
    sweep = Sweep(model, Calibration([torch.zeros(2, 8, dtype=torch.long)]), Perplexity(), 1e-9)
    with torch.no_grad():
        peak = allocated(lambda: sweep.values(gone, [last], tqdm(disable=True)))
    settings = {"sequences": 2, "sequence_length": 8, "batch_size": 2, "memory_gib": 1e-9}
    whole, narrow = (search_memory(model, [Stage(kind, steps, 1)], **settings) for kind in ("ssm", "heads"))
    assert whole.copies == 0
    assert whole.total < peak + whole.model <= narrow.total


@pytest.mark.parametrize("family", MODELS)
def test_a_row_of_the_stream_is_as_wide_as_said(family: str) -> None:
    model = MODELS[family]()
    ids, widest = torch.randint(0, 97, (3, 16)), 0
    with torch.no_grad():
        stream = family_of(model).start(model, ids)
        for layer in family_of(model).layers(model):
            stream = family_of(model).step(model, layer, stream)
            widest = max(widest, sum(tensor.nbytes for tensor in stream.values()))
    assert widest == 3 * family_of(model).stream_bytes(model, 16)


@pytest.mark.parametrize("budget", [0, 10, 100, 1000, 10_000])
def test_a_layout_stays_within_its_budget(budget: int) -> None:
    births = {layer: 1 + layer % 2 for layer in range(1, 12)}
    found = layout(births, batch_bytes=2, all_bytes=6, budget=budget)
    assert found.kept() * 6 + found.most * 2 <= max(budget, 4)
    everything = 2 * (1 + sum(births.values())) + 6 * Layout(births, 99, 1, 1).kept()
    if budget >= everything:
        assert found.spacing == found.unpruned_spacing == 1
        assert found.most == 1 + sum(births.values())


def test_places_are_where_the_next_step_may_go_back_to() -> None:
    births = {2: 1, 5: 1, 7: 1, 8: 2}
    assert Layout(births, 2, 2, 1).places(UNPRUNED) == [2, 5, 7, 8]
    assert Layout(births, 2, 1, 2).places(5) == [7, 8]
    assert Layout(births, 2, 2, 1).places(2) == [7]
    assert Layout(births, 2, 1, 5).places(UNPRUNED) == []
    assert Layout(births, 2, 1, 1).kept() == 4 + 3 + 2 + 1 + 0


def test_the_unpruned_stream_is_kept_before_others() -> None:
    births = dict.fromkeys(range(12), 1)
    found = layout(births, batch_bytes=1, all_bytes=10, budget=13 + 4 * 11 * 10)
    assert found.places(UNPRUNED) == list(range(1, 12))
    assert found.spacing > 1


def test_what_is_kept_spares_just_the_layer_runs_that_are_counted() -> None:
    model = random_model(family="mamba", layers=8, hidden_size=32, seed=0, vocab_size=97)
    calibration = Calibration([torch.randint(0, 97, (2, 8), generator=torch.Generator().manual_seed(1))])
    stages, runs = [Stage("ssm", 3), Stage("mamba_block", 3)], []
    for memory_gib in (1.0, 2e-5, 1e-9):
        cost = search(model, calibration, stages, progress=False, memory_gib=memory_gib).provenance
        assert cost["layer_runs"] < cost["layer_runs_plain"]
        runs.append((cost["layer_runs"], cost["layer_runs_reused"]))
    (most, spared), (some, spared_by_some), (none, nothing) = runs
    assert nothing == 0 < spared_by_some < spared
    assert most + spared == some + spared_by_some == none


def test_a_model_of_64_layers_and_2560_wide_fits_32_gigabytes() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(PAPER)
    settings = {"sequences": 13, "sequence_length": 2048, "batch_size": 2, "memory_gib": 9.5}
    needed = search_memory(model, [Stage("mamba_block", 14), Stage("ssm", 24)], **settings)
    assert 13 * 2048 > 26_000
    assert needed.model == 2_768_345_600 * 4
    assert needed.stack + needed.kept <= 9.5 * GIB
    assert needed.logits < GIB
    assert needed.total < 32e9
    assert "model 10.31 + streams 2.54" in str(needed)


def test_logits_are_never_there_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(family="mamba", layers=4, hidden_size=16, seed=0, vocab_size=4096)
    calibration = Calibration([torch.randint(0, 4096, (2, 64), generator=torch.Generator().manual_seed(1))])
    whole = search(model, calibration, Stage("ssm", 2), progress=False)
    monkeypatch.setattr(importance_module, "LOGITS_AT_ONCE", 5 * 4096)
    all_logits = 2 * 64 * 4096 * 4
    for method in ("fast", "plain"):
        plans = []
        stage = Stage("ssm", 2)
        peak = allocated(lambda: plans.append(search(model, calibration, stage, method=method, progress=False)))  # noqa: B023
        assert peak < all_logits / 2
        assert plans[0].components == whole.components
        assert plans[0].scores == pytest.approx(whole.scores, rel=1e-6)


@pytest.mark.parametrize(("system", "container"), [(16, 8), (8, math.inf)])
def test_the_default_budget_is_an_eighth_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch, system: float, container: float
) -> None:
    for name, gib in (("_free_in_system", system), ("_free_in_container", container)):
        monkeypatch.setitem(default_gib.__globals__, name, lambda gib=gib: gib * 2**30)
    assert default_gib(torch.device("cpu")) == 1.0


def test_what_is_set_aside_keeps_its_precision() -> None:
    streams = {part: torch.rand(2, 3, 4, dtype=dtype) for part, dtype in ((1, torch.float16), (2, torch.float32))}
    kept = set_aside({part: Variant({"hidden": hidden}) for part, hidden in streams.items()})
    assert all(torch.equal(kept[part].stream["hidden"], hidden) for part, hidden in streams.items())
