"""Filtering, splitting and storing logs."""

import gzip
import json
import math
import os
import shutil
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crnn_np import data
from crnn_np.errors import DataError, SettingsError

REAL = os.environ.get("CRNN_DATA")
MEMBER = "lastfm-dataset-1K/userid-timestamp-artid-artname-traid-traname.tsv"


def sequences(log):
    """The log as {user id: [item id, ...]}."""
    return {
        user: list(log.item_ids[log.items[start:stop]])
        for user, start, stop in zip(log.user_ids, log.indptr, log.indptr[1:], strict=False)
    }


def same(first, second):
    return all(
        (a is None and b is None) or (a.dtype == b.dtype and np.array_equal(a, b))
        for a, b in zip(first, second, strict=True)
    )


def random_log(seed, n_users=30, n_items=40, longest=120):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, longest, n_users)
    variety = rng.integers(1, n_items, n_users)
    return data.from_sequences(
        [rng.integers(0, n, length) for n, length in zip(variety, lengths, strict=True)], n_items
    )


def write(path, text, pack=False):
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content) if pack else content)
    return path


# logs


def test_from_sequences():
    log = data.from_sequences([[2, 0], [], np.array([1, 1], np.uint8)])
    assert (log.n_users, log.n_items, log.n_events) == (3, 3, 4)
    assert log.lengths.tolist() == [2, 0, 2]
    assert log.items.dtype == np.int32
    assert log.indptr.dtype == np.int64
    assert log.times is None
    assert log.user_ids.tolist() == ["0", "1", "2"]
    assert data.from_sequences([], 4).n_items == 4


@pytest.mark.parametrize("wrong", [[[0.5]], [[-1]], [[[0]]], [[5]]])
def test_from_sequences_refuses(wrong):
    with pytest.raises(DataError, match="expected"):
        data.from_sequences(wrong, 5)


def test_ids_are_no_item_numbers():
    with pytest.raises(DataError, match="up to 1099511627776: they are numbers from 0 on"):
        data.from_sequences([[1 << 40]])


@pytest.mark.parametrize("seed", range(3))
def test_concatenate_undoes_cut_tail(seed):
    log = random_log(seed)
    log = log._replace(times=np.arange(log.n_events) ** 2)
    lengths = np.random.default_rng(seed).integers(0, log.lengths + 1)
    parts = data.cut_tail(log, lengths)
    assert np.array_equal(parts.heldout.lengths, lengths)
    assert same(data.concatenate(*parts), log)
    for user in range(log.n_users):
        tail = log.items[log.indptr[user + 1] - lengths[user] : log.indptr[user + 1]]
        start, stop = parts.heldout.indptr[user : user + 2]
        assert np.array_equal(parts.heldout.items[start:stop], tail)


def test_cut_tail_and_concatenate_refuse():
    log = data.from_sequences([[0, 1], [1]])
    for lengths in ([1], [-1, 0], [0, 2]):
        with pytest.raises(SettingsError, match="lengths"):
            data.cut_tail(log, lengths)
    with pytest.raises(DataError, match="belong together"):
        data.concatenate(log, data.from_sequences([[0]], 2))


# filter and split, against the same rules written with dictionaries


def filtered_slowly(users, min_item_events, min_user_events, min_user_entropy):
    counts = Counter(item for events in users.values() for item in events)
    kept = {}
    for user, events in users.items():
        events = [item for item in events if counts[item] >= min_item_events]
        shares = [count / len(events) for count in Counter(events).values()]
        entropy = -sum(share * math.log(share) for share in shares)
        if len(events) >= min_user_events and entropy > min_user_entropy:
            kept[user] = events
    return kept


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("settings", [(10, 11, 2.5), (30, 40, 2.0), (1, 1, -1.0), (0, 5, 0.0)])
def test_filter(seed, settings):
    log = random_log(seed)
    wanted = filtered_slowly(sequences(log), *settings)
    found = data.filter_events(log, *settings)
    assert sequences(found) == {user: events for user, events in wanted.items() if events}
    assert np.bincount(found.items, minlength=found.n_items).min() > 0
    assert [int(item) for item in found.item_ids] == sorted(int(item) for item in found.item_ids)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("fraction", "low", "high", "longest"), [(0.025, 3, 500, None), (0.3, 2, 9, 20)]
)
def test_split(seed, fraction, low, high, longest):
    log = random_log(seed)
    users = sequences(log)
    train, heldout = {}, {}
    for user, events in users.items():
        n = min(max(round(fraction * len(events)), low), high, max(len(events) - 1, 0))
        train[user], heldout[user] = events[: len(events) - n], events[len(events) - n :]
    known = {item for events in train.values() for item in events}
    parts = data.split(log, fraction, (low, high), longest)
    assert sequences(parts.heldout) == {
        user: [item for item in events if item in known] for user, events in heldout.items()
    }
    assert sequences(parts.train) == {
        user: events[-longest:] if longest else events for user, events in train.items()
    }
    assert set(parts.train.item_ids) == known
    assert parts.train.item_ids is parts.heldout.item_ids or same(
        [parts.train.item_ids], [parts.heldout.item_ids]
    )


def test_heldout_length_rounds_halves_to_even():
    log = data.from_sequences([[0] * 180, [0] * 220, [0] * 40, [0] * 2, []], 1)
    assert data.split(log).heldout.lengths.tolist() == [4, 6, 3, 1, 0]


def test_user_without_heldout_events_stays():
    log = data.from_sequences([[0, 1, 0, 1, 2, 2, 2], [0, 1, 0, 1, 0, 1]], 3)
    parts = data.split(log)
    assert parts.heldout.lengths.tolist() == [0, 3]
    assert parts.train.n_users == parts.heldout.n_users == 2
    assert parts.train.n_items == 2


@pytest.mark.parametrize(
    ("settings", "cause"),
    [((99, 1, -1), "min_item_events"), ((1, 99, -1), "min_user_events"), ((1, 1, 9), "entropy")],
)
def test_filter_names_what_emptied_the_log(settings, cause):
    with pytest.raises(DataError, match=cause):
        data.filter_events(data.from_sequences([[0, 1, 2], [2, 1]]), *settings)
    with pytest.raises(DataError, match="no events"):
        data.filter_events(data.from_sequences([[]], 3))


@pytest.mark.parametrize(
    "settings", [{"heldout_fraction": 2}, {"heldout_range": (5, 3)}, {"max_train_events": 0}]
)
def test_split_refuses(settings):
    with pytest.raises(SettingsError, match="expected"):
        data.split(random_log(0), **settings)


# the prepared form


@pytest.fixture
def parts():
    log = random_log(1)
    return data.split(log._replace(times=np.arange(log.n_events, dtype=np.int64) * 10**9))


@pytest.mark.parametrize("with_times", [True, False])
def test_load_returns_what_was_saved(tmp_path, parts, with_times):
    if not with_times:
        parts = data.Split(*(part._replace(times=None) for part in parts))
    stats = data.save(parts, tmp_path / "x=1" / "b", {"like": "lastfm", "lines_read": 7})
    loaded = data.load(tmp_path / "x=1" / "b")
    assert all(same(first, second) for first, second in zip(parts, loaded, strict=True))
    for part in loaded:
        assert all(array is None or array.flags.writeable for array in part[:3])
    assert data.load_stats(tmp_path / "x=1" / "b") == stats
    assert stats["like"] == "lastfm"
    assert stats["lines_read"] == 7
    assert stats["uniform_nll"] == math.log(parts.train.n_items)
    assert sorted(path.name for path in (tmp_path / "x=1").iterdir()) == ["b"]


def test_save_replaces_only_a_data_set_and_only_on_demand(tmp_path, parts):
    data.save(parts, tmp_path / "set", {})
    with pytest.raises(DataError, match="--force"):
        data.save(parts, tmp_path / "set", {})
    write(tmp_path / "set" / "my.model", "x")
    with pytest.raises(DataError, match="other files too, my.model: move"):
        data.save(parts, tmp_path / "set", {}, replace=True)
    (tmp_path / "set" / "my.model").unlink()
    data.save(parts, tmp_path / "set", {"like": "brightkite"}, replace=True)
    assert data.load_stats(tmp_path / "set")["like"] == "brightkite"
    (tmp_path / "other").mkdir()
    write(tmp_path / "file", "x")
    for taken in ("other", "file"):
        with pytest.raises(DataError, match="no prepared data set"):
            data.save(parts, tmp_path / taken, {}, replace=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other", "set"]


def test_save_leaves_nothing_half_written(tmp_path, parts, monkeypatch):
    data.save(parts, tmp_path / "set", {})
    before = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", fail)
    for name in ("set", "new"):
        with pytest.raises(DataError, match="No space left"):
            data.save(parts, tmp_path / name, {}, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == before


def test_an_interrupted_save_leaves_the_old_data_set(tmp_path, parts, monkeypatch):
    data.save(parts, tmp_path / "set", {"like": "brightkite"})
    rename, calls = data.os.rename, []

    def interrupt(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(*arguments)

    monkeypatch.setattr(data.os, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.save(parts, tmp_path / "set", {}, replace=True)
    assert data.load_stats(tmp_path / "set")["like"] == "brightkite"
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_data_set_is_sound_where_a_logarithm_ends_in_another_digit(tmp_path, parts):
    file = tmp_path / "set" / "stats.json"
    data.save(parts, tmp_path / "set", {})
    stats = json.loads(file.read_text())
    write(file, json.dumps(stats | {"uniform_nll": stats["uniform_nll"] * (1 + 2e-16)}))
    data.load(tmp_path / "set")


@pytest.mark.parametrize("name", data.FILES)
def test_load_finds_damage(tmp_path, parts, name):
    directory = tmp_path / "set"
    data.save(parts, directory, {})
    whole = (directory / name).read_bytes()
    write(directory / name, whole[: len(whole) // 2])
    with pytest.raises(DataError, match=f"{name} is damaged"):
        data.load(directory)
    (directory / name).unlink()
    with pytest.raises(DataError, match=f"{name} missing"):
        data.load(directory)
    with pytest.raises(DataError, match="no such directory"):
        data.load(tmp_path / "nowhere")


def test_load_finds_files_that_do_not_belong_together(tmp_path, parts):
    directory = tmp_path / "set"
    data.save(parts, directory, {})
    shutil.copytree(directory, tmp_path / "copy")
    other = data.split(random_log(2, n_users=5, n_items=5))
    data.save(other, tmp_path / "other", {})
    for name in data.FILES:
        shutil.copy(tmp_path / "other" / name, directory / name)
        with pytest.raises(DataError, match="prepare"):
            data.load(directory)
        shutil.copy(tmp_path / "copy" / name, directory / name)
    data.load(directory)
    pq.write_table(pa.table({"user": [1], "item": ["x"]}), directory / "train.parquet")
    with pytest.raises(DataError, match="expected"):
        data.load(directory)
    stats = json.loads((directory / "stats.json").read_text())
    write(directory / "stats.json", json.dumps(stats | {"format": 0}))
    with pytest.raises(DataError, match="format"):
        data.load(directory)


def test_a_checksum_is_of_the_sequences():
    log = data.from_sequences([[0, 1, 2], [2, 1]], 4)
    same = log._replace(user_ids=log.user_ids[::-1], times=np.arange(5))
    assert data.checksum(log) == data.checksum(same) == data.checksum(log, None)
    others = [
        data.from_sequences([[0, 1], [2, 2, 1]], 4),
        data.from_sequences([[0, 1, 2], [2, 0]], 4),
    ]
    assert len({data.checksum(log), *map(data.checksum, others), data.checksum(log, log)}) == 4
