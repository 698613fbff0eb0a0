"""Shared fixtures: small random models of every covered architecture, a little calibration data, one run of smoke."""

# ruff: noqa: E402

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

for _setting in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "SHEDDER_SCAN", "TQDM_DISABLE"):
    os.environ.pop(_setting, None)  # before the libraries read them

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import FalconMambaConfig, Mamba2Config, MambaConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from shedder_utils import Calibration, kernels

SIZE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = {
    "mamba": MambaConfig(**SIZE, state_size=8),
    "falcon_mamba": FalconMambaConfig(**SIZE, state_size=8),
    "mamba2": Mamba2Config(**SIZE, state_size=16, num_heads=4, head_dim=16, n_groups=2),
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny models are faster on one thread, and other work on the machine disturbs them less."""
    torch.set_num_threads(1)


def random_model(family: str) -> PreTrainedModel:
    """A random model of an architecture, whose every tensor matters."""
    return random_model_of(CONFIGS[family])


def random_model_of(config: PretrainedConfig) -> PreTrainedModel:
    """A random model whose every tensor matters: biases, norms and D are random too, not zeros and ones."""
    kernels.install()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def allocated(work: Callable[[], object]) -> int:
    """The most bytes of tensors that some work has at once, beside those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    now = peak = 0
    for _, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += change
        peak = max(peak, now)
    return peak


@pytest.fixture(params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A random model of each architecture in turn."""
    return random_model(request.param)


@pytest.fixture
def calibration() -> Calibration:
    """Seven random sequences of 24 tokens, in batches of three, three and one."""
    ids = torch.randint(0, 97, (7, 24), generator=torch.Generator().manual_seed(1))
    return Calibration(list(ids.split(3)))


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The whole smoke profile, run once from the command line: the folder it wrote to and the files it named."""
    output = tmp_path_factory.mktemp("smoke")
    command = [sys.executable, "-m", "shedder_utils", "run", "--profile", "smoke", "--output", str(output)]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    (said,) = finished.stdout.splitlines()
    files = json.loads(said)["files"]
    assert finished.stderr.endswith("".join(f"{file}\n" for file in files))
    return output, [Path(file) for file in files]
