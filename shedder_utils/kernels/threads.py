"""Compiling a kernel, and running its tasks on torch's own threads.

A kernel is a C function of one pointer, to an array of int64:

    [0] next task   [1] next worker   [2] tasks   [3] scratch address   [4] scratch bytes per worker   [5:] arguments

Every worker calls the same function on the same array and draws task numbers from it until none is left, so any set of
threads will do and no Python runs inside. On Linux the threads are those of the OpenMP library that torch itself uses
(`GOMP_parallel`): a second pool would compete with torch's workers, which keep spinning on their cores for a while
after each matrix product. Elsewhere a Python thread pool calls the function. A forked child (a DataLoader worker) runs
kernels on its own thread only: OpenMP's workers do not survive a fork.
"""

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import cfunc, njit, types
from numba.extending import intrinsic
from torch import Tensor

_HEADER = 5
_SERIAL_WORK = 200_000  # vector operations (about 0.1 ms) below which waking other threads costs more than it saves
_compiling = threading.RLock()
_forked = False


def _mark_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_fork)


@intrinsic
def _draw(typing_context: Any, counters: types.Type, index: types.Type) -> Any:
    """The value of an int64 counter before adding one to it, atomically."""

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        return builder.atomic_rmw("add", builder.gep(arguments[0], [arguments[1]]), ir.IntType(64)(1), "monotonic")

    return types.int64(counters, types.int64), generate


@intrinsic(prefer_literal=True)
def unpack(typing_context: Any, array: types.Type, integers: types.Type, tensors: types.Type) -> Any:
    """The kernel's own arguments as a tuple: first some integers, then some tensors, each three integers for `at`."""
    first, triples = integers.literal_value, tensors.literal_value
    triple = types.UniTuple(types.int64, 3)
    result = types.Tuple([types.int64] * first + [triple] * triples)

    def generate(context: Any, builder: ir.IRBuilder, sig: Any, arguments: tuple[ir.Value, ...]) -> ir.Value:
        offsets = [ir.IntType(64)(_HEADER + i) for i in range(first + 3 * triples)]
        values = [builder.load(builder.gep(arguments[0], [offset])) for offset in offsets]
        parts = [context.make_tuple(builder, triple, values[i : i + 3]) for i in range(first, len(values), 3)]
        return context.make_tuple(builder, result, values[:first] + parts)

    return result(array, integers, tensors), generate


@njit(error_model="numpy", forceinline=True)
def at(tensor: Any, i: int, j: int) -> int:
    """Address of tensor[i, j, 0]; one or two leading dimensions may be missing, then their index is 0."""
    return tensor[0] + 4 * (tensor[1] * i + tensor[2] * j)


@njit(error_model="numpy", forceinline=True)
def next_task(array: Any) -> int:
    """The number of a task nobody has taken, or -1 when all are taken."""
    task = _draw(array, 0)
    return task if task < array[2] else -1


@njit
def own_scratch(array: Any) -> int:
    """Address of this worker's part of the scratch memory."""
    return array[3] + _draw(array, 1) * array[4]


def _operand(x: Tensor | None) -> tuple[int, int, int]:
    """Address and the two leading strides, in floats."""
    if x is None:
        return 0, 0, 0
    strides = *x.stride()[:-1], 0, 0
    return x.data_ptr(), strides[0], strides[1]


class Kernel:
    """A kernel, compiled (or read from numba's disk cache) when it first runs."""

    def __init__(self, entry: Callable[[Any], None]) -> None:
        self._entry = entry

    @functools.cached_property
    def _compiled(self) -> tuple[Any, Any]:
        """As something to call (it releases Python's lock), and numba's object, which owns the code."""
        with _compiling:
            signature = types.void(types.CPointer(types.int64))
            kernel = cfunc(signature, cache=True, error_model="numpy")(self._entry)
            return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel.address), kernel

    def __call__(
        self, tasks: int, integers: Sequence[int], tensors: Sequence[Tensor | None], *, scratch: int = 0, work: int
    ) -> None:
        """Run `tasks` tasks on float32 tensors of up to three dimensions, the last one contiguous; None has address 0.

        Each worker has `scratch` floats of its own; `work` is an estimate of the whole, in vector operations.
        """
        workers = 1 if work < _SERIAL_WORK else min(torch.get_num_threads(), tasks)
        memory = torch.empty(workers, -(-scratch // 16) * 16)
        values = [0, 0, tasks, memory.data_ptr(), memory.stride(0) * 4, *integers]
        for tensor in tensors:
            values += _operand(tensor)
        array = (ctypes.c_int64 * len(values))(*values)
        address = ctypes.addressof(array)
        call, kernel = self._compiled
        if workers == 1 or _forked:
            call(address)
        elif (openmp := _openmp()) is not None:
            openmp(kernel.address, address, workers, 0)
        else:
            list(_pool().map(call, [address] * workers))


@functools.cache
def _openmp() -> Any | None:
    """`GOMP_parallel` of the OpenMP library that torch is linked with, or None where it has none (macOS, Windows)."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="shedder")
