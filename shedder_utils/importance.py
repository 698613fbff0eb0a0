"""Importance as measured: how much worse the model computes without a component.

Perplexity is the paper's: exp of the mean over sequences of each sequence's mean next-token loss (section 3.3,
Algorithm 1; `paper.yaml`, hyperparameters). The divergence from the dense model is the other measure. Both come from a
pass over the calibration data; the vocabulary projection runs on some tokens at a time, never on all of them.

B batch, L tokens, S sequences, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .calibration import Calibration
from .distributed import gathered, mine
from .errors import ModelError
from .removal import is_masked

LOGITS_AT_ONCE = 2**25
"""How many logits there are at once: 128 MiB in float32."""


class Measure(ABC):
    """What a pass over the calibration data tells of a model: a value for each sequence, and a score from all."""

    def prepare(self, model: PreTrainedModel, calibration: Calibration) -> None:  # noqa: B027
        """Note what is needed of the dense model, before anything is removed from it."""

    @abstractmethod
    def values(self, model: PreTrainedModel, states: Tensor, ids: Tensor, number: int) -> Tensor:
        """(B,) float64 from what the vocabulary projection reads (B, L, D), for calibration batch `number` (B, L)."""

    @abstractmethod
    def score(self, values: Tensor) -> float:
        """One number from those of all sequences (S,): lower is better, inf where it is not a number."""

    @abstractmethod
    def tied(self, score: float, tolerance: float) -> float:
        """Up to which score another one is the same within rounding. tolerance: of the mean loss, in nats."""


class Perplexity(Measure):
    """exp of the mean of the sequences' mean next-token losses, which are in nats."""

    def values(self, model: PreTrainedModel, states: Tensor, ids: Tensor, number: int) -> Tensor:
        """See `Measure`."""
        head = model.get_output_embeddings()
        targets = ids[:, 1:].flatten().split(tokens_at_once(head))
        slices = zip(_predictions(head, states), targets, strict=True)
        losses = torch.cat([cross_entropy(logits, wanted, reduction="none") for logits, wanted in slices])
        return losses.view(len(ids), -1).double().mean(dim=1)

    def score(self, values: Tensor) -> float:
        """See `Measure`."""
        return _or_inf(values.mean().exp().item())

    def tied(self, score: float, tolerance: float) -> float:
        """See `Measure`."""
        return score * (1 + tolerance)


class Divergence(Measure):
    """The mean over sequences and tokens of KL(dense || pruned), of the next token's distribution, in nats."""

    def __init__(self) -> None:
        self.dense: dict[int, Tensor] = {}

    def prepare(self, model: PreTrainedModel, calibration: Calibration) -> None:
        """See `Measure`."""
        for number, batch in mine(calibration.batches):
            self.dense[number] = final_states(model, batch.to(model.device))

    def values(self, model: PreTrainedModel, states: Tensor, ids: Tensor, number: int) -> Tensor:
        """See `Measure`."""
        head, kl = model.get_output_embeddings(), []
        for ours, theirs in zip(_predictions(head, states), _predictions(head, self.dense[number]), strict=True):
            log_p, log_q = theirs.log_softmax(dim=-1), ours.log_softmax(dim=-1)
            kl.append((log_p.exp() * (log_p - log_q)).sum(dim=-1))
        return torch.cat(kl).view(len(ids), -1).double().mean(dim=1)

    def score(self, values: Tensor) -> float:
        """See `Measure`."""
        return _or_inf(values.mean().item())

    def tied(self, score: float, tolerance: float) -> float:
        """See `Measure`."""
        return score + tolerance


MEASURES: dict[str, type[Measure]] = {"perplexity": Perplexity, "kl": Divergence}
"""The metrics of a search that are measured by removing a candidate."""


def perplexity(model: PreTrainedModel, calibration: Calibration) -> float:
    """The calibration perplexity of a model, from losses in float32 or better.

    Under torchrun every rank has to call it, and gets the same. Where a loss is not a number it is inf for a masked
    model, which lacks too much; raises ModelError for any other.
    """
    measure = Perplexity()
    found = measure.score(full_pass(model, calibration, measure))
    return found if is_masked(model) else finite(model, found, "the perplexity")


def finite(model: PreTrainedModel, value: float, what: str) -> float:
    """`value`, which was computed with a model. Raises ModelError, with what it is, where it is no finite number."""
    if math.isfinite(value):
        return value
    advice = (
        "float16 is too narrow for it, choose dtype bfloat16 or float32"
        if model.dtype == torch.float16
        else "its weights or logits are not finite, look at the checkpoint it was loaded from"
    )
    name, dtype = model.config._name_or_path or model.config.model_type, str(model.dtype).removeprefix("torch.")
    raise ModelError(f"{what} of {name} in {dtype} is {value}, expected a finite number: {advice}")


def full_pass(model: PreTrainedModel, calibration: Calibration, measure: Measure) -> Tensor:
    """(S,) float64, the measure's values for all sequences, in their order."""
    found = {}
    with evaluating(model):
        for number, batch in mine(calibration.batches):
            ids = batch.to(model.device)
            found[number] = measure.values(model, final_states(model, ids), ids, number).cpu()
    return torch.cat(gathered(found))


def final_states(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """What the vocabulary projection reads, (B, L, D), for token ids (B, L)."""
    return model.base_model(ids, use_cache=False).last_hidden_state


def tokens_at_once(head: nn.Linear) -> int:
    """For how many tokens there are logits at once."""
    return max(1, LOGITS_AT_ONCE // head.out_features)


def logits(head: nn.Linear, states: Tensor) -> Tensor:
    """(n, V) in float32 or better, from states (n, D)."""
    found = head(states.to(head.weight.dtype))
    return found.to(torch.promote_types(found.dtype, torch.float32))


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


def _predictions(head: nn.Linear, states: Tensor) -> Iterator[Tensor]:
    """Logits of every token that another one follows, some at a time."""
    for part in states[:, :-1].flatten(0, 1).split(tokens_at_once(head)):
        yield logits(head, part)


def _or_inf(value: float) -> float:
    return float("inf") if value != value else value
