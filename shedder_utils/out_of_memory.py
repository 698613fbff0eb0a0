"""Running out of a GPU's memory: one more try with less at once, and a line that says so."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from .errors import ModelError

T = TypeVar("T")


def once_smaller(compute: Callable[[], T], shrink: Callable[[], str]) -> T:
    """What `compute` returns, or if the device runs out of memory, what it returns after `shrink`; that only once.

    shrink: frees what it can, makes later work smaller, and returns how, for the line on stderr. Raises ModelError if
    memory runs out again.
    """
    try:
        return compute()
    except torch.OutOfMemoryError as error:
        reason = _first_line(error)
    # Here the error is gone, and with it the frames that held the tensors of the first try.
    change = shrink()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    print(f"out of memory ({reason}): trying once more with {change}", file=sys.stderr, flush=True)
    try:
        return compute()
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"out of memory again, with {change} ({_first_line(error)}): use a smaller batch size or memory budget, "
            "or a device with more memory"
        ) from error


@contextmanager
def enough_memory() -> Iterator[None]:
    """Inside, running out of a device's memory is a ModelError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"out of memory ({_first_line(error)}): use a smaller batch size, or a device with more memory"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")[:160]
