"""Importance: how much worse the model is without a component, by calibration perplexity.

Perplexity is the paper's: exp of the mean over sequences of each sequence's mean next-token loss (section 3.3,
Algorithm 1; `paper.yaml`, hyperparameters).

B batch, L tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .calibration import Calibration


def perplexity(model: PreTrainedModel, calibration: Calibration) -> float:
    """The calibration perplexity of a model, from losses in float32 or better; inf if a loss is not a number."""
    with evaluating(model):
        return to_perplexity(_losses(model, batch) for batch in calibration.batches)


def sequence_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """(B,) float64, each sequence's mean next-token loss in nats, from logits (B, L, V) and token ids (B, L)."""
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).double().mean(dim=1)


def to_perplexity(losses: Iterable[Tensor]) -> float:
    """exp of the mean of all sequences' losses; inf where that is not a number, so that it is never the best."""
    value = torch.cat(list(losses)).mean().exp().item()
    return float("inf") if value != value else value


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in evaluation mode and records no gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _losses(model: PreTrainedModel, batch: Tensor) -> Tensor:
    ids = batch.to(model.device)
    return sequence_losses(model(ids, use_cache=False).logits, ids).cpu()
