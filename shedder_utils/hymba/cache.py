"""What Hymba remembers between calls: keys and values, the last inputs of each convolution, the states of the scans.

Layers that reuse another's keys and values keep none. Layers with a sliding window keep the meta tokens and the window.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from .configuration import HymbaConfig


class WindowLayer(LinearAttentionAndFullAttentionLayer):
    """The cache of a layer that sees the meta tokens and a window: it drops what no later token sees."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def update(self, keys: Tensor, values: Tensor, front: int) -> tuple[Tensor, Tensor]:
        """All that this call sees, (B, heads, held + new, width): what was held, and what is new.

        front: how many places at the beginning are always kept.
        """
        keys, values = super().update(keys, values)
        if keys.shape[2] > front + self.window:
            self.keys, self.values = (
                torch.cat([x[:, :, :front], x[:, :, -self.window :]], dim=2) for x in (keys, values)
            )
        return keys, values


class HymbaCache(Cache):
    """The cache of a whole model.

    tokens: how many were read, not counting meta tokens; padding: (B,) how many of them are left padding, None if none
    is; front: how many places at the beginning hold padding and meta tokens, in the row with the most padding.
    """

    def __init__(self, config: HymbaConfig) -> None:
        super().__init__(layers=[_layer(config, index) for index in range(config.num_hidden_layers)])
        self.tokens = 0
        self.padding: Tensor | None = None
        self.front = 0

    def begin(self, padding: Tensor | None, n_meta: int) -> None:
        """Note the padding (B,) of the first tokens, and how many meta tokens there are."""
        self.padding = padding
        self.front = n_meta + (0 if padding is None else int(padding.max()))

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object) -> tuple[Tensor, Tensor]:
        """Add the keys and values of one layer; return all that this call sees."""
        seen: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, self.front)
        return seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, whichever layers are pruned."""
        return self.tokens

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.tokens, self.padding, self.front = 0, None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from what row beam_idx[i] was, for beam search."""
        super().reorder_cache(beam_idx)
        if self.padding is not None:
            self.padding = self.padding.index_select(0, beam_idx)


def _layer(config: HymbaConfig, index: int) -> LinearAttentionLayer:
    if config.reuses(index):
        return LinearAttentionLayer()
    return LinearAttentionAndFullAttentionLayer() if config.is_global(index) else WindowLayer(config.sliding_window)
