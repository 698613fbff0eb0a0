"""One token through a mixer: the short way gives what transformers' own gives, and adapters still count."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shedder_utils import kernels
from shedder_utils.families import random_model
from shedder_utils.kernels import decode

FAMILIES = ["mamba", "falcon_mamba", "mamba2", "zamba2"]
IDS = torch.randint(0, 48, (3, 9), generator=torch.Generator().manual_seed(0))


def model(family: str) -> PreTrainedModel:
    found = random_model(family=family, layers=4, hidden_size=32, seed=0, vocab_size=48)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return found


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layers that went the short way, in order."""
    taken, step = [], decode.step

    def counted(mixer: Any, *inputs: Any) -> Tensor:
        taken.append(mixer.layer_idx)
        return step(mixer, *inputs)

    monkeypatch.setattr(decode, "step", counted)
    return taken


def after(found: PreTrainedModel, batch: int, n_tokens: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Logits of the last tokens, read one by one after a prompt, and the states then."""
    ids = IDS[:batch]
    output = found(ids[:, :-n_tokens], use_cache=True)
    held, parts = "cache_params" if "cache_params" in output else "past_key_values", []
    for t in range(-n_tokens, 0):
        token = ids[:, t:] if t == -1 else ids[:, t : t + 1]
        output = found(token, use_cache=True, **{held: output[held]})
        parts.append(output.logits)
    layers = output[held].layers
    states = [state for layer in layers for state in (*layer.conv_states.values(), *layer.recurrent_states.values())]
    return torch.cat(parts, dim=1), states


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_step_is_what_transformers_computes(family: str, batch: int, steps: list[int]) -> None:
    found = model(family)
    kernels.uninstall()
    wanted, wanted_states = after(found, batch)
    assert steps == []
    with kernels.installed():
        logits, states = after(found, batch)
    assert steps == 2 * list(range(4))
    assert (logits - wanted).norm() < 1e-5 * wanted.norm()
    for state, other in zip(states, wanted_states, strict=True):
        assert (state - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_what_replaces_a_projection_is_called(family: str, steps: list[int]) -> None:
    """As a LoRA adapter does: the module that holds the weight is not the one that is called."""
    found = model(family)
    wrapped = copy.deepcopy(found)
    for mixer in [module for module in wrapped.modules() if hasattr(module, "out_proj")]:
        for name in ("in_proj", "x_proj", "out_proj"):
            if hasattr(mixer, name):
                linear = getattr(mixer, name)
                linear.weight.mul_(0.5)
                setattr(mixer, name, nn.Sequential(linear, Doubled()))
    with kernels.installed():
        wanted, got = after(found, 1)[0], after(wrapped, 1)[0]
    assert len(steps) == 2 * 2 * 4
    torch.testing.assert_close(got, wanted)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_and_other_precisions_go_transformers_way(family: str, steps: list[int]) -> None:
    found = model(family)
    with kernels.installed():
        with torch.no_grad():
            assert after(copy.deepcopy(found).to(torch.bfloat16), 1)[0].isfinite().all()
        assert steps == []
        output = found(IDS, use_cache=False)
        output.logits.sum().backward()
    assert steps == []
