"""The Numba backend: the functions of the reference, compiled, and a fused run of windows.

The output layer is nearly all of the time: three matrix products of D x I x N. Its logits never
exist as a whole. It goes over blocks of events and tiles of `TILE` items; E is item-major, and for
event n of a block E[i, n] = exp(logit of item i). One pass over the tiles does, tile by tile:

    dW_out = E G of the block before; where that block ended its window, RMSprop moves W_out
    E = exp(W_out H^T) of this block in the registers of the product, and its sums S over items
    U += W_out^T E, from which dH = U / S - W_out[y]

with G = H / S and S taken off E at the targets in between. So the update of one window shares its
pass with the logits of the next: E is read and written once a block, while the tile is in the
second-level cache, and the next tile's E is fetched during the first product. The last update of a
run has a pass of its own. Tiles come in chunks, with S and U of their own: a long one for each
thread, then short ones for whoever is free.

There is no pass for the largest logit: exp is scale-free as long as the sums neither overflow nor
vanish. Where one does, the block is done again with the largest logit of each event as a shift.

`_product` is the one matrix product: blocks of rows by vectors of sums held in registers, the k-th
step a broadcast of each row's element times those vectors. Every score is summed in the same order,
so equal rows of W_out score the same to the bit and ties are exact. Vectors are as wide as the
processor's. No BLAS is called, so no second kind of threads competes.

With ``products="bfloat16"`` the same blocks multiply words of two bfloat16 and add both products to
a float32 sum. What a product sums over then lies by twos: E is stored with events by twos for E G,
and, of the tile alone, with items by twos for W_out^T E; W_out is rounded both ways tile by tile.
Where the processor has AMX, its registers of 16 rows by 64 bytes take the place of those blocks: it
multiplies the next block while vectors make exponentials of the sums of the last one. All sizes are
padded to `SIDE`.

Threads are Python's: each runs the same compiled function without the interpreter's lock, its share
given by its number, and they meet at `_meet`, which spins for a while and then naps: where another
process has the core of the thread that is waited for, spinning on would keep that thread waiting.
What is summed together depends on the number of threads alone: the bytes of a result repeat.

Kernels of the recurrent network live in this file alone, since Numba's disk cache watches no other.
"""

import ctypes
import functools
import logging
import math
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import llvm_version_info
from numba import types
from numba._dispatcher import compute_fingerprint
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic, overload

from ..compiling import PART, compiled
from ..data import EventLog
from ..errors import SettingsError
from ..history import FLOOR, SMOOTHING, Past
from ..model import Accumulators, MixtureAccumulators, MixtureParams, Params, Spec, shapes
from ..optim import Rule
from ..outputs import STATIC, TIE, Cells, Mixture, lag_buckets, ramps
from ..windows import GOLDEN, INPUT, OUTPUT, Slice, dropout_threshold
from .reference import sum_rows, take_rows, to_device, to_host, update, window

__all__ = [
    "cell_backward",
    "cell_forward",
    "mixture",
    "mixture_score",
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

log_ = logging.getLogger(__name__)

PRODUCTS = "full", "bfloat16"  # `Spec.products`
TILE = 96  # items; E of a tile fits in the second-level cache beside its rows of W_out
TANH, GRU, GRU_SIGMOID = 0, 1, 2
KINDS = {"tanh": TANH, "gru": GRU, "gru-sigmoid": GRU_SIGMOID}

# For arguments: a function that is given a literal is compiled once more, for this one.
ZERO, ONE, NO_UPDATE = np.int64(0), np.int64(1), np.int64(-1)
YES, NO = np.bool_(True), np.bool_(False)

FAST = {"contract", "reassoc", "nsz", "arcp", "afn"}
FAITHFUL = {"contract"}  # reassociation would undo the argument reduction of exp
OPTIONS = {"nogil": True, "error_model": "numpy"}
# Compiled in from other files, which the cache on disk does not watch: this one has to change with
# them.
assert (FLOOR, SMOOTHING, STATIC, TIE) == (0.1, 1.0, 3, 1e-6)
assert (GOLDEN, INPUT, OUTPUT) == (0x9E3779B97F4A7C15, 1, 2)
assert tuple(" ".join(kind._fields) for kind in (Params, Slice, Past, Mixture)) == (
    "W_h W_in W_out",
    "user start length fresh target_from key",
    "indptr items features experts counts",
    "tau nu gate_in gate_out gate_user",
)

entry = compiled(fastmath=FAST, **OPTIONS)
serial = numba.njit(fastmath=FAST, **OPTIONS, **PART)
exact = compiled(fastmath=FAITHFUL, **OPTIONS)


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


@intrinsic
def _bits(context, x):
    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


f32 = np.float32


@exact
def _half(x):
    """The bits of the bfloat16 nearest to a float32, ties to even."""
    bits = _bits(x)
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@exact
def _unhalf(bits):
    """float32 of the bits of a bfloat16."""
    return _as_float32(np.int32(np.uint32(bits) << np.uint32(16)))


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
def _copy(to, values):
    """to[:] = values, for two vectors; Numba's own takes seconds to compile, for its error."""
    for j in range(to.size):
        to[j] = values[j]


# ---------------------------------------------------------------- threads


@intrinsic
def _add(context, array, index, value):
    """array[index] += value in one step that no other thread divides; returns what it was."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.atomic_rmw("add", builder.gep(data, [args[1]]), args[2], "seq_cst")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def _read(context, array, index):
    """array[index], never from a register."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "seq_cst", 8)

    return types.int64(array, types.intp), codegen


_sleep, NAP = types.ExternalFunction("usleep", types.int32(types.uint32)), 50  # microseconds

PATIENCE = 1.5  # seconds that a kernel is read or compiled without a word
SPINS = 200_000  # looks at the gate, a tenth of a millisecond, before a thread naps between them
ARRIVED, ROUND, LOOKS = 0, 8, 9  # the first two a cache line apart


@serial
def _meet(n, gate):
    """Wait until all n threads are here; what they wrote before is seen after."""
    if n == 1:
        return
    now = _read(gate, ROUND)
    if _add(gate, ARRIVED, 1) == n - 1:
        _add(gate, ARRIVED, -n)
        _add(gate, ROUND, 1)
        return
    left = gate[LOOKS]
    while _read(gate, ROUND) == now:
        left -= 1
        if left < 0:
            _sleep(np.uint32(NAP))


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def _tell() -> None:
    """Say, once in a process, what takes so long."""
    log_.info("compiling for this processor, up to a minute; later runs read the result from disk")


_loaded: set[tuple[Callable[..., Any], bytes]] = set()  # kernels and the types of arguments


def _load(kernel: Callable[..., Any], *arguments: Any) -> None:
    """Read a kernel from the disk cache or compile it, and say so where that takes long."""
    key = kernel, compute_fingerprint(arguments)  # 20 times as fast as typeof
    if key in _loaded:
        return
    patience = threading.Timer(PATIENCE, _tell)
    patience.daemon = True
    patience.start()
    try:
        kernel.compile(tuple(map(numba.typeof, arguments)))
    finally:
        patience.cancel()
    _loaded.add(key)


@contextmanager
def _unbroken() -> Iterator[None]:
    """Ctrl-C waits for the end: a thread that is missing leaves the others at the gate for ever."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    came: list[tuple] = []
    signal.signal(signal.SIGINT, lambda *given: came.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            handler(*came[0])


def _together(n: int, kernel: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of kernel(p, n, gate, *arguments) in n threads, p = 0 in the caller's."""
    gate = np.zeros(16, np.int64)
    gate[LOOKS] = SPINS if n <= _cores() else 0  # there the others want the core at once
    _load(kernel, np.int64(0), np.int64(n), gate, *arguments)
    results, ready, all_here = [None] * n, threading.Event(), False

    def work(p: int) -> None:
        results[p] = kernel(np.int64(p), np.int64(n), gate, *arguments)

    def work_beside(p: int) -> None:
        ready.wait()
        if all_here:
            work(p)

    others = [threading.Thread(target=work_beside, args=(p,), daemon=True) for p in range(1, n)]
    with _unbroken():
        try:
            for thread in others:
                thread.start()
            all_here = True
        finally:
            ready.set()
        work(0)
        for thread in others:
            thread.join()
    return results


@serial
def _share(p, n, count, unit):
    """First and last + 1 of `count` things that thread p of n has, whole units of `unit`."""
    units = (count + unit - 1) // unit
    return min(p * units // n * unit, count), min((p + 1) * units // n * unit, count)


# ---------------------------------------------------------------- matrix product

# What Numba compiles for
_triple, _, _features = cpu_target.target_context.codegen().magic_tuple()
_features = _features.split(",")
AVX512 = {"+avx512f", "+avx512dq"} <= set(_features)
VECTOR_BYTES = 64 if AVX512 else 32 if "+avx2" in _features else 16
HALF = AVX512 and "+avx512bf16" in _features  # products of pairs of bfloat16


def _may_use_amx() -> bool:
    """Ask the kernel for the registers of AMX, which it gives only to those who ask."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    arch_prctl, req_xcomp_perm, xtiledata = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, req_xcomp_perm, xtiledata) == 0


AMX = HALF and "+amx-bf16" in _features and _may_use_amx()
# Rows and vectors of a register block, with 32 registers or 16: TALL by WIDE, and ROWS by 2 where
# fewer columns are left
ROWS = 8 if AVX512 or _triple.startswith(("aarch64", "arm64")) else 6
TALL, WIDE = (6, 4) if AVX512 else (ROWS, 2)

LOG2_E = 1 / math.log(2)
EXP2 = {  # coefficients of 2^x, -1/2 <= x <= 1/2, but for the constant 1
    32: (  # fitted to the smallest relative error, 9.1e-8
        0.6931470036506653,
        0.24022242426872253,
        0.05550733581185341,
        0.009671512991189957,
        0.0013264723820611835,
    ),
    64: tuple(math.log(2) ** n / math.factorial(n) for n in range(1, 14)),
}
ROOTS = (2.0 ** (np.arange(32) / 32)).astype(np.float32)  # 2^(j / 32)
SLOPES = 0.69312373, 0.24265256  # of 2^x, 0 <= x < 1/32, relative error 7e-8
TURN = 1.5 * 2**18  # the last bit of the float32 numbers near it is 1 / 32


def _lanes(dtype: np.dtype) -> int:
    """Elements of a vector."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


def _function(builder, name, result, *arguments):
    return cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, arguments), f"llvm.{name}"
    )


def _vector_exp2(builder, x, bits, lanes):
    """2^x of a vector, as LLVM: x = k + r with k whole; saturates, keeps NaN.

    With AVX-512 x = k + j / 32 + r, rounded down, and 2^(j / 32) is looked up in a table in two
    registers, which spares two of five fused multiply-adds; the processor has instructions for r
    and for the scaling by 2^k, and takes k from x.
    """
    real = ir.FloatType() if bits == 32 else ir.DoubleType()
    whole = ir.IntType(bits)
    vector, integers = ir.VectorType(real, lanes), ir.VectorType(whole, lanes)
    digits, bias = (23, 127) if bits == 32 else (52, 1023)

    def constant(value):
        return ir.Constant(vector, [float(np.float32(value)) if bits == 32 else value] * lanes)

    def polynomial(r):
        p = constant(EXP2[bits][-1])
        for c in (*EXP2[bits][-2::-1], 1.0):
            p = builder.call(fma, [p, r, constant(c)])
        return p

    shape = f"v{lanes}f{bits}"
    fma = _function(builder, f"fmuladd.{shape}", vector, vector, vector, vector)
    rint = _function(builder, f"rint.{shape}", vector, vector)
    if AVX512 and bits == 32:
        mask, mode = ir.IntType(16), ir.IntType(32)
        scalef = _function(
            builder, "x86.avx512.mask.scalef.ps.512", vector, vector, vector, vector, mask, mode
        )
        pick = _function(builder, "x86.avx512.vpermi2var.ps.512", vector, vector, integers, vector)
        reduce = _function(
            builder, "x86.avx512.mask.reduce.ps.512", vector, vector, mode, vector, mask, mode
        )
        add = _function(builder, "x86.avx512.add.ps.512", vector, vector, vector, mode)
        quiet, down, as_it_is, none = 8, 1, mode(4), constant(0.0)
        r = builder.call(reduce, [x, mode(5 << 4 | quiet | down), none, mask(-1), as_it_is])
        turned = builder.call(add, [x, constant(TURN), mode(quiet | down)])
        low, high = (ir.Constant(vector, list(map(float, half))) for half in np.split(ROOTS, 2))
        root = builder.call(pick, [low, builder.bitcast(turned, integers), high])
        slope = builder.call(fma, [r, constant(SLOPES[1]), constant(SLOPES[0])])
        p = builder.call(fma, [builder.fmul(r, root), slope, root])
        return builder.call(scalef, [p, x, none, mask(-1), as_it_is])
    low, high = constant(1.0 - bias), constant(bias + 0.4)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    x = builder.select(builder.fcmp_ordered(">", x, high), high, x)
    k = builder.call(rint, [x])
    p = polynomial(builder.fsub(x, k))
    exponent = builder.add(builder.fptosi(k, integers), ir.Constant(integers, [bias] * lanes))
    scale = builder.shl(exponent, ir.Constant(integers, [digits] * lanes))
    return builder.fmul(p, builder.bitcast(scale, vector))


ALONG_K, ALONG_M = 0, 1  # the direction in which A's elements are neighbours


def _vector_half(builder, values, lanes):
    """`_half` of vectors, in the upper 16 bits of their elements; the lower ones are left over."""
    integers = ir.VectorType(ir.IntType(32), lanes)

    def constant(value):
        return ir.Constant(integers, [value] * lanes)

    for value in values:
        bits = builder.bitcast(value, integers)
        odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
        yield builder.add(builder.add(bits, constant(0x7FFF)), odd)


class Registers:
    """A register block of sums while its LLVM code is written: n_rows by n_vectors vectors.

    Offsets are in elements; where `words`, elements are words of 32 bits that hold two bfloat16
    each, and a vector of sums is of float32.
    """

    def __init__(self, context, builder, kind, n_rows, n_vectors, left):
        self.context, self.builder, self.n_rows = context, builder, n_rows
        self.n_vectors = max(n_vectors, 1)
        self.masked = n_vectors == 0 and left is not None
        self.words = isinstance(kind.dtype, types.Integer)
        self.bits = 32 if self.words else kind.dtype.bitwidth
        self.lanes = VECTOR_BYTES * 8 // self.bits
        self.real = ir.FloatType() if self.bits == 32 else ir.DoubleType()
        self.vector = ir.VectorType(self.real, self.lanes)
        self.integers = ir.VectorType(ir.IntType(self.bits), self.lanes)
        self.shape = f"v{self.lanes}f{self.bits}"
        if self.masked:
            numbers = ir.VectorType(n_ir, self.lanes)
            count = self.spread(left, ir.Constant(numbers, ir.Undefined))
            indices = ir.Constant(numbers, list(range(self.lanes)))
            self.mask = builder.icmp_signed("<", indices, count)

    @classmethod
    def each(cls, context, builder, kind, sizes, given, left=None):
        """A block of each of the sizes (rows, vectors); what the caller emits runs for `given`."""
        for size in sizes:
            pairs = zip(given, size, strict=True)
            same = [builder.icmp_signed("==", value, n_ir(n)) for value, n in pairs]
            with builder.if_then(builder.and_(*same)):
                yield cls(context, builder, kind, *size, left)

    def pointer(self, kind, array, offset):
        data = self.context.make_array(kind)(self.context, self.builder, array).data
        return self.builder.gep(self.builder.bitcast(data, self.real.as_pointer()), [offset])

    def at(self, base, n):
        return self.builder.gep(base, [n_ir(n)])

    def cells(self, kind, array, offset, stride):
        """Pointers to the vectors of the block in an array whose rows are `stride` apart."""
        builder, first = self.builder, self.pointer(kind, array, offset)
        rows = [builder.gep(first, [builder.mul(stride, n_ir(i))]) for i in range(self.n_rows)]
        return [self.at(row, self.lanes * v) for row in rows for v in range(self.n_vectors)]

    def spread(self, value, undefined=None):
        """A vector of one value."""
        undefined = ir.Constant(self.vector, ir.Undefined) if undefined is None else undefined
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        one = self.builder.insert_element(undefined, value, ir.IntType(32)(0))
        return self.builder.shuffle_vector(one, undefined, zeros)

    def load(self, p):
        p, size = self.builder.bitcast(p, self.vector.as_pointer()), self.bits // 8
        if not self.masked:
            return self.builder.load(p, align=size)
        kinds = p.type, ir.IntType(32), self.mask.type, self.vector
        load = _function(self.builder, f"masked.load.{self.shape}.p0", self.vector, *kinds)
        zeros = ir.Constant(self.vector, [0.0] * self.lanes)
        return self.builder.call(load, [p, ir.IntType(32)(size), self.mask, zeros])

    def store(self, value, p):
        p, size = self.builder.bitcast(p, self.vector.as_pointer()), self.bits // 8
        if not self.masked:
            self.builder.store(value, p, align=size)
            return
        kinds = self.vector, p.type, ir.IntType(32), self.mask.type
        store = _function(self.builder, f"masked.store.{self.shape}.p0", ir.VoidType(), *kinds)
        self.builder.call(store, [value, p, ir.IntType(32)(size), self.mask])

    def times(self, a, b, c):
        """a b + c."""
        builder, vector = self.builder, self.vector
        if self.words:
            kinds = vector, self.integers, self.integers
            dot = _function(builder, "x86.avx512bf16.dpbf16ps.512", vector, *kinds)
            return builder.call(dot, [c, *(builder.bitcast(x, self.integers) for x in (a, b))])
        fma = _function(builder, f"fmuladd.{self.shape}", vector, vector, vector, vector)
        return builder.call(fma, [a, b, c])


n_, n_ir = types.intp, ir.IntType(64)


def _hidden(builder, x):
    """The same number, of which LLVM does not know where it comes from."""
    same = ir.FunctionType(x.type, [x.type])
    return builder.asm(same, "", "=r,0", [x], False)


def _emit_product(block, kinds, along_k, add, A, ao, stride, B, bo, bks, C, co, crs, K, P, po, pks):
    """The sums of a block, as `_block` has them. kinds: Numba types of A, B, C and P."""
    builder, zeros = block.builder, ir.Constant(block.vector, [0.0] * block.lanes)
    of_A, of_B, of_C, of_P = kinds
    starts = [block.pointer(*x) for x in ((of_A, A, ao), (of_B, B, bo), (of_P, P, po))]
    strides = [n_ir(1) if along_k else stride, bks, pks]
    cells = block.cells(of_C, C, co, crs)
    rows = [n_ir(i) for i in range(block.n_rows)]
    if along_k:
        # As few additions in the loop as there are pointers: two, with up to four rows. LLVM must
        # not see how far apart they are: it would work out eight addresses in every step.
        rows = [builder.mul(stride, n_ir(i)) for i in range(min(block.n_rows, 4))]
        rows[3:] = [_hidden(builder, row) for row in rows[3:]]
        if block.n_rows > 4:
            starts.append(builder.gep(starts[0], [_hidden(builder, builder.mul(stride, n_ir(4)))]))
            strides.append(n_ir(1))

    before, loop, done = (builder.append_basic_block(n) for n in ("before", "product", "done"))
    entry = builder.block
    builder.cbranch(builder.trunc(add, ir.IntType(1)), before, loop)
    builder.position_at_end(before)
    previous = [block.load(cell) for cell in cells]
    builder.branch(loop)
    builder.position_at_end(loop)
    k = builder.phi(n_ir)
    moving = [builder.phi(start.type) for start in starts]
    sums = [builder.phi(block.vector) for _ in cells]
    b = [block.load(block.at(moving[1], block.lanes * v)) for v in range(block.n_vectors)]
    i8, i32 = ir.IntType(8), ir.IntType(32)
    fetch = _function(builder, "prefetch.p0", ir.VoidType(), i8.as_pointer(), i32, i32, i32)
    ahead = builder.bitcast(moving[2], i8.as_pointer())
    builder.call(fetch, [ahead, i32(0), i32(2), i32(1)])
    new = []
    places = [builder.gep(moving[0], [row]) for row in rows]
    places += [builder.gep(moving[3], [row]) for row in rows[: block.n_rows - len(rows)]]
    for place in places:
        a_ik = block.spread(builder.load(place))
        new += [block.times(a_ik, b_k, sums[len(new) + v]) for v, b_k in enumerate(b)]
    next_k = builder.sub(k, n_ir(1))
    moved = [builder.gep(p, [by]) for p, by in zip(moving, strides, strict=True)]
    for phi, first, again, value in zip(
        [k, *moving, *sums],
        [K, *starts, *[zeros] * len(cells)],
        [K, *starts, *previous],
        [next_k, *moved, *new],
        strict=True,
    ):
        phi.add_incoming(first, entry)
        phi.add_incoming(again, before)
        phi.add_incoming(value, loop)
    builder.cbranch(builder.icmp_signed("!=", next_k, n_ir(0)), loop, done)
    builder.position_at_end(done)
    return new


def _emit_exp(block, new, S, so):
    """2 ** sums, and S += their sum over rows."""
    builder, n = block.builder, block.n_vectors
    new = [_vector_exp2(builder, value, block.bits, block.lanes) for value in new]
    for v in range(n):
        total = block.at(block.pointer(*S, so), block.lanes * v)
        value = block.load(total)
        for e in new[v::n]:
            value = builder.fadd(value, e)
        block.store(value, total)
    return new


def _emit_half(block, new, C, co, crs, Q, qo, qrs):
    """Sums in bfloat16: to C in rows, and to Q with two rows to a word."""
    context, builder, lanes = block.context, block.builder, block.lanes
    rounded = list(_vector_half(builder, new, lanes))
    small = ir.VectorType(ir.IntType(16), lanes)
    sixteen, upper = (ir.Constant(block.integers, [n] * lanes) for n in (16, 0xFFFF0000))
    low = [builder.lshr(value, sixteen) for value in rounded]
    kind, array = C
    e = context.make_array(kind)(context, builder, array).data
    for i in range(block.n_rows):
        row = builder.gep(e, [builder.add(co, builder.mul(crs, n_ir(i)))])
        for v in range(block.n_vectors):
            place = builder.bitcast(block.at(row, lanes * v), small.as_pointer())
            builder.store(builder.trunc(low[i * block.n_vectors + v], small), place, align=2)
    for i in range(0, block.n_rows, 2):
        row = builder.gep(block.pointer(*Q, qo), [builder.mul(qrs, n_ir(i // 2))])
        for v in range(block.n_vectors):
            word = low[i * block.n_vectors + v]
            if i + 1 < block.n_rows:
                above = builder.and_(rounded[(i + 1) * block.n_vectors + v], upper)
                word = builder.or_(word, above)
            place = builder.bitcast(block.at(row, lanes * v), block.integers.as_pointer())
            builder.store(word, place, align=4)


def _emit_rmsprop(block, new, W, ms, wo, wrs, learning_rate, rho, rest, eps):
    """One step of `_rmsprop` on the rows of W from wo on, whose gradients are the sums."""
    builder, fast = block.builder, ("fast",)
    learning_rate, rho, rest, eps = map(block.spread, (learning_rate, rho, rest, eps))
    root = _function(builder, f"sqrt.{block.shape}", block.vector, block.vector)
    places = block.cells(*W, wo, wrs), block.cells(*ms, wo, wrs)
    for g, w_at, ms_at in zip(new, *places, strict=True):
        square = builder.fmul(builder.fmul(rest, g, fast), g, fast)
        w, mean = block.load(w_at), builder.fmul(rho, block.load(ms_at), fast)
        mean = builder.fadd(mean, square, fast)
        scale = builder.call(root, [builder.fadd(mean, eps, fast)], fastmath=fast)
        step = builder.fdiv(builder.fmul(learning_rate, g, fast), scale, fast)
        block.store(mean, ms_at)  # after the load of w, which may lie 4096 n bytes away
        block.store(builder.fsub(w, step, fast), w_at)


# What `_rows` and `_vectors` choose from
SIZES = (TALL, WIDE), (4, WIDE), (1, WIDE), (ROWS, 2), (1, 2), (ROWS, 0), (1, 0)
SIZES = tuple(dict.fromkeys(SIZES))  # each once: WIDE may be 2
TWO_ROWS = (2, WIDE), (2, 2), (2, 0)


def _block_of(along_k_sizes, along_m_sizes):
    """`block` below for these sizes, (rows, vectors)."""

    @intrinsic
    def block(
        context, rows, vectors, along, add, A, ao, stride, B, bo, bks, C, co, crs, K, P, po, pks,
        left
    ):  # fmt: skip
        """One register block of a product on flat arrays.

        C[co + i crs + v] (+)= sum over k < K of a[i, k] B[bo + k bks + v], K >= 1, where a[i, k] is
        A[ao + i stride + k] along K and A[ao + i + k stride] along M. Step k fetches P[po + k pks]
        into the second-level cache. 0 vectors: one vector of which only the first `left` elements
        exist. Where A is of integers, A, B and P are words of two bfloat16 each, and so are their
        offsets.
        """

        def codegen(context, builder, signature, args):
            rows_, vectors_, along_, *product, left_ = args
            for direction, sizes in (ALONG_K, along_k_sizes), (ALONG_M, along_m_sizes):
                with builder.if_then(builder.icmp_signed("==", along_, n_ir(direction))):
                    for block in Registers.each(
                        context, builder, A, sizes, (rows_, vectors_), left_
                    ):
                        new = _emit_product(block, (A, B, C, P), direction == ALONG_K, *product)
                        for value, cell in zip(new, block.cells(C, *product[7:10]), strict=True):
                            block.store(value, cell)
            return context.get_dummy_value()

        arrays = (A, n_, n_, B, n_, n_, C, n_, n_, n_, P, n_, n_, n_)
        return types.none(n_, n_, n_, types.boolean, *arrays), codegen

    return block


# One row lies alike in both directions
_block = _block_of([size for size in SIZES if size[0] > 1], SIZES)
_row_block = _block_of([], [(1, 4), (1, 2), (1, 1), (1, 0)])


@intrinsic
def _move_block(
    context, rows, vectors, add, A, ao, stride, B, bo, bks, C, co, crs, K, P, po, pks, left, W, ms,
    wo, rule
):  # fmt: skip
    """`_rmsprop` on W[wo + i crs + v] by what `_block` along K would write to C, and does not."""

    def codegen(context, builder, signature, args):
        rows_, vectors_, *product, left_, W_, ms_, wo_, rule_ = args
        numbers = cgutils.unpack_tuple(builder, rule_)
        for block in Registers.each(context, builder, A, SIZES, (rows_, vectors_), left_):
            new = _emit_product(block, (A, B, C, P), True, *product)
            _emit_rmsprop(block, new, (W, W_), (ms, ms_), wo_, product[9], *numbers)
        return context.get_dummy_value()

    arrays = (A, n_, n_, B, n_, n_, C, n_, n_, n_, P, n_, n_, n_, W, ms, n_, rule)
    return types.none(n_, n_, types.boolean, *arrays), codegen


@intrinsic
def _exp_block(
    context, rows, vectors, A, ao, stride, B, bo, bks, C, co, crs, K, P, po, pks, S, so
):  # fmt: skip
    """C = 2 ** (the product of `_block` along K), and S[so + v] += its sum over i."""

    def codegen(context, builder, signature, args):
        *product, S_, so_ = args[2:]
        for block in Registers.each(context, builder, A, SIZES, args[:2]):
            new = _emit_product(block, (A, B, C, P), True, ir.IntType(8)(0), *product)
            new = _emit_exp(block, new, (S, S_), so_)
            for value, cell in zip(new, block.cells(C, *product[6:9]), strict=True):
                block.store(value, cell)
        return context.get_dummy_value()

    arrays = (A, n_, n_, B, n_, n_, C, n_, n_, n_, P, n_, n_, S, n_)
    return types.none(n_, n_, *arrays), codegen


@intrinsic
def _exp_half_block(
    context, rows, vectors, A, ao, stride, B, bo, bks, C, co, crs, K, P, po, pks, S, so, Q, qo, qrs
):
    """As `_exp_block` on words of two bfloat16, C u16 with offsets of its own elements.

    Q (words, rows qrs apart) gets C again, two rows to a word; a last row alone is beside 0.
    """

    def codegen(context, builder, signature, args):
        *product, S_, so_, Q_, qo_, qrs_ = args[2:]
        for block in Registers.each(context, builder, A, SIZES + TWO_ROWS, args[:2]):
            new = _emit_product(block, (A, B, C, P), True, ir.IntType(8)(0), *product)
            new = _emit_exp(block, new, (S, S_), so_)
            _emit_half(block, new, (C, product[6]), *product[7:9], (Q, Q_), qo_, qrs_)
        return context.get_dummy_value()

    arrays = (A, n_, n_, B, n_, n_, C, n_, n_, n_, P, n_, n_, S, n_, Q, n_, n_)
    return types.none(n_, n_, *arrays), codegen


@intrinsic(prefer_literal=True)
def _rmsprop_block(context, whole, w, ms, g, at, left, rule):
    """`_rmsprop` of one vector; with `whole` (literal) 0 of its first `left` elements."""
    n_vectors = whole.literal_value

    def codegen(context, builder, signature, args):
        _, w_, ms_, g_, at_, left_, rule_ = args
        block = Registers(context, builder, w, 1, n_vectors, left_)
        [cell] = block.cells(g, g_, at_, n_ir(0))
        numbers = cgutils.unpack_tuple(builder, rule_)
        _emit_rmsprop(block, [block.load(cell)], (w, w_), (ms, ms_), at_, n_ir(0), *numbers)
        return context.get_dummy_value()

    return types.none(whole, w, ms, g, n_, n_, rule), codegen


@serial
def _rmsprop(w, ms, g, rule):
    """One step of `optim.rmsprop` on vectors; rule = (learning_rate, rho, 1 - rho, eps)."""
    lanes, n = VECTOR_BYTES // w.itemsize, w.size
    for j in range(0, n, lanes):
        if n - j >= lanes:
            _rmsprop_block(1, w, ms, g, j, 0, rule)
        else:
            _rmsprop_block(0, w, ms, g, j, n - j, rule)


@serial
def _vectors(left, lanes):
    """Vectors of the next register block, of so many elements left: WIDE, 2, or 0 for the last."""
    n = left // lanes
    return WIDE if n >= WIDE else 2 if n >= 2 else 0


@serial
def _rows(left, nv):
    """Rows of the next register block of nv vectors, of so many left; 8 are 8 or 4 and 4."""
    if nv < WIDE:
        return ROWS if left >= ROWS else 1
    if left >= TALL and (TALL == 8 or left != 8):
        return TALL
    return 4 if left >= 4 else 1


@serial
def _fetched(M, N, K, lanes, span):
    """Elements that a step of a product has to fetch, so that all of them fetch `span`."""
    blocks = n = 0
    while n < N:
        nv, i = _vectors(N - n, lanes), 0
        while i < M:
            i += _rows(M - i, nv)
            blocks += 1
        n += max(nv, 1) * lanes
    steps = max(blocks * K, 1)
    return (span + steps - 1) // steps


@serial
def _product(along, add, M, N, K, lanes, A, ao, stride, B, bo, bks, C, co, crs, P, po, span):
    """C (M x N, rows crs apart) = or += A (M x K) B (K x N, rows bks apart), K >= 1.

    On flat arrays from offsets ao, bo, co; A's rows (along K) or columns (along M) are `stride`
    apart. Meanwhile `span` elements of P from po on are fetched into the second-level cache.
    """
    pks = _fetched(M, N, K, lanes, span)
    by_row, by_step = (stride, 1) if along == ALONG_K else (1, stride)
    n = 0
    while n < N:
        left, i = N - n, 0
        nv = _vectors(left, lanes)
        while i < M:
            rows, a, c = _rows(M - i, nv), ao + i * by_row, co + i * crs + n
            way, apart = (ALONG_M, by_step) if rows == 1 else (along, stride)
            _block(rows, nv, way, add, A, a, apart, B, bo + n, bks, C, c, crs, K, P, po, pks, left)
            i += rows
            po += K * pks
        n += max(nv, 1) * lanes


@serial
def _move_product(
    add, M, N, K, lanes, A, ao, stride, B, bo, bks, C, co, crs, P, po, span, W, ms, wo, rule
):  # fmt: skip
    """`_rmsprop` on W, rows crs apart from wo on, by what `_product` along K would write to C.

    C is read where it is added to, and not written.
    """
    pks = _fetched(M, N, K, lanes, span)
    n = 0
    while n < N:
        left, i = N - n, 0
        nv = _vectors(left, lanes)
        while i < M:
            rows, a, at = _rows(M - i, nv), ao + i * stride, i * crs + n
            _move_block(
                rows, nv, add, A, a, stride, B, bo + n, bks, C, co + at, crs, K, P, po, pks, left,
                W, ms, wo + at, rule,
            )  # fmt: skip
            i += rows
            po += K * pks
        n += max(nv, 1) * lanes


@serial
def _exp_product(M, N, K, lanes, A, ao, stride, B, bks, C, co, crs, P, po, span, S):
    """C = 2 ** (A B), its sums over rows added to S[:N]; A along K, N whole vectors.

    Fetches as `_product` does.
    """
    pks = _fetched(M, N, K, lanes, span)
    n = 0
    while n < N:
        nv, i = _vectors(N - n, lanes), 0
        while i < M:
            rows, a, c = _rows(M - i, nv), ao + i * stride, co + i * crs + n
            _exp_block(rows, nv, A, a, stride, B, n, bks, C, c, crs, K, P, po, pks, S, n)
            i += rows
            po += K * pks
        n += max(nv, 1) * lanes


@serial
def _exp_half_product(M, N, K, lanes, A, stride, B, bks, C, co, crs, P, po, span, S, Q, qrs):
    """`_exp_product` on words of two bfloat16; C u16, and Q with two rows to a word."""
    pks = _fetched(M, N, K, lanes, span)
    n = 0
    while n < N:
        nv, i = _vectors(N - n, lanes), 0
        while i < M:
            rows, a, c, q = _rows(M - i, nv), i * stride, co + i * crs + n, i // 2 * qrs + n
            if rows == 1 and i + 2 <= M:
                rows = 2
            _exp_half_block(
                rows, nv, A, a, stride, B, n, bks, C, c, crs, K, P, po, pks, S, n, Q, q, qrs
            )
            i += rows
            po += K * pks
        n += max(nv, 1) * lanes


@serial
def _row_product(N, K, lanes, a, ao, B, bo, bks, c, co):
    """c[co : co + N] += a[ao : ao + K] B, B's rows bks apart from bo on."""
    n = 0
    while n < N:
        left = N - n
        whole = left // lanes
        nv = 4 if whole >= 4 else min(whole, 2)
        _row_block(
            1, nv, ALONG_M, True, a, ao, 1, B, bo + n, bks, c, co + n, 0, K, B, bo + n, 0, left
        )
        n += max(nv, 1) * lanes


@intrinsic(prefer_literal=True)
def _activate_block(context, sigmoid, whole, array, at, left):
    """`_activate` of one vector; with `whole` 0 of its first `left` elements. Literals 0 or 1."""
    is_sigmoid, n_vectors = sigmoid.literal_value, whole.literal_value

    def codegen(context, builder, signature, args):
        data, first, rest = args[2:]
        block = Registers(context, builder, array, 1, n_vectors, rest)
        [cell] = block.cells(array, data, first, n_ir(0))

        def constant(value):
            number = np.float32(value) if block.bits == 32 else value
            return ir.Constant(block.vector, [float(number)] * block.lanes)

        x = builder.fmul(block.load(cell), constant(-LOG2_E if is_sigmoid else 2 * LOG2_E))
        one = constant(1)
        below = builder.fadd(_vector_exp2(builder, x, block.bits, block.lanes), one)
        y = builder.fdiv(one if is_sigmoid else constant(2), below)
        block.store(y if is_sigmoid else builder.fsub(one, y), cell)
        return context.get_dummy_value()

    return types.none(sigmoid, whole, array, n_, n_), codegen


@exact
def _activate(sigmoid, a, ao, N, lanes):
    """The logistic function, or tanh, of a[ao : ao + N] in place."""
    for j in range(ao, ao + N, lanes):
        left = ao + N - j
        if sigmoid:
            if left >= lanes:
                _activate_block(1, 1, a, j, 0)
            else:
                _activate_block(1, 0, a, j, left)
        elif left >= lanes:
            _activate_block(0, 1, a, j, 0)
        else:
            _activate_block(0, 0, a, j, left)


# ---------------------------------------------------------------- products with AMX

SIDE = 32  # sums of a block by AMX, both ways: four of its registers; all sizes are padded to it


class _BFloat(ir.Type):
    """LLVM's type for bfloat16, which llvmlite does not have."""

    def __str__(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


i8_, i16_, i32_ = ir.IntType(8), ir.IntType(16), ir.IntType(32)
floats_ = ir.VectorType(ir.FloatType(), 16)
words_ = ir.VectorType(i32_, 16)
halves_ = ir.VectorType(i16_, 32)


def _amx(builder, name, *arguments):
    kinds = [a.type for a in arguments]
    builder.call(_function(builder, f"x86.{name}", ir.VoidType(), *kinds), arguments)


def _bytes_at(context, builder, kind, array, offset=0, size=4):
    """A pointer to bytes: into an array, `offset` elements of `size` bytes from its begin."""
    data = context.make_array(kind)(context, builder, array).data
    data = builder.bitcast(data, i8_.as_pointer())
    return data if isinstance(offset, int) else builder.gep(data, [builder.mul(offset, n_ir(size))])


def _beside(builder, p, n_bytes):
    by = n_bytes if isinstance(n_bytes, ir.Value) else n_ir(n_bytes)
    return builder.gep(p, [by])


def _as(builder, p, kind):
    return builder.bitcast(p, kind.as_pointer())


@intrinsic
def _amx_configure(context, shapes):
    """Give this thread the registers that `shapes` describes, until `_amx_release`."""

    def codegen(context, builder, signature, args):
        _amx(builder, "ldtilecfg", _bytes_at(context, builder, signature.args[0], args[0]))
        return context.get_dummy_value()

    return types.none(shapes), codegen


@intrinsic
def _amx_release(context):
    def codegen(context, builder, signature, args):
        _amx(builder, "tilerelease")
        return context.get_dummy_value()

    return types.none(), codegen


def _emit_fetch(builder, p, lines):
    """Ask for so many cache lines from p on, into the second-level cache; returns their end."""
    kinds = p.type, i32_, i32_, i32_
    fetch = _function(builder, "prefetch.p0", ir.VoidType(), *kinds)
    before, loop = builder.block, builder.append_basic_block("fetch")
    done = builder.append_basic_block("fetched")
    end = _beside(builder, p, builder.mul(lines, n_ir(LINE)))
    builder.cbranch(builder.icmp_signed(">", lines, n_ir(0)), loop, done)
    builder.position_at_end(loop)
    at = builder.phi(p.type)
    builder.call(fetch, [at, i32_(0), i32_(2), i32_(1)])
    after = _beside(builder, at, LINE)
    at.add_incoming(p, before)
    at.add_incoming(after, loop)
    builder.cbranch(builder.icmp_unsigned("<", after, end), loop, done)
    builder.position_at_end(done)
    return end


def _amx_corners(context, builder, C, C_, co_, crs_):
    """Pointers to the four quarters of a block, and the distance between its rows in bytes."""
    c, crs_ = _bytes_at(context, builder, C, C_, co_), builder.mul(crs_, n_ir(4))
    below = _beside(builder, c, builder.mul(crs_, n_ir(SIDE // 2)))
    return [c, _beside(builder, c, 64), below, _beside(builder, below, 64)], crs_


@intrinsic
def _amx_store(context, C, co, crs):
    """C = the sums of `_amx_sum`."""

    def codegen(context, builder, signature, args):
        corners, crs_ = _amx_corners(context, builder, C, *args)
        for register, corner in enumerate(corners):
            _amx(builder, "tilestored64", i8_(register), corner, crs_)
        return context.get_dummy_value()

    return types.none(C, n_, n_), codegen


@intrinsic(prefer_literal=True)
def _amx_sum(context, add, A, ao, ars, B, bo, brs, C, co, crs, K, P, po, lines):
    """In the registers A B, with `add` (literal) 1 C + A B, with 2 what they hold + A B.

    All in words of 32 bits. From their offsets on: A is [SIDE, K] and B [K, SIDE] words of two
    bfloat16, what is summed over by twos, C [SIDE, SIDE] float32; rows ars, brs and crs words
    apart. K is a multiple of 16. For every 16 of them so many lines of P are fetched, from word po
    on.
    """
    begins_with = add.literal_value

    def codegen(context, builder, signature, args):
        add_, A_, ao_, ars_, B_, bo_, brs_, C_, co_, crs_, K_, P_, po_, lines_ = args
        a = _bytes_at(context, builder, A, A_, ao_)
        b, p = _bytes_at(context, builder, B, B_, bo_), _bytes_at(context, builder, P, P_, po_)
        ars_, brs_ = (builder.mul(stride, n_ir(4)) for stride in (ars_, brs_))
        a_below = builder.mul(ars_, n_ir(SIDE // 2))
        corners, crs_ = _amx_corners(context, builder, C, C_, co_, crs_)
        for register, corner in enumerate(corners):
            if begins_with == 0:
                _amx(builder, "tilezero", i8_(register))
            elif begins_with == 1:
                _amx(builder, "tileloadd64", i8_(register), corner, crs_)
        entry, loop = builder.block, builder.append_basic_block("amx")
        done = builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k, at_a, at_b, at_p = builder.phi(n_ir), *(builder.phi(x.type) for x in (a, b, p))
        _amx(builder, "tileloadd64", i8_(4), at_a, ars_)
        _amx(builder, "tileloadd64", i8_(6), at_b, brs_)
        _amx(builder, "tdpbf16ps", i8_(0), i8_(4), i8_(6))
        _amx(builder, "tileloadd64", i8_(7), _beside(builder, at_b, 64), brs_)
        _amx(builder, "tdpbf16ps", i8_(1), i8_(4), i8_(7))
        _amx(builder, "tileloadd64", i8_(5), _beside(builder, at_a, a_below), ars_)
        _amx(builder, "tdpbf16ps", i8_(2), i8_(5), i8_(6))
        _amx(builder, "tdpbf16ps", i8_(3), i8_(5), i8_(7))
        sixteen = n_ir(16)
        moved = [
            builder.sub(k, sixteen),
            _beside(builder, at_a, 64),
            _beside(builder, at_b, builder.mul(brs_, sixteen)),
            _emit_fetch(builder, at_p, lines_),
        ]
        for phi, first, then in zip((k, at_a, at_b, at_p), (K_, a, b, p), moved, strict=True):
            phi.add_incoming(first, entry)
            phi.add_incoming(then, builder.block)
        builder.cbranch(builder.icmp_signed(">", moved[0], n_ir(0)), loop, done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    signature = types.none(add, A, n_, n_, B, n_, n_, C, n_, n_, n_, P, n_, n_)
    return signature, codegen


def _narrow(builder, low, high):
    """Two vectors of float32 as one of 32 bfloat16."""
    pair = ir.VectorType(_BFloat(), 32) if llvm_version_info >= (16,) else halves_
    convert = _function(builder, "x86.avx512bf16.cvtne2ps2bf16.512", pair, floats_, floats_)
    return builder.bitcast(builder.call(convert, [high, low]), halves_)


# Position q of 32 in a row is, with two rows to a word, at position BETWEEN[q]: so the processor
# interleaves two rows, 8 bytes of each at a time.
BETWEEN = [(q & 3) | (q >> 3) << 2 | (q & 4) << 2 for q in range(SIDE)]


def _interleave(builder, above, below):
    """Of two rows of 32 bfloat16: 32 words of one from each, in two vectors."""
    for half in range(2):
        picked = [q for q in range(SIDE) if BETWEEN[q] // 16 == half]
        mask = [x for q in picked for x in (q, q + SIDE)]
        indices = ir.Constant(ir.VectorType(i32_, SIDE), mask)
        yield builder.bitcast(builder.shuffle_vector(above, below, indices), words_)


@intrinsic(prefer_literal=True)
def _amx_exp(context, odd, count, C, co, E, eo, ers, Q, qo, qrs, S, so, P, po, W, wo, lines):
    """E = 2 ** C for `count` >= 1 pairs of rows of SIDE, and S[so:] += their sums over rows.

    C is float32, its rows SIDE apart; E bfloat16, rows ers apart; Q words, rows qrs apart, with a
    pair of rows to a row, in the order of `BETWEEN`. With `odd` (literal) the second row of a pair
    is not there, and zeros are in its place in Q. For each pair two cache lines of P from byte po
    on are fetched, and so many `lines` of W from word wo on.
    """
    is_odd = odd.literal_value

    def codegen(context, builder, signature, args):
        _, count_, C_, co_, E_, eo_, ers_, Q_, qo_, qrs_, S_, so_, P_, po_, W_, wo_, lines_ = args
        c = _bytes_at(context, builder, C, C_, co_)
        e = _bytes_at(context, builder, E, E_, eo_, 2)
        q = _bytes_at(context, builder, Q, Q_, qo_)
        s = _bytes_at(context, builder, S, S_, so_)
        p = _bytes_at(context, builder, P, P_, po_, 1)
        w = _bytes_at(context, builder, W, W_, wo_)
        below, step = builder.mul(ers_, n_ir(2)), builder.mul(qrs_, n_ir(4))
        sums = [_as(builder, _beside(builder, s, 64 * v), floats_) for v in range(2)]
        before = [builder.load(x, align=4) for x in sums]
        entry, loop = builder.block, builder.append_basic_block("exp")
        done = builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        left, totals = builder.phi(n_ir), [builder.phi(floats_) for _ in sums]
        starts = c, e, q, p, w
        moving = [builder.phi(x.type) for x in starts]
        at_c, at_e, at_q, at_p, at_w = moving
        next_p, next_w = _emit_fetch(builder, at_p, n_ir(2)), _emit_fetch(builder, at_w, lines_)
        rows, new = [], list(totals)
        for i in range(1 if is_odd else 2):
            found = []
            for v in range(2):
                at = _as(builder, _beside(builder, at_c, 128 * i + 64 * v), floats_)
                found.append(_vector_exp2(builder, builder.load(at, align=64), 32, 16))
                new[v] = builder.fadd(new[v], found[v])
            rows.append(_narrow(builder, *found))
            at = at_e if i == 0 else _beside(builder, at_e, below)
            builder.store(rows[i], _as(builder, at, halves_), align=2)
        if is_odd:
            rows.append(ir.Constant(halves_, [0] * SIDE))
        for v, words in enumerate(_interleave(builder, *rows)):
            builder.store(words, _as(builder, _beside(builder, at_q, 64 * v), words_), align=4)
        next_left = builder.sub(left, n_ir(1))
        by = 8 * SIDE, builder.mul(below, n_ir(2)), step
        moved = [_beside(builder, x, n_bytes) for x, n_bytes in zip(moving[:3], by, strict=True)]
        for phi, first, then in zip(
            [left, *moving, *totals],
            [count_, *starts, *before],
            [next_left, *moved, next_p, next_w, *new],
            strict=True,
        ):
            phi.add_incoming(first, entry)
            phi.add_incoming(then, builder.block)
        builder.cbranch(builder.icmp_signed(">", next_left, n_ir(0)), loop, done)
        builder.position_at_end(done)
        for x, total in zip(sums, new, strict=True):
            builder.store(total, x, align=4)
        return context.get_dummy_value()

    arrays = (C, n_, E, n_, n_, Q, n_, n_, S, n_, P, n_, W, n_, n_)
    return types.none(odd, n_, *arrays), codegen


def _transpose(builder, rows):
    """16 vectors of 16 words, the first word of each first."""
    for s in (1, 2, 4, 8):
        above = [c - s + 16 if c & s else c for c in range(16)]
        below = [c + 16 if c & s else c + s for c in range(16)]
        masks = [ir.Constant(words_, mask) for mask in (above, below)]
        new = list(rows)
        for i in range(16):
            if not i & s:
                pair = rows[i], rows[i + s]
                new[i], new[i + s] = (builder.shuffle_vector(*pair, mask) for mask in masks)
        rows = new
    return rows


@intrinsic
def _amx_pack(context, W, wo, wrs, R, ro, rrs, T, to, trs):
    """Rows of W in bfloat16, SIDE by SIDE of them from wo on, rows wrs apart.

    To R (bfloat16, rows rrs apart) as they are, to T (words, rows trs apart) transposed, so that
    there is a pair of W's rows to a word.
    """

    def codegen(context, builder, signature, args):
        W_, wo_, wrs_, R_, ro_, rrs_, T_, to_, trs_ = args
        w = _bytes_at(context, builder, W, W_, wo_)
        r = _bytes_at(context, builder, R, R_, ro_, 2)
        t = _bytes_at(context, builder, T, T_, to_)
        halves = [], []
        for i in range(0, SIDE, 2):
            pair = []
            for j in (i, i + 1):
                at = builder.gep(w, [builder.mul(wrs_, n_ir(4 * j))])
                found = [
                    builder.load(_as(builder, _beside(builder, at, 64 * v), floats_), align=4)
                    for v in range(2)
                ]
                pair.append(_narrow(builder, *found))
                at = builder.gep(r, [builder.mul(rrs_, n_ir(2 * j))])
                builder.store(pair[-1], _as(builder, at, halves_), align=2)
            for rows, words in zip(halves, _interleave(builder, *pair), strict=True):
                rows.append(words)
        transposed = [row for rows in halves for row in _transpose(builder, rows)]
        for q, place in enumerate(BETWEEN):
            at = builder.gep(t, [builder.mul(trs_, n_ir(4 * q))])
            builder.store(transposed[place], _as(builder, at, words_), align=4)
        return context.get_dummy_value()

    return types.none(W, n_, n_, R, n_, n_, T, n_, n_), codegen


@serial
def _between(j):
    """`BETWEEN` in each stretch of SIDE columns."""
    return (j & ~31) | (j & 3) | ((j >> 3) & 3) << 2 | (j & 4) << 2


@serial
def _padded(n):
    return (n + SIDE - 1) // SIDE * SIDE


@serial
def _amx_product(add, M, N, K, A, ao, ars, B, bo, brs, C, co, crs, P, po, span):
    """C = or += A B for M by N sums, both padded to SIDE.

    Meanwhile `span` words of P from po on are fetched into the second-level cache.
    """
    steps = _padded(M) // SIDE * (_padded(N) // SIDE) * (K // 16)
    lines = (span * 4 + steps * LINE - 1) // (steps * LINE)
    for n in range(0, N, SIDE):
        for i in range(0, M, SIDE):
            a, c = ao + i * ars, co + i * crs + n
            if add:
                _amx_sum(1, A, a, ars, B, bo + n, brs, C, c, crs, K, P, po, lines)
            else:
                _amx_sum(0, A, a, ars, B, bo + n, brs, C, c, crs, K, P, po, lines)
            _amx_store(C, c, crs)
            po += K // 16 * lines * LINE // 4


# ---------------------------------------------------------------- cells, one column of a window


class Column(NamedTuple):
    """What the cell makes of one user's stretch of a window; work arrays, T at most."""

    states: Array  # [T + 1, D]
    before: Array  # [T, D], the state each step begins with
    reset: Array  # [T, D], r * before (GRU)
    gates: Array  # [T, G*D], A before the forward pass, z, r and candidate after it (GRU)


@serial
def _begin(t, states, before, carry, init):
    c = carry[t]
    for j in range(states.shape[1]):
        before[t, j] = c * states[t, j] + (1 - c) * init


@serial
def _tanh_forward(T, states, before, gates, W, event, carry, init, lanes):
    D = states.shape[1]
    h, a, w = before.reshape(-1), gates.reshape(-1), W.reshape(-1)
    for t in range(T):
        _begin(t, states, before, carry, init)
        if event[t] == 0:
            _copy(states[t + 1], before[t])
            continue
        _row_product(D, D, lanes, h, t * D, w, ZERO, D, a, t * D)
        _activate(NO, a, t * D, D, lanes)
        _copy(states[t + 1], gates[t])


@serial
def _tanh_backward(T, dH, states, WT, event, carry, ds, dA, lanes):
    D = states.shape[1]
    wt, da = WT.reshape(-1), dA.reshape(-1)
    for t in range(T - 1, -1, -1):
        c = carry[t]
        if event[t] == 0:
            for j in range(D):
                ds[j] = c * (ds[j] + dH[t, j])
                dA[t, j] = 0
            continue
        for j in range(D):
            new = states[t + 1, j]
            dA[t, j] = (dH[t, j] + ds[j]) * (1 - new * new)
        ds[:] = 0
        _row_product(D, D, lanes, da, t * D, wt, ZERO, D, ds, ZERO)
        for j in range(D):
            ds[j] *= c


@serial
def _gru_forward(sigmoid, T, states, before, reset, gates, W, event, carry, init, lanes):
    D = states.shape[1]
    h, rh, a, w = before.reshape(-1), reset.reshape(-1), gates.reshape(-1), W.reshape(-1)
    for t in range(T):
        _begin(t, states, before, carry, init)
        if event[t] == 0:
            _copy(states[t + 1], before[t])
            reset[t] = 0
            continue
        _row_product(2 * D, D, lanes, h, t * D, w, ZERO, 3 * D, a, t * 3 * D)
        _activate(YES, a, t * 3 * D, 2 * D, lanes)
        for j in range(D):
            reset[t, j] = gates[t, D + j] * before[t, j]
        _row_product(D, D, lanes, rh, t * D, w, 2 * D, 3 * D, a, t * 3 * D + 2 * D)
        _activate(sigmoid, a, (t * 3 + 2) * D, D, lanes)
        for j in range(D):
            z, new = gates[t, j], gates[t, 2 * D + j]
            states[t + 1, j] = before[t, j] + z * (new - before[t, j])


@serial
def _gru_backward(sigmoid, T, dH, before, gates, WT, event, carry, ds, dA, lanes):
    D = before.shape[1]
    wt, da = WT.reshape(-1), dA.reshape(-1)
    for t in range(T - 1, -1, -1):
        c = carry[t]
        if event[t] == 0:
            for j in range(D):
                ds[j] = c * (ds[j] + dH[t, j])
            dA[t] = 0
            continue
        for j in range(D):
            h, z, new = before[t, j], gates[t, j], gates[t, 2 * D + j]
            dh = dH[t, j] + ds[j]
            slope = new * (1 - new) if sigmoid else 1 - new * new
            dA[t, 2 * D + j] = dh * z * slope
            dA[t, j] = dh * (new - h) * z * (1 - z)
            ds[j] = dh * (1 - z)
        drh = dA[t, D : 2 * D]
        drh[:] = 0
        reset_at, new_at = (t * 3 + 1) * D, (t * 3 + 2) * D
        _row_product(D, D, lanes, da, new_at, wt, 2 * D * D, D, da, reset_at)
        for j in range(D):
            r = gates[t, D + j]
            ds[j] += drh[j] * r
            drh[j] *= before[t, j] * r * (1 - r)
        _row_product(D, 2 * D, lanes, da, t * 3 * D, wt, ZERO, D, ds, ZERO)
        for j in range(D):
            ds[j] *= c


@serial
def _forward_column(kind, T, b, cell, W, event, carry, init, lanes):
    states, before = cell.states[b], cell.before[b]
    gates = cell.gates[b]
    if kind == TANH:
        _tanh_forward(T, states, before, gates, W, event, carry, init, lanes)
    else:
        sigmoid, reset = kind == GRU_SIGMOID, cell.reset[b]
        _gru_forward(sigmoid, T, states, before, reset, gates, W, event, carry, init, lanes)


@serial
def _backward_column(kind, T, b, cell, dH, W, WT, event, carry, ds, dA, lanes):
    """ds and dA of column b; WT is work for W transposed."""
    for k in range(W.shape[0]):
        for j in range(W.shape[1]):
            WT[j, k] = W[k, j]
    ds[:] = 0
    if kind == TANH:
        _tanh_backward(T, dH, cell.states[b], WT, event, carry, ds, dA, lanes)
    else:
        sigmoid = kind == GRU_SIGMOID
        before, gates = cell.before[b], cell.gates[b]
        _gru_backward(sigmoid, T, dH, before, gates, WT, event, carry, ds, dA, lanes)


@serial
def _recurrent_gradient(kind, add, T, first, last, b, cell, dA, dW_h, lanes):
    """Rows first to last of column b's dW_h, set or added to."""
    D, width = cell.before.shape[2], dW_h.shape[1]
    rows, gates = last - first, width if kind == TANH else 2 * D
    if rows == 0 or T == 0:
        return
    h, rh = cell.before[b].reshape(-1), cell.reset[b].reshape(-1)
    da, to, at = dA.reshape(-1), dW_h.reshape(-1), first * width
    off = ZERO
    _product(
        ALONG_M, add, rows, gates, T, lanes, h, first, D, da, off, width, to, at, width, h, off, off
    )
    if kind != TANH:
        at += gates
        _product(
            ALONG_M, add, rows, D, T, lanes, rh, first, D, da, gates, width, to, at, width, h, off,
            off,
        )  # fmt: skip


@entry
def _forward_window(p, n, gate, kind, cell, W_h, event, carry, init, lanes):
    for b in range(p, event.shape[0], n):
        W = W_h[b if W_h.shape[0] > 1 else 0]
        _forward_column(kind, event.shape[1], b, cell, W, event[b], carry[b], init, lanes)


@entry
def _backward_window(p, n, gate, kind, cell, dH, W_h, event, carry, W_T, ds0, dA, dW_h, lanes):
    T, D = event.shape[1], dH.shape[2]
    for b in range(p, event.shape[0], n):
        W = W_h[b if W_h.shape[0] > 1 else 0]
        _backward_column(
            kind, T, b, cell, dH[b], W, W_T[p], event[b], carry[b], ds0[b], dA[b], lanes
        )  # fmt: skip
        _recurrent_gradient(kind, False, T, 0, D, b, cell, dA[b], dW_h[b], lanes)


def _by_column(array: Array) -> Array:
    """[T, B, ...] as [B, T, ...]."""
    return np.ascontiguousarray(array.swapaxes(0, 1))


def cell_forward(
    cell: str, s0: Array, init: float, A: Array, W_h: Array, event: Array, carry: Array
) -> tuple[Array, Array]:
    """As `reference.cell_forward`."""
    T, B = event.shape
    D, dtype = s0.shape[-1], A.dtype
    states = np.empty((B, T + 1, D), dtype)
    states[:, 0] = s0[0]
    before = np.empty((B, T, D), dtype)
    reset = np.empty((B, T, 0 if cell == "tanh" else D), dtype)
    gates = A.swapaxes(0, 1).copy()
    work = Column(states, before, reset, gates)
    arrays = work, np.ascontiguousarray(W_h), _by_column(event), _by_column(carry)
    n = min(numba.get_num_threads(), B)
    _together(n, _forward_window, KINDS[cell], *arrays, dtype.type(init), _lanes(dtype))
    cache = gates[..., :0] if cell == "tanh" else gates
    return _by_column(states)[:, None], _by_column(cache)


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
    dA = np.empty((B, T, W_h.shape[2]), dH.dtype)
    dW_h = np.zeros((B, *W_h.shape[1:]), dH.dtype)
    states, gates, event, carry = map(_by_column, (states[:, 0], cache, event, carry))
    kept = carry[..., None]
    before = kept * states[:, :-1] + (1 - kept) * dH.dtype.type(init)
    reset = gates[..., D : 2 * D] * before[..., : gates.shape[-1]]
    arrays = Column(states, before, reset, gates), _by_column(dH), np.ascontiguousarray(W_h)
    n = min(numba.get_num_threads(), B)
    W_T = np.empty((n, W_h.shape[2], D), dH.dtype)
    gradients = ds0, dA, dW_h
    _together(
        n, _backward_window, KINDS[cell], *arrays, event, carry, W_T, *gradients, _lanes(dH.dtype)
    )
    if W_h.shape[0] == 1:
        dW_h = dW_h.sum(axis=0, keepdims=True)
    return ds0[None], _by_column(dA), dW_h


# ---------------------------------------------------------------- output layer


class Output(NamedTuple):
    """Work arrays of the output layer, for blocks of at most `width` events.

    Rows of `ld` or `Dp` elements hold `width` or D of them (`_row_length`). With bfloat16 products
    HT is u16[D / 2, ld, 2], E u16[I, width and more], G u16[width / 2, Dp, 2]: what a product
    sums over lies by twos, and an odd D is rounded up. With AMX I, D and `width` are, to `SIDE`.
    """

    HT: Array  # [D, ld], H of the block transposed, times log2(e)
    E: Array  # [I, ld]
    S: Array  # [chunks, width]
    U: Array  # [chunks, D rounded up + APART, ld]
    total: Array  # [threads, width], S over all chunks, for each thread
    shift: Array  # [threads, width], likewise
    G: Array  # [width, Dp]
    tile: Array  # [threads, TILE * max(D, ld)], dW_out or scores of a tile
    dW_out: Array  # [I, D], where a window has more than one block
    chunks: Array  # i64[chunks + 1], of `_chunks`
    taken: Array  # i64[8 (threads + 1)], how often all asked for one; from 8 on what p saw of it
    ahead: Array  # i64[threads, 8], [p, 0]: thread p has updated its tiles up to this item
    # Of a tile, for bfloat16 products:
    W_rows: Array  # u16[threads, TILE, D rounded up], W_out
    W_pairs: Array  # u32[threads, TILE / 2, D], W_out with two items to a word; transposed for AMX
    E_pairs: Array  # u32[threads, TILE / 2, ld], E with two items to a word
    amx: Array | None  # u8[64], shapes of the registers of AMX; None without it


LINE = 64  # bytes
AMX_SHAPES = np.zeros(64, np.uint8)
AMX_SHAPES[0] = 1  # the palette
AMX_SHAPES[16:32:2] = 64  # bytes of a row
AMX_SHAPES[48:56] = 16  # rows
APART = 32  # rows between the sums of two chunks: faster, it seems by what a core prefetches


def _block_width(D: int) -> int:
    """Most events of a block: more save passes over W_out, but E, HT, U and G grow with them.

    Whole tiles of AMX, whose steps write full ones: a multiple of SIDE.
    """
    return 256 if D <= 64 else 512


def _chunks(items: int, n: int) -> Array:
    """The first item of each chunk of whole tiles, and `items`: of n long chunks, then short ones.

    Thread p begins with chunk p; whoever is done takes the next short one, from large to small,
    which together have a quarter of the tiles. A chunk has sums of its own, so that it makes no
    difference who takes it.
    """
    short = np.arange(4 * min(n, 4) if n > 1 else 0, 0, -1)
    sizes = np.append(np.full(n, max(3 * short.sum(), 1) / n), short)
    tiles = np.rint(np.cumsum(sizes) / sizes.sum() * -(-items // TILE))
    return np.minimum(np.append(0, tiles.astype(np.int64)) * TILE, items)


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


def _output_work(
    N: int,
    items: int,
    D: int,
    dtype: np.dtype,
    whole: bool = True,
    store: bool | None = None,
    half: bool = False,
) -> Output:
    """For at most N events; `whole` for training, `store` to have dW_out, `half` for bfloat16."""
    amx = half and AMX
    unit = SIDE if amx else _lanes(dtype)
    width = min(-(-max(N, 1) // unit) * unit, _block_width(D))
    n = numba.get_num_threads()
    store = N > width if store is None else store
    narrow, word = np.uint16 if half else dtype, np.uint32
    D_up = -(-D // SIDE) * SIDE if amx else D + D % 2
    ld, Dp = _row_length(width, dtype), _row_length(D_up if amx else D, dtype)
    rows = -(-items // SIDE) * SIDE if amx else items
    chunks = _chunks(items, n)
    sums = len(chunks) - 1 if whole else n
    shapes = (
        ((D_up // 2, ld, 2) if half else (D, ld), narrow),
        ((rows if whole else 0, 2 * _row_length(width // 2, dtype) if half else ld), narrow),
        ((sums, width), dtype),
        ((sums, D_up + APART if whole else 0, ld), dtype),
        ((n, width), dtype),
        ((n, width), dtype),
        ((width // 2, Dp, 2) if half else (width, Dp), narrow),
        ((n, TILE * max(D_up, ld)), dtype),
        ((items if store else 0, D), dtype),
        ((len(chunks),), np.int64),
        ((8 * (n + 1),), np.int64),
        ((n, 8), np.int64),
        ((n, TILE if half else 0, D_up), np.uint16),
        ((n, D_up, TILE // 2) if amx else (n, TILE // 2 if half else 0, D), word),
        ((n, TILE // 2 if half else 0, ld), word),
    )
    out = Output(*(_aligned(*shape) for shape in shapes), amx=AMX_SHAPES if amx else None)
    out.chunks[:] = chunks
    return out


# The steps of a tile and of an event in versions: `full` for elements of the dtype, `half` for
# words of two bfloat16, `amx` for these with AMX. `_by_products` chooses by the type of `out`.


def _load_full(H, j, d, factor, out):
    out.HT[d, j] = H[j, d] * factor if j < H.shape[0] else 0


def _load_half(H, j, d, factor, out):
    out.HT[d // 2, j, d % 2] = _half(H[j, d] * factor) if j < H.shape[0] else 0


def _pack_full(p, W_out, lo, rows, out):
    pass


def _pack_half(p, W_out, lo, rows, out):
    W_rows, W_pairs, D = out.W_rows[p], out.W_pairs[p], W_out.shape[1]
    for i in range(rows):
        w, row = W_out[lo + i], W_rows[i]
        for d in range(D):
            row[d] = _half(w[d])
    for i in range(0, rows, 2):
        a, pair = W_rows[i], W_pairs[i // 2]
        if i + 1 < rows:
            b = W_rows[i + 1]
            for d in range(D):
                pair[d] = np.uint32(a[d]) | np.uint32(b[d]) << np.uint32(16)
        else:
            for d in range(D):
                pair[d] = a[d]


@serial
def _rows_times_HT(W, at, rows, m, lanes, out, scores):
    """scores (rows x m, HT's distance between rows) = `rows` rows from W[at] on, times HT."""
    K, ld, HT, to, off = out.HT.shape[0], out.HT.shape[1], out.HT.reshape(-1), scores, ZERO
    _product(ALONG_K, NO, rows, m, K, lanes, W, at, K, HT, off, ld, to, off, ld, to, off, off)


def _scores_full(p, W_out, lo, rows, m, lanes, out):
    _rows_times_HT(W_out.reshape(-1), lo * W_out.shape[1], rows, m, lanes, out, out.tile[p])


def _scores_half(p, W_out, lo, rows, m, lanes, out):
    _rows_times_HT(out.W_rows[p].reshape(-1), ZERO, rows, m, lanes, out, out.tile[p])


def _exp_full(p, c, W_out, lo, rows, m, lanes, out):
    D, ld, HT, E = W_out.shape[1], out.E.shape[1], out.HT.reshape(-1), out.E.reshape(-1)
    W = W_out.reshape(-1)
    after, span = (lo + rows) * D, TILE * D
    _exp_product(rows, m, D, lanes, W, lo * D, D, HT, ld, E, lo * ld, ld, W, after, span, out.S[c])


def _exp_half(p, c, W_out, lo, rows, m, lanes, out):
    K, ld, HT, E = out.HT.shape[0], out.HT.shape[1], out.HT.reshape(-1), out.E.reshape(-1)
    W, pairs, crs = out.W_rows[p].reshape(-1), out.E_pairs[p].reshape(-1), out.E.shape[1]
    P, D = W_out.reshape(-1), W_out.shape[1]
    after, span = (lo + rows) * D, TILE * D
    _exp_half_product(
        rows, m, K, lanes, W, K, HT, ld, E, lo * crs, crs, P, after, span, out.S[c], pairs, ld
    )


def _put_full(p, lo, i, j, value, out):
    out.E[lo + i, j] = value


def _put_half(p, lo, i, j, value, out):
    bits, pairs = _half(value), out.E_pairs[p]
    out.E[lo + i, j] = bits
    if i % 2 == 0:
        pairs[i // 2, j] = bits
    else:
        pairs[i // 2, j] |= bits << np.uint32(16)


def _sum_full(p, c, W_out, lo, rows, m, lanes, out, P, po, span):
    D, ld, E, U = W_out.shape[1], out.E.shape[1], out.E.reshape(-1), out.U[c].reshape(-1)
    W = W_out.reshape(-1)
    _product(
        ALONG_M, YES, D, m, rows, lanes, W, lo * D, D, E, lo * ld, ld, U, ZERO, ld, P, po, span
    )  # fmt: skip


def _sum_half(p, c, W_out, lo, rows, m, lanes, out, P, po, span):
    D, ld, E, U = W_out.shape[1], out.HT.shape[1], out.E_pairs[p].reshape(-1), out.U[c].reshape(-1)
    W, K = out.W_pairs[p].reshape(-1), (rows + 1) // 2
    _product(ALONG_M, YES, D, m, K, lanes, W, ZERO, D, E, ZERO, ld, U, ZERO, ld, P, po, span)


def _gradient_full(p, add, lo, rows, old, lanes, out, dW, at):
    D, ld, Dp = out.HT.shape[0], out.E.shape[1], out.G.shape[1]
    E, G = out.E.reshape(-1), out.G.reshape(-1)
    after = (lo + rows) * ld
    _product(
        ALONG_K, add, rows, D, old, lanes, E, lo * ld, ld, G, ZERO, Dp, dW, at, D, E, after,
        TILE * ld,
    )  # fmt: skip


def _move_full(p, add, lo, rows, old, lanes, out, dW, at, W, ms, rule):
    D, ld, Dp = out.HT.shape[0], out.E.shape[1], out.G.shape[1]
    E, G = out.E.reshape(-1), out.G.reshape(-1)
    after = (lo + rows) * ld
    _move_product(
        add, rows, D, old, lanes, E, lo * ld, ld, G, ZERO, Dp, dW, at, D, E, after, TILE * ld, W,
        ms, lo * D, rule,
    )  # fmt: skip


def _move_half(p, add, lo, rows, old, lanes, out, dW, at, W, ms, rule):
    D, ld, Dp = out.W_pairs.shape[2], out.E.shape[1] // 2, out.G.shape[1]
    E, G = out.E.reshape(-1), out.G.reshape(-1)
    after, K = (lo + rows) * ld, old // 2
    _move_product(
        add, rows, D, K, lanes, E, lo * ld, ld, G, ZERO, Dp, dW, at, D, E, after, TILE * ld, W, ms,
        lo * D, rule,
    )  # fmt: skip


def _gradient_half(p, add, lo, rows, old, lanes, out, dW, at):
    D, ld, Dp = out.W_pairs.shape[2], out.E.shape[1] // 2, out.G.shape[1]
    E, G = out.E.reshape(-1), out.G.reshape(-1)
    after, K = (lo + rows) * ld, old // 2
    _product(
        ALONG_K, add, rows, D, K, lanes, E, lo * ld, ld, G, ZERO, Dp, dW, at, D, E, after, TILE * ld
    )


def _logit_full(H, j, W_out, i, out):
    logit = H.dtype.type(0)
    for d in range(H.shape[1]):
        logit += H[j, d] * W_out[i, d]
    return logit


def _logit_half(H, j, W_out, i, out):
    """Of the rounded factors, as the logits in the sum of exponentials are.

    Not from HT, which a faster thread may be filling for the next block.
    """
    logit = H.dtype.type(0)
    for d in range(H.shape[1]):
        logit += _unhalf(_half(H[j, d] * H.dtype.type(LOG2_E))) * _unhalf(_half(W_out[i, d]))
    return logit * H.dtype.type(math.log(2))


def _close_full(H, j, i, s, factor, out):
    out.E[i, j] -= s
    for d in range(H.shape[1]):
        out.G[j, d] = H[j, d] * factor


def _close_half(H, j, i, s, factor, out):
    out.E[i, j] = _half(_unhalf(out.E[i, j]) - s)
    for d in range(H.shape[1]):
        out.G[j // 2, d, j % 2] = _half(H[j, d] * factor)


def _pad_full(j, out):
    out.G[j] = 0


def _pad_half(j, out):
    out.G[j // 2, :, j % 2] = 0


def _pack_amx(p, W_out, lo, rows, out):
    """W_out of a tile in bfloat16, padded with zeros."""
    W, R, T = W_out.reshape(-1), out.W_rows[p].reshape(-1), out.W_pairs[p].reshape(-1)
    D, Dk, trs, some = W_out.shape[1], out.W_rows.shape[2], TILE // 2, out.tile[p]
    for i in range(0, rows, SIDE):
        for d in range(0, D, SIDE):
            r, t, w = i * Dk + d, d * trs + i // 2, (lo + i) * D + d
            if i + SIDE <= rows and d + SIDE <= D:
                _amx_pack(W, w, D, R, r, Dk, T, t, trs)
                continue
            some[: SIDE * SIDE] = 0
            for j in range(min(SIDE, rows - i)):
                for k in range(min(SIDE, D - d)):
                    some[j * SIDE + k] = W[w + j * D + k]
            _amx_pack(some, ZERO, SIDE, R, r, Dk, T, t, trs)


def _scores_amx(p, W_out, lo, rows, m, lanes, out):
    R, Dk, ld = out.W_rows[p].reshape(-1), out.W_rows.shape[2], out.HT.shape[1]
    HT, C = out.HT.reshape(-1), out.tile[p]
    _amx_product(
        NO, rows, m, Dk // 2, R, ZERO, Dk // 2, HT, ZERO, ld, C, ZERO, ld, C, ZERO, ZERO
    )  # fmt: skip


def _exp_amx(p, c, W_out, lo, rows, m, lanes, out):
    """Block by block; AMX sums the next while this one's exponentials are made, by turns."""
    R, HT, W = out.W_rows[p].reshape(-1), out.HT.reshape(-1), W_out.reshape(-1)
    E, Q, S, C = out.E.reshape(-1), out.E_pairs[p].reshape(-1), out.S[c], out.tile[p]
    K, ld, ers, down = out.W_rows.shape[2] // 2, out.HT.shape[1], out.E.shape[1], _padded(rows)
    after, blocks, steps = (lo + rows) * ers * 2, down // SIDE * (m // SIDE), K // 16
    span, ahead = blocks * SIDE // 2 * LINE, (lo + rows) * W_out.shape[1]
    lines = (TILE * W_out.shape[1] * 4 + span - 1) // span
    _amx_sum(0, R, ZERO, K, HT, ZERO, ld, C, ZERO, SIDE, K, C, ZERO, ZERO)
    i, n = ZERO, ZERO
    for q in range(blocks):
        _amx_store(C, ZERO, SIDE)
        here, e, to = min(SIDE, rows - i), (lo + i) * ers + n, i // 2 * ld + n
        next_i, next_n = (i + SIDE, n) if i + SIDE < down else (0, n + SIDE)
        pair = ZERO
        for k in range(steps):
            if q + 1 < blocks:
                a, b = next_i * K + k * 16, k * 16 * ld + next_n
                if k == 0:
                    _amx_sum(0, R, a, K, HT, b, ld, C, ZERO, SIDE, 16, C, ZERO, ZERO)
                else:
                    _amx_sum(2, R, a, K, HT, b, ld, C, ZERO, SIDE, 16, C, ZERO, ZERO)
            count = here // 2 * (k + 1) // steps - pair
            if count:
                _amx_exp(
                    0, count, C, pair * 2 * SIDE, E, e + pair * 2 * ers, ers, Q, to + pair * ld, ld,
                    S, n, E, after, W, ahead, lines,
                )  # fmt: skip
            pair += count
            after += count * 2 * LINE
            ahead += count * lines * LINE // 4
        if here % 2:
            e, to, last = e + (here - 1) * ers, to + pair * ld, (here - 1) * SIDE
            _amx_exp(
                1, ONE, C, last, E, e, ers, Q, to, ld, S, n, E, after, W, ahead, lines
            )  # fmt: skip
        i, n = next_i, next_n


def _sum_amx(p, c, W_out, lo, rows, m, lanes, out, P, po, span):
    T, Q, U = out.W_pairs[p].reshape(-1), out.E_pairs[p], out.U[c].reshape(-1)
    ld, K = out.HT.shape[1], _padded(rows) // 2
    Q[(rows + 1) // 2 : K] = 0
    _amx_product(
        YES, W_out.shape[1], m, K, T, ZERO, TILE // 2, Q.reshape(-1), ZERO, ld, U, ZERO, ld, P, po,
        span,
    )  # fmt: skip


@serial
def _dW_amx(p, lo, rows, old, out):
    """dW_out of a tile, to out.tile[p]; its rows are as long as those of W_rows."""
    E, G, C = out.E.reshape(-1), out.G.reshape(-1), out.tile[p]
    ers, Dp, D, Dk = out.E.shape[1] // 2, out.G.shape[1], out.dW_out.shape[1], out.W_rows.shape[2]
    _amx_product(
        NO, rows, D, old // 2, E, lo * ers, ers, G, ZERO, Dp, C, ZERO, Dk, C, ZERO, ZERO
    )  # fmt: skip


def _gradient_amx(p, add, lo, rows, old, lanes, out, dW, at):
    _dW_amx(p, lo, rows, old, out)
    D, Dk, C = out.dW_out.shape[1], out.W_rows.shape[2], out.tile[p]
    for i in range(rows):
        to, part = dW[at + i * D : at + (i + 1) * D], C[i * Dk : i * Dk + D]
        for d in range(D):
            to[d] = to[d] + part[d] if add else part[d]


def _move_amx(p, add, lo, rows, old, lanes, out, dW, at, W, ms, rule):
    _dW_amx(p, lo, rows, old, out)
    D, Dk, C = out.dW_out.shape[1], out.W_rows.shape[2], out.tile[p]
    if D == Dk and not add:
        part = slice(lo * D, (lo + rows) * D)
        _rmsprop(W[part], ms[part], C[: rows * D], rule)
        return
    for i in range(rows):
        part, g = slice((lo + i) * D, (lo + i + 1) * D), C[i * Dk : i * Dk + D]
        if add:
            stored = dW[at + i * D : at + (i + 1) * D]
            for d in range(D):
                g[d] += stored[d]
        _rmsprop(W[part], ms[part], g, rule)


def _put_amx(p, lo, i, j, value, out):
    bits, pairs, place = _half(value), out.E_pairs[p], _between(j)
    out.E[lo + i, j] = bits
    if i % 2 == 0:
        pairs[i // 2, place] = bits
    else:
        pairs[i // 2, place] |= bits << np.uint32(16)


def _place_full(j, out):
    """The column of U for event j."""
    return j


def _place_amx(j, out):
    return _between(j)


def _unit_full(lanes, out):
    """Events of a block are padded to a multiple of it, and a thread has whole ones."""
    return lanes


def _unit_amx(lanes, out):
    return SIDE


def _nothing(out):
    pass


def _configure(out):
    _amx_configure(out.amx)


def _release(out):
    _amx_release()


def _by_products(full: Callable, half: Callable, amx: Callable) -> Callable:
    """One of the three, as the type of the argument `out` asks when the caller is compiled."""

    def stub(*arguments):
        raise RuntimeError("compiled code only")

    @overload(stub, strict=False, jit_options=PART | {"nopython": True})
    def choose(*arguments):
        [out] = [a for a in arguments if getattr(a, "instance_class", None) is Output]
        if out[Output._fields.index("amx")] != types.none:
            return amx
        return half if out[Output._fields.index("E")].dtype == types.uint16 else full

    return stub


_load_state = _by_products(_load_full, _load_half, _load_half)
_pack = _by_products(_pack_full, _pack_half, _pack_amx)
_tile_scores = _by_products(_scores_full, _scores_half, _scores_amx)
_tile_exp = _by_products(_exp_full, _exp_half, _exp_amx)
_put = _by_products(_put_full, _put_half, _put_amx)
_tile_sum = _by_products(_sum_full, _sum_half, _sum_amx)
_tile_gradient = _by_products(_gradient_full, _gradient_half, _gradient_amx)
_tile_move = _by_products(_move_full, _move_half, _move_amx)
_logit = _by_products(_logit_full, _logit_half, _logit_half)
_close = _by_products(_close_full, _close_half, _close_half)
_pad = _by_products(_pad_full, _pad_half, _pad_half)
_place = _by_products(_place_full, _place_full, _place_amx)
_unit = _by_products(_unit_full, _unit_full, _unit_amx)
_begin_tiles = _by_products(_nothing, _nothing, _configure)
_end_tiles = _by_products(_nothing, _nothing, _release)


@serial
def _tile(p, c, lo, rows, W_out, ms, lanes, old, first, move, m, out, rule):
    """`_tiles` on one tile of chunk c."""
    D, stored = W_out.shape[1], out.dW_out.size > 0
    W, mean_squares = W_out.reshape(-1), ms.reshape(-1)
    dW = out.dW_out.reshape(-1) if stored else out.tile[p]
    at = lo * D if stored else 0
    if old > 0 and move:
        _tile_move(p, not first, lo, rows, old, lanes, out, dW, at, W, mean_squares, rule)
    elif old > 0:
        _tile_gradient(p, not first, lo, rows, old, lanes, out, dW, at)
    elif old == 0:
        part, g = slice(lo * D, (lo + rows) * D), dW[at : at + rows * D]
        g[:] = 0
        if move:
            _rmsprop(W[part], mean_squares[part], g, rule)
    if m:
        _pack(p, W_out, lo, rows, out)
        _tile_exp(p, c, W_out, lo, rows, m, lanes, out)
        ahead = dW if stored else mean_squares
        _tile_sum(p, c, W_out, lo, rows, m, lanes, out, ahead, (lo + rows) * D, TILE * D)


@serial
def _tiles(p, n, W_out, ms, lanes, old, first, move, m, out, rule):
    """One pass over the tiles: the update by the block before, then E, S and U of this one.

    `old` events (padded) of the block before whose E and G are ready, -1 for no update; `first`
    sets dW_out, otherwise it is added to; with `move` RMSprop moves W_out. m events (padded) of
    this block, 0 for no logits. rule = (learning_rate, rho, 1 - rho, eps).
    """
    c, chunks, before, ahead = p, out.chunks.size - 1, out.taken[8 * (p + 1)], out.ahead[p, 0]
    _begin_tiles(out)
    while c < chunks:
        if m:
            out.S[c, :] = 0
            out.U[c, :] = 0
        end = out.chunks[c + 1]
        for lo in range(out.chunks[c], end, TILE):
            rows, due = min(TILE, end - lo), NO_UPDATE if lo < ahead else old
            _tile(p, c, lo, rows, W_out, ms, lanes, due, first, move, m, out, rule)
        c = n + _add(out.taken, 0, 1) - before
    _end_tiles(out)
    out.taken[8 * (p + 1)], out.ahead[p, 0] = before + chunks, 0


@serial
def _update_ahead(p, gate, busy, W_out, ms, lanes, old, first, move, out, rule):
    """`_tiles` of thread p, as far as the update, until `busy` threads are at the gate."""
    lo, end = max(out.ahead[p, 0], out.chunks[p]), out.chunks[p + 1]
    _begin_tiles(out)
    while lo < end and _read(gate, ARRIVED) < busy:
        _tile(p, p, lo, min(TILE, end - lo), W_out, ms, lanes, old, first, move, ZERO, out, rule)
        lo += TILE
    _end_tiles(out)
    out.ahead[p, 0] = lo


@serial
def _largest_scores(p, n, W_out, m, lanes, out):
    """The largest score of each event on a share of the tiles, in units of log 2, in S[p]."""
    ld, scores, top = out.HT.shape[1], out.tile[p], out.S[p]
    top[:] = -np.inf
    begin, end = _share(p, n, W_out.shape[0], TILE)
    _begin_tiles(out)
    for lo in range(begin, end, TILE):
        rows = min(TILE, end - lo)
        _pack(p, W_out, lo, rows, out)
        _tile_scores(p, W_out, lo, rows, m, lanes, out)
        for i in range(rows):
            e = scores[i * ld : i * ld + m]
            for j in range(m):
                top[j] = max(top[j], e[j])
    _end_tiles(out)


@serial
def _shifted_tiles(p, n, W_out, m, lanes, out):
    """E = 2 ** (score - shift) on every n-th chunk, and its S and U."""
    ld, scores, shift = out.HT.shape[1], out.tile[p], out.shift[p]
    W, ln2 = W_out.reshape(-1), W_out.dtype.type(math.log(2))
    _begin_tiles(out)
    for c in range(p, out.chunks.size - 1, n):
        S = out.S[c]
        S[:] = 0
        out.U[c, :] = 0
        end = out.chunks[c + 1]
        for lo in range(out.chunks[c], end, TILE):
            rows = min(TILE, end - lo)
            _pack(p, W_out, lo, rows, out)
            _tile_scores(p, W_out, lo, rows, m, lanes, out)
            for i in range(rows):
                e = scores[i * ld : i * ld + m]
                for j in range(m):
                    v = _exp((e[j] - shift[j]) * ln2)
                    _put(p, lo, i, j, v, out)
                    S[j] += v
            _tile_sum(p, c, W_out, lo, rows, m, lanes, out, W, lo * W_out.shape[1], ZERO)
    _end_tiles(out)


@serial
def _load_states(H, first, last, factor, out):
    """HT of events first to last, times `factor`; zero where they pad the block."""
    for d in range(H.shape[1]):
        for j in range(first, last):
            _load_state(H, j, d, factor, out)


@serial
def _maxima(p, n, m, out):
    """The largest of the threads' rows of S, in thread p's shift."""
    top = out.shift[p]
    for j in range(m):
        top[j] = out.S[0, j]
    for q in range(1, n):
        for j in range(m):
            top[j] = max(top[j], out.S[q, j])


@serial
def _sums(p, m, out):
    total = out.total[p]
    for j in range(m):
        total[j] = out.S[0, j]
    for q in range(1, out.S.shape[0]):
        for j in range(m):
            total[j] += out.S[q, j]


@serial
def _softmax(
    p, n, gate, H, W_out, ms, y, scale, lanes, out, dH, limits, old, first, move, rule, blend
):  # fmt: skip
    """One block of events: the update by the block before, then its loss and dH.

    Leaves E and G, scaled, ready for the update by this block. Returns the loss of thread p's
    events and the padded number of all. blend is None, or (share, p, total) of the events, where
    the softmax is distribution 0 of a mixture (`Mixing`).
    """
    D, unit = W_out.shape[1], _unit(lanes, out)
    m = (H.shape[0] + unit - 1) // unit * unit
    begin, end = _share(p, n, m, unit)
    _load_states(H, begin, end, W_out.dtype.type(LOG2_E), out)
    _meet(n, gate)
    _tiles(p, n, W_out, ms, lanes, old, first, move, m, out, rule)
    _meet(n, gate)
    _sums(p, m, out)
    total, shift = out.total[p], out.shift[p]
    shift[:] = 0
    safe = True
    for j in range(H.shape[0]):
        safe = safe and limits[0] < total[j] < limits[1]
    if not safe:
        _meet(n, gate)
        _largest_scores(p, n, W_out, m, lanes, out)
        _meet(n, gate)
        _maxima(p, n, m, out)
        _meet(n, gate)
        _shifted_tiles(p, n, W_out, m, lanes, out)
        _meet(n, gate)
        _sums(p, m, out)
    U = out.U[0]
    for q in range(1, out.U.shape[0]):
        for d in range(D):
            for j in range(begin, end):
                U[d, j] += out.U[q, d, j]
    loss = 0.0
    for j in range(begin, min(end, H.shape[0])):
        s, i = total[j], y[j]
        logit = _logit(H, j, W_out, i, out)
        nll = math.log(np.float64(s)) + np.float64(shift[j]) * math.log(2) - np.float64(logit)
        weight = scale
        if blend is not None:
            share, distributions, total_p = blend
            distributions[j, 0] = math.exp(-nll)
            own = share[j, 0] * distributions[j, 0]
            total_p[j] += own
            nll = -math.log(total_p[j])
            weight = scale * H.dtype.type(own / total_p[j])
        loss += nll
        factor = weight / s
        column = _place(j, out)
        for d in range(D):
            dH[j, d] = U[d, column] * factor - W_out[i, d] * weight
        _close(H, j, i, s, factor, out)
    for j in range(max(begin, H.shape[0]), end):
        _pad(j, out)
    return loss, m


@entry
def _output(p, n, gate, H, W_out, y, dH, lanes, limits, out, blend):
    """`output` in blocks; returns the loss of thread p's events."""
    one = W_out.dtype.type(1)
    rule = (one, one, one, one)
    N, width = H.shape[0], out.total.shape[1]
    loss, old, first = 0.0, NO_UPDATE, YES
    for lo in range(0, N, width):
        hi = min(lo + width, N)
        some = None
        if blend is not None:
            share, distributions, total = blend
            some = share[lo:hi], distributions[lo:hi], total[lo:hi]
        part, m = _softmax(
            p, n, gate, H[lo:hi], W_out, W_out, y[lo:hi], one, lanes, out, dH[lo:hi], limits,
            old, first, NO, rule, some,
        )  # fmt: skip
        first = lo == 0
        old = m
        loss += part
    _meet(n, gate)
    _tiles(p, n, W_out, W_out, lanes, max(old, ZERO), first, NO, ZERO, out, rule)
    return loss


class Scoring(NamedTuple):
    """Work arrays of `_score_block`, for blocks of at most `width` events."""

    target: Array  # [width], the targets' scores
    some: Array  # [threads, lanes]
    sums: Array  # f64[threads, width], sums of exponentials over a thread's tiles
    ahead: Array  # i32[threads, width], scores there that are not below the target's


def _scoring_work(out: Output, dtype: np.dtype) -> Scoring:
    n, width = out.total.shape
    return Scoring(
        target=np.empty(width, dtype),
        some=np.empty((n, _lanes(dtype)), dtype),
        sums=np.empty((n, width)),
        ahead=np.empty((n, width), np.int32),
    )


@serial
def _rank_tiles(p, n, W_out, m, lanes, out, target, sums, ahead):
    """Over thread p's tiles: sums of 2 ** (score - shift), counts of scores not below the target.

    The largest score of each event is left in S[p].
    """
    items, D = W_out.shape
    ld = out.HT.shape[1]
    W, scores = W_out.reshape(-1), out.tile[p]
    top, shift, part = out.S[p], out.shift[p], out.total[p]
    top[:] = -np.inf
    sums[:] = 0
    ahead[:] = 0
    begin, end = _share(p, n, items, TILE)
    for lo in range(begin, end, TILE):
        rows = min(TILE, end - lo)
        _rows_times_HT(W, lo * D, rows, m, lanes, out, scores)
        part[:] = 0
        for i in range(rows):
            e = scores[i * ld : i * ld + m]
            for j in range(m):
                v = e[j]
                top[j] = max(top[j], v)
                part[j] += _exp(v - shift[j])
                ahead[j] += not v < target[j]
        for j in range(m):
            sums[j] += part[j]


@serial
def _one_score(W_out, i, j, lanes, out, some):
    """The score of item i for event j, summed in the order of the tiles; some [lanes] is work."""
    D, ld = W_out.shape[1], out.HT.shape[1]
    W, HT, base = W_out.reshape(-1), out.HT.reshape(-1), j // lanes * lanes
    _product(
        ALONG_K, NO, ONE, lanes, D, lanes, W, i * D, D, HT, base, ld, some, ZERO, lanes, some, ZERO,
        ZERO,
    )  # fmt: skip
    return some[j - base]


@serial
def _score_block(p, n, gate, H, W_out, y, lanes, limits, out, scoring):
    """One block of events: the targets' scores, and `_rank_tiles`, with a shift where need be.

    Returns the first and last + 1 of thread p's events.
    """
    N, sums = y.size, scoring.sums
    target, own_sums, own_ahead = scoring.target, sums[p], scoring.ahead[p]
    m = (N + lanes - 1) // lanes * lanes
    begin, end = _share(p, n, m, lanes)
    _load_states(H, begin, end, H.dtype.type(1), out)
    end = min(end, N)
    for j in range(begin, end):
        target[j] = _one_score(W_out, np.int64(y[j]), j, lanes, out, scoring.some[p])
    _meet(n, gate)
    out.shift[p] = 0
    _rank_tiles(p, n, W_out, m, lanes, out, target, own_sums, own_ahead)
    _meet(n, gate)
    safe = True
    for j in range(N):
        safe = safe and limits[0] < sums[:, j].sum() < limits[1]
    if not safe:
        _maxima(p, n, m, out)
        _meet(n, gate)
        _rank_tiles(p, n, W_out, m, lanes, out, target, own_sums, own_ahead)
        _meet(n, gate)
    return begin, end


@entry
def _score(p, n, gate, H, W_out, y, lanes, limits, out, scoring, nll, rank):
    """`score` in blocks."""
    width = out.total.shape[1]
    target, sums, ahead = scoring.target, scoring.sums, scoring.ahead
    for lo in range(0, H.shape[0], width):
        hi = min(lo + width, H.shape[0])
        begin, end = _score_block(
            p, n, gate, H[lo:hi], W_out, y[lo:hi], lanes, limits, out, scoring
        )
        for j in range(begin, end):
            shift = np.float64(out.shift[p, j]) - np.float64(target[j])
            nll[lo + j] = math.log(sums[:, j].sum()) + shift
            rank[lo + j] = ahead[:, j].sum()
        _meet(n, gate)


def _sum_limits(dtype: np.dtype) -> tuple[float, float]:
    """Between these a sum of exponentials is exact without a shift."""
    span = np.finfo(dtype)
    return dtype.type(span.tiny) ** dtype.type(0.6), dtype.type(span.max) ** dtype.type(0.8)


def output(kind: str, H: Array, W_out: Array, y: Array) -> tuple[float, Array, Array]:
    """As `reference.output`."""
    dtype = W_out.dtype
    H, dH = np.ascontiguousarray(H), np.empty(H.shape, dtype)
    out = _output_work(len(H), *W_out.shape, dtype, store=True)
    n = len(out.total)
    limits = _sum_limits(dtype)
    losses = _together(n, _output, H, W_out, y, dH, _lanes(dtype), limits, out, None)
    return sum(losses), dH, out.dW_out


def score(kind: str, H: Array, W_out: Array, y: Array) -> tuple[Array, Array]:
    """As `reference.score`."""
    dtype = W_out.dtype
    nll, rank = np.empty(y.size, np.float64), np.empty(y.size, np.int32)
    out = _output_work(y.size, *W_out.shape, dtype, whole=False, store=False)
    scoring = _scoring_work(out, dtype)
    H, limits = np.ascontiguousarray(H), _sum_limits(dtype)
    _together(len(out.total), _score, H, W_out, y, _lanes(dtype), limits, out, scoring, nll, rank)
    return nll, rank


# ---------------------------------------------------------------- mixture


class Mixing(NamedTuple):
    """What a mixture needs beside H and W_out: parameters, the past, work arrays.

    The pointers' scores depend on the user, the lag and the match alone, so that there is a table
    of them for each column of a window, and an event only looks its past up in it. Columns are the
    users of a window (B), or single cells; all work arrays are float64.
    """

    blocks: Mixture  # parameters
    indptr: Array  # i64[U + 1]
    items: Array  # i32[E]
    features: Array  # f32[E, F]
    experts: Array  # f64[E, 2]
    bucket: Array  # i64[M]
    ramp: Array  # [M]
    reach: Array  # i64[B], lags of the table that the column's events have
    scores: Array  # [B, P, M, MATCHES]
    table: Array  # [B, P, M, MATCHES], exp(scores - their maximum)
    dtable: Array  # [B, P, M, MATCHES], dL/dscores
    match: Array  # u8[N, M]
    shift: Array  # [N, P], what to take off scores; NaN where the table will do
    mass: Array  # [N, P, 2], sum of the table over the past, and over its events with item y
    hidden: Array  # [N, Q]
    share: Array  # [N, K], g
    p: Array  # [N, K], p_k(y)
    total: Array  # [N], p(y); without the softmax before `_softmax`
    dtau: Array  # [threads, P, L, MATCHES]
    dgate_in: Array  # [threads, F + D, Q]
    dgate_out: Array  # [threads, Q + 1, K]
    dnu: Array  # [B, P, MATCHES + 1]
    dgate_user: Array  # [B, K]


def _mixing_work(blocks: Mixture, memory: int, columns: int, cells: int) -> tuple[Array, ...]:
    """The work arrays of `Mixing` for windows of at most so many columns and cells.

    Of the blocks only their shapes count.
    """
    P, L, C = blocks.tau.shape
    Q, K = blocks.gate_in.shape[1], blocks.gate_out.shape[1]
    n = numba.get_num_threads()
    table = (columns, P, memory, C)
    return (
        np.empty(columns, np.int64),
        np.empty(table),
        np.empty(table),
        np.empty(table),
        np.empty((cells, memory), np.uint8),
        np.empty((cells, P)),
        np.empty((cells, P, 2)),
        np.empty((cells, Q)),
        np.empty((cells, K)),
        np.empty((cells, K)),
        np.empty(cells),
        np.zeros((n, P, L, C)),
        np.zeros((n, *blocks.gate_in.shape)),
        np.zeros((n, *blocks.gate_out.shape)),
        np.empty((columns, P, C + 1)),
        np.empty((columns, K)),
    )


def _mixing(blocks: Mixture, past: Past, memory: int, work: tuple[Array, ...]) -> Mixing:
    known = past.indptr, past.items, past.features, past.experts
    return Mixing(blocks, *known, lag_buckets(memory), ramps(memory), *work)


@serial
def _begin_column(b, user, last, mix):
    """The tables of column b's pointers, whose last event is `last`."""
    tau, nu = mix.blocks.tau, mix.blocks.nu[user]
    M, C = mix.table.shape[2:]
    M = min(last - mix.indptr[user] + 1, M)
    mix.reach[b] = M
    mix.dtable[b, :, :M] = 0
    mix.dnu[b] = 0
    mix.dgate_user[b] = 0
    for k in range(tau.shape[0]):
        scores, table = mix.scores[b, k], mix.table[b, k]
        top = -np.inf
        for i in range(M):
            slope = nu[k, C] * mix.ramp[i]
            for c in range(C):
                scores[i, c] = np.float64(tau[k, mix.bucket[i], c]) + nu[k, c] + slope
                top = max(top, scores[i, c])
        for i in range(M):
            for c in range(C):
                table[i, c] = math.exp(scores[i, c] - top)


@serial
def _recall(first, at, items, match):
    """How much the contexts of the last events up to `at` match; returns the number of events."""
    count = min(at - first + 1, match.size)
    x_0 = items[at]
    x_1 = items[at - 1] if at - 1 >= first else -1
    x_2 = items[at - 2] if at - 2 >= first else -1
    for i in range(count):
        s = at - i
        one = s - 1 >= first and items[s - 1] == x_0
        two = s - 2 >= first and items[s - 2] == x_1
        three = two and s - 3 >= first and items[s - 3] == x_2
        match[i] = (2 + two + three) if one else np.int64(two)
    return count


@serial
def _weight(k, i, c, b, n, mix):
    """Weight of the event with lag i + 1 and match c for pointer k, not normalised."""
    shift = mix.shift[n, k]
    return mix.table[b, k, i, c] if shift != shift else math.exp(mix.scores[b, k, i, c] - shift)


@serial
def _mix_forward(n, b, user, at, y, h, mix):
    """Cell n of column b: shares g, p_k(y) of all but the softmax, and their sum."""
    match, g, p = mix.match[n], mix.share[n], mix.p[n]
    count = _recall(mix.indptr[user], at, mix.items, match)
    p[1], p[2] = mix.experts[at, 0], mix.experts[at, 1]
    for k in range(mix.table.shape[1]):
        table = mix.table[b, k]
        mass = 0.0
        for i in range(count):
            mass += table[i, match[i]]
        mix.shift[n, k] = np.nan
        if not mass > 1e-200:  # the table's maximum is far above all that is there
            top = -np.inf
            for i in range(count):
                top = max(top, mix.scores[b, k, i, match[i]])
            mix.shift[n, k] = top
            mass = 0.0
            for i in range(count):
                mass += _weight(k, i, match[i], b, n, mix)
        hit = 0.0
        for i in range(count):
            if mix.items[at - i] == y:
                hit += _weight(k, i, match[i], b, n, mix)
        mix.mass[n, k, 0], mix.mass[n, k, 1] = mass, hit
        p[STATIC + k] = hit / mass
    gate_in, gate_out = mix.blocks.gate_in, mix.blocks.gate_out
    hidden, f, bias = mix.hidden[n], mix.features[at], mix.blocks.gate_user[user]
    hidden[:] = 0
    for i in range(f.size):
        for q in range(hidden.size):
            hidden[q] += f[i] * gate_in[i, q]
    for d in range(h.size):
        for q in range(hidden.size):
            hidden[q] += h[d] * gate_in[f.size + d, q]
    for k in range(g.size):
        g[k] = gate_out[hidden.size, k] + np.float64(bias[k])
    for q in range(hidden.size):
        hidden[q] = math.tanh(hidden[q])
        for k in range(g.size):
            g[k] += hidden[q] * gate_out[q, k]
    top, total = g[0], 0.0
    for k in range(1, g.size):
        top = max(top, g[k])
    for k in range(g.size):
        g[k] = math.exp(g[k] - top)
        total += g[k]
    g /= total
    mix.total[n] = 0.0
    for k in range(1, g.size):
        mix.total[n] += g[k] * p[k]


@serial
def _mix_backward(t, n, b, user, at, y, h, scale, dh, mix):
    """Gradients of cell n of column b, in thread t; dh += that of h through the gate."""
    count = min(at - mix.indptr[user] + 1, mix.match.shape[1])
    match, g, p = mix.match[n], mix.share[n], mix.p[n]
    factor = scale / mix.total[n]
    for k in range(mix.table.shape[1]):
        mass, hit = mix.mass[n, k, 0], mix.mass[n, k, 1]
        every = factor * g[STATIC + k] * p[STATIC + k] / mass
        those = factor * g[STATIC + k] / mass
        d = mix.dtable[b, k]
        for i in range(count):
            w = _weight(k, i, match[i], b, n, mix)
            d[i, match[i]] += w * every
            if hit > 0 and mix.items[at - i] == y:
                d[i, match[i]] -= w * those
    gate_in, gate_out = mix.blocks.gate_in, mix.blocks.gate_out
    hidden, f = mix.hidden[n], mix.features[at]
    d_in, d_out = mix.dgate_in[t], mix.dgate_out[t]
    Q = hidden.size
    for k in range(g.size):
        d = g[k] * (scale - factor * p[k])
        mix.dgate_user[b, k] += d
        d_out[Q, k] += d
        for q in range(Q):
            d_out[q, k] += d * hidden[q]
    for q in range(Q):
        d = 0.0
        for k in range(g.size):
            d += g[k] * (scale - factor * p[k]) * gate_out[q, k]
        hidden[q] = d * (1 - hidden[q] * hidden[q])
    for i in range(f.size):
        for q in range(Q):
            d_in[i, q] += f[i] * hidden[q]
    for j in range(h.size):
        total = 0.0
        for q in range(Q):
            d_in[f.size + j, q] += h[j] * hidden[q]
            total += gate_in[f.size + j, q] * hidden[q]
        dh[j] += total


@serial
def _end_column(t, b, mix):
    """From dL/dscores of column b to dtau of thread t and dnu."""
    P, _, C = mix.table.shape[1:]
    for k in range(P):
        own = mix.dnu[b, k]
        for i in range(mix.reach[b]):
            row = 0.0
            for c in range(C):
                d = mix.dtable[b, k, i, c]
                mix.dtau[t, k, mix.bucket[i], c] += d
                own[c] += d
                row += d
            own[C] += row * mix.ramp[i]


@entry
def _mixture(p, n, gate, H, W_out, y, user, at, dH, lanes, limits, out, mix):
    """`mixture`, each cell a column of its own; returns the loss of thread p's events."""
    one = np.float64(1)
    begin, end = _share(p, n, y.size, 1)
    for c in range(begin, end):
        _begin_column(c, user[c], at[c], mix)
        _mix_forward(c, c, user[c], at[c], y[c], H[c], mix)
    _meet(n, gate)
    blend = mix.share, mix.p, mix.total
    loss = _output(p, n, gate, H, W_out, y, dH, lanes, limits, out, blend)
    _meet(n, gate)
    for c in range(begin, end):
        _mix_backward(p, c, c, user[c], at[c], y[c], H[c], one, dH[c], mix)
        _end_column(p, c, mix)
    return loss


def mixture(
    H: Array, W_out: Array, mixture: Mixture, cells: Cells, past: Past, memory: int
) -> tuple[float, Array, Array, Mixture]:
    """As `reference.mixture`."""
    dtype = W_out.dtype
    H, dH = np.ascontiguousarray(H), np.empty(H.shape, dtype)
    out = _output_work(len(H), *W_out.shape, dtype, store=True)
    mix = _mixing(mixture, past, memory, _mixing_work(mixture, memory, len(H), len(H)))
    limits = _sum_limits(dtype)
    losses = _together(
        len(out.total), _mixture, H, W_out, *cells, dH, _lanes(dtype), limits, out, mix
    )
    dense = (d.sum(axis=0).astype(dtype) for d in (mix.dtau, mix.dgate_in, mix.dgate_out))
    dtau, dgate_in, dgate_out = dense
    dnu, dgate_user = mix.dnu.astype(dtype), mix.dgate_user.astype(dtype)
    return sum(losses), dH, out.dW_out, Mixture(dtau, dnu, dgate_in, dgate_out, dgate_user)


@serial
def _count_tiles(p, n, W_out, m, lanes, out, offset, flat, cut, unigram, ahead):
    """Over thread p's tiles: ahead[j] items of which softmax and unigram alone reach the cut.

    An item's probability is there exp(score + offset) + flat (unigram + FLOOR).
    """
    items, D = W_out.shape
    ld = out.HT.shape[1]
    W, scores = W_out.reshape(-1), out.tile[p]
    ahead[:] = 0
    begin, end = _share(p, n, items, TILE)
    for lo in range(begin, end, TILE):
        rows = min(TILE, end - lo)
        _rows_times_HT(W, lo * D, rows, m, lanes, out, scores)
        for i in range(rows):
            e = scores[i * ld : i * ld + m]
            common = unigram[lo + i] + FLOOR
            for j in range(m):
                ahead[j] += _exp(e[j] + offset[j]) + flat[j] * common >= cut[j]


class Ranking(NamedTuple):
    """Work arrays of `_mixture_score`; the last three are 0 between events."""

    levels: Array  # [3, width], offset, flat and cut of each event
    touched: Array  # i64[threads, I], the items that an event's past and the bigram add to
    extra: Array  # f64[threads, I], what they add
    seen: Array  # bool[threads, I], whether among `touched`
    followed: Array  # i64[threads, I], how often it follows x among the user's own events


@entry
def _mixture_score(
    p, n, gate, H, W_out, y, user, at, lanes, limits, out, scoring, ranking, mix, begin_of,
    follower, count, unigram, own_indptr, own_items, nll, rank,
):  # fmt: skip
    """`mixture_score` in blocks."""
    width = out.total.shape[1]
    target, some = scoring.target, scoring.some[p]
    sums, ahead = scoring.sums, scoring.ahead
    offset, flat, cut = ranking.levels
    touched, extra = ranking.touched[p], ranking.extra[p]
    seen, followed = ranking.seen[p], ranking.followed[p]
    everything = unigram.sum()
    for lo in range(0, H.shape[0], width):
        hi = min(lo + width, H.shape[0])
        begin, end = _score_block(
            p, n, gate, H[lo:hi], W_out, y[lo:hi], lanes, limits, out, scoring
        )
        for j in range(begin, end):
            c = lo + j
            u = user[c]
            _begin_column(j, u, at[c], mix)
            _mix_forward(j, j, u, at[c], y[c], H[c], mix)
            norm = math.log(sums[:, j].sum()) + np.float64(out.shift[p, j])
            g, x = mix.share[j], mix.items[at[c]]
            total = mix.total[j] + g[0] * math.exp(np.float64(target[j]) - norm)
            nll[c] = -math.log(total)
            own = own_items[own_indptr[u] : own_indptr[u + 1]]
            context = SMOOTHING
            for q in range(begin_of[x], begin_of[x + 1]):
                context += count[q]
            for s in range(own.size - 1):
                context -= own[s] == x
            others = everything - own.size + FLOOR * unigram.size
            offset[j] = math.log(g[0]) - norm
            flat[j] = (g[2] + g[1] * SMOOTHING / context) / others
            # as for the items below, so that equal rows of W_out tie
            cut[j] = (mix.total[j] + np.float64(_exp(target[j] + offset[j]))) * (1 - TIE)
        _meet(n, gate)
        m = (hi - lo + lanes - 1) // lanes * lanes
        _count_tiles(p, n, W_out, m, lanes, out, offset, flat, cut, unigram, ahead[p])
        _meet(n, gate)
        for j in range(begin, end):
            c = lo + j
            u, g, x = user[c], mix.share[j], mix.items[at[c]]
            own = own_items[own_indptr[u] : own_indptr[u + 1]]
            context, size = SMOOTHING, 0
            for q in range(begin_of[x], begin_of[x + 1]):
                context += count[q]
            for s in range(own.size - 1):
                if own[s] == x:
                    context -= 1
                    followed[own[s + 1]] += 1
            for q in range(begin_of[x], begin_of[x + 1]):
                i = follower[q]
                extra[i] = g[1] * (count[q] - followed[i]) / context
                seen[i] = True
                touched[size] = i
                size += 1
            for s in range(own.size):
                i = own[s]
                followed[i] = 0
                extra[i] -= flat[j]
                if not seen[i]:
                    seen[i] = True
                    touched[size] = i
                    size += 1
            events = min(at[c] - mix.indptr[u] + 1, mix.match.shape[1])
            for e in range(events):
                i = mix.items[at[c] - e]
                for k in range(mix.table.shape[1]):
                    w = _weight(k, e, mix.match[j, e], j, j, mix)
                    extra[i] += g[STATIC + k] * w / mix.mass[j, k, 0]
                if not seen[i]:
                    seen[i] = True
                    touched[size] = i
                    size += 1
            if not seen[y[c]]:
                touched[size] = y[c]
                size += 1
            better = np.int64(1)
            for q in range(n):
                better += ahead[q, j]
            for q in range(size):
                i = touched[q]
                common = flat[j] * (unigram[i] + FLOOR)
                base = _exp(_one_score(W_out, i, j, lanes, out, some) + offset[j]) + common
                better -= base >= cut[j]
                better += i != y[c] and base + extra[i] >= cut[j]
                extra[i] = 0.0
                seen[i] = False
            rank[c] = better
        _meet(n, gate)


def mixture_score(
    H: Array, W_out: Array, mixture: Mixture, cells: Cells, past: Past, memory: int
) -> tuple[Array, Array]:
    """As `reference.mixture_score`."""
    dtype, N = W_out.dtype, cells.y.size
    nll, rank = np.empty(N, np.float64), np.empty(N, np.int32)
    out = _output_work(N, *W_out.shape, dtype, whole=False, store=False)
    width = out.S.shape[1]
    mix = _mixing(mixture, past, memory, _mixing_work(mixture, memory, width, width))
    table = len(out.total), len(W_out)
    ranking = Ranking(
        levels=np.zeros((3, width), dtype),
        touched=np.empty(table, np.int64),
        extra=np.zeros(table),
        seen=np.zeros(table, np.bool_),
        followed=np.zeros(table, np.int64),
    )
    H, limits = np.ascontiguousarray(H), _sum_limits(dtype)
    _together(
        len(out.total), _mixture_score, H, W_out, *cells, _lanes(dtype), limits, out,
        _scoring_work(out, dtype), ranking, mix, *past.counts, nll, rank,
    )  # fmt: skip
    return nll, rank


# ---------------------------------------------------------------- a run of windows


class Work(NamedTuple):
    """Work arrays of `train_run`: one window and everything that is made of it, user by user."""

    size: Array  # i64[2], steps T and cells N of the window
    x: Array  # i32[B, T]
    event: Array  # [B, T]
    carry: Array  # [B, T]
    cell: Column  # each [B, ...]
    dH: Array  # [B, T, D]
    ds: Array  # [B, D]
    dA: Array  # [B, T, G*D]
    W_T: Array  # [threads, G*D, D], W_h transposed
    dW_h: Array  # [D, G*D]
    cells: Array  # i32[T * B, 2], step and column of the cells with a target
    number: Array  # i32[B, T], of each event's cell; -1 without a target
    y: Array  # i32[T * B]
    H: Array  # [T * B, D]
    dH_cells: Array  # [T * B, D]
    slot: Array  # i32[I], -1 but inside _move_items


def workspace(
    spec: Spec, n_items: int, batch: int, window: int
) -> tuple[Work, Output, tuple[Array, ...]]:
    """Work arrays for windows of at most `window` steps of `batch` users; the last of a mixture."""
    T, B, D = window, batch, spec.hidden_size
    width, N = spec.gates * D, T * B
    dtype = np.dtype(spec.dtype)
    half = spec.products == "bfloat16"
    if half and not HALF:
        raise SettingsError(
            "products is 'bfloat16' and this processor cannot multiply bfloat16 (AVX512_BF16): set "
            "products to 'full'"
        )
    out = _output_work(N, n_items, D, dtype, half=half)

    def real(*shape: int) -> Array:
        return _aligned(shape, dtype)

    work = Work(
        size=np.zeros(2, np.int64),
        x=np.empty((B, T), np.int32),
        event=real(B, T),
        carry=real(B, T),
        cell=Column(
            states=real(B, T + 1, D),
            before=real(B, T, D),
            reset=real(B, T, 0 if spec.cell == "tanh" else D),
            gates=real(B, T, width),
        ),
        dH=real(B, T, D),
        ds=real(B, D),
        dA=real(B, T, width),
        W_T=real(len(out.total), width, D),
        dW_h=real(D, width),
        cells=np.empty((N, 2), np.int32),
        number=np.empty((B, T), np.int32),
        y=np.empty(N, np.int32),
        H=real(N, D),
        dH_cells=real(N, D),
        slot=np.full(n_items, -1, np.int32),
    )
    own: tuple[Array, ...] = ()
    if spec.output == "mixture":
        sizes = shapes(spec, B, n_items)
        blocks = Mixture(*(np.empty(sizes[name]) for name in Mixture._fields))
        own = _mixing_work(blocks, spec.memory, B, N)
    return work, out, own


@serial
def _read_window(indptr, items, user, start, length, fresh, target_from, work):
    """`windows.window` into work arrays, with the number of steps and of cells."""
    T, N = 0, 0
    for b in range(user.size):
        T = max(T, length[b])
    for t in range(T):
        for b in range(user.size):
            position = start[b] + t
            first = indptr[user[b]]
            here = t < length[b]
            work.x[b, t] = items[first + position] if here else 0
            work.event[b, t] = 1 if here else 0
            work.carry[b, t] = 0 if fresh[b] and t == 0 else 1
            follows = first + position + 1 < indptr[user[b] + 1]
            work.number[b, t] = -1
            if here and follows and position + 1 >= target_from[b]:
                work.cells[N, 0], work.cells[N, 1] = t, b
                work.number[b, t] = N
                work.y[N] = items[first + position + 1]
                N += 1
    work.size[0], work.size[1] = T, N


@serial
def _move_items(p, n, T, start, drop, dense, step, W_in, ms, stamp, rule, work):
    """Sum dA, with input dropout, over the events of each item and move the rows of W_in.

    Thread p has the items i with i % n == p. The sum grows in dA of the item's first event.
    """
    B, width = work.x.shape[0], W_in.shape[1]
    for t in range(T):
        for b in range(B):
            i = work.x[b, t]
            if work.event[b, t] == 0 or i % n != p:
                continue
            da = work.dA[b, t]
            if drop[0]:
                _drop(da, start, (t * B + b) * width, drop[0], drop[1])
            if work.slot[i] < 0:
                work.slot[i] = t * B + b
            else:
                total = work.dA[work.slot[i] % B, work.slot[i] // B]
                for j in range(width):
                    total[j] += da[j]
    for t in range(T):
        for b in range(B):
            i = work.x[b, t]
            if work.event[b, t] == 0 or i % n != p or work.slot[i] != t * B + b:
                continue
            work.slot[i] = -1
            if dense:
                late = rule[1] ** W_in.dtype.type(step - 1 - stamp[i])
                stamp[i] = step
                for j in range(width):
                    ms[i, j] *= late
            _rmsprop(W_in[i], ms[i], work.dA[b, t], rule)


@serial
def _move_recurrent(p, n, kind, T, user, length, lanes, W_h, ms, rule, work):
    """dW_h of every column and its RMSprop; thread p has some rows of each matrix."""
    pooled = W_h.shape[0] == 1
    begin, end = _share(p, n, W_h.shape[1], 1)
    seen = False
    for b in range(user.size):
        if length[b] == 0 or begin == end:
            continue
        _recurrent_gradient(
            kind, pooled and seen, T, begin, end, b, work.cell, work.dA[b], work.dW_h, lanes
        )
        seen = True
        if not pooled:
            for k in range(begin, end):
                W, own = W_h[user[b], k], ms[user[b], k]
                _rmsprop(W, own, work.dW_h[k], rule)
    if pooled and seen:
        for k in range(begin, end):
            _rmsprop(W_h[0, k], ms[0, k], work.dW_h[k], rule)


@serial
def _rmsprop_of(w, ms, g, rule):
    """`_rmsprop` by a gradient in float64, whatever w and ms are."""
    learning_rate, rho, rest, eps = rule
    for j in range(w.size):
        ms[j] = rho * ms[j] + rest * g[j] * g[j]
        w[j] -= learning_rate * g[j] / math.sqrt(ms[j] + eps)


@serial
def _mix_window_forward(b, T, B, user, first, start, drop, work, mix):
    """H of the cells in column b's T events, with output dropout, and their mixtures."""
    D = work.H.shape[1]
    begun = False
    for t in range(T):
        c = np.int64(work.number[b, t])
        if c < 0:
            continue
        if not begun:
            _begin_column(b, user, first + T - 1, mix)
            begun = True
        _copy(work.H[c], work.cell.states[b, t + 1])
        if drop[0]:
            _drop(work.H[c], start, (t * B + b) * D, drop[0], drop[1])
        _mix_forward(c, b, user, first + t, work.y[c], work.H[c], mix)


@serial
def _mix_window_backward(p, b, T, B, user, first, start, drop, scale, rule, work, mix, squares):
    """dH of column b from dH_cells, with the gate's part of it, and its user's rows moved."""
    D = work.H.shape[1]
    begun = False
    for t in range(T):
        c = work.number[b, t]
        if c < 0:
            continue
        begun = True
        dh = work.dH_cells[c]
        _mix_backward(p, c, b, user, first + t, work.y[c], work.H[c], scale, dh, mix)
        if drop[0]:
            _drop(dh, start, (t * B + b) * D, drop[0], drop[1])
        _copy(work.dH[b, t], dh)
    if not begun:
        return
    _end_column(p, b, mix)
    nu, ms = mix.blocks.nu[user].reshape(-1), squares.nu[user].reshape(-1)
    _rmsprop_of(nu, ms, mix.dnu[b].reshape(-1), rule)
    gate_user, ms = mix.blocks.gate_user[user], squares.gate_user[user]
    _rmsprop_of(gate_user, ms, mix.dgate_user[b], rule)


@serial
def _move_dense(w, ms, parts, rule):
    """RMSprop by the sum of the threads' gradients, which are 0 afterwards."""
    total = parts[0].reshape(-1)
    for q in range(1, parts.shape[0]):
        part = parts[q].reshape(-1)
        for j in range(total.size):
            total[j] += part[j]
        part[:] = 0
    _rmsprop_of(w.reshape(-1), ms.reshape(-1), total, rule)
    total[:] = 0


@serial
def _move_mixture(p, n, mix, squares, rule):
    """The dense blocks of a mixture, each by one thread."""
    if p == 0:
        _move_dense(mix.blocks.gate_in, squares.gate_in, mix.dgate_in, rule)
    if p == n - 1:
        _move_dense(mix.blocks.tau, squares.tau, mix.dtau, rule)
        _move_dense(mix.blocks.gate_out, squares.gate_out, mix.dgate_out, rule)


@entry
def _train(
    p, n, gate, kind, init, drop_in, drop_out, rule, dense, scale, lanes, limits, params, ms,
    indptr, items, run, s, work, out, mix, squares,
):  # fmt: skip
    """Algorithm 1 on a run of windows, in place, thread p of n.

    Returns the summed loss of thread p's events and the number of all events. drop_in and drop_out
    are (threshold, factor); mix and squares, the accumulators of its blocks, are None but for a
    mixture.
    """
    W_h, W_in, W_out = params.W_h, params.W_in, params.W_out
    pooled = W_h.shape[0] == 1
    D, width, block = W_out.shape[1], W_in.shape[1], out.total.shape[1]
    cell, unit = work.cell, _unit(lanes, out)
    total, events = 0.0, 0
    old, first, move = NO_UPDATE, YES, NO
    for k in range(run.key.size):
        user, length = run.user[k], run.length[k]
        B = user.size
        step = ms.step[0] + k + 1
        start_in, start_out = _mix(run.key[k] + INPUT), _mix(run.key[k] + OUTPUT)
        if p == 0:
            _read_window(
                indptr, items, user, run.start[k], length, run.fresh[k], run.target_from[k], work
            )
        _meet(n, gate)
        T, N = work.size[0], work.size[1]
        begin, end = _share(p, n, T * B, 1)
        for q in range(begin, end):
            b, t = q // T, q % T
            _copy(cell.gates[b, t], W_in[work.x[b, t]])
            if drop_in[0]:
                _drop(cell.gates[b, t], start_in, (t * B + b) * width, drop_in[0], drop_in[1])
        _meet(n, gate)
        for b in range(p, B, n):
            W = W_h[0 if pooled else user[b]]
            _copy(cell.states[b, 0], s[0, b])
            _forward_column(kind, T, b, cell, W, work.event[b], work.carry[b], init, lanes)
            _copy(s[0, b], cell.states[b, T])
            work.dH[b, :T] = 0
            if mix is not None:
                at = indptr[user[b]] + run.start[k, b]
                _mix_window_forward(b, length[b], B, user[b], at, start_out, drop_out, work, mix)
        if p >= B and old >= 0:
            _update_ahead(p, gate, B, W_out, ms.W_out, lanes, old, first, move, out, rule)
        _meet(n, gate)

        blocks = max((N + block - 1) // block, 1)
        for q in range(blocks):
            lo, hi = q * N // blocks, (q + 1) * N // blocks
            begin, end = _share(p, n, (hi - lo + unit - 1) // unit * unit, unit)
            blend = None
            if mix is None:
                for c in range(lo + begin, min(lo + end, hi)):
                    t, b = work.cells[c, 0], work.cells[c, 1]
                    _copy(work.H[c], cell.states[b, t + 1])
                    if drop_out[0]:
                        _drop(work.H[c], start_out, (t * B + b) * D, drop_out[0], drop_out[1])
            else:
                blend = mix.share[lo:hi], mix.p[lo:hi], mix.total[lo:hi]
            if N == 0:
                _meet(n, gate)
                _tiles(p, n, W_out, ms.W_out, lanes, old, first, move, ZERO, out, rule)
                old = ZERO
            else:
                loss, old = _softmax(
                    p, n, gate, work.H[lo:hi], W_out, ms.W_out, work.y[lo:hi], scale, lanes, out,
                    work.dH_cells[lo:hi], limits, old, first, move, rule, blend,
                )  # fmt: skip
                total += loss
            first, move = q == 0, q == blocks - 1
            if mix is None:
                for c in range(lo + begin, min(lo + end, hi)):
                    t, b = work.cells[c, 0], work.cells[c, 1]
                    dh = work.dH_cells[c]
                    if drop_out[0]:
                        _drop(dh, start_out, (t * B + b) * D, drop_out[0], drop_out[1])
                    _copy(work.dH[b, t], dh)
        _meet(n, gate)

        for b in range(p, B, n):
            if mix is not None:
                at = indptr[user[b]] + run.start[k, b]
                _mix_window_backward(
                    p, b, T, B, user[b], at, start_out, drop_out, scale, rule, work, mix, squares
                )
            W = W_h[0 if pooled else user[b]]
            _backward_column(
                kind, T, b, cell, work.dH[b], W, work.W_T[p], work.event[b], work.carry[b],
                work.ds[b], work.dA[b], lanes,
            )  # fmt: skip
        if p >= B:
            _update_ahead(p, gate, B, W_out, ms.W_out, lanes, old, first, move, out, rule)
        _meet(n, gate)
        _move_recurrent(p, n, kind, T, user, length, lanes, W_h, ms.W_h, rule, work)
        if mix is not None:
            _move_mixture(p, n, mix, squares, rule)
        _meet(n, gate)
        _move_items(p, n, T, start_in, drop_in, dense, step, W_in, ms.W_in, ms.stamp, rule, work)
        _meet(n, gate)
        events += N
    if old >= 0:
        _tiles(p, n, W_out, ms.W_out, lanes, old, first, move, ZERO, out, rule)
    _meet(n, gate)
    if p == 0:
        ms.step[0] += run.key.size
    return total, events


def train_run(
    spec: Spec,
    rule: Rule,
    scale: float,
    params: Params | MixtureParams,
    accumulators: Accumulators | MixtureAccumulators,
    s: Array,
    log: EventLog,
    run: Slice,
    work: tuple[Work, Output, tuple[Array, ...]],
    past: Past | None,
) -> tuple[float, int]:
    """The loop over `training.step`, compiled into one call; it leaves out clipping.

    Parameters
    ----------
    s : real[1, B, D]
        State before the run, overwritten with the state after it.
    run : Slice
        With an axis of K windows; a user at most once among the columns of a window.
    work
        From `workspace`; it fixes the number of threads.
    past : Past or None
        Of `log`, for a mixture.

    Returns
    -------
    loss, events : summed over the run
    """
    real = np.dtype(spec.dtype).type

    def dropping(p: float) -> tuple:
        return dropout_threshold(p), real(1) / real(1 - p)

    numbers = (rule.learning_rate, rule.rho, 1 - rule.rho, rule.eps)
    arrays, out, own = work
    mix = squares = None
    if spec.output == "mixture":
        mix = _mixing(params.mixture, past, spec.memory, own)
        squares = accumulators.mixture
    results = _together(
        len(out.total),
        _train,
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
        arrays,
        out,
        mix,
        squares,
    )
    return sum(loss for loss, _ in results), results[0][1]
