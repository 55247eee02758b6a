"""Training: `step` is the whole algorithm on one window, `epochs` a generator of reports."""

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from . import backends, model
from .data import EventLog, check_log, checksum, concatenate, cut_tail
from .errors import DataError, ModelError, SettingsError, TrainingError
from .evaluation import evaluate, read_past, target_cells
from .history import Past
from .model import (
    Accumulators,
    Grads,
    MixtureGrads,
    Params,
    RowGrad,
    Spec,
    gather,
    initialise,
    new_accumulators,
    on_device,
    scatter,
)
from .optim import Rule
from .windows import OUTPUT, Plan, Slice, Window, dropout_keep, epoch_slices

Array = np.ndarray

log_ = logging.getLogger(__name__)

RUN_SECONDS = 0.5  # a run of windows between two calls of `progress` takes about this long


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
        Mean training loss in nats per event, dropout applied, weights moving. An epoch is cut into
        runs by the time they take and their losses are added, so that its last bits may vary.
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
    past: Past | None = None,
) -> tuple[float, Grads | MixtureGrads, Array, Array, Array]:
    """Loss of one window and the gradient of every block, by hand (Appendix A).

    Parameters
    ----------
    s0 : real[S, B, D]
        State before the window.
    key : uint64
        Of the dropout masks.
    scale : float
        Factor on the gradients; the loss stays the sum in nats.
    past : Past, optional
        Of the log that the window is of; a mixture needs it.

    Returns
    -------
    loss, Grads or MixtureGrads, ds0 real[S, B, D], dA real[T, B, G*D], s_T real[S, B, D]
    """
    A, W_h = gather(backend, spec, params, window, key)
    states, cache = backend.cell_forward(
        spec.cell_kind, s0, spec.init_state, A, W_h, window.event, window.carry
    )
    H = states[1:, 0]
    if spec.dropout_out:
        keep = dropout_keep(key, OUTPUT, *H.shape, spec.dropout_out, spec.dtype)
        keep = backend.to_device(keep)
        H = H * keep
    cells = window.target > 0
    if spec.output == "mixture":
        own = target_cells(window)
        loss, dH_cells, dW_out, d = backend.mixture(
            H[cells], params.W_out, params.mixture, own, past, spec.memory
        )
        nu, gate_user = (backend.sum_rows(own.user, rows * scale) for rows in (d.nu, d.gate_user))
        more = (d.tau * scale, nu, d.gate_in * scale, d.gate_out * scale, gate_user)
    else:
        loss, dH_cells, dW_out = backend.output(
            spec.output, H[cells], params.W_out, window.y[cells]
        )
        more = ()
    dH = np.zeros_like(H)
    dH[cells] = dH_cells * scale
    if spec.dropout_out:
        dH *= keep
    ds0, dA, dW_h = backend.cell_backward(
        spec.cell_kind, dH, states, cache, spec.init_state, W_h, window.event, window.carry
    )
    dW_h_rows, dW_in = scatter(backend, spec, window, key, dA, dW_h)
    kind = MixtureGrads if more else Grads
    return loss, kind(dW_h_rows, dW_in, dW_out * scale, *more), ds0, dA, states[-1]


def _clipped(grads: Grads | MixtureGrads, limit: float) -> Grads | MixtureGrads:
    """All blocks scaled so that their common norm is at most `limit` (Pascanu et al., 2013)."""

    def values(grad: RowGrad | Array) -> Array:
        return grad.values[: grad.count] if isinstance(grad, RowGrad) else grad

    def scaled(grad: RowGrad | Array) -> RowGrad | Array:
        if isinstance(grad, RowGrad):
            return grad._replace(values=grad.values * factor)
        return grad * factor

    norm = np.sqrt(sum(np.sum(b * b, dtype=np.float64) for b in map(values, grads)))
    if norm <= limit:
        return grads
    factor = float(limit / norm)
    return type(grads)(*map(scaled, grads))


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
    past: Past | None = None,
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
    loss, grads, _, _, s_T = gradients(backend, spec, params, s0, window, key, scale, past)
    if rule.clip:
        grads = _clipped(grads, rule.clip)
    accumulators.step[0] += 1
    n = int(accumulators.step[0])
    for name in grads._fields:
        dense = name == "W_in" and rule.W_in_rows == "dense"
        param, accumulator, grad = (getattr(x, name) for x in (params, accumulators, grads))
        backend.update(rule, param, accumulator, accumulators.stamp if dense else None, n, grad)
    return float(loss), int(np.count_nonzero(window.target)), s_T


def check_products(backend: ModuleType, spec: Spec, rule: Rule) -> None:
    """Raise SettingsError where training in a backend does not have the products of a Spec."""
    fused = hasattr(backend, "train_run") and not rule.clip
    there = backend.PRODUCTS if fused else ("full",)
    if spec.products not in there:
        (owner,) = (
            name
            for name in backends.MODULES
            if spec.products in getattr(backends.get(name), "PRODUCTS", ())
        )
        raise SettingsError(
            f"products is {spec.products!r}, which the fused run of backend {owner!r} has, without "
            f"clip: set products to {' or '.join(map(repr, there))}, or the backend to {owner!r} "
            "and clip to 0"
        )


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
    past: Past | None = None,
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
    past : Past, optional
        Of `log`; a mixture needs it.

    Returns
    -------
    loss, events : summed over the run
    """
    check_products(backend, spec, rule)
    if hasattr(backend, "train_run") and not rule.clip:
        return backend.train_run(spec, rule, scale, params, accumulators, s, log, run, work, past)
    loss, events = 0.0, 0
    for k in range(run.key.size):
        piece = run.one(k)
        window = backend.window(log, piece, spec.dtype)
        window_loss, n, s_T = step(
            backend, spec, rule, params, accumulators, s, window, piece.key, scale, past
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


def workspace(module: ModuleType, spec: Spec, plan: Plan, log: EventLog) -> Any:
    """Work arrays of a backend's fused run; None where it has none."""
    if hasattr(module, "workspace"):
        return module.workspace(spec, log.n_items, plan.batch, plan.window)
    return None


def validation_split(
    plan: Plan, log: EventLog, validation: EventLog | None
) -> tuple[EventLog, EventLog, EventLog]:
    """The part to train on, the validation part, and both as one log."""
    if validation is None:
        return *cut_tail(log, validation_lengths(plan, log.lengths)), log
    return log, validation, concatenate(log, validation)


def _check_finite(params: Params, epoch: int) -> None:
    """Raise TrainingError: the loss tells of an update only in the next window."""
    for name, block in params._asdict().items():
        if not np.isfinite(block.sum(dtype=np.float64)):
            raise TrainingError(
                f"{name} is infinite or NaN somewhere after epoch {epoch}; lower learning_rate or "
                "set clip"
            )


def keeps_best(plan: Plan) -> bool:
    """Whether training ends with the parameters of an epoch before its last one."""
    return bool(plan.patience) and not plan.refit


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
    past: Past | None,
    progress: Callable[[int, int, float], None] | None,
) -> tuple[float, int]:
    """One pass over all users; the mean loss per event and the number of events."""
    run = epoch_slices(plan, log.lengths, epoch)
    total = int(np.maximum(log.lengths - 1, 0).sum())
    s = backend.to_device(np.zeros((1, plan.batch, spec.hidden_size), spec.dtype))
    loss, events, done, size = 0.0, 0, 0, 4
    while done < run.key.size:
        began = time.perf_counter()
        part = run.part(done, done + size)
        part_loss, part_events = train_run(
            backend, spec, rule, plan.scale, params, acc, s, log, part, work, past
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


def _read_checkpoint(
    path: str | os.PathLike, key: str
) -> tuple[list[Report], Params, Accumulators | None]:
    """Reports, parameters and accumulators of the epochs so far."""
    saved = model.load(path)
    if saved.settings.get("key") != key:
        raise ModelError(
            f"{path} is no checkpoint of a training with these settings and data: go on with its "
            "own, or delete it to begin anew"
        )
    return [Report(*values, None, None) for values in saved.settings["reports"]], *saved[:2]


def _check_kept(path: Path) -> None:
    """Raise ModelError where the second file of a checkpoint would replace one of another kind."""
    if path.exists() and "key" not in model.load_settings(path):
        raise ModelError(
            f"{path} is a model, and the checkpoint's second file would replace it: choose another "
            "name for the checkpoint, or move that file"
        )


def _best_epoch(reports: list[Report]) -> int | None:
    """Epoch with the lowest validation error, the first of equal ones; NaN never is."""
    tried = [r for r in reports if r.validation and r.validation["nll"] < np.inf]
    return min(tried, key=lambda r: r.validation["nll"]).epoch if tried else None


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
    checkpoint: str | os.PathLike | None = None,
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
        Number of the first epoch; the order of users and the dropout masks depend on it. Not with
        early stopping.
    checkpoint : path, optional
        File to write after each epoch. Where it is there, its epochs are reported again, with the
        arrays of the last one, and training goes on after it, with the same number of threads to
        the same bytes as without a break; without early stopping, to another number of epochs if
        need be. It stays when training has ended; the best epoch's parameters, where those are the
        result, stay in a second file, with ``.best`` behind the name. Not with `params`.
    progress : callable, optional
        Called about twice a second with (events done, events of the epoch, summed loss).

    Raises
    ------
    SettingsError
        Parameters to go on from, with early stopping or a checkpoint; another first epoch, with
        early stopping; fewer epochs than the checkpoint has.
    ModelError
        The checkpoint is of another training, cannot be written, or would replace a model; the
        validation part is of other users or items; parameters or accumulators to go on from have
        other shapes or types than this log and `spec` need.
    TrainingError
        The loss, or a parameter, became infinite or NaN.
    DataError
        There is no event to predict, or a log's numbers do not fit each other.
    """
    if params is not None and (plan.patience or checkpoint is not None):
        other = f"patience is {plan.patience}" if plan.patience else f"{checkpoint} is a checkpoint"
        raise SettingsError(
            f"{other} and parameters to go on from were given: early stopping and checkpoints "
            "begin anew; set patience=0 and no checkpoint, or leave the parameters out"
        )
    if plan.patience and first_epoch != 1:
        raise SettingsError(
            f"first_epoch is {first_epoch} and patience is {plan.patience}: early stopping begins "
            "with epoch 1; set patience=0, or leave first_epoch out"
        )
    check_log(log)
    if validation is not None:
        model.check_ids(log.user_ids, log.item_ids, validation)
    model.check_params(spec, log.n_users, log.n_items, params, accumulators)
    module = backends.get(backend)
    made: list[Report] = []
    key = None
    if checkpoint is not None:
        fixed = vars(plan) if plan.patience else vars(plan) | {"epochs": None}
        settings = [backend, vars(spec), vars(rule), fixed, first_epoch, log.n_users, log.n_items]
        key = json.dumps([*settings, checksum(log, validation)])
        if Path(checkpoint).exists():
            made, params, accumulators = _read_checkpoint(checkpoint, key)
        elif keeps_best(plan):
            _check_kept(Path(f"{checkpoint}.best"))
    work = workspace(module, spec, plan, log)

    def train(phase: str, part: EventLog, first: int, last: int) -> Iterator[Report]:
        nonlocal params, accumulators
        before = [r for r in made if r.phase == phase]
        if before and before[-1].epoch > last:
            raise SettingsError(
                f"epochs ends at {last} and {checkpoint} has {before[-1].epoch} of them: ask for "
                "as many or more, or delete it to begin anew"
            )
        for report in before:
            yield report._replace(epochs=last, params=params, accumulators=accumulators)
        if not (part.lengths > 1).any():
            raise DataError(
                "no user has two training events, so there is none to predict: prepare longer "
                "sequences, or cut less off them"
            )
        if params is None or (phase != "train" and not before):
            params = initialise(spec, log.n_users, log.n_items, plan.seed)
            accumulators = None
        if accumulators is None:
            accumulators = new_accumulators(params)
        past = on_device(module, read_past(spec, part))
        live = on_device(module, params), on_device(module, accumulators)
        for epoch in range(first + len(before), last + 1):
            began = time.perf_counter()
            loss, events = _train_epoch(
                module, spec, rule, plan, *live, part, epoch, work, past, progress
            )
            if rule.W_in_rows == "touched":  # for a run with dense rows that goes on from here
                live[1].stamp[...] = live[1].step[0]
            for own, there in zip((*params, *accumulators), (*live[0], *live[1]), strict=True):
                if own is not there:
                    own[...] = module.to_host(there)
            if phase != "choose":  # there the validation error tells
                _check_finite(params, epoch)
            seconds = time.perf_counter() - began
            scores = None
            if phase == "choose":
                scores = evaluate(module, spec, live[0], part, validation)
            report = Report(phase, epoch, last, loss, events, seconds, scores, None, None, None)
            report = report._replace(best_epoch=_best_epoch([*made, report]))
            made.append(report)
            if phase == "choose" and keeps_best(plan) and report.best_epoch == epoch:
                model.save(kept, params, accumulators, {"key": key}, log.user_ids, log.item_ids)
            if checkpoint is not None:
                state = {"key": key, "reports": [r[:-2] for r in made]}
                model.save(checkpoint, params, accumulators, state, log.user_ids, log.item_ids)
            yield report._replace(params=params, accumulators=accumulators)

    if not plan.patience:
        yield from train("train", log, first_epoch, first_epoch + plan.epochs - 1)
        return

    part, validation, whole = validation_split(plan, log, validation)
    with tempfile.TemporaryDirectory(prefix="crnn_np-") as folder:
        kept = Path(folder) / "best" if checkpoint is None else Path(f"{checkpoint}.best")
        for report in train("choose", part, 1, plan.epochs):
            yield report
            best_epoch = report.best_epoch
            if report.epoch - (best_epoch or 0) >= plan.patience:
                break
        if best_epoch is None:
            raise TrainingError(
                f"the validation error was {report.validation['nll']} after every epoch, a finite "
                "number was expected; lower learning_rate or set clip"
            )
        chosen = next(r for r in made if r.epoch == best_epoch)
        log_.info(
            "lowest validation error %.4f after epoch %d", chosen.validation["nll"], best_epoch
        )
        if plan.refit:
            yield from train("refit", whole, 1, best_epoch)
        else:
            saved = model.load(kept)
            yield chosen._replace(
                phase="keep", params=saved.params, accumulators=saved.accumulators
            )
