"""kernels/pooled.cu on the emulated device, against the reference."""

import functools

import emulator
import numpy as np
import pytest
from test_cells_cu import GATES, error, expected, on_device, window

# Largest error of an array, relative to its largest element; float32: at most 6.2e-7 seen.
LIMITS = {"float64": 1e-11, "float32": 5e-6}
NAMES = ["states", "cache", "ds0", "dA", "left"]

device = functools.cache(functools.partial(emulator.EmulatedDevice, multiprocessors=12))


def before(w, states, cache, init):
    """What W_h is multiplied by: the state before each step and, for a GRU, r times it."""
    c = w["carry"][..., None]
    h = c * states[:-1] + (1 - c) * init
    D = h.shape[-1]
    return np.stack([h, cache[..., D : 2 * D] * h] if cache.size else [h])


def run(dev, cell, init, w, units=12, columns=2, threads=64):
    """The kernels' results, as arrays of the host; what no kernel writes is NaN."""
    T, B, D = w["dH"].shape
    G, real, xp = GATES[cell], dev.dtype.type, dev.xp
    d = on_device(dev, w)
    shapes = (T + 1, B, D), (T, B, 3 * D if G == 3 else 0), (B, D), (T, B, G * D)
    states, cache, ds0, dA = (xp.empty(shape, real) for shape in shapes)
    grid = -(-D // units), -(-B // columns)
    K, tile = -(-D // (threads // 4)) * (threads // 4), 8 if columns > 1 else 1
    shared = (G * units * K + tile * K + threads // 32 * tile * units) * dev.dtype.itemsize
    kept, flags = ((cache,), (np.int32(cell == "gru"),)) if G == 3 else ((), ())
    sizes = (*map(np.int32, (T, B, D)), *flags, np.int32(units), np.int32(columns))
    counters, found = xp.zeros(32 * grid[1], np.uint32), []
    common = d["W_h"], d["event"], d["carry"], real(init)
    for name, first, arguments in (
        ("forward", "A", (d["s0"], states, *kept)),
        ("backward", "dH", (states, *kept, ds0, dA)),
    ):
        left = xp.empty((1 if G == 1 else 2, T, B, D), real)
        arguments = (d[first], *common, *arguments, left, counters, *sizes)
        dev.launch(f"pooled_{'gru' if G == 3 else 'tanh'}_{name}", grid, threads, arguments, shared)
        found.append(left.get())
    assert np.array_equal(*found, equal_nan=True)
    return dict(zip(NAMES, (*(a.get() for a in (states, cache, ds0, dA)), found[0]), strict=True))


def compare(dev, cell, init, w, **options):
    got, want = run(dev, cell, init, w, **options), expected(cell, init, w)
    want["left"] = before(w, want["states"], want["cache"], init)
    for name in NAMES:
        found = error(got[name], want[name])
        assert found <= LIMITS[dev.dtype.name], f"{name}: {found}"


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_random_shapes(seed, dtype):
    """Up to four slices of a matrix and three groups of columns."""
    rng = np.random.default_rng(seed)
    cell = list(GATES)[seed % 3]
    T, B = rng.integers(1, 6), rng.choice([1, 2, 3, 8, 9, 20])
    D = rng.choice([1, 2, 7, 12, 13, 20, 31, 40, 47])
    columns = -(-B // rng.integers(1, 4))
    units = int(rng.choice([units for units in (12, 20, 24, 60) if D <= 4 * units]))
    w = window(seed, T, B, D, GATES[cell], pooled=True, dtype=dtype)
    options = {"units": units, "columns": columns, "threads": int(rng.choice([32, 64, 96]))}
    compare(device(dtype), cell, rng.choice([0.0, 0.3]), w, **options)


@pytest.mark.parametrize("cell", ["tanh", "gru"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_same_bits_whatever_the_order_and_the_grid(cell, dtype):
    w = window(2, 4, 9, 47, GATES[cell], pooled=True, dtype=dtype)
    first = run(device(dtype), cell, 0.1, w, columns=3)
    reverse = emulator.EmulatedDevice(dtype, reverse=True, multiprocessors=12)
    for dev, units, columns in ((reverse, 12, 3), (device(dtype), 20, 9), (device(dtype), 60, 1)):
        other = run(dev, cell, 0.1, w, units=units, columns=columns)
        assert all(np.array_equal(other[name], first[name]) for name in NAMES)


@pytest.mark.parametrize("cell", ["tanh", "gru"])
@pytest.mark.parametrize("columns", [1, 2])
def test_a_window_without_steps_and_one_of_padding(cell, columns):
    w = window(1, 0, 2, 14, GATES[cell], pooled=True)
    got = run(device("float64"), cell, 0.1, w, columns=columns)
    assert np.array_equal(got["states"], w["s0"][None])
    assert not got["ds0"].any()
    w = window(1, 3, 2, 14, GATES[cell], pooled=True)
    w["event"][:], w["carry"][:] = 0, 1
    got = run(device("float64"), cell, 0.1, w, columns=columns)
    assert np.array_equal(got["states"], np.broadcast_to(w["s0"], (4, 2, 14)))
    assert not got["dA"].any()


@pytest.mark.parametrize("cell", ["tanh", "gru"])
def test_a_state_that_is_no_number_stays_in_its_column(cell):
    """Also in one product with others, and where the vectors have been filled up."""
    w = window(3, 2, 5, 13, GATES[cell], pooled=True)
    w["carry"][:] = 1
    sound = run(device("float64"), cell, 0.1, w, columns=5)
    w["s0"][2] = np.nan
    got = run(device("float64"), cell, 0.1, w, columns=5)
    assert np.isnan(got["states"][:, 2]).all()
    others = [0, 1, 3, 4]
    assert np.array_equal(got["states"][:, others], sound["states"][:, others])
    assert np.array_equal(got["ds0"][others], sound["ds0"][others])


def test_the_shape_of_a_large_network():
    """Seven columns of 20 units, as an H100 has D = 768 and 20 columns."""
    w = window(4, 1, 7, 60, 3, pooled=True, dtype="float32")
    compare(device("float32"), "gru", 0.0, w, units=20, columns=7, threads=256)


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize(("cell", "columns"), [("tanh", 2), ("gru", 1), ("gru", 2)])
def test_under_a_sanitizer(sanitizer, cell, columns):
    dev = emulator.EmulatedDevice("float32", sanitizer)
    w = window(9, 3, 2 * columns, 23, GATES[cell], pooled=True, dtype="float32")
    compare(dev, cell, 0.1, w, columns=columns, threads=32)
