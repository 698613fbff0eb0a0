"""Keeping freed memory for the next layer, on Linux.

By default glibc gives each large temporary back to the system when it is freed, and the next layer's pays for fresh,
zeroed pages again: 20 to 30 % of a small model's forward. `keep_freed_memory` tells glibc to keep such blocks on its
heap. What is meant to stay for long would leave holes of odd sizes between them; `room_beside_the_heap` is for that.
"""

import ctypes
import functools
import math
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
_LARGEST = 2**30  # bytes; larger blocks still come from, and go back to, the system
_SPARE = 2**26  # bytes to ask for beyond what is needed when the heap grows


@functools.cache
def keep_freed_memory() -> bool:
    """Let this process reuse freed blocks; returns whether the C library is one that can. Lasts until the process
    ends."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    options = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _LARGEST), (_TOP_PAD, _SPARE))
    return all([mallopt(option, value) == 1 for option, value in options])


def room_beside_the_heap(like: Tensor, rows: int) -> Tensor:
    """An unfilled tensor of so many rows like those of another; on a CPU in memory of its own, returned with it.

    Linux is asked for huge pages: to fault in small ones takes as long as to copy into them.
    """
    shape = (rows, *like.shape[1:])
    if like.device.type != "cpu" or not math.prod(shape):
        return like.new_empty(shape)
    place = mmap.mmap(-1, math.prod(shape) * like.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            place.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(place, dtype=like.dtype, count=math.prod(shape)).view(shape)


def give_back_freed_memory() -> None:
    """Let the system have what the heap keeps and nobody uses: of many sizes, kept blocks can pile up to gigabytes."""
    if keep_freed_memory():
        ctypes.CDLL(None).malloc_trim(0)
