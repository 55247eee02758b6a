"""Counts of the past and the other users' experts, against their definitions, event by event."""

import os

import mixture_oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crnn_np import data, history, tallies

SINGLE = 2e-6  # a few roundings to float32


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=bool(os.environ.get("CI")))


@st.composite
def logs(draw, users=(1, 5)):
    """Sequences, how many events of each are counted, and the number of items."""
    n_items = draw(st.integers(1, 7))
    items = st.integers(0, n_items - 1)
    sequence = st.one_of(st.lists(items, max_size=2), st.lists(items, max_size=25))
    sequences = draw(st.lists(sequence, min_size=users[0], max_size=users[1]))
    counted = [draw(st.integers(0, len(s))) for s in sequences]
    unused = draw(st.integers(0, 2))  # items that occur nowhere
    return sequences, counted, n_items + unused


def training_parts(sequences, counted):
    return [s[:n] for s, n in zip(sequences, counted, strict=True)]


def read(sequences, counted, n_items):
    """The `Past` of sequences of which the first events are counted."""
    parts = data.from_sequences(training_parts(sequences, counted), n_items)
    return tallies.past(data.from_sequences(sequences, n_items), history.count(parts))


def each_event(sequences):
    """(index in the log, user, position) of each event."""
    pairs = [(u, t) for u, s in enumerate(sequences) for t in range(len(s))]
    return [(e, *pair) for e, pair in enumerate(pairs)]


def features(sequences, counted, n_items, name):
    """One feature of all events by the oracle."""
    parts = training_parts(sequences, counted)
    everything = sum(parts, [])
    return [
        float(mixture_oracle.features(s[: t + 1], everything.count(x) - part.count(x))[name])
        for s, part in zip(sequences, parts, strict=True)
        for t, x in enumerate(s)
    ]


@pytest.mark.parametrize("name", history.FEATURES)
@examples(30)
@given(drawn=logs())
def test_features(name, drawn):
    found = read(*drawn).features
    assert found.dtype == np.float32
    assert found.shape == (sum(map(len, drawn[0])), len(history.FEATURES))
    column = found[:, history.FEATURES.index(name)]
    np.testing.assert_allclose(column, features(*drawn, name), rtol=SINGLE, atol=SINGLE)


@pytest.mark.parametrize(
    ("decay", "half_life"),
    [(tables[0], life) for tables, life in (
        (mixture_oracle.NOVELTY, 20), (mixture_oracle.NOVELTY_LATELY, 2.4),
        (mixture_oracle.REPEATS, 6.6), (mixture_oracle.BIGRAM_HITS, 6.6),
        (mixture_oracle.DEPTH, 6.6),
    )],
)  # fmt: skip
def test_the_oracles_decays_have_the_documented_half_lives(decay, half_life):
    assert np.log(0.5) / np.log(decay) == pytest.approx(half_life, abs=0.05)


def test_features_of_a_sequence_by_hand():
    """a b a b b: the last event repeats, has followed b never before, and was there twice."""
    past = read([[0, 1, 0, 1, 1]], [5], 2)
    last = dict(zip(history.FEATURES, past.features[-1], strict=True))
    assert last["one"] == 1
    assert last["new"] == 0
    assert last["repeat"] == 1
    assert last["lag"] == 0
    assert last["context"] == pytest.approx(np.log(3))
    assert last["context_pair"] == 0
    assert last["length"] == pytest.approx(np.log(5) / 4 - 1)
    assert last["distinct"] == pytest.approx(np.log(3) / 4)
    assert last["variety"] == pytest.approx(np.log(3 / 5))
    fourth = dict(zip(history.FEATURES, past.features[3], strict=True))
    assert fourth["context_pair"] == pytest.approx(np.log(2))
    assert fourth["lag"] == pytest.approx(np.log(2) / 3)


@examples(100)
@given(drawn=logs())
def test_experts(drawn):
    """What the other users say of the event that follows; 1 at the end of a sequence."""
    sequences, counted, n_items = drawn
    parts = training_parts(sequences, counted)
    found = read(*drawn).experts
    expected = np.ones((len(found), 2))
    for e, u, t in each_event(sequences):
        if t + 1 < len(sequences[u]):
            x, y = sequences[u][t : t + 2]
            expected[e, 0] = mixture_oracle.bigram(parts, u, x, n_items)[y]
            expected[e, 1] = mixture_oracle.unigram(parts, u, n_items)[y]
    np.testing.assert_allclose(found, expected, rtol=SINGLE)


@examples(60)
@given(drawn=logs())
def test_distributions_are_the_experts_over_all_items(drawn):
    sequences, counted, n_items = drawn
    parts = training_parts(sequences, counted)
    past = read(*drawn)
    for e, u, t in each_event(sequences):
        found = history.distributions(past, u, e)
        assert found.shape == (2, n_items)
        np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-12)
        bigram = mixture_oracle.bigram(parts, u, sequences[u][t], n_items)
        unigram = mixture_oracle.unigram(parts, u, n_items)
        np.testing.assert_allclose(found, [bigram, unigram], rtol=1e-12)
        if t + 1 < len(sequences[u]):
            y = sequences[u][t + 1]
            np.testing.assert_allclose(past.experts[e], found[:, y], rtol=SINGLE)


@examples(60)
@given(drawn=logs())
def test_counts(drawn):
    sequences, counted, n_items = drawn
    counts = read(*drawn).counts
    parts = training_parts(sequences, counted)
    everything = sum(parts, [])
    assert counts.unigram.tolist() == [everything.count(i) for i in range(n_items)]
    pairs = [pair for s in parts for pair in zip(s[:-1], s[1:], strict=True)]
    for x in range(n_items):
        row = slice(counts.begin[x], counts.begin[x + 1])
        followers = sorted({b for a, b in pairs if a == x})
        assert counts.follower[row].tolist() == followers
        assert counts.count[row].tolist() == [pairs.count((x, y)) for y in followers]


@pytest.mark.parametrize("lengths", [[], [0], [1], [2], [0, 0], [0, 1, 2, 0], [3, 0]])
def test_users_with_few_events(lengths):
    sequences = [list(range(n)) for n in lengths]
    past = read(sequences, lengths, 3)
    assert past.features.shape == (sum(lengths), len(history.FEATURES))
    assert past.experts.shape == (sum(lengths), 2)
    assert np.isfinite(past.features).all()
    assert ((past.experts > 0) & (past.experts <= 1)).all()


def test_a_user_alone_is_told_nothing():
    """Without other users both experts are even."""
    past = read([[0, 0, 1, 0, 0]], [5], 4)
    np.testing.assert_allclose(past.experts[:-1], 0.25, rtol=SINGLE)


@st.composite
def changed_logs(draw):
    """A log, the same with other events of one user after the first few, the user, and how few.

    The later events may be in the training part or not.
    """
    sequences, counted, n_items = draw(logs(users=(2, 4)))
    u = draw(st.integers(0, len(sequences) - 1))
    kept = draw(st.integers(0, len(sequences[u])))
    tail = draw(st.lists(st.integers(0, n_items - 1), max_size=8))
    changed, lengths = list(sequences), list(counted)
    changed[u] = sequences[u][:kept] + tail
    lengths[u] = draw(st.integers(min(counted[u], kept), len(changed[u])))
    return (sequences, counted, n_items), (changed, lengths, n_items), u, kept


def first_events(past, user, count):
    start = past.indptr[user]
    return slice(start, start + count)


@pytest.mark.parametrize("name", history.FEATURES)
def test_later_events_do_not_leak_into_features(name):
    @examples(40)
    @given(changed_logs())
    def check(drawn):
        before, after, u, kept = drawn
        column = history.FEATURES.index(name)
        found = [
            past.features[first_events(past, u, kept), column]
            for past in (read(*before), read(*after))
        ]
        np.testing.assert_array_equal(*found)

    check()


@examples(100)
@given(drawn=changed_logs())
def test_later_events_do_not_leak_into_experts(drawn):
    """The probability of each event up to the change, and the experts' whole distributions."""
    before, after, u, kept = drawn
    one, other = read(*before), read(*after)
    known = max(kept - 1, 0)
    np.testing.assert_array_equal(
        one.experts[first_events(one, u, known)], other.experts[first_events(other, u, known)]
    )
    for k in range(kept):
        found = [history.distributions(past, u, past.indptr[u] + k) for past in (one, other)]
        np.testing.assert_allclose(*found, rtol=1e-12)


@examples(40)
@given(drawn=logs(), more=st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_events_that_are_not_counted_change_no_earlier_event(drawn, more):
    """A log that goes on after what was counted: all users' earlier events stay as they were."""
    sequences, counted, n_items = drawn
    longer = [s + [x % n_items for x in more] for s in sequences]
    one, other = read(*drawn), read(longer, counted, n_items)
    for u, s in enumerate(sequences):
        ours, theirs = first_events(one, u, len(s)), first_events(other, u, len(s))
        np.testing.assert_array_equal(one.features[ours], other.features[theirs])
        known = max(len(s) - 1, 0)
        np.testing.assert_array_equal(one.experts[ours][:known], other.experts[theirs][:known])


def test_counts_of_more_items_than_int32_has_pairs_of():
    log = data.from_sequences([[50_000, 123, 50_000, 7], [50_000, 123]], 60_000)
    counts = history.count(log)
    row = slice(counts.begin[50_000], counts.begin[50_001])
    assert counts.follower[row].tolist() == [7, 123]
    assert counts.count[row].tolist() == [1, 2]
    assert counts.begin[-1] == 3


def test_a_user_who_repeats_one_item_takes_no_longer():
    """Some 10^11 steps if each event looked at all before it."""
    log = data.from_sequences([[0] * 500_000], 2)
    past = tallies.past(log, history.count(log))
    pairs = np.exp(past.features[1:, history.FEATURES.index("context_pair")].astype(float)) - 1
    np.testing.assert_allclose(pairs, np.arange(499_999), rtol=1e-4, atol=1e-4)
