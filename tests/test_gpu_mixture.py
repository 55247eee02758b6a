"""The mixture on a GPU against the reference: odd shapes, columns of cells, large scores, runs.

`test_mixture` has its definition, and `kernels/test_all_kernels.py` every kernel under the
sanitizers.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from conftest import emulate
from test_gpu import assert_same_run, back, run_epochs
from test_mixture import BLOCKS, make, moved
from test_training import random_log

from crnn_np import backends, evaluation, model, outputs, training
from crnn_np.backends import gpu, gpu_mixture, reference
from crnn_np.data import from_sequences
from crnn_np.errors import DeviceError
from crnn_np.model import Spec
from crnn_np.optim import Rule
from crnn_np.outputs import Cells, Mixture
from crnn_np.windows import Plan, Slice, epoch_slices

EXACT = 1e-11  # float64, as a share of the block's largest element
ROUNDED = 5e-6  # float32; measured: 6e-7
RUN = 1e-5  # float32, parameters and accumulators after a run; measured: 1.5e-6


def problem(seed, D=3, Q=3, size=1.0, **sizes):
    """As `test_mixture.make`, with a state and a gate of other sizes."""
    made, rng = make(seed, size=size, **sizes), np.random.default_rng(seed + 1)
    N, (width, _), K = len(made.H), made.mixture.gate_in.shape, made.mixture.gate_out.shape[1]
    width += D - made.H.shape[1]
    gate_in, gate_out = rng.normal(0, size, (width, Q)), rng.normal(0, size, (Q + 1, K))
    return made._replace(
        H=rng.normal(0, 1, (N, D)),
        W_out=rng.normal(0, size, (made.n_items, D)),
        mixture=made.mixture._replace(gate_in=gate_in, gate_out=gate_out),
    )


def rounded(made, dtype):
    """A problem whose numbers have this type, held in float64."""

    def near(block):
        return block.astype(dtype).astype(np.float64)

    blocks = Mixture(*map(near, made.mixture))
    return made._replace(H=near(made.H), W_out=near(made.W_out), mixture=blocks)


def in_type(made, dtype):
    """The arguments, with parameters of this type."""
    blocks = Mixture(*(block.astype(dtype) for block in made.mixture))
    return made.H.astype(dtype), made.W_out.astype(dtype), blocks, *made.arguments[3:]


def losses_and_gradients(made, dtype):
    loss, dH, dW_out, own = gpu.mixture(*moved(gpu, in_type(made, dtype)))
    return loss, dict(zip(BLOCKS, back(dH, dW_out, *own), strict=True))


def scores(made, dtype):
    return back(*gpu.mixture_score(*moved(gpu, in_type(made, dtype))))


def worst(found, expected):
    """The largest error of a block, as a share of the block's largest element."""
    shares = []
    for block, other in expected.items():
        assert found[block].shape == other.shape, block
        assert np.isfinite(found[block]).all(), block
        largest = max(np.abs(other).max(initial=0), 1e-2)
        shares.append(np.abs(found[block] - other).max(initial=0) / largest)
    return max(shares)


def check(made, dtype, limit):
    """Loss, gradients, nll and ranks against the reference's."""
    made = rounded(made, dtype)
    wanted, dH, dW_out, own = reference.mixture(*made.arguments)
    loss, found = losses_and_gradients(made, dtype)
    assert loss == pytest.approx(wanted, rel=limit, abs=limit)
    assert worst(found, dict(zip(BLOCKS, (dH, dW_out, *own), strict=True))) <= limit
    assert {block.dtype.name for block in found.values()} == {dtype}
    nll, rank = scores(made, dtype)
    each, ranks = reference.mixture_score(*made.arguments)
    np.testing.assert_allclose(nll, each, rtol=limit, atol=limit)
    assert (nll.dtype, rank.dtype) == (np.float64, np.int32)
    if dtype == "float64":
        np.testing.assert_array_equal(rank, ranks)


# Single cells


@pytest.mark.parametrize("part", range(4))
def test_two_hundred_shapes(cupy, part, monkeypatch):
    for seed in range(50 * part, 50 * part + 50):
        rng = np.random.default_rng([seed, 7])
        monkeypatch.setattr(cupy, "THREADS", int(rng.choice([32, 64, 96])))
        n_items = int(rng.integers(2, 70))
        made = problem(
            seed,
            D=int(rng.choice([1, 2, 5, 17])),
            Q=int(rng.choice([1, 2, 7, 33, 100])),
            size=0.3 if seed % 2 else float(rng.choice([0.3, 1, 3])),
            n_items=n_items,
            pointers=int(rng.integers(1, 4)),
            memory=int(rng.choice([1, 2, 3, 5, 33, 64, 100])),
            n_cells=int(rng.integers(1, 9)),
            longest=int(rng.choice([1, 14, 150])),
        )
        rows = int(rng.choice([1, 3, 100]))  # cells that are worked on at once
        monkeypatch.setattr(cupy, "EXTRA_BYTES", rows * 8 * n_items)
        monkeypatch.setattr(cupy, "LOGITS_BYTES", rows * 8 * n_items)
        check(made, *(("float64", EXACT), ("float32", ROUNDED))[seed % 2])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_sixteen_pointers_and_a_long_past(cupy, dtype):
    made = problem(1, pointers=16, memory=700, longest=900, n_items=40, size=0.3)
    check(made, dtype, {"float64": EXACT, "float32": ROUNDED}[dtype])


@pytest.mark.parametrize("block", ["W_out", "tau", "nu", "gate_out", "gate_user"])
def test_large_scores(cupy, block):
    """Logits, scores and gates of 1e4."""
    made = problem(5, memory=9, n_cells=7, longest=30)
    if block == "W_out":
        large = made._replace(W_out=1e4 * made.W_out)
    else:
        values = 1e4 * getattr(made.mixture, block)
        if block.startswith("gate"):
            values[..., 2] = 2 * np.abs(values).max()  # what gives every item something
        large = made._replace(mixture=made.mixture._replace(**{block: values}))
    wanted, dH, dW_out, own = reference.mixture(*large.arguments)
    loss, found = losses_and_gradients(large, "float64")
    assert loss == pytest.approx(wanted, rel=1e-11)
    assert worst(found, dict(zip(BLOCKS, (dH, dW_out, *own), strict=True))) <= 1e4 * EXACT
    nll, rank = scores(large, "float64")
    each, ranks = reference.mixture_score(*large.arguments)
    np.testing.assert_allclose(nll, each, rtol=1e-11)
    np.testing.assert_array_equal(rank, ranks)
    loss, found = losses_and_gradients(large, "float32")
    assert loss == pytest.approx(wanted, rel=2e-3)
    assert all(np.isfinite(one).all() for one in found.values())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_one_item_alone(cupy, dtype):
    """Each distribution gives it everything: the loss is 0, the rank 1."""
    past = evaluation.read_past(Spec(output="mixture"), from_sequences([[0, 0, 0, 0]], 1))
    cells = Cells(np.zeros(2, np.int32), np.zeros(2, np.int32), np.array([0, 2]))
    blocks = problem(0, pointers=1).mixture
    blocks = blocks._replace(nu=blocks.nu[:1], gate_user=blocks.gate_user[:1])
    H, W_out = np.ones((2, 3)), np.ones((1, 3))
    made = SimpleNamespace(H=H, W_out=W_out, mixture=blocks)
    made.arguments = H, W_out, blocks, cells, past, 6
    loss, found = losses_and_gradients(made, dtype)
    assert loss == pytest.approx(0, abs=1e-6)
    assert max(np.abs(block).max() for block in found.values()) < 1e-6
    nll, rank = scores(made, dtype)
    np.testing.assert_allclose(nll, 0, atol=1e-6)
    assert rank.tolist() == [1, 1]


def test_an_item_whose_events_are_all_the_users_own(cupy):
    """What others gave it is exactly nothing, also in float32: a thousand events taken off."""
    own = [0, 1] * 600
    log = from_sequences([own, [2, 3] * 600], 5)
    past = evaluation.read_past(Spec(output="mixture"), log)
    y, user = np.array([1, 0, 3], np.int32), np.array([0, 0, 1], np.int32)
    cells = Cells(y, user, np.array([8, 9, 1204]))
    blocks = problem(0, pointers=1).mixture
    blocks = blocks._replace(gate_user=np.tile([-40.0, 5, 5, -40], (2, 1)), nu=blocks.nu[:2])
    for dtype in ("float64", "float32"):
        arguments = np.ones((3, 3)), np.zeros((5, 3)), blocks, cells, past, 6
        made = SimpleNamespace(H=arguments[0], W_out=arguments[1], mixture=blocks)
        made.arguments = arguments
        nll, rank = scores(made, dtype)
        each, ranks = reference.mixture_score(*arguments)
        np.testing.assert_allclose(nll, each, rtol=1e-5)
        np.testing.assert_array_equal(rank, ranks)


def test_the_same_bytes_again_and_in_any_order_of_threads(monkeypatch):
    made = problem(3, n_cells=30, memory=100, longest=150, n_items=9)
    found = []
    for reverse in (False, False, True):
        emulate(monkeypatch, reverse=reverse)
        loss, blocks = losses_and_gradients(made, "float32")
        results = [*blocks.values(), *scores(made, "float32")]
        found.append(b"".join(block.tobytes() for block in results) + np.float64(loss).tobytes())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_a_memory_of_several_blocks_under_the_sanitizers(monkeypatch, sanitizer):
    """More lags and events of the user's own than threads; the same bits as without."""
    made = problem(6, pointers=1, n_cells=2, memory=70, longest=150, n_items=4)
    u = int(np.argmax([len(events) for events in made.sequences]))
    first, last = made.past.indptr[u], made.past.indptr[u + 1]
    assert last - first > 72
    at = np.array([last - 2, first + 40])
    user = np.array([u, u], np.int32)
    made = made._replace(cells=Cells(made.past.items[at + 1], user, at))
    found = []
    for options in ({}, {"sanitizer": sanitizer}):
        emulate(monkeypatch, **options)
        monkeypatch.setattr(gpu, "THREADS", 32)
        loss, blocks = losses_and_gradients(made, "float32")
        found.append((loss, [b.tobytes() for b in (*blocks.values(), *scores(made, "float32"))]))
    assert found[0] == found[1]


# Columns of cells


@pytest.mark.parametrize("seed", range(12))
def test_cells_of_a_column_are_summed(cupy, seed):
    """A window of T steps and C columns, some places without a cell, against cells alone."""
    rng = np.random.default_rng(seed)
    C, T, D, dtype = int(rng.integers(1, 5)), int(rng.integers(1, 80)), 3, "float64"
    sequences = [rng.integers(0, 6, T + int(rng.integers(1, 40))).tolist() for _ in range(C + 1)]
    log = from_sequences(sequences, 7)
    spec = Spec(output="mixture", hidden_size=D, memory=int(rng.choice([1, 9, 70])), pointers=2)
    past = evaluation.read_past(spec, log)
    shapes = model.shapes(spec, C + 1, 7)
    blocks = Mixture(*(rng.normal(0, 0.5, shapes[name]) for name in Mixture._fields))
    user = rng.permutation(C + 1)[:C].astype(np.int32)
    start = np.array([rng.integers(0, len(sequences[u]) - T) for u in user], np.int64)
    counts = rng.random((T, C)) < 0.8
    counts[:, 0] &= seed % 2 == 0  # a column without a cell
    number = np.where(counts, np.cumsum(counts).reshape(T, C) - 1, -1).astype(np.int32)
    t, b = np.nonzero(counts)
    N = t.size
    at = log.indptr[user[b]] + start[b] + t
    cells = Cells(log.items[at + 1], user[b], at)
    H, W_out = rng.normal(size=(N, D)), rng.normal(size=(7, D))
    _, dH, dW_out, own = reference.mixture(H, W_out, blocks, cells, past, spec.memory)

    dev = cupy.device(dtype)
    mixing = cupy._mixing(dev, shapes, spec.memory, C, T * C)
    blocks_, past_ = model.on_device(cupy, blocks), model.on_device(cupy, past)
    cell = np.flatnonzero(counts).astype(np.int32)
    columns = gpu_mixture.Columns(user, start, cell, number.ravel(), cells.y.astype(np.int32))
    columns = model.on_device(cupy, columns)
    H_, W_out_ = cupy.to_device(H), cupy.to_device(W_out)
    mixing.forward(blocks_, past_, columns, H_)
    work = cupy.OutputWork(**cupy._allocate(cupy._output_shapes(N, 7, D, dev.dtype)))
    loss, found_dH, found_dW = (dev.xp.zeros(shape) for shape in (N, (N, D), (7, D)))
    cupy._softmax(dev, H_, W_out_, columns.y, 2.0, work, loss, found_dH, found_dW, mixing.blend(N))
    mixing.backward(blocks_, past_, columns, 2.0, found_dH)
    found = dict(zip(BLOCKS, back(found_dH, found_dW, *mixing.gradients), strict=True))
    dnu, dgate_user = np.zeros((C, *own.nu.shape[1:])), np.zeros((C, own.gate_user.shape[1]))
    np.add.at(dnu, b, own.nu)
    np.add.at(dgate_user, b, own.gate_user)
    own = own._replace(nu=dnu, gate_user=dgate_user)
    wanted = dict(zip(BLOCKS, (dH, dW_out, *own), strict=True))
    assert worst(found, {name: 2.0 * block for name, block in wanted.items()}) <= EXACT
    touched = back(mixing.work["touched"])[0]
    np.testing.assert_array_equal(touched, counts.sum(axis=0))


@pytest.mark.parametrize("memory", [1, 2, 3, 7, 64, 65, 1000, 4096])
@pytest.mark.parametrize("most", [32, 256])
def test_pieces_of_the_lags(memory, most):
    bounds, of_bucket = gpu_mixture.pieces(memory, most)
    bucket = outputs.lag_buckets(memory)
    assert bounds[0] == 0
    assert bounds[-1] == memory
    assert (np.diff(bounds) >= 1).all()
    assert (np.diff(bounds) <= most).all()
    for k, (low, high) in enumerate(zip(of_bucket[:-1], of_bucket[1:], strict=True)):
        assert (bucket[bounds[low] : bounds[high]] == k).all()
    assert of_bucket[-1] == bounds.size - 1


# Runs


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("W_in_rows", ["touched", "dense"])
@pytest.mark.parametrize("sharing", ["collaborative", "pooled"])
@pytest.mark.parametrize("cell", ["tanh", "gru"])
def test_a_run_is_the_loop_over_steps(cupy, cell, sharing, W_in_rows, dropout):
    spec = Spec(
        hidden_size=5, cell=cell, sharing=sharing, init_state=0.2, dropout_in=dropout,
        dropout_out=dropout, output="mixture", pointers=2, memory=11, gate_size=4,
    )  # fmt: skip
    rule = Rule(W_in_rows=W_in_rows)
    plan = Plan(batch=3, window=4, order="length", loss_scale="mean", seed=4)
    log = random_log(np.random.default_rng(3), [1, 4, 0, 9, 25, 12, 17, 30, 2], 60)
    start = model.initialise(spec, log.n_users, log.n_items, 1)
    assert_same_run(cupy, spec, rule, plan, log, start, 2, rounded=RUN)


CASES = {  # items, D, T, B, lengths, pointers, memory, Q
    "units of everything": (2, 1, 1, 1, [25], 1, 1, 1),
    "more columns than users": (20, 4, 3, 9, [60, 7, 33, 64], 3, 5, 40),
    "a memory longer than all": (9, 3, 7, 2, [50, 41, 3], 2, 300, 3),
    "several blocks of a column": (30, 4, 90, 2, [200, 170], 1, 150, 70),
    "sequences of one event and of two": (20, 4, 3, 2, [1] * 20 + [2] * 20, 1, 4, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_of_odd_sizes(cupy, case):
    n_items, D, T, B, lengths, P, memory, Q = CASES[case]
    spec = Spec(hidden_size=D, output="mixture", pointers=P, memory=memory, gate_size=Q)
    rule, plan = Rule(learning_rate=0.005, rho=0.9, eps=1e-2), Plan(batch=B, window=T)
    log = random_log(np.random.default_rng(7), lengths, n_items)
    start = model.initialise(spec, log.n_users, n_items, 1)
    assert_same_run(cupy, spec, rule, plan, log, start, windows=3, rounded=RUN)


def test_the_loop_over_steps_on_the_device(cupy):
    spec = Spec(hidden_size=3, output="mixture", memory=6, gate_size=3, dropout_out=0.2)
    plan = Plan(batch=2, window=5)
    log = random_log(np.random.default_rng(2), [22, 17, 1, 9], 11)
    start = model.initialise(spec, log.n_users, log.n_items, 1)
    rule = Rule(clip=0.5, eps=1e-3)
    assert_same_run(cupy, spec, rule, plan, log, start, windows=9, fused=False, rounded=RUN)


def test_windows_without_a_target(cupy):
    """They decay the accumulators of the dense blocks, and leave the users' rows alone."""
    log = from_sequences([[0, 1, 2, 3, 1, 0], [2], [3, 3, 1]], 4)
    user = np.array([[0, 1], [0, 1], [1, 0], [2, 1], [0, 2]], np.int32)
    length = np.array([[3, 0], [0, 0], [1, 0], [0, 0], [3, 2]], np.int32)
    start = np.array([[0, 0], [0, 0], [0, 0], [0, 0], [3, 0]], np.int64)
    fresh = np.array([[1, 0], [0, 0], [1, 0], [0, 0], [0, 1]], bool)
    target_from = np.array([[2, 0], [0, 0], [0, 0], [0, 0], [0, 0]], np.int64)
    run = Slice(user, start, length, fresh, target_from, np.arange(5, dtype=np.uint64))
    spec = Spec(
        hidden_size=3, dropout_in=0.3, dtype="float64", output="mixture", memory=3, gate_size=2
    )
    begin = model.initialise(spec, 3, 4, 1)
    found = []
    for backend in (backends.get("numba"), cupy):
        params = model.on_device(backend, type(begin)(*(block.copy() for block in begin)))
        acc = model.on_device(backend, model.new_accumulators(begin))
        past = model.on_device(backend, evaluation.read_past(spec, log))
        s = backend.to_device(np.full((1, 2, 3), 0.3))
        work = backend.workspace(spec, 4, 2, 3)
        each = []
        for k in range(5):  # one by one, so that those without a cell are seen
            part = run.part(k, k + 1)
            loss = training.train_run(
                backend, spec, Rule(), 1.0, params, acc, s, log, part, work, past
            )
            each += [*loss, *(np.copy(backend.to_host(block)) for block in (*params, *acc, s))]
        found.append(each)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-11, atol=1e-13)


def test_launches_of_a_window(monkeypatch):
    """Six kernels and three products more than the softmax alone has."""
    emulate(monkeypatch)
    dev, products = gpu.device("float32"), []
    product = dev.product
    monkeypatch.setattr(dev, "product", lambda *a, **more: products.append(product(*a, **more)))
    log = from_sequences([np.arange(90) % 20, np.arange(90) % 17], 20)
    plan = Plan(batch=2, window=10)
    windows = epoch_slices(plan, log.lengths, 1).key.size
    found = []
    for output in ("softmax", "mixture"):
        spec = Spec(hidden_size=4, output=output, memory=20, gate_size=3)
        start = model.initialise(spec, 2, 20, 0)
        dev.launches.clear()
        products.clear()
        run_epochs(gpu, spec, Rule(), plan, log, start, 1)
        found.append((sum(dev.launches.values()), len(products)))
    assert found[1] == (found[0][0] + 6 * windows, found[0][1] + 3 * windows)


def test_out_of_memory_says_for_what(monkeypatch):
    emulate(monkeypatch)

    def full(*args):
        raise MemoryError("allocated so far: 80,000,000,000 bytes")

    made = problem(0)
    arguments = moved(gpu, in_type(made, "float32"))
    monkeypatch.setattr(gpu.device().xp, "empty", full, raising=False)
    spec = Spec(hidden_size=128, output="mixture", memory=4096, gate_size=512)
    mixing = model.shapes(spec, 20, 48188)
    with pytest.raises(DeviceError, match="hidden 0.0.* GB.*80,000"):
        gpu._mixing(gpu.device(), mixing, spec.memory, 20, 20 * 64)
    with pytest.raises(DeviceError, match="out of memory"):
        gpu.mixture_score(*arguments)
