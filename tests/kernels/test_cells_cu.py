"""kernels/cells.cu on the emulated device, against the reference."""

import functools

import emulator
import numpy as np
import pytest

from crnn_np.backends import reference
from crnn_np.optim import Rule

# Largest error of an array, relative to its largest element; float32: at most 5.2e-6 seen (D = 1).
LIMITS = {"float64": 1e-11, "float32": 5e-5}
GATES = {"tanh": 1, "gru": 3, "gru-sigmoid": 3}
NAMES = ["states", "cache", "ds0", "dA", "dW_h"]

device = functools.cache(emulator.EmulatedDevice)


def window(seed, T, B, D, G, pooled=False, users=None, dtype="float64"):
    """Arguments of a window with padding and new sequences in its midst, two columns to a row."""
    rng = np.random.default_rng(seed)
    users = users or B + 2
    row = np.zeros(B) if pooled else rng.integers(0, users, B)
    arrays = {
        "A": rng.normal(size=(T, B, G * D)),
        "W_h": rng.normal(size=(1 if pooled else users, D, G * D)) / np.sqrt(D),
        "event": rng.random((T, B)) < 0.8,
        "carry": rng.random((T, B)) < 0.8,
        "s0": rng.normal(size=(B, D)),
        "dH": rng.normal(size=(T, B, D)),
    }
    return {name: a.astype(dtype) for name, a in arrays.items()} | {"row": row.astype(np.int32)}


def expected(cell, init, w):
    """The reference's results, in float64."""
    w = {name: a.astype(np.float64) if a.dtype.kind == "f" else a for name, a in w.items()}
    W_h = w["W_h"] if len(w["W_h"]) == 1 else w["W_h"][w["row"]]
    events = w["event"], w["carry"]
    states, cache = reference.cell_forward(cell, w["s0"][None], init, w["A"], W_h, *events)
    back = reference.cell_backward(cell, w["dH"], states, cache, init, W_h, *events)
    return dict(zip(NAMES, (states[:, 0], cache, back[0][0], *back[1:]), strict=True))


def packed(n, dev):
    return -(-n * dev.dtype.itemsize // 16) * 16


def on_device(dev, w):
    return {name: dev.xp.asarray(a) for name, a in w.items()}


def run(dev, cell, init, w, threads, resident):
    """The kernels' results, as arrays of the device."""
    T, B, D = w["dH"].shape
    G, real, pooled = GATES[cell], dev.dtype.type, len(w["W_h"]) == 1
    d = on_device(dev, w)
    matrix = packed(G * D * D, dev) if resident else 0
    sizes = np.int32(T), np.int32(B), np.int32(D)
    states, ds0 = dev.xp.empty((T + 1, B, D), real), dev.xp.empty((B, D), real)
    dA = dev.xp.empty((T, B, G * D), real)
    dW_h = dev.xp.empty((1 if pooled else B, D, G * D), real)
    events = d["event"], d["carry"]
    common = d["W_h"], d["row"], *events
    if G == 1:
        cache, flags = dev.xp.empty((T, B, 0), real), (np.int32(resident),)
        forward = d["A"], *common, real(init), d["s0"], states, *sizes, *flags
        backward = d["dH"], *common, states, ds0, dA, *sizes, *flags
        work = packed(D, dev) + packed(max(threads, D), dev), 3 * packed(D, dev)
    else:
        cache = dev.xp.empty((T, B, 3 * D), real)
        flags = np.int32(cell == "gru"), np.int32(resident)
        forward = d["A"], *common, real(init), d["s0"], states, cache, *sizes, *flags
        backward = d["dH"], *common, real(init), states, cache, ds0, dA, *sizes, *flags
        work = (
            3 * packed(D, dev) + packed(max(threads, 2 * D), dev),
            3 * packed(D, dev) + packed(3 * D, dev),
        )
    kind = "tanh" if G == 1 else "gru"
    dev.launch(f"{kind}_forward", B, threads, forward, work[0] + matrix)
    dev.launch(f"{kind}_backward", B, threads, backward, work[1] + matrix)
    arguments = states, cache, dA, d["carry"], real(init), dW_h, *sizes
    product(dev, "recurrent_gradient", min(threads, 256), B, D, G, pooled, arguments)
    return dict(zip(NAMES, (states, cache, ds0, dA, dW_h), strict=True))


def product(dev, name, threads, B, D, G, pooled, arguments):
    across = -(-D // (threads // 2))
    tiles = -(-D // 32) if G == 1 else -(-2 * D // 32) + -(-D // 32)
    shared = 16 * (threads // 2 + 32) * dev.dtype.itemsize
    flags = np.int32(G), np.int32(pooled)
    dev.launch(name, (1 if pooled else B, across * tiles), threads, (*arguments, *flags), shared)


def error(got, want):
    """Largest difference relative to the largest element, or 0 where there is none."""
    return np.abs(got - want).max(initial=0) / max(np.abs(want).max(initial=0), 1e-300)


def compare(dev, cell, init, w, threads, resident):
    got, want = run(dev, cell, init, w, threads, resident), expected(cell, init, w)
    for name in NAMES:
        found = error(got[name].get(), want[name])
        assert found <= LIMITS[dev.dtype.name], f"{name}: {found}"


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_random_shapes(seed, dtype):
    rng = np.random.default_rng(seed)
    cell = list(GATES)[seed % 3]
    T, B = rng.integers(1, 9), rng.integers(1, 6)
    D = rng.choice([1, 2, 3, 5, 7, 8, 17, 31, 32, 33, 40])
    w = window(seed, T, B, D, GATES[cell], pooled=seed % 2, dtype=dtype)
    threads = int(rng.choice([32, 64, 128]))
    compare(device(dtype), cell, rng.choice([0.0, 0.3]), w, threads, int(rng.integers(2)))


@pytest.mark.parametrize("cell", list(GATES))
@pytest.mark.parametrize("D", [1, 67, 128])
@pytest.mark.parametrize("resident", [0, 1])
def test_units_and_block(cell, D, resident):
    w = window(D, 3, 2, D, GATES[cell], dtype="float32")
    compare(device("float32"), cell, 0.1, w, 64 if D == 67 else 256, resident)


def test_matrices_as_large_as_there_are():
    compare(device("float32"), "gru", 0.0, window(0, 2, 1, 300, 3, dtype="float32"), 1024, 0)


@pytest.mark.parametrize("cell", list(GATES))
def test_large_activations(cell):
    w = window(5, 4, 3, 6, GATES[cell])
    w["A"] *= 1e4
    compare(device("float64"), cell, 0.2, w, 32, 1)


@pytest.mark.parametrize("cell", ["tanh", "gru"])
def test_window_without_steps(cell):
    w = window(1, 0, 2, 5, GATES[cell])
    got = run(device("float64"), cell, 0.1, w, 32, 1)
    assert np.array_equal(got["states"].get(), w["s0"][None])
    assert not got["ds0"].get().any()
    assert not got["dW_h"].get().any()


@pytest.mark.parametrize("cell", ["tanh", "gru"])
def test_window_of_padding_holds_the_state(cell):
    w = window(1, 3, 2, 5, GATES[cell])
    w["event"][:], w["carry"][:] = 0, 1
    got = run(device("float64"), cell, 0.1, w, 32, 0)
    assert np.array_equal(got["states"].get(), np.broadcast_to(w["s0"], (4, 2, 5)))
    assert not got["dA"].get().any()
    assert not got["dW_h"].get().any()


@pytest.mark.parametrize("cell", ["tanh", "gru"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_same_bits_whatever_thread_goes_first(cell, dtype):
    w = window(2, 5, 3, 19, GATES[cell], dtype=dtype)
    runs = []
    for reverse in (False, True, False):
        dev = emulator.EmulatedDevice(dtype, reverse=reverse)
        runs.append(run(dev, cell, 0.1, w, 64, 1))
    for other in runs[1:]:
        assert all(np.array_equal(other[name].get(), runs[0][name].get()) for name in NAMES)


def test_matrix_in_shared_memory_or_not_gives_the_same_bits():
    w = window(3, 4, 2, 21, 3)
    a, b = (run(device("float64"), "gru", 0.1, w, 64, resident) for resident in (0, 1))
    assert all(np.array_equal(a[name].get(), b[name].get()) for name in NAMES)


@pytest.mark.parametrize("cell", ["tanh", "gru"])
def test_state_may_be_the_last_of_the_array_it_begins(cell):
    w = window(4, 3, 2, 5, GATES[cell])
    dev, G = device("float64"), GATES[cell]
    d = on_device(dev, w)
    states, cache = dev.xp.empty((4, 2, 5)), dev.xp.empty((3, 2, 3 * 5))
    states[3] = d["s0"]
    head = d["A"], d["W_h"], d["row"], d["event"], d["carry"], np.float64(0.1), states[3], states
    sizes = np.int32(3), np.int32(2), np.int32(5)
    more = (cache, *sizes, np.int32(1)) if G == 3 else sizes
    dev.launch(f"{'gru' if G == 3 else 'tanh'}_forward", 2, 32, (*head, *more, np.int32(0)), 1024)
    assert error(states.get(), expected(cell, 0.1, w)["states"]) <= LIMITS["float64"]


@pytest.mark.parametrize("cell", ["tanh", "gru"])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_update_is_gradient_and_rmsprop(cell, pooled, dtype):
    """Also: rows without an event in the window are left alone."""
    T, B, D, G = 5, 4, 9, GATES[cell]
    dev, rule = device(dtype), Rule(learning_rate=0.01)
    w = window(6, T, B, D, G, pooled, users=7, dtype=dtype)
    if not pooled:
        w["row"] = np.array([5, 0, 3, 0], np.int32)
    w["event"][:, [1, 2]] = 0
    w["event"][2, 2] = 1
    w["event"][:, 3] = 1
    ms = np.random.default_rng(7).random(w["W_h"].shape).astype(dtype)
    want, want_ms = w["W_h"].astype(np.float64), ms.astype(np.float64)
    grad = expected(cell, 0.1, w)["dW_h"]
    rows = [0] if pooled else [5, 3, 0]
    grad = reference.RowGrad(np.array(rows), grad if pooled else grad[[0, 2, 3]], len(rows))
    reference.update(rule, want, want_ms, None, 1, grad)
    got = run(dev, cell, 0.1, w, 32, 1)
    d, real = on_device(dev, w | {"ms": ms}), dev.dtype.type
    numbers = [real(x) for x in (rule.learning_rate, rule.rho, 1 - rule.rho, rule.eps)]
    arguments = got["states"], got["cache"], got["dA"], d["row"], d["event"], d["carry"]
    arguments += real(0.1), d["W_h"], d["ms"], *numbers, np.int32(T), np.int32(B), np.int32(D)
    product(dev, "recurrent_update", 64, B, D, G, pooled, arguments)
    assert error(d["W_h"].get(), want) <= LIMITS[dtype]
    assert error(d["ms"].get(), want_ms) <= LIMITS[dtype]
    if not pooled:
        assert np.array_equal(d["W_h"].get()[[1, 2, 4, 6]], w["W_h"][[1, 2, 4, 6]])
        assert np.array_equal(d["ms"].get()[[1, 2, 4, 6]], ms[[1, 2, 4, 6]])


def test_update_leaves_a_pooled_matrix_alone_without_an_event():
    w = window(8, 3, 2, 5, 3, pooled=True)
    w["event"][:] = 0
    dev = device("float64")
    got, d = run(dev, "gru", 0.1, w, 32, 1), on_device(dev, w)
    ms = dev.xp.ones((1, 5, 15))
    arguments = got["states"], got["cache"], got["dA"], d["row"], d["event"], d["carry"]
    arguments += np.float64(0.1), d["W_h"], ms, *map(np.float64, (0.1, 0.9, 0.1, 1e-8))
    product(dev, "recurrent_update", 32, 2, 5, 3, True, (*arguments, *map(np.int32, (3, 2, 5))))
    assert np.array_equal(d["W_h"].get(), w["W_h"])
    assert np.array_equal(ms.get(), np.ones((1, 5, 15)))


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("cell", ["tanh", "gru"])
@pytest.mark.parametrize(("dtype", "resident"), [("float32", 1), ("float64", 0)])
def test_under_a_sanitizer(sanitizer, cell, dtype, resident):
    dev = device(dtype, sanitizer)
    compare(dev, cell, 0.1, window(9, 3, 2, 7, GATES[cell], dtype=dtype), 64, resident)
    compare(dev, cell, 0.1, window(9, 9, 2, 35, GATES[cell], True, dtype=dtype), 32, resident)
