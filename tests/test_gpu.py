"""What a GPU needs, tested without one: running out of memory, which scan is recorded, half precision."""

from __future__ import annotations

import math
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from conftest import random_model
from kernel_packages import packages_at_work
from test_surgery import IDS, PADDED, TOLERANCE, build, caching, error, logits, plan_of, step_by_step
from torch.nn.functional import cross_entropy

from shedder_utils import Calibration, ModelError, Stage, describe, extract, kernels, perplexity, removed, search
from shedder_utils.components import Cut
from shedder_utils.importance import Perplexity, final_states
from shedder_utils.kernels import packages
from shedder_utils.out_of_memory import once_smaller
from shedder_utils.search_memory import GIB
from shedder_utils.sweep import Sweep


class Work:
    """Work on `size` rows, for which there is memory for `room` of them."""

    def __init__(self, size: int, room: int) -> None:
        self.size, self.room, self.tries = size, room, 0
        self.first: weakref.ref[torch.Tensor] | None = None

    def compute(self) -> int:
        self.tries += 1
        held = torch.zeros(self.size)
        self.first = self.first or weakref.ref(held)
        if self.size > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation.")
        return self.size

    def shrink(self) -> str:
        self.size //= 2
        return f"{self.size} rows"


def test_out_of_memory_is_met_with_less_once_and_loudly(capsys: pytest.CaptureFixture[str]) -> None:
    fits, tight, hopeless = Work(8, 8), Work(8, 4), Work(8, 2)
    assert (once_smaller(fits.compute, fits.shrink), fits.tries) == (8, 1)
    assert capsys.readouterr().err == ""
    assert (once_smaller(tight.compute, tight.shrink), tight.tries) == (4, 2)
    said = capsys.readouterr().err
    assert said == ("out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): trying once more with 4 rows\n")
    with pytest.raises(ModelError, match=r"out of memory again, with 4 rows .*: use a smaller batch size") as caught:
        once_smaller(hopeless.compute, hopeless.shrink)
    assert hopeless.tries == 2
    assert "\n" not in str(caught.value)


def test_the_first_try_holds_nothing_when_the_second_begins() -> None:
    work = Work(8, 4)

    def shrink() -> str:
        assert work.first is not None
        assert work.first() is None
        return work.shrink()

    assert once_smaller(work.compute, shrink) == 4


def test_a_search_that_runs_out_of_memory_finds_the_same_plan(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, step, budget = random_model("mamba"), Sweep._step, 0.5
    options = {"memory_gib": budget, "progress": False}
    plain = search(model, calibration, Stage("mamba_block", 2), **options)

    def tight(self: Sweep, index: int, stack: Any) -> Any:
        if index == 4 and self.budget > 0.3 * GIB:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return step(self, index, stack)

    monkeypatch.setattr(Sweep, "_step", tight)
    assert search(model, calibration, Stage("mamba_block", 2), **options).components == plain.components
    assert capsys.readouterr().err.count("trying once more with a search budget of 0.25 GiB") == 1


def test_other_errors_are_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="other"):
        once_smaller(lambda: (_ for _ in ()).throw(RuntimeError("other")), lambda: "nothing")


STAND_INS = """
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

def module(name, **functions):
    found = sys.modules[name] = ModuleType(name)
    found.__spec__, found.__path__ = ModuleSpec(name, None, is_package=True), []
    for function, body in functions.items():
        body.__module__ = name
        setattr(found, function, body)
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, found)

def kernel():
    return lambda *arguments, **options: None

if "mamba_ssm" in sys.argv:
    module("mamba_ssm")
    module("mamba_ssm.ops")
    interface = {"selective_scan_fn": kernel(), "mamba_inner_fn": kernel()}
    combined = {"mamba_chunk_scan_combined": kernel(), "mamba_split_conv1d_scan_combined": kernel()}
    module("mamba_ssm.ops.selective_scan_interface", **interface)
    module("mamba_ssm.ops.triton")
    module("mamba_ssm.ops.triton.ssd_combined", **combined)
    module("mamba_ssm.ops.triton.selective_state_update", selective_state_update=kernel())
from shedder_utils import kernels
before = kernels.active("cuda")
kernels.install()
print(before, kernels.active("cuda:1"), kernels.active("cpu"))
"""


@pytest.mark.parametrize(("installed", "scan"), [("mamba_ssm", "mamba_ssm"), ("nothing", "transformers")])
def test_the_scan_that_runs_on_a_gpu_is_named(installed: str, scan: str) -> None:
    run = subprocess.run([sys.executable, "-c", STAND_INS, installed], capture_output=True, text=True)
    assert run.stdout.split() == [scan, scan, "shedder-numba"], run.stderr


IN_PREFILL = {"mamba": "selective_scan_fn", "falcon_mamba": "selective_scan_fn", "hymba": "selective_scan_fn",
              "mamba2": "mamba_chunk_scan_combined", "zamba2": "mamba_chunk_scan_combined"}  # fmt: skip
FUSED = {"mamba": "mamba_inner_fn", "mamba2": "mamba_split_conv1d_scan_combined",
         "zamba2": "mamba_split_conv1d_scan_combined"}  # fmt: skip
ON_KERNELS = [
    *((family, "") for family in IN_PREFILL),
    *((family, "inner_channels:0/41 states:0/5 ssm:1 mamba_block:2") for family in ("mamba", "falcon_mamba")),
    ("mamba2", "heads:0/2 states:1/7 ssm:2 mamba_block:3"),
    ("zamba2", "heads:0/2 states:0/7 heads:3/2 ssm:1 mha:0 mamba_block:5"),
    ("hymba", "attention:0 attention:2 ssm:2 ssm:3 hymba_block:7"),
]
"""Numbers of channels among them that are no multiples of 8, and of states that are no powers of 2."""


@torch.no_grad()
@pytest.mark.parametrize(("family", "gone"), ON_KERNELS)
def test_on_the_packages_kernels_a_model_computes_the_same(
    family: str, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    cuts = [Cut.parse(cut) for cut in gone.split()]
    smaller = extract(model, plan_of(model, gone)) if gone else model
    expected, padded = logits(smaller), logits(smaller, PADDED)
    with packages_at_work(monkeypatch) as calls:
        assert error(logits(smaller), expected) < TOLERANCE
        assert set(calls) == {"causal_conv1d_fn", IN_PREFILL[family]}
        with removed(model, cuts):
            assert error(logits(model), expected) < TOLERANCE
        assert error(logits(smaller, PADDED), padded) < TOLERANCE
        assert error(smaller(IDS[:, :1], use_cache=False).logits, expected[:, :1]) < TOLERANCE
        stepped, cache = step_by_step(smaller, torch.ones_like(IDS))
        assert error(stepped, expected) < TOLERANCE
        calls.clear()
        smaller(IDS[:, :1], use_cache=True, **{caching(model): cache})
    assert set(calls) == {"causal_conv1d_update", "selective_state_update"}


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "mamba2", "zamba2"])
def test_in_training_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the kernels for whole mixers, except Falcon-Mamba's, which would be those of another model."""
    model = build(family)
    expected = logits(model)
    with packages_at_work(monkeypatch) as calls:
        found = model.train()(IDS, use_cache=False).logits
    assert error(found.detach(), expected) < TOLERANCE
    assert set(calls) == ({FUSED[family]} if family in FUSED else {"causal_conv1d_fn", "selective_scan_fn"})


@pytest.mark.parametrize("family", list(IN_PREFILL))
def test_in_half_precision_the_kernels_get_the_dtypes_that_they_take(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family).bfloat16()
    whole = torch.ones_like(IDS)
    expected = step_by_step(model, whole)[0]
    with packages_at_work(monkeypatch):
        assert error(step_by_step(model, whole)[0], expected) < 0.15
        assert error(logits(model), expected) < 0.15


@torch.no_grad()
@pytest.mark.parametrize("family", list(IN_PREFILL))
def test_kernels_are_left_alone_where_there_is_no_gpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device costs are counted, and on a CPU transformers' functions take what we do not."""
    model = build(family).double()
    expected, counted = logits(model), describe(model, tokens=9)
    with packages_at_work(monkeypatch) as calls, monkeypatch.context() as changes:
        changes.setattr(packages, "on_gpu", lambda x: x.is_cuda)
        assert describe(model, tokens=9).equals(counted)
        assert torch.equal(logits(model), expected)
        assert torch.equal(model.train()(IDS, use_cache=False).logits, expected)
    assert not calls


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_losses_of_a_model_in_half_precision_are_float32(family: str, calibration: Calibration) -> None:
    model = random_model(family)
    exact = perplexity(model, calibration)
    half = perplexity(model.bfloat16(), calibration)
    assert half == pytest.approx(exact, rel=0.05)
    ids = calibration.batches[0]
    with torch.no_grad():
        states = final_states(model, ids)
        values = Perplexity().values(model, states, ids, 0)
        logits = model.get_output_embeddings()(states.bfloat16())[:, :-1]
    assert (logits.dtype, values.dtype) == (torch.bfloat16, torch.float64)
    losses = cross_entropy(logits.double().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1)
    torch.testing.assert_close(values, losses.mean(dim=1), rtol=1e-6, atol=0)


def test_a_search_in_half_precision_finds_a_whole_plan(calibration: Calibration) -> None:
    model = random_model("mamba2").bfloat16()
    plans = [search(model, calibration, Stage("ssm", 2), method=method, progress=False) for method in ("fast", "plain")]
    assert all(math.isfinite(score) for plan in plans for score in plan.scores)
    assert plans[0].components == plans[1].components
    assert kernels.active() == "shedder-numba"
