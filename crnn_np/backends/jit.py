"""The Numba backend: the functions of the reference, compiled, and a fused run of windows.

The output layer is nearly all of the time: three matrix products of D x I x N. It goes over blocks
of events and tiles of `TILE` items, and the logits never exist as a whole. With E item-major,
E[i, n] = exp(logit of item i at event n - shift[n]), one thread owns a stretch of tiles:

    first pass    logits of a tile into E, exp in place, their sums S over items, and
                  U += W_out^T E, from which dH = U / S - W_out[y]; the tile stays in cache
    second pass   dW_out = E (H / S), with S taken off E at the targets before; RMSprop moves the
                  tile of W_out at once, so that dW_out is never stored whole

shift is 0: exp is scale-free as long as the sums neither overflow nor vanish. Where one does, the
block is done again with the largest logit of each event as shift.

`_product` is the one matrix product: a block of rows by vectors of sums held in registers, its k-th
step a broadcast of each row's element times those vectors. Every score is summed in the same order,
so equal rows of W_out score the same to the bit and ties are exact. Vectors are as wide as the
processor's; no BLAS is called, so no second kind of threads competes.

Numba's work queue is the threading layer unless another was chosen: it does not spin when another
process wants a core. It must not be entered from two Python threads at once.

Kernels of the recurrent network live in this file alone, since Numba's disk cache watches no other.
"""

import math
from typing import NamedTuple

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

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

TILE = 48  # items; E of a tile fits in the first-level cache
TANH, GRU, GRU_SIGMOID = 0, 1, 2
KINDS = {"tanh": TANH, "gru": GRU, "gru-sigmoid": GRU_SIGMOID}

FAST = {"contract", "reassoc", "nsz", "arcp"}
FAITHFUL = {"contract"}  # reassociation would undo the argument reduction of exp
serial = njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST)
threads = njit(cache=True, nogil=True, error_model="numpy", fastmath=FAST, parallel=True)
exact = njit(cache=True, nogil=True, error_model="numpy", fastmath=FAITHFUL)


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
        _backward_column(kind, b, dH, states, cache, init, W, event, carry, ds0[b], dA, dW_h[b])


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
    _forward_window(KINDS[cell], states[:, 0], cache, A, W_h, event, carry, A.dtype.type(init))
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
    _backward_window(KINDS[cell], dH, states[:, 0], cache, init, W_h, event, carry, ds0, dA, dW_h)
    if W_h.shape[0] == 1:
        dW_h = dW_h.sum(axis=0, keepdims=True)
    return ds0[None], dA, dW_h


# ---------------------------------------------------------------- matrix product

_features = llvmlite.binding.get_host_cpu_features()
VECTOR_BYTES = 64 if _features.get("avx512f") else 32 if _features.get("avx2") else 16
_many = _features.get("avx512f") or _features.get("neon")  # 32 vector registers, else 16
# rows x vectors of a register block; measured: 12 x 2 in place of 6 x 4 costs a fifth of the speed
WIDE_ROWS, WIDE = (6, 4) if _many else (6, 2)
PAIR_ROWS = 8 if _many else 6
SINGLE_ROWS = 8


@intrinsic(prefer_literal=True)
def _block(context, rows, vectors, add, A, ao, ars, aks, B, bo, bks, C, co, crs, K):
    """One register block of a product on flat arrays, `rows` by `vectors`, both literal.

    C[co + i crs + v] (+)= sum over k < K of A[ao + i ars + k aks] B[bo + k bks + v], K >= 1.
    """
    n_rows, n_vectors = rows.literal_value, vectors.literal_value
    bits = A.dtype.bitwidth
    lanes = VECTOR_BYTES * 8 // bits

    def codegen(context, builder, signature, args):
        _, _, add, A_, ao, ars, aks, B_, bo, bks, C_, co, crs, K = args
        real = context.get_value_type(A.dtype)
        vector, i32, i64 = ir.VectorType(real, lanes), ir.IntType(32), ir.IntType(64)
        undefined = ir.Constant(vector, ir.Undefined)
        zeros = ir.Constant(ir.VectorType(i32, lanes), [0] * lanes)
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{lanes}f{bits}"
        )

        def pointer(kind, array, offset):
            return builder.gep(context.make_array(kind)(context, builder, array).data, [offset])

        def at(base, n):
            return builder.gep(base, [ir.Constant(i64, n)])

        def as_vector(p):
            return builder.bitcast(p, vector.as_pointer())

        def load(p):
            return builder.load(as_vector(p), align=bits // 8)

        def spread(p):
            one = builder.insert_element(undefined, builder.load(p), ir.Constant(i32, 0))
            return builder.shuffle_vector(one, undefined, zeros)

        def row(base, stride, i):
            return builder.gep(base, [builder.mul(stride, ir.Constant(i64, i))])

        a, b, c = pointer(A, A_, ao), pointer(B, B_, bo), pointer(C, C_, co)
        a_rows = [row(a, ars, i) for i in range(n_rows)]
        cells = [at(row(c, crs, i), lanes * v) for i in range(n_rows) for v in range(n_vectors)]
        entry = builder.block
        old, loop, done = (builder.append_basic_block(n) for n in ("old", "product", "done"))
        builder.cbranch(builder.trunc(add, ir.IntType(1)), old, loop)
        builder.position_at_end(old)
        previous = [load(cell) for cell in cells]
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(i64)
        sums = [builder.phi(vector) for _ in cells]
        b_k = builder.gep(b, [builder.mul(k, bks)])
        b_vectors = [load(at(b_k, lanes * v)) for v in range(n_vectors)]
        new = []
        for i in range(n_rows):
            a_ik = spread(builder.gep(a_rows[i], [builder.mul(k, aks)]))
            for v in range(n_vectors):
                new.append(builder.call(fma, [a_ik, b_vectors[v], sums[i * n_vectors + v]]))
        next_k = builder.add(k, ir.Constant(i64, 1))
        for block, first in ((entry, None), (old, previous)):
            k.add_incoming(ir.Constant(i64, 0), block)
            for j, phi in enumerate(sums):
                phi.add_incoming(first[j] if first else ir.Constant(vector, [0.0] * lanes), block)
        k.add_incoming(next_k, loop)
        for phi, value in zip(sums, new, strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", next_k, K), loop, done)
        builder.position_at_end(done)
        for value, cell in zip(new, cells, strict=True):
            builder.store(value, as_vector(cell), align=bits // 8)
        return context.get_dummy_value()

    n = types.intp
    array, flag = (A, n, n, n, B, n, n, C, n, n, n), types.boolean
    return types.none(rows, vectors, flag, *array), codegen


def _lanes(dtype: np.dtype) -> int:
    """Elements of a vector."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


@serial
def _columns(nv, add, M, A, ao, ars, aks, B, bo, bks, C, co, crs, K):
    """`_product` of nv vectors of columns: blocks of rows, then the rows that are left."""
    rows = WIDE_ROWS if nv == WIDE else PAIR_ROWS if nv == 2 else SINGLE_ROWS
    i = 0
    while i < M:
        a, c = ao + i * ars, co + i * crs
        if i + rows > M:
            rows = 1
        if nv == WIDE:
            if rows > 1:
                _block(WIDE_ROWS, WIDE, add, A, a, ars, aks, B, bo, bks, C, c, crs, K)
            else:
                _block(1, WIDE, add, A, a, ars, aks, B, bo, bks, C, c, crs, K)
        elif nv == 2:
            if rows > 1:
                _block(PAIR_ROWS, 2, add, A, a, ars, aks, B, bo, bks, C, c, crs, K)
            else:
                _block(1, 2, add, A, a, ars, aks, B, bo, bks, C, c, crs, K)
        elif rows > 1:
            _block(SINGLE_ROWS, 1, add, A, a, ars, aks, B, bo, bks, C, c, crs, K)
        else:
            _block(1, 1, add, A, a, ars, aks, B, bo, bks, C, c, crs, K)
        i += rows


@serial
def _product(add, M, N, K, lanes, A, ao, ars, aks, B, bo, bks, C, co, crs):
    """C (M x N, rows crs apart) = or += A (M x K, any strides) B (K x N, rows bks apart).

    On flat arrays from offsets ao, bo, co; N is a multiple of `lanes` and K at least 1.
    """
    n = 0
    while n < N:
        left = (N - n) // lanes
        nv = WIDE if left >= WIDE else 2 if left >= 2 else 1
        _columns(nv, add, M, A, ao, ars, aks, B, bo + n, bks, C, co + n, crs, K)
        n += nv * lanes


# ---------------------------------------------------------------- output layer


class Output(NamedTuple):
    """Work arrays of the output layer, for blocks of at most `width` events.

    Rows of `ld` or `Dp` elements hold `width` or D of them (`_row_length`).
    """

    HT: Array  # [D, ld], H of the block transposed
    E: Array  # [I, ld]
    S: Array  # [threads, width]
    U: Array  # [threads, D, ld]
    shift: Array  # [width]
    G: Array  # [width, Dp]
    tile: Array  # [threads, TILE, Dp], dW_out of a tile
    dW_out: Array  # [I, Dp], where a window has more than one block


LINE = 64  # bytes


def _block_width(D: int) -> int:
    """Most events of a block: its share of HT, U and G fits in the second-level cache."""
    return 128 if D <= 64 else 256


def _row_length(n: int, dtype: np.dtype) -> int:
    """Elements between rows of n: whole cache lines, an odd number where there are many.

    With a power of two the rows of a register block would fall into a few sets of the cache.
    """
    line = LINE // np.dtype(dtype).itemsize
    lines = -(-n // line)
    return (lines + (lines > 4 and lines % 2 == 0)) * line


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> Array:
    """Zeros that begin on a cache line, so that no vector lies across two."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + LINE, np.uint8)
    skip = -memory.ctypes.data % LINE
    return memory[skip : skip + size].view(dtype).reshape(shape)


def _output_work(N: int, items: int, D: int, dtype: np.dtype) -> Output:
    lanes = _lanes(dtype)
    width = min(-(-max(N, 1) // lanes) * lanes, _block_width(D))
    ld, Dp = _row_length(width, dtype), _row_length(D, dtype)
    n = numba.get_num_threads()
    shapes = (
        (D, ld),
        (items, ld),
        (n, width),
        (n, D, ld),
        (width,),
        (width, Dp),
        (n, TILE, Dp),
        (items if N > width else 0, Dp),
    )
    return Output(*(_aligned(shape, dtype) for shape in shapes))


@serial
def _thread_tiles(p, n_threads, items):
    """First and last + 1 of the tiles that thread p owns."""
    tiles = (items + TILE - 1) // TILE
    return p * tiles // n_threads, (p + 1) * tiles // n_threads


@serial
def _exp_tiles(p, W_out, m, lanes, out):
    items, D = W_out.shape
    ld = out.E.shape[1]
    W, HT, E = W_out.reshape(-1), out.HT.reshape(-1), out.E.reshape(-1)
    S, U, shift = out.S[p], out.U[p].reshape(-1), out.shift
    S[:] = 0
    U[:] = 0
    first, last = _thread_tiles(p, out.S.shape[0], items)
    for lo in range(first * TILE, min(last * TILE, items), TILE):
        hi = min(lo + TILE, items)
        _product(False, hi - lo, m, D, lanes, W, lo * D, D, 1, HT, 0, ld, E, lo * ld, ld)
        for i in range(lo, hi):
            e = out.E[i]
            for n in range(m):
                v = _exp(e[n] - shift[n])
                e[n] = v
                S[n] += v
        _product(True, D, m, hi - lo, lanes, W, lo * D, 1, D, E, lo * ld, ld, U, 0, ld)


@threads
def _exp_scores(W_out, m, lanes, out):
    """First pass over a block of m events (padded): E, and each thread's part of S and U."""
    for p in prange(out.S.shape[0]):
        _exp_tiles(np.int64(p), W_out, m, lanes, out)


@serial
def _score_tiles(p, W_out, m, lanes, out):
    items, D = W_out.shape
    ld = out.E.shape[1]
    W, HT, E = W_out.reshape(-1), out.HT.reshape(-1), out.E.reshape(-1)
    top = out.S[p]
    top[:] = -np.inf
    first, last = _thread_tiles(p, out.S.shape[0], items)
    for lo in range(first * TILE, min(last * TILE, items), TILE):
        hi = min(lo + TILE, items)
        _product(False, hi - lo, m, D, lanes, W, lo * D, D, 1, HT, 0, ld, E, lo * ld, ld)
        for i in range(lo, hi):
            e = out.E[i]
            for n in range(m):
                top[n] = max(top[n], e[n])


@threads
def _scores(W_out, m, lanes, out):
    """E = the scores themselves, and the largest in each thread's part of S."""
    for p in prange(out.S.shape[0]):
        _score_tiles(np.int64(p), W_out, m, lanes, out)


@serial
def _gradient_tiles(p, W_out, ms, m, lanes, out, only, first, move, rule):
    items, D = W_out.shape
    ld, Dp = out.E.shape[1], out.G.shape[1]
    columns = (D + lanes - 1) // lanes * lanes
    E, G = out.E.reshape(-1), out.G.reshape(-1)
    begin, end = _thread_tiles(p, out.tile.shape[0], items)
    for lo in range(begin * TILE, min(end * TILE, items), TILE):
        hi = min(lo + TILE, items)
        g = out.tile[p] if only else out.dW_out[lo:hi]
        if m:
            to, add = g.reshape(-1), not first
            _product(add, hi - lo, columns, m, lanes, E, lo * ld, ld, 1, G, 0, Dp, to, 0, Dp)
        elif first:
            g[:] = 0
        if move:
            for i in range(hi - lo):
                dw = g[i, :D]
                _rmsprop(W_out[lo + i], ms[lo + i], dw, rule[0], rule[1], rule[2], rule[3])


@threads
def _item_gradients(W_out, ms, m, lanes, out, only, first, move, rule):
    """Second pass over a block of m events (padded): dW_out = E G, tile by tile.

    `first` sets dW_out, otherwise it is added to. With `move`, RMSprop moves W_out by the result;
    a window's `only` block needs no dW_out then. rule = (learning_rate, rho, 1 - rho, eps).
    """
    for p in prange(out.tile.shape[0]):
        _gradient_tiles(np.int64(p), W_out, ms, m, lanes, out, only, first, move, rule)


@serial
def _load_states(H, m, D, out):
    """HT = H transposed, zero in the columns that pad the block to m events."""
    for d in range(D):
        for n in range(H.shape[0]):
            out.HT[d, n] = H[n, d]
        for n in range(H.shape[0], m):
            out.HT[d, n] = 0


@serial
def _softmax(H, W_out, y, scale, lanes, out, dH, lowest, highest):
    """Loss of a block and its dH; leaves E and G ready for `_item_gradients`, scaled.

    Returns the loss and the padded number of events.
    """
    D = W_out.shape[1]
    m = (H.shape[0] + lanes - 1) // lanes * lanes
    _load_states(H, m, D, out)
    out.shift[:m] = 0
    _exp_scores(W_out, m, lanes, out)
    safe = True
    for n in range(H.shape[0]):
        safe = safe and lowest < out.S[:, n].sum() < highest
    if not safe:
        _scores(W_out, m, lanes, out)
        for n in range(m):
            out.shift[n] = out.S[:, n].max()
        _exp_scores(W_out, m, lanes, out)
    U = out.U[0]
    for p in range(1, out.U.shape[0]):
        for d in range(D):
            for n in range(m):
                U[d, n] += out.U[p, d, n]
    loss = 0.0
    for n in range(H.shape[0]):
        s = out.S[:, n].sum()
        i = y[n]
        logit = H.dtype.type(0)
        for d in range(D):
            logit += H[n, d] * W_out[i, d]
        loss += math.log(np.float64(s)) + np.float64(out.shift[n]) - np.float64(logit)
        out.E[i, n] -= s
        factor = scale / s
        for d in range(D):
            dH[n, d] = U[d, n] * factor - W_out[i, d] * scale
            out.G[n, d] = H[n, d] * factor
    out.G[H.shape[0] : m] = 0
    return loss, m


@serial
def _rank_items(p, m, items, out, target, sums, ahead):
    n_threads = sums.shape[0]
    top, s, count = out.shift, sums[p], ahead[p]
    s[:] = 0
    count[:] = 0
    for i in range(p * items // n_threads, (p + 1) * items // n_threads):
        e = out.E[i]
        for n in range(m):
            v = e[n]
            s[n] += _exp(v - top[n])
            count[n] += not v < target[n]


@threads
def _rank(m, items, out, target, sums, ahead):
    """Each thread's sum of exp(score - largest) and count of items not below the target."""
    for p in prange(sums.shape[0]):
        _rank_items(np.int64(p), m, items, out, target, sums, ahead)


@serial
def _score_block(H, W_out, y, lanes, out, sums, ahead, nll, rank):
    """Scores of one block of events."""
    items, D = W_out.shape
    m = (H.shape[0] + lanes - 1) // lanes * lanes
    _load_states(H, m, D, out)
    _scores(W_out, m, lanes, out)
    target = np.zeros(m, H.dtype)
    for n in range(m):
        out.shift[n] = out.S[:, n].max()
        if n < y.size:
            target[n] = out.E[y[n], n]
    _rank(m, items, out, target, sums, ahead)
    for n in range(H.shape[0]):
        top = np.float64(out.shift[n])
        nll[n] = math.log(sums[:, n].sum()) + top - np.float64(target[n])
        rank[n] = ahead[:, n].sum()


def _sum_limits(dtype: np.dtype) -> tuple[float, float]:
    """Between these a sum of exponentials is exact without a shift."""
    span = np.finfo(dtype)
    return dtype.type(span.tiny) ** dtype.type(0.6), dtype.type(span.max) ** dtype.type(0.8)


def output(kind: str, H: Array, W_out: Array, y: Array) -> tuple[float, Array, Array]:
    """As `reference.output`."""
    dtype, lanes = W_out.dtype, _lanes(W_out.dtype)
    N, D = H.shape
    H, dH = np.ascontiguousarray(H), np.empty(H.shape, dtype)
    width = _block_width(D)
    out = _output_work(width + 1, len(W_out), D, dtype)  # room for dW_out
    one, loss, m = dtype.type(1), 0.0, 0
    for lo in range(0, max(N, 1), width):
        rows = slice(lo, min(lo + width, N))
        if N:
            limits = _sum_limits(dtype)
            part, m = _softmax(H[rows], W_out, y[rows], one, lanes, out, dH[rows], *limits)
            loss += part
        _item_gradients(W_out, W_out, m, lanes, out, False, lo == 0, False, (one,) * 4)
    return loss, dH, np.ascontiguousarray(out.dW_out[:, :D])


def score(kind: str, H: Array, W_out: Array, y: Array) -> tuple[Array, Array]:
    """As `reference.score`."""
    lanes, width = _lanes(W_out.dtype), _block_width(W_out.shape[1])
    nll, rank = np.empty(y.size, np.float64), np.empty(y.size, np.int32)
    out = _output_work(min(y.size, width), *W_out.shape, W_out.dtype)
    sums = np.empty(out.S.shape, np.float64)
    ahead = np.empty(out.S.shape, np.int32)
    H = np.ascontiguousarray(H)
    for lo in range(0, y.size, width):
        rows = slice(lo, lo + width)
        _score_block(H[rows], W_out, y[rows], lanes, out, sums, ahead, nll[rows], rank[rows])
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
        "dW_in": (N, width),
    }
    arrays = {name: _aligned(shape, dtype) for name, shape in shapes.items()}
    arrays["x"] = np.empty((T, B), np.int32)
    arrays["cells"] = np.empty((N, 2), np.int32)
    arrays["y"], arrays["rows"] = np.empty(N, np.int32), np.empty(N, np.int32)
    arrays["slot"] = np.full(n_items, -1, np.int32)
    return Work(**arrays), _output_work(N, n_items, D, dtype)


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
def _forward_run(
    kind, T, user, pooled, start, drop, W_in, W_h, x, event, carry, A, states, cache, init
):  # fmt: skip
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
    kind, T, user, pooled, start, drop, W_h, ms, event, carry, dH, states, cache, init, ds, dA,
    dW_h, length, rule,
):  # fmt: skip
    """The cell's backward pass with input dropout; moves each user's own W_h."""
    B, width = dA.shape[1], dA.shape[2]
    D = dH.shape[2]
    for i_b in prange(B):
        b = np.int64(i_b)
        W = W_h[0 if pooled else user[b]]
        _backward_column(kind, b, dH[:T], states, cache, init, W, event, carry, ds[b], dA, dW_h[b])
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
    kind, init, drop_in, drop_out, rule, dense, scale, lanes, limits, params, ms, indptr, items,
    run, s, work, out,
):  # fmt: skip
    """Algorithm 1 on a run of windows, in place; returns the summed loss and the events."""
    W_h, W_in, W_out = params
    pooled = W_h.shape[0] == 1
    D, width = W_out.shape[1], out.shift.size
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
        blocks = max((N + width - 1) // width, 1)
        m = 0
        for block in range(blocks):
            lo, hi = block * N // blocks, (block + 1) * N // blocks
            if hi > lo:
                loss, m = _softmax(
                    work.H[lo:hi], W_out, work.y[lo:hi], scale, lanes, out, work.dH_cells[lo:hi],
                    limits[0], limits[1],
                )  # fmt: skip
                total += loss
            _item_gradients(
                W_out, ms.W_out, m, lanes, out, blocks == 1, block == 0, block == blocks - 1, rule
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
    return _train(
        KINDS[spec.cell_kind],
        real(spec.init_state),
        dropping(spec.dropout_in),
        dropping(spec.dropout_out),
        tuple(real(number) for number in numbers),
        rule.W_in_rows == "dense",
        real(scale),
        _lanes(spec.dtype),
        _sum_limits(np.dtype(spec.dtype)),
        params,
        accumulators,
        log.indptr,
        log.items,
        run,
        s,
        *work,
    )
