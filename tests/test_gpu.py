"""The CUDA backend against the reference, on the emulated device and, where there is one, a GPU."""

import ctypes.util
import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import emulator
import numpy as np
import pytest
import test_golden
from click.testing import CliRunner
from conftest import SMALL, emulate
from test_golden import trace  # noqa: F401, a fixture
from test_training import KINDS, SIZES, errors, random_log

from crnn_np import CollaborativeRNN, backends, gradcheck, model, training
from crnn_np.backends import gpu, reference
from crnn_np.data import cut_tail, from_sequences
from crnn_np.errors import DeviceError, SettingsError
from crnn_np.evaluation import evaluate, read_past
from crnn_np.model import RowGrad, Spec
from crnn_np.optim import Rule
from crnn_np.windows import Plan, Slice, epoch_slices

EXACT = 1e-11
ROUNDED = 1.5e-5  # float32, as a share of the block's largest
DTYPES = ["float32", "float64"]


def there(*arrays):
    """The arrays on the device."""
    return [gpu.to_device(np.ascontiguousarray(array)) for array in arrays]


def back(*arrays):
    """The arrays on the host."""
    return [gpu.to_host(array) for array in arrays]


def run_epochs(backend, spec, rule, plan, log, start, n_epochs, fused=True):
    """As in `test_training`, on the backend's own arrays; by the loop where not `fused`."""
    start = type(start)(*(block.astype(spec.dtype) for block in start))
    params = model.on_device(backend, start)
    acc = model.on_device(backend, model.new_accumulators(start))
    work = training.workspace(backend, spec, plan, log) if fused else None
    past = model.on_device(backend, read_past(spec, log))
    run_of = backend if fused else SimpleNamespace(**{n: getattr(backend, n) for n in FUNCTIONS})
    loss, events = 0.0, 0
    for epoch in range(1, n_epochs + 1):
        s = backend.to_device(np.zeros((1, plan.batch, spec.hidden_size), spec.dtype))
        run = epoch_slices(plan, log.lengths, epoch)
        part = training.train_run(
            run_of, spec, rule, plan.scale, params, acc, s, log, run, work, past
        )
        loss, events = loss + part[0], events + part[1]
    host = SimpleNamespace(to_device=backend.to_host)
    params, acc = model.on_device(host, params), model.on_device(host, acc)
    return SimpleNamespace(params=params, acc=acc, loss=loss, events=events, s=backend.to_host(s))


FUNCTIONS = backends.FUNCTIONS


def assert_same_run(
    cupy, spec, rule, plan, log, start, n_epochs=1, windows=20, fused=True, rounded=ROUNDED
):
    """Both precisions on the device against the loop over `step` of the reference in float64."""
    steps = sum(epoch_slices(plan, log.lengths, e).key.size for e in range(1, n_epochs + 1))
    assert steps >= windows
    exact = Spec(**{**vars(spec), "dtype": "float64"})
    expected = run_epochs(reference, exact, rule, plan, log, start, n_epochs, fused=False)
    for dtype, limit in (("float64", EXACT), ("float32", rounded)):
        own = Spec(**{**vars(spec), "dtype": dtype})
        found = run_epochs(cupy, own, rule, plan, log, start, n_epochs, fused)
        assert all(np.isfinite(block).all() for block in (*found.params, *found.acc))
        assert found.events == expected.events
        assert found.acc.step.tolist() == [steps]
        np.testing.assert_array_equal(found.acc.stamp, expected.acc.stamp)
        for block, error in errors(found, expected).items():
            assert error <= limit, f"{dtype} {block}: {error:.1e}, limit {limit:.0e}"


# Functions of one window


@pytest.mark.parametrize("limit", [row for row in gradcheck.LIMITS if row.backend == "cupy"])
def test_every_gradient(cupy, limit):
    failed = [row for row in gradcheck.check(limit) if not row.passed]
    assert not failed


def test_windows_are_those_of_the_reference(cupy):
    log = from_sequences([[3, 1, 2], [], [0, 2, 4, 4, 1]], 5)
    run = epoch_slices(Plan(batch=2, window=2), log.lengths, 1)
    for k in range(run.key.size):
        found = cupy.window(log, run.one(k), "float32")
        for one, other in zip(found, reference.window(log, run.one(k), "float32"), strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(cupy.to_host(one), other)


def test_two_hundred_shapes_of_a_cell(cupy):
    rng = np.random.default_rng(5)
    for k in range(200):
        cell = ("tanh", "gru", "gru-sigmoid")[k % 3]
        T, B, D = rng.integers(1, 7), rng.integers(1, 5), rng.choice([1, 2, 3, 5, 8, 17, 33, 40])
        G = reference.CELLS[cell].gates
        s0, A = rng.standard_normal((1, B, D)), rng.standard_normal((T, B, G * D))
        W_h = rng.standard_normal((rng.choice([1, B]), D, G * D)) / np.sqrt(D)
        event, carry = (rng.random((T, B)) < 0.8).astype(float), (rng.random((T, B)) < 0.8) * 1.0
        dH, init = rng.standard_normal((T, B, D)), rng.normal()
        expected = reference.cell_forward(cell, s0, init, A, W_h, event, carry)
        wanted = reference.cell_backward(cell, dH, *expected, init, W_h, event, carry)
        dtype, limit = (("float64", EXACT), ("float32", 1e-5))[k % 2]
        s0, A, W_h, event, carry, dH = there(
            *(a.astype(dtype) for a in (s0, A, W_h, event, carry, dH))
        )
        states, cache = cupy.cell_forward(cell, s0, init, A, W_h, event, carry)
        found = cupy.cell_backward(cell, dH, states, cache, init, W_h, event, carry)
        kept = (cache,) if G == 3 else ()
        for one, other in zip((*found, states, *kept), (*wanted, *expected), strict=False):
            assert gradcheck.block_error(cupy.to_host(one), other) <= limit, (cell, T, B, D)


def deal_out(cupy, monkeypatch, G, D):
    """Devices in whose shared memory a block has no room for the matrix, but all together have."""
    for dtype in DTYPES:
        size = G * D * D * np.dtype(dtype).itemsize
        monkeypatch.setattr(cupy.device(dtype), "shared_limit", size - 1)


@pytest.mark.parametrize("cell", ["tanh", "gru", "gru-sigmoid"])
def test_shapes_of_a_pooled_cell_that_is_dealt_out(cupy, monkeypatch, cell):
    rng, G = np.random.default_rng(6), reference.CELLS[cell].gates
    for k in range(12):
        T, B, D = rng.integers(1, 5), rng.choice([1, 2, 5, 9, 20]), rng.choice([45, 47, 48])
        deal_out(cupy, monkeypatch, G, D)
        s0, A = rng.standard_normal((1, B, D)), rng.standard_normal((T, B, G * D))
        W_h, dH = rng.standard_normal((1, D, G * D)) / np.sqrt(D), rng.standard_normal((T, B, D))
        event, carry = (rng.random((T, B)) < 0.8).astype(float), (rng.random((T, B)) < 0.8) * 1.0
        init = rng.normal()
        expected = reference.cell_forward(cell, s0, init, A, W_h, event, carry)
        wanted = reference.cell_backward(cell, dH, *expected, init, W_h, event, carry)
        dtype, limit = (("float64", EXACT), ("float32", 1e-5))[k % 2]
        s0, A, W_h, event, carry, dH = there(
            *(a.astype(dtype) for a in (s0, A, W_h, event, carry, dH))
        )
        assert gpu._slices(gpu.device(dtype), gpu.Shape(cell, T, B, D))
        states, cache = cupy.cell_forward(cell, s0, init, A, W_h, event, carry)
        found = cupy.cell_backward(cell, dH, states, cache, init, W_h, event, carry)
        kept = (cache,) if G == 3 else ()
        for one, other in zip((*found, states, *kept), (*wanted, *expected), strict=False):
            assert gradcheck.block_error(cupy.to_host(one), other) <= limit, (cell, T, B, D)


@pytest.mark.parametrize(
    ("cell", "B", "D", "expected"),
    [
        ("gru", 20, 768, (20, 7, (39, 3))),
        ("gru", 1, 768, (12, 1, (64, 1))),
        ("gru", 20, 1024, (12, 20, (86, 1))),
        ("gru", 20, 256, (12, 4, (22, 5))),
        ("tanh", 64, 768, (48, 8, (16, 8))),
        ("gru", 20, 128, None),
        ("gru", 20, 2048, None),
    ],
)
def test_how_an_h100_deals_out_a_pooled_matrix(cell, B, D, expected):
    h100 = SimpleNamespace(dtype=np.dtype("float32"), shared_limit=232448, multiprocessors=132)
    found = gpu._slices(h100, gpu.Shape(cell, 64, B, D))
    assert (found and found[:3]) == expected


def test_two_hundred_shapes_of_the_softmax(cupy, monkeypatch):
    rng = np.random.default_rng(6)
    for k in range(200):
        N, I, D = rng.integers(0, 12), rng.integers(1, 70), rng.integers(1, 9)
        monkeypatch.setattr(cupy, "LOGITS_BYTES", int(rng.choice([1 << 29, 2000])))
        H, W_out = rng.standard_normal((N, D)), rng.standard_normal((I, D))
        W_out *= rng.choice([1, 30, 1e4]) / np.abs(H @ W_out.T).max(initial=1e-3)
        y = rng.integers(0, I, N).astype(np.int32)
        dtype, limit = (("float64", 1e-13), ("float32", 4e-6))[k % 2]
        H, W_out = H.astype(dtype), W_out.astype(dtype)
        expected = reference.output("softmax", H.astype(float), W_out.astype(float), y)
        loss, dH, dW_out = cupy.output("softmax", *there(H, W_out, y))
        assert loss == pytest.approx(expected[0], rel=limit, abs=limit * N)
        dH, dW_out = back(dH, dW_out)
        assert np.abs(dH - expected[1]).max(initial=0) <= limit * np.abs(W_out).max()
        assert np.abs(dW_out - expected[2]).max() <= limit * np.abs(H).sum(axis=0).max(initial=1)
        assert (dH.dtype, dW_out.dtype) == (dtype, dtype)
        nll, rank = back(*cupy.score("softmax", *there(H, W_out, y)))
        wanted, ranks = reference.score("softmax", H, W_out, y)
        np.testing.assert_allclose(nll, wanted, rtol=limit, atol=limit)
        assert (nll.dtype, rank.dtype) == (np.float64, np.int32)
        if dtype == "float64":
            np.testing.assert_array_equal(rank, ranks)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_tie_against_us(cupy, dtype):
    rng = np.random.default_rng(2)
    for n_items, D in ((1, 1), (40, 5), (67, 33)):
        row = rng.standard_normal((1, D)).astype(dtype)
        H = rng.standard_normal((9, D)).astype(dtype)
        y = rng.integers(0, n_items, 9).astype(np.int32)
        nll, rank = back(*cupy.score("softmax", *there(H, np.repeat(row, n_items, 0), y)))
        assert (rank == n_items).all()
        assert nll == pytest.approx(np.log(n_items), abs=1e-6)


def test_a_score_that_is_no_number_ranks_last(cupy):
    H = np.full((1, 2), np.nan)
    nll, rank = back(*cupy.score("softmax", *there(H, np.ones((50, 2)), np.array([3]))))
    assert np.isnan(nll).all()
    assert rank.tolist() == [50]


@pytest.mark.parametrize("shape", [(), (3,), (2, 5), (700,)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(cupy, shape, dtype):
    rng = np.random.default_rng(3)
    for M in (0, 1, 2, 33, 100):
        table = rng.standard_normal((12, *shape)).astype(dtype)
        index = rng.integers(0, 12, M).astype(np.int32)
        taken = cupy.to_host(cupy.take_rows(*there(table, index)))
        np.testing.assert_array_equal(taken, table[index])
        grad = cupy.sum_rows(*there(index, taken))
        expected = reference.sum_rows(index, taken)
        assert grad.count == expected.count
        rows, values = back(*grad[:2])
        assert (rows.dtype, values.dtype, values.shape) == (np.int32, dtype, taken.shape)
        np.testing.assert_array_equal(rows, expected.rows)
        limit = 1e-14 if dtype == "float64" else 2e-6
        np.testing.assert_allclose(values, expected.values, rtol=limit, atol=limit)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_update_of_rows(cupy, dtype, dense):
    rng, rule = np.random.default_rng(4), Rule(learning_rate=0.3, rho=0.9, eps=1e-3)
    W, ms = rng.standard_normal((2, 9, 50)).astype(dtype)
    ms = np.abs(ms)
    stamp = rng.integers(0, 40, 9) if dense else None
    rows = np.array([7, 0, 3, 0, 0], np.int32)
    grad = RowGrad(rows, rng.standard_normal((5, 50)).astype(dtype), 3)
    W_, ms_ = there(W.copy(), ms.copy())
    stamp_ = gpu.to_device(stamp.copy()) if dense else None
    moved = RowGrad(*there(*grad[:2]), 3)
    cupy.update(rule, W_, ms_, stamp_, 41, moved)
    reference.update(rule, W, ms, stamp, 41, grad)
    limit = 1e-14 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(gpu.to_host(W_), W, rtol=limit, atol=limit)
    np.testing.assert_allclose(gpu.to_host(ms_), ms, rtol=limit, atol=limit)
    if dense:
        np.testing.assert_array_equal(gpu.to_host(stamp_), stamp)


def test_update_without_a_row_changes_nothing(cupy):
    W, ms, rows, values = there(np.ones((3, 2)), np.ones((3, 2)), np.zeros(0, int), np.ones((0, 2)))
    cupy.update(Rule(), W, ms, None, 7, RowGrad(rows, values, 0))
    assert (cupy.to_host(W) == 1).all()


# Runs


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("W_in_rows", ["touched", "dense"])
@pytest.mark.parametrize("sharing", ["collaborative", "pooled"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_a_run_is_the_loop_over_steps(cupy, kind, sharing, W_in_rows, dropout, fused):
    spec = Spec(
        hidden_size=5,
        sharing=sharing,
        init_state=0.2,
        dropout_in=dropout,
        dropout_out=dropout,
        **KINDS[kind],
    )
    rule = Rule(W_in_rows=W_in_rows)
    plan = Plan(batch=3, window=4, order="length", loss_scale="mean", seed=4)
    log = random_log(np.random.default_rng(3), [1, 4, 0, 9, 25, 12, 17, 30, 2], 60)
    start = model.initialise(spec, log.n_users, log.n_items, 1)
    assert_same_run(cupy, spec, rule, plan, log, start, 2 if fused else 1, 14, fused)


@pytest.mark.parametrize("kind", ["tanh", "gru", "gru-sigmoid"])
def test_a_run_with_a_matrix_that_is_dealt_out(cupy, monkeypatch, kind):
    deal_out(cupy, monkeypatch, 1 if kind == "tanh" else 3, 47)
    spec = Spec(
        hidden_size=47,
        sharing="pooled",
        init_state=0.2,
        dropout_in=0.3,
        dropout_out=0.3,
        **KINDS[kind],
    )
    rule = Rule(learning_rate=0.005, rho=0.9, eps=1e-2)
    plan = Plan(batch=3, window=4, order="length", loss_scale="mean", seed=4)
    log = random_log(np.random.default_rng(3), [1, 4, 0, 9, 12, 17, 2], 60)
    start = model.initialise(spec, log.n_users, log.n_items, 1)
    assert_same_run(cupy, spec, rule, plan, log, start, windows=6)


@pytest.mark.parametrize("case", [name for name in SIZES if "wide" not in name])
def test_a_run_of_odd_sizes(cupy, case):
    n_items, D, T, B, lengths = SIZES[case]
    lengths = [min(n, -(-200 // T) * T) for n in lengths]
    spec = Spec(hidden_size=D)
    rule = Rule(learning_rate=0.005, rho=0.9, eps=1e-2)
    plan = Plan(batch=B, window=T)
    log = random_log(np.random.default_rng(7), lengths, n_items)
    start = model.initialise(spec, log.n_users, n_items, 1)
    assert_same_run(cupy, spec, rule, plan, log, start, windows=5)


REAL_SIZES = {  # settings, items, B, T
    "Last.fm": ({"hidden_size": 128}, 5000, 20, 64),
    "Last.fm, one user": ({"hidden_size": 128, "dropout_out": 0.5}, 4096, 1, 128),
    "Brightkite": ({"hidden_size": 32, "dropout_in": 0.2}, 23243, 20, 64),
    "tanh": ({"hidden_size": 240, "cell": "tanh"}, 3000, 5, 16),
    "a matrix of their own too large": ({"hidden_size": 300}, 3000, 3, 32),
    "one matrix": ({"hidden_size": 200, "sharing": "pooled", "candidate": "sigmoid"}, 3000, 20, 32),
    "mixture": ({"hidden_size": 32, "output": "mixture", "pointers": 2}, 3000, 4, 64),
}
# On the emulated device too: 4 to 12 s each.
EMULATED = ["Last.fm, one user", "tanh", "a matrix of their own too large", "mixture"]
REAL_RUNS = [("emulator", case) for case in EMULATED]
REAL_RUNS += [pytest.param("device", case, marks=pytest.mark.gpu) for case in REAL_SIZES]


@pytest.mark.parametrize(("unshrunk", "case"), REAL_RUNS, indirect=["unshrunk"])
def test_a_run_of_real_sizes(unshrunk, case, monkeypatch):
    """Blocks of 1024 threads with all the shared memory there is, tiles of 2048 items."""
    settings, n_items, B, T = REAL_SIZES[case]
    monkeypatch.setattr(unshrunk, "LOGITS_BYTES", 1 << 24)  # of 5000 items: 834 cells in float32
    spec, plan = Spec(**settings), Plan(batch=B, window=T, loss_scale="mean")
    log = random_log(np.random.default_rng(5), [2 * T + 2] * B + [T // 2], n_items)
    start = model.initialise(spec, log.n_users, n_items, 1)
    assert_same_run(unshrunk, spec, Rule(eps=1e-4), plan, log, start, windows=4)


@pytest.mark.parametrize("size", [20, 1e4])
def test_a_run_with_large_logits(cupy, size):
    spec = Spec(hidden_size=4, cell="tanh", init_state=0.5, dtype="float64")
    rule = Rule(learning_rate=0.01, rho=0.9, eps=1e-2)
    plan = Plan(batch=2, window=6, loss_scale="mean")
    log = random_log(np.random.default_rng(8), [60, 50, 44, 20], 70)
    start = model.initialise(spec, log.n_users, log.n_items, 1)
    start = start._replace(W_in=3 * start.W_in)
    H = np.tanh(start.W_in)
    start = start._replace(W_out=start.W_out * size / np.abs(H @ start.W_out.T).max())
    expected = run_epochs(reference, spec, rule, plan, log, start, 1, fused=False)
    found = run_epochs(cupy, spec, rule, plan, log, start, 1)
    assert max(errors(found, expected).values()) <= EXACT
    single = Spec(**{**vars(spec), "dtype": "float32"})
    found = run_epochs(cupy, single, rule, plan, log, start, 1)
    assert all(np.isfinite(block).all() for block in (*found.params, *found.acc))
    assert found.loss == pytest.approx(expected.loss, rel=2e-7)


def test_windows_without_a_target_or_an_event(cupy):
    """They decay W_out's accumulator, and hold the states; an event alone touches its rows."""
    log = from_sequences([[0, 1, 2, 3, 1, 0], [2], [3, 3, 1]], 4)
    user = np.array([[0, 1], [0, 1], [1, 0], [2, 1], [0, 2]], np.int32)
    length = np.array([[3, 0], [0, 0], [1, 0], [0, 0], [3, 2]], np.int32)
    start = np.array([[0, 0], [0, 0], [0, 0], [0, 0], [3, 0]], np.int64)
    fresh = np.array([[1, 0], [0, 0], [1, 0], [0, 0], [0, 1]], bool)
    target_from = np.array([[2, 0], [0, 0], [0, 0], [0, 0], [0, 0]], np.int64)
    run = Slice(user, start, length, fresh, target_from, np.arange(5, dtype=np.uint64))
    spec, rule = Spec(hidden_size=3, dropout_in=0.3, dtype="float64"), Rule()
    begin = model.initialise(spec, 3, 4, 1)
    found = []
    for backend in (backends.get("numba"), cupy):
        params = model.on_device(backend, type(begin)(*(block.copy() for block in begin)))
        acc = model.on_device(backend, model.new_accumulators(begin))
        s = backend.to_device(np.full((1, 2, 3), 0.3))
        work = backend.workspace(spec, 4, 2, 3)
        loss = training.train_run(backend, spec, rule, 1.0, params, acc, s, log, run, work)
        found.append([*loss, *map(backend.to_host, (*params, *acc, s))])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-13)


def test_a_run_is_fifteen_launches_a_window(monkeypatch):
    """Ten kernels and three products, two of which go on with a last tile that is shorter."""
    emulate(monkeypatch)
    dev, products = gpu.device("float32"), []
    product = dev.product
    monkeypatch.setattr(dev, "product", lambda *a, **more: products.append(product(*a, **more)))
    log = from_sequences([np.arange(90) % 20, np.arange(90) % 17], 20)
    spec, plan = Spec(hidden_size=4), Plan(batch=2, window=10)
    run_epochs(gpu, spec, Rule(), plan, log, model.initialise(spec, 2, 20, 0), 1)
    windows = epoch_slices(plan, log.lengths, 1).key.size
    kernels = sum(dev.launches.values()) - dev.launches["read_windows"]
    assert dev.launches["read_windows"] == 1
    assert (kernels, len(products)) == (10 * windows, 5 * windows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_trajectory_of_the_authors(cupy, trace, dtype):  # noqa: F811
    settings = SimpleNamespace(
        rule=test_golden.oracle.Rule(
            learning_rate=float(trace["learning_rate"]),
            rho=float(trace["rho"]),
            eps=float(trace["epsilon"]),
        ),
        scale=1.0 / float(trace["batch_size"] * trace["window"]),
    )
    spec, rule, start, squares = test_golden.package(trace, settings, dtype)
    params, acc = model.on_device(cupy, start), model.on_device(cupy, squares)
    log, run = test_golden.read_run(trace)
    batch, window = int(trace["batch_size"]), int(trace["window"])
    work = cupy.workspace(spec, log.n_items, batch, window)
    s = cupy.to_device(np.zeros((1, batch, spec.hidden_size), dtype))
    for begin, end, when in ((0, 6, "after06"), (6, test_golden.STEPS, "final")):
        part = run.part(begin, end)
        loss, events = training.train_run(
            cupy, spec, rule, settings.scale, params, acc, s, log, part, work
        )
        steps = [test_golden.read_step(trace, k) for k in range(begin, end)]
        cost = sum(step.cost.sum(dtype=float) for step in steps)
        test_golden.assert_close(loss, cost, test_golden.COST * len(steps), "cost")
        assert events == sum(step.window.target.sum() for step in steps)
        test_golden.assert_parameters(trace, when, back(*params), back(*acc[:3]))


def test_a_long_run_goes_in_parts(cupy, monkeypatch):
    log = random_log(np.random.default_rng(3), [25, 12, 17], 20)
    spec, plan = Spec(hidden_size=4, dropout_in=0.2), Plan(batch=2, window=4)
    start = model.initialise(spec, 3, 20, 1)
    whole = run_epochs(cupy, spec, Rule(W_in_rows="dense"), plan, log, start, 1)
    monkeypatch.setattr(cupy, "RUN_BYTES", 1200)
    parts = run_epochs(cupy, spec, Rule(W_in_rows="dense"), plan, log, start, 1)
    if isinstance(cupy.device("float32"), emulator.EmulatedDevice):
        assert cupy.device("float32").launches["read_windows"] > 4
    assert parts.loss == pytest.approx(whole.loss, rel=1e-14)
    assert parts.events == whole.events
    for one, other in zip((*parts.params, *parts.acc), (*whole.params, *whole.acc), strict=True):
        np.testing.assert_array_equal(one, other)


def test_clipping_goes_through_step(cupy):
    log = random_log(np.random.default_rng(3), [25, 12, 17], 20)
    spec, plan = Spec(hidden_size=4, dtype="float64"), Plan(batch=2, window=4)
    start = model.initialise(spec, 3, 20, 1)
    rule = Rule(clip=0.5)
    expected = run_epochs(reference, spec, rule, plan, log, start, 1, fused=False)
    found = run_epochs(cupy, spec, rule, plan, log, start, 1)
    assert max(errors(found, expected).values()) <= EXACT


def small_run():
    """Bytes of all that a short run with ragged windows writes."""
    spec = Spec(hidden_size=3, dropout_in=0.3, dropout_out=0.3)
    rule, plan = Rule(W_in_rows="dense"), Plan(batch=2, window=3)
    log = random_log(np.random.default_rng(3), [5, 3], 20)
    start = model.initialise(spec, log.n_users, log.n_items, 1)
    found = run_epochs(gpu, spec, rule, plan, log, start, 1)
    return b"".join(block.tobytes() for block in (*found.params, *found.acc, found.s))


def test_the_order_of_threads_does_not_count(monkeypatch):
    emulate(monkeypatch)
    forwards = small_run()
    emulate(monkeypatch, reverse=True)
    assert small_run() == forwards


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_kernels_under_the_sanitizers(monkeypatch, sanitizer):
    """Those of the output layer and of rows; `tests/kernels` has the others."""
    monkeypatch.setitem(SMALL, "THREADS", 32)
    monkeypatch.setitem(SMALL, "CELL_THREADS", 32)
    emulate(monkeypatch)
    plain = small_run()
    emulate(monkeypatch, sanitizer=sanitizer)
    assert small_run() == plain
    rng = np.random.default_rng(1)
    H, W_out = there(*(rng.standard_normal((n, 3)).astype(np.float32) for n in (5, 37)))
    y = gpu.to_device(np.array([0, 36, 16, 15, 3], np.int32))
    gpu.score("softmax", H, W_out, y)
    grad = gpu.sum_rows(y, H)
    gpu.update(Rule(), W_out, gpu.device().xp.zeros((37, 3), np.float32), None, 1, grad)


# The whole path


LOG = random_log(np.random.default_rng(2), [30, 9, 14, 1, 22, 3, 40], 30)
TRAIN, HELDOUT = cut_tail(LOG, np.minimum(3, LOG.lengths - 1))


@pytest.mark.parametrize("options", [{}, {"patience": 1}, {"patience": 1, "refit": False}])
def test_the_estimator_is_that_of_the_reference(cupy, options):
    settings = {
        "hidden_size": 4,
        "dtype": "float64",
        "batch": 3,
        "window": 8,
        "epochs": 3,
        "dropout_out": 0.2,
        "validation_range": (2, 4),
        **options,
    }
    slow = CollaborativeRNN(backend="numpy", **settings).fit(TRAIN)
    fast = CollaborativeRNN(backend="cupy", **settings).fit(TRAIN)
    assert [r[:3] for r in fast.reports] == [r[:3] for r in slow.reports]
    for one, other in zip(fast.params, slow.params, strict=True):
        assert isinstance(one, np.ndarray)
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-11)
    found, wanted = fast.evaluate(TRAIN, HELDOUT), slow.evaluate(TRAIN, HELDOUT)
    assert found == {k: pytest.approx(v, rel=1e-10) for k, v in wanted.items()}


def test_a_run_repeats_to_the_byte_and_goes_on_from_a_checkpoint(cupy, tmp_path):
    settings = {"hidden_size": 8, "batch": 3, "window": 8, "dropout_in": 0.2, "seed": 1}
    settings["patience"] = 0
    models = [CollaborativeRNN(backend="cupy", epochs=2, **settings).fit(TRAIN) for _ in range(2)]
    CollaborativeRNN(backend="cupy", epochs=1, **settings).fit(TRAIN, checkpoint=tmp_path / "c")
    again = CollaborativeRNN(backend="cupy", epochs=2, **settings)
    models.append(again.fit(TRAIN, checkpoint=tmp_path / "c"))
    models.append(CollaborativeRNN(backend="cupy", epochs=1, **settings).fit(TRAIN))
    models[-1].partial_fit(TRAIN)
    digests = {b"".join(block.tobytes() for block in (*m.params, *m.accumulators)) for m in models}
    assert len(digests) == 1


def test_evaluation_in_float32(cupy):
    spec = Spec(hidden_size=5)
    params = model.initialise(spec, LOG.n_users, LOG.n_items, 3)
    found = evaluate(cupy, spec, params, TRAIN, HELDOUT, per_user=True)
    wanted = evaluate(reference, spec, params, TRAIN, HELDOUT, per_user=True)
    assert found["nll"] == pytest.approx(wanted["nll"], rel=1e-6)
    np.testing.assert_allclose(found["per_user"]["nll"], wanted["per_user"]["nll"], rtol=1e-5)


def test_two_logs_take_turns_on_one_workspace(cupy):
    spec, plan, rule = Spec(hidden_size=3), Plan(batch=2, window=5), Rule()
    logs = [random_log(np.random.default_rng(k), [20, 9], 12) for k in (1, 2, 1)]
    work, found = cupy.workspace(spec, 12, 2, 5), []
    for log in logs:
        start = model.initialise(spec, 2, 12, 0)
        params = model.on_device(cupy, start)
        acc = model.on_device(cupy, model.new_accumulators(start))
        s = cupy.to_device(np.zeros((1, 2, 3), np.float32))
        run = epoch_slices(plan, log.lengths, 1)
        training.train_run(cupy, spec, rule, 1.0, params, acc, s, log, run, work)
        found.append(b"".join(block.tobytes() for block in back(*params)))
    assert found[0] == found[2] != found[1]


def test_the_command_checks_what_is_there(monkeypatch):
    limits = [row for row in gradcheck.LIMITS if row.backend != "numba"]
    monkeypatch.setattr(gradcheck, "LIMITS", [row for row in limits if row.dtype == "float64"])
    monkeypatch.setattr(gradcheck, "OWN_BLOCKS", {"softmax": ()})
    monkeypatch.setattr(gradcheck, "CASES", gradcheck.CASES[1:3])
    emulate(monkeypatch)
    result = CliRunner().invoke(gradcheck.main, ["--backend", "cupy"])
    assert (result.exit_code, result.output.count(" ok\n")) == (0, 30)
    assert "30 of 30 blocks passed" in result.output

    def missing(dtype="float32"):
        raise DeviceError("none")

    monkeypatch.setattr(gpu, "device", missing)
    result = CliRunner().invoke(gradcheck.main, [])
    assert result.exit_code == 0
    assert "-- cupy: not checked: none\n30 of 30 blocks passed" in result.output


# What can't be done


def full(*args):
    raise MemoryError("allocated so far: 80,000,000,000 bytes")


def test_out_of_memory(monkeypatch):
    emulate(monkeypatch)
    monkeypatch.setattr(gpu, "TILE", 2048)
    monkeypatch.setattr(gpu.device().xp, "empty", full, raising=False)
    with pytest.raises(DeviceError) as caught:
        gpu.workspace(Spec(hidden_size=128), 48188, 20, 64)
    for part in ("0.30 GB are needed for E 0.25 GB, dW_out 0.02 GB", "80,000", "lower hidden_size"):
        assert part in str(caught.value)


def test_no_room_for_the_parameters(monkeypatch):
    emulate(monkeypatch)
    monkeypatch.setattr(gpu.device().xp, "asarray", full, raising=False)
    with pytest.raises(DeviceError, match=r"0\.00 GB are needed for an array of shape \(1, 2, 2\)"):
        CollaborativeRNN(backend="cupy", hidden_size=2, cell="tanh", output="softmax").fit(
            from_sequences([[0, 1, 2] * 3])
        )


@pytest.mark.parametrize("output", ["softmax", "mixture"])
def test_no_room_for_what_a_window_makes_anew(monkeypatch, output):
    """With clipping and in a validation, whichever kernel's function it is."""
    emulate(monkeypatch)
    spec = Spec(hidden_size=4, output=output, memory=5)
    plan = Plan(batch=2, window=8, epochs=1, patience=1, validation_range=(2, 4))
    run, failing = emulator.EmulatedDevice.launch, []

    def launches(dev, name, *arguments, **more):
        if name in failing:
            full()
        run(dev, name, *arguments, **more)

    monkeypatch.setattr(emulator.EmulatedDevice, "launch", launches)
    epoch = (spec, Rule(clip=1.0), plan, LOG)
    next(training.epochs(*epoch, backend="cupy"))
    for name in list(gpu.device("float32").launches):
        failing[:] = [name]
        with pytest.raises(DeviceError, match=r"the device is out of memory \(allocated so far"):
            next(training.epochs(*epoch, backend="cupy"))


def test_a_matrix_that_does_not_fit_is_streamed_and_a_state_that_does_not_is_an_error(monkeypatch):
    spec, plan = Spec(hidden_size=33, dtype="float64"), Plan(batch=2, window=4)
    start = model.initialise(spec, LOG.n_users, LOG.n_items, 3)
    found = []
    for limit in (1 << 17, 1 << 14):
        emulate(monkeypatch, shared_limit=limit)
        found.append(run_epochs(gpu, spec, Rule(), plan, LOG, start, 1))
    for one, other in zip(found[0].params, found[1].params, strict=True):
        np.testing.assert_array_equal(one, other)
    emulate(monkeypatch, shared_limit=500)
    with pytest.raises(SettingsError, match="hidden_size is 33: the device has 500 bytes"):
        run_epochs(gpu, spec, Rule(), plan, LOG, start, 1)


# The real device's class, with a CuPy that is made up


class Memory:
    """What `Device.product` needs of a CuPy array."""

    def __init__(self, host):
        self.host, self.dtype, self.itemsize = host, host.dtype, host.itemsize
        self.shape, self.strides, self.ndim = host.shape, host.strides, host.ndim
        self.data = SimpleNamespace(ptr=host.ctypes.data)

    def __len__(self):
        return len(self.host)


def gemm(handle, turn_a, turn_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
    """cuBLAS's sgemm, in plain Python on the memory itself: column-major."""

    def value(pointer, at):
        return ctypes.c_float.from_address(pointer + 4 * at)

    for i in range(m):
        for j in range(n):
            total = 0.0
            for r in range(k):
                one = value(a, i * lda + r if turn_a else r * lda + i).value
                total += one * value(b, r * ldb + j if turn_b else j * ldb + r).value
            out = value(c, j * ldc + i)
            scale = value(beta, 0).value
            out.value = value(alpha, 0).value * total + (scale * out.value if scale else 0.0)


def gemms(handle, ta, tb, m, n, k, alpha, a, lda, sa, b, ldb, sb, beta, c, ldc, sc, count):
    """sgemmStridedBatched."""
    for q in range(count):
        parts = (a + 4 * q * sa, lda, b + 4 * q * sb, ldb, beta, c + 4 * q * sc, ldc)
        gemm(handle, ta, tb, m, n, k, alpha, *parts)


class RuntimeFailure(RuntimeError):
    pass


def gemm_ex(h, ta, tb, m, n, k, alpha, a, ka, lda, b, kb, ldb, beta, c, kc, ldc, kind, algorithm):
    """gemmEx of float32 in TF32."""
    assert (ka, kb, kc, kind, algorithm) == (FLOAT, FLOAT, FLOAT, TF32, DEFAULT)
    gemm(h, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)


def gemms_ex(h, ta, tb, m, n, k, alpha, a, ka, lda, sa, b, kb, ldb, sb, beta, c, kc, ldc, sc, *end):
    """gemmStridedBatchedEx of float32 in TF32."""
    count, kind, algorithm = end
    assert (ka, kb, kc, kind, algorithm) == (FLOAT, FLOAT, FLOAT, TF32, DEFAULT)
    gemms(h, ta, tb, m, n, k, alpha, a, lda, sa, b, ldb, sb, beta, c, ldc, sc, count)


FLOAT, TF32, DEFAULT = 0, 77, -1  # the numbers of CuPy and cuBLAS


def made_up_cupy(monkeypatch, capability="90", devices=1):
    """A CuPy in sys.modules that records launches; its cuBLAS is `gemm`."""
    launched = []

    class Kernel:
        def __init__(self, name):
            self.name, self.max_dynamic_shared_size_bytes = name, 48 << 10

        def __call__(self, grid, block, arguments, shared_mem):
            assert shared_mem <= self.max_dynamic_shared_size_bytes
            launched.append((self.name, grid, block, arguments, shared_mem))

    def found():
        if not devices:
            raise RuntimeFailure("cudaErrorNoDevice")
        limits = {"MaxSharedMemoryPerBlockOptin": 232448, "MultiProcessorCount": 132}
        return SimpleNamespace(compute_capability=capability, attributes=limits)

    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    cupy.cuda, cuda.Device = cuda, found
    cuda.runtime = SimpleNamespace(CUDARuntimeError=RuntimeFailure, CUDA_R_32F=FLOAT)
    cuda.cublas = SimpleNamespace(
        sgemm=gemm,
        sgemmStridedBatched=gemms,
        gemmEx=gemm_ex,
        gemmStridedBatchedEx=gemms_ex,
        CUBLAS_COMPUTE_32F_FAST_TF32=TF32,
        CUBLAS_GEMM_DEFAULT=DEFAULT,
    )
    cuda.get_cublas_handle = lambda: 7
    cupy.RawModule = lambda code, options, enable_cooperative_groups: SimpleNamespace(
        code=code, options=options, cooperative=enable_cooperative_groups, get_function=Kernel
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    return launched


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CUBLAS_STATUS_ALLOC_FAILED", DeviceError),
        ("CUDA_ERROR_OUT_OF_MEMORY: out of memory", DeviceError),
        ("cudaErrorMemoryAllocation: out of memory", DeviceError),
        ("CUDA_ERROR_LAUNCH_FAILED: unspecified launch failure", RuntimeFailure),
    ],
)
def test_cuda_libraries_without_memory(monkeypatch, text, expected):
    def failing(*args, **more):
        raise RuntimeFailure(text)

    emulate(monkeypatch)
    H, W_out, y = there(np.ones((2, 3)), np.ones((4, 3)), np.zeros(2, np.int32))
    monkeypatch.setattr(emulator.EmulatedDevice, "product", failing)
    with pytest.raises(expected, match=text):
        gpu.output("softmax", H, W_out, y)
    spec, plan = Spec(hidden_size=3), Plan(batch=2, window=8, epochs=1)
    with pytest.raises(expected, match=text):
        next(training.epochs(spec, Rule(), plan, LOG, backend="cupy"))


def test_without_room_for_cublas(monkeypatch):
    def failing():
        raise RuntimeFailure("CUBLAS_STATUS_NOT_INITIALIZED")

    made_up_cupy(monkeypatch)
    monkeypatch.setattr(sys.modules["cupy.cuda"], "get_cublas_handle", failing)
    with pytest.raises(DeviceError, match="cuBLAS.*NOT_INITIALIZED.*nvidia-smi"):
        gpu.Device("float32")


def test_one_device_for_each_type(monkeypatch):
    made_up_cupy(monkeypatch)
    monkeypatch.setattr(gpu, "_device", functools.cache(gpu._device.__wrapped__))
    assert gpu.device() is gpu.device("float32") is gpu.device(dtype="float32")
    assert gpu.device("float64") is not gpu.device()


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r"pip install '\.\[gpu\]' in the checkout"):
        gpu.Device("float32")


def test_without_a_device_or_with_one_that_is_too_old(monkeypatch):
    made_up_cupy(monkeypatch, devices=0)
    with pytest.raises(DeviceError, match="no CUDA device.*cudaErrorNoDevice.*nvidia-smi"):
        gpu.Device("float32")
    made_up_cupy(monkeypatch, capability="61")
    with pytest.raises(DeviceError, match=r"is 6\.1, expected 7\.5"):
        gpu.Device("float32")


@pytest.mark.parametrize("tf32", [False, True])
def test_products_of_views(monkeypatch, tf32):
    made_up_cupy(monkeypatch)
    dev, rng = gpu.Device("float32"), np.random.default_rng(1)
    dev.xp.cuda.cublas.__dict__.pop("sgemm" if tf32 else "gemmEx")  # the others are not called
    dev.xp.cuda.cublas.__dict__.pop("sgemmStridedBatched" if tf32 else "gemmStridedBatchedEx")

    def layouts(*shape):
        """The same shape as rows, padded rows, columns and padded columns."""
        whole = rng.standard_normal((*shape[:-2], shape[-2] + 3, shape[-1] + 2)).astype(np.float32)
        turned = np.ascontiguousarray(whole.swapaxes(-1, -2)).swapaxes(-1, -2)
        inner = (..., slice(shape[-2]), slice(shape[-1]))
        rows = whole[inner]
        return rows.copy(), rows, np.asfortranarray(rows) if rows.ndim == 2 else turned[inner]

    for M, K, N in ((1, 1, 1), (3, 2, 4), (1, 5, 3), (4, 1, 3), (3, 2, 1), (1, 1, 4), (2, 3, 1)):
        for batch in ((), (1,), (3,)):
            for a in layouts(*batch, M, K):
                for b in layouts(*batch, K, N):
                    for out in layouts(*batch, M, N)[:2]:
                        for beta in (0.0, 1.0):
                            expected = a @ b + beta * out
                            dev.product(Memory(a), Memory(b), Memory(out), beta, tf32)
                            np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError, match="neither rows nor columns"):
        gpu.leading(Memory(np.zeros((4, 6, 8))[:, ::2, ::2]))


def test_launches_and_sources(monkeypatch):
    launched = made_up_cupy(monkeypatch)
    for dtype, real in (("float32", "float"), ("float64", "double")):
        dev = gpu.Device(dtype)
        assert set(dev._modules) == set(emulator.EmulatedDevice(dtype).kernels)
        for name, module in dev._modules.items():
            assert f"-DREAL={real}" in module.options
            assert f"{name}(" in module.code
            assert "#include" not in module.code
            assert module.cooperative == name.startswith("pooled_")
        dev.launch("gather", (3, 2), 64, ("a",))
        dev.launch("gru_forward", 5, 128, (), 200_000)
        dev.launch("gru_forward", 5, 128, (), 100_000)
        assert dev._kernels["gru_forward"].max_dynamic_shared_size_bytes == 200_000
    assert launched == 2 * [
        ("gather", (3, 2), (64,), ("a",), 0),
        ("gru_forward", (5,), (128,), (), 200_000),
        ("gru_forward", (5,), (128,), (), 100_000),
    ]


def nvrtc():
    """CUDA's run-time compiler, of the system or of NVIDIA's wheels."""
    wheels = importlib.util.find_spec("nvidia")
    folders = map(Path, wheels.submodule_search_locations if wheels else ())
    found = [str(path) for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*")]
    name = ctypes.util.find_library("nvrtc") or next(iter(found), None)
    if name is None:
        pytest.skip("no libnvrtc")
    return ctypes.CDLL(name)


def test_kernels_compile_with_nvrtc(monkeypatch):
    """It has no standard library. The options after the module's own are CuPy's."""
    library = nvrtc()
    made_up_cupy(monkeypatch)
    for module in {m.code: m for m in gpu.Device("float32")._modules.values()}.values():
        options = [*module.options, "-arch=compute_75", "-ftz=true"]
        options += ["--device-c"] * module.cooperative
        given = (ctypes.c_char_p * len(options))(*map(str.encode, options))
        program, size = ctypes.c_void_p(), ctypes.c_size_t()
        source = module.code.encode(), b"kernels.cu"
        assert not library.nvrtcCreateProgram(ctypes.byref(program), *source, 0, None, None)
        failed = library.nvrtcCompileProgram(program, len(given), given)
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, log)
        library.nvrtcDestroyProgram(ctypes.byref(program))
        assert not failed, log.value.decode()


def test_kernels_of_a_checkout_and_of_an_installed_package(monkeypatch, tmp_path):
    made_up_cupy(monkeypatch)
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "crnn_np" / "backends" / "gpu.py"))
    monkeypatch.setattr(gpu.resources, "files", lambda name: tmp_path / name)
    for folder, kernel in ((tmp_path / "crnn_np.kernels", "one"), (tmp_path / "kernels", "other")):
        folder.mkdir()
        (folder / "common.cuh").touch()
        (folder / "file.cu").write_text(f'extern "C" __global__ void {kernel}()')
        assert set(gpu.Device("float32")._modules) == {kernel}
