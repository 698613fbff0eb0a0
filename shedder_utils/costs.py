"""What a forward pass costs: arithmetic in prefill, memory traffic in decode. Their ratios are the ideal speedups.

Prefill is bound by arithmetic; decode at batch 1 by reading every weight and state once for each token. A pruned model
can at best be faster by the share of that which it no longer does. Both are counted on the model as it runs, call by
call, so that a block which several layers share counts each time it is used.

B batch, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from .families import family_of
from .importance import evaluating


@dataclass(frozen=True)
class Costs:
    """Of a prompt at batch 1, and of one token decoded after it.

    flops: multiplications and additions of the prefill, with the logits of the last token alone; weight_bytes: weights
    read for one decoded token; cache_bytes: what the cache holds after the prompt, attention_bytes: the part of it that
    is keys and values.
    """

    flops: float
    weight_bytes: int
    cache_bytes: int
    attention_bytes: int

    @property
    def decode_bytes(self) -> int:
        """Memory traffic of one decoded token: weights, keys and values are read, states read and written."""
        return self.decode_bytes_of(1)

    def decode_bytes_of(self, sequences: int) -> int:
        """The same for a token of each of several sequences, which share one reading of the weights."""
        return self.weight_bytes + sequences * (2 * self.cache_bytes - self.attention_bytes)

    def ideal(self, dense: Costs, phase: str, sequences: int = 1) -> float:
        """The ideal speedup against a dense model in "prefill" or "decode": its cost over this one's."""
        if phase == "prefill":
            return dense.flops / self.flops
        return dense.decode_bytes_of(sequences) / self.decode_bytes_of(sequences)


def costs(model: PreTrainedModel, prompt_tokens: int = 512) -> Costs:
    """What a prefill of `prompt_tokens` tokens and one decoded token cost, counted while they run."""
    prompt = torch.zeros((1, prompt_tokens), dtype=torch.int64, device=model.device)
    with evaluating(model):
        with _counting(model) as prefill:
            output = model(prompt, use_cache=True, logits_to_keep=1)
        held = "cache_params" if "cache_params" in output else "past_key_values"
        size, attended = cache_bytes(output[held]), cache_bytes(output[held], ("keys", "values"))
        with _counting(model) as decode:
            model(prompt[:, :1], use_cache=True, **{held: output[held]})
    return Costs(prefill.flops, decode.weight_bytes, size, attended)


def cache_bytes(cache: Cache, names: tuple[str, ...] = ()) -> int:
    """Bytes that a cache holds: keys and values, states of convolutions and of scans; or only what has these names."""
    held = (value for layer in cache.layers for name, value in vars(layer).items() if not names or name in names)
    return sum(tensor.nbytes for value in held for tensor in _tensors(value))


def _tensors(held: object) -> Iterator[Tensor]:
    """The tensors in a value, in lists, tuples and dicts."""
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, list | tuple | dict):
        for value in held.values() if isinstance(held, dict) else held:
            yield from _tensors(value)


@dataclass
class _Count:
    flops: float = 0.0
    weight_bytes: int = 0
    called: set[nn.Module] = field(default_factory=set)

    def weights(self, module: nn.Module) -> None:
        """The parameters that a module itself holds, read once."""
        self.weight_bytes += sum(parameter.nbytes for parameter in module.parameters(recurse=False))

    def uncalled(self, mixer: nn.Module, tokens: int) -> None:
        """What a mixer reads of its parts without calling them: each weight multiplies once for each token."""
        for part in mixer.modules():
            if part not in self.called:
                self.weights(part)
                if part is not mixer and isinstance(part, nn.Linear | nn.Conv1d):
                    self.flops += 2 * tokens * part.weight.numel()
        self.called.difference_update(mixer.modules())


@contextmanager
def _counting(model: PreTrainedModel) -> Iterator[_Count]:
    """Inside, the calls of the model's modules add to the count."""
    family, count = family_of(model), _Count()

    def called(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object) -> None:
        tokens = next((t.shape[1] for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.ndim > 1), 0)
        if "conv1d" in dict(module.named_children()):
            count.uncalled(module, tokens)
        elif not isinstance(module, nn.Embedding):
            count.weights(module)
            count.called.add(module)
        if isinstance(module, nn.Linear):
            count.flops += 2 * tokens * module.weight.numel()
        count.flops += family.flops_beside_weights(module, tokens)

    hooks = [module.register_forward_hook(called, with_kwargs=True) for module in model.modules()]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()
