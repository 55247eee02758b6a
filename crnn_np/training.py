"""Training: `step` is the whole algorithm on one window, `epochs` a generator of reports.

`estimate` tells what a run will need before it is made.
"""

import logging
import math
import os
import resource
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import backends
from .data import EventLog, concatenate, cut_tail, from_sequences
from .errors import SettingsError, TrainingError
from .evaluation import evaluate
from .model import (
    Accumulators,
    Grads,
    Params,
    Spec,
    gather,
    initialise,
    new_accumulators,
    scatter,
    shapes,
)
from .optim import Rule
from .windows import OUTPUT, Plan, Slice, Window, dropout_keep, epoch_slices

Array = np.ndarray

log_ = logging.getLogger(__name__)

RUN_SECONDS = 0.5  # a run of windows between two calls of `progress` takes about this long
SAMPLE_SECONDS = 4.0  # `estimate` trains windows, and validates, for about this long each
PIECE_SECONDS = 0.1  # in pieces that take about this long


class Report(NamedTuple):
    """What `epochs` yields at the end of an epoch.

    Attributes
    ----------
    phase : {"train", "choose", "refit", "keep"}
        "choose" looks for the number of epochs on the validation part, "refit" trains anew on the
        whole training part, "keep" closes a run that keeps its best epoch, "train" does neither.
    epoch : int
        Counted from 1 in each phase.
    epochs : int
        The most epochs this phase can have.
    loss : float
        Mean training loss in nats per event, dropout applied, weights moving.
    events : int
        Events that were predicted in the epoch.
    seconds : float
        Training only, without the validation.
    validation : dict or None
        `evaluation.evaluate` on the validation part.
    best_epoch : int or None
        Epoch with the lowest validation error (Eq. 3) so far.
    params, accumulators
        The live arrays; the last report's are the result.
    """

    phase: str
    epoch: int
    epochs: int
    loss: float
    events: int
    seconds: float
    validation: dict[str, Any] | None
    best_epoch: int | None
    params: Params
    accumulators: Accumulators


def gradients(
    backend: ModuleType,
    spec: Spec,
    params: Params,
    s0: Array,
    window: Window,
    key: int,
    scale: float,
) -> tuple[float, Grads, Array, Array, Array]:
    """Loss of one window and the gradient of every block, by hand (Appendix A).

    Parameters
    ----------
    s0 : real[S, B, D]
        State before the window.
    key : uint64
        Of the dropout masks.
    scale : float
        Factor on the gradients; the loss stays the sum in nats.

    Returns
    -------
    loss, Grads, ds0 real[S, B, D], dA real[T, B, G*D], s_T real[S, B, D]
    """
    A, W_h = gather(backend, spec, params, window, key)
    states, cache = backend.cell_forward(
        spec.cell_kind, s0, spec.init_state, A, W_h, window.event, window.carry
    )
    H = states[1:, 0]
    if spec.dropout_out:
        keep = dropout_keep(key, OUTPUT, *H.shape, spec.dropout_out, spec.dtype)
        H = H * keep
    cells = window.target > 0
    loss, dH_cells, dW_out = backend.output(spec.output, H[cells], params.W_out, window.y[cells])
    dH = np.zeros_like(H)
    dH[cells] = dH_cells * scale
    if spec.dropout_out:
        dH *= keep
    ds0, dA, dW_h = backend.cell_backward(
        spec.cell_kind, dH, states, cache, spec.init_state, W_h, window.event, window.carry
    )
    dW_h_rows, dW_in = scatter(backend, spec, window, key, dA, dW_h)
    return loss, Grads(dW_h_rows, dW_in, dW_out * scale), ds0, dA, states[-1]


def _clipped(grads: Grads, limit: float) -> Grads:
    """All blocks scaled so that their common norm is at most `limit` (Pascanu et al., 2013)."""
    blocks = (grads.W_h.values[: grads.W_h.count], grads.W_in.values[: grads.W_in.count])
    norm = np.sqrt(sum(np.sum(b * b, dtype=np.float64) for b in (*blocks, grads.W_out)))
    if norm <= limit:
        return grads
    factor = float(limit / norm)
    W_h, W_in = (g._replace(values=g.values * factor) for g in (grads.W_h, grads.W_in))
    return Grads(W_h, W_in, grads.W_out * factor)


def step(
    backend: ModuleType,
    spec: Spec,
    rule: Rule,
    params: Params,
    accumulators: Accumulators,
    s0: Array,
    window: Window,
    key: int,
    scale: float,
) -> tuple[float, int, Array]:
    """One window of Algorithm 1: forward, backward, update. Writes to params and accumulators.

    Returns
    -------
    loss : float
        Summed over the window, in nats.
    events : int
        Cells that counted in it.
    s_T : real[S, B, D]
        State after the window.
    """
    loss, grads, _, _, s_T = gradients(backend, spec, params, s0, window, key, scale)
    if rule.clip:
        grads = _clipped(grads, rule.clip)
    accumulators.step[0] += 1
    n = int(accumulators.step[0])
    stamp = accumulators.stamp if rule.W_in_rows == "dense" else None
    backend.update(rule, params.W_h, accumulators.W_h, None, n, grads.W_h)
    backend.update(rule, params.W_in, accumulators.W_in, stamp, n, grads.W_in)
    backend.update(rule, params.W_out, accumulators.W_out, None, n, grads.W_out)
    return float(loss), int(np.count_nonzero(window.target)), s_T


def train_run(
    backend: ModuleType,
    spec: Spec,
    rule: Rule,
    scale: float,
    params: Params,
    accumulators: Accumulators,
    s: Array,
    log: EventLog,
    run: Slice,
    work: Any,
) -> tuple[float, int]:
    """Train on a run of windows, the loop over `step` or the backend's fused form of it.

    Parameters
    ----------
    s : real[S, B, D]
        State before the run, overwritten with the state after it.
    run : Slice
        With an axis of K windows.
    work
        `workspace` of the backend.

    Returns
    -------
    loss, events : summed over the run
    """
    if hasattr(backend, "train_run") and not rule.clip:
        return backend.train_run(spec, rule, scale, params, accumulators, s, log, run, work)
    loss, events = 0.0, 0
    for k in range(run.key.size):
        piece = run.one(k)
        window = backend.window(log, piece, spec.dtype)
        window_loss, n, s_T = step(
            backend, spec, rule, params, accumulators, s, window, piece.key, scale
        )
        s[...] = s_T
        loss, events = loss + window_loss, events + n
    return loss, events


def validation_lengths(plan: Plan, lengths: Array) -> Array:
    """int64[U]: length of each user's validation part; at least one training event stays."""
    share = plan.validation_fraction / (1 - plan.validation_fraction)
    shortest, longest = plan.validation_range
    n = np.clip(np.rint(share * lengths), shortest, longest).astype(np.int64)
    return np.clip(n, 0, np.maximum(lengths - 1, 0))


def _workspace(module: ModuleType, spec: Spec, plan: Plan, log: EventLog) -> Any:
    """Work arrays of a backend's fused run; None where it has none."""
    if hasattr(module, "workspace"):
        return module.workspace(spec, log.n_items, plan.batch, plan.window)
    return None


def _validation_split(
    plan: Plan, log: EventLog, validation: EventLog | None
) -> tuple[EventLog, EventLog, EventLog]:
    """The part to train on, the validation part, and both as one log."""
    if validation is None:
        return *cut_tail(log, validation_lengths(plan, log.lengths)), log
    return log, validation, concatenate(log, validation)


def _train_epoch(
    backend: ModuleType,
    spec: Spec,
    rule: Rule,
    plan: Plan,
    params: Params,
    acc: Accumulators,
    log: EventLog,
    epoch: int,
    work: Any,
    progress: Callable[[int, int, float], None] | None,
) -> tuple[float, int]:
    """One pass over all users; the mean loss per event and the number of events."""
    run = epoch_slices(plan, log.lengths, epoch)
    total = int(np.maximum(log.lengths - 1, 0).sum())
    s = np.zeros((1, plan.batch, spec.hidden_size), spec.dtype)
    loss, events, done, size = 0.0, 0, 0, 4
    while done < run.key.size:
        began = time.perf_counter()
        part = run.part(done, done + size)
        part_loss, part_events = train_run(
            backend, spec, rule, plan.scale, params, acc, s, log, part, work
        )
        if not np.isfinite(part_loss):
            raise TrainingError(
                f"epoch {epoch}, windows {done + 1} to {done + part.key.size}: the loss is "
                f"{part_loss}, a finite number was expected; lower learning_rate or set clip"
            )
        loss, events, done = loss + part_loss, events + part_events, done + part.key.size
        if progress:
            progress(events, total, loss)
        pace = size * RUN_SECONDS / max(time.perf_counter() - began, 1e-9)
        size = int(np.clip(pace, max(size // 4, 1), size * 4))
    return loss / max(events, 1), events


def epochs(
    spec: Spec,
    rule: Rule,
    plan: Plan,
    log: EventLog,
    *,
    validation: EventLog | None = None,
    params: Params | None = None,
    accumulators: Accumulators | None = None,
    first_epoch: int = 1,
    backend: str = "numba",
    progress: Callable[[int, int, float], None] | None = None,
) -> Iterator[Report]:
    """Train (Algorithm 2) and report after each epoch.

    With ``plan.patience`` > 0 the error of Eq. 3 on the validation part is taken after each epoch,
    and training stops when it has not fallen below its lowest value for that many epochs. Then,
    with ``plan.refit``, the model is trained anew on the whole training part for the number of
    epochs that was best; otherwise the parameters of the best epoch are the result. The last
    report holds the result.

    Parameters
    ----------
    log : EventLog
        Training part.
    validation : EventLog, optional
        The events that follow each user's training part; cut from its end where not given. It
        belongs to the whole training part when refitting.
    params, accumulators : optional
        Go on from these, in place; freshly initialised where not given. Not with early stopping.
    first_epoch : int
        Number of the first epoch; the order of users and the dropout masks depend on it.
    progress : callable, optional
        Called about twice a second with (events done, events of the epoch, summed loss).

    Raises
    ------
    SettingsError
        Early stopping and parameters to go on from.
    TrainingError
        The loss became infinite or NaN.
    """
    if plan.patience and params is not None:
        raise SettingsError(
            f"patience is {plan.patience} and parameters to go on from were given: early stopping "
            "begins anew; set patience=0 or leave the parameters out"
        )
    module = backends.get(backend)
    work = _workspace(module, spec, plan, log)

    def start() -> tuple[Params, Accumulators]:
        new = initialise(spec, log.n_users, log.n_items, plan.seed)
        return new, new_accumulators(new)

    def train(phase: str, part: EventLog, params: Params, acc: Accumulators, first: int, last: int):
        for epoch in range(first, last + 1):
            began = time.perf_counter()
            loss, events = _train_epoch(
                module, spec, rule, plan, params, acc, part, epoch, work, progress
            )
            seconds = time.perf_counter() - began
            yield Report(phase, epoch, last, loss, events, seconds, None, None, params, acc)

    if not plan.patience:
        if params is None:
            params, accumulators = start()
        elif accumulators is None:
            accumulators = new_accumulators(params)
        last = first_epoch + plan.epochs - 1
        yield from train("train", log, params, accumulators, first_epoch, last)
        return

    part, validation, whole = _validation_split(plan, log, validation)
    best, best_epoch = np.inf, 0
    with tempfile.TemporaryDirectory(prefix="crnn_np-") as folder:
        kept = Path(folder) / "best.npz"
        for report in train("choose", part, *start(), 1, plan.epochs):
            scores = evaluate(module, spec, report.params, part, validation)
            if scores["nll"] < best:
                best, best_epoch = scores["nll"], report.epoch
                if not plan.refit:
                    blocks = (*report.params, *report.accumulators)
                    np.savez(kept, *blocks)
                    best_report = report._replace(validation=scores, best_epoch=best_epoch)
            yield report._replace(validation=scores, best_epoch=best_epoch)
            if report.epoch - best_epoch >= plan.patience:
                break
        if not best_epoch:
            raise TrainingError(
                f"the validation error was {scores['nll']} after every epoch, a finite number "
                "was expected; lower learning_rate or set clip"
            )
        log_.info("lowest validation error %.4f after epoch %d", best, best_epoch)
        if plan.refit:
            for report in train("refit", whole, *start(), 1, best_epoch):
                yield report._replace(best_epoch=best_epoch)
        else:
            with np.load(kept) as file:
                blocks = [file[name] for name in file.files]
            n = len(Params._fields)
            yield best_report._replace(
                phase="keep", params=Params(*blocks[:n]), accumulators=Accumulators(*blocks[n:])
            )


# ---------------------------------------------------------------- before a run


class Estimate(NamedTuple):
    """What a run will need, as `estimate` says.

    Attributes
    ----------
    windows : int
        Of an epoch.
    events : int
        Events that are predicted in an epoch.
    parameters : int
        Numbers in W_h, W_in and W_out.
    bytes : int
        Largest resident memory of this process, all of it, if it makes the run.
    seconds_per_epoch : float
        Training only, without the validation.
    validation_seconds : float
        The validation after an epoch; 0 without early stopping.
    epochs : int
        The most epochs there can be, those of the refit among them.
    seconds : float
        Of all these epochs with their validation.
    """

    windows: int
    events: int
    parameters: int
    bytes: int
    seconds_per_epoch: float
    validation_seconds: float
    epochs: int
    seconds: float


def _resident() -> tuple[int, int]:
    """Resident memory of this process in bytes, now and the most so far.

    Where the system does not tell what it is now (macOS), it is taken to be the most so far.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = dict(line.split()[:2] for line in lines if line.startswith(("VmRSS", "VmHWM")))
        return int(kilobytes["VmRSS:"]) * 1024, int(kilobytes["VmHWM:"]) * 1024
    except (OSError, KeyError):
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
    """Train a full window and validate, on few users; bytes held beside the tables at the most.

    The tables, parameters and accumulators, are those of few users. NumPy tells `tracemalloc` of
    every array, so that a backend's own work arrays count as well.
    """
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
    traced = tracemalloc.is_tracing()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        held = [_workspace(module, spec, plan, log)]
        part = log
        if plan.patience:
            part, validation, _ = _validation_split(plan, log, validation)
        held.append(epoch_slices(plan, part.lengths, 1))
        blocks = shapes(spec, users, log.n_items).values()
        params = Params(*(np.zeros(shape, spec.dtype) for shape in blocks))
        acc = new_accumulators(params)
        s = np.zeros((1, plan.batch, spec.hidden_size), spec.dtype)
        train_run(module, spec, rule, plan.scale, params, acc, s, few, first, held[0])
        if plan.patience:
            held.append(concatenate(part, validation))
            evaluate(module, spec, params, *cut_tail(few, np.clip(few.lengths - 1, 0, 8)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        if not traced:
            tracemalloc.stop()
    return peak - before - sum(block.nbytes for block in (*params, *acc))


def load_kernels(spec: Spec, rule: Rule, plan: Plan, backend: str = "numba") -> None:
    """Have a backend load, or compile, all that a run with these settings calls."""
    tiny = from_sequences([[0, 1, 2], [0, 1, 2]])
    small = replace(plan, batch=1, window=2, validation_range=(1, 1))
    _rehearse(backends.get(backend), replace(spec, hidden_size=1), rule, small, tiny, None)


def _n_parameters(spec: Spec, log: EventLog) -> int:
    return sum(math.prod(shape) for shape in shapes(spec, log.n_users, log.n_items).values())


def _table_bytes(spec: Spec, plan: Plan, log: EventLog) -> int:
    """Bytes of parameters and accumulators."""
    once = 2 * _n_parameters(spec, log) * np.dtype(spec.dtype).itemsize + 8 * log.n_items
    # With early stopping the last epoch's are still there when the result is made or read.
    return 2 * once if plan.patience else once


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
    compiler counts too; the next process loads them and needs less.
    """
    load_kernels(spec, rule, plan, backend)
    now, most = _resident()
    beside = _rehearse(backends.get(backend), spec, rule, plan, log, validation)
    return max(most, now + beside + _table_bytes(spec, plan, log))


def _epoch_seconds(
    module: ModuleType,
    spec: Spec,
    rule: Rule,
    plan: Plan,
    params: Params,
    acc: Accumulators,
    log: EventLog,
) -> float:
    """Time of an epoch, from some of its windows, full and ragged alike; writes to the tables."""
    run = epoch_slices(plan, log.lengths, 1)
    n_windows = run.key.size
    if not n_windows:
        return 0.0
    work = _workspace(module, spec, plan, log)
    s = np.zeros((1, plan.batch, spec.hidden_size), spec.dtype)
    events = np.clip(log.lengths[run.user] - 1 - run.start, 0, run.length).sum(axis=1)

    def timed(first: int, last: int) -> float:
        began = time.perf_counter()
        part = run.part(first, last)
        train_run(module, spec, rule, plan.scale, params, acc, s, log, part, work)
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
        if seconds > SAMPLE_SECONDS:
            break
    return seconds * int(events.sum()) / max(done, 1)


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

    Memory is counted (`memory`); time is measured on a sample of the first epoch's windows, with
    parameters of its own, and scaled by events. Takes some seconds.

    Raises
    ------
    SettingsError
        The run needs more memory than the machine has.
    """
    module = backends.get(backend)
    _check_room(_table_bytes(spec, plan, log))
    needed = memory(spec, rule, plan, log, validation=validation, backend=backend)
    _check_room(needed)
    part = whole = log
    if plan.patience:
        part, validation, whole = _validation_split(plan, log, validation)
    params = initialise(spec, log.n_users, log.n_items, plan.seed)
    acc = new_accumulators(params)
    seconds = _epoch_seconds(module, spec, rule, plan, params, acc, part)
    events, whole_events = (int(np.maximum(x.lengths - 1, 0).sum()) for x in (part, whole))
    epochs, validating, total = plan.epochs, 0.0, plan.epochs * seconds
    if plan.patience:
        validating = _validation_seconds(module, spec, params, whole, validation)
        total += plan.epochs * validating
        if plan.refit:
            epochs *= 2
            total += plan.epochs * seconds * whole_events / max(events, 1)
    windows = int(epoch_slices(plan, part.lengths, 1).key.size)
    n_parameters = _n_parameters(spec, log)
    return Estimate(windows, events, n_parameters, needed, seconds, validating, epochs, total)
