"""The numba kernels of the selective scan (Mamba-1), forward and backward; `selective_scan.py` says what they compute.

Sixteen channels share a vector. A forward task is one sequence and four such blocks, with time as the outer loop; the
states and decay exponents of the task stay in the first-level cache. A backward task is one sequence and a group of
blocks; it goes through the chunks from the last to the first, and for each block recomputes the chunk's states before
it runs the adjoint recurrence.
B batch, L tokens, E inner width, N state size. Tensors: u, dt, z, y and their gradients (B, L, E); A (N, E), scaled by
log2(e); B, C (B, L, N); D, bias (E,); states (B, N, E); saved (B, chunks * N, E).
"""

from typing import Any

import numpy as np
from numba import njit

from .simd import STAMP, exp2, fill, flush, fma, load, prefetch, sigmoid, softplus, spread, store, store_scalar, total
from .threads import Kernel, at, next_task, own_scratch, unpack

CHUNK = 32  # steps between saved states
BLOCKS = 4  # blocks of 16 channels in one forward task: 256 bytes of a row
_AHEAD = 2  # rows to prefetch ahead
_VECTOR = 64  # bytes
_LN2 = np.float32(0.6931471805599453)
_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)


@njit(error_model="numpy", forceinline=True)
def _step_size(dt, bias, use_softplus):
    delta = dt + bias
    return softplus(delta) if use_softplus else delta


@njit(error_model="numpy")
def _flush_and_save(state, blocks, N, saved, saved_row):
    """At a chunk's start: tiny states become zero, so that decaying ones do not end in slow denormals; then keep them
    if asked to."""
    for q in range(blocks):
        for n in range(N):
            h = flush(load(state, (q * N + n) * 16))
            store(state, (q * N + n) * 16, h)
            if saved:
                store(saved, n * saved_row + q * 16, h)


@njit(error_model="numpy")
def _forward_task(task, scratch, groups, L, E, N, use_softplus, u, dt, A, B, C, D, z, bias, initial, y, saved, last):
    b = task // groups
    e0 = (task - b * groups) * BLOCKS * 16
    blocks = min(BLOCKS, (E - e0) // 16)
    decay = scratch
    state = scratch + BLOCKS * N * _VECTOR
    for q in range(blocks):
        for n in range(N):
            store(decay, (q * N + n) * 16, load(at(A, n, 0), e0 + q * 16))
            store(state, (q * N + n) * 16, load(at(initial, b, n), e0 + q * 16))
    for t in range(L):
        if t % CHUNK == 0:
            chunk_start = at(saved, b, t // CHUNK * N) + 4 * e0 if saved[0] else 0
            _flush_and_save(state, blocks, N, chunk_start, E)
        u_t, dt_t, z_t, y_t, B_t, C_t = at(u, b, t), at(dt, b, t), at(z, b, t), at(y, b, t), at(B, b, t), at(C, b, t)
        for q in range(blocks):
            e = e0 + q * 16
            if t + _AHEAD < L:
                prefetch(u_t, e + _AHEAD * u[2])
                prefetch(dt_t, e + _AHEAD * dt[2])
                prefetch(y_t, e + _AHEAD * y[2])
                prefetch(z_t, e + _AHEAD * z[2])
            now = load(u_t, e)
            delta = _step_size(load(dt_t, e), load(bias[0], e), use_softplus)
            x = delta * now
            out = load(D[0], e) * now
            for n in range(N):
                i = (q * N + n) * 16
                h = fma(exp2(delta * load(decay, i)), load(state, i), x * spread(B_t, n))
                store(state, i, h)
                out = fma(h, spread(C_t, n), out)
            if z[0]:
                gate = load(z_t, e)
                out = out * (gate * sigmoid(gate))
            store(y_t, e, out)
    for q in range(blocks):
        for n in range(N):
            store(at(last, b, n), e0 + q * 16, load(state, (q * N + n) * 16))


@njit(error_model="numpy")
def _recompute_chunk(b, t0, steps, e, decay, states, decays, deltas, outs, N, use_softplus, u, dt, B, C, D, bias):
    """States, decays and ungated outputs of one chunk and block, from the state at its start in `states`."""
    for t in range(steps):
        u_t, dt_t, B_t, C_t = at(u, b, t0 + t), at(dt, b, t0 + t), at(B, b, t0 + t), at(C, b, t0 + t)
        if t + _AHEAD < steps:
            prefetch(u_t, e + _AHEAD * u[2])
            prefetch(dt_t, e + _AHEAD * dt[2])
        now = load(u_t, e)
        delta = _step_size(load(dt_t, e), load(bias[0], e), use_softplus)
        x = delta * now
        out = load(D[0], e) * now
        for n in range(N):
            i = (t * N + n) * 16
            a = exp2(delta * load(decay, n * 16))
            h = fma(a, load(states, i), x * spread(B_t, n))
            store(decays, i, a)
            store(states, i + N * 16, h)
            out = fma(h, spread(C_t, n), out)
        store(deltas, t * 16, delta)
        store(outs, t * 16, out)


@njit(error_model="numpy")
def _reverse_chunk(
    b,
    t0,
    steps,
    e,
    decay,
    states,
    decays,
    deltas,
    outs,
    dB_lanes,
    dC_lanes,
    N,
    use_softplus,
    u,
    dt,
    B,
    C,
    D,
    z,
    bias,
    dy,
    du,
    ddt,
    dz,
):
    """Gradients of one chunk and block. Behind the decay exponents lie the adjoint (dloss/dh, which runs backwards in
    time), dA, dD, dbias."""
    adjoint, dA, sums = decay + N * _VECTOR, decay + 2 * N * _VECTOR, decay + 3 * N * _VECTOR
    one = fill(_ONE)
    dD, dbias = load(sums, 0), load(sums, 16)
    for t in range(steps - 1, -1, -1):
        u_t, dt_t, B_t, C_t = at(u, b, t0 + t), at(dt, b, t0 + t), at(B, b, t0 + t), at(C, b, t0 + t)
        dy_t = load(at(dy, b, t0 + t), e)
        if z[0]:
            gate = load(at(z, b, t0 + t), e)
            s = sigmoid(gate)
            silu = gate * s
            store(at(dz, b, t0 + t), e, dy_t * load(outs, t * 16) * fma(silu, one - s, s))
            dy_t = dy_t * silu
        now, delta = load(u_t, e), load(deltas, t * 16)
        x = delta * now
        dx, ddelta = fill(_ZERO), fill(_ZERO)
        for n in range(N):
            i = (t * N + n) * 16
            dh = fma(dy_t, spread(C_t, n), load(adjoint, n * 16))
            store(dC_lanes, i, fma(dy_t, load(states, i + N * 16), load(dC_lanes, i)))
            store(dB_lanes, i, fma(dh, x, load(dB_lanes, i)))
            dx = fma(dh, spread(B_t, n), dx)
            dh_before = dh * load(decays, i)
            store(adjoint, n * 16, dh_before)
            dexponent = dh_before * load(states, i)
            ddelta = fma(dexponent, load(decay, n * 16), ddelta)
            store(dA, n * 16, fma(dexponent, delta, load(dA, n * 16)))
        ddelta = fma(dx, now, ddelta * fill(_LN2))
        if use_softplus:
            ddelta = ddelta * sigmoid(load(dt_t, e) + load(bias[0], e))
        store(at(du, b, t0 + t), e, fma(dx, delta, dy_t * load(D[0], e)))
        store(at(ddt, b, t0 + t), e, ddelta)
        dD, dbias = fma(dy_t, now, dD), dbias + ddelta
    store(sums, 0, dD)
    store(sums, 16, dbias)


@njit(error_model="numpy")
def _begin_block(decay, b, e, N, A, dlast):
    """Decay exponents, adjoint of the last state, and zeros in dA, dD, dbias."""
    for n in range(N):
        store(decay, n * 16, load(at(A, n, 0), e))
        store(decay, (N + n) * 16, load(at(dlast, b, n), e))
    for i in range(2 * N, 3 * N + 2):
        store(decay, i * 16, fill(_ZERO))


@njit(error_model="numpy")
def _end_block(decay, b, e, N, dA, dD, dbias, dinitial):
    for n in range(N):
        store(at(dinitial, b, n), e, load(decay, (N + n) * 16))
        store(at(dA, b, n), e, load(decay, (2 * N + n) * 16))
    store(at(dD, b, 0), e, load(decay, 3 * N * 16))
    store(at(dbias, b, 0), e, load(decay, (3 * N + 1) * 16))


@njit(error_model="numpy")
def _backward_task(
    task,
    scratch,
    groups,
    batch,
    L,
    E,
    N,
    use_softplus,
    u,
    dt,
    A,
    B,
    C,
    D,
    z,
    bias,
    saved,
    dy,
    dlast,
    du,
    ddt,
    dA,
    dB,
    dC,
    dD,
    dz,
    dbias,
    dinitial,
):
    """One sequence and one group of blocks; dB and dC (groups * B, L, N) are sums over the group."""
    b = task // groups
    group = task - b * groups
    first, end = group * (E // 16) // groups, (group + 1) * (E // 16) // groups
    tile = CHUNK * N * _VECTOR
    dB_lanes, dC_lanes, decays, states = scratch, scratch + tile, scratch + 2 * tile, scratch + 3 * tile
    deltas = states + tile + N * _VECTOR
    outs = deltas + CHUNK * _VECTOR
    own = outs + CHUNK * _VECTOR
    own_size = (3 * N + 2) * _VECTOR
    for q in range(first, end):
        _begin_block(own + (q - first) * own_size, b, q * 16, N, A, dlast)
    for chunk in range((L - 1) // CHUNK, -1, -1):
        t0 = chunk * CHUNK
        steps = min(CHUNK, L - t0)
        for i in range(steps * N):
            store(dB_lanes, i * 16, fill(_ZERO))
            store(dC_lanes, i * 16, fill(_ZERO))
        for q in range(first, end):
            decay = own + (q - first) * own_size
            for n in range(N):
                store(states, n * 16, load(at(saved, b, chunk * N + n), q * 16))
                store(decay, (N + n) * 16, flush(load(decay, (N + n) * 16)))
            _recompute_chunk(
                b, t0, steps, q * 16, decay, states, decays, deltas, outs, N, use_softplus, u, dt, B, C, D, bias
            )
            _reverse_chunk(
                b,
                t0,
                steps,
                q * 16,
                decay,
                states,
                decays,
                deltas,
                outs,
                dB_lanes,
                dC_lanes,
                N,
                use_softplus,
                u,
                dt,
                B,
                C,
                D,
                z,
                bias,
                dy,
                du,
                ddt,
                dz,
            )
        dB_0, dC_0 = at(dB, group * batch + b, t0), at(dC, group * batch + b, t0)
        for i in range(steps * N):
            store_scalar(dB_0, i, total(load(dB_lanes, i * 16)))
            store_scalar(dC_0, i, total(load(dC_lanes, i * 16)))
    for q in range(first, end):
        _end_block(own + (q - first) * own_size, b, q * 16, N, dA, dD, dbias, dinitial)


def forward_scratch(N: int) -> int:
    """Floats of scratch memory of a forward worker."""
    return 2 * BLOCKS * N * 16


def backward_scratch(N: int, blocks: int) -> int:
    """Floats of scratch memory of a backward worker with up to `blocks` blocks of channels."""
    return 16 * (CHUNK * (4 * N + 2) + N + blocks * (3 * N + 2))


def _kernels(stamp: str) -> tuple[Kernel, Kernel]:
    def forward(array: Any) -> None:
        stamp  # noqa: B018 - part of numba's cache key, see simd.STAMP
        scratch = own_scratch(array)
        task = next_task(array)
        while task >= 0:
            _forward_task(task, scratch, *unpack(array, 5, 12))
            task = next_task(array)

    def backward(array: Any) -> None:
        stamp  # noqa: B018
        scratch = own_scratch(array)
        task = next_task(array)
        while task >= 0:
            _backward_task(task, scratch, *unpack(array, 6, 20))
            task = next_task(array)

    return Kernel(forward), Kernel(backward)


forward, backward = _kernels(STAMP)
