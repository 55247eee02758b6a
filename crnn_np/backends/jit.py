"""The Numba backend: the functions of the reference, compiled, and a fused run of windows.

The output layer, nearly all of the time, goes over blocks of `ROWS` events and tiles of `TILE`
items. The logits of a block exist once, as E = exp(logits - shift), one contiguous [rows, tile]
matrix after the other; a tile fits in the second-level cache. Each thread owns a stretch of tiles:

    first pass    E, its sums S over items, and U = E W_out, from which dH = U / S - W_out[y]
    second pass   dW_out = E^T (H / S), with S taken off E at the targets before; in the fused run
                  RMSprop moves the tile of W_out at once and dW_out is never stored whole

shift is 0: exp is scale-free as long as the sums neither overflow nor vanish. Where one does, the
block is done again with the largest logit of each row as shift.

The matrix products are BLAS calls on one thread each, made from Numba's threads, so the two kinds
of threads do not compete. Numba's work queue is the threading layer unless another was chosen: it
does not spin when another process wants a core. It must not be entered from two Python threads.

Kernels of the recurrent network live in this file alone, since Numba's disk cache watches no other.
"""

import math
from contextlib import AbstractContextManager
from functools import cache
from typing import NamedTuple

import numba
import numpy as np
import scipy.linalg.cython_blas  # noqa: F401  the BLAS that Numba calls, loaded before its threads are limited
from llvmlite import ir
from numba import njit, prange, types
from numba.extending import intrinsic, overload
from threadpoolctl import ThreadpoolController

from ..data import EventLog
from ..model import Accumulators, Params, Spec
from ..optim import Rule
from ..windows import GOLDEN, INPUT, OUTPUT, Slice, dropout_threshold
from .reference import sum_rows, take_rows, to_device, to_host, update, window

__all__ = [
    "cell_backward",
    "cell_forward",
    "output",
    "score",
    "sum_rows",
    "take_rows",
    "to_device",
    "to_host",
    "train_run",
    "update",
    "window",
    "workspace",
]

Array = np.ndarray

if numba.config.THREADING_LAYER == "default":
    numba.config.THREADING_LAYER = "workqueue"

ROWS = 256
TILE = 512
SCORED_ROWS = 64
TANH, GRU, GRU_SIGMOID = 0, 1, 2
KINDS = {"tanh": TANH, "gru": GRU, "gru-sigmoid": GRU_SIGMOID}

FAST = {"contract", "reassoc", "nsz", "arcp"}
FAITHFUL = {"contract"}  # reassociation would undo the argument reduction of exp
serial = njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
threads = njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST, parallel=True)
exact = njit(cache=True, nogil=True, error_model="numpy", fastmath=FAITHFUL)


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


def one_blas_thread() -> AbstractContextManager:
    """Keep BLAS from starting threads below the threads that call it."""
    return _blas().limit(limits=1, user_api="blas")


# ---------------------------------------------------------------- scalar functions


@intrinsic
def _rint(context, x):
    def codegen(context, builder, signature, args):
        function = builder.module.declare_intrinsic("llvm.rint", [args[0].type])
        return builder.call(function, args)

    return x(x), codegen


@intrinsic
def _as_float32(context, x):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


f32 = np.float32


@exact
def _exp32(x):
    """exp in float32 that vectorises: Cephes' expf (Moshier), 2 units in the last place."""
    x = min(max(x, f32(-87.0)), f32(88.7))
    k = _rint(x * f32(1.44269504088896341))
    r = x - k * f32(0.693359375)
    r = r - k * f32(-2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    y = p * (r * r) + r + f32(1.0)
    half = np.int32(k) >> np.int32(1)
    rest = np.int32(k) - half
    bias, bits = np.int32(127), np.int32(23)
    return y * _as_float32((half + bias) << bits) * _as_float32((rest + bias) << bits)


def _exp(x):
    raise RuntimeError("compiled code only")


@overload(_exp, inline="always")
def _exp_of(x):
    if x == types.float32:
        return lambda x: _exp32(x)
    return lambda x: math.exp(x)


def _tanh(x):
    raise RuntimeError("compiled code only")


@overload(_tanh, inline="always")
def _tanh_of(x):
    if x == types.float32:
        return lambda x: f32(1) - f32(2) / (_exp32(x + x) + f32(1))
    return lambda x: math.tanh(x)


@exact
def _sigmoid(x):
    one = type(x)(1)
    return one / (one + _exp(-x))


@serial
def _mix(z):
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@serial
def _drop(values, start, first, threshold, factor):
    """Dropout on one vector: elements first, first + 1, ... of the mask of `windows.dropout_keep`.

    values real[K], in place.
    """
    for j in range(values.size):
        bits = _mix(start + np.uint64(first + j + 1) * GOLDEN) >> np.uint64(40)
        values[j] = values[j] * factor if bits >= threshold else 0


@serial
def _rmsprop(w, ms, g, learning_rate, rho, rest, eps):
    """One step of `optim.rmsprop` on vectors; rest = 1 - rho."""
    for j in range(w.size):
        ms[j] = rho * ms[j] + rest * g[j] * g[j]
        w[j] -= learning_rate * g[j] / math.sqrt(ms[j] + eps)


# ---------------------------------------------------------------- cells, one column of a window


@serial
def _tanh_forward(b, states, A, W, event, carry, init):
    T, D = A.shape[0], states.shape[2]
    h = np.empty(D, A.dtype)
    a = np.empty(D, A.dtype)
    for t in range(T):
        c = carry[t, b]
        for j in range(D):
            h[j] = c * states[t, b, j] + (1 - c) * init
        if event[t, b] == 0:
            states[t + 1, b] = h
            continue
        a[:] = A[t, b]
        for k in range(D):
            for j in range(D):
                a[j] += h[k] * W[k, j]
        for j in range(D):
            states[t + 1, b, j] = _tanh(a[j])


@serial
def _tanh_backward(b, dH, states, init, W, event, carry, ds, dA, dW):
    T, D = dH.shape[0], dH.shape[2]
    h = np.empty(D, dH.dtype)
    da = np.empty(D, dH.dtype)
    for t in range(T - 1, -1, -1):
        c = carry[t, b]
        if event[t, b] == 0:
            for j in range(D):
                ds[j] = c * (ds[j] + dH[t, b, j])
                dA[t, b, j] = 0
            continue
        for j in range(D):
            h[j] = c * states[t, b, j] + (1 - c) * init
            new = states[t + 1, b, j]
            da[j] = (dH[t, b, j] + ds[j]) * (1 - new * new)
            dA[t, b, j] = da[j]
        for k in range(D):
            s = dH.dtype.type(0)
            for j in range(D):
                s += da[j] * W[k, j]
                dW[k, j] += h[k] * da[j]
            ds[k] = c * s


@serial
def _gru_forward(b, states, cache, A, W, event, carry, init, sigmoid_candidate):
    T, D = A.shape[0], states.shape[2]
    h = np.empty(D, A.dtype)
    zr = np.empty(2 * D, A.dtype)
    new = np.empty(D, A.dtype)
    for t in range(T):
        c = carry[t, b]
        for j in range(D):
            h[j] = c * states[t, b, j] + (1 - c) * init
        if event[t, b] == 0:
            states[t + 1, b] = h
            continue
        zr[:] = A[t, b, : 2 * D]
        new[:] = A[t, b, 2 * D :]
        for k in range(D):
            for j in range(2 * D):
                zr[j] += h[k] * W[k, j]
        for j in range(2 * D):
            zr[j] = _sigmoid(zr[j])
        for k in range(D):
            rh = zr[D + k] * h[k]
            for j in range(D):
                new[j] += rh * W[k, 2 * D + j]
        if sigmoid_candidate:
            for j in range(D):
                new[j] = _sigmoid(new[j])
        else:
            for j in range(D):
                new[j] = _tanh(new[j])
        for j in range(D):
            states[t + 1, b, j] = h[j] + zr[j] * (new[j] - h[j])
        cache[t, b, : 2 * D] = zr
        cache[t, b, 2 * D :] = new


@serial
def _gru_backward(b, dH, states, cache, init, W, event, carry, sigmoid_candidate, ds, dA, dW):
    T, D = dH.shape[0], dH.shape[2]
    h = np.empty(D, dH.dtype)
    dzr = np.empty(2 * D, dH.dtype)
    dc = np.empty(D, dH.dtype)
    for t in range(T - 1, -1, -1):
        c = carry[t, b]
        if event[t, b] == 0:
            for j in range(D):
                ds[j] = c * (ds[j] + dH[t, b, j])
            dA[t, b] = 0
            continue
        for j in range(D):
            h[j] = c * states[t, b, j] + (1 - c) * init
            z, new = cache[t, b, j], cache[t, b, 2 * D + j]
            dh = dH[t, b, j] + ds[j]
            slope = new * (1 - new) if sigmoid_candidate else 1 - new * new
            dc[j] = dh * z * slope
            dzr[j] = dh * (new - h[j]) * z * (1 - z)
            ds[j] = dh * (1 - z)
        for k in range(D):
            r = cache[t, b, D + k]
            rh = r * h[k]
            drh = dH.dtype.type(0)
            for j in range(D):
                drh += dc[j] * W[k, 2 * D + j]
                dW[k, 2 * D + j] += rh * dc[j]
            dzr[D + k] = drh * h[k] * r * (1 - r)
            ds[k] += drh * r
        for k in range(D):
            s = dH.dtype.type(0)
            for j in range(2 * D):
                s += dzr[j] * W[k, j]
                dW[k, j] += h[k] * dzr[j]
            ds[k] = c * (ds[k] + s)
        dA[t, b, : 2 * D] = dzr
        dA[t, b, 2 * D :] = dc


@serial
def _forward_column(kind, b, states, cache, A, W, event, carry, init):
    if kind == TANH:
        _tanh_forward(b, states, A, W, event, carry, init)
    else:
        _gru_forward(b, states, cache, A, W, event, carry, init, kind == GRU_SIGMOID)


@serial
def _backward_column(kind, b, dH, states, cache, init, W, event, carry, ds, dA, dW):
    ds[:] = 0
    dW[:] = 0
    if kind == TANH:
        _tanh_backward(b, dH, states, init, W, event, carry, ds, dA, dW)
    else:
        sigmoid = kind == GRU_SIGMOID
        _gru_backward(b, dH, states, cache, init, W, event, carry, sigmoid, ds, dA, dW)


@threads
def _forward_window(kind, states, cache, A, W_h, event, carry, init):
    for i_b in prange(A.shape[1]):
        b = np.int64(i_b)
        W = W_h[b if W_h.shape[0] > 1 else 0]
        _forward_column(kind, b, states, cache, A, W, event, carry, init)


@threads
def _backward_window(kind, dH, states, cache, init, W_h, event, carry, ds0, dA, dW_h):
    for i_b in prange(dH.shape[1]):
        b = np.int64(i_b)
        W = W_h[b if W_h.shape[0] > 1 else 0]
        _backward_column(
            kind, b, dH, states, cache, init, W, event, carry, ds0[b], dA, dW_h[b]
        )


def cell_forward(
    cell: str, s0: Array, init: float, A: Array, W_h: Array, event: Array, carry: Array
) -> tuple[Array, Array]:
    """As `reference.cell_forward`."""
    T, B = event.shape
    D = s0.shape[-1]
    states = np.empty((T + 1, 1, B, D), A.dtype)
    states[0] = s0
    cache = np.empty((T, B, 0 if cell == "tanh" else 3 * D), A.dtype)
    A, W_h, event, carry = map(np.ascontiguousarray, (A, W_h, event, carry))
    _forward_window(
        KINDS[cell], states[:, 0], cache, A, W_h, event, carry, A.dtype.type(init)
    )
    return states, cache


def cell_backward(
    cell: str,
    dH: Array,
    states: Array,
    cache: Array,
    init: float,
    W_h: Array,
    event: Array,
    carry: Array,
) -> tuple[Array, Array, Array]:
    """As `reference.cell_backward`."""
    T, B, D = dH.shape
    ds0 = np.empty((B, D), dH.dtype)
    dA = np.empty((T, B, W_h.shape[2]), dH.dtype)
    dW_h = np.empty((B, *W_h.shape[1:]), dH.dtype)
    dH, W_h, event, carry = map(np.ascontiguousarray, (dH, W_h, event, carry))
    init = dH.dtype.type(init)
    _backward_window(
        KINDS[cell], dH, states[:, 0], cache, init, W_h, event, carry, ds0, dA, dW_h
    )
    if W_h.shape[0] == 1:
        dW_h = dW_h.sum(axis=0, keepdims=True)
    return ds0[None], dA, dW_h


# ---------------------------------------------------------------- output layer


@threads
def _exp_scores(H, W_out, shift, E, S, U, product):
    """First pass over a block: E, and each thread's part of S [threads, rows] and U."""
    m, items = H.shape[0], W_out.shape[0]
    tiles = (items + TILE - 1) // TILE
    n_threads = S.shape[0]
    for i_p in prange(n_threads):
        p = np.int64(i_p)
        S[p] = 0
        U[p] = 0
        for tile in range(p * tiles // n_threads, (p + 1) * tiles // n_threads):
            lo = tile * TILE
            hi = min(lo + TILE, items)
            e = E[lo * m : hi * m].reshape(m, hi - lo)
            np.dot(H, W_out[lo:hi].T, e)
            for n in range(m):
                s = H.dtype.type(0)
                for i in range(hi - lo):
                    v = _exp(e[n, i] - shift[n])
                    e[n, i] = v
                    s += v
                S[p, n] += s
            part = product[p][:m]
            np.dot(e, W_out[lo:hi], part)
            for n in range(m):
                for d in range(H.shape[1]):
                    U[p, n, d] += part[n, d]
    for p in range(1, n_threads):
        S[0] += S[p]
        U[0] += U[p]


@threads
def _row_max(H, W_out, E, top):
    """Largest logit of each row, [threads, rows] with the result in the first row."""
    m, items = H.shape[0], W_out.shape[0]
    tiles = (items + TILE - 1) // TILE
    n_threads = top.shape[0]
    for i_p in prange(n_threads):
        p = np.int64(i_p)
        top[p] = -np.inf
        for tile in range(p * tiles // n_threads, (p + 1) * tiles // n_threads):
            lo = tile * TILE
            hi = min(lo + TILE, items)
            e = E[lo * m : hi * m].reshape(m, hi - lo)
            np.dot(H, W_out[lo:hi].T, e)
            for n in range(m):
                for i in range(hi - lo):
                    top[p, n] = max(top[p, n], e[n, i])
    for p in range(1, n_threads):
        top[0] = np.maximum(top[0], top[p])


@threads
def _item_gradients(E, G, W_out, ms, dW_out, product, first, move, rule):
    """Second pass over a block: dW_out = E^T G, tile by tile.

    With `first`, dW_out is set, else added to. With `move`, RMSprop moves W_out by the sum
    instead of storing it; rule = (learning_rate, rho, 1 - rho, eps).
    """
    m, items = G.shape[0], W_out.shape[0]
    D = W_out.shape[1]
    tiles = (items + TILE - 1) // TILE
    n_threads = product.shape[0]
    for i_p in prange(n_threads):
        p = np.int64(i_p)
        for tile in range(p * tiles // n_threads, (p + 1) * tiles // n_threads):
            lo = tile * TILE
            hi = min(lo + TILE, items)
            g = product[p][: hi - lo]
            if m:
                np.dot(E[lo * m : hi * m].reshape(m, hi - lo).T, G, g)
            else:
                g[:] = 0
            for i in range(hi - lo):
                if not first:
                    for d in range(D):
                        g[i, d] += dW_out[lo + i, d]
                if move:
                    _rmsprop(W_out[lo + i], ms[lo + i], g[i], rule[0], rule[1], rule[2], rule[3])
                else:
                    for d in range(D):
                        dW_out[lo + i, d] = g[i, d]


@serial
def _softmax(H, W_out, y, scale, E, S, U, product, shift, G, dH, lowest, highest):
    """Loss of a block, its dH, and G with E ready for `_item_gradients`, scaled."""
    m, items = H.shape[0], W_out.shape[0]
    D = W_out.shape[1]
    shift[:m] = 0
    _exp_scores(H, W_out, shift, E, S, U, product)
    safe = True
    for n in range(m):
        safe = safe and lowest < S[0, n] < highest
    if not safe:
        _row_max(H, W_out, E, S)
        shift[:m] = S[0, :m]
        _exp_scores(H, W_out, shift, E, S, U, product)
    loss = 0.0
    for n in range(m):
        s = S[0, n]
        i = y[n]
        logit = H.dtype.type(0)
        for d in range(D):
            logit += H[n, d] * W_out[i, d]
        loss += math.log(np.float64(s)) + np.float64(shift[n]) - np.float64(logit)
        lo = i // TILE * TILE
        hi = min(lo + TILE, items)
        E[lo * m + n * (hi - lo) + i - lo] -= s
        factor = scale / s
        for d in range(D):
            dH[n, d] = U[0, n, d] * factor - W_out[i, d] * scale
            G[n, d] = H[n, d] * factor
    return loss


@threads
def _score(H, W_out, y, logits, nll, rank):
    N, items = H.shape[0], W_out.shape[0]
    blocks = (N + SCORED_ROWS - 1) // SCORED_ROWS
    n_threads = logits.shape[0]
    for i_p in prange(n_threads):
        p = np.int64(i_p)
        for block in range(p, blocks, n_threads):
            lo = block * SCORED_ROWS
            hi = min(lo + SCORED_ROWS, N)
            part = logits[p][: (hi - lo) * items].reshape(hi - lo, items)
            np.dot(H[lo:hi], W_out.T, part)
            for n in range(hi - lo):
                top = part[n, 0]
                for i in range(items):
                    top = max(top, part[n, i])
                target = part[n, y[lo + n]]
                s = 0.0
                ahead = 0
                for i in range(items):
                    s += np.float64(_exp(part[n, i] - top))
                    ahead += not part[n, i] < target
                nll[lo + n] = math.log(s) + np.float64(top) - np.float64(target)
                rank[lo + n] = ahead


class Output(NamedTuple):
    """Work arrays of the output layer for blocks of m rows at most."""

    E: Array  # [m * I]
    S: Array  # [threads, m]
    U: Array  # [threads, m, D]
    product: Array  # [threads, max(m, TILE), D]
    shift: Array  # [m]
    G: Array  # [m, D]


def _output_work(m: int, items: int, D: int, dtype: np.dtype) -> Output:
    n = numba.get_num_threads()
    return Output(
        np.empty(m * items, dtype),
        np.empty((n, m), dtype),
        np.empty((n, m, D), dtype),
        np.empty((n, max(m, min(TILE, items)), D), dtype),
        np.empty(m, dtype),
        np.empty((m, D), dtype),
    )


def _sum_limits(dtype: np.dtype) -> tuple[float, float]:
    """Between these a sum of exponentials is exact without a shift."""
    span = np.finfo(dtype)
    return dtype.type(span.tiny) ** dtype.type(0.6), dtype.type(span.max) ** dtype.type(0.8)


def output(kind: str, H: Array, W_out: Array, y: Array) -> tuple[float, Array, Array]:
    """As `reference.output`."""
    dtype = W_out.dtype
    N, D = H.shape
    work = _output_work(min(max(N, 1), ROWS), len(W_out), D, dtype)
    dH, dW_out = np.empty_like(H), np.empty_like(W_out)
    lowest, highest = _sum_limits(dtype)
    one, loss = dtype.type(1), 0.0
    with one_blas_thread():
        for lo in range(0, max(N, 1), ROWS):
            rows = slice(lo, min(lo + ROWS, N))
            m = rows.stop - rows.start
            if m:
                loss += _softmax(
                    H[rows], W_out, y[rows], one, *work, dH[rows], lowest, highest
                )
            _item_gradients(
                work.E, work.G[:m], W_out, W_out, dW_out, work.product, lo == 0, False, (one,) * 4
            )
    return loss, dH, dW_out


def score(kind: str, H: Array, W_out: Array, y: Array) -> tuple[Array, Array]:
    """As `reference.score`."""
    nll, rank = np.empty(y.size, np.float64), np.empty(y.size, np.int32)
    logits = np.empty((numba.get_num_threads(), SCORED_ROWS * len(W_out)), W_out.dtype)
    with one_blas_thread():
        _score(np.ascontiguousarray(H), W_out, y, logits, nll, rank)
    return nll, rank


# ---------------------------------------------------------------- a run of windows


class Work(NamedTuple):
    """Work arrays of `train_run`: one window and everything that is made of it."""

    x: Array  # i32[T, B]
    event: Array  # [T, B]
    carry: Array  # [T, B]
    A: Array  # [T, B, G*D]
    states: Array  # [T + 1, B, D]
    cache: Array  # [T, B, 3*D or 0]
    dH: Array  # [T, B, D]
    ds: Array  # [B, D]
    dA: Array  # [T, B, G*D]
    dW_h: Array  # [B, D, G*D]
    cells: Array  # i32[T * B, 2], step and column of the cells with a target
    y: Array  # i32[T * B]
    H: Array  # [T * B, D]
    dH_cells: Array  # [T * B, D]
    dW_out: Array  # [I, D], used where a window has more than one block
    slot: Array  # i32[I], -1 but inside _move_items
    rows: Array  # i32[T * B]
    dW_in: Array  # [T * B, G*D]


def workspace(spec: Spec, n_items: int, batch: int, window: int) -> tuple[Work, Output]:
    """Work arrays for windows of at most `window` steps of `batch` users."""
    T, B, D = window, batch, spec.hidden_size
    width, N = spec.gates * D, T * B
    dtype = np.dtype(spec.dtype)
    shapes = {
        "event": (T, B),
        "carry": (T, B),
        "A": (T, B, width),
        "states": (T + 1, B, D),
        "cache": (T, B, 0 if spec.cell == "tanh" else 3 * D),
        "dH": (T, B, D),
        "ds": (B, D),
        "dA": (T, B, width),
        "dW_h": (B, D, width),
        "H": (N, D),
        "dH_cells": (N, D),
        "dW_out": (n_items if N > ROWS else 0, D),
        "dW_in": (N, width),
    }
    arrays = {name: np.empty(shape, dtype) for name, shape in shapes.items()}
    arrays["x"] = np.empty((T, B), np.int32)
    arrays["cells"] = np.empty((N, 2), np.int32)
    arrays["y"], arrays["rows"] = np.empty(N, np.int32), np.empty(N, np.int32)
    arrays["slot"] = np.full(n_items, -1, np.int32)
    return Work(**arrays), _output_work(min(N, ROWS), n_items, D, dtype)


@serial
def _read_window(indptr, items, user, start, length, fresh, target_from, x, event, carry, cells, y):
    """`windows.window` into work arrays; returns the number of steps and of cells."""
    T, N = 0, 0
    for b in range(user.size):
        T = max(T, length[b])
    for t in range(T):
        for b in range(user.size):
            position = start[b] + t
            first = indptr[user[b]]
            here = t < length[b]
            x[t, b] = items[first + position] if here else 0
            event[t, b] = 1 if here else 0
            carry[t, b] = 0 if fresh[b] and t == 0 else 1
            follows = first + position + 1 < indptr[user[b] + 1]
            if here and follows and position + 1 >= target_from[b]:
                cells[N, 0], cells[N, 1] = t, b
                y[N] = items[first + position + 1]
                N += 1
    return T, N


@threads
def _forward_run(kind, T, user, pooled, start, drop, W_in, W_h, x, event, carry, A, states, cache, init):
    """Gather with input dropout and the cell's forward pass; drop = (threshold, factor)."""
    B, width = A.shape[1], A.shape[2]
    for i_b in prange(B):
        b = np.int64(i_b)
        for t in range(T):
            A[t, b] = W_in[x[t, b]]
            if drop[0]:
                _drop(A[t, b], start, (t * B + b) * width, drop[0], drop[1])
        W = W_h[0 if pooled else user[b]]
        _forward_column(kind, b, states, cache, A[:T], W, event, carry, init)


@threads
def _backward_run(
    kind, T, user, pooled, start, drop, W_h, ms, event, carry, dH, states, cache, init, ds, dA, dW_h,
    length, rule,
):  # fmt: skip
    """The cell's backward pass with input dropout; moves each user's own W_h."""
    B, width = dA.shape[1], dA.shape[2]
    D = dH.shape[2]
    for i_b in prange(B):
        b = np.int64(i_b)
        W = W_h[0 if pooled else user[b]]
        _backward_column(
            kind, b, dH[:T], states, cache, init, W, event, carry, ds[b], dA, dW_h[b]
        )
        if drop[0]:
            for t in range(T):
                _drop(dA[t, b], start, (t * B + b) * width, drop[0], drop[1])
        if length[b] and not pooled:
            own = ms[user[b]]
            for k in range(D):
                _rmsprop(W[k], own[k], dW_h[b, k], rule[0], rule[1], rule[2], rule[3])


@serial
def _move_items(T, x, event, dA, W_in, ms, stamp, step, dense, slot, rows, dW_in, rule):
    """Sum dA over the events of each item and move the rows of W_in."""
    count = 0
    for t in range(T):
        for b in range(x.shape[1]):
            if event[t, b] == 0:
                continue
            i = x[t, b]
            if slot[i] < 0:
                slot[i] = count
                rows[count] = i
                dW_in[count] = dA[t, b]
                count += 1
            else:
                total = dW_in[slot[i]]
                for j in range(total.size):
                    total[j] += dA[t, b, j]
    for k in range(count):
        i = rows[k]
        slot[i] = -1
        if dense:
            late = rule[1] ** W_in.dtype.type(step - 1 - stamp[i])
            stamp[i] = step
            for j in range(ms.shape[1]):
                ms[i, j] *= late
        _rmsprop(W_in[i], ms[i], dW_in[k], rule[0], rule[1], rule[2], rule[3])


@serial
def _train(
    kind, init, drop_in, drop_out, rule, dense, scale, limits, params, ms, indptr, items, run, s,
    work, out,
):  # fmt: skip
    """Algorithm 1 on a run of windows, in place; returns the summed loss and the events."""
    W_h, W_in, W_out = params
    pooled = W_h.shape[0] == 1
    D = W_out.shape[1]
    total, events = 0.0, 0
    for k in range(run.key.size):
        user, length = run.user[k], run.length[k]
        B = user.size
        T, N = _read_window(
            indptr, items, user, run.start[k], length, run.fresh[k], run.target_from[k],
            work.x, work.event, work.carry, work.cells, work.y,
        )  # fmt: skip
        start_in, start_out = _mix(run.key[k] + INPUT), _mix(run.key[k] + OUTPUT)
        work.states[0] = s[0]
        _forward_run(
            kind, T, user, pooled, start_in, drop_in, W_in, W_h, work.x, work.event, work.carry,
            work.A, work.states, work.cache, init,
        )  # fmt: skip
        s[0] = work.states[T]

        work.dH[:T] = 0
        for n in range(N):
            t, b = work.cells[n, 0], work.cells[n, 1]
            work.H[n] = work.states[t + 1, b]
            if drop_out[0]:
                _drop(work.H[n], start_out, (t * B + b) * D, drop_out[0], drop_out[1])
        for lo in range(0, max(N, 1), ROWS):
            hi = min(lo + ROWS, N)
            G = out.G[: hi - lo]
            if hi > lo:
                total += _softmax(
                    work.H[lo:hi], W_out, work.y[lo:hi], scale, out.E, out.S, out.U, out.product,
                    out.shift, G, work.dH_cells[lo:hi], limits[0], limits[1],
                )  # fmt: skip
            _item_gradients(
                out.E, G, W_out, ms.W_out, work.dW_out, out.product, lo == 0, hi == N, rule
            )
        for n in range(N):
            t, b = work.cells[n, 0], work.cells[n, 1]
            if drop_out[0]:
                _drop(work.dH_cells[n], start_out, (t * B + b) * D, drop_out[0], drop_out[1])
            work.dH[t, b] = work.dH_cells[n]

        _backward_run(
            kind, T, user, pooled, start_in, drop_in, W_h, ms.W_h, work.event, work.carry, work.dH,
            work.states, work.cache, init, work.ds, work.dA, work.dW_h, length, rule,
        )  # fmt: skip
        if pooled and T:
            for b in range(1, B):
                work.dW_h[0] += work.dW_h[b]
            for j in range(D):
                _rmsprop(
                    W_h[0, j], ms.W_h[0, j], work.dW_h[0, j], rule[0], rule[1], rule[2], rule[3]
                )
        ms.step[0] += 1
        _move_items(
            T, work.x, work.event, work.dA, W_in, ms.W_in, ms.stamp, ms.step[0], dense,
            work.slot, work.rows, work.dW_in, rule,
        )  # fmt: skip
        events += N
    return total, events


def train_run(
    spec: Spec,
    rule: Rule,
    scale: float,
    params: Params,
    accumulators: Accumulators,
    s: Array,
    log: EventLog,
    run: Slice,
    work: tuple[Work, Output],
) -> tuple[float, int]:
    """The loop over `training.step`, compiled into one call; it leaves out clipping.

    Parameters
    ----------
    s : real[1, B, D]
        State before the run, overwritten with the state after it.
    run : Slice
        With an axis of K windows; a user at most once among the columns of a window.
    work
        From `workspace`.

    Returns
    -------
    loss, events : summed over the run
    """
    real = np.dtype(spec.dtype).type

    def dropping(p: float) -> tuple:
        return dropout_threshold(p), real(1) / real(1 - p)

    numbers = (rule.learning_rate, rule.rho, 1 - rule.rho, rule.eps)
    with one_blas_thread():
        return _train(
            KINDS[spec.cell_kind],
            real(spec.init_state),
            dropping(spec.dropout_in),
            dropping(spec.dropout_out),
            tuple(real(number) for number in numbers),
            rule.W_in_rows == "dense",
            real(scale),
            _sum_limits(np.dtype(spec.dtype)),
            params,
            accumulators,
            log.indptr,
            log.items,
            run,
            s,
            *work,
        )
