"""Slices and windows against plain loops over the sequences."""

import numpy as np
import pytest

from crnn_np import backends
from crnn_np.data import from_sequences
from crnn_np.windows import (
    INPUT,
    OUTPUT,
    Plan,
    Slice,
    dropout_keep,
    epoch_slices,
    mix,
    replay_slices,
    window,
    window_keys,
)

WORD = 2**64
LENGTHS = [
    [5],
    [1, 1, 1],
    [4, 8, 12, 0, 4, 16],  # every length a multiple of 4 steps
    [0, 3, 17, 1, 9, 0, 2, 4, 30, 5, 5, 5, 28],
    [0, 0],
    [],
]


def stretches(run):
    """{user: [(window, column, start, length, fresh), ...]} in the order of the windows."""
    found = {}
    for k in range(len(run.key)):
        for b in range(run.user.shape[1]):
            if run.length[k, b]:
                row = (k, b, run.start[k, b], run.length[k, b], run.fresh[k, b])
                found.setdefault(int(run.user[k, b]), []).append(tuple(int(v) for v in row))
    return found


def assert_reads_whole_sequences(run, lengths, users, batch, T):
    """Each sequence once, in order, in one column of windows that follow each other."""
    assert run.user.shape[1] == batch
    found = stretches(run)
    assert sorted(found) == sorted(users)
    for user, rows in found.items():
        first_window, column = rows[0][:2]
        position = 0
        for i, (k, b, start, length, fresh) in enumerate(rows):
            assert (k, b, start) == (first_window + i, column, position)
            assert length == min(T, lengths[user] - position)
            assert fresh == (position == 0)
            position += length
        assert position == lengths[user]
    assert all(run.length[k].any() for k in range(len(run.key)))


def groups(run):
    """Users of the windows with a fresh sequence, from window to window."""
    return [
        [int(run.user[k, b]) for b in range(run.user.shape[1]) if run.length[k, b]]
        for k in range(len(run.key))
        if (run.fresh[k] & (run.length[k] > 0)).any()
    ]


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("order", ["random", "length"])
@pytest.mark.parametrize(("batch", "T"), [(1, 1), (1, 4), (2, 4), (3, 5), (20, 64)])
def test_an_epoch_reads_every_event_of_every_user_once(lengths, order, batch, T):
    plan = Plan(batch=batch, window=T, order=order, seed=3)
    lengths = np.array(lengths, np.int64)
    for epoch in (1, 2):
        run = epoch_slices(plan, lengths, epoch)
        assert_reads_whole_sequences(run, lengths, np.flatnonzero(lengths), batch, T)
        assert not run.target_from.any()


def test_types_of_a_run():
    run = epoch_slices(Plan(batch=2, window=4), np.array([5, 3]), 1)
    types = [field.dtype.name for field in run]
    assert types == ["int32", "int64", "int32", "bool", "int64", "uint64"]
    assert all(field.flags.c_contiguous for field in run)
    assert [field.shape for field in run] == [(2, 2)] * 5 + [(2,)]


@pytest.mark.parametrize("order", ["random", "length"])
def test_the_order_changes_with_epoch_and_seed_and_repeats_for_the_same(order):
    lengths = np.arange(40, dtype=np.int64) % 9 + 1

    def draw(seed, epoch):
        return epoch_slices(Plan(batch=2, window=4, order=order, seed=seed), lengths, epoch)

    runs = [draw(seed, epoch) for seed in (0, 1, 2) for epoch in (1, 2, 3)]
    for i, one in enumerate(runs):
        for other in runs[:i]:
            assert groups(one) != groups(other)
            assert not np.intersect1d(one.key, other.key).size
    assert same(draw(1, 2), draw(1, 2))


def test_random_order_mixes_lengths():
    lengths = np.repeat([2, 9], 50)
    run = epoch_slices(Plan(batch=2, window=4, order="random"), lengths, 1)
    mixed = sum(len(set(lengths[group])) == 2 for group in groups(run))
    assert 10 < mixed < 40  # 25 of 50 pairs are expected


def test_random_order_puts_every_user_first_as_often():
    plan = Plan(batch=1, window=4, order="random")
    first = [
        groups(epoch_slices(plan, np.array([3, 3, 3]), epoch))[0][0] for epoch in range(1, 301)
    ]
    assert np.all(np.abs(np.bincount(first) - 100) < 5 * np.sqrt(300 * 2 / 9))


def test_length_order_groups_users_of_like_length_and_shuffles_the_groups():
    lengths = np.array([7, 0, 3, 7, 1, 9, 3, 2])
    expected = [[4, 7, 2], [6, 0, 3], [5]]  # sorted by length, equal lengths by number
    seen = set()
    for epoch in range(1, 40):
        run = epoch_slices(Plan(batch=3, window=16, order="length"), lengths, epoch)
        drawn = groups(run)
        assert sorted(drawn) == sorted(expected)
        seen.add(tuple(expected.index(group) for group in drawn))
    assert len(seen) == 6


@pytest.mark.parametrize("lengths", [[5, 3], [40] * 100])
def test_the_loss_scale_is_constant(lengths):
    assert Plan(batch=20, window=64, loss_scale="mean").scale == 1 / 1280
    assert Plan(batch=20, window=64, loss_scale="sum").scale == 1.0


def test_parts_of_a_run():
    run = epoch_slices(Plan(batch=2, window=4), np.array([9, 3, 5]), 1)
    piece, part = run.one(1), run.part(1, 3)
    for whole, one, two in zip(run, piece, part, strict=True):
        np.testing.assert_array_equal(one, whole[1])
        np.testing.assert_array_equal(two, whole[1:3])


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_replay_reads_the_users_with_something_to_predict(batch):
    lengths = np.array([9, 5, 0, 13, 1, 4])
    target_from = np.array([7, 5, 0, 1, 0, 2])
    run = replay_slices(lengths, target_from, batch=batch, window=4)
    assert_reads_whole_sequences(run, lengths, [0, 3, 4, 5], batch, 4)
    for k in range(len(run.key)):
        for b in np.flatnonzero(run.length[k]):
            assert run.target_from[k, b] == target_from[run.user[k, b]]
    order = [user for group in groups(run) for user in group]
    assert order == [4, 5, 0, 3]


def test_replay_targets_are_the_events_from_the_given_position_on():
    sequences = [[0, 1, 2, 3, 4, 5, 6], [7], [8, 9], [3, 4, 5, 6]]
    target_from = np.array([5, 0, 2, 1])
    log = from_sequences(sequences)
    run = replay_slices(log.lengths, target_from, batch=2, window=3)
    found = []
    for k in range(len(run.key)):
        w = window(log, run.one(k), "float32")
        for t, b in zip(*np.nonzero(w.target), strict=True):
            found.append((int(w.user[b]), int(run.start[k, b]) + int(t) + 1, int(w.y[t, b])))
    assert sorted(found) == [(0, 5, 5), (0, 6, 6), (3, 1, 4), (3, 2, 5), (3, 3, 6)]


def slice_of(user, start, length, fresh, target_from):
    types = (np.int32, np.int64, np.int32, bool, np.int64)
    columns = (user, start, length, fresh, target_from)
    arrays = [np.array(column, dtype) for column, dtype in zip(columns, types, strict=True)]
    return Slice(*arrays, np.uint64(9))


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_a_window_by_hand(name):
    """A whole sequence, one that goes on, one of 1 event, a later part, and padding."""
    log = from_sequences([[5], [1, 2, 3, 4], [7, 8, 9, 6, 5]])
    piece = slice_of([1, 2, 0, 0], [0, 2, 0, 3], [4, 2, 1, 0], [1, 0, 1, 0], [0, 4, 0, 0])
    w = backends.get(name).window(log, piece, "float32")
    assert w.user.tolist() == [1, 2, 0, 0]
    assert w.x.tolist() == [[1, 9, 5, 0], [2, 6, 0, 0], [3, 0, 0, 0], [4, 0, 0, 0]]
    assert w.y.tolist() == [[2, 6, 0, 0], [3, 5, 0, 0], [4, 0, 0, 0], [0, 0, 0, 0]]
    assert w.event.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert w.target.tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert w.carry.tolist() == [[0, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert w.at.tolist() == [[1, 7, 0, 0], [2, 8, 0, 0], [3, 0, 0, 0], [4, 0, 0, 0]]
    assert [field.dtype.name for field in w] == ["int32"] * 3 + ["float32"] * 3 + ["int64"]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("batch", "T"), [(1, 1), (3, 4), (9, 7)])
def test_windows_of_an_epoch(batch, T, dtype):
    rng = np.random.default_rng(batch)
    lengths = [1, 4, 0, 8, 7, 2, 29, 1, 13]
    sequences = [rng.integers(0, 50, n).tolist() for n in lengths]
    log = from_sequences(sequences, n_items=50)
    run = epoch_slices(Plan(batch=batch, window=T), log.lengths, 1)
    for k in range(len(run.key)):
        piece = run.one(k)
        w = window(log, piece, dtype)
        assert w.x.shape == (piece.length.max(), batch)
        assert w.event.dtype == w.target.dtype == w.carry.dtype == dtype
        for b in range(batch):
            sequence = sequences[piece.user[b]]
            for t in range(len(w.x)):
                i = piece.start[b] + t
                event = t < piece.length[b]
                target = event and i < len(sequence) - 1
                assert (w.event[t, b], w.target[t, b]) == (event, target)
                assert w.x[t, b] == (sequence[i] if event else 0)
                assert w.y[t, b] == (sequence[i + 1] if target else 0)
                if event:
                    assert w.carry[t, b] == (i > 0)


def splitmix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % WORD
    return z ^ (z >> 31)


def test_mix_is_splitmix64():
    """The first numbers of the generator with seed 1234567, as its authors' test has them."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    states = [(1234567 + k * 0x9E3779B97F4A7C15) % WORD for k in range(1, 6)]
    assert mix(np.array(states, np.uint64)).tolist() == expected


@pytest.mark.parametrize("p", [0.2, 0.75])
@pytest.mark.parametrize("stream", [INPUT, OUTPUT])
def test_dropout_keep_is_a_hash_of_key_step_column_and_unit(p, stream):
    key, (T, B, width) = 2**64 - 2, (3, 2, 5)
    keep = dropout_keep(np.uint64(key), stream, T, B, width, p, "float64")
    start = splitmix((key + int(stream)) % WORD)
    for t in range(T):
        for b in range(B):
            for j in range(width):
                count = (t * B + b) * width + j + 1
                bits = splitmix((start + count * 0x9E3779B97F4A7C15) % WORD) >> 40
                assert keep[t, b, j] == (0 if bits < round(p * 2**24) else 1 / (1 - p))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dropout_keep_of_a_shorter_window_is_its_beginning(dtype):
    long = dropout_keep(np.uint64(5), INPUT, 7, 3, 6, 0.4, dtype)
    short = dropout_keep(np.uint64(5), INPUT, 2, 3, 6, 0.4, dtype)
    np.testing.assert_array_equal(short, long[:2])
    assert long.dtype == dtype


def test_nothing_is_dropped_at_a_rate_of_zero():
    assert (dropout_keep(np.uint64(5), OUTPUT, 7, 3, 6, 0.0, "float32") == 1).all()


def test_keys_repeat_and_count_from_the_start_of_the_epoch():
    keys = window_keys(3, 2, 5)
    assert keys.dtype == np.uint64
    np.testing.assert_array_equal(keys[:3], window_keys(3, 2, 3))
    assert window_keys(2**62, 1, 2).size == 2
