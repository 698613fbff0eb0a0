"""Several processes, one search or evaluation: what each rank computes, and how all come to know the same.

torchrun starts them, or accelerate, which calls it. The calibration batches, or the items of lm-eval's tasks, are dealt
to the ranks in turn. A rank computes the losses of a batch as one process alone would; they are gathered and put in the
order of the batches before anything is averaged. So every rank sees the same numbers and takes the same decisions, and
the plan is the same for any number of ranks. Only the first rank writes.

Without torchrun there is one rank, and nothing here does anything.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import ModelError, ShedderError

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a rank waits for the others, of which one may have hours of work left. One that dies is noticed at once."""


def start(device: str = "cpu") -> str:
    """Join the other processes if torchrun started this one; returns the device of this rank.

    device: "cuda" becomes the rank's own GPU. What the ranks tell each other is small and on the CPU: gloo carries it.
    Raises ModelError where a node has fewer GPUs than ranks, and for a GPU by number, which all ranks would share.
    """
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return device
    if device.startswith("cuda:"):
        raise ModelError(f"device {device} under torchrun: expected cuda, of which each process takes a GPU of its own")
    if device == "cuda":
        local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= there:
            raise ModelError(f"torchrun started rank {local} on a node with {there} GPUs: start one process for each")
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    dist.init_process_group("gloo", timeout=PATIENCE)
    signal.signal(signal.SIGTERM, _stopped)
    return device


def stop() -> None:
    """Leave the other processes, at the end of what was begun with `start`."""
    if dist.is_initialized():
        if signal.getsignal(signal.SIGTERM) is _stopped:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def ranks_here() -> int:
    """How many processes share this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_initialized() else 1


def mine(items: Sequence[T]) -> list[tuple[int, T]]:
    """The items that this rank takes care of, with their numbers."""
    return list(enumerate(items))[rank() :: ranks()]


def gathered(found: dict[int, T]) -> list[T]:
    """What all ranks found for their items, in the order of the items. Every rank has to call it."""
    everything: list[Any] = [found]
    if ranks() > 1:
        everything = [None] * ranks()
        with _in_touch():
            dist.all_gather_object(everything, found)
    whole = {number: value for part in everything for number, value in part.items()}
    return [whole[number] for number in sorted(whole)]


def on_first(action: Callable[[], T]) -> T:
    """What an action gives on the first rank, the only one that does it; no rank goes on before it is done.

    A ShedderError there is raised on every rank. Every rank has to call it.
    """
    if ranks() == 1:
        return action()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except ShedderError as error:
            outcome[1] = error
    with _in_touch():
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


@contextmanager
def _in_touch() -> Iterator[None]:
    """Inside, a connection that breaks is reported as what it means."""
    try:
        yield
    except RuntimeError as error:
        raise _lost("has ended or cannot be reached") from error


def _stopped(*_: Any) -> None:
    """torchrun ends the ranks that are left when one of them has died."""
    raise _lost("has ended, and torchrun stops the others")


def _lost(what: str) -> ShedderError:
    """What a rank ends with that has lost another one.

    From here on it does not heed torchrun, which would end it before it has said so, and kills it soon if it does not.
    """
    if signal.getsignal(signal.SIGTERM) is _stopped:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return ShedderError(
        f"rank {rank()} of {ranks()} stops: another process of this run {what}; look for its last message, then give "
        "the same command again: a search goes on from its last step"
    )
