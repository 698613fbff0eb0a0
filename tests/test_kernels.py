"""The CPU scans against plain float64 recurrences, against transformers, and against themselves under threads, forks
and other CPUs."""

import multiprocessing
import os
import platform
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import llvmlite.binding as llvm
import pytest
import torch
from numba import cfunc, types
from torch import Tensor
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Zamba2Config,
    Zamba2ForCausalLM,
)
from transformers.models.mamba import modeling_mamba

from shedder_utils import kernels
from shedder_utils.hymba import HymbaConfig, HymbaForCausalLM
from shedder_utils.kernels import patching, reference, scan_kernels, ssd_kernels, threads

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _transformers_functions_restored():
    threads_before = torch.get_num_threads()
    kernels.uninstall()
    yield
    kernels.uninstall()
    torch.set_num_threads(threads_before)


def error(ours: Tensor, truth: Tensor) -> float:
    """Largest difference over largest value (or 1e-20, for gradients that vanish)."""
    assert ours.shape == truth.shape
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).abs().max() / truth.abs().max().clamp(min=1e-20))


def strided(*shape: int) -> Tensor:
    """Random numbers that lie between others, as slices of a projection's output do."""
    return torch.randn(*shape[:-1], shape[-1] + 24)[..., 5 : shape[-1] + 5]


def scan_inputs(batch=2, L=40, E=32, N=16, dt_shift=-3.0, z=True, D=True, bias=True, initial=True):
    torch.manual_seed(0)
    inputs = {
        "u": strided(batch, L, E),
        "dt": (torch.randn(batch, E, L) + dt_shift).transpose(1, 2),
        "A": -torch.rand(E, N) * 16,
        "B": strided(batch, L, N),
        "C": torch.randn(batch, N, L).transpose(1, 2),
        "D": torch.randn(E) if D else None,
        "z": strided(batch, L, E) if z else None,
        "dt_bias": torch.randn(E) if bias else None,
        "initial_state": torch.randn(batch, E, N) if initial else None,
    }
    return {name: x for name, x in inputs.items() if x is not None}


def ssd_inputs(batch=2, L=40, H=4, P=16, G=1, N=16, dt_shift=-3.0, D=True, bias=True, initial=True):
    torch.manual_seed(0)
    inputs = {
        "x": strided(batch, L, H * P).unflatten(2, (H, P)),
        "dt": strided(batch, L, H) + dt_shift,
        "A": -torch.rand(H) * 16,
        "B": strided(batch, L, G * N).unflatten(2, (G, N)),
        "C": torch.randn(batch, G * N, L).transpose(1, 2).unflatten(2, (G, N)),
        "D": torch.randn(H) if D else None,
        "dt_bias": torch.randn(H) if bias else None,
        "initial_state": torch.randn(batch, H, P, N) if initial else None,
    }
    return {name: x for name, x in inputs.items() if x is not None}


def conv_inputs(batch=2, L=20, C=48, K=4, bias=True):
    torch.manual_seed(0)
    inputs = {"x": strided(batch, L, C), "weight": torch.randn(C, K)}
    return inputs | ({"bias": torch.randn(C)} if bias else {})


def run(function, inputs, **options):
    """Outputs, and the gradient of a random projection of them with respect to every input."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    outputs = function(**leaves, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    loss = sum((y * torch.randn(y.shape, dtype=torch.float64, generator=generator)).sum() for y in outputs)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return list(outputs), dict(zip(leaves, gradients, strict=True))


def check(function, truth, inputs, tolerance=TOLERANCE, **options):
    ours, our_gradients = run(function, inputs, **options)
    exact, exact_gradients = run(truth, {name: x.double() for name, x in inputs.items()}, **options)
    assert max(error(a, b) for a, b in zip(ours, exact, strict=True)) < tolerance
    errors = {name: error(our_gradients[name], exact_gradients[name]) for name in inputs}
    assert max(errors.values()) < tolerance, errors
    assert all(our_gradients[name].dtype == x.dtype for name, x in inputs.items())
    return ours


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"L": 1},
        {"batch": 1, "L": 1500, "E": 16, "N": 4, "dt_shift": -6.0},
        {"batch": 1, "E": 144, "N": 5},
        {"E": 37},
        {"E": 5, "batch": 3, "L": 33},
        {"dt_shift": 6.0},
        {"dt_shift": 1e4},
        {"z": False, "D": False, "bias": False, "initial": False},
    ],
    ids=str,
)
def test_selective_scan_equals_float64_recurrence(shape):
    check(kernels.selective_scan, reference.selective_scan, scan_inputs(**shape))


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"L": 1},
        {"batch": 1, "L": 1500, "H": 2, "dt_shift": -6.0},
        {"H": 6, "G": 3, "P": 48, "N": 32},
        {"batch": 1, "H": 2, "P": 13, "N": 20},
        {"dt_shift": 6.0},
        {"dt_shift": 1e4},
        {"D": False, "bias": False, "initial": False},
    ],
    ids=str,
)
def test_ssd_equals_float64_recurrence(shape):
    check(kernels.ssd, reference.ssd, ssd_inputs(**shape))


def test_ssd_clamps_the_step_size_and_its_gradient():
    inputs = ssd_inputs(dt_shift=-1.0)
    limited, _ = check(kernels.ssd, reference.ssd, inputs, dt_limit=(0.05, 0.5))
    assert error(limited, kernels.ssd(**inputs)[0]) > 0.01


def test_step_sizes_without_softplus():
    inputs = scan_inputs(bias=False) | {"dt": torch.rand(2, 40, 32)}
    check(kernels.selective_scan, reference.selective_scan, inputs, softplus=False)
    inputs = ssd_inputs(bias=False) | {"dt": torch.rand(2, 40, 4)}
    check(kernels.ssd, reference.ssd, inputs, softplus=False)


@pytest.mark.parametrize("shape", [{}, {"L": 2}, {"K": 3, "C": 37}, {"K": 2, "bias": False}], ids=str)
@pytest.mark.parametrize("silu", [True, False])
def test_causal_conv_equals_float64(shape, silu):
    check(kernels.causal_conv, reference.causal_conv, conv_inputs(**shape), silu=silu)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
def test_half_precision_in_and_out(dtype, tolerance):
    """The arithmetic is in float32, so only the rounding of inputs (exact in the reference) and outputs remains."""
    cases = [
        (kernels.selective_scan, reference.selective_scan, scan_inputs(dt_shift=-1.0)),
        (kernels.ssd, reference.ssd, ssd_inputs(dt_shift=-1.0)),
        (kernels.causal_conv, reference.causal_conv, conv_inputs()),
    ]
    for function, truth, inputs in cases:
        y = check(function, truth, {name: x.to(dtype) for name, x in inputs.items()}, tolerance)[0]
        assert y.dtype == dtype


@pytest.mark.parametrize(
    ("function", "inputs"),
    [(kernels.selective_scan, scan_inputs(L=77)), (kernels.ssd, ssd_inputs(L=77))],
    ids=["scan", "ssd"],
)
def test_a_sequence_in_two_parts_equals_the_whole(function, inputs):
    whole, last = function(**inputs)
    timed = [name for name, x in inputs.items() if x.dim() > 2 and x.shape[1] == 77]
    first, state = function(**inputs | {name: inputs[name][:, :35] for name in timed})
    second, end = function(**inputs | {name: inputs[name][:, 35:] for name in timed} | {"initial_state": state})
    assert error(torch.cat([first, second], 1), whole) < 1e-6
    assert error(end, last) < 1e-6


def test_denormals_are_flushed_and_change_nothing():
    """An impulse, then padding: the state decays through the range where arithmetic becomes slow."""
    scan, two = scan_inputs(L=300, dt_shift=1.0), ssd_inputs(L=300, dt_shift=1.0)
    scan["u"][:, 1:], two["x"][:, 1:] = 0, 0
    for ours, truth, inputs in (
        (kernels.selective_scan, reference.selective_scan, scan),
        (kernels.ssd, reference.ssd, two),
    ):
        y, state = ours(**inputs)
        exact, _ = truth(**{name: x.double() for name, x in inputs.items()})
        assert error(y, exact) < TOLERANCE
        assert not ((state != 0) & (state.abs() < torch.finfo(torch.float32).tiny)).any()
        assert (state == 0).float().mean() > 0.5
        check(ours, truth, inputs)


def test_nan_reaches_its_own_channel_from_its_step_on():
    for function, inputs in ((kernels.selective_scan, scan_inputs()), (kernels.ssd, ssd_inputs())):
        inputs = {name: x.clone() for name, x in inputs.items()}
        name = "u" if "u" in inputs else "x"
        inputs[name].flatten(2)[1, 7, 3] = float("nan")
        bad = function(**inputs)[0].flatten(2).isnan()
        assert bad[1, 7:, 3].all()
        assert bad.sum() == 33


def test_without_gradients_the_result_is_the_same():
    inputs = scan_inputs()
    y = kernels.selective_scan(**{name: x.requires_grad_() for name, x in scan_inputs().items()})[0]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            plain = kernels.selective_scan(**inputs)[0]
            assert not plain.requires_grad
            assert torch.equal(plain, y.detach())


@pytest.mark.parametrize(
    ("function", "name", "inputs"),
    [
        (kernels.selective_scan, "u", scan_inputs()),
        (kernels.ssd, "x", ssd_inputs()),
        (kernels.causal_conv, "x", conv_inputs()),
    ],
    ids=["scan", "ssd", "conv"],
)
def test_changing_an_input_before_backward_is_refused(function, name, inputs):
    leaf = inputs[name].detach().requires_grad_()
    x = leaf * 1.0
    y = function(**inputs | {name: x})
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y[0] if isinstance(y, tuple) else y).sum().backward()


def everything(cases):
    """Outputs and gradients of all kernels, as one list."""
    results = [run(function, inputs) for function, inputs in cases]
    return [x.detach() for outputs, gradients in results for x in [*outputs, *gradients.values()]]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("pool", [False, True], ids=["openmp", "python pool"])
def test_any_number_of_threads_gives_the_same_bits(monkeypatch, pool):
    cases = (
        (kernels.selective_scan, scan_inputs(E=144)),
        (kernels.ssd, ssd_inputs()),
        (kernels.causal_conv, conv_inputs()),
    )
    torch.set_num_threads(1)
    single = everything(cases)
    monkeypatch.setattr(threads, "_SERIAL_WORK", 0)
    if pool:
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    torch.set_num_threads(3)
    assert same(everything(cases), single)
    with ThreadPoolExecutor(3) as callers:
        futures = [callers.submit(everything, cases) for _ in range(3)]
        assert all(same(future.result(), single) for future in futures)


def _compare_in_child(inputs: dict[str, Tensor], expected: Tensor, queue) -> None:
    queue.put(torch.equal(kernels.selective_scan(**inputs)[0], expected))


class _Scans(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return kernels.selective_scan(**scan_inputs())[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_children_and_data_workers_compute(monkeypatch):
    """OpenMP's threads, started here, do not exist in a forked child."""
    monkeypatch.setattr(threads, "_SERIAL_WORK", 0)
    torch.set_num_threads(2)
    inputs = scan_inputs()
    expected = kernels.selective_scan(**inputs)[0]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_compare_in_child, args=(inputs, expected, queue))
    child.start()
    child.join(60)
    exit_code = child.exitcode
    child.kill()
    assert exit_code == 0
    assert queue.get()
    loader = torch.utils.data.DataLoader(_Scans(), num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(item[0], expected) for item in loader)


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=16))


def falcon_mamba():
    return FalconMambaForCausalLM(FalconMambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=16))


def mamba2():
    widths = {"state_size": 16, "num_heads": 4, "head_dim": 16, "n_groups": 2, "chunk_size": 8}
    return Mamba2ForCausalLM(Mamba2Config(vocab_size=50, hidden_size=32, num_hidden_layers=2, **widths))


def zamba2():
    layers = ["mamba", "hybrid", "mamba"]
    mamba_widths = {"mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 4, "chunk_size": 8}
    attention = {"num_attention_heads": 2, "intermediate_size": 32, "num_mem_blocks": 1, "adapter_rank": 4}
    config = Zamba2Config(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, layers_block_type=layers, **mamba_widths, **attention
    )
    model = Zamba2ForCausalLM(config)
    for module in model.modules():
        if hasattr(module, "time_step_limit"):  # else transformers clamps the step size in prefill but not in decoding
            module.time_step_limit = (0.0, float("inf"))
    return model


def hymba():
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_memory_tokens": 4, "sliding_window": 6}
    return HymbaForCausalLM(
        HymbaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=6, intermediate_size=48, **heads)
    )


FAMILIES = [mamba, falcon_mamba, mamba2, zamba2, hymba]


def build(family):
    torch.manual_seed(0)
    return family().eval()


def logits_and_gradients(model, ids, mask):
    model.zero_grad()
    result = model(ids, attention_mask=mask, labels=ids, use_cache=False)
    result.loss.backward()
    return result.logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_models_equal_transformers_fallback(family):
    model = build(family)
    ids = torch.randint(3, 50, (2, 19))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    logits, gradients = logits_and_gradients(model, ids, mask)
    with kernels.installed():
        ours, our_gradients = logits_and_gradients(model, ids, mask)
    assert 0 < error(ours, logits) < 1e-5  # zero would mean that the same code ran
    assert gradients.keys() == our_gradients.keys()
    errors = {name: error(our_gradients[name], gradient) for name, gradient in gradients.items() if gradient.any()}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_cached_decoding_equals_the_whole_sequence(family):
    model = build(family)
    ids = torch.randint(3, 50, (2, 14))
    cache_name = "past_key_values" if family in (zamba2, hymba) else "cache_params"
    with kernels.installed():
        whole = model(ids, use_cache=False).logits
        step = model(ids[:, :6], use_cache=True)
        decoded = [step.logits]
        for t in range(6, 14):
            step = model(ids[:, t : t + 1], use_cache=True, **{cache_name: step[cache_name]})
            decoded.append(step.logits)
    assert error(torch.cat(decoded, 1), whole) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_our_scan_is_the_one_that_runs(family, monkeypatch):
    """A scan that returns zeros changes the logits."""
    model = build(family)
    ids = torch.randint(3, 50, (1, 9))
    with kernels.installed():
        logits = model(ids, use_cache=False).logits
        for name in ("selective_scan", "ssd"):
            scan = getattr(patching, name)
            monkeypatch.setattr(patching, name, lambda *a, scan=scan, **k: tuple(x * 0 for x in scan(*a, **k)))
        assert error(model(ids, use_cache=False).logits, logits) > 1e-3


@pytest.mark.parametrize("family", [mamba, mamba2])
def test_other_inputs_go_to_transformers(family, monkeypatch):
    model = build(family).double()
    ids = torch.randint(3, 50, (1, 9))
    plain = model(ids, use_cache=False).logits
    with kernels.installed():
        assert torch.equal(model(ids, use_cache=False).logits, plain)


def test_install_is_reversible_and_reported(monkeypatch):
    original = modeling_mamba.mamba_selective_scan
    assert kernels.active() == "transformers"
    with kernels.installed():
        assert kernels.active() == "shedder-numba"
        with kernels.installed():
            kernels.install()
        assert modeling_mamba.mamba_selective_scan is not original
    assert modeling_mamba.mamba_selective_scan is original
    monkeypatch.setenv("SHEDDER_SCAN", "off")
    kernels.install()
    assert kernels.active() == "transformers"
    assert modeling_mamba.mamba_selective_scan is original


OTHER_CPU = """
from shedder_utils import kernels
from shedder_utils.kernels import reference
from test_kernels import check, conv_inputs, scan_inputs, ssd_inputs
for name, inputs in (("selective_scan", scan_inputs()), ("ssd", ssd_inputs()), ("causal_conv", conv_inputs())):
    check(getattr(kernels, name), getattr(reference, name), inputs)
"""


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("module", [scan_kernels, ssd_kernels], ids=lambda module: module.__name__.rpartition(".")[2])
def test_kernels_compile_for_arm(module, direction):
    """The intermediate code names no x86 feature: LLVM makes NEON instructions of it."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        arm = llvm.Target.from_triple("aarch64-linux-gnu")
    except RuntimeError:
        pytest.skip("this llvmlite has no Arm backend")
    entry = cfunc(types.void(types.CPointer(types.int64)), error_model="numpy")(getattr(module, direction)._entry)
    code = re.sub(r'target (triple|datalayout) = .*|"target-(cpu|features)"="[^"]*"', "", entry.inspect_llvm())
    module = llvm.parse_assembly(code)
    module.triple = "aarch64-linux-gnu"
    assembly = arm.create_target_machine(opt=2).emit_assembly(module)
    assert re.search(r"fmla\s+v\d+\.4s", assembly)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 CPUs")
@pytest.mark.parametrize("cpu", ["haswell", "x86-64"])
def test_kernels_are_right_on_other_cpus(cpu):
    """AVX2 with fused multiply-add, and the oldest x86-64 without it."""
    environment = os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": "", "OMP_NUM_THREADS": "1"}
    environment |= {} if cpu == "x86-64" else {"NUMBA_CPU_FEATURES": "+avx2,+fma"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent)}
    finished = subprocess.run([sys.executable, "-c", OTHER_CPU], env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
