"""What a run will need before it is made: memory counted, time measured on a sample of windows."""

import math
import os
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import backends
from .data import EventLog, check_log, concatenate, cut_tail, from_sequences
from .errors import DeviceError, SettingsError
from .evaluation import SCORED_AT_ONCE, evaluate, read_past
from .model import (
    Accumulators,
    Params,
    Spec,
    blank,
    initialise,
    new_accumulators,
    on_device,
    shapes,
)
from .optim import Rule
from .training import check_products, train_run, validation_split, workspace
from .windows import Plan, epoch_slices, replay_slices

Array = np.ndarray

SAMPLE_SECONDS = 4.0  # `estimate` trains windows, and validates, for about this long each
PIECE_SECONDS = 0.1  # in pieces that take about this long


class Estimate(NamedTuple):
    """What a run will need, as `estimate` says.

    Attributes
    ----------
    windows : int
        Of an epoch.
    events : int
        Events that are predicted in an epoch.
    parameters : int
        Numbers in all blocks of parameters.
    bytes : int or None
        Largest resident memory of this process, all of it, if it makes the run.
    device_bytes : int
        Largest memory on the device of the backend (`device_memory`).
    seconds_per_epoch : float
        Training only, without the validation.
    validation_seconds : float
        The validation after an epoch; 0 without early stopping.
    epochs : int
        The most epochs there can be, those of the refit among them.
    seconds : float
        Of all these epochs with their validation.

    Where there is no device to measure with, bytes is None and all seconds are NaN.
    """

    windows: int
    events: int
    parameters: int
    bytes: int | None
    device_bytes: int
    seconds_per_epoch: float
    validation_seconds: float
    epochs: int
    seconds: float


def duration(seconds: float) -> str:
    """2.31 s, 41 s, 3 min 20 s, 12 h 5 min."""
    if seconds < 59.95:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _resident() -> tuple[int, int]:
    """Resident memory of this process in bytes, now and the most so far.

    Where the system does not tell what it is now (macOS), it is taken to be the most so far.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = dict(line.split()[:2] for line in lines if line.startswith(("VmRSS", "VmHWM")))
        return int(kilobytes["VmRSS:"]) * 1024, int(kilobytes["VmHWM:"]) * 1024
    except (OSError, KeyError):
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        most *= 1 if sys.platform == "darwin" else 1024
        return most, most


def _rehearse(
    module: ModuleType,
    spec: Spec,
    rule: Rule,
    plan: Plan,
    log: EventLog,
    validation: EventLog | None,
) -> int:
    """Train a full window and validate, on few users; bytes of parameters and accumulators."""
    users = min(max(plan.batch, 64), log.n_users)  # 64: those that `evaluate` has side by side
    length = min(max(plan.window, 128) + 1, int(log.lengths.max(initial=0)))
    few = EventLog(
        np.arange(users + 1) * length,
        np.arange(users * length, dtype=np.int32) % np.int32(max(log.n_items, 1)),
        None,
        log.user_ids[:users],
        log.item_ids,
    )
    first = epoch_slices(plan, few.lengths, 1).part(0, 1)
    held = [workspace(module, spec, plan, log)]
    part = log
    if plan.patience:
        part, validation, _ = validation_split(plan, log, validation)
    held.append(epoch_slices(plan, part.lengths, 1))
    held.append(read_past(spec, part))
    params = blank(spec, users, log.n_items)
    acc = new_accumulators(params)
    live = on_device(module, params), on_device(module, acc)
    s = module.to_device(np.zeros((1, plan.batch, spec.hidden_size), spec.dtype))
    past = on_device(module, read_past(spec, few))
    train_run(module, spec, rule, plan.scale, *live, s, few, first, held[0], past)
    if plan.patience:
        held.append(concatenate(part, validation))
        evaluate(module, spec, live[0], *cut_tail(few, np.clip(few.lengths - 1, 0, 8)))
    return sum(block.nbytes for block in (*params, *acc))


def _held_beside(*arguments: Any) -> int:
    """Bytes that `_rehearse` holds beside parameters and accumulators at the most.

    NumPy tells `tracemalloc` of every array, so that a backend's own work arrays count as well.
    """
    traced = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        tables = _rehearse(*arguments)
        return tracemalloc.get_traced_memory()[1] - before - tables
    finally:
        if not traced:
            tracemalloc.stop()


def load_kernels(spec: Spec, rule: Rule, plan: Plan, backend: str = "numba") -> None:
    """Have a backend load, or compile, all that a run with these settings calls.

    Not traced: `tracemalloc` doubles the time of the compiler.
    """
    tiny = from_sequences([[0, 1, 2], [0, 1, 2]])
    small = replace(plan, batch=1, window=2, validation_range=(1, 1))
    _rehearse(backends.get(backend), replace(spec, hidden_size=1), rule, small, tiny, None)


def _n_parameters(spec: Spec, log: EventLog) -> int:
    return sum(math.prod(shape) for shape in shapes(spec, log.n_users, log.n_items).values())


def _table_bytes(spec: Spec, log: EventLog) -> int:
    """Bytes of parameters and accumulators."""
    return 2 * _n_parameters(spec, log) * np.dtype(spec.dtype).itemsize + 8 * (log.n_items + 1)


def _host_table_bytes(spec: Spec, plan: Plan, log: EventLog) -> int:
    # With early stopping the last epoch's are still there when the result is made or read.
    return _table_bytes(spec, log) * (2 if plan.patience else 1)


def _check_room(needed: int) -> None:
    """Raise SettingsError where the machine has less memory than `needed` bytes."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise SettingsError(
            f"training needs {needed / 1e9:.1f} GB of memory and this machine has "
            f"{there / 1e9:.1f} GB: lower hidden_size, or prepare the data with fewer users or "
            "items"
        )


def memory(
    spec: Spec,
    rule: Rule,
    plan: Plan,
    log: EventLog,
    *,
    validation: EventLog | None = None,
    backend: str = "numba",
) -> int:
    """Largest resident memory in bytes of this process, all of it, if it makes a run of `epochs`.

    What the process holds with the kernels loaded is measured, and one window rehearsed for what
    is held beside parameters and accumulators. Where kernels had to be compiled, the memory of the
    compiler counts too; the next process loads them and needs less. The memory of a GPU does not
    count (`device_memory`).
    """
    load_kernels(spec, rule, plan, backend)
    now, most = _resident()
    beside = _held_beside(backends.get(backend), spec, rule, plan, log, validation)
    return max(most, now + beside + _host_table_bytes(spec, plan, log))


def _bytes_of(past: tuple | None) -> int:
    """Bytes of the arrays of a named tuple and of those in it."""
    return sum(_bytes_of(b) if isinstance(b, tuple) else b.nbytes for b in past or ())


def device_memory(
    spec: Spec,
    rule: Rule,
    plan: Plan,
    log: EventLog,
    *,
    validation: EventLog | None = None,
    backend: str = "numba",
) -> int:
    """Largest memory in bytes on the device of a backend, if `epochs` runs there; 0 on the host.

    It is counted from the shapes of all arrays, so that it takes no device. What CUDA and cuBLAS
    hold for themselves, some hundred MB, does not count.
    """
    module = backends.get(backend)
    if not hasattr(module, "training_bytes"):
        return 0

    def training(part: EventLog) -> tuple[int, int]:
        run = epoch_slices(plan, part.lengths, 1)
        held, more = module.training_bytes(spec, rule, part, plan.batch, plan.window, run)
        return held + _bytes_of(read_past(spec, part)), more

    tables = _table_bytes(spec, log)
    if not plan.patience:
        return tables + sum(training(log))
    part, validation, whole = validation_split(plan, log, validation)
    held, more = training(part)
    replay = replay_slices(whole.lengths, part.lengths)
    scoring = module.scoring_bytes(spec, log.n_items, replay, whole.lengths, SCORED_AT_ONCE)
    scoring += _bytes_of(read_past(spec, whole, part))
    refit = sum(training(whole)) if plan.refit else 0
    return tables + max(held + max(more, scoring), refit)


def sample_epoch(
    module: ModuleType,
    spec: Spec,
    rule: Rule,
    plan: Plan,
    params: Params,
    acc: Accumulators,
    log: EventLog,
    at_least: float = SAMPLE_SECONDS,
) -> tuple[float, float]:
    """Time of an epoch, from some of its windows, full and ragged alike; writes to the tables.

    Parameters
    ----------
    at_least : float
        Train windows for this many seconds, or all of them.

    Returns
    -------
    seconds : float
        Of an epoch, scaled up by events.
    measured : float
        Seconds that the windows took which it is scaled from; the same where they were all.
    """
    run = epoch_slices(plan, log.lengths, 1)
    n_windows = run.key.size
    if not n_windows:
        return 0.0, 0.0
    work = workspace(module, spec, plan, log)
    past = on_device(module, read_past(spec, log))
    params, acc = on_device(module, params), on_device(module, acc)
    s = module.to_device(np.zeros((1, plan.batch, spec.hidden_size), spec.dtype))
    events = np.clip(log.lengths[run.user] - 1 - run.start, 0, run.length).sum(axis=1)

    def timed(first: int, last: int) -> float:
        began = time.perf_counter()
        part = run.part(first, last)
        train_run(module, spec, rule, plan.scale, params, acc, s, log, part, work, past)
        return time.perf_counter() - began

    fullest = int(np.argmax(events))
    timed(fullest, fullest + 1)  # not counted: it touches the work arrays for the first time
    pace = PIECE_SECONDS / max(timed(fullest, fullest + 1), 1e-9)
    size = int(np.clip(pace, 1, n_windows))
    starts = np.arange(0, n_windows, size)
    per_piece = np.add.reduceat(events, starts)
    by_size = np.argsort(per_piece, kind="stable")
    golden = np.arange(starts.size) * (math.sqrt(5) - 1) / 2 % 1
    spread = np.argsort(np.argsort(golden))  # any first few are spread evenly over all
    seconds, done = 0.0, 0
    for piece in by_size[spread]:
        seconds += timed(starts[piece], starts[piece] + size)
        done += int(per_piece[piece])
        if seconds > at_least:
            break
    return seconds * int(events.sum()) / max(done, 1), seconds


def _validation_seconds(
    module: ModuleType, spec: Spec, params: Params, whole: EventLog, validation: EventLog
) -> float:
    """Time of a validation, from users of middling length where all would take long."""

    def timed(users: Array) -> float:
        tail = np.zeros_like(whole.lengths)
        tail[users] = validation.lengths[users]
        parts = cut_tail(whole, tail)
        began = time.perf_counter()
        evaluate(module, spec, params, *parts)
        return time.perf_counter() - began

    every = np.flatnonzero(validation.lengths)
    every = every[np.argsort(whole.lengths[every], kind="stable")]
    middle = max(every.size // 2 - 32, 0)
    some = every[middle : middle + 64]
    seconds = timed(some)
    ratio = int(whole.lengths[every].sum()) / max(int(whole.lengths[some].sum()), 1)
    if seconds * ratio > SAMPLE_SECONDS:
        return seconds * ratio
    return timed(every)


def _is_there(module: ModuleType, spec: Spec) -> bool:
    """Whether this machine has the device that a backend needs."""
    try:
        if hasattr(module, "device"):
            module.device(spec.dtype)
    except DeviceError:
        return False
    return True


def estimate(
    spec: Spec,
    rule: Rule,
    plan: Plan,
    log: EventLog,
    *,
    validation: EventLog | None = None,
    backend: str = "numba",
) -> Estimate:
    """What a run of `epochs` with these arguments will need; nothing is kept or written.

    Memory is counted (`memory`, `device_memory`); time is measured on a sample of the first
    epoch's windows, with parameters of its own, and scaled by events. Takes some seconds. Where
    the device that the backend needs is missing, only its memory is known.

    Raises
    ------
    SettingsError
        The run needs more memory than the machine has.
    """
    module = backends.get(backend)
    check_log(log)
    check_products(module, spec, rule)
    _check_room(_host_table_bytes(spec, plan, log))
    part = whole = log
    if plan.patience:
        part, validation, whole = validation_split(plan, log, validation)
    there = device_memory(spec, rule, plan, part, validation=validation, backend=backend)
    needed, seconds, validating = None, math.nan, math.nan if plan.patience else 0.0
    if _is_there(module, spec):
        needed = memory(spec, rule, plan, part, validation=validation, backend=backend)
        _check_room(needed)
        params = initialise(spec, log.n_users, log.n_items, plan.seed)
        acc = new_accumulators(params)
        seconds, _ = sample_epoch(module, spec, rule, plan, params, acc, part)
        if plan.patience:
            validating = _validation_seconds(module, spec, params, whole, validation)
    events, whole_events = (int(np.maximum(x.lengths - 1, 0).sum()) for x in (part, whole))
    epochs, total = plan.epochs, plan.epochs * seconds
    if plan.patience:
        total += plan.epochs * validating
        if plan.refit:
            epochs *= 2
            total += plan.epochs * seconds * whole_events / max(events, 1)
    windows = int(epoch_slices(plan, part.lengths, 1).key.size)
    n_parameters = _n_parameters(spec, log)
    sizes = windows, events, n_parameters, needed, there
    return Estimate(*sizes, seconds, validating, epochs, total)
