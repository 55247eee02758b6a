"""A personal n-gram: what a user did before, mixed with what others do (beyond the paper).

The next event of a user is drawn from one of K distributions over the items::

    p(y) = sum over k of w_k p_k(y)

- Four caches, the user's own unigram with past events weighted by ``2 ** (-lag / half-life)``. The
  shortest is little more than the last item, the longest forgets nothing.
- The user's own bigram: the items that followed the last one before, recent occurrences of it
  weighted up or not; and the own trigram.
- The bigram and the unigram of the *other* users' training parts, and the uniform distribution.
  Without the user's own events among them, what they say of a training event is as honest as what
  they say of a later one, so that the weights can be learned on both.

A distribution without a context in the history passes its weight to the others. The weights depend
on two things that a history tells: how often the user tried new items lately (novelty rate) and how
often the last item was seen before. They are learned by EM, each bucket shrunk to its parent: all
events, those of like novelty, those of like novelty and context count. A user's own weights are
these times ``(n + responsibility so far) / (n + weight so far)`` of each distribution.

The user's own counts and weights go on through the held-out part, event by event, as the RNN's
state does; the others' counts are those of the training parts. Distributions, half-lives, buckets
and shrinkage were chosen on the validation parts of two Brightkite samples, learned on one half of
the users and judged on the other.
"""

from typing import NamedTuple

import numpy as np

from ..compiling import compiled
from ..data import EventLog
from ..history import Counts, count
from ..tallies import novelty
from . import Baseline, Targets, targets, validation_parts

Array = np.ndarray

HALF_LIVES = np.array([0.3, 8.0, 100.0, np.inf])  # of the caches, events
MATCH_HALF_LIVES = np.array([5.0, np.inf])  # of the own bigrams, occurrences of the last item
TRIGRAM = HALF_LIVES.size + MATCH_HALF_LIVES.size
BIGRAM, UNIGRAM, UNIFORM = TRIGRAM + 1, TRIGRAM + 2, TRIGRAM + 3  # the others'
K = UNIFORM + 1

NOVELTY = np.array([0.02, 0.06, 0.12, 0.2, 0.35, 0.5])  # bounds of the buckets
CONTEXT = np.array([1, 2, 3, 6, 11, 21, 51])

TAIL = 100  # training events of each user that weights are learned on as well
SHRINKAGE = 20.0  # events that the parent of a bucket counts for
USER_SHRINKAGE = 5.0  # events that a bucket's weights count for against the user's own
ITERATIONS = 40


class Personal(Baseline):
    """The user's own n-grams and caches mixed with the other users'; the module says how.

    Attributes
    ----------
    learned : Learned or None
    """

    class Learned(NamedTuple):
        """The training part, and the weights of the distributions.

        indptr int64[U + 1], items int32[E] and n_items int64[1] as in `EventLog`;
        weights float64[7, 8, K] for each bucket of the novelty rate and of the context count.
        """

        indptr: Array
        items: Array
        n_items: Array
        weights: Array

    SHAPES = {"indptr": ("U + 1",), "items": ("E",), "n_items": (1,), "weights": (7, 8, K)}

    def _fit(self, train: EventLog, validation: EventLog | None) -> "Personal.Learned":
        part, validation, whole = validation_parts(train, validation)
        walk = _walk(targets(part, validation))
        found = _distributions(walk, count(part))
        weights = learn_weights(*found, walk.user)
        return self.Learned(whole.indptr, whole.items, np.array([train.n_items]), weights)

    def _score(self, events: Targets) -> tuple[Array, Array]:
        indptr, items, n_items, weights = self.learned
        others = count(events.log._replace(indptr=indptr, items=items))
        walk = _walk(events)
        mass, total, bucket = _distributions(walk, others)
        p, factors = _mix(mass, total, weights.reshape(-1, K)[bucket], walk.user)
        rank = _ranks(*walk, *others, factors)
        return -np.log(p[walk.target]), rank


class Walk(NamedTuple):
    """N events to go through: the targets, and each user's last `TAIL` events before them.

    user int64[N]; at int64[N], index into the log's items; target bool[N]; indptr int64[U + 1] and
    items int32[E], the log.
    """

    user: Array
    at: Array
    target: Array
    indptr: Array
    items: Array


def _walk(events: Targets) -> Walk:
    log = events.log
    users, index = np.unique(events.user, return_index=True)
    first = events.at[index]
    begin = np.maximum(first - TAIL, log.indptr[users] + 1)
    n = log.indptr[users + 1] - begin
    at = np.arange(n.sum()) + np.repeat(begin - np.cumsum(n) + n, n)
    return Walk(np.repeat(users, n), at, at >= np.repeat(first, n), log.indptr, log.items)


def _distributions(walk: Walk, others: Counts) -> tuple[Array, Array, Array]:
    """What each distribution says of each event, and the event's bucket.

    Parameters
    ----------
    others : Counts
        Of the training part, each user's own events to be taken out.

    Returns
    -------
    mass, total : float64[N, K]
        p_k(y) is mass / total; a total of 0 is a distribution without a context.
    bucket : int64[N]
    """
    mass, total = np.empty((2, walk.at.size, K))
    seen = np.empty(walk.at.size, np.int64)
    _masses(*walk, *others, mass, total, seen)
    rate = novelty(walk.indptr, walk.items, others.unigram.size)[walk.at]
    row = np.searchsorted(NOVELTY, rate, side="right")
    return mass, total, row * (CONTEXT.size + 1) + np.searchsorted(CONTEXT, seen, side="right")


def learn_weights(mass: Array, total: Array, bucket: Array, user: Array) -> Array:
    """Weights of the distributions in each bucket, by EM; every user counts the same.

    Where a distribution is missing the others' weights are divided by their sum, so the M-step is
    that of Hunter (2004, MM algorithms for generalized Bradley-Terry models): the likelihood of a
    bucket does not fall. Then each bucket is shrunk to its parent.

    Parameters
    ----------
    mass, total : float64[N, K]
    bucket, user : int64[N]

    Returns
    -------
    float64[7, 8, K]
    """
    there = total > 0
    share = np.divide(mass, total, out=np.zeros_like(mass), where=there)
    events = np.bincount(user)
    each = 1.0 / events[user]
    each *= each.size / max(each.sum(), 1.0)
    rows, columns = NOVELTY.size + 1, CONTEXT.size + 1
    cells = np.arange(rows * columns)
    levels = [  # group of each event, parent of each group
        (np.zeros_like(bucket), np.zeros(1, np.int64)),
        (bucket // columns, np.zeros(rows, np.int64)),
        (bucket, cells // columns),
    ]
    weights = [np.full((parent.size, K), 1.0 / K) for _, parent in levels]
    for _ in range(ITERATIONS):
        above = np.full((1, K), 1.0 / K)
        for level, (group, parent) in enumerate(levels):
            own = weights[level]
            part = own[group] * there
            part *= (each / part.sum(axis=1))[:, None]
            taken = part * share
            taken *= (each / taken.sum(axis=1))[:, None]
            given, got = (_sums(group, x, parent.size) for x in (part, taken))
            own = own * np.divide(got, given, out=np.ones_like(own), where=given > 0)
            own /= own.sum(axis=1, keepdims=True)
            n = np.bincount(group, each, minlength=parent.size)[:, None]
            weights[level] = above = (n * own + SHRINKAGE * above[parent]) / (n + SHRINKAGE)
    return weights[-1].reshape(rows, columns, K)


def _sums(group: Array, values: Array, n_groups: int) -> Array:
    """Sums of values float64[N, K] over the events of each group."""
    columns = [np.bincount(group, column, minlength=n_groups) for column in values.T]
    return np.stack(columns, axis=1)


DECAY, MATCH_DECAY = np.exp2(-1 / HALF_LIVES), np.exp2(-1 / MATCH_HALF_LIVES)


@compiled()
def _own_weights(h, t, weight):
    """Weight of each event before position t of the sequence h in the own distributions.

    weight float64[>= t, TRIGRAM + 1] is overwritten. Returns how often the last item had a
    successor before.
    """
    decayed, matched, seen = np.ones(DECAY.size), np.ones(MATCH_DECAY.size), 0
    for s in range(t - 1, -1, -1):
        for k in range(DECAY.size):
            weight[s, k] = decayed[k]
            decayed[k] = decayed[k] * DECAY[k] if decayed[k] > 1e-12 else 0.0
        weight[s, DECAY.size :] = 0.0
        if s > 0 and h[s - 1] == h[t - 1]:
            seen += 1
            for k in range(MATCH_DECAY.size):
                weight[s, DECAY.size + k] = matched[k]
                matched[k] *= MATCH_DECAY[k]
            if s > 1 and h[s - 2] == h[t - 2]:
                weight[s, TRIGRAM] = 1.0
    return seen


@compiled()
def _masses(
    user,
    at,
    target,
    indptr,
    items,
    begin,
    follower,
    count,
    unigram,
    own_indptr,
    own_items,
    mass,
    total,
    seen,
):
    """Fill mass, total and seen of `_distributions`."""
    weight = np.empty((np.diff(indptr).max(), TRIGRAM + 1))
    everything = unigram.sum()
    mass[:], total[:] = 0.0, 0.0
    for n in range(at.size):
        h = items[indptr[user[n]] : at[n] + 1]
        t = h.size - 1
        y, last = h[t], h[t - 1]
        seen[n] = _own_weights(h, t, weight)
        for s in range(t):
            for k in range(TRIGRAM + 1):
                total[n, k] += weight[s, k]
                if h[s] == y:
                    mass[n, k] += weight[s, k]
        for p in range(begin[last], begin[last + 1]):
            total[n, BIGRAM] += count[p]
            if follower[p] == y:
                mass[n, BIGRAM] += count[p]
        mass[n, UNIGRAM], total[n, UNIGRAM] = unigram[y], everything
        own = own_items[own_indptr[user[n]] : own_indptr[user[n] + 1]]
        total[n, UNIGRAM] -= own.size
        for s in range(own.size):
            if own[s] == y:
                mass[n, UNIGRAM] -= 1
            if s > 0 and own[s - 1] == last:
                total[n, BIGRAM] -= 1
                if own[s] == y:
                    mass[n, BIGRAM] -= 1
        mass[n, UNIFORM], total[n, UNIFORM] = 1, unigram.size


@compiled()
def _mix(mass, total, weights, user):
    """p(y) float64[N], and w_k / total_k float64[N, K]; 0 where there is no context.

    weights float64[N, K] are those of the bucket; a user's events stand together, in their order.
    """
    p, factors = np.zeros(user.size), np.zeros(mass.shape)
    took, gave = np.empty(K), np.empty(K)
    for n in range(user.size):
        if n == 0 or user[n] != user[n - 1]:
            took[:], gave[:] = USER_SHRINKAGE, USER_SHRINKAGE
        sum_ = 0.0
        for k in range(K):
            if total[n, k] > 0:
                factors[n, k] = weights[n, k] * took[k] / gave[k]
                sum_ += factors[n, k]
        for k in range(K):
            if total[n, k] > 0:
                factors[n, k] /= sum_ * total[n, k]
                p[n] += factors[n, k] * mass[n, k]
        for k in range(K):
            took[k] += factors[n, k] * mass[n, k] / p[n]
            gave[k] += factors[n, k] * total[n, k]
    return p, factors


@compiled()
def _ranks(
    user, at, target, indptr, items, begin, follower, count, unigram, own_indptr, own_items, factors
):
    """int64 rank of each target among all items, from the mixture over all of them."""
    rank = np.empty(target.sum(), np.int64)
    weight = np.empty((np.diff(indptr).max(), TRIGRAM + 1))
    p = np.empty(unigram.size)
    own_count, own_follows = np.zeros(unigram.size, np.int64), np.zeros(unigram.size, np.int64)
    done = 0
    for n in np.flatnonzero(target):
        h = items[indptr[user[n]] : at[n] + 1]
        t = h.size - 1
        last, f = h[t - 1], factors[n]
        own = own_items[own_indptr[user[n]] : own_indptr[user[n] + 1]]
        for s in range(own.size):
            own_count[own[s]] += 1
            if s > 0 and own[s - 1] == last:
                own_follows[own[s]] += 1
        for i in range(unigram.size):
            p[i] = f[UNIFORM] + f[UNIGRAM] * (unigram[i] - own_count[i])
        for q in range(begin[last], begin[last + 1]):
            p[follower[q]] += f[BIGRAM] * (count[q] - own_follows[follower[q]])
        for s in range(own.size):
            own_count[own[s]] = 0
            own_follows[own[s]] = 0
        _own_weights(h, t, weight)
        for s in range(t):
            for k in range(TRIGRAM + 1):
                p[h[s]] += f[k] * weight[s, k]
        rank[done] = np.sum(p >= p[h[t]] * (1 - 1e-12))  # sums in another order are still ties
        done += 1
    return rank
