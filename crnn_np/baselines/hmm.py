"""Hidden Markov model over the events of all users, the baseline that Section 2.1 names last.

hmmlearn's `CategoricalHMM` with an E-step of its own: the sequences, the longest first, advance
side by side in groups, so that one step of a group is a product of [B, S] and [S, S], and expected
transitions are sums of products over many steps. Every step is scaled to sum to 1. The emission
probabilities are kept item-major, since a step needs the rows of a few items out of thousands.
"""

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numba
import numpy as np
from hmmlearn.hmm import CategoricalHMM
from scipy.special import xlogy

from ..compiling import compiled
from ..data import EventLog
from ..evaluation import summarise
from ..settings import positive, whole
from . import Baseline, Targets, targets, validation_parts

Array = np.ndarray

STATES = (10, 25, 50)
SMOOTHINGS = (0.001, 0.01, 0.1)
"""Choices of the counts that are added to each state's expected count of each item."""
FIRST_SMOOTHING = 0.01
CHECK = 20
"""Passes between two looks at the validation error."""
MOST = 200
"""Passes at most where they are chosen."""
GAIN = 0.01
"""Nats by which each look must lower the validation error for EM to go on."""

GROUP = 16  # sequences side by side
CHUNK = 256  # rows of one product for the transitions: they stay in the second-level cache
TILE = 512  # items of a stretch of scores

log_ = logging.getLogger(__name__)


class HMM(Baseline):
    """One hidden Markov model for all users (Rabiner and Juang 1986), learned by EM.

    An event is predicted from p(x_{t+1} | x_1..x_t): the state is filtered through the user's
    whole training part and on through the held-out part.

    Parameters
    ----------
    n_states : int, optional
        At least 1.
    smoothing : float, optional
        Count added to each state's expected count of each item, over 0, as hmmlearn's
        ``emissionprob_prior - 1``, so that an item that was never seen is possible.
    iterations : int, optional
        Passes of EM, at least 1. Where a setting is not given, `fit` chooses by the error (Eq. 3)
        on the validation part: first the states of `STATES` with smoothing `FIRST_SMOOTHING`, up
        to the first that is no better than the one before, then the smoothing of `SMOOTHINGS`;
        for each the passes, looking every `CHECK` up to `MOST`, until a look gains less than
        `GAIN`. Then it learns from the whole training part.
    seed : int
        Of the first probabilities.

    Attributes
    ----------
    learned : Learned or None

    Raises
    ------
    SettingsError
        A setting is out of range.
    """

    class Learned(NamedTuple):
        """Probabilities, and the settings they were learned with.

        first float64[S]; move float64[S, S], from row to column; emit float64[I, S], each column
        sums to 1; smoothing float64[1]; iterations int64[1].
        """

        first: Array
        move: Array
        emit: Array
        smoothing: Array
        iterations: Array

    SHAPES = {
        **{"first": ("S",), "move": ("S", "S"), "emit": ("I", "S")},
        **{"smoothing": (1,), "iterations": (1,)},
    }

    def __init__(
        self,
        *,
        n_states: int | None = None,
        smoothing: float | None = None,
        iterations: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.n_states = whole("n_states", n_states, 1, optional=True)
        self.smoothing = positive("smoothing", smoothing)
        self.iterations = whole("iterations", iterations, 1, optional=True)
        self.seed = whole("seed", seed, 0, (1 << 32) - 1)

    def __repr__(self) -> str:
        if self.learned is None:
            return super().__repr__()
        first, _, _, smoothing, iterations = self.learned
        return (
            f"{super().__repr__()}, {first.size} states, smoothing {smoothing[0]:.3g}, "
            f"{iterations[0]} passes"
        )

    def _fit(self, train: EventLog, validation: EventLog | None) -> "HMM.Learned":
        if None not in (self.n_states, self.smoothing, self.iterations):
            whole = train if validation is None else validation_parts(train, validation)[2]
            return self._learn(whole, self.n_states, self.smoothing, self.iterations)
        part, validation, whole = validation_parts(train, validation)
        events = targets(part, validation)
        smoothing = self.smoothing or FIRST_SMOOTHING
        best = None
        for n_states in STATES if self.n_states is None else [self.n_states]:
            tried = (*self._try(part, events, n_states, smoothing), n_states, smoothing)
            if best is not None and tried[0] >= best[0]:
                break
            best = tried
        if self.smoothing is None:
            for smoothing in SMOOTHINGS:
                if smoothing != FIRST_SMOOTHING:
                    tried = *self._try(part, events, best[2], smoothing), best[2], smoothing
                    best = min(best, tried)
        error, iterations, n_states, smoothing = best
        log_.debug(
            "HMM: validation error %.4f with %d states, smoothing %.3g, %d passes",
            error,
            n_states,
            smoothing,
            iterations,
        )
        return self._learn(whole, n_states, smoothing, iterations)

    def _try(
        self, part: EventLog, events: Targets, n_states: int, smoothing: float
    ) -> tuple[float, int]:
        """Lowest validation error, and the passes it takes."""
        model = self._model(part, n_states, smoothing, self.iterations or CHECK)
        best = (np.inf, 0)
        for passes in [self.iterations] if self.iterations else range(CHECK, MOST + 1, CHECK):
            model.fit(part.items[:, None], part.lengths[part.lengths > 0])
            model.init_params = ""
            emit = np.ascontiguousarray(model.emissionprob_.T)
            state = _predicted(model.startprob_, model.transmat_, emit, events)
            nll = _nll(state, emit, events)
            rank = np.ones(nll.size, np.int64)
            error = summarise(events.user, events.first, nll, rank, part.n_users)["nll"]
            log_.debug(
                "HMM: validation error %.4f with %d states, smoothing %.3g, %d passes",
                error,
                n_states,
                smoothing,
                passes,
            )
            gain = best[0] - error
            best = min(best, (error, passes))
            if gain < GAIN:
                break
        return best

    def _learn(
        self, log: EventLog, n_states: int, smoothing: float, iterations: int
    ) -> "HMM.Learned":
        model = self._model(log, n_states, smoothing, iterations)
        model.fit(log.items[:, None], log.lengths[log.lengths > 0])
        emit = np.ascontiguousarray(model.emissionprob_.T)
        settings = np.array([smoothing], np.float64), np.array([iterations])
        return self.Learned(model.startprob_, model.transmat_, emit, *settings)

    def _model(
        self, log: EventLog, n_states: int, smoothing: float, iterations: int
    ) -> "SideBySide":
        # The priors of the states keep a state that nothing reaches from a row of zeros.
        return SideBySide(
            n_states,
            startprob_prior=1.001,
            transmat_prior=1.001,
            emissionprob_prior=1 + smoothing,
            n_features=log.n_items,
            n_iter=iterations,
            tol=-np.inf,
            random_state=self.seed,
        )

    def _score(self, events: Targets) -> tuple[Array, Array]:
        first, move, emit, _, _ = self.learned
        state = _predicted(first, move, emit, events)
        items, by_state = events.log.items[events.at], np.ascontiguousarray(emit.T)
        rank = np.empty(items.size, np.int64)
        parts = np.array_split(np.arange(items.size), 4 * numba.get_num_threads())
        with ThreadPoolExecutor(numba.get_num_threads()) as pool:
            list(pool.map(lambda p: _ranks(p, state, by_state, items, rank), parts))
        return _nll(state, emit, events), rank


class SideBySide(CategoricalHMM):
    """hmmlearn's model with a faster E-step; all else, `fit` included, is hmmlearn's.

    The expected counts are those of hmmlearn up to rounding. Which thread sums what depends on
    the number of threads (`numba.get_num_threads`) alone.
    """

    def _get_n_fit_scalars_per_param(self) -> None:
        """None: no warning that there are fewer events than emission probabilities."""

    def _compute_lower_bound(self, curr_logprob: float) -> float:
        """What EM raises: hmmlearn leaves the priors out, and would warn where they outweigh."""
        return (
            curr_logprob
            + xlogy(np.subtract(self.startprob_prior, 1), self.startprob_).sum()
            + xlogy(np.subtract(self.transmat_prior, 1), self.transmat_).sum()
            + xlogy(np.subtract(self.emissionprob_prior, 1), self.emissionprob_).sum()
        )

    def _do_estep(self, X: Array, lengths: Array) -> tuple[dict[str, Any], float]:
        lengths = np.asarray(lengths, np.int64)
        items, begin = X[:, 0], np.cumsum(lengths) - lengths
        emit = np.ascontiguousarray(self.emissionprob_.T)
        n = numba.get_num_threads()
        parts: list[list[Array]] = [[] for _ in range(n)]
        load = np.zeros(n)
        for group in groups(lengths):
            least = np.argmin(load)
            parts[least].append(group)
            load[least] += lengths[group].sum()

        def expect(part: list[Array]) -> tuple[Array, Array, Array, float]:
            start, trans = np.zeros(self.n_components), np.zeros_like(self.transmat_)
            obs, log_likelihood = np.zeros_like(emit), 0.0
            most = max((lengths[group].sum() for group in part), default=0)
            alpha = np.empty((most, self.n_components))
            for group in part:
                log_likelihood += _expect(
                    items,
                    begin[group],
                    lengths[group],
                    self.startprob_,
                    self.transmat_,
                    emit,
                    alpha,
                    start,
                    trans,
                    obs,
                )
            return start, trans, obs, log_likelihood

        with ThreadPoolExecutor(n) as pool:
            (start, trans, obs, log_likelihood), *others = pool.map(expect, parts)
        for other in others:
            start += other[0]
            trans += other[1]
            obs += other[2]
            log_likelihood += other[3]
        trans *= self.transmat_
        stats = {"nobs": lengths.size, "start": start, "trans": trans, "obs": obs.T}
        return stats, log_likelihood


def groups(lengths: Array) -> list[Array]:
    """The indices of the sequences that are not empty, longest first, `GROUP` at a time."""
    order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    return [order[k : k + GROUP] for k in range(0, order.size, GROUP)]


@compiled(nogil=True, fastmath={"reassoc", "contract"})
def _observe(items: Array, begin: Array, t: int, emit: Array, rows: Array, scale: Array) -> float:
    """Weigh float64[n, S] states by what the sequences emit at step t; returns the log of it.

    The rows are scaled to sum to 1; scale float64[n] takes the factors.
    """
    log_likelihood = 0.0
    for b in range(rows.shape[0]):
        i, total = items[begin[b] + t], 0.0
        for s in range(rows.shape[1]):
            rows[b, s] *= emit[i, s]
            total += rows[b, s]
        scale[b] = 1.0 / total
        log_likelihood += np.log(total)
        for s in range(rows.shape[1]):
            rows[b, s] *= scale[b]
    return log_likelihood


@compiled(nogil=True, fastmath={"reassoc", "contract"})
def _expect(
    items: Array,
    begin: Array,
    lengths: Array,
    first: Array,
    move: Array,
    emit: Array,
    alpha: Array,
    start: Array,
    trans: Array,
    obs: Array,
) -> float:
    """Add a group's expected counts; returns its log-likelihood in nats.

    begin, lengths int64[B]: the group's sequences in `items`, longest first; first float64[S],
    move float64[S, S], emit float64[I, S]: the model; alpha float64[R, S]: room for the group's
    events, R at least their number; start float64[S], trans float64[S, S] before the factor
    `move`, obs float64[I, S]: the counts.
    """
    S, T = first.size, lengths[0]
    scale, at = np.empty(lengths.sum()), np.zeros(T + 1, np.int64)
    n, log_likelihood = lengths.size, 0.0
    for t in range(T):
        while lengths[n - 1] <= t:
            n -= 1
        a = at[t]
        at[t + 1] = a + n
        if t == 0:
            alpha[:n] = first
        else:
            np.dot(alpha[at[t - 1] : at[t - 1] + n], move, alpha[a : a + n])
        log_likelihood += _observe(items, begin, t, emit, alpha[a : a + n], scale[a : a + n])

    beta, back = np.empty((lengths.size, S)), move.T.copy()
    left, right, product = np.empty((CHUNK, S)), np.empty((CHUNK, S)), np.empty((S, S))
    k = later = 0
    for t in range(T - 1, -1, -1):
        a, n = at[t], at[t + 1] - at[t]
        # right[k : k + later] holds what the later steps say of the states at step t + 1.
        if later > 0:
            np.dot(right[k : k + later], back, beta[:later])
            left[k : k + later] = alpha[a : a + later]
            k += later
        beta[later:n] = 1.0
        if k + n > CHUNK:
            np.dot(left[:k].T, right[:k], product)
            trans += product
            k = 0
        for b in range(n):
            i, factor = items[begin[b] + t], scale[a + b]
            for s in range(S):
                obs[i, s] += alpha[a + b, s] * beta[b, s]
            for s in range(S):
                right[k + b, s] = emit[i, s] * beta[b, s] * factor
        later = n
    for b in range(lengths.size):
        start += alpha[b] * beta[b]
    if k > 0:
        np.dot(left[:k].T, right[:k], product)
        trans += product
    return log_likelihood


def _predicted(first: Array, move: Array, emit: Array, events: Targets) -> Array:
    """float64[N, S]: the distribution of the state at each target, given all events before it."""
    slot = np.full(events.log.n_events, -1)
    slot[events.at] = np.arange(events.at.size)
    state = np.empty((events.at.size, first.size))
    log = events.log
    parts = groups(log.lengths)
    with ThreadPoolExecutor(numba.get_num_threads()) as pool:
        list(
            pool.map(
                lambda g: _filter(
                    log.items, log.indptr[g], log.lengths[g], first, move, emit, slot, state
                ),
                parts,
            )
        )
    return state


@compiled(nogil=True)
def _filter(
    items: Array,
    begin: Array,
    lengths: Array,
    first: Array,
    move: Array,
    emit: Array,
    slot: Array,
    state: Array,
) -> None:
    """Write a group's predicted states to the rows `slot` int64[E] of state; -1 for none."""
    rows, scale = np.empty((lengths.size, first.size)), np.empty(lengths.size)
    rows[:] = first
    n = lengths.size
    for t in range(lengths[0]):
        while lengths[n - 1] <= t:
            n -= 1
        if t > 0:
            rows[:n] = np.dot(rows[:n], move)
        for b in range(n):
            if slot[begin[b] + t] >= 0:
                state[slot[begin[b] + t]] = rows[b]
        _observe(items, begin, t, emit, rows[:n], scale[:n])


def _nll(state: Array, emit: Array, events: Targets) -> Array:
    """float64[N]: minus the log of p(x_{t+1} | x_1..x_t), in nats."""
    return -np.log(np.einsum("ns,ns->n", state, emit[events.log.items[events.at]]))


@compiled(nogil=True)
def _ranks(rows: Array, state: Array, by_state: Array, items: Array, rank: Array) -> None:
    """Ranks of some targets; every score is summed in the same order, so ties are exact."""
    S, I = by_state.shape
    score = np.empty(TILE)
    for n in rows:
        target = 0.0
        for s in range(S):
            target += state[n, s] * by_state[s, items[n]]
        count = 0
        for lo in range(0, I, TILE):
            width = min(TILE, I - lo)
            score[:] = 0.0
            for s in range(S):
                for i in range(width):
                    score[i] += state[n, s] * by_state[s, lo + i]
            for i in range(width):
                count += score[i] >= target
        rank[n] = count
