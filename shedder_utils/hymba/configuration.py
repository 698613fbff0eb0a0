"""Hymba's configuration, with the names and the default values of the published Hymba-1.5B.

Two lists decide the structure: `global_attn_idx`, the layers whose attention sees everything (the others see a sliding
window), and `kv_reuse_group`, runs of layers that share keys and values; the first of a run makes them for the others.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

ONLY: dict[str, tuple[Any, ...]] = {
    "kq_norm": ("none",),
    "num_mamba": (1,),
    "num_experts": (1,),
    "mamba_proj_bias": (False,),
    "mamba_conv_bias": (True,),
    "mamba_inner_layernorms": (True,),
    "hidden_act": ("silu",),
    "mlp_hidden_act": ("silu",),
    "rope": (True,),
    "rope_type": ("ntk",),
    "memory_tokens_interspersed_every": (0,),
    "kv_reuse_every_i_layer": (-1,),
    "kv_weight_reuse": (False,),
    "attention_dropout": (0.0,),
}
"""Settings of the published file that this implementation has in one form only."""


@strict
class HymbaConfig(PretrainedConfig):
    """The configuration of a Hymba model; every default is the 1.5B's.

    kq_head_dim, attn_hidden_size: -1 means that the query heads together are as wide as the model. Value heads together
    are as wide as the Mamba heads, `mamba_expand * hidden_size`. mamba_dt_rank: None is a sixteenth of hidden_size.
    num_memory_tokens: learned meta tokens before every sequence. sliding_window: how far back, beside the meta tokens,
    a layer sees that is not global. global_attn_idx, kv_reuse_group: None arranges them as in the 1.5B.

    Raises ValueError for values that do not go together, and for a variant that is not implemented.
    """

    model_type = "hymba"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 32001
    hidden_size: int = 1600
    num_hidden_layers: int = 32
    num_attention_heads: int = 25
    num_key_value_heads: int = 5
    kq_head_dim: int = -1
    attn_hidden_size: int = -1
    intermediate_size: int = 5504
    mamba_expand: int = 2
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_dt_rank: int | None = None
    num_memory_tokens: int = 128
    sliding_window: int = 1024
    global_attn_idx: list[int] | None = None
    kv_reuse_group: list[list[int]] | None = None
    rope_theta: float = 10000.0
    max_position_embeddings: int = 8192
    orig_max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    all_blocks_removable: bool = False
    """Whether of layers that share keys and values not only the last one's block is removable, but also the others',
    the first one's once all the rest are gone."""

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("attn_implementation", None)  # the published file names a kernel of its own code
        kwargs.pop("v_head_dim", None)  # it states this too, which follows from the other widths
        if self.mamba_dt_rank is None:
            self.mamba_dt_rank = math.ceil(self.hidden_size / 16)
        if self.kq_head_dim == -1:
            self.kq_head_dim = self.hidden_size // self.num_attention_heads
        if self.global_attn_idx is None:
            self.global_attn_idx = sorted({0, max(0, self.num_hidden_layers // 2 - 1), self.num_hidden_layers - 1})
        if self.kv_reuse_group is None:
            self.kv_reuse_group = reuse_groups(self.num_hidden_layers, self.global_attn_idx)
        super().__post_init__(**kwargs)
        self._check()

    @property
    def inner_size(self) -> int:
        """E, the width of the Mamba heads and of the attention's output."""
        return self.mamba_expand * self.hidden_size

    @property
    def v_head_dim(self) -> int:
        """The width of a value head."""
        return self.inner_size // self.num_attention_heads

    def is_global(self, layer: int) -> bool:
        """Whether a layer's attention sees all earlier tokens."""
        return layer in self.global_attn_idx

    def group_of(self, layer: int) -> list[int]:
        """The layers that share keys and values with a layer, itself included, in order; the first makes them."""
        return next((group for group in self.kv_reuse_group if layer in group), [layer])

    def reuses(self, layer: int) -> bool:
        """Whether a layer takes its keys and values from an earlier one."""
        return layer != self.group_of(layer)[0]

    def reused_by(self, layer: int) -> list[int]:
        """The layers that take their keys and values from this one."""
        group = self.group_of(layer)
        return group[1:] if layer == group[0] else []

    def _check(self) -> None:
        for name, allowed in ONLY.items():
            if getattr(self, name, allowed[0]) not in allowed:
                raise ValueError(f"hymba: {name} is {getattr(self, name)!r}, only {allowed[0]!r} is implemented")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if self.inner_size % heads or heads % groups or self.kq_head_dim % 2 or self.kq_head_dim < 4:
            raise ValueError(
                f"hymba: {heads} heads must divide the inner width {self.inner_size} and be a multiple of the {groups} "
                f"key-value heads; the query width of a head, {self.kq_head_dim}, must be even and at least 4"
            )
        if self.attn_hidden_size not in (-1, heads * self.kq_head_dim):
            raise ValueError(f"hymba: attn_hidden_size is {self.attn_hidden_size}, expected {heads * self.kq_head_dim}")
        for group in self.kv_reuse_group:
            run = bool(group) and group == list(range(group[0], min(group[0] + len(group), self.num_hidden_layers)))
            if not run or len({self.is_global(layer) for layer in group}) > 1:
                raise ValueError(
                    f"hymba: kv_reuse_group {group} is not a run of neighbouring layers, all global or all local"
                )


def reuse_groups(n_layers: int, global_layers: list[int]) -> list[list[int]]:
    """Pairs of neighbours between the global layers; where their number is odd, the first three go together."""
    groups = []
    for before, after in pairwise([-1, *sorted(global_layers), n_layers]):
        first = before + 1
        while after - first > 1:
            size = 3 if (after - first) % 2 else 2
            groups.append(list(range(first, first + size)))
            first += size
    return groups
