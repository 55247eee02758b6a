"""Uniform, unigram and bigram: the static and the one-step distributions of Section 2.1.

A rank needs no scores of all items. The smoothed probability grows with the count, so the rank of
a target is the number of items seen at least as often in its context; a target that was never seen
there ties with every other unseen item and stands behind those that were seen: rank I.
"""

import logging
from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np

from ..data import EventLog
from ..evaluation import summarise
from ..settings import positive
from . import Baseline, Targets, targets, validation_parts

Array = np.ndarray

EPSILONS = tuple(float(10.0**k) for k in np.arange(-4, 2.5, 0.5))
"""Choices of the Laplace smoothing: from 1e-4 to 100 in half decades."""

log_ = logging.getLogger(__name__)


class Uniform(Baseline):
    """Every item is as likely as any other (Eq. 4); the error is log I."""

    class Learned(NamedTuple):
        """n_items int64[1]: I."""

        n_items: Array

    SHAPES = {"n_items": (1,)}

    def _fit(self, train: EventLog, validation: EventLog | None) -> "Uniform.Learned":
        return self.Learned(np.array([train.n_items]))

    def _score(self, events: Targets) -> tuple[Array, Array]:
        n_items = np.repeat(self.learned.n_items, events.at.size)
        return np.log(n_items), n_items


class NGram(Baseline):
    """Smoothed relative frequencies of the items in each context.

    Parameters
    ----------
    epsilon : float, optional
        Laplace smoothing, over 0. Where not given, `fit` takes the one of `EPSILONS` with the
        lowest error (Eq. 3) on the validation part, then counts the whole training part; where
        given, the validation part is not used.

    Attributes
    ----------
    learned : Learned or None

    Raises
    ------
    SettingsError
        epsilon is not a positive number.
    """

    class Learned(NamedTuple):
        """Counts of the K items seen in their contexts, and the smoothing.

        keys int64[K], sorted: context * I + item; counts int64[K]; epsilon float64[1].
        """

        keys: Array
        counts: Array
        epsilon: Array

    SHAPES = {"keys": ("K",), "counts": ("K",), "epsilon": (1,)}

    def __init__(self, *, epsilon: float | None = None) -> None:
        super().__init__()
        self.epsilon = positive("epsilon", epsilon)

    @abstractmethod
    def _contexts(self, log: EventLog) -> Array:
        """int64[E]: what each event is predicted from, in [0, I); -1 where there is nothing."""

    def __repr__(self) -> str:
        if self.learned is None:
            return super().__repr__()
        return f"{super().__repr__()}, epsilon {self.learned.epsilon[0]:.3g}"

    def _fit(self, train: EventLog, validation: EventLog | None) -> "NGram.Learned":
        if self.epsilon is not None:
            return self.Learned(*self._count(train), np.array([self.epsilon]))
        part, validation, whole = validation_parts(train, validation)
        events = targets(part, validation)
        seen, total, rank = self._look_up(*self._count(part), events)
        errors = {}
        for epsilon in EPSILONS:
            nll = _nll(seen, total, part.n_items, epsilon)
            scores = summarise(events.user, events.first, nll, rank, part.n_users)
            errors[epsilon] = scores["nll"]
        epsilon = min(errors, key=errors.get)
        name = type(self).__name__
        log_.debug("%s: validation error %.4f with epsilon %.3g", name, errors[epsilon], epsilon)
        return self.Learned(*self._count(whole), np.array([epsilon]))

    def _count(self, log: EventLog) -> tuple[Array, Array]:
        """Keys and counts of a log, Eq. 5."""
        context = self._contexts(log)
        keys = (context * log.n_items + log.items)[context >= 0]
        return np.unique(keys, return_counts=True)

    def _look_up(self, keys: Array, counts: Array, events: Targets) -> tuple[Array, Array, Array]:
        """Count of each target in its context, count of the context, and rank; [N] each."""
        n_items = events.log.n_items
        context = self._contexts(events.log)[events.at]
        key = context * n_items + events.log.items[events.at]
        index = np.searchsorted(keys, key)
        found = np.append(keys, -1)[index] == key
        seen = np.where(found, np.append(counts, 0)[index], 0)
        total = np.bincount(keys // n_items, counts, minlength=n_items)[context]
        ranks = np.append(_ranks(keys // n_items, counts), n_items)
        return seen, total, np.where(found, ranks[index], n_items)

    def _score(self, events: Targets) -> tuple[Array, Array]:
        keys, counts, epsilon = self.learned
        seen, total, rank = self._look_up(keys, counts, events)
        return _nll(seen, total, events.log.n_items, epsilon), rank


class Unigram(NGram):
    """How often each item occurs (Eq. 6); settings as in `NGram`."""

    def _contexts(self, log: EventLog) -> Array:
        return np.zeros(log.n_events, np.int64)


class Bigram(NGram):
    """How often each item follows the one before it, within a user (Eq. 7); see `NGram`."""

    def _contexts(self, log: EventLog) -> Array:
        context = np.empty(log.n_events, np.int64)
        context[1:] = log.items[:-1]
        context[log.indptr[:-1][log.lengths > 0]] = -1
        return context


def _nll(seen: Array, total: Array, n_items: int, epsilon: Any) -> Array:
    """Minus the log of Eqs. 6 and 7, in nats."""
    return np.log(total + n_items * epsilon) - np.log(seen + epsilon)


def _ranks(context: Array, counts: Array) -> Array:
    """int64[K]: for each entry, how many of its context have at least its count.

    context int64[K], sorted; counts int64[K].
    """
    order = np.lexsort((-counts, context))
    c, n = context[order], counts[order]
    last = np.append((c[1:] != c[:-1]) | (n[1:] != n[:-1]), True)[: c.size]
    end = np.flatnonzero(last)
    tied = np.repeat(end, np.diff(end, prepend=-1))
    ranks = np.empty(c.size, np.int64)
    ranks[order] = tied + 1 - np.searchsorted(context, c)
    return ranks
