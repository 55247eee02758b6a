"""What a run will need: counted and measured before it, held against the run itself."""

import math
import os
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import emulator
import numpy as np
import pytest
from conftest import emulate

from crnn_np import backends, evaluation, model, planning, training
from crnn_np.backends import gpu
from crnn_np.data import cut_tail, from_sequences
from crnn_np.errors import DataError, DeviceError, SettingsError
from crnn_np.estimator import CollaborativeRNN
from crnn_np.model import Spec
from crnn_np.optim import Rule
from crnn_np.windows import Plan, epoch_slices


def random_sequences(rng, lengths, n_items):
    return from_sequences([rng.integers(0, n_items, n) for n in lengths], n_items)


LOG = random_sequences(np.random.default_rng(2), [30, 9, 14, 1, 22, 3], 12)
SPEC = Spec(hidden_size=3)
RULE = Rule(learning_rate=0.05, rho=0.9, eps=1e-4)
PLAN = Plan(batch=2, window=8, epochs=1, loss_scale="mean", validation_range=(2, 4))


def digest(fitted):
    return b"".join(block.tobytes() for block in (*fitted.params, *fitted.accumulators))


@pytest.mark.parametrize("backend", backends.MODULES)
def test_an_estimate_counts_what_a_run_does(backend):
    found = planning.estimate(SPEC, RULE, replace(PLAN, epochs=5), LOG, backend=backend)
    report = list(training.epochs(SPEC, RULE, PLAN, LOG, backend=backend))[0]
    assert found.events == report.events
    assert found.windows == int(report.accumulators.step[0])
    assert found.parameters == sum(block.size for block in report.params)
    assert found.epochs == 5
    assert found.seconds == 5 * found.seconds_per_epoch > 0
    assert found.validation_seconds == 0


@pytest.mark.parametrize("given", [False, True])
def test_an_estimate_with_early_stopping_counts_both_phases(given):
    plan = replace(PLAN, epochs=5, patience=2)
    log, validation = LOG, None
    if given:
        log, validation = cut_tail(LOG, training.validation_lengths(plan, LOG.lengths))
    found = planning.estimate(SPEC, RULE, plan, log, validation=validation, backend="numpy")
    first = next(training.epochs(SPEC, RULE, plan, log, validation=validation, backend="numpy"))
    assert (found.events, found.epochs) == (first.events, 10)
    assert found.validation_seconds > 0
    choosing = 5 * (found.seconds_per_epoch + found.validation_seconds)
    refit = 5 * found.seconds_per_epoch * 73 / found.events
    assert found.seconds == pytest.approx(choosing + refit)
    plan = replace(plan, refit=False)
    kept = planning.estimate(SPEC, RULE, plan, log, validation=validation, backend="numpy")
    assert kept.epochs == 5
    assert kept.seconds == pytest.approx(5 * (kept.seconds_per_epoch + kept.validation_seconds))


@pytest.mark.parametrize("order", ["random", "length"])
@pytest.mark.parametrize("slow", [0.1, 10, 100])
def test_the_time_of_an_epoch_is_scaled_from_some_of_its_windows(monkeypatch, order, slow):
    """On a clock that gives a window 0.1 ms, and 0.05 ms more for each event, times `slow`."""
    clock, calls = 0.0, []

    def scripted(backend, spec, rule, scale, params, acc, s, log, run, work, past):
        nonlocal clock
        events = np.clip(log.lengths[run.user] - 1 - run.start, 0, run.length).sum()
        clock += slow * (1e-4 * run.key.size + 5e-5 * events)
        calls.append(run.key.size)

    monkeypatch.setattr(planning, "train_run", scripted)
    monkeypatch.setattr(planning.time, "perf_counter", lambda: clock)
    rng = np.random.default_rng(5)
    log = random_sequences(rng, rng.integers(1, 2000, 600), 9)
    plan = Plan(batch=8, window=16, order=order)
    params = model.initialise(SPEC, log.n_users, log.n_items, 0)
    arguments = (backends.get("numpy"), SPEC, RULE, plan, params, None, log)
    seconds, measured = planning.sample_epoch(*arguments)
    windows = epoch_slices(plan, log.lengths, 1).key.size
    events = np.maximum(log.lengths - 1, 0).sum()
    expected = slow * (1e-4 * windows + 5e-5 * events)
    if slow == 0.1:
        assert sum(calls) == windows + 2  # all of it, where that takes no longer
        assert seconds == pytest.approx(expected)
    else:
        assert seconds == pytest.approx(expected, rel=0.05)
        assert clock < planning.SAMPLE_SECONDS + 0.1 + 4 * slow * (1e-4 + 5e-5 * 8 * 16)


def test_an_estimate_changes_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fitted = CollaborativeRNN(preset=None, backend="numpy", hidden_size=3, epochs=1).fit(LOG)
    before, reports = digest(fitted), fitted.reports
    fitted.set_params(patience=2, hidden_size=5)
    assert fitted.estimate(LOG).parameters == 6 * 5 * 15 + 12 * 15 + 12 * 5
    assert digest(fitted) == before
    assert fitted.reports is reports
    assert fitted.fitted.spec.hidden_size == 3
    assert not list(tmp_path.iterdir())


def test_an_estimate_of_a_log_without_a_pair_of_events():
    for log in (from_sequences([[1], [0], []], 3), from_sequences([[], []], 3)):
        found = planning.estimate(SPEC, RULE, PLAN, log, backend="numpy")
        assert found.events == 0
        assert found.windows == log.n_events // 2
        with pytest.raises(DataError, match="no event to evaluate"):
            planning.estimate(SPEC, RULE, replace(PLAN, patience=1), log, backend="numpy")
        assert not tracemalloc.is_tracing()


def test_kernels_are_loaded_without_tracing_memory(monkeypatch):
    traced = []

    def train_run(*arguments):
        traced.append(tracemalloc.is_tracing())
        return training.train_run(*arguments)

    monkeypatch.setattr(planning, "train_run", train_run)
    planning.load_kernels(SPEC, RULE, PLAN, "numpy")
    assert traced == [False]
    planning.memory(SPEC, RULE, PLAN, LOG, backend="numpy")
    assert traced == [False, False, True]


@pytest.mark.parametrize("there", [100, 25_000_000])
def test_more_memory_than_the_machine_has(monkeypatch, there):
    """Less than the tables, and less than the process."""
    monkeypatch.setattr(planning.os, "sysconf", lambda name: math.isqrt(there))
    with pytest.raises(SettingsError, match=r"GB of memory and this machine has 0.0 GB: lower"):
        planning.estimate(SPEC, RULE, PLAN, LOG, backend="numpy")


def test_memory_does_not_grow_with_what_is_not_resident():
    """Users have a W_h each; the rehearsal makes few of them, however many there are."""
    many = from_sequences([[0, 1]] * 100, 2)._replace(
        indptr=np.zeros(10**6 + 1, np.int64), user_ids=np.empty(10**6, object)
    )
    spec = Spec(hidden_size=400)
    found = planning.memory(spec, RULE, PLAN, many, backend="numpy")
    tables = 2 * 4 * 3 * 10**6 * 400**2
    assert tables < found < 1.01 * tables


def most_on_the_device(monkeypatch, spec, rule, plan, log):
    """The most that a run really takes on the emulated device."""
    tally = emulator.Tally()
    monkeypatch.setattr(emulator.Array, "__init__", lambda *args: tally.made(*args))
    monkeypatch.setattr(training, "RUN_SECONDS", 1e9)
    for _ in training.epochs(spec, rule, plan, log, backend="cupy"):
        pass
    assert tally.now == 0
    return tally.most


WIDE = random_sequences(np.random.default_rng(2), [40, 33, 36, 25, 39, 38, 37, 20], 500)
MIXTURE = {"output": "mixture", "memory": 9}
EARLY = {"epochs": 2, "patience": 1}


@pytest.mark.parametrize(
    ("spec", "rule", "plan", "limit"),
    [
        ({}, {}, {"batch": 8}, 0),
        ({"cell": "tanh", "sharing": "pooled", "products": "tf32"}, {}, {"batch": 8}, 0),
        ({**MIXTURE, "dtype": "float64"}, {}, {"batch": 8}, 0),
        ({}, {}, {"batch": 4, **EARLY}, 0.01),
        (MIXTURE, {}, {"batch": 4, **EARLY, "refit": False}, 0.01),
        ({}, {"clip": 1.0}, {"batch": 4}, 0.1),
        ({"sharing": "pooled"}, {"clip": 1.0}, {"batch": 4}, 0.1),
    ],
)
def test_device_memory_is_what_the_arrays_take(monkeypatch, spec, rule, plan, limit):
    emulate(monkeypatch)
    plan = replace(PLAN, window=16, **plan)
    settings = Spec(hidden_size=16, **spec), Rule(**rule), plan, WIDE
    counted = planning.device_memory(*settings, backend="cupy")
    assert counted == pytest.approx(most_on_the_device(monkeypatch, *settings), rel=limit)


def test_device_memory_does_not_grow_with_an_epoch(monkeypatch):
    """A run of many windows goes in parts."""
    emulate(monkeypatch)
    plan, log = replace(PLAN, window=16), random_sequences(np.random.default_rng(2), [400] * 4, 50)
    settings, found = (SPEC, RULE, plan, log), {}
    for size in (1 << 13, 1 << 24):
        monkeypatch.setattr(gpu, "RUN_BYTES", size)
        counted = planning.device_memory(*settings, backend="cupy")
        with monkeypatch.context() as m:
            found[size] = most_on_the_device(m, *settings)
            assert found[size] <= counted < found[size] + max(size / 2, 1 << 13)
    assert found[1 << 24] - found[1 << 13] > 1 << 15


def test_device_memory_while_a_validation_is_scored(monkeypatch):
    """Which takes the most where windows are small and the validation part is long."""
    for module in (planning, evaluation):
        monkeypatch.setattr(module, "SCORED_AT_ONCE", 256)
    log = random_sequences(np.random.default_rng(2), [40] * 70, 20)
    plan = replace(PLAN, batch=8, window=2, patience=1, validation_range=(30, 30), refit=False)
    pooled = {"sharing": "pooled"}
    for spec, D, shared in (
        ({}, 16, 1 << 17),
        ({"cell": "tanh", **pooled}, 16, 1 << 17),
        ({"cell": "tanh", **pooled}, 45, 8000),  # less than the matrix takes
        (pooled, 30, 8000),
        (MIXTURE, 16, 1 << 17),
    ):
        emulate(monkeypatch, shared_limit=shared)
        settings = Spec(hidden_size=D, **spec), RULE, plan, log
        before = planning.device_memory(*settings, backend="cupy")
        with monkeypatch.context() as m:
            assert before == pytest.approx(most_on_the_device(m, *settings), rel=0.06)


def test_device_memory_on_the_host_is_none():
    assert planning.device_memory(SPEC, RULE, PLAN, LOG, backend="numba") == 0


def without_a_device(*args):
    raise DeviceError("no CUDA device")


@pytest.mark.parametrize("patience", [0, 1])
def test_an_estimate_without_the_device(monkeypatch, patience):
    """All but what is measured is as with it."""
    emulate(monkeypatch)
    plan = replace(PLAN, patience=patience)
    there = planning.estimate(SPEC, RULE, plan, LOG, backend="cupy")
    monkeypatch.setattr(gpu, "device", without_a_device)
    found = planning.estimate(SPEC, RULE, plan, LOG, backend="cupy")
    assert found.bytes is None
    assert math.isnan(found.seconds)
    assert math.isnan(found.seconds_per_epoch)
    assert math.isnan(found.validation_seconds) == bool(patience)
    measured = ("bytes", "seconds", "seconds_per_epoch", "validation_seconds")
    assert found._replace(**{name: getattr(there, name) for name in measured}) == there


def test_resident_memory_without_proc(monkeypatch):
    now, most = planning._resident()
    assert 0 < now <= most

    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(planning.Path, "read_text", missing)
    assert planning._resident()[0] == planning._resident()[1] >= now


MEASURED = """
import sys, numpy as np
from crnn_np import planning, training
from crnn_np.data import from_sequences
from crnn_np.model import Spec
from crnn_np.optim import Rule
from crnn_np.windows import Plan

backend, patience, clip = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
rng = np.random.default_rng(0)
log = from_sequences([rng.integers(0, 60_000, 100) for _ in range(8)], 60_000)
settings = Spec(hidden_size=64), Rule(clip=clip), Plan(4, 32, epochs=1, patience=patience)
needed = planning.memory(*settings, log, backend=backend)
before = planning._resident()[1]
for report in training.epochs(*settings, log, backend=backend):
    pass
print(needed, before, planning._resident()[1])
"""


@pytest.mark.parametrize(
    ("backend", "patience", "clip"),
    [("numpy", 0, 0), ("numba", 0, 0), ("numba", 0, 1), ("numpy", 1, 0), ("numba", 1, 0)],
)
def test_memory_is_what_a_run_needs(backend, patience, clip):
    """In a process of its own, of which 120 to 250 MB are parameters and accumulators."""
    command = [sys.executable, "-c", MEASURED, backend, str(patience), str(clip)]
    environment = {**os.environ, "PYTHONPATH": str(Path(training.__file__).parents[1])}
    text = subprocess.check_output(command, env=environment, text=True)
    needed, before, most = map(int, text.split())
    assert before < most, "the run, not the rehearsal, needed most"
    assert needed == pytest.approx(most, rel=0.15)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.1234, "0.123 s"),
        (59.4, "59.4 s"),
        (59.99, "1 min 0 s"),
        (60, "1 min 0 s"),
        (200.4, "3 min 20 s"),
        (3599.9, "1 h 0 min"),
        (1e6, "277 h 46 min"),
    ],
)
def test_durations(seconds, text):
    assert planning.duration(seconds) == text
