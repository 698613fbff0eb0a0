"""The numba kernels of the Mamba-2 recurrence, forward and backward; `ssd.py` says what they compute.

The forward gives each vector sixteen channels of a head: its task is one sequence, one head and 32 channels, with time
as the outer loop and the state (N x 32) in the first-level cache. The backward gives each vector sixteen elements of
the state, because dB and dC are sums over channels: its task is one sequence and some heads of a group, four channels
at a time, chunks from the last to the first, the chunk's states recomputed before the adjoint recurrence runs.
B batch, L tokens, H heads, P head width, G groups, N state size. Tensors: x, y, dy, dx (B, L, H*P); delta, decay =
exp(delta * A) and their gradients (B, L, H); B, C (B, L, G*N); D (H,); states (B, H*P, N); saved (B, chunks*H*P, N).
"""

from typing import Any

import numpy as np
from numba import njit

from .simd import (
    STAMP,
    fill,
    flush,
    fma,
    load,
    load_scalar,
    prefetch,
    spread,
    store,
    store_scalar,
    total,
    transpose_tile,
)
from .threads import Kernel, at, next_task, own_scratch, unpack

CHUNK = 32  # steps between saved states
_TILE = 4  # channels that the backward handles together
_AHEAD = 2  # rows to prefetch ahead
_ZERO = np.float32(0.0)


@njit(error_model="numpy")
def _read_state(state, N, source, source_row):
    """Sixteen channels of a state, (16, N) in memory, into a half of the task's own (N, 32)."""
    for n in range(0, N, 16):
        transpose_tile(source + 4 * n, source_row, state + 4 * n * 32, 32)


@njit(error_model="numpy")
def _write_state(state, N, target, target_row):
    for n in range(0, N, 16):
        transpose_tile(state + 4 * n * 32, 32, target + 4 * n, target_row)


@njit(error_model="numpy")
def _forward_task(task, state, L, H, P, N, G, x, delta, decay, B, C, D, initial, y, saved, last):
    pairs = (P // 16 + 1) // 2
    b = task // (H * pairs)
    head = (task - b * H * pairs) // pairs
    c0 = head * P + task % pairs * 32
    c1 = min(c0 + 16, head * P + P - 16)  # an odd last block is computed twice, to the same place
    group = head * G // H * N
    _read_state(state, N, at(initial, b, c0), initial[2])
    _read_state(state + 64, N, at(initial, b, c1), initial[2])
    for t in range(L):
        if t % CHUNK == 0:
            for i in range(2 * N):  # states that decay would end in slow denormals
                store(state, i * 16, flush(load(state, i * 16)))
            if saved[0]:
                _write_state(state, N, at(saved, b, t // CHUNK * H * P + c0), N)
                _write_state(state + 64, N, at(saved, b, t // CHUNK * H * P + c1), N)
        x_t, y_t, B_t, C_t = at(x, b, t), at(y, b, t), at(B, b, t) + 4 * group, at(C, b, t) + 4 * group
        if t + _AHEAD < L:
            prefetch(x_t, _AHEAD * x[2] + c0)
            prefetch(x_t, _AHEAD * x[2] + c1)
            prefetch(y_t, _AHEAD * y[2] + c0)
            prefetch(y_t, _AHEAD * y[2] + c1)
        step, a, skip = spread(at(delta, b, t), head), spread(at(decay, b, t), head), spread(D[0], head)
        x0, x1 = load(x_t, c0), load(x_t, c1)
        y0, y1 = x0 * skip, x1 * skip
        x0, x1 = x0 * step, x1 * step
        for n in range(N):
            B_n, C_n = spread(B_t, n), spread(C_t, n)
            h0 = fma(a, load(state, n * 32), x0 * B_n)
            h1 = fma(a, load(state, n * 32 + 16), x1 * B_n)
            store(state, n * 32, h0)
            store(state, n * 32 + 16, h1)
            y0, y1 = fma(h0, C_n, y0), fma(h1, C_n, y1)
        store(y_t, c0, y0)
        store(y_t, c1, y1)
    _write_state(state, N, at(last, b, c0), N)
    _write_state(state + 64, N, at(last, b, c1), N)


@njit(error_model="numpy")
def _recompute_chunk(b, t0, steps, head, c, group, states, N, x, delta, decay, B):
    """States (steps + 1, _TILE, N) of one chunk and tile of channels, from the state at its start in `states`."""
    for t in range(steps):
        B_t, a = at(B, b, t0 + t) + 4 * group, spread(at(decay, b, t0 + t), head)
        before = states + 4 * t * _TILE * N
        after = before + 4 * _TILE * N
        for p in range(_TILE):
            scaled = spread(at(x, b, t0 + t), c + p) * spread(at(delta, b, t0 + t), head)
            for n in range(p * N, p * N + N, 16):
                store(after, n, fma(a, load(before, n), scaled * load(B_t, n - p * N)))


@njit(error_model="numpy", forceinline=True)
def _reverse_vector(states, after, adjoint, a, dy, scaled, B_n, C_n, dB_n, dC_n, dscaled, ddecay):
    """Sixteen elements of one channel's state, one step back in time; returns the four sums it adds to."""
    dh = fma(dy, C_n, load(adjoint, 0))
    store(adjoint, 0, dh * a)
    return fma(scaled, dh, dB_n), fma(dy, load(after, 0), dC_n), fma(dh, B_n, dscaled), fma(dh, load(states, 0), ddecay)


@njit(error_model="numpy", forceinline=True)
def _reverse_step(states, adjoint, sums, N, a, step, x_t, dy_t, B_t, C_t, dB_t, dC_t):
    """One step back in time for a tile of channels; returns the lanes of d(decay), leaves those of d(delta * x) in
    `sums`."""
    row = 4 * N
    after = states + _TILE * row
    dy_0, dy_1, dy_2, dy_3 = spread(dy_t, 0), spread(dy_t, 1), spread(dy_t, 2), spread(dy_t, 3)
    x_0, x_1, x_2, x_3 = spread(x_t, 0) * step, spread(x_t, 1) * step, spread(x_t, 2) * step, spread(x_t, 3) * step
    s_0, s_1, s_2, s_3, ddecay = fill(_ZERO), fill(_ZERO), fill(_ZERO), fill(_ZERO), fill(_ZERO)
    for n in range(0, row, 64):
        B_n, C_n, dB_n, dC_n = load(B_t + n, 0), load(C_t + n, 0), load(dB_t + n, 0), load(dC_t + n, 0)
        h, g, d = states + n, after + n, adjoint + n
        dB_n, dC_n, s_0, ddecay = _reverse_vector(h, g, d, a, dy_0, x_0, B_n, C_n, dB_n, dC_n, s_0, ddecay)
        h, g, d = h + row, g + row, d + row
        dB_n, dC_n, s_1, ddecay = _reverse_vector(h, g, d, a, dy_1, x_1, B_n, C_n, dB_n, dC_n, s_1, ddecay)
        h, g, d = h + row, g + row, d + row
        dB_n, dC_n, s_2, ddecay = _reverse_vector(h, g, d, a, dy_2, x_2, B_n, C_n, dB_n, dC_n, s_2, ddecay)
        h, g, d = h + row, g + row, d + row
        dB_n, dC_n, s_3, ddecay = _reverse_vector(h, g, d, a, dy_3, x_3, B_n, C_n, dB_n, dC_n, s_3, ddecay)
        store(dB_t + n, 0, dB_n)
        store(dC_t + n, 0, dC_n)
    store(sums, 0, s_0)
    store(sums, 16, s_1)
    store(sums, 32, s_2)
    store(sums, 48, s_3)
    return ddecay


@njit(error_model="numpy")
def _reverse_chunk(
    b, t0, steps, head, c, group, states, adjoint, sums, ddecays, N, x, delta, decay, B, C, D, dy, dx, ddelta, dB, dC
):
    """Gradients of one chunk and tile of channels; `adjoint` is dloss/dh, running backwards. Returns its part of dD."""
    dD = _ZERO
    skip = load_scalar(D[0], head)
    for t in range(steps - 1, -1, -1):
        x_t, dy_t, dx_t = at(x, b, t0 + t) + 4 * c, at(dy, b, t0 + t) + 4 * c, at(dx, b, t0 + t) + 4 * c
        B_t, C_t = at(B, b, t0 + t) + 4 * group, at(C, b, t0 + t) + 4 * group
        dB_t, dC_t = at(dB, 0, t0 + t) + 4 * group, at(dC, 0, t0 + t) + 4 * group
        a, step = spread(at(decay, b, t0 + t), head), load_scalar(at(delta, b, t0 + t), head)
        before = states + 4 * t * _TILE * N
        lanes = _reverse_step(before, adjoint, sums, N, a, fill(step), x_t, dy_t, B_t, C_t, dB_t, dC_t)
        store(ddecays, t * 16, load(ddecays, t * 16) + lanes)
        dstep = load_scalar(at(ddelta, b, t0 + t), head)
        for p in range(_TILE):
            dscaled, now, dout = total(load(sums, p * 16)), load_scalar(x_t, p), load_scalar(dy_t, p)
            store_scalar(dx_t, p, dscaled * step + dout * skip)
            dstep += dscaled * now
            dD += dout * now
        store_scalar(at(ddelta, b, t0 + t), head, dstep)
    return dD


@njit(error_model="numpy")
def _backward_head(
    b,
    chunk,
    steps,
    head,
    group,
    scratch,
    adjoints,
    P,
    N,
    H,
    x,
    delta,
    decay,
    B,
    C,
    D,
    saved,
    dy,
    dx,
    ddelta,
    ddecay,
    dB,
    dC,
):
    """One head of one chunk, tile after tile; returns its part of dD."""
    t0 = chunk * CHUNK
    sums, ddecays = scratch, scratch + 4 * 16 * _TILE
    states = ddecays + 4 * 16 * CHUNK
    dD = _ZERO
    for t in range(steps):
        store(ddecays, t * 16, fill(_ZERO))
        store_scalar(at(ddelta, b, t0 + t), head, _ZERO)
    for p in range(0, P, _TILE):
        start, adjoint = at(saved, b, (chunk * H + head) * P + p), adjoints + 4 * p * N
        for n in range(0, _TILE * N, 16):
            store(states, n, load(start, n))
            store(adjoint, n, flush(load(adjoint, n)))
        _recompute_chunk(b, t0, steps, head, head * P + p, group, states, N, x, delta, decay, B)
        dD += _reverse_chunk(
            b,
            t0,
            steps,
            head,
            head * P + p,
            group,
            states,
            adjoint,
            sums,
            ddecays,
            N,
            x,
            delta,
            decay,
            B,
            C,
            D,
            dy,
            dx,
            ddelta,
            dB,
            dC,
        )
    for t in range(steps):
        store_scalar(at(ddecay, b, t0 + t), head, total(load(ddecays, t * 16)))
    return dD


@njit(error_model="numpy")
def _backward_task(
    task,
    scratch,
    parts,
    batch,
    L,
    H,
    P,
    N,
    G,
    x,
    delta,
    decay,
    B,
    C,
    D,
    saved,
    dy,
    dlast,
    dx,
    ddelta,
    ddecay,
    dB,
    dC,
    dD,
    dinitial,
):
    """One sequence and some heads of a group; dB and dC (parts * B, L, G*N) sum over these. dinitial holds adjoints."""
    b = task // (G * parts)
    group = (task - b * G * parts) // parts
    part = task % parts
    first = group * (H // G) + part * (H // G) // parts
    end = group * (H // G) + (part + 1) * (H // G) // parts
    dB_b, dC_b = (at(dB, part * batch + b, 0), 0, dB[2]), (at(dC, part * batch + b, 0), 0, dC[2])
    for head in range(first, end):
        store_scalar(at(dD, b, 0), head, _ZERO)
        for i in range(0, P * N, 16):
            store(at(dinitial, b, head * P), i, load(at(dlast, b, head * P), i))
    for chunk in range((L - 1) // CHUNK, -1, -1):
        steps = min(CHUNK, L - chunk * CHUNK)
        for t in range(chunk * CHUNK, chunk * CHUNK + steps):
            for n in range(group * N, group * N + N, 16):
                store(at(dB_b, 0, t), n, fill(_ZERO))
                store(at(dC_b, 0, t), n, fill(_ZERO))
        for head in range(first, end):
            dD_head = _backward_head(
                b,
                chunk,
                steps,
                head,
                group * N,
                scratch,
                at(dinitial, b, head * P),
                P,
                N,
                H,
                x,
                delta,
                decay,
                B,
                C,
                D,
                saved,
                dy,
                dx,
                ddelta,
                ddecay,
                dB_b,
                dC_b,
            )
            store_scalar(at(dD, b, 0), head, load_scalar(at(dD, b, 0), head) + dD_head)


def forward_scratch(N: int) -> int:
    """Floats of scratch memory of a forward worker."""
    return 32 * N


def backward_scratch(N: int) -> int:
    """Floats of scratch memory of a backward worker."""
    return 16 * (_TILE + CHUNK) + (CHUNK + 1) * _TILE * N


def _kernels(stamp: str) -> tuple[Kernel, Kernel]:
    def forward(array: Any) -> None:
        stamp  # noqa: B018 - part of numba's cache key, see simd.STAMP
        scratch = own_scratch(array)
        task = next_task(array)
        while task >= 0:
            _forward_task(task, scratch, *unpack(array, 5, 10))
            task = next_task(array)

    def backward(array: Any) -> None:
        stamp  # noqa: B018
        scratch = own_scratch(array)
        task = next_task(array)
        while task >= 0:
            _backward_task(task, scratch, *unpack(array, 7, 16))
            task = next_task(array)

    return Kernel(forward), Kernel(backward)


forward, backward = _kernels(STAMP)
