"""Errors on held-out events: Eq. 3 per user and its mean, perplexity, Recall@n and MRR@n.

Every user's whole history is replayed with the final parameters, the state carried from the
training part into the held-out part. The first held-out event is predicted from the last training
event.
"""

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np

from .data import EventLog, check_log, concatenate
from .errors import DataError
from .history import Past, count
from .model import Params, Spec, gather, on_device
from .outputs import Cells
from .settings import whole
from .windows import Window, replay_slices

Array = np.ndarray

SCORED_AT_ONCE = 4096


def summarise(
    user: Array,
    first: Array,
    nll: Array,
    rank: Array,
    n_users: int,
    n: int = 20,
    per_user: bool = False,
) -> dict[str, Any]:
    """Errors of all held-out events in one table.

    Parameters
    ----------
    user : int[N]
        Of each held-out event.
    first : bool[N]
        Whether it is its user's first held-out event.
    nll : float64[N]
        Negative log-likelihood in nats.
    rank : int[N]
        1 is best.
    n_users : int
        Users in all, with or without a held-out event.
    n : int
        Cut-off of recall and of the reciprocal rank, which is 0 beyond it.
    per_user : bool
        Add ``per_user``, a dict of arrays.

    Returns
    -------
    dict
        ``nll`` (Eq. 3, nats), ``recall@n`` and ``mrr@n`` are means over users of each user's mean;
        with ``_events`` behind the name, means over events; with ``_after_first``, means over
        users without each user's first held-out event. ``perplexity`` is exp(nll); ``users``
        counts all, ``users_evaluated`` those with a held-out event, ``events`` the held-out events.
    """
    if user.size == 0:
        raise DataError(
            "no event to evaluate: 0 came, at least 1 is expected; was the held-out part cut from "
            "the same log, and are there training events enough for a validation part?"
        )
    measures = {
        "nll": nll,
        f"recall@{n}": (rank <= n).astype(np.float64),
        f"mrr@{n}": np.where(rank <= n, 1.0 / rank, 0.0),
    }

    def user_means(values: Array, kept: Array) -> tuple[Array, Array]:
        counts = np.bincount(user[kept], minlength=n_users)
        sums = np.bincount(user[kept], values[kept], minlength=n_users)
        seen = counts > 0
        return np.flatnonzero(seen), sums[seen] / counts[seen]

    every = np.ones(user.size, bool)
    result: dict[str, Any] = {}
    for name, values in measures.items():
        result[name] = float(user_means(values, every)[1].mean())
    with np.errstate(over="ignore"):
        result["perplexity"] = float(np.exp(result["nll"]))
    for name, values in measures.items():
        result[f"{name}_events"] = float(values.mean())
    for name, values in measures.items():
        later = user_means(values, ~first)[1]
        result[f"{name}_after_first"] = float(later.mean()) if later.size else None
    users = user_means(nll, every)[0]
    result |= {"users": int(n_users), "users_evaluated": int(users.size), "events": int(user.size)}
    if per_user:
        columns = {name: user_means(values, every)[1] for name, values in measures.items()}
        counts = np.bincount(user, minlength=n_users)[users]
        result["per_user"] = {"user": users, "events": counts, **columns}
    return result


def read_past(spec: Spec, log: EventLog, counted: EventLog | None = None) -> Past | None:
    """What a mixture needs to know of a log; None for other output layers.

    Parameters
    ----------
    counted : EventLog, optional
        Training part that the other users' experts come from; `log` where not given.
    """
    if spec.output != "mixture":
        return None
    from .tallies import past  # compiled code, for those who use it

    return past(log, count(counted or log))


def target_cells(window: Window) -> Cells:
    """The cells of a window that have a target, in the order of ``H[window.target > 0]``."""
    cells = window.target > 0
    user = np.broadcast_to(window.user, cells.shape)
    return Cells(window.y[cells], user[cells], window.at[cells])


def evaluate(
    backend: ModuleType,
    spec: Spec,
    params: Params,
    train: EventLog,
    heldout: EventLog,
    n: int = 20,
    per_user: bool = False,
) -> dict[str, Any]:
    """Replay each user's history and score their held-out events.

    Returns
    -------
    dict
        As `summarise` says.

    Raises
    ------
    DataError
        There is no held-out event, or a log's numbers do not fit each other.
    SettingsError
        `n` is no whole number from 1.
    """
    n = whole("n", n, 1)
    check_log(train)
    check_log(heldout)
    spec = replace(spec, dropout_in=0.0, dropout_out=0.0)
    log = concatenate(train, heldout)
    known = on_device(backend, read_past(spec, log, train))
    run = replay_slices(log.lengths, train.lengths)
    params = on_device(backend, params)
    s = backend.to_device(np.zeros((1, run.user.shape[1], spec.hidden_size), spec.dtype))
    users, firsts, nlls, ranks = [], [], [], []
    H: list[Array] = []
    found: list[Cells] = []

    def flush() -> None:
        if not H:
            return
        states, cells = np.concatenate(H), Cells(*map(np.concatenate, zip(*found, strict=True)))
        if spec.output == "mixture":
            nll, rank = backend.mixture_score(
                states, params.W_out, params.mixture, cells, known, spec.memory
            )
        else:
            nll, rank = backend.score(spec.output, states, params.W_out, cells.y)
        nlls.append(backend.to_host(nll))
        ranks.append(backend.to_host(rank))
        H.clear()
        found.clear()

    for k in range(run.key.size):
        piece = run.one(k)
        window = backend.window(log, piece, spec.dtype)
        A, W_h = gather(backend, spec, params, window, 0)
        states, _ = backend.cell_forward(
            spec.cell_kind, s, spec.init_state, A, W_h, window.event, window.carry
        )
        s = states[-1]
        cells = window.target > 0
        if not cells.any():
            continue
        t, b = np.nonzero(backend.to_host(cells))
        users.append(piece.user[b])
        firsts.append(piece.start[b] + t + 1 == piece.target_from[b])
        H.append(states[1:, 0][cells])
        found.append(target_cells(window))
        if sum(map(len, H)) >= SCORED_AT_ONCE:
            flush()
    flush()
    empty = np.zeros(0)
    columns = [np.concatenate([empty, *c]) for c in (users, firsts, nlls, ranks)]
    user, first, nll, rank = columns
    return summarise(user.astype(np.int64), first.astype(bool), nll, rank, log.n_users, n, per_user)
