"""How much faster the CPU scans make whole models than transformers' PyTorch fallback, and how exact they are.

    python tests/benchmarks/bench_scans.py [--quick] [--threads N] [--output scans.json]

Two models of 2.4M parameters (Mamba-1 and Mamba-2: 16 layers, width 128, vocabulary 4096, tied) on 2,048 tokens. Each
side has a process of its own, as a user would run it (ours with `kernels.install()`, which also keeps freed memory);
the two are timed in turns, because the same code can differ by a factor of two between two runs on a shared machine. A
ratio is the median of transformers' times over the median of ours, each side's first call left out (it is in the JSON:
ours compiles there, and transformers' backward of Mamba-1, which is timed twice only, takes up to minutes). Errors are
those of the scans alone, largest difference over largest value against a float64 recurrence, outputs and all gradients.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedModel

from shedder_utils import kernels
from shedder_utils.kernels import reference

SIZE = {"vocab_size": 4096, "hidden_size": 128, "tie_word_embeddings": True}
SHAPES = ((8, 256), (2, 1024))
TARGETS = {"mamba forward": 10, "mamba forward+backward": 50, "mamba2 forward": 3, "mamba2 forward+backward": 2.5}


def build(family: str, layers: int) -> PreTrainedModel:
    """A random model of about 2.4M parameters at 16 layers."""
    torch.manual_seed(0)
    if family == "mamba":
        return MambaForCausalLM(MambaConfig(**SIZE, num_hidden_layers=layers, state_size=16))
    widths = {"state_size": 64, "num_heads": 8, "head_dim": 32, "n_groups": 1}
    return Mamba2ForCausalLM(Mamba2Config(**SIZE, num_hidden_layers=layers, **widths))


def serve(ours: bool, family: str, layers: int, shape: tuple[int, int], threads: int) -> None:
    """One side of a comparison, in its own process: time the step that each line of input names, and print seconds."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    if ours:
        kernels.install()
    model = build(family, layers)
    ids = torch.randint(0, SIZE["vocab_size"], shape)
    for line in sys.stdin:
        train = line.strip() != "forward"
        model.zero_grad()
        start = time.perf_counter()
        with torch.set_grad_enabled(train):
            result = model(ids, labels=ids if train else None, use_cache=False)
        if train:
            result.loss.backward()
        print(f"seconds {time.perf_counter() - start}", flush=True)


class Side:
    """A process that runs `serve`."""

    def __init__(self, *arguments: Any) -> None:
        command = [sys.executable, __file__, "--serve", json.dumps(arguments)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)

    def seconds(self, name: str) -> float:
        """Wall time of one step."""
        print(name, file=self.process.stdin, flush=True)
        answer = next(line for line in self.process.stdout if line.startswith("seconds"))
        return float(answer.split()[1])

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def compare(theirs: Side, ours: Side, name: str, repeats: int) -> dict[str, Any]:
    """Times of one step in transformers' process and in ours, in turns; seconds."""
    first = {"transformers_first_s": theirs.seconds(name), "ours_first_s": ours.seconds(name)}
    times = [(theirs.seconds(name), [ours.seconds(name) for _ in range(3)]) for _ in range(repeats)]
    transformers_s, ours_s = [t for t, _ in times], [t for _, several in times for t in several]
    return {
        "transformers_s": transformers_s,
        "ours_s": ours_s,
        "ratio": statistics.median(transformers_s) / statistics.median(ours_s),
        "ratio_lowest": min(transformers_s) / max(ours_s),
        "ratio_highest": max(transformers_s) / min(ours_s),
    } | first


def bench(
    family: str, layers: int, shape: tuple[int, int], steps: Sequence[str], threads: int, repeats: int
) -> list[dict[str, Any]]:
    """Rows of one family and one shape of batch."""
    sides = [Side(ours, family, layers, shape, threads) for ours in (False, True)]
    rows = []
    for name in steps:
        slow = family == "mamba" and name != "forward"
        row = {"case": f"{family} {name}", "layers": layers, "batch": shape[0], "tokens": shape[1]}
        rows.append(row | compare(sides[0], sides[1], name, min(repeats, 2) if slow else repeats))
        show(rows[-1])
    for side in sides:
        side.close()
    return rows


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    theirs, ours = statistics.median(row["transformers_s"]), statistics.median(row["ours_s"])
    target = f"; target {TARGETS[row['case']]}" if row["batch"] == 8 and row["layers"] == 16 else ""
    print(
        f"{row['case']:24} {row['batch']} x {row['tokens']:4} {theirs:9.3f} s {ours:7.3f} s"
        f" {row['batch'] * row['tokens'] / ours:7.0f} tokens/s"
        f"   ratio {row['ratio']:6.1f} ({row['ratio_lowest']:.1f} to {row['ratio_highest']:.1f}{target})",
        flush=True,
    )


def scan_errors(
    ours: Callable[..., Any], truth: Callable[..., Any], inputs: dict[str, torch.Tensor]
) -> dict[str, float]:
    """Relative error of outputs and gradients of a float32 scan against the float64 recurrence."""
    results = []
    for function, dtype in ((ours, torch.float32), (truth, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs.values()]
        y, state = function(**dict(zip(inputs, leaves, strict=True)))
        weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)
        results.append([y.detach(), state.detach(), *torch.autograd.grad((y * weights).sum() + state.sum(), leaves)])
    pairs = zip(["y", "state", *inputs], *results, strict=True)
    return {name: float((a - b).abs().max() / b.abs().max()) for name, a, b in pairs}


def errors() -> dict[str, dict[str, float]]:
    """Errors of both scans at the models' layer shapes, two sequences of 256 tokens."""
    torch.manual_seed(0)
    batch, L, E = 2, 256, 256
    scan = {"u": torch.randn(batch, L, E), "dt": torch.randn(batch, L, E) - 3, "A": -torch.rand(E, 16) * 16}
    scan |= {"B": torch.randn(batch, L, 16), "C": torch.randn(batch, L, 16), "z": torch.randn(batch, L, E)}
    scan |= {"D": torch.randn(E)}
    ssd = {"x": torch.randn(batch, L, 8, 32), "dt": torch.randn(batch, L, 8) - 3, "A": -torch.rand(8) * 16}
    ssd |= {"B": torch.randn(batch, L, 1, 64), "C": torch.randn(batch, L, 1, 64), "D": torch.randn(8)}
    return {
        "mamba": scan_errors(kernels.selective_scan, reference.selective_scan, scan),
        "mamba2": scan_errors(kernels.ssd, reference.ssd, ssd),
    }


def main() -> None:
    """Run and print everything; write the record where --output says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, three repeats; the targets do not apply")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, help="where to write the numbers as JSON")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    torch.set_num_threads(options.threads)
    layers, repeats = (2, 3) if options.quick else (16, options.repeats)
    print(f"{layers} layers, {options.threads} threads; transformers, ours")
    exactness = errors()
    for family, values in exactness.items():
        print(f"{family} scan, largest relative error against float64: {max(values.values()):.1e}")
    rows = []
    for family, shape in itertools.product(("mamba2", "mamba"), SHAPES):
        steps = ("forward", "forward+backward") if shape == SHAPES[0] else ("forward",)
        rows += bench(family, layers, shape, steps, options.threads, repeats)
    if options.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": options.threads, "versions": versions}
        record = {"errors": exactness, "targets": TARGETS, "rows": rows} | machine
        options.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
