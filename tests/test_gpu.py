"""What a GPU needs, tested without one: running out of memory, which scan is recorded, half precision."""

from __future__ import annotations

import math
import subprocess
import sys
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import random_model, random_model_of
from torch import Tensor
from torch.nn.functional import cross_entropy

from shedder_utils import Calibration, ModelError, Stage, kernels, perplexity, search
from shedder_utils.hymba import HymbaConfig, mixer
from shedder_utils.importance import Perplexity, final_states
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


class Kernels:
    """What mamba_ssm and causal_conv1d offer, by transformers' names and with their own arguments; counts the calls."""

    def __init__(self) -> None:
        self.called: Counter[str] = Counter()

    def mamba_selective_scan(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
        return_last_state: bool = False,
    ) -> Any:  # fmt: skip
        self.called["mamba_selective_scan"] += 1
        u, delta, B, C, z = (x.transpose(1, 2) for x in (u, delta, B, C, z))
        y, state = kernels.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (y.transpose(1, 2), state) if return_last_state else y.transpose(1, 2)

    def mamba_selective_state_update(
        self, state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
        z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    ) -> Tensor:  # fmt: skip
        self.called["mamba_selective_state_update"] += 1
        x, dt, B, C, z = (part[:, None] for part in (x, dt, B, C, z))
        y, after = kernels.selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state=state)
        state.copy_(after)
        return y[:, 0]

    def causal_conv1d_fn(
        self, x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: None = None,
        initial_states: None = None, return_final_states: bool = False, final_states_out: None = None,
        activation: str | None = None,
    ) -> Tensor:  # fmt: skip
        self.called["causal_conv1d_fn"] += 1
        return kernels.causal_conv(x.transpose(1, 2), weight, bias, silu=activation == "silu").transpose(1, 2)

    def causal_conv1d_update(
        self, x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        self.called["causal_conv1d_update"] += 1
        window = torch.cat([conv_state, x], dim=-1)[..., 1:]
        conv_state.copy_(window)
        y = kernels.causal_conv(window.transpose(1, 2), weight, bias, silu=activation == "silu")
        return y.transpose(1, 2)[..., -1:]


@torch.no_grad()
def test_hymbas_heads_run_on_the_kernels_in_prefill_and_in_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 6, "intermediate_size": 48, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_memory_tokens": 4, "sliding_window": 6}
    model = random_model_of(HymbaConfig(**size, **heads))
    ids = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(2))
    expected, stand_in = model(ids, use_cache=False).logits, Kernels()
    in_prefill = ("causal_conv1d_fn", "mamba_selective_scan")
    in_decode = ("causal_conv1d_update", "mamba_selective_state_update")
    for name in (*in_prefill, *in_decode):
        monkeypatch.setattr(mixer.scans, name, getattr(stand_in, name))
    prefill = model(ids[:, :-1], use_cache=True)
    assert stand_in.called == dict.fromkeys(in_prefill, 6)
    stand_in.called.clear()
    decode = model(ids[:, -1:], past_key_values=prefill.past_key_values, use_cache=True)
    assert stand_in.called == dict.fromkeys(in_decode, 6)
    torch.testing.assert_close(torch.cat([prefill.logits, decode.logits], dim=1), expected, rtol=1e-4, atol=1e-4)


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
