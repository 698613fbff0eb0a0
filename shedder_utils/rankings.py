"""Importance as estimated: all candidates from one pass over the calibration data, or from none.

The paper has no such baselines; these are the usual ones, each stated so that it fits every kind of component:

    block_influence  1 - cos(with, without), of the stream after the component's layer: for a whole residual block that
                     is its output against its input
    taylor           |gradient of the loss . (without - with)| there: the change of the loss to first order
    magnitude        the sum of the absolute values of the weights that go
    random           a draw, from the seed and the candidate's name

All of them are scored with what is gone already, and the lowest goes next.

B batch, L tokens, C candidates, S sequences, D model width.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from .calibration import Calibration
from .components import Cut
from .distributed import gathered, mine
from .families import Stream, family_of
from .importance import finite, logits, tokens_at_once
from .removal import removed

Ranking = Callable[[PreTrainedModel, Calibration, Sequence[Cut], int], Tensor]
"""(model, calibration, candidates, seed) -> (C, S) float64, or (C, 1): what is averaged to a candidate's score."""


def block_influence(model: PreTrainedModel, calibration: Calibration, candidates: Sequence[Cut], seed: int) -> Tensor:
    """(C, S), how far a component turns the stream: 1 - cosine, the mean over tokens."""
    family, at = family_of(model), _by_layer(model, candidates)

    def of_batch(ids: Tensor) -> dict[Cut, Tensor]:
        found, stream = {}, family.start(model, ids)
        for index in range(len(family.layers(model))):
            after = _step(model, index, stream)
            for candidate in at[index]:
                without = _without(model, candidate, stream)
                turned = cosine_similarity(after["hidden"].double(), without["hidden"].double(), dim=-1)
                found[candidate] = 1 - turned.mean(dim=1)
            stream = after
        return found

    return _over_batches(model, calibration, candidates, of_batch)


def taylor(model: PreTrainedModel, calibration: Calibration, candidates: Sequence[Cut], seed: int) -> Tensor:
    """(C, S), nats: the change of a sequence's loss to first order, without sign.

    The gradient goes back through one layer at a time, which is computed again for it, so that memory is bounded.
    """
    family, at = family_of(model), _by_layer(model, candidates)

    def of_batch(ids: Tensor) -> dict[Cut, Tensor]:
        found, streams = {}, [family.start(model, ids)]
        for index in range(len(family.layers(model))):
            streams.append(_step(model, index, streams[-1]))
        slope = _slope_after_last(model, streams[-1], ids)
        for index in reversed(range(len(streams) - 1)):
            after, before = streams.pop(), streams[-1]
            for candidate in at[index]:
                found[candidate] = _change(slope, _without(model, candidate, before), after).abs()
            slope = _slope_before(model, index, before, slope)
        return found

    return _over_batches(model, calibration, candidates, of_batch)


def magnitude(model: PreTrainedModel, calibration: Calibration, candidates: Sequence[Cut], seed: int) -> Tensor:
    """(C, 1), the L1 norm of the weights of the component's layer that are read no more without it."""
    family = family_of(model)

    def norm(candidate: Cut) -> float:
        read = family.read_by(model, family.layer_of(model, candidate.component))
        return sum(weight.double().abs().sum().item() for weight in read)

    scores = []
    for candidate in candidates:
        whole = norm(candidate)
        with removed(model, [candidate]):
            scores.append(whole - norm(candidate))
    return torch.tensor(scores, dtype=torch.float64)[:, None]


def at_random(model: PreTrainedModel, calibration: Calibration, candidates: Sequence[Cut], seed: int) -> Tensor:
    """(C, 1), from 0 to 1, the same for the same seed and candidate."""
    scores = [random.Random(f"{seed} {candidate}").random() for candidate in candidates]
    return torch.tensor(scores, dtype=torch.float64)[:, None]


RANKINGS: dict[str, Ranking] = {
    "block_influence": block_influence,
    "taylor": taylor,
    "magnitude": magnitude,
    "random": at_random,
}
"""The metrics of a search that are estimated."""


def _by_layer(model: PreTrainedModel, candidates: Sequence[Cut]) -> dict[int, list[Cut]]:
    at = defaultdict(list)
    for candidate in candidates:
        at[family_of(model).layer_of(model, candidate.component)].append(candidate)
    return at


def _over_batches(
    model: PreTrainedModel,
    calibration: Calibration,
    candidates: Sequence[Cut],
    of_batch: Callable[[Tensor], dict[Cut, Tensor]],
) -> Tensor:
    """(C, S) from what is found (B,) for each candidate on each batch. Raises ModelError where one is not finite."""
    found = {}
    for number, batch in mine(calibration.batches):
        values = of_batch(batch.to(model.device))
        found[number] = torch.stack([values[candidate] for candidate in candidates]).cpu()
    everything = torch.cat(gathered(found), dim=1)
    finite(model, everything.abs().max().item(), "the greatest importance")
    return everything


def _step(model: PreTrainedModel, index: int, stream: Stream) -> Stream:
    family = family_of(model)
    return family.step(model, family.layers(model)[index], stream)


def _without(model: PreTrainedModel, candidate: Cut, stream: Stream) -> Stream:
    """The stream after a candidate's layer, without the candidate."""
    with removed(model, [candidate]):
        return _step(model, family_of(model).layer_of(model, candidate.component), stream)


def _change(slope: Stream, without: Stream, after: Stream) -> Tensor:
    """(B,) float64, slope . (without - after), over all that flows between the layers."""
    parts = [(slope[name].double() * (without[name] - after[name]).double()).flatten(1).sum(dim=1) for name in slope]
    return torch.stack(parts).sum(dim=0)


def _slope_after_last(model: PreTrainedModel, stream: Stream, ids: Tensor) -> Stream:
    """The gradients of each sequence's mean loss in the stream after the last layer."""
    leaves = _leaves(stream)
    with torch.enable_grad():
        states = family_of(model).finish(model, leaves)
    at_head = _slope_at_head(model.get_output_embeddings(), states.detach(), ids)
    return _gradients([states], [at_head], leaves)


def _slope_at_head(head: nn.Linear, states: Tensor, ids: Tensor) -> Tensor:
    """(B, L, D), the gradients of each sequence's mean loss in what the vocabulary projection reads."""
    n, slopes = tokens_at_once(head), []
    for part, targets in zip(states[:, :-1].flatten(0, 1).split(n), ids[:, 1:].flatten().split(n), strict=True):
        part = part.detach().requires_grad_()
        with torch.enable_grad():
            loss = cross_entropy(logits(head, part), targets, reduction="sum")
        slopes.append(torch.autograd.grad(loss, part)[0])
    slope = torch.zeros_like(states, dtype=torch.promote_types(states.dtype, torch.float32))
    slope[:, :-1] = torch.cat(slopes).view(len(states), -1, states.shape[-1])
    return slope.div_(ids.shape[1] - 1)


def _slope_before(model: PreTrainedModel, index: int, before: Stream, slope: Stream) -> Stream:
    """The gradients in the stream before a layer, from those after it."""
    leaves = _leaves(before)
    with torch.enable_grad():
        after = _step(model, index, leaves)
    return _gradients([after[name] for name in slope], list(slope.values()), leaves)


def _leaves(stream: Stream) -> Stream:
    return {name: tensor.detach().requires_grad_() for name, tensor in stream.items()}


def _gradients(outputs: list[Tensor], slopes: list[Tensor], leaves: Stream) -> Stream:
    """Gradients by name, where there are any, in float32 or better.

    On their way back through a layer they are scaled by a power of two, so that the largest is about 1: they are small,
    and float16 would round many of them to zero.
    """
    scale = 2.0 ** math.frexp(max(slope.abs().max().item() for slope in slopes))[1]
    scaled = [(slope / scale).to(output.dtype) for slope, output in zip(slopes, outputs, strict=True)]
    found = torch.autograd.grad(outputs, list(leaves.values()), scaled, allow_unused=True)
    return {
        name: gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * scale
        for name, gradient in zip(leaves, found, strict=True)
        if gradient is not None
    }
