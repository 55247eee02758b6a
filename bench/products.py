"""Where the time of a window goes: the kernels of the Numba backend, one by one and together.

    python bench/products.py [--threads 2] [--rounds 15]

For the shapes of Brightkite (23,243 items, D = 32, blocks of 128 events) and Last.fm (48,188 items,
D = 128, blocks of 256): each line is the median over interleaved rounds, in GFLOP/s of the matrix
products alone and as a share of what multiply-adds make that need no memory at all.
"""

import statistics
import time
from collections.abc import Callable

import click
import numba
import numpy as np
import threadpoolctl
from llvmlite import ir
from machine import describe_machine
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from crnn_np.backends import jit

SHAPES = {"Brightkite": (23243, 32, 128), "Last.fm": (48188, 128, 256)}
FLOAT = np.dtype(np.float32)
RULE = tuple(np.float32(x) for x in (1e-5, 0.9, 0.1, 1e-6))
PEAK = "multiply-adds in registers"
CHAINS = jit.TALL * jit.WIDE  # of multiply-adds: the sums of a register block
STEPS = 1 << 24


@intrinsic
def _multiply_adds(context, steps):
    """CHAINS vectors of float32 in registers, each multiplied and added to `steps` times."""

    def codegen(context, builder, signature, args):
        lanes = jit._lanes(FLOAT)
        vector = ir.VectorType(ir.FloatType(), lanes)
        fma = jit._function(builder, f"fmuladd.v{lanes}f32", vector, vector, vector, vector)

        def all_of(x):
            return ir.Constant(vector, [x] * lanes)

        sums = [cgutils.alloca_once_value(builder, all_of(float(i))) for i in range(CHAINS)]
        with cgutils.for_range(builder, args[0]):
            for at in sums:
                moved = builder.call(fma, [builder.load(at), all_of(0.5), all_of(0.25)])
                builder.store(moved, at)
        total = all_of(0.0)
        for at in sums:
            total = builder.fadd(total, builder.load(at))
        return builder.extract_element(total, ir.Constant(ir.IntType(32), 0))

    return types.float32(types.intp), codegen


@numba.njit(nogil=True)
def _in_registers(p, n, gate, steps):
    return _multiply_adds(steps)


def in_registers(threads: int) -> tuple[Callable[[], None], float]:
    """A call of multiply-adds without operands in memory, and its GFLOP."""
    operations = 2e-9 * threads * STEPS * CHAINS * jit._lanes(FLOAT)
    return lambda: jit._together(threads, _in_registers, STEPS), operations


@numba.njit(nogil=True)
def _pass(p, n, gate, repeat, W, ms, lanes, old, move, m, out, rule):
    for _ in range(repeat):
        jit._tiles(p, n, W, ms, lanes, old, True, move, m, out, rule)
        jit._meet(n, gate)


@numba.njit(nogil=True)
def _products(p, n, gate, repeat, step, kind, W, lanes, m, out, fetch):
    """One kind of product over thread p's tiles; step 0 stays on the first tile."""
    items, D = W.shape
    ld, Dp = out.E.shape[1], out.G.shape[1]
    w, E, HT = W.reshape(-1), out.E.reshape(-1), out.HT.reshape(-1)
    G, U, tile, T = out.G.reshape(-1), out.U[p].reshape(-1), out.tile[p], jit.TILE
    begin, end = jit._share(p, n, items, T)
    for _ in range(repeat):
        for lo in range(begin, end - T + 1, T):
            at = begin + (lo - begin) * step
            e, span = at * ld, T * ld * fetch
            if kind == 0:
                jit._product(0, False, T, m, D, lanes, w, at * D, D, HT, 0, ld, E, e, ld, HT, 0, 0)
            elif kind == 1:
                jit._exp_product(T, m, D, lanes, w, at * D, D, HT, ld, E, e, ld, E, e, 0, out.S[p])
            elif kind == 2:
                jit._product(1, True, D, m, T, lanes, w, at * D, D, E, e, ld, U, 0, ld, E, e, 0)
            else:
                e_next = e + T * ld
                jit._product(
                    0, False, T, D, m, lanes, E, e, ld, G, 0, Dp, tile, 0, D, E, e_next, span
                )
        jit._meet(n, gate)


def work(
    items: int, D: int, m: int, half: bool = False
) -> tuple[np.ndarray, np.ndarray, jit.Output]:
    """W_out, its mean squares and the work arrays, filled with numbers of the usual size."""
    rng = np.random.default_rng(0)
    out = jit._output_work(m, items, D, FLOAT, half=half)
    W, ms = jit._aligned((items, D), FLOAT), jit._aligned((items, D), FLOAT)
    W[:] = rng.standard_normal(W.shape) / np.sqrt(D)
    ms += 1
    for array, scale in ((out.HT, 4), (out.G, items * m)):
        numbers = (rng.standard_normal(array.shape) / scale).astype(FLOAT)
        array[:] = numbers.view(np.uint32) >> 16 if half else numbers  # the bits of bfloat16
    return W, ms, out


def a_pass(repeat: int, W: np.ndarray, ms: np.ndarray, out: jit.Output) -> Callable:
    """A function of `old`, `move` and `m` of `jit._tiles` that returns a call of so many passes."""
    n, lanes = len(out.total), jit._lanes(FLOAT)

    def passes(old: int, move: bool, m: int) -> Callable[[], None]:
        return lambda: jit._together(n, _pass, repeat, W, ms, lanes, old, move, m, out, RULE)

    return passes


def contenders(items: int, D: int, m: int) -> dict[str, tuple[Callable[[], None], float]]:
    """What is timed: name -> (a call, its operations in GFLOP)."""
    W, ms, out = work(items, D, m)
    n, lanes, product = len(out.total), jit._lanes(FLOAT), 2e-9 * items * D * m
    repeat = max(1, int(10 / product))

    def products(kind: int, step: int, fetch: int = 0) -> Callable[[], None]:
        return lambda: jit._together(
            n, _products, repeat, step, kind, W, lanes, m, out, np.int64(fetch)
        )

    one, passes = repeat * product, a_pass(repeat, W, ms, out)
    return {
        "W_out H^T, one tile in cache": (products(0, 0), one),
        "E G, one tile in cache": (products(3, 0), one),
        "W_out^T E, one tile in cache": (products(2, 0), one),
        "exp(W_out H^T), one tile in cache": (products(1, 0), one),
        "E G over all tiles": (products(3, 1), one),
        "E G over all tiles, next tile fetched": (products(3, 1, 1), one),
        "update pass without RMSprop": (passes(m, False, 0), one),
        "update pass": (passes(m, True, 0), one),
        "logits pass: exp(W_out H^T), W_out^T E": (passes(-1, False, m), 2 * one),
        "both in one pass": (passes(m, True, m), 3 * one),
    }


def rounded(items: int, D: int, m: int) -> dict[str, tuple[Callable[[], None], float]]:
    """The passes with products of bfloat16, as `contenders` has them; none where they cannot be."""
    if not jit.HALF:
        return {}
    product = 2e-9 * items * D * m
    repeat = max(1, int(10 / product))
    one, passes = repeat * product, a_pass(repeat, *work(items, D, m, half=True))
    return {
        "logits pass, bfloat16": (passes(-1, False, m), 2 * one),
        "update pass, bfloat16": (passes(m, True, 0), one),
        "both in one pass, bfloat16": (passes(m, True, m), 3 * one),
    }


def of_this_package(threads: int) -> list[tuple[Callable[[], None], float]]:
    """Calls of the products, operands in cache, float32, and the GFLOP of each."""
    numba.set_num_threads(threads)
    calls = [
        pair
        for shape in SHAPES.values()
        for name, pair in contenders(*shape).items()
        if name.endswith("in cache") and not name.startswith("exp")
    ]
    for call, _ in calls:
        call()
    return calls


def timed(call: Callable[[], None]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@click.command()
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=15, show_default=True)
def main(threads: int, rounds: int) -> None:
    """Print the table for both shapes."""
    numba.set_num_threads(threads)
    threadpoolctl.threadpool_limits(threads, "blas")
    about = describe_machine() | {"threads": threads, "date": time.strftime("%Y-%m-%d")}
    click.echo(str(about))
    a = np.random.default_rng(0).standard_normal((1024, 1024)).astype(FLOAT)
    for title, (items, D, m) in SHAPES.items():
        calls = contenders(items, D, m) | rounded(items, D, m)
        calls["NumPy's BLAS, 1024 x 1024 x 1024"] = (lambda: a @ a, 2e-9 * 1024**3)
        calls[PEAK] = in_registers(threads)
        for call, _ in calls.values():
            call()
        rates: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, (call, operations) in calls.items():
                time.sleep(0.1)  # no thread of a BLAS spins any more
                rates[name].append(operations / timed(call))
        medians = {name: statistics.median(values) for name, values in rates.items()}
        click.echo(f"\n{title}: I = {items:,}, D = {D}, N = {m}; GFLOP/s, share of the last line")
        for name, rate in medians.items():
            click.echo(f"  {name:42}{rate:8.1f}{rate / medians[PEAK]:8.0%}")


if __name__ == "__main__":
    main()
