"""Matrix factorisation of the users' log-counts: the static collaborative baseline of Section 2.1.

Alternating least squares: with one side's factors fixed, Eq. 8 is a ridge regression per row of the
other side, solved exactly, so that its value never rises from one half-pass to the next.
"""

import logging
from typing import NamedTuple

import numpy as np

from ..compiling import compiled
from ..data import EventLog
from ..evaluation import summarise
from ..settings import positive, whole
from . import Baseline, Targets, targets, validation_parts

Array = np.ndarray

RANKS = (8, 16, 32, 64)
PENALTIES = tuple(float(10.0**k) for k in np.arange(-3, 0.5, 0.5))
"""Choices of lambda: from 1e-3 to 1 in half decades."""
FIRST_RANK = 16

log_ = logging.getLogger(__name__)


class MatrixFactorization(Baseline):
    """Softmax over the products of user and item factors (Eqs. 8 to 10).

    The entries m_iu = log(c + 1) of the items that a user has in the training part are factorised
    with weighted-lambda regularisation; an entry that was not observed is no zero, it is left out.
    The softmax of log(c + 1) is proportional to c + 1, so the closer the fit, the closer a
    prediction to the user's own smoothed frequencies; nothing but the penalty holds down the
    items that the user never had.

    Parameters
    ----------
    rank : int, optional
        Width D of the factors, at least 1.
    penalty : float, optional
        lambda of Eq. 8, over 0. Where `rank` or `penalty` is not given, `fit` chooses by the
        error (Eq. 3) on the validation part: first lambda of `PENALTIES` at rank `FIRST_RANK`,
        then the rank of `RANKS` at this lambda. Then it factorises the whole training part.
    passes : int
        Times that both sides are solved, at least 1.
    seed : int
        Of the first item factors.

    Attributes
    ----------
    learned : Learned or None

    Raises
    ------
    SettingsError
        A setting is out of range.
    """

    class Learned(NamedTuple):
        """users float64[U, D] and items float64[I, D], 0 without events; penalty float64[1]."""

        users: Array
        items: Array
        penalty: Array

    SHAPES = {"users": ("U", "D"), "items": ("I", "D"), "penalty": (1,)}

    def __init__(
        self,
        *,
        rank: int | None = None,
        penalty: float | None = None,
        passes: int = 15,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.rank = whole("rank", rank, 1, optional=True)
        self.penalty = positive("penalty", penalty)
        self.passes = whole("passes", passes, 1)
        self.seed = whole("seed", seed, 0)

    def __repr__(self) -> str:
        if self.learned is None:
            return super().__repr__()
        rank, penalty = self.learned.items.shape[1], self.learned.penalty[0]
        return f"{super().__repr__()}, rank {rank}, penalty {penalty:.3g}"

    def _fit(self, train: EventLog, validation: EventLog | None) -> "MatrixFactorization.Learned":
        if self.rank is not None and self.penalty is not None:
            whole = train if validation is None else validation_parts(train, validation)[2]
            return self._factorise(whole, self.rank, self.penalty)
        part, validation, whole = validation_parts(train, validation)
        events = targets(part, validation)
        errors: dict[tuple[int, float], float] = {}

        def error(rank: int, penalty: float) -> float:
            if (rank, penalty) not in errors:
                nll, ranks = _scores(self._factorise(part, rank, penalty), events)
                scores = summarise(events.user, events.first, nll, ranks, part.n_users)
                errors[rank, penalty] = scores["nll"]
            return errors[rank, penalty]

        rank, penalty = self.rank or FIRST_RANK, self.penalty
        if penalty is None:
            penalty = min(PENALTIES, key=lambda penalty: error(rank, penalty))
        if self.rank is None:
            rank = min(RANKS, key=lambda rank: error(rank, penalty))
        log_.debug(
            "MatrixFactorization: validation error %.4f with rank %d, penalty %.3g",
            errors[rank, penalty],
            rank,
            penalty,
        )
        return self._factorise(whole, rank, penalty)

    def _factorise(self, log: EventLog, rank: int, penalty: float) -> "MatrixFactorization.Learned":
        by_user, by_item = log_counts(log)
        users = np.zeros((log.n_users, rank))
        items = np.random.default_rng(self.seed).standard_normal((log.n_items, rank))
        items /= np.sqrt(rank)
        items[np.diff(by_item.indptr) == 0] = 0
        for _ in range(self.passes):
            solve_rows(*by_user, items, penalty, users)
            solve_rows(*by_item, users, penalty, items)
        return self.Learned(users, items, np.array([penalty]))

    def _score(self, events: Targets) -> tuple[Array, Array]:
        return _scores(self.learned, events)


class Rows(NamedTuple):
    """A sparse matrix by rows: indptr int64[R + 1], index int64[K] and value float64[K]."""

    indptr: Array
    index: Array
    value: Array


def log_counts(log: EventLog) -> tuple[Rows, Rows]:
    """The observed entries m_iu = log(c + 1), by user and by item."""
    user = np.repeat(np.arange(log.n_users), log.lengths)
    keys, counts = np.unique(user * log.n_items + log.items, return_counts=True)
    user, item = np.divmod(keys, log.n_items)
    value = np.log1p(counts)
    order = np.argsort(item, kind="stable")
    return (
        Rows(np.searchsorted(user, np.arange(log.n_users + 1)), item, value),
        Rows(np.searchsorted(item[order], np.arange(log.n_items + 1)), user[order], value[order]),
    )


@compiled()
def solve_rows(
    indptr: Array, index: Array, value: Array, fixed: Array, penalty: float, out: Array
) -> None:
    """Minimise Eq. 8 over one side's factors, in place; rows without entries stay as they are.

    indptr int64[R + 1], index int64[K], value float64[K]: the sparse rows; fixed float64[C, D]:
    the other side; out float64[R, D].
    """
    for row in range(indptr.size - 1):
        a, b = indptr[row], indptr[row + 1]
        if a == b:
            continue
        seen = fixed[index[a:b]]
        gram = np.dot(seen.T, seen)
        for k in range(gram.shape[0]):
            gram[k, k] += penalty * (b - a)
        out[row] = np.linalg.solve(gram, np.dot(seen.T, value[a:b]))


def _scores(learned: MatrixFactorization.Learned, events: Targets) -> tuple[Array, Array]:
    """Eqs. 9 and 10 for one user after the other: nll float64[N] in nats and rank int64[N]."""
    nll, rank = np.empty(events.at.size), np.empty(events.at.size, np.int64)
    by_factor = np.ascontiguousarray(learned.items.T)
    item = events.log.items[events.at]
    user, begin = np.unique(events.user, return_index=True)
    for u, a, b in zip(user, begin, np.append(begin, item.size)[1:], strict=True):
        z = _logits(by_factor, learned.users[u])
        top = z.max()
        nll[a:b] = top + np.log(np.exp(z - top).sum()) - z[item[a:b]]
        rank[a:b] = z.size - np.searchsorted(np.sort(z), z[item[a:b]])
    return nll, rank


@compiled()
def _logits(by_factor: Array, user: Array) -> Array:
    """float64[I] from float64[D, I] and float64[D], each summed in the same order: exact ties."""
    z = np.zeros(by_factor.shape[1])
    for k in range(user.size):
        for i in range(z.size):
            z[i] += user[k] * by_factor[k, i]
    return z
