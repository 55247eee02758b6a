"""Compiled loops over whole logs that count what is known before each event (`history`)."""

import numba
import numpy as np

from .data import EventLog
from .history import FEATURES, FLOOR, SMOOTHING, Counts, Past

NOVELTY_HALF_LIFE = 20.0  # events


def past(log: EventLog, counts: Counts) -> Past:
    """The features and the experts' probabilities of every event of a log.

    Parameters
    ----------
    log : EventLog
        Of the same users and items as `counts`; longer than what was counted, or as long.
    """
    features = np.zeros((log.n_events, len(FEATURES)), np.float32)
    experts = np.ones((log.n_events, 2))
    _features(log.indptr, log.items, counts.unigram, counts.indptr, counts.items, features)
    _experts(log.indptr, log.items, *counts, experts)
    return Past(log.indptr, log.items, features, experts, counts)


@numba.njit(cache=True)
def novelty(indptr, items, n_items):
    """float64[E]: before each event, the share of new items among the user's recent ones."""
    rate = np.empty(items.size)
    decay = np.exp2(-1 / NOVELTY_HALF_LIFE)
    known_to = np.full(n_items, -1)
    for u in range(indptr.size - 1):
        new, events = 1.0, 2.0
        for n in range(indptr[u], indptr[u + 1]):
            rate[n] = new / events
            new, events = new * decay, events * decay + 1
            if known_to[items[n]] != u:
                known_to[items[n]] = u
                new += 1
    return rate


@numba.njit(cache=True)
def _pairs(items, n_items):
    """Each event with the one before it, as one number, int64[E - 1]."""
    return items[:-1].astype(np.int64) * n_items + items[1:]


@numba.njit(cache=True)
def _earlier_pairs(indptr, items, n_items):
    """int64[E]: how often the user had the event before each event followed by this one, so far."""
    earlier = np.zeros(items.size, np.int64)
    for u in range(indptr.size - 1):
        first = indptr[u] + 1
        pairs = _pairs(items[indptr[u] : indptr[u + 1]], n_items)
        order = np.argsort(pairs, kind="mergesort")
        for k in range(1, order.size):
            if pairs[order[k]] == pairs[order[k - 1]]:
                earlier[first + order[k]] = earlier[first + order[k - 1]] + 1
    return earlier


@numba.njit(cache=True)
def _features(indptr, items, unigram, own_indptr, own_items, features):
    """Fill `Past.features`, float32[E, F]; `history.FEATURES` says with what."""
    slow, fast, steady = np.exp2(-1 / NOVELTY_HALF_LIFE), 0.75, 0.9
    latest = np.full(unigram.size, -1)  # index of the item's latest event
    pairs = _earlier_pairs(indptr, items, unigram.size)
    seen = np.zeros(unigram.size, np.int64)
    others = unigram.copy()
    for u in range(indptr.size - 1):
        first = indptr[u]
        own = own_items[own_indptr[u] : own_indptr[u + 1]]
        for x in own:
            others[x] -= 1
        distinct = 0
        new, events, new_lately, lately = 1.0, 2.0, 0.5, 1.0
        repeats, hits, depth = 0.3, 0.5, 2.0
        q = -1  # where the event before had its item, before that
        for e in range(first, indptr[u + 1]):
            x, f, t = items[e], features[e], e - first
            p = latest[x] if latest[x] >= first else -1
            latest[x] = e
            if p < 0:
                distinct += 1
                seen[x] = 0
            is_new = 1.0 if p < 0 else 0.0
            new, events = new * slow + is_new, events * slow + 1
            new_lately, lately = new_lately * fast + is_new, lately * fast + 1
            repeat = 0.0
            if t > 0:
                repeat = 1.0 if items[e - 1] == x else 0.0
                if q >= 0:
                    hit = 1.0 if items[q + 1] == x else 0.0
                    hits = steady * hits + (1 - steady) * hit
            repeats = steady * repeats + (1 - steady) * repeat
            if p >= 0:
                depth = steady * depth + (1 - steady) * np.log(e - p)
            f[0] = 1.0
            f[1] = np.log(1.0 + t) / 4 - 1
            f[2] = 2 * new / events
            f[3] = new_lately / lately
            f[4] = np.log(1.0 + seen[x])
            f[5] = np.log(1.0 + pairs[e])
            f[6] = np.log(e - p) / 3 if p >= 0 else 0.0
            f[7] = is_new
            f[8] = 2 * repeats
            f[9] = 2 * hits
            f[10] = depth / 2
            f[11] = np.log(1.0 + others[x]) / 4
            f[12] = np.log(1.0 + distinct) / 4
            f[13] = repeat
            f[14] = np.log((1.0 + distinct) / (1.0 + t))
            seen[x] += 1
            q = p
        for x in own:
            others[x] += 1


@numba.njit(cache=True)
def _experts(indptr, items, begin, follower, count, unigram, own_indptr, own_items, experts):
    """Fill `Past.experts`, float64[E, 2]; the arguments from begin on are `history.Counts`."""
    total = np.zeros(unigram.size, np.int64)
    for x in range(unigram.size):
        for q in range(begin[x], begin[x + 1]):
            total[x] += count[q]
    everything = unigram.sum()
    of_user = np.zeros(unigram.size, np.int64)
    followed = np.zeros(unigram.size, np.int64)
    for u in range(indptr.size - 1):
        low, high = own_indptr[u], own_indptr[u + 1]
        for s in range(low, high):
            of_user[own_items[s]] += 1
            if s + 1 < high:
                followed[own_items[s]] += 1
        own = np.sort(_pairs(own_items[low:high], unigram.size))
        n = everything - (high - low)
        for e in range(indptr[u], indptr[u + 1] - 1):
            x, y = items[e], items[e + 1]
            common = (unigram[y] - of_user[y] + FLOOR) / (n + FLOOR * unigram.size)
            row = follower[begin[x] : begin[x + 1]]
            q = np.searchsorted(row, y)
            times = count[begin[x] + q] if q < row.size and row[q] == y else 0
            pair = np.int64(x) * unigram.size + y
            times -= np.searchsorted(own, pair, "right") - np.searchsorted(own, pair)
            experts[e, 0] = (times + SMOOTHING * common) / (total[x] - followed[x] + SMOOTHING)
            experts[e, 1] = common
        for s in range(low, high):
            of_user[own_items[s]] = 0
            followed[own_items[s]] = 0
