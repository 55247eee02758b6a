"""The CUDA backend: the functions of the reference on one NVIDIA GPU, and a fused run of windows.

Kernels are in ``kernels/*.cu``, compiled on first use; large products are cuBLAS's. All that is
known of the device is in `Device`: ``xp`` (CuPy), ``launch``, ``product`` and three numbers.
Everything runs in one stream, and every sum in a fixed order: a run repeats bit for bit.

The softmax goes over tiles of `TILE` items and blocks of events whose logits take `LOGITS_BYTES` at
most. For a block of N events, E [N, I] in memory once and overwritten:

    E = H W_out^T                               one product
    E = exp(E - shift), shift of each tile      softmax_tile
    U = E W_out of each tile                    a batch of products
    S, loss, dH, G = scale H exp(shift - m) / S  softmax_finish: m = the largest shift
    dW_out += E^T G of each tile                a batch of products

so any logits are safe, and E is read three times. With ``products="tf32"`` these products are in
TF32, and nothing else. A window of `train_run` is 13 launches, 15 where the last tile is shorter
than the others (each batch is then two), 1 or 2 more with `Slices` of a pooled matrix, 9 more for a
mixture (`gpu_mixture`), and nothing waits for the device until the end of a run: the host knows the
numbers of steps, events and targets from the slices of the log.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..cells import CELLS
from ..data import EventLog
from ..errors import DeviceError, SettingsError
from ..history import Past
from ..model import Accumulators, MixtureAccumulators, MixtureParams, Params, RowGrad, Spec, shapes
from ..optim import Rule
from ..outputs import Cells, Mixture
from ..windows import INPUT, OUTPUT, Slice, Window, dropout_threshold, mix
from ..windows import window as read_window
from .gpu_mixture import (
    Columns,
    Mixing,
    RankWork,
    cells_alone,
    mixing_shapes,
    rank_shapes,
)

__all__ = [
    "cell_backward",
    "cell_forward",
    "mixture",
    "mixture_score",
    "output",
    "score",
    "scoring_bytes",
    "sum_rows",
    "take_rows",
    "to_device",
    "to_host",
    "train_run",
    "training_bytes",
    "update",
    "window",
    "workspace",
]

Array = Any  # of the device: a cupy.ndarray

PRODUCTS = ("full", "tf32")  # `Spec.products`
THREADS = 256  # of a block
CELL_THREADS = 1024  # of a block that has a column of a window, at most
TILE = 2048  # items
LOGITS_BYTES = 1 << 29
EXTRA_BYTES = 1 << 28  # of `RankWork.extra`, for the events of a mixture that are scored at once
RUN_BYTES = 1 << 24  # of a `Run`; longer runs of windows go in parts
MOST_BLOCKS = 1 << 13  # of a kernel whose threads stride over an array
KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\(\d+\)\s+)?(\w+)\(')
GRID_BARRIER = "grid_wait("  # in the kernel files whose launches are cooperative
OLDEST = 75  # compute capability, Turing
AMPERE = 80  # the first that multiplies TF32
NO_MEMORY = ("OUT_OF_MEMORY", "out of memory", "ALLOC_FAILED")  # in errors of the CUDA libraries

Arguments = tuple[Any, ...]


# ---------------------------------------------------------------- the device


class Device:
    """One GPU, with the kernels compiled for one type of `real`.

    Attributes
    ----------
    xp : module
        CuPy.
    shared_limit : int
        Bytes of dynamic shared memory that a block can have.
    capability : int
        Compute capability, 75 for 7.5.
    multiprocessors : int
        So many blocks can run at once, whatever their size.
    """

    def __init__(self, dtype: str) -> None:
        try:
            import cupy
            from cupy.cuda import cublas, get_cublas_handle  # libraries that CuPy loads late
        except ImportError as error:
            reason = str(error).partition("\n")[0]
            raise DeviceError(
                f"backend 'cupy' needs CuPy and the CUDA libraries ({reason}): "
                "pip install '.[gpu]' in the checkout, or '.[gpu12]' for CUDA 12; or use backend "
                "'numba'"
            ) from error
        try:
            there = cupy.cuda.Device()
            capability = int(there.compute_capability)
            attributes = there.attributes
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceError(
                f"backend 'cupy' found no CUDA device ({error}): see what nvidia-smi says; CUDA 13 "
                "needs driver 580 or later, for an older one pip install '.[gpu12]'; or use "
                "backend 'numba'"
            ) from error
        if capability < OLDEST:
            raise DeviceError(
                f"the device's compute capability is {capability / 10}, expected {OLDEST / 10} "
                "(Turing) or later: use backend 'numba'"
            )
        try:
            get_cublas_handle()  # while there is memory for what cuBLAS holds for itself
        except RuntimeError as error:
            raise DeviceError(
                f"backend 'cupy' could not start cuBLAS ({error}): see in nvidia-smi whether "
                "another process has the device's memory; or use backend 'numba'"
            ) from error
        self.xp = cupy
        self.dtype = np.dtype(dtype)
        self.shared_limit = attributes["MaxSharedMemoryPerBlockOptin"]
        self.capability = capability
        self.multiprocessors = attributes["MultiProcessorCount"]
        self._handle, self._cublas = get_cublas_handle, cublas
        self._kernels: dict[str, Any] = {}
        self._shared: dict[str, int] = {}

    @cached_property
    def _modules(self) -> dict[str, Any]:
        """The compiled file of each kernel."""
        folder = _kernel_folder()
        # In the source itself: CuPy's cache on disk does not look into included files.
        common = folder.joinpath("common.cuh").read_text(encoding="utf-8")
        options = ("-std=c++17", f"-DREAL={'float' if self.dtype == np.float32 else 'double'}")
        found = {}
        for file in folder.iterdir():
            if file.name.endswith(".cu"):
                text = file.read_text(encoding="utf-8")
                code = text.replace('#include "common.cuh"', common.replace("#pragma once", ""))
                cooperative = GRID_BARRIER in text
                module = self.xp.RawModule(
                    code=code, options=options, enable_cooperative_groups=cooperative
                )
                names = KERNEL.findall(text)
                found.update(dict.fromkeys(names, module))
        return found

    def launch(
        self,
        name: str,
        grid: int | tuple[int, int],
        block: int,
        arguments: Arguments,
        shared: int = 0,
    ) -> None:
        """Start a kernel: `arguments` are device arrays and NumPy scalars of the exact types."""
        kernel = self._kernels.get(name)
        if kernel is None:
            kernel = self._kernels[name] = self._modules[name].get_function(name)
        if shared > self._shared.get(name, 48 << 10):
            kernel.max_dynamic_shared_size_bytes = self._shared[name] = shared
        kernel(grid if isinstance(grid, tuple) else (grid,), (block,), arguments, shared_mem=shared)

    def product(
        self, a: Array, b: Array, out: Array, beta: float = 0.0, tf32: bool = False
    ) -> None:
        """out = a b + beta out, of matrices or of batches of them.

        In strict float32 or float64; with `tf32` the factors, float32, are rounded to TF32.
        a [..., M, K], b [..., K, N], out [..., M, N]: transposed and padded views are fine, as
        long as one of the last two axes has stride 1, for `out` the last one.
        """
        cublas, batched = self._cublas, out.ndim == 3
        one, beta_ = np.ones((), self.dtype), np.full((), beta, self.dtype)
        (M, N), K = out.shape[-2:], a.shape[-1]
        # cuBLAS has columns where we have rows: out^T = b^T a^T
        (b_turned, b_ld), (a_turned, a_ld), (_, ld) = map(leading, (b, a, out))
        sizes = (self._handle(), b_turned, a_turned, N, M, K, one.ctypes.data)
        name = "sgemm" if self.dtype == np.float32 else "dgemm"
        kind, mode = (), ()
        if tf32:  # said in the call: the handle is CuPy's, and stays in its strict mode
            assert self.dtype == np.float32
            name, kind = "gemm", (self.xp.cuda.runtime.CUDA_R_32F,)
            mode = cublas.CUBLAS_COMPUTE_32F_FAST_TF32, cublas.CUBLAS_GEMM_DEFAULT

        def matrix(x: Array, ld: int) -> Arguments:
            step = (x.strides[0] // x.itemsize,) if batched else ()
            return (x.data.ptr, *kind, ld, *step)

        name += "StridedBatched" * batched + "Ex" * tf32
        count = (len(out),) if batched else ()
        factors = *matrix(b, b_ld), *matrix(a, a_ld)
        getattr(cublas, name)(*sizes, *factors, beta_.ctypes.data, *matrix(out, ld), *count, *mode)


def _kernel_folder() -> Traversable:
    """The kernels of this checkout, or those of the installed package."""
    # In a checkout the package may be another's, or not found.
    folder = Path(__file__).parents[2] / "kernels"
    return folder if (folder / "common.cuh").is_file() else resources.files("crnn_np.kernels")


def leading(matrix: Array) -> tuple[int, int]:
    """Whether the columns of a matrix are contiguous, not its rows, and the stride of the others.

    An axis of one element can have any stride.
    """
    rows, columns = matrix.shape[-2:]
    down, right = (stride // matrix.itemsize for stride in matrix.strides[-2:])
    if right == 1 or columns == 1:
        return 0, max(down if rows > 1 else columns, 1)
    assert down == 1 or rows == 1, "neither rows nor columns of the matrix are contiguous"
    return 1, max(right, 1)


@cache
def _device(dtype: str) -> Device:
    return Device(dtype)


def device(dtype: str = "float32") -> Device:
    """The GPU with the kernels in ``float32`` or ``float64``, always the same object."""
    return _device(dtype)


def _of(array: Array) -> Device:
    return device(array.dtype.name)


@contextmanager
def _room(needed: dict[str, int]) -> Iterator[None]:
    """DeviceError where the device has no memory for arrays of these bytes, where they are known.

    A decorator as well.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(text in str(error) for text in NO_MEMORY):
            raise
        largest = sorted(needed, key=needed.get, reverse=True)
        listed = ", ".join(f"{name} {needed[name] / 1e9:.2f} GB" for name in largest[:8])
        known = f": {sum(needed.values()) / 1e9:.2f} GB are needed for {listed}" if needed else ""
        raise DeviceError(
            f"the device is out of memory{known} ({error}); parameters and accumulators are "
            "smaller with a lower hidden_size, work arrays also with a lower batch or window"
        ) from error


def _sizes(**arrays: Array) -> dict[str, int]:
    return {name: array.nbytes for name, array in arrays.items()}


def _blocks(size: int) -> int:
    return min(-(-size // THREADS), MOST_BLOCKS)


def _across(width: int) -> int:
    """Threads of a block that has a row of this width."""
    return min(THREADS, 32 * -(-width // 32))


def _by_row(rows: int, width: int) -> tuple[int, int]:
    """A grid for rows of an array, those that are long in parts."""
    return rows, min(-(-width // (8 * THREADS)), 64)


def _dropout(key: int | np.ndarray, stream: np.uint64, p: float, dtype: np.dtype) -> Arguments:
    """(start, threshold, factor) of the masks of `windows.dropout_keep`, a start for each key."""
    real = np.dtype(dtype).type
    with np.errstate(over="ignore"):
        start = mix(np.asarray(key, np.uint64) + stream)
    return start, dropout_threshold(p), real(1) / real(1 - p)


def _rule(rule: Rule, dtype: np.dtype) -> Arguments:
    real = np.dtype(dtype).type
    return tuple(map(real, (rule.learning_rate, rule.rho, 1 - rule.rho, rule.eps)))


# ---------------------------------------------------------------- functions of one window


def to_device(array: np.ndarray) -> Array:
    """An array of the host on the device; one of the device as it is."""
    with _room(_sizes(**{f"an array of shape {array.shape}": array})):
        return device().xp.asarray(array)


def to_host(array: Array) -> np.ndarray:
    """An array of the device as a NumPy array."""
    return array if isinstance(array, np.ndarray) else array.get()


def window(log: EventLog, piece: Slice, dtype: np.dtype) -> Window:
    """Read one slice from the log (`windows.window`), for the device."""
    return Window(*map(to_device, map(np.ascontiguousarray, read_window(log, piece, dtype))))


@_room({})
def take_rows(table: Array, index: Array) -> Array:
    """Rows of a table: [R, ...] and int[M] -> [M, ...]."""
    dev = _of(table)
    out = dev.xp.empty((*index.shape, *table.shape[1:]), table.dtype)
    width = int(np.prod(table.shape[1:]))
    if out.size:
        no_dropout = _dropout(0, INPUT, 0.0, table.dtype)
        index = index.astype(np.int32, copy=False)
        arguments = (table, index, out, np.int64(width), *no_dropout)
        dev.launch("gather", _by_row(index.size, width), THREADS, arguments)
    return out


@_room({})
def sum_rows(index: Array, values: Array) -> RowGrad:
    """Sum the values that belong to one row, by sort and segmented sum.

    Parameters
    ----------
    index : int[M]
    values : real[M, ...]

    Returns
    -------
    RowGrad
        Its rows sorted.
    """
    dev = _of(values)
    xp, M = dev.xp, index.size
    rows, sums = xp.zeros(M, np.int32), xp.zeros(values.shape, values.dtype)
    if M == 0:
        return RowGrad(rows, sums, 0)
    order = xp.argsort(index, kind="stable")
    ordered = index[order].astype(np.int64)
    new = xp.ones(M, np.bool_)
    new[1:] = ordered[1:] != ordered[:-1]
    begin = xp.flatnonzero(new)
    count = begin.size
    rows[:count] = ordered[begin]
    width = values.size // M
    if width:
        arguments = (xp.ascontiguousarray(values), ordered, order, begin, sums)
        sizes = np.int64(M), np.int64(width)
        dev.launch("sum_rows", _by_row(count, width), THREADS, (*arguments, *sizes))
    return RowGrad(rows, sums, count)


@_room({})
def update(
    rule: Rule,
    param: Array,
    accumulator: Array,
    stamp: Array | None,
    step: int,
    grad: RowGrad | Array,
) -> None:
    """One step of RMSprop, in place: on the rows of a `RowGrad`, or on a dense gradient.

    `stamp` int64[R] selects the dense rule for rows, None the touched rule (`optim`).
    """
    dev = _of(param)
    numbers = _rule(rule, param.dtype)
    if not isinstance(grad, RowGrad):
        arguments = (param, accumulator, grad, np.int64(param.size), *numbers)
        dev.launch("move_dense", _blocks(param.size), THREADS, arguments)
    elif grad.count:
        rows, values, count = grad
        width = param.size // len(param)
        dense = stamp is not None
        stamps = stamp if dense else dev.xp.zeros(1, np.int64)
        late = (np.int64(width), np.int32(dense), np.int64(step), np.float64(rule.rho))
        arguments = (param, accumulator, stamps, rows, values, *late, *numbers)
        dev.launch("move_rows", count, THREADS, arguments)


# ---------------------------------------------------------------- cells


class Shape(NamedTuple):
    """Of a window, for the launches of a cell."""

    cell: str
    T: int
    B: int
    D: int

    @property
    def gates(self) -> int:
        return CELLS[self.cell].gates

    @property
    def kind(self) -> str:
        """In the names of the kernels."""
        return "gru" if self.gates == 3 else "tanh"

    @property
    def arguments(self) -> Arguments:
        """Of the kernels, their sizes and for a GRU whether its candidate is a tanh."""
        candidate = (np.int32(self.cell == "gru"),) if self.gates == 3 else ()
        return (*map(np.int32, self[1:]), *candidate)


def _cell_threads(D: int) -> int:
    return min(CELL_THREADS, 256 * -(-D // 32))


def _cell_shared(dev: Device, shape: Shape, name: str) -> tuple[int, bool]:
    """Bytes of shared memory of a block that has a column, and whether the matrix is in there."""
    D, G = shape.D, shape.gates
    if name == "forward":
        vectors = [D] * G + [max(_cell_threads(D), min(G, 2) * D)]
    else:
        vectors = [D] * 3 + ([3 * D] if G == 3 else [])
    pack = 16 // dev.dtype.itemsize
    *sizes, matrix = (-(-n // pack) * 16 for n in (*vectors, D * G * D))
    resident = sum(sizes) + matrix <= dev.shared_limit
    return sum(sizes) + resident * matrix, resident


class Slices(NamedTuple):
    """How the blocks of a grid deal out a pooled matrix and the columns (``pooled.cu``)."""

    units: int  # of a block
    columns: int  # of a block
    grid: tuple[int, int]
    shared: int  # reals


class Exchange(NamedTuple):
    """What those blocks write for each other."""

    left: Array  # real[1 or 2, T, B, D], flat, or longer
    counters: Array  # uint32[32 * multiprocessors], of the barriers


def _slices(dev: Device, shape: Shape) -> Slices | None:
    """How to keep a pooled matrix in the shared memory of many blocks together.

    None where each column has a block of its own instead, as with a matrix for each user: the
    matrix fits in one block's shared memory, or not even in that of all.
    """
    if all(_cell_shared(dev, shape, name)[1] for name in ("forward", "backward")):
        return None
    room = dev.shared_limit // dev.dtype.itemsize
    return _fastest(shape.gates, shape.B, shape.D, THREADS, dev.multiprocessors, room)


@cache
def _fastest(G: int, B: int, D: int, threads: int, blocks: int, room: int) -> Slices | None:
    """The slices that cost least, counted for one term of a product's sums: a fused product for
    each unit and column, columns in eights, and a read of each column from the second-level cache,
    which takes a multiprocessor as long as some 20 products.
    """
    K = -(-D // (threads // 4)) * (threads // 4)
    found = []
    for groups in range(1, min(B, blocks) + 1):
        columns = -(-B // groups)
        tile = 8 if columns > 1 else 1
        for width in (12, 20):
            units = -(-D // (blocks // groups * width)) * width
            shared = G * units * K + tile * K + threads // 32 * tile * units
            if shared <= room:
                cost = -(-columns // 8) * 8 * units + 20 * columns
                grid = -(-D // units), -(-B // columns)
                found.append((cost, Slices(units, columns, grid, shared)))
    return min(found)[1] if found else None


def _exchange_shapes(
    dev: Device | None, shape: Shape, pooled: bool, dtype: np.dtype
) -> dict[str, tuple]:
    """Shape and dtype of the arrays of `Exchange`, none where `_slices` are not the way."""
    if not pooled or (dev and not _slices(dev, shape)):
        return {}
    size = min(shape.gates, 2) * shape.T * shape.B * shape.D
    blocks = dev.multiprocessors if dev else 0
    return {"left": ((size,), dtype), "counters": ((32 * blocks,), np.uint32)}


def _exchange(sizes: dict[str, tuple]) -> Exchange | None:
    if not sizes:
        return None
    exchange = Exchange(**_allocate(sizes))
    exchange.counters.fill(0)
    return exchange


def _launch_columns(dev: Device, shape: Shape, name: str, arguments: Arguments) -> None:
    """Start a pass of a cell with a block for each column."""
    shared, resident = _cell_shared(dev, shape, name)
    if shared > dev.shared_limit:
        raise SettingsError(
            f"hidden_size is {shape.D}: the device has {dev.shared_limit} bytes of shared memory "
            f"for a block and {shared} are needed; lower hidden_size"
        )
    kernel = f"{shape.kind}_{name}"
    arguments += (*shape.arguments, np.int32(resident))
    dev.launch(kernel, shape.B, _cell_threads(shape.D), arguments, shared)


def _launch_slices(dev: Device, shape: Shape, name: str, arguments: Arguments) -> None:
    """Start a pass of a cell with `Slices` of a pooled matrix."""
    units, columns, grid, shared = _slices(dev, shape)
    arguments += (*shape.arguments, np.int32(units), np.int32(columns))
    kernel = f"pooled_{shape.kind}_{name}"
    dev.launch(kernel, grid, THREADS, arguments, shared * dev.dtype.itemsize)


def _forward(
    dev: Device,
    shape: Shape,
    exchange: Exchange | None,
    s0: Array,
    init: float,
    A: Array,
    W_h: Array,
    row: Array,
    event: Array,
    carry: Array,
    states: Array,
    cache: Array,
) -> None:
    """The states of a window; column b has the matrix W_h[row[b]]."""
    kept = (cache,) if shape.gates == 3 else ()
    arguments = (event, carry, dev.dtype.type(init), s0, states, *kept)
    if exchange:
        _launch_slices(dev, shape, "forward", (A, W_h, *arguments, *exchange))
    else:
        _launch_columns(dev, shape, "forward", (A, W_h, row, *arguments))


def _backward(
    dev: Device,
    shape: Shape,
    exchange: Exchange | None,
    dH: Array,
    states: Array,
    cache: Array,
    init: float,
    W_h: Array,
    row: Array,
    event: Array,
    carry: Array,
    ds0: Array,
    dA: Array,
) -> None:
    """ds0 and dA of a window."""
    gru, start = shape.gates == 3, dev.dtype.type(init)
    after = (states, cache, ds0, dA) if gru else (states, ds0, dA)
    if exchange:
        arguments = (dH, W_h, event, carry, start, *after, *exchange)
        _launch_slices(dev, shape, "backward", arguments)
    else:
        before = (event, carry, start) if gru else (event, carry)
        _launch_columns(dev, shape, "backward", (dH, W_h, row, *before, *after))


def _pooled_gradient(dev: Device, shape: Shape, exchange: Exchange, dA: Array, dW_h: Array) -> None:
    """dW_h [1, D, G*D] = left^T dA, with r h on the left of the candidate's columns."""
    N, D = shape.T * shape.B, shape.D
    dA, out = dA.reshape(-1, shape.gates * D)[:N], dW_h[0]
    parts = (0, 2 * D, 3 * D) if shape.gates == 3 else (0, D)
    for k, (first, last) in enumerate(pairwise(parts)):
        left = exchange.left[k * N * D : (k + 1) * N * D].reshape(N, D)
        dev.product(left.T, dA[:, first:last], out[:, first:last])


def _matrices(dev: Device, shape: Shape, name: str, pooled: bool, arguments: Arguments) -> None:
    """Start `recurrent_gradient` or `recurrent_update`, for each column or for all together."""
    _, T, B, D = shape
    G = shape.gates
    threads = min(256, CELL_THREADS, 32 * -(-D // 16))
    tiles = sum(-(-columns // 32) for columns in ((D,) if G == 1 else (2 * D, D)))
    grid = 1 if pooled else B, tiles * -(-2 * D // threads)
    shared = 16 * (threads // 2 + 32) * dev.dtype.itemsize
    sizes = map(np.int32, (T, B, D, G, pooled))
    dev.launch(name, grid, threads, (*arguments, *sizes), shared)


def _rows_of(dev: Device, W_h: Array, B: int) -> Array:
    """The row of W_h that each column uses where W_h has one for each, or one for all."""
    return dev.xp.arange(B, dtype=np.int32) if len(W_h) > 1 else dev.xp.zeros(B, np.int32)


@_room({})
def cell_forward(
    cell: str, s0: Array, init: float, A: Array, W_h: Array, event: Array, carry: Array
) -> tuple[Array, Array]:
    """States after each step of a window, and what the backward pass needs (`cells`).

    s0 [S, B, D], A [T, B, G*D], W_h [B or 1, D, G*D], event and carry [T, B]
    -> states [T + 1, S, B, D], cache [T, B, ...].
    """
    dev = _of(A)
    shape = Shape(cell, *A.shape[:2], s0.shape[-1])
    states = dev.xp.empty((shape.T + 1, *s0.shape), dev.dtype)
    width = 3 * shape.D if shape.gates == 3 else 0
    cache = dev.xp.empty((shape.T, shape.B, width), dev.dtype)
    s0, A, event, carry = map(dev.xp.ascontiguousarray, (s0, A, event, carry))
    row = _rows_of(dev, W_h, shape.B)
    exchange = _exchange(_exchange_shapes(dev, shape, len(W_h) == 1, dev.dtype))
    _forward(dev, shape, exchange, s0, init, A, W_h, row, event, carry, states, cache)
    return states, cache


@_room({})
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
    """Back-propagation through time (`cells`).

    dH [T, B, D] -> ds0 [S, B, D], dA [T, B, G*D], dW_h [B or 1, D, G*D].
    """
    dev = _of(dH)
    shape = Shape(cell, *dH.shape)
    T, B, D = dH.shape
    ds0 = dev.xp.empty((1, B, D), dev.dtype)
    dA = dev.xp.empty((T, B, shape.gates * D), dev.dtype)
    dW_h = dev.xp.empty(W_h.shape, dev.dtype)
    dH, event, carry = map(dev.xp.ascontiguousarray, (dH, event, carry))
    pooled = len(W_h) == 1
    row = _rows_of(dev, W_h, B)
    exchange = _exchange(_exchange_shapes(dev, shape, pooled, dev.dtype))
    _backward(dev, shape, exchange, dH, states, cache, init, W_h, row, event, carry, ds0, dA)
    if exchange:
        _pooled_gradient(dev, shape, exchange, dA, dW_h)
    else:
        arguments = (states, cache, dA, carry, dev.dtype.type(init), dW_h)
        _matrices(dev, shape, "recurrent_gradient", pooled, arguments)
    return ds0, dA, dW_h


# ---------------------------------------------------------------- softmax


class OutputWork(NamedTuple):
    """Work arrays of a block of at most `rows` events, `stride` elements to a row of logits."""

    E: Array  # real[rows, stride]
    U: Array  # real[tiles * rows * D]
    shift: Array  # real[tiles * rows]
    sum: Array  # float64[tiles * rows]
    target: Array  # real[rows]


def _output_shapes(N: int, n_items: int, D: int, dtype: np.dtype) -> dict[str, tuple]:
    """Shape and dtype of each array of `OutputWork`, for N events."""
    stride = -(-n_items // 32) * 32  # rows of 128 bytes or whole multiples of them
    rows = max(min(N, LOGITS_BYTES // (stride * np.dtype(dtype).itemsize)), 1)
    tiles = -(-n_items // TILE)
    return {
        "E": ((rows, stride), dtype),
        "U": ((tiles * rows * D,), dtype),
        "shift": ((tiles * rows,), dtype),
        "sum": ((tiles * rows,), np.float64),
        "target": ((rows,), dtype),
    }


def _bytes(shapes: dict[str, tuple]) -> dict[str, int]:
    """Of arrays of these shapes and dtypes."""
    return {k: math.prod(s) * np.dtype(t).itemsize for k, (s, t) in shapes.items()}


def _allocate(shapes: dict[str, tuple]) -> dict[str, Array]:
    """New arrays of these shapes and dtypes."""
    with _room(_bytes(shapes)):
        xp = device().xp
        return {name: xp.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}


def _in_tiles(rows: Array) -> list[Array]:
    """Views of [I, ...] as whole tiles, [tiles, TILE, ...], and as what is left, [1, rest, ...]."""
    whole = len(rows) // TILE * TILE
    parts = rows[:whole].reshape(-1, TILE, rows.shape[1]), rows[whole:][None]
    return [part for part in parts if part.size]


def _softmax(
    dev: Device,
    H: Array,
    W_out: Array,
    y: Array,
    scale: float,
    work: OutputWork,
    loss: Array,
    dH: Array,
    dW_out: Array,
    blend: tuple[Array, Array, Array] | None = None,
    tf32: bool = False,
) -> None:
    """Loss float64[N] of each of N events and the gradients times `scale`, by tiles of items.

    `blend` is that of `Mixing`, where the softmax is one distribution of a mixture. With `tf32`
    the products are in TF32. The target's logit comes from the same product as the sum, so that no
    loss is negative.
    """
    (N, D), n_items = H.shape, len(W_out)
    rows, stride = work.E.shape
    tiles = -(-n_items // TILE)
    stride, tile, real = np.int64(stride), np.int32(TILE), dev.dtype.type
    if N == 0:
        dW_out.fill(0)
    for lo in range(0, N, rows):
        n = min(rows, N - lo)
        part = slice(lo, lo + n)
        logits = work.E[:n, :n_items]
        U = work.U[: tiles * n * D].reshape(tiles, n, D)
        dev.product(H[part], W_out.T, logits, tf32=tf32)
        sums = (y[part], work.shift, work.sum, work.target)
        arguments = (work.E, *sums, stride, np.int32(n_items), tile)
        dev.launch("softmax_tile", (n, tiles), THREADS, arguments)
        E, W, dW = map(_in_tiles, (logits.T, W_out, dW_out))
        places = [U[: len(W[0])], U[len(W[0]) :]]
        for e, w, u in zip(E, W, places, strict=False):
            dev.product(e.transpose(0, 2, 1), w, u, tf32=tf32)
        mixed = [array[part] for array in blend] if blend else [work.sum] * 3  # not looked at
        arguments = (work.E, *sums, work.U, H[part], W_out, *mixed, loss[part], dH[part], stride)
        arguments += (np.int32(n_items), np.int32(tiles), tile, np.int32(D))
        arguments += (np.int32(blend[0].shape[1] if blend else 0), real(scale))
        dev.launch("softmax_finish", n, _across(D), arguments)
        for e, g, dw in zip(E, places, dW, strict=False):
            dev.product(e, g, dw, float(lo > 0), tf32)


@_room({})
def output(kind: str, H: Array, W_out: Array, y: Array) -> tuple[float, Array, Array]:
    """Loss of N cells in nats, dH [N, D] and dW_out [I, D] (`outputs`)."""
    dev = _of(H)
    (N, D), n_items = H.shape, len(W_out)
    work = OutputWork(**_allocate(_output_shapes(N, n_items, D, dev.dtype)))
    loss = dev.xp.zeros(N, np.float64)
    dH, dW_out = dev.xp.empty((N, D), dev.dtype), dev.xp.empty(W_out.shape, dev.dtype)
    y = y.astype(np.int32, copy=False)
    _softmax(dev, dev.xp.ascontiguousarray(H), W_out, y, 1.0, work, loss, dH, dW_out)
    return float(to_host(loss).sum()), dH, dW_out


def _score_shapes(N: int, n_items: int, dtype: np.dtype) -> dict[str, tuple]:
    """Shape and dtype of the arrays of `_score`."""
    tiles = -(-n_items // TILE)
    names = {"target": ((N,), dtype), "largest": ((tiles, N), dtype)}
    names |= {"sum": ((tiles, N), np.float64), "above": ((tiles, N), np.int32)}
    return names | {"nll": ((N,), np.float64), "rank": ((N,), np.int32)}


def _score(dev: Device, H: Array, W_out: Array, y: Array) -> tuple[Array, Array, Array]:
    """`score`, and the targets' logits real[N]."""
    (N, D), n_items = H.shape, len(W_out)
    tiles = -(-n_items // TILE)
    sizes = _score_shapes(N, n_items, dev.dtype)
    target, largest, total, above, nll, rank = _allocate(sizes).values()
    if N == 0:
        return nll, rank, target
    sizes = np.int32(N), np.int32(D)
    dev.launch("score_target", -(-N // THREADS), THREADS, (H, W_out, y, target, *sizes))
    arguments = (H, W_out, target, largest, total, above)
    sizes = np.int32(N), np.int32(n_items), np.int32(TILE), np.int32(D)
    events = THREADS // 4  # of a block
    dev.launch("score_tile", (-(-N // events), tiles), THREADS, (*arguments, *sizes))
    arguments = (largest, total, above, target, nll, rank, np.int32(N), np.int32(tiles))
    dev.launch("score_finish", -(-N // THREADS), THREADS, arguments)
    return nll, rank, target


@_room({})
def score(kind: str, H: Array, W_out: Array, y: Array) -> tuple[Array, Array]:
    """Negative log-likelihood float64[N] and rank int32[N] of each target (`outputs`)."""
    dev = _of(H)
    return _score(dev, dev.xp.ascontiguousarray(H), W_out, y.astype(np.int32, copy=False))[:2]


# ---------------------------------------------------------------- mixture


def _mixing(
    dev: Device, blocks: dict[str, tuple[int, ...]], memory: int, columns: int, cells: int
) -> Mixing:
    sizes = mixing_shapes(blocks, memory, columns, cells, THREADS, dev.dtype)
    return Mixing(dev, THREADS, memory, _allocate(sizes))


def _ranked_at_once(N: int, n_items: int) -> int:
    """Cells of a mixture that are scored together, of N."""
    return max(min(N, EXTRA_BYTES // (8 * n_items)), 1)


@_room({})
def mixture(
    H: Array, W_out: Array, mixture: Mixture, cells: Cells, past: Past, memory: int
) -> tuple[float, Array, Array, Mixture]:
    """Loss of N cells in nats, dH [N, D], dW_out [I, D] and the other gradients (`outputs`)."""
    dev = _of(H)
    (N, D), n_items = H.shape, len(W_out)
    work = OutputWork(**_allocate(_output_shapes(N, n_items, D, dev.dtype)))
    blocks = {name: block.shape for name, block in mixture._asdict().items()}
    mixing = _mixing(dev, blocks, memory, N, N)
    loss = dev.xp.zeros(N, np.float64)
    dH, dW_out = dev.xp.empty((N, D), dev.dtype), dev.xp.empty(W_out.shape, dev.dtype)
    H, columns = dev.xp.ascontiguousarray(H), cells_alone(dev, cells, past)
    mixing.forward(mixture, past, columns, H)
    _softmax(dev, H, W_out, columns.y, 1.0, work, loss, dH, dW_out, mixing.blend(N))
    mixing.backward(mixture, past, columns, 1.0, dH)
    return float(to_host(loss).sum()), dH, dW_out, mixing.gradients


@_room({})
def mixture_score(
    H: Array, W_out: Array, mixture: Mixture, cells: Cells, past: Past, memory: int
) -> tuple[Array, Array]:
    """As `score`, of the mixture (`outputs`)."""
    dev = _of(H)
    N, n_items = len(H), len(W_out)
    H, y = dev.xp.ascontiguousarray(H), cells.y.astype(np.int32, copy=False)
    nll, rank, target = _score(dev, H, W_out, y)
    rows = _ranked_at_once(N, n_items)
    blocks = {name: block.shape for name, block in mixture._asdict().items()}
    mixing = _mixing(dev, blocks, memory, rows, rows)
    work = RankWork(**_allocate(rank_shapes(rows, n_items, TILE)))
    for lo in range(0, N, rows):
        part = slice(lo, lo + rows)
        columns = cells_alone(dev, Cells(*(column[part] for column in cells)), past)
        mixing.forward(mixture, past, columns, H[part])
        targets = target[part], nll[part], rank[part]
        mixing.rank(mixture, past, columns, H[part], W_out, *targets, work, TILE)
    return nll, rank


# ---------------------------------------------------------------- a run of windows


class Work(NamedTuple):
    """Work arrays of `train_run` for windows of at most T steps of B columns, N = T * B cells.

    A window begins with the last state of the one before, which is in the same array.
    """

    A: Array  # real[N, G*D]
    states: Array  # real[T + 1, B, D]
    cache: Array  # real[N, 3*D], one element for tanh
    H: Array  # real[N, D]
    dH_cells: Array  # real[N, D]
    dH: Array  # real[N, D]
    ds0: Array  # real[B, D]
    dA: Array  # real[N, G*D]
    dW_out: Array  # real[I, D]
    dW_h: Array  # real[1, D, G*D], one element without `exchange`
    output: OutputWork
    exchange: Exchange | None  # of a pooled matrix, where there are `Slices`
    log: dict[str, Any]  # the log on the device, and the host's arrays that it is of
    mixing: Mixing | None  # of a mixture


def _work_shapes(
    dev: Device | None, spec: Spec, n_items: int, batch: int, window: int
) -> tuple[dict, dict]:
    """Shape and dtype of the arrays of `Work` with those in it, and of its `Mixing`.

    The most that they can be where the device is None.
    """
    D, N, dtype = spec.hidden_size, window * batch, np.dtype(spec.dtype)
    width, pooled = spec.gates * D, spec.sharing == "pooled"
    exchange = _exchange_shapes(dev, Shape(spec.cell_kind, window, batch, D), pooled, dtype)
    sizes = {"A": (N, width), "dA": (N, width), "cache": (N, 3 * D) if spec.gates == 3 else (1, 1)}
    sizes |= dict.fromkeys(("H", "dH_cells", "dH"), (N, D)) | {"ds0": (batch, D)}
    sizes |= {"states": (window + 1, batch, D), "dW_out": (n_items, D)}
    sizes |= {"dW_h": (1, D, width) if exchange else (1,)}
    own = {name: (shape, dtype) for name, shape in sizes.items()} | exchange
    mixing = {}
    if spec.output == "mixture":
        blocks = shapes(spec, batch, n_items)
        mixing = mixing_shapes(blocks, spec.memory, batch, N, THREADS, dtype)
    return own | _output_shapes(N, n_items, D, dtype), mixing


@_room({})
def workspace(spec: Spec, n_items: int, batch: int, window: int) -> Work:
    """Work arrays of `train_run` for windows of at most `window` steps of `batch` columns."""
    dev = device(spec.dtype)
    if spec.products == "tf32" and dev.capability < AMPERE:
        raise SettingsError(
            f"products is 'tf32' and the device's compute capability is {dev.capability / 10}, "
            f"expected {AMPERE / 10} (Ampere) or later: set products to 'full'"
        )
    own, for_mixing = _work_shapes(dev, spec, n_items, batch, window)
    exchange = _exchange({k: own.pop(k) for k in Exchange._fields if k in own})
    arrays = _allocate(own)
    output = OutputWork(*(arrays.pop(name) for name in OutputWork._fields))
    mixing = Mixing(dev, THREADS, spec.memory, _allocate(for_mixing)) if for_mixing else None
    return Work(**arrays, output=output, exchange=exchange, log={}, mixing=mixing)


class Run(NamedTuple):
    """A run of K windows, padded to T steps, on the device (`read_windows` in ``rows.cu``)."""

    user: Array  # int32[K, B]
    start: Array  # int64[K, B]
    x: Array  # int32[K, T * B]
    event: Array  # real[K, T * B]
    carry: Array  # real[K, T * B]
    cell: Array  # int32[K, T * B]
    y: Array  # int32[K, T * B]
    number: Array  # int32[K, T * B]
    sorted: Array  # int64[K * T * B]
    order: Array  # int64[K * T * B]


def _resident(work: Work, log: EventLog) -> tuple[Array, Array]:
    """indptr and items of the log on the device, copied when another log comes."""
    if work.log.get("items") is not log.items or work.log.get("indptr") is not log.indptr:
        there = to_device(log.indptr), to_device(log.items)
        work.log.update(indptr=log.indptr, items=log.items, there=there)
    return work.log["there"]


def _run_shapes(run: Slice, dtype: np.dtype) -> dict[str, tuple]:
    """Shape and dtype of the new arrays of `_read_run`."""
    K, B = run.length.shape
    places = int(run.length.max(initial=0)) * B
    sizes = {name: ((K, places), np.int32) for name in ("x", "cell", "y", "number")}
    sizes |= {name: ((K, places), dtype) for name in ("event", "carry")}
    return sizes | {"key": ((K * places,), np.int64)}


def _run_bytes(run: Slice, dtype: np.dtype) -> int:
    """Bytes of `_read_run` at the most."""
    new = _bytes(_run_shapes(run, dtype))
    # Beside the keys their order, and while CuPy sorts, a copy and room for both once more.
    return sum(new.values()) + 4 * new["key"] + sum(field.nbytes for field in run[:5])


def _read_run(dev: Device, log: tuple[Array, Array], run: Slice, n_items: int) -> Run:
    """Read all windows of a run, and sort the items of each."""
    xp, (K, B) = dev.xp, run.length.shape
    T = int(run.length.max(initial=0))
    slices = [to_device(np.ascontiguousarray(field)) for field in run[:5]]
    user, begin, length, fresh, target_from = slices
    new = _allocate(_run_shapes(run, dev.dtype))
    key = new.pop("key")
    if key.size:
        out = (new["x"], new["event"], new["carry"], key, new["cell"], new["y"], new["number"])
        sizes = tuple(map(np.int32, (K, T, B, n_items)))
        arguments = (*log, user, begin, length, fresh, target_from, *out, *sizes)
        dev.launch("read_windows", _blocks(key.size), THREADS, arguments)
    order = xp.argsort(key, kind="stable")
    return Run(user, begin, **new, sorted=key[order], order=order)


def _targets(run: Slice, lengths: np.ndarray) -> np.ndarray:
    """int64[K]: number of targets of each window, as `windows.window` has them."""
    first = np.maximum(run.start, run.target_from - 1)
    last = np.minimum(run.start + run.length, lengths[run.user] - 1)
    return np.maximum(last - first, 0).sum(axis=1)


def train_run(
    spec: Spec,
    rule: Rule,
    scale: float,
    params: Params | MixtureParams,
    accumulators: Accumulators | MixtureAccumulators,
    s: Array,
    log: EventLog,
    run: Slice,
    work: Work,
    past: Past | None,
) -> tuple[float, int]:
    """The loop over `training.step`, on the device from end to end; it leaves out clipping.

    Parameters
    ----------
    params, accumulators, s
        On the device. s real[1, B, D] is the state before the run, overwritten with the state
        after it.
    run : Slice
        With an axis of K windows; a user at most once among the columns of a window.
    work
        From `workspace`.
    past : Past or None
        Of `log` and on the device, for a mixture.

    Returns
    -------
    loss, events : summed over the run
    """
    needed = _sizes(**params._asdict())
    needed |= {f"accumulator of {k}": v for k, v in _sizes(**accumulators._asdict()).items()}
    K, own = run.key.size, work.mixing.work if work.mixing else {}
    own = own | (work.exchange._asdict() if work.exchange else {})
    for name, array in (work._asdict() | work.output._asdict() | own).items():
        needed |= {name: array.nbytes} if hasattr(array, "nbytes") else {}
    at_once = _windows_at_once(run, spec.dtype)
    parts = [run.part(k, k + at_once) for k in range(0, K, at_once)]
    with _room(needed):
        found = [
            _train(spec, rule, scale, params, accumulators, s, log, part, work, past)
            for part in parts
        ]
    return sum((loss for loss, _ in found), 0.0), sum(events for _, events in found)


def _windows_at_once(run: Slice, dtype: np.dtype) -> int:
    """Windows of a run whose arrays take `RUN_BYTES` at most, or one."""
    return max(RUN_BYTES * run.key.size // max(_run_bytes(run, dtype), 1), 1)


def _train(
    spec: Spec,
    rule: Rule,
    scale: float,
    params: Params | MixtureParams,
    accumulators: Accumulators | MixtureAccumulators,
    s: Array,
    log: EventLog,
    run: Slice,
    work: Work,
    past: Past | None,
) -> tuple[float, int]:
    dev = device(spec.dtype)
    K, B = run.length.shape
    D, G, n_items = spec.hidden_size, spec.gates, len(params.W_out)
    pooled, dense = spec.sharing == "pooled", rule.W_in_rows == "dense"
    read = _read_run(dev, _resident(work, log), run, n_items)
    padded = read.x.shape[1]
    steps, events = run.length.max(axis=1, initial=0), run.length.sum(axis=1)
    targets = _targets(run, log.lengths)
    loss = dev.xp.zeros((K, max(targets.max(initial=0), 1)), np.float64)
    numbers, init = _rule(rule, dev.dtype), spec.init_state
    first_step = int(to_host(accumulators.step)[0]) + 1
    starts_in, *mask_in = _dropout(run.key, INPUT, spec.dropout_in, dev.dtype)
    starts_out, *mask_out = _dropout(run.key, OUTPUT, spec.dropout_out, dev.dtype)
    shared_row, mixing = dev.xp.zeros(B, np.int32), work.mixing
    states, now = work.states, s[0]
    for k in range(K):
        T, E, N = int(steps[k]), int(events[k]), int(targets[k])
        cells, step = T * B, first_step + k
        drop_in, drop_out = (starts_in[k], *mask_in), (starts_out[k], *mask_out)
        if T:
            shape = Shape(spec.cell_kind, T, B, D)
            event, carry = read.event[k], read.carry[k]
            row = shared_row if pooled else read.user[k]
            width = np.int64(G * D)
            arguments = (params.W_in, read.x[k], work.A, width, *drop_in)
            dev.launch("gather", _by_row(cells, G * D), THREADS, arguments)
            _forward(
                dev, shape, work.exchange, now, init, work.A, params.W_h, row, event, carry, states,
                work.cache,
            )  # fmt: skip
            now = states[T]
        if N:
            arguments = (states, read.cell[k], work.H, np.int32(B), np.int32(D), *drop_out)
            dev.launch("take_states", N, _across(D), arguments)
        H, dH_cells, blend = work.H[:N], work.dH_cells[:N], None
        if mixing:
            number = read.number[k, :cells]
            columns = Columns(read.user[k], read.start[k], read.cell[k], number, read.y[k])
            mixing.forward(params.mixture, past, columns, H)
            blend = mixing.blend(N)
        _softmax(
            dev, H, params.W_out, read.y[k, :N], scale, work.output, loss[k, :N], dH_cells,
            work.dW_out, blend, spec.products == "tf32",
        )  # fmt: skip
        if mixing:
            mixing.backward(params.mixture, past, columns, scale, dH_cells)
            mixing.move(numbers, params.mixture, accumulators.mixture, columns)
        if T:
            arguments = (work.dH_cells, read.number[k], work.dH, np.int32(D), *drop_out)
            dev.launch("spread_cells", cells, _across(D), arguments)
            _backward(
                dev, shape, work.exchange, work.dH, states, work.cache, init, params.W_h, row,
                event, carry, work.ds0, work.dA,
            )  # fmt: skip
            if work.exchange:
                _pooled_gradient(dev, shape, work.exchange, work.dA, work.dW_h)
                arguments = (params.W_h, accumulators.W_h, work.dW_h, np.int64(work.dW_h.size))
                dev.launch("move_dense", _blocks(work.dW_h.size), THREADS, (*arguments, *numbers))
            else:
                arguments = (states, work.cache, work.dA, row, event, carry, dev.dtype.type(init))
                arguments += (params.W_h, accumulators.W_h, *numbers)
                _matrices(dev, shape, "recurrent_update", pooled, arguments)
        if E:
            places = np.int64(k * padded), np.int64(k * (n_items + 1)), width
            late = np.int32(dense), np.int64(step), np.float64(rule.rho)
            arguments = (params.W_in, accumulators.W_in, accumulators.stamp, work.dA, read.sorted)
            arguments += (read.order, *places, *late, *drop_in, *numbers)
            dev.launch("move_items", E, _across(G * D), arguments)
        arguments = (params.W_out, accumulators.W_out, work.dW_out, np.int64(n_items * D))
        dev.launch("move_dense", _blocks(n_items * D), THREADS, (*arguments, *numbers))
    accumulators.step[0] += K
    s[0] = now
    return float(to_host(loss).sum()), int(targets.sum())


# ---------------------------------------------------------------- memory, counted


def _device_there(dtype: str) -> Device | None:
    """`device`, None where this machine has none."""
    try:
        return device(dtype)
    except DeviceError:
        return None


def training_bytes(
    spec: Spec, rule: Rule, log: EventLog, batch: int, window: int, run: Slice
) -> tuple[int, int]:
    """Bytes on the device of `workspace` for a log, and of `training.train_run` beside it at most.

    Without parameters, accumulators and the past of a mixture.
    """
    D, real = spec.hidden_size, np.dtype(spec.dtype).itemsize
    dev = _device_there(spec.dtype)
    own, mixing = map(_bytes, _work_shapes(dev, spec, log.n_items, batch, window))
    held = sum((*own.values(), *mixing.values(), log.indptr.nbytes, log.items.nbytes))
    if not rule.clip:
        read = _run_bytes(run, spec.dtype)
        most = max(min(read, RUN_BYTES), read // max(run.key.size, 1))
        return held, batch * D * real + most
    # `training.step` makes all of it anew: the softmax first, then gradients and scaled copies.
    softmax = sum(own.pop(name) for name in OutputWork._fields)
    matrices = (1 if spec.sharing == "pooled" else batch) * D * spec.gates * D * real
    later = 3 * (matrices + own["dA"]) + 2 * own["dW_out"]
    return held, sum((*own.values(), *mixing.values(), matrices, max(softmax, later)))


def scoring_bytes(spec: Spec, n_items: int, run: Slice, lengths: np.ndarray, at_once: int) -> int:
    """Bytes on the device of `evaluation.evaluate` at the most, for the run that it replays.

    Without parameters and the past of a mixture. As soon as there are `at_once` cells they are
    scored.
    """
    B, D, dtype = run.length.shape[1], spec.hidden_size, np.dtype(spec.dtype)
    real, width, pooled = dtype.itemsize, spec.gates * D, spec.sharing == "pooled"
    matrices = 0 if pooled else B * D * width * real
    dev = _device_there(spec.dtype)
    cell = D * real + 16  # its state, user, place and next item
    targets = _targets(run, lengths)
    most = cells = gathered = states = 0
    for k, steps in enumerate(run.length.max(axis=1)):
        # A window's arrays are let go when those of the next have come.
        before, places = (gathered, states), int(steps) * B
        gathered = places * (width * real + 16 + 3 * real) + matrices
        states = ((places + B) * D + (places * 3 * D if spec.gates == 3 else 0)) * real
        shape = Shape(spec.cell_kind, int(steps), B, D)
        exchange = sum(_bytes(_exchange_shapes(dev, shape, pooled, dtype)).values())
        most = max(most, cells * cell + before[1] + gathered + max(before[0], states + exchange))
        cells += int(targets[k])
        if cells >= at_once or k == len(targets) - 1:
            scoring = 2 * cells * cell + _score_bytes(spec, cells, n_items)
            most, cells = max(most, gathered + states + scoring), 0
    return most


def _score_bytes(spec: Spec, cells: int, n_items: int) -> int:
    """Bytes of `_score` or `mixture_score` at the most."""
    dtype = np.dtype(spec.dtype)
    scores = _bytes(_score_shapes(cells, n_items, dtype))
    if spec.output == "softmax":
        return sum(scores.values())
    rows = _ranked_at_once(cells, n_items)
    blocks = shapes(spec, rows, n_items)
    ranks = mixing_shapes(blocks, spec.memory, rows, rows, THREADS, dtype)
    more = sum(_bytes(ranks).values()) + sum(_bytes(rank_shapes(rows, n_items, TILE)).values())
    kept = sum(scores[name] for name in ("target", "nll", "rank"))
    return max(sum(scores.values()), kept + more)
