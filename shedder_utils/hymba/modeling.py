"""The Hymba model: in every layer the hybrid heads, then an MLP.

    h <- h + heads(norm(h))
    h <- h + mlp(norm(h))

Learned meta tokens stand before the first token of every sequence, and every token attends to them. The tensors have
the names of the published checkpoint, where the heads are called `mamba` and the MLP is the only expert of a `moe`.

Beyond the published code: decoding sees exactly the window that prefill sees, a prompt may be read in several calls,
and left padding changes nothing, because each row's meta tokens are put between its padding and its first token.

B batch, L tokens, M meta tokens, T = M + L, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.mamba.modeling_mamba import MambaRMSNorm as RMSNorm
from transformers.utils import can_return_tuple

from .cache import HymbaCache
from .configuration import HymbaConfig
from .mixer import HymbaMixer, KeysValues, Pass, rotations, visible


class HymbaMLP(nn.Module):
    """down(silu(gate(h)) * up(h))."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        """(B, L, D) for (B, L, D)."""
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class HymbaMoE(nn.Module):
    """The published checkpoint's name for the MLP: a mixture of one expert, without a router."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList([HymbaMLP(config)])

    def forward(self, h: Tensor) -> Tensor:
        """(B, L, D) for (B, L, D)."""
        return self.experts[0](h)


class HymbaLayer(nn.Module):
    """One layer: the hybrid heads, then the MLP, each with its norm and residual.

    Pruning sets `input_layernorm` and `mamba`, or `pre_moe_layernorm` and `moe`, to None: that half is then skipped.
    """

    def __init__(self, config: HymbaConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.input_layernorm: nn.Module | None = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mamba: nn.Module | None = HymbaMixer(config, layer_idx)
        self.pre_moe_layernorm: nn.Module | None = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.moe: nn.Module | None = HymbaMoE(config)

    def forward(self, h: Tensor, here: Pass, shared: KeysValues | None) -> tuple[Tensor, KeysValues | None]:
        """The stream (B, L, D) after the layer, and the keys and values for the layers that reuse them."""
        if self.mamba is not None and self.input_layernorm is not None:
            added, shared = self.mamba(self.input_layernorm(h), here, shared)
            h = h + added
        if self.moe is not None and self.pre_moe_layernorm is not None:
            h = h + self.moe(self.pre_moe_layernorm(h))
        return h, shared


class HymbaPreTrainedModel(PreTrainedModel):
    """What the Hymba classes share: configuration, initialisation, loading and saving."""

    config: HymbaConfig
    config_class = HymbaConfig
    base_model_prefix = "model"
    _no_split_modules = ["HymbaLayer"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HymbaModel):  # after its children; a mixer, without tensors of its own, is not asked
            init.normal_(module.memory_tokens, std=self.config.initializer_range)
            for layer in module.layers:
                if hasattr(layer.mamba, "A_log"):  # a pruned layer may have no scan
                    layer.mamba.init_scan()


class HymbaModel(HymbaPreTrainedModel):
    """The model without its head."""

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.memory_tokens = nn.Parameter(torch.empty(config.num_memory_tokens, config.hidden_size))
        self.layers = nn.ModuleList([HymbaLayer(config, index) for index in range(config.num_hidden_layers)])
        self.final_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, L, D) for input_ids (B, L), or for their embeddings (B, L, D).

        attention_mask: (B, L), 0 at left padding, read in the first call of a sequence. past_key_values: what earlier
        calls returned; use_cache: whether to return it, by default as configured, and not in training.
        """
        embeddings = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = HymbaCache(self.config) if use_cache and past_key_values is None else past_key_values
        first = cache is None or cache.tokens == 0
        padding = left_padding(attention_mask) if first else cache.padding
        h = self.with_meta_tokens(embeddings, padding) if first else embeddings
        if cache is not None:
            if first:
                cache.begin(padding, self.config.num_memory_tokens)
            cache.tokens += embeddings.shape[1]
        here, shared = self.this_pass(h, padding, cache, first), None
        for layer in self.layers:
            h, shared = layer(h, here, shared)
        h = self.final_layernorm(h)[:, -embeddings.shape[1] :]
        return BaseModelOutputWithPast(last_hidden_state=h, past_key_values=cache if use_cache else None)

    def with_meta_tokens(self, embeddings: Tensor, padding: Tensor | None) -> Tensor:
        """(B, T, D): in each row the padding, then the meta tokens, then the text, from embeddings (B, L, D)."""
        meta = self.memory_tokens.to(embeddings.dtype).expand(len(embeddings), -1, -1)
        stream = torch.cat([meta, embeddings], dim=1)
        if padding is None:
            return stream
        M, place, before = meta.shape[1], torch.arange(stream.shape[1], device=stream.device), padding[:, None]
        order = torch.where(place < before, place + M, torch.where(place < before + M, place - before, place))
        return torch.take_along_dim(stream, order[..., None], dim=1)

    def this_pass(self, h: Tensor, padding: Tensor | None, cache: HymbaCache | None, first: bool) -> Pass:
        """The rotations and masks of a pass over h (B, T, D) at first, (B, L, D) later."""
        L, W, M = h.shape[1], self.config.sliding_window, self.config.num_memory_tokens
        total = L if cache is None else M + cache.tokens
        places = torch.arange(total, device=h.device)
        queries = places[total - L :]
        cos, sin = rotations(queries, self.config, h.dtype)
        in_window = places
        if not first and total - L > cache.front + W:
            in_window = torch.cat([places[: cache.front], places[total - L - W :]])
        plain = padding is None and (first or L == 1)
        everything = None if plain else visible(queries, places, total, M, padding)
        window = None if plain and (L == 1 or total <= W + 1 + M) else visible(queries, in_window, W, M, padding)
        real = None if padding is None or not first else (places >= padding[:, None])[..., None]
        return Pass(cos, sin, everything, window, real, cache, first)


class HymbaForCausalLM(HymbaPreTrainedModel, GenerationMixin):
    """Hymba with its language modelling head, which is the embedding in the published models."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(config)
        self.model = HymbaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() then leaves it to forward() to make a HymbaCache

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: HymbaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **loss_options: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, L, V) float32; see `HymbaModel.forward`.

        labels: (B, L) token ids, -100 where none counts; gives the mean next-token loss. logits_to_keep: only for the
        last so many tokens; 0 for all.
        """
        outputs = self.model(input_ids, attention_mask, past_key_values, inputs_embeds, use_cache)
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:]).float()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **loss_options)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


def left_padding(attention_mask: Tensor | None) -> Tensor | None:
    """(B,) int64, how many zeros a mask (B, L) begins with in each row; None if no row is padded."""
    if attention_mask is None:
        return None
    padding = (attention_mask.cumsum(-1) == 0).sum(-1)
    return padding if padding.any() else None
