"""What is particular to the compiled backend: its cache, its threads, blocks and tiles."""

import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numba
import numpy as np
import pytest
import scipy
from numba.core.dispatcher import Dispatcher

import crnn_np
from crnn_np import model, training
from crnn_np.backends import jit, reference
from crnn_np.data import from_sequences
from crnn_np.model import Spec
from crnn_np.optim import Rule
from crnn_np.windows import Plan

PROGRAM = """
import hashlib, json, sys
import numba, numpy as np
from crnn_np import training
from crnn_np.backends import jit
from crnn_np.data import from_sequences
from crnn_np.model import Spec
from crnn_np.optim import Rule
from crnn_np.windows import Plan

dtype, *threads = sys.argv[1:]
rng = np.random.default_rng(0)
items = 3_000  # tiles for more than the first chunk of each thread
log = from_sequences([rng.integers(0, items, n) for n in (40, 31, 22, 60, 3, 17)], items)
spec = Spec(hidden_size=9, dropout_in=0.2, dropout_out=0.2, dtype=dtype)
plan = Plan(batch=3, window=5, epochs=2, loss_scale="mean")
H = rng.standard_normal((150, 9)).astype(dtype)
W_out = rng.standard_normal((items, 9)).astype(dtype)
y = rng.integers(0, items, 150).astype(np.int32)
runs = []
for n in map(int, threads):
    numba.set_num_threads(n)
    *_, last = training.epochs(spec, Rule(), plan, log)
    bytes = b"".join(block.tobytes() for block in last.params)
    blocks = [block.ravel().tolist() for block in last.params]
    runs.append({"digest": hashlib.sha256(bytes).hexdigest(), "blocks": blocks})
    if len(threads) > 1:
        loss, *grads = jit.output("softmax", H, W_out, y)
        nll, rank = jit.score("softmax", H, W_out, y)
        runs[-1]["blocks"] += [[loss], *(g.ravel().tolist() for g in grads), nll.tolist()]
        runs[-1]["rank"] = rank.tolist()
stats = jit._train.stats
hits, misses = (sum(count.values()) for count in (stats.cache_hits, stats.cache_misses))
about = {"hits": hits, "misses": misses, "vector_bytes": jit.VECTOR_BYTES}
print(json.dumps(about | {"runs": runs}))
"""


def run_program(*arguments, **environment):
    """What PROGRAM prints in a process of its own that finds this crnn_np."""
    path = {"PYTHONPATH": str(Path(crnn_np.__file__).parents[1])}
    output = subprocess.check_output(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env={**os.environ, **path, **environment},
        text=True,
    )
    return json.loads(output)


def files(folder):
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*.nb*")}


def test_a_second_process_finds_the_compiled_code_on_disk(tmp_path):
    first = run_program("float32", 1, NUMBA_CACHE_DIR=str(tmp_path))
    assert (first["hits"], first["misses"]) == (0, 1)
    written = files(tmp_path)
    kernels = [name.split("jit.")[1].split("-")[0] for name in written if name.endswith(".nbc")]
    assert kernels.count("_train") == 1
    assert not {"_softmax", "_tiles"} & set(kernels)  # in the code of `_train` alone
    second = run_program("float32", 1, NUMBA_CACHE_DIR=str(tmp_path))
    assert (second["hits"], second["misses"]) == (1, 0)
    assert files(tmp_path) == written
    assert second["runs"] == first["runs"]


@pytest.mark.parametrize("mixture", [False, True])
def test_no_size_has_code_of_its_own(mixture):
    """Trained and scored: compiled for a dtype, whatever U, I, T, B and D."""
    rng = np.random.default_rng(0)
    compiled = []
    for U, I, T, B, D in (3, 50, 8, 2, 4), (7, 333, 64, 5, 9), (2, 1, 1, 1, 1), (5, 97, 128, 1, 33):
        log = from_sequences([rng.integers(0, I, 40) for _ in range(U)], I)
        preset = "mixture" if mixture else None
        options = {"hidden_size": D, "window": T, "batch": B, "epochs": 1}
        fitted = crnn_np.CollaborativeRNN(preset=preset, **options).fit(log)
        fitted.evaluate(*crnn_np.data.cut_tail(log, [3] * U))
        compiled.append(
            {name: len(f.signatures) for name, f in vars(jit).items() if isinstance(f, Dispatcher)}
        )
    assert compiled[0]["_train"] > 0
    assert compiled[1:] == compiled[:1] * 3


@pytest.mark.parametrize("items", [1, 96, 97, 5_000])
@pytest.mark.parametrize("threads", [1, 2, 5, 64])
def test_chunks_are_whole_tiles_and_all_of_them(items, threads):
    chunks = jit._chunks(items, threads)
    assert (chunks[0], chunks[-1]) == (0, items)
    assert np.all(np.diff(chunks) >= 0)
    assert np.all((chunks % jit.TILE == 0) | (chunks == items))
    assert len(chunks) > threads


def test_any_number_of_threads_gives_the_same_result():
    """Equal to rounding; to the bit for the same number of threads."""
    runs = run_program("float64", 1, 2, 4, 2, 4, NUMBA_NUM_THREADS="4")["runs"]
    for run in runs[1:]:
        assert run["rank"] == runs[0]["rank"]
        for one, other in zip(run["blocks"], runs[0]["blocks"], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12 * np.abs(other).max())
    assert runs[3] == runs[1]
    assert runs[4] == runs[2]


HELD_UP = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numba, numpy as np
from crnn_np import backends, evaluation, model, training
from crnn_np.backends import jit
from crnn_np.data import from_sequences
from crnn_np.model import Spec
from crnn_np.optim import Rule
from crnn_np.windows import Plan, epoch_slices

N, *options = sys.argv[1:]
N, backend = int(N), backends.get("numba")
rng = np.random.default_rng(0)
log = from_sequences([rng.integers(0, 200, N + 1)], 200)
plan = Plan(batch=1, window=N)
jit.AMX = jit.AMX and "amx" in options
spec = Spec(
    hidden_size=16,
    memory=9,
    output="mixture" if "mixture" in options else "softmax",
    products="full" if "full" in options else "bfloat16",
)
start, past = model.initialise(spec, 1, 200, 1), evaluation.read_past(spec, log)
for threads in (2, 3):
    numba.set_num_threads(threads)
    found = set()
    for _ in range(60):
        params = type(start)(*(block.copy() for block in start))
        work, s = training.workspace(backend, spec, plan, log), np.zeros((1, 1, 16), np.float32)
        run, acc = epoch_slices(plan, log.lengths, 1).part(0, 1), model.new_accumulators(params)
        loss, _ = training.train_run(
            backend, spec, Rule(), 1.0, params, acc, s, log, run, work, past
        )
        found.add((loss, b"".join(block.tobytes() for block in params)))
    print(threads, len(found))
"""
PRODUCTS = [
    "full",
    pytest.param("half", marks=pytest.mark.skipif(not jit.HALF, reason="no bfloat16")),
    pytest.param("amx", marks=pytest.mark.skipif(not jit.AMX, reason="no AMX")),
]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="can't hold threads up")
@pytest.mark.parametrize("events", [449, 481])
@pytest.mark.parametrize("output", ["softmax", "mixture"])
@pytest.mark.parametrize("products", PRODUCTS)
def test_threads_that_hold_each_other_up_change_nothing(products, output, events):
    """Two blocks of events, padded to different sizes, and one core for all threads."""
    given = [sys.executable, "-c", HELD_UP, str(events), products, output]
    environment = os.environ | {"NUMBA_NUM_THREADS": "3"}
    environment["PYTHONPATH"] = str(Path(crnn_np.__file__).parents[1])
    assert subprocess.check_output(given, env=environment, text=True) == "2 1\n3 1\n"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="masks x86 features")
@pytest.mark.parametrize(
    ("name", "features", "vector_bytes"),
    [("haswell", "+avx,+avx2,+fma", 32), ("x86-64", "+sse2", 16)],
)
def test_processors_with_shorter_vectors_give_the_same(name, features, vector_bytes, tmp_path):
    masked = {
        "NUMBA_CPU_NAME": name,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    here = run_program("float32", 1, 2, NUMBA_NUM_THREADS="2")
    there = run_program("float32", 1, 2, NUMBA_NUM_THREADS="2", **masked)
    assert there["vector_bytes"] == vector_bytes
    for run, expected in zip(there["runs"], here["runs"], strict=True):
        assert run["rank"] == expected["rank"]
        for one, other in zip(run["blocks"], expected["blocks"], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())


# The output layer


LIMITS = {"float64": 1e-14, "float32": 4.5e-6}  # measured: 2.1e-15, 1.4e-6


def assert_close(found, expected, dtype):
    assert np.shape(found) == np.shape(expected)
    largest = np.max(np.abs(expected), initial=1.0)
    error = np.max(np.abs(found - expected), initial=0.0) / largest
    assert error <= LIMITS[dtype], f"{error:.1e}, limit {LIMITS[dtype]:.0e}"


def draw(N, n_items, D, dtype, seed=0):
    rng = np.random.default_rng([N, n_items, D, seed])
    H, W_out = np.tanh(rng.standard_normal((N, D))), rng.standard_normal((n_items, D))
    return H.astype(dtype), W_out.astype(dtype), rng.integers(0, n_items, N).astype(np.int32)


EVENTS = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 48, 80, 127, 128, 129, 255, 256, 257, 513)
SIZES = [(1, 1), (2, 3), (95, 5), (96, 16), (97, 17), (48, 64), (150, 65), (511, 4), (513, 12)]
FOUR_VECTORS_AND_MORE = [(40, 70), (110, 100)]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("n_items", "D"), SIZES + FOUR_VECTORS_AND_MORE)
def test_output_and_score_in_blocks_and_tiles(n_items, D, dtype):
    for N in EVENTS:
        H, W_out, y = draw(N, n_items, D, dtype)
        wide = H.astype(float), W_out.astype(float), y
        expected = reference.output("softmax", *wide)
        loss, dH, dW_out = jit.output("softmax", H, W_out, y)
        assert_close(loss / max(N, 1), expected[0] / max(N, 1), dtype)
        assert_close(dH, expected[1], dtype)
        assert_close(dW_out, expected[2], dtype)
        nll, rank = jit.score("softmax", H, W_out, y)
        expected_nll, expected_rank = reference.score("softmax", *wide)
        assert_close(nll, expected_nll, dtype)
        assert (nll.dtype, rank.dtype) == (np.float64, np.int32)
        if dtype == "float64":
            np.testing.assert_array_equal(rank, expected_rank)
        assert np.abs(rank - expected_rank).max(initial=0) <= 1


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("size", [0, 20, 60, 100, 600, 1e4])
@pytest.mark.parametrize("sign", [-1, 1])
def test_output_of_logits_that_are_all_large_or_all_small(size, sign, dtype):
    """Some blocks need a shift and some do not. Limits grow as the rounding of the logits does."""
    H, W_out, y = draw(300, 130, 5, dtype)
    H[:, 0] = 1
    H[:100, 0] = 0.1
    W_out[:, 0] += sign * size
    wide = H.astype(float), W_out.astype(float), y
    factor = 8 * (1 + size / 100)  # measured: 2.7 in place of 8
    for found, right in zip(
        jit.output("softmax", H, W_out, y), reference.output("softmax", *wide), strict=True
    ):
        largest = np.abs(right).max()
        assert np.abs(found - right).max() <= factor * LIMITS[dtype] * largest
    nll, _ = jit.score("softmax", H, W_out, y)
    expected, _ = reference.score("softmax", *wide)
    assert np.abs(nll - expected).max() <= factor * LIMITS[dtype] * expected.max()


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("n_items", [48, 131])
def test_equal_rows_tie_to_the_bit(n_items, dtype):
    """Whatever tile, block or thread they fall in: every rank is the last."""
    for N, D in ((5, 3), (130, 17), (300, 65)):
        H, W_out, y = draw(N, n_items, D, dtype)
        _, rank = jit.score("softmax", H, np.repeat(W_out[:1], n_items, axis=0), y)
        assert rank.tolist() == [n_items] * N


@pytest.mark.parametrize("dtype", LIMITS)
def test_one_item_that_is_not_a_number_is_noticed(dtype):
    H, W_out, y = draw(40, 60, 5, dtype)
    W_out[7, 2] = np.nan
    y[:] = 3
    assert np.isnan(jit.output("softmax", H, W_out, y)[0])
    nll, rank = jit.score("softmax", H, W_out, y)
    assert np.isnan(nll).all()
    assert (rank > 1).all()


# Exponential


def test_exp32():
    """Two units in the last place where the result is a normal number; clamped beyond."""
    x = np.concatenate([np.linspace(-87, 88.7, 4001), np.linspace(-1, 1, 1001), [0.0, 1e-30]])
    x = x.astype(np.float32)
    found = np.array([jit._exp32(v) for v in x], np.float32)
    exact = np.exp(x.astype(float))
    assert np.max(np.abs(found - exact) / np.spacing(exact.astype(np.float32))) <= 2
    assert jit._exp32(np.float32(0)) == 1
    assert jit._exp32(np.float32(-1e30)) == jit._exp32(np.float32(-87))
    assert np.isfinite(jit._exp32(np.float32(1e30)))
    assert np.isnan(jit._exp32(np.float32("nan")))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1, 5, 16, 37])
def test_activations(size, dtype):
    """Within rounding; whole vectors and the rest of one, nothing beside them."""
    x = np.resize([0, -0.3, 3, -1e-3, 20, -88, 1e4, -1e4, np.inf, -np.inf, np.nan], size + 2)
    lanes, unit = jit._lanes(dtype), np.finfo(dtype).eps
    for sigmoid, exact in (True, scipy.special.expit), (False, np.tanh):
        found = x.astype(dtype)
        jit._activate(sigmoid, found, 1, size, lanes)
        np.testing.assert_array_equal(found[[0, -1]], x.astype(dtype)[[0, -1]])
        expected = exact(x[1:-1].astype(dtype).astype(float))
        np.testing.assert_allclose(found[1:-1], expected, rtol=0, atol=2 * unit)


# Work arrays


SPEC = Spec(hidden_size=5, dropout_in=0.3, dropout_out=0.3)
PLAN = Plan(batch=3, window=50, epochs=2, loss_scale="mean")
RNG = np.random.default_rng(4)
LOG = from_sequences([RNG.integers(0, 70, n) for n in (140, 0, 90, 1, 61, 12, 7)], 70)


def train(spec=SPEC, plan=PLAN):
    *_, last = training.epochs(spec, Rule(), plan, LOG)
    return b"".join(block.tobytes() for block in (*last.params, *last.accumulators))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("cell", ["gru", "tanh"])
def test_nothing_depends_on_what_work_arrays_hold_before(monkeypatch, cell, dtype):
    spec = Spec(**{**vars(SPEC), "cell": cell, "dtype": dtype, "memory": 9})
    specs = [spec, replace(spec, output="mixture")]
    if jit.HALF and dtype == "float32":
        specs += [replace(one, products="bfloat16") for one in specs]
    H, W_out, y = draw(130, 70, 5, dtype)

    def everything():
        yield from map(train, specs)
        for result in (jit.output, jit.score):
            yield from (np.asarray(a).tobytes() for a in result("softmax", H, W_out, y))

    expected = list(everything())
    empty, aligned, poisoned = np.empty, jit._aligned, set()

    def garbage(shape, dtype=float, *args, **kwargs):
        array = empty(shape, dtype, *args, **kwargs)
        if array.dtype.kind in "fi":
            array.fill(np.nan if array.dtype.kind == "f" else -7)
        return array

    def spoilt(shape, dtype):
        array = aligned(shape, dtype)  # the padding of words of two bfloat16 has to be 0
        if array.dtype.kind == "f":
            array.fill(np.nan)
            poisoned.add(array.shape)
        return array

    monkeypatch.setattr(np, "empty", garbage)
    monkeypatch.setattr(jit, "_aligned", spoilt)
    assert list(everything()) == expected
    assert len(poisoned) > 10


@pytest.mark.parametrize("W_in_rows", ["touched", "dense"])
def test_a_user_alone_shares_nothing(W_in_rows):
    """One user: W_h has one row whether it is shared or not."""
    log = from_sequences([RNG.integers(0, 20, 60)], 20)
    ends = []
    for sharing in ("collaborative", "pooled"):
        spec = Spec(hidden_size=4, sharing=sharing)
        params = model.initialise(spec, 1, 20, 0)
        rule = Rule(W_in_rows=W_in_rows)
        plan = Plan(batch=2, window=7, epochs=2)
        *_, last = training.epochs(spec, rule, plan, log, params=params)
        ends.append([block.tobytes() for block in (*last.params, *last.accumulators)])
    assert ends[0] == ends[1]


@numba.njit
def run_pass(early, gate, W_out, ms, lanes, old, m, out, rule):
    """How far a single thread had updated before the pass, and after it."""
    if early:
        jit._update_ahead(0, gate, 1, W_out, ms, lanes, old, True, True, out, rule)
    come = out.ahead[0, 0]
    jit._tiles(0, 1, W_out, ms, lanes, old, True, True, m, out, rule)
    return come, out.ahead[0, 0]


def test_tiles_updated_ahead_are_not_updated_again(monkeypatch):
    dtype, items, D, m = np.dtype(np.float32), 5 * jit.TILE - 7, 9, 32
    rule = tuple(np.float32(x) for x in (0.01, 0.9, 0.1, 1e-8))
    monkeypatch.setattr(numba, "get_num_threads", lambda: 1)
    found = []
    for early in False, True:
        rng = np.random.default_rng(0)
        out = jit._output_work(m, items, D, dtype)
        W_out, ms = (rng.random((items, D)).astype(dtype) for _ in range(2))
        before = W_out.copy()
        for block in out.E, out.G, out.HT:
            block[:] = rng.random(block.shape)
        gate = np.zeros(16, np.int64)
        come = run_pass(early, gate, W_out, ms, jit._lanes(dtype), m, m, out, rule)
        assert come == (5 * jit.TILE if early else 0, 0)
        assert np.all(W_out != before)
        found.append((W_out, ms, out.E[:, :m], out.S, out.U))
    for plain, early in zip(*found, strict=True):
        np.testing.assert_array_equal(early, plain)


def test_compilation_is_told_once_and_only_where_it_takes_long(monkeypatch, caplog):
    class Kernel:
        def __init__(self, seconds):
            self.seconds = seconds

        def compile(self, kinds):
            time.sleep(self.seconds)

    caplog.set_level(logging.INFO, "crnn_np")
    jit._tell.cache_clear()
    jit._load(Kernel(0))
    assert not caplog.records
    monkeypatch.setattr(jit, "PATIENCE", 0.01)
    for _ in range(2):
        jit._load(Kernel(0.5))
    [record] = caplog.records
    assert "compiling for this processor" in record.getMessage()


def test_every_signature_is_loaded_once_and_before_the_threads(monkeypatch):
    """Or all of them would compile it, without a word."""
    add = numba.njit(lambda p, n, gate, x: p + x)
    loaded, real = [], add.compile
    monkeypatch.setattr(add, "compile", lambda given: (loaded.append(given[-1]), real(given)))
    for x in np.int64(1), np.int64(2), np.float64(0.5), np.float64(1.5):
        assert jit._together(3, add, x) == [x, x + 1, x + 2]
    assert loaded == [numba.int64, numba.float64]


# Threads that are missing


@pytest.fixture
def starts(monkeypatch):
    """The helpers that were started, and what comes after each start."""
    monkeypatch.setattr(numba, "get_num_threads", lambda: 3)
    starts, real = SimpleNamespace(helpers=[], then=lambda: None), threading.Thread.start

    def start(thread):
        if isinstance(thread, threading.Timer):
            return real(thread)
        starts.helpers.append(thread)
        real(thread)
        return starts.then()

    monkeypatch.setattr(threading.Thread, "start", start)
    return starts


def meeting():
    """`score` in three threads, which meet in it."""
    H, W_out = np.ones((40, 5), np.float32), np.ones((300, 5), np.float32)
    return jit.score("softmax", H, W_out, np.zeros(40, np.int32))


def test_a_thread_that_does_not_start_leaves_none_waiting(starts):
    def refuse():
        if len(starts.helpers) == 2:
            raise RuntimeError("can't start new thread")

    starts.then = refuse
    with pytest.raises(RuntimeError, match="can't start new thread"):
        meeting()
    for thread in starts.helpers:
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def ctrl_c():
    """Send it; where a shell started the tests in the background it would be ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_all_threads(starts, ctrl_c):
    expected = meeting()
    starts.then = ctrl_c
    with pytest.raises(KeyboardInterrupt):
        meeting()
    assert len(starts.helpers) == 4
    assert not any(thread.is_alive() for thread in starts.helpers)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    starts.then = lambda: None
    for one, other in zip(meeting(), expected, strict=True):
        np.testing.assert_array_equal(one, other)
