"""What a user's past and the other users' say of the next event: causal counts and static experts.

All of it is counted, nothing learned. The other users' bigram and unigram come from their training
parts without the user's own events, so that what they say of a training event is as honest as what
they say of a later one.
"""

from typing import NamedTuple

import numpy as np

from .data import EventLog

Array = np.ndarray

SMOOTHING = 1.0  # events of the unigram that a context of the bigram has on top of its own
FLOOR = 0.1  # of an event that each item has on top of its own in the unigram

FEATURES = (
    "one",
    "length",
    "novelty",
    "novelty_lately",
    "context",
    "context_pair",
    "lag",
    "new",
    "repeats",
    "bigram_hits",
    "depth",
    "others_context",
    "distinct",
    "repeat",
    "variety",
)
"""Columns of `Past.features`, after the last event, x, of a history of t + 1:

one             1
length          log(1 + t) / 4 - 1
novelty         2 * share of new items among the recent ones, half-life 20 events
novelty_lately  share of new items, half-life 2.4 events
context         log(1 + how often x was there before)
context_pair    log(1 + how often x followed the item before it before)
lag             log(events since x was there before) / 3; 0 where it never was
new             1 where x was never there before
repeats         2 * share of events that repeat the one before, half-life 6.6 events
bigram_hits     2 * share of events that follow the one before as its last follower did, of those
                with such a follower, half-life 6.6
depth           mean of log(lag) / 2 of items that were there before, half-life 6.6
others_context  log(1 + how often x is in the other users' training parts) / 4
distinct        log(1 + number of items so far) / 4
repeat          1 where x repeats the item before it
variety         log((1 + number of items) / (1 + t))
"""


class Counts(NamedTuple):
    """How often each item occurs, and follows each other item, in the training parts.

    begin int64[I + 1], follower int64[Q], count int64[Q]: rows of the items that follow one,
    sorted; unigram int64[I]; indptr int64[U + 1] and items int32[E], what was counted.
    """

    begin: Array
    follower: Array
    count: Array
    unigram: Array
    indptr: Array
    items: Array


class Past(NamedTuple):
    """A log with what was counted before each of its events.

    indptr int64[U + 1], items int32[E]; features float32[E, F] after each event; experts
    float64[E, 2], the other users' bigram and unigram of the event that follows (1 at the end of a
    sequence); counts, as `Counts`.
    """

    indptr: Array
    items: Array
    features: Array
    experts: Array
    counts: Counts


def count(log: EventLog) -> Counts:
    """Counts of all users' sequences in a training part."""
    n_items = log.n_items
    follows = np.ones(log.n_events, bool)
    follows[log.indptr[:-1][log.lengths > 0]] = False
    at = np.flatnonzero(follows)
    pairs = log.items[at - 1].astype(np.int64) * n_items + log.items[at]
    keys, times = np.unique(pairs, return_counts=True)
    begin = np.searchsorted(keys, np.arange(n_items + 1) * n_items)
    unigram = np.bincount(log.items, minlength=n_items)
    return Counts(begin, keys % n_items, times, unigram, log.indptr, log.items)


def distributions(past: Past, user: int, at: int) -> Array:
    """The other users' bigram and unigram of all items after one event.

    Parameters
    ----------
    user : int
    at : int
        Index of the event in the log.

    Returns
    -------
    float64[2, I]
    """
    counts, x = past.counts, past.items[at]
    own = counts.items[counts.indptr[user] : counts.indptr[user + 1]]
    n_items = counts.unigram.size
    common = counts.unigram - np.bincount(own, minlength=n_items) + FLOOR
    common /= common.sum()
    row = slice(counts.begin[x], counts.begin[x + 1])
    follows = -np.bincount(own[1:][own[:-1] == x], minlength=n_items)
    follows[counts.follower[row]] += counts.count[row]
    follows = follows + SMOOTHING * common
    return np.stack([follows / follows.sum(), common])
