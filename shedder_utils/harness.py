"""lm-eval's model, whose requests are dealt to the processes that accelerate or torchrun started.

lm-eval would deal them itself, but not to a model that is in memory already, and would put the items' scores in another
order, on which the standard error of a perplexity depends. Here every process gets all requests and all answers, so
every one has the scores of one process; only which requests share a batch differs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar

from lm_eval.models.huggingface import HFLM

from .distributed import gathered, mine, rank

T = TypeVar("T")

logging.getLogger(HFLM.__module__).addFilter(lambda record: "`pretrained`" not in str(record.msg))
"""Without its advice against accelerate for a model in memory, whose requests it would not deal."""


class Harness(HFLM):
    """HFLM, on this process's share of the items. Without other processes it is HFLM as it is."""

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation its log-likelihood, and whether it is the most likely one."""
        return _dealt(super().loglikelihood, requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text."""
        return _dealt(super().loglikelihood_rolling, requests, disable_tqdm)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt."""
        return _dealt(super().generate_until, requests, disable_tqdm)


def _dealt(answer: Callable[..., list[T]], requests: Sequence[Any], disable_tqdm: bool) -> list[T]:
    """The answers to all requests, of which this process gives those to its own items.

    An item's requests stay together, since those with one context may share a pass.
    """
    items = [list(group) for _, group in groupby(requests, key=lambda one: (one.task_name, one.doc_id))]
    share = mine(items)
    own = [request for _, item in share for request in item]
    answers = iter(answer(own, disable_tqdm=disable_tqdm or rank() > 0) if own else [])
    found = gathered({number: [next(answers) for _ in item] for number, item in share})
    return [one for item in found for one in item]
