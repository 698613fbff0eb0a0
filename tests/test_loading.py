"""Loading: what is written is read back, and what is not whole or not covered is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, random_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from shedder_utils import ModelError, hub, load_model, loading
from shedder_utils.loading import fingerprint
from shedder_utils.pocket.tokenizer import load_tokenizer


@pytest.mark.parametrize("family", CONFIGS)
def test_a_saved_model_is_read_back(family: str, tmp_path: Path) -> None:
    model = random_model(family)
    model.save_pretrained(tmp_path)
    load_tokenizer().save_pretrained(tmp_path)
    again, tokenizer = load_model(tmp_path)
    assert fingerprint(again) == fingerprint(model)
    assert not again.training
    assert tokenizer is not None
    assert tokenizer("Anna").input_ids == load_tokenizer()("Anna").input_ids
    assert load_model(tmp_path, tokenizer=False)[1] is None
    assert load_model(tmp_path, dtype=torch.bfloat16, tokenizer=False)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_a_checkpoint_that_is_not_whole_is_refused(change: str, tmp_path: Path) -> None:
    random_model("mamba").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "backbone.layers.2.mixer.A_log"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        name = "backbone.layers.2.mixer.extra"
        tensors[name] = torch.zeros(3)
    else:
        tensors[name] = tensors[name][:5].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"1 {change} tensors, such as .*{name}") as caught:
        load_model(tmp_path, tokenizer=False)
    assert "\n" not in str(caught.value)


def test_other_architectures_and_absent_models_are_refused(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=11)).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'gpt2', which is not covered"):
        load_model(tmp_path)
    with pytest.raises(ModelError, match="pocket model 'pocket-nothing' does not exist"):
        load_model("pocket-nothing")
    with pytest.raises(ModelError, match="no usable configuration"):
        load_model(tmp_path / "nowhere")


@pytest.mark.parametrize("device", ["cuda:99", torch.device("cuda:99"), "gpu"])
def test_a_device_that_cannot_compute_is_refused_before_a_download(
    device: str | torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(ModelError, match=r"someone/mamba: torch cannot compute on device '(cuda:99|gpu)'") as caught:
        load_model("someone/mamba", device=device)
    assert "\n" not in str(caught.value)


def test_a_device_without_the_means_to_time_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "device_error", lambda device: None)  # as on a machine that has one
    with pytest.raises(ModelError, match="device 'mps' is not covered: expected cpu or cuda"):
        load_model("pocket-mamba2", device="mps")


def test_a_folder_may_be_named_like_a_pocket_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("mamba")
    model.save_pretrained(tmp_path / "pocket-mine")
    monkeypatch.chdir(tmp_path)
    assert fingerprint(load_model("pocket-mine", tokenizer=False)[0]) == fingerprint(model)
    Path("pocket-mamba2").mkdir()
    assert load_model("pocket-mamba2", tokenizer=False)[0].config.model_type == "mamba2"


def test_a_checkpoint_keeps_its_own_numbers_if_asked(tmp_path: Path) -> None:
    random_model("mamba").bfloat16().save_pretrained(tmp_path)
    assert load_model(tmp_path, dtype="auto", tokenizer=False)[0].dtype == torch.bfloat16
    assert load_model(tmp_path, tokenizer=False)[0].dtype == torch.float32


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = random_model("mamba")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="weights cannot be read"):
        load_model(tmp_path, tokenizer=False)
