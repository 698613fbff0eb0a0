"""Native mamba_ssm checkpoints: the same logits as plain loops, the published sizes, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import native_reference as reference
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel

from shedder_utils import ModelError, loading
from shedder_utils.families import native
from shedder_utils.pocket.tokenizer import load_tokenizer

KINDS = list(reference.CONFIGS)
OF_MAMBA_SSM = ("mamba_ssm", "einops", "triton")
WITHOUT_KERNELS = (
    "needs mamba_ssm, though no GPU: pip install einops ninja triton wheel, then MAMBA_SKIP_CUDA_BUILD=TRUE "
    "MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1"
)
IDS = [3, 17, 44, 0, 9, 9, 31, 25, 2, 40, 12]
MAMBA_2_8B = {
    "d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 8,
}  # fmt: skip
MAMBA2_2_7B = {
    "d_model": 2560, "d_intermediate": 0, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True,
    "pad_vocab_size_multiple": 16, "tie_embeddings": True,
}  # fmt: skip


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return loading.load_model(folder, tokenizer=False, **options)[0]


def logits(model: PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS]), use_cache=False).logits[0].double().numpy()


def expected(kind: str, tensors: dict[str, torch.Tensor]) -> np.ndarray:
    return reference.logits(kind, tensors, IDS)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", native.WEIGHTS)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_the_plain_loops(kind: str, file: str, tied: bool, tmp_path: Path) -> None:
    tensors = reference.random_tensors(kind, tied=tied)
    model = load(reference.write(tmp_path, kind, tensors, file, tie_embeddings=tied))
    wanted = expected(kind, tensors)
    np.testing.assert_allclose(logits(model), wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())
    assert wanted.shape == (len(IDS), reference.ROWS[kind])
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


@pytest.mark.skipif(not all(map(importlib.util.find_spec, OF_MAMBA_SSM)), reason=WITHOUT_KERNELS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_mamba_ssm(kind: str, tmp_path: Path) -> None:
    """Its own loader and model, with its functions in plain Python in the place of its kernels."""
    tensors, ids = reference.random_tensors(kind), [*IDS, 7]  # 12 tokens are three whole chunks of Mamba-2's
    folder = reference.write(tmp_path, kind, tensors, fused_add_norm=False)
    script = Path(__file__).with_name("mamba_ssm_logits.py")
    run = subprocess.run([sys.executable, script, folder, json.dumps(ids)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    theirs = torch.load(folder / "logits.pt")
    with torch.no_grad():
        ours = load(folder)(torch.tensor([ids]), use_cache=False).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())
    np.testing.assert_allclose(theirs.numpy(), reference.logits(kind, tensors, ids), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kept", ["backbone.embedding.weight", "lm_head.weight"])
def test_one_of_two_tied_tensors_is_enough(kept: str, tmp_path: Path) -> None:
    tensors = reference.random_tensors("Mamba1")
    alone = {name: tensor for name, tensor in tensors.items() if name == kept or "layers" in name or "norm_f" in name}
    model = load(reference.write(tmp_path, "Mamba1", alone, "model.safetensors"))
    wanted = expected("Mamba1", tensors)
    np.testing.assert_allclose(logits(model), wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    folder = reference.write(tmp_path, "Mamba1", reference.random_tensors("Mamba1", tied=False))
    with pytest.raises(ModelError, match=r"lm_head.weight differs from the embedding"):
        load(folder)


def test_half_precision_is_read_as_float32_on_a_cpu(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in reference.random_tensors("Mamba2").items()}
    folder = reference.write(tmp_path, "Mamba2", tensors)
    model = load(folder)
    assert model.dtype == torch.float32
    wanted = expected("Mamba2", tensors)
    np.testing.assert_allclose(logits(model), wanted, rtol=1e-4, atol=1e-4 * abs(wanted).max())
    assert load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("in_fp32", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_residual_is_in_float32_where_the_checkpoint_says_so(
    kind: str, in_fp32: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = reference.write(tmp_path, kind, reference.random_tensors(kind), residual_in_fp32=in_fp32)
    model, seen = load(folder, dtype=torch.bfloat16), []
    model.backbone.layers[1].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
    logits(model)
    assert seen == [dtype]


@pytest.mark.parametrize(
    ("settings", "parameters", "rows"), [(MAMBA_2_8B, 2_768_345_600, 50280), (MAMBA2_2_7B, 2_702_599_680, 50288)]
)
def test_published_sizes(settings: dict[str, Any], parameters: int, rows: int) -> None:
    config = native.configuration(settings, "published")
    with torch.device("meta"):
        model = native.model_class(config)(config)
    model.tie_weights()
    assert model.num_parameters() == parameters
    assert model.lm_head.weight.shape == (rows, 2560)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 0, 0)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Mamba1", {"d_intermediate": 64}, "d_intermediate 64 is not covered: expected 0"),
        ("Mamba1", {"attn_layer_idx": [1]}, r"attn_layer_idx \[1\] is not covered"),
        ("Mamba1", {"rms_norm": False}, "rms_norm False is not covered"),
        ("Mamba1", {"depth": 4}, "setting 'depth' is unknown"),
        ("Mamba1", {"ssm_cfg": {"layer": "Mamba3"}}, "layer 'Mamba3' is not covered: expected one of Mamba1, Mamba2"),
        ("Mamba1", {"ssm_cfg": {"headdim": 8}}, "ssm_cfg: setting 'headdim' is unknown"),
        ("Mamba2", {"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate True is not covered"),
        ("Mamba2", {"ssm_cfg": {"layer": "Mamba2", "headdim": 7}}, "not a usable configuration"),
        ("Mamba1", {"d_model": "wide"}, "not a usable configuration"),
        ("Mamba1", {"pad_vocab_size_multiple": 0}, "not a usable configuration"),
    ],
)
def test_settings_that_are_not_covered_are_refused(
    kind: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = reference.write(tmp_path, kind, reference.random_tensors(kind), **changes)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("problem", ["missing", "unexpected", "mismatched"])
@pytest.mark.parametrize("name", ["backbone.layers.2.mixer.out_proj.weight", "backbone.norm_f.weight"])
def test_a_checkpoint_that_is_not_whole_is_refused(kind: str, problem: str, name: str, tmp_path: Path) -> None:
    tensors = reference.random_tensors(kind)
    if problem == "missing":
        del tensors[name]
    elif problem == "mismatched":
        tensors[name] = tensors[name][1:]
    else:
        name += ".more"
        tensors[name] = torch.zeros(2)
    folder = reference.write(tmp_path, kind, tensors)
    with pytest.raises(ModelError, match=rf"1 {problem} tensors, such as .*{name}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_an_embedding_with_too_few_rows_is_refused(tmp_path: Path) -> None:
    tensors = reference.random_tensors("Mamba1")
    rows = tensors["backbone.embedding.weight"][:45]
    folder = reference.write(tmp_path, "Mamba1", tensors | {"backbone.embedding.weight": rows, "lm_head.weight": rows})
    with pytest.raises(ModelError, match=r"backbone.embeddings.weight with shape \(45, 24\) instead of \(48, 24\)"):
        load(folder)


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_payload_is_refused_and_does_not_run(writer: str, tmp_path: Path) -> None:
    tensors, trace = reference.random_tensors("Mamba1"), tmp_path / "ran"
    folder = reference.write(tmp_path, "Mamba1", tensors)
    loaded = tensors | {"payload": Payload(trace)}
    if writer == "torch":
        torch.save(loaded, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(loaded))
    with pytest.raises(ModelError, match="damaged or holds more than tensors, which is not run") as caught:
        load(folder)
    assert not trace.exists()
    assert "\n" not in str(caught.value)
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists(), "the payload does nothing, so its absence proves nothing"


def test_files_without_tensors_are_refused(tmp_path: Path) -> None:
    folder = reference.write(tmp_path, "Mamba1", {})
    torch.save([torch.zeros(2)], folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="holds no tensors by name"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="damaged or holds more"):
        load(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no weights: expected model.safetensors or pytorch_model.bin"):
        load(folder)


def test_the_tokenizer_beside_the_weights_is_taken(tmp_path: Path) -> None:
    folder = reference.write(tmp_path, "Mamba2", reference.random_tensors("Mamba2"))
    load_tokenizer().save_pretrained(folder)
    tokenizer = loading.load_model(folder)[1]
    assert tokenizer is not None
    assert tokenizer("Anna").input_ids == load_tokenizer()("Anna").input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_tokenizer_the_published_one_is_taken(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    published: dict[str, list[int]] = {"EleutherAI/gpt-neox-20b": [0] * 48, "mine": [0] * 50_000}
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda source, **_: published[source])
    folder = reference.write(tmp_path, kind, reference.random_tensors(kind))
    assert loading.load_model(folder)[1] is published["EleutherAI/gpt-neox-20b"]
    assert capsys.readouterr().err == f"model {folder} has no tokenizer beside it: taking EleutherAI/gpt-neox-20b\n"
    assert loading.load_model(folder, tokenizer="mine")[1] is published["mine"]
    assert not capsys.readouterr().err
    published["EleutherAI/gpt-neox-20b"] = [0] * 49
    with pytest.raises(ModelError, match=r"48 tokens, where EleutherAI/gpt-neox-20b has 49: pass tokenizer="):
        loading.load_model(folder)
