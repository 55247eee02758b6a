"""Compiled loops over whole logs that count what is known before each event (`history`)."""

import numpy as np

from .compiling import compiled
from .data import EventLog
from .history import FEATURES, FLOOR, SMOOTHING, Counts, Past

assert (FLOOR, SMOOTHING) == (0.1, 1.0)  # compiled in; the cache on disk watches this file alone
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
    own = counts.unigram, counts.indptr, counts.items
    _features(log.indptr, log.items, _earlier_pairs(log), *own, features)
    _experts(log.indptr, log.items, *counts, experts)
    return Past(log.indptr, log.items, features, experts, counts)


def _earlier_pairs(log: EventLog) -> np.ndarray:
    """int64[E]: of each event with the one before it, how often the user had this pair before."""
    pair = log.items.astype(np.int64)
    pair[1:] += log.n_items * pair[:-1]
    pair[log.indptr[:-1][log.lengths > 0]] = -1  # no pair
    order = np.argsort(pair, kind="stable")
    user = np.repeat(np.arange(log.n_users), log.lengths)[order]
    pair = pair[order]
    begins = np.append(True, (pair[1:] != pair[:-1]) | (user[1:] != user[:-1]))[: pair.size]
    n = np.arange(pair.size)
    earlier = np.empty(pair.size, np.int64)
    earlier[order] = n - np.maximum.accumulate(np.where(begins, n, 0))
    return earlier


@compiled()
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


@compiled()
def _features(indptr, items, pairs, unigram, own_indptr, own_items, features):
    """Fill `Past.features`, float32[E, F]; `history.FEATURES` says with what."""
    slow, fast, steady = np.exp2(-1 / NOVELTY_HALF_LIFE), 0.75, 0.9
    latest = np.full(unigram.size, -1)  # index of the item's latest event
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


@compiled()
def _place(begin, follower, x, y):
    """Where y stands, or would, among the followers of x in `history.Counts`."""
    return begin[x] + np.searchsorted(follower[begin[x] : begin[x + 1]], y)


@compiled()
def _experts(indptr, items, begin, follower, count, unigram, own_indptr, own_items, experts):
    """Fill `Past.experts`, float64[E, 2]; the arguments from begin on are `history.Counts`."""
    total = np.zeros(unigram.size, np.int64)
    for x in range(unigram.size):
        for q in range(begin[x], begin[x + 1]):
            total[x] += count[q]
    everything = unigram.sum()
    of_user = np.zeros(unigram.size, np.int64)
    followed = np.zeros(unigram.size, np.int64)
    own_count = np.zeros(count.size, np.int64)
    for u in range(indptr.size - 1):
        low, high = own_indptr[u], own_indptr[u + 1]
        for s in range(low, high):
            of_user[own_items[s]] += 1
            if s + 1 < high:
                followed[own_items[s]] += 1
                own_count[_place(begin, follower, own_items[s], own_items[s + 1])] += 1
        n = everything - (high - low)
        for e in range(indptr[u], indptr[u + 1] - 1):
            x, y = items[e], items[e + 1]
            common = (unigram[y] - of_user[y] + FLOOR) / (n + FLOOR * unigram.size)
            q = _place(begin, follower, x, y)
            counted = q < begin[x + 1] and follower[q] == y
            times = count[q] - own_count[q] if counted else 0
            experts[e, 0] = (times + SMOOTHING * common) / (total[x] - followed[x] + SMOOTHING)
            experts[e, 1] = common
        for s in range(low, high):
            of_user[own_items[s]] = 0
            followed[own_items[s]] = 0
            if s + 1 < high:
                own_count[_place(begin, follower, own_items[s], own_items[s + 1])] = 0
