"""The models: the real ids, architectures, depths, file formats and special tokens, a few units wide and untrained.

Zamba2 keeps its 10,240 MLP channels: a search removes them in the paper's groups, and the released orders count them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconMambaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Zamba2Config,
)

from shedder_utils import paper
from shedder_utils.families import native
from shedder_utils.hymba import HymbaConfig

from .texts import corpus

WIDTH = 32
VOCABULARY, NEOX_VOCABULARY, LLAMA_VOCABULARY = 509, 287, 539
"""Tokens of each tokenizer: Falcon's, GPT-NeoX's and the hybrids'. Not multiples of what mamba_ssm pads to, as the real
50,277 is not. The smaller, the more tokens has a text: a study of Mamba-2 needs most, and the hybrids take longest."""
SPREAD = 0.2
"""Standard deviation of random weights: with transformers' 0.02 SSMs this narrow change nothing, and searches tie."""
FALCON_WORDS = "TITLE ABSTRACT INTRODUCTION SUMMARY COMMENT ANSWER QUESTION DOMAIN PREFIX SUFFIX MIDDLE"
NATIVE: dict[str, dict[str, Any]] = {
    "state-spaces/mamba-2.8b": {
        "d_model": WIDTH, "n_layer": 64, "vocab_size": NEOX_VOCABULARY, "ssm_cfg": {}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
    },
    "state-spaces/mamba2-2.7b": {
        "d_model": WIDTH, "d_intermediate": 0, "n_layer": 64, "vocab_size": NEOX_VOCABULARY,
        "ssm_cfg": {"layer": "Mamba2"}, "attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16, "tie_embeddings": True,
    },
}  # fmt: skip
RELEASED = {
    "IntelLabs/Mamba-Shedder-Mamba-2.2B": ("state-spaces/mamba-2.8b", "mamba-2.8b", 14),
    "IntelLabs/Mamba-Shedder-Mamba2-2.7B-Pruned-22SSM": ("state-spaces/mamba2-2.7b", "mamba2-2.7b", 22),
}
"""The released checkpoints: the dense model, the released plan, and how many of its removals they lack."""


def build_models(folder: Path) -> None:
    """Write all models and tokenizers into `folder/models/<owner>/<name>/`."""
    root = folder / "models"
    neox_tokenizer(root / "EleutherAI/gpt-neox-20b")
    for number, (name, config) in enumerate(NATIVE.items()):
        tensors = native_tensors(config, seed=number)
        write_native(root / name, config, tensors if number == 0 else _half(tensors))
        for released, (dense, plan, n) in RELEASED.items():
            if dense == name:
                write_native(root / released, config, _half(_without(tensors, plan, n)))
    zamba2(root / "Zyphra/Zamba2-2.7B")
    falcon_mamba(root / "tiiuae/falcon-mamba-7b")
    hymba(root / "nvidia/Hymba-1.5B-Base")


def native_tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """The tensors of a mamba_ssm checkpoint, by the names that mamba_ssm gives them."""
    tensors = _random(native.configuration(config, "stand-in"), seed).state_dict()
    return {name.replace("embeddings.", "embedding."): tensor for name, tensor in tensors.items()}


def write_native(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(tensors, folder / "pytorch_model.bin")


def _without(tensors: dict[str, Tensor], plan: str, n: int) -> dict[str, Tensor]:
    """What the release leaves in its files: nothing of a removed block, neither D nor dt_bias of a removed SSM."""
    absent: tuple[str, ...] = ()
    for component in paper.plan(plan).first(n).components:
        layer = f"backbone.layers.{component.index}."
        absent += (layer,) if component.kind == "mamba_block" else (f"{layer}mixer.D", f"{layer}mixer.dt_bias")
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(absent)}


def _half(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor if name.endswith(("A_log", ".D")) else tensor.half() for name, tensor in tensors.items()}


def zamba2(folder: Path) -> None:
    """Sharded safetensors; the published configuration names plain layers "mamba"."""
    hybrid = (6, 12, 18, 24, 30, 36, 42, 47, 51)
    config = Zamba2Config(
        vocab_size=LLAMA_VOCABULARY, hidden_size=16, num_hidden_layers=54, num_mem_blocks=2, adapter_rank=4,
        layers_block_type=["hybrid" if index in hybrid else "linear_attention" for index in range(54)],
        use_shared_attention_adapter=False, intermediate_size=10240, num_attention_heads=4, num_key_value_heads=4,
        mamba_expand=2, mamba_d_state=64, mamba_headdim=32, n_mamba_heads=1, mamba_ngroups=1, use_mem_rope=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    _random(config, seed=2).bfloat16().save_pretrained(folder, max_shard_size="3MB")
    written = folder / "config.json"
    written.write_text(written.read_text().replace('"linear_attention"', '"mamba"'))
    llama_tokenizer(folder)


def falcon_mamba(folder: Path) -> None:
    """Sharded safetensors; the published configuration states expand 16 beside an inner width of twice the hidden."""
    config = FalconMambaConfig(
        vocab_size=VOCABULARY + 3, hidden_size=WIDTH, num_hidden_layers=64, state_size=16, expand=16,
        intermediate_size=2 * WIDTH, time_step_rank=2, tie_word_embeddings=False, bos_token_id=0, eos_token_id=11,
        pad_token_id=11,
    )  # fmt: skip
    _random(config, seed=3).bfloat16().save_pretrained(folder, max_shard_size="1MB")
    end = "<|endoftext|>"
    tokenizer = byte_level([*(f">>{word}<<" for word in FALCON_WORDS.split()), end], VOCABULARY)
    _save(tokenizer, folder, tokenizer_class="PreTrainedTokenizerFast", eos_token=end, pad_token=end)


def hymba(folder: Path) -> None:
    """One safetensors file beside code of its own, which must not run: importing it ends the process."""
    config = HymbaConfig(
        vocab_size=LLAMA_VOCABULARY + 1, hidden_size=80, num_hidden_layers=32, num_attention_heads=10,
        num_key_value_heads=2, intermediate_size=276, num_memory_tokens=128, sliding_window=1024,
    )  # fmt: skip
    _random(config, seed=4).bfloat16().save_pretrained(folder)
    published = json.loads((folder / "config.json").read_text()) | {
        "auto_map": {
            "AutoConfig": "configuration_hymba.HymbaConfig",
            "AutoModelForCausalLM": "modeling_hymba.HymbaForCausalLM",
        },
        "attn_implementation": "flex", "attn_implementation_new": "flex", "conv_dim": {str(i): 160 for i in range(32)},
        "layer_type": ["h"] * 32, "v_head_dim": 16, "kq_head_dim": -1, "num_mamba": 1, "kq_norm": "none",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(published))
    for module in ("configuration_hymba", "modeling_hymba"):
        (folder / f"{module}.py").write_text("raise SystemExit('remote code ran')\n")
    llama_tokenizer(folder, padding=True)


def _random(config: PretrainedConfig, seed: int) -> PreTrainedModel:
    config.initializer_range = SPREAD
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def neox_tokenizer(folder: Path) -> None:
    """GPT-NeoX's: <|endoftext|> 0, <|padding|> 1, and runs of 24 to 2 spaces at the end."""
    spaces = [" " * n for n in range(24, 1, -1)]
    tokenizer = byte_level(["<|endoftext|>", "<|padding|>"], NEOX_VOCABULARY - len(spaces))
    tokenizer.add_tokens(spaces)
    end = "<|endoftext|>"
    _save(tokenizer, folder, tokenizer_class="GPTNeoXTokenizer", bos_token=end, eos_token=end, unk_token=end)


def byte_level(special: list[str], size: int) -> Tokenizer:
    """Byte-level BPE with its special tokens first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def llama_tokenizer(folder: Path, *, padding: bool = False) -> None:
    """Llama's: <unk> 0, <s> 1 before every text, </s> 2, bytes, pieces that begin with a space; padding: [PAD] last."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        (word for text in corpus() for word in text.split(" ")),
        trainers.BpeTrainer(vocab_size=LLAMA_VOCABULARY, special_tokens=pieces, show_progress=False),
    )
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 3]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", special_tokens=[("<s>", 1)])
    if padding:
        tokenizer.add_special_tokens(["[PAD]"])
    _save(
        tokenizer, folder, tokenizer_class="LlamaTokenizer", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        add_bos_token=True, add_eos_token=False, padding_side="left", **({"pad_token": "[PAD]"} if padding else {}),
    )  # fmt: skip


def _save(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    """Write tokenizer.json, and tokenizer_config.json as published."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
