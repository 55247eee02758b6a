"""Reading, filtering, splitting and storing logs."""

import gzip
import io
import json
import logging
import math
import os
import random
import shutil
import tarfile
from collections import Counter
from pathlib import Path

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


# formats

BRIGHTKITE = """\
7\t2009-01-02T00:00:05Z\t1.0\t2.0\tlast
7\t2009-01-02T00:00:01Z\t1.0\t2.0\tsecond
7\t2009-01-02T00:00:01Z\t1.0\t2.0\tfirst
3\t2009-01-01T00:00:00Z\t0.0\t0.0\t00000000000000000000000000000000
3\t2008-12-31T23:59:59Z\t0.0\t0.0\tfirst
"""


@pytest.mark.parametrize("pack", [False, True])
def test_brightkite(tmp_path, pack):
    source = write(tmp_path / "log", "\ufeff" + BRIGHTKITE, pack)
    log = data.read_events(source, "brightkite")
    assert sequences(log) == {"7": ["first", "second", "last"], "3": ["first", "0" * 32]}
    assert log.user_ids.tolist() == ["7", "3"]
    assert log.item_ids.tolist() == ["last", "second", "first", "0" * 32]
    assert log.times.tolist() == [1230854401, 1230854401, 1230854405, 1230767999, 1230768000]
    assert log.items.dtype == np.int32
    assert log.times.dtype == np.int64
    found = data.read_counted(source, "brightkite", drop_null_place=True)
    assert sequences(found.log)["3"] == ["first"]
    assert "0" * 32 not in found.log.item_ids
    assert (found.n_lines, found.n_malformed) == (5, 0)


LASTFM = """\
u1\t2009-05-04T23:08:57Z\tid-a\tA "live\tt-1\tOne
u1\t2009-05-04T23:08:56Z\t\tB"\t\tTwo
u1\t2009-05-04T23:08:55Z\t\tid-a\t\tOne
u1\t2009-05-04T23:08:54Z\t\tB"\tt-3\tTwo
u1\t2009-05-04T23:08:53Z\t\tB\t\tTwo
"""


def archive(path, members):
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("form", ["plain", "gzip", "archive"])
def test_lastfm(tmp_path, form):
    if form == "archive":
        members = {"x/README.txt": b"hello", "x/userid-profile.tsv": b"u1\t\n"}
        source = archive(tmp_path / "log.tar.gz", members | {MEMBER: LASTFM.encode()})
    else:
        source = write(tmp_path / "log", LASTFM, form == "gzip")
    log = data.read_events(source, "lastfm")
    assert sequences(log) == {"u1": ["name:B", 'name:B"', "name:id-a", 'name:B"', "id-a"]}
    tracks = data.read_events(source, "lastfm", item="track")
    assert sequences(tracks)["u1"] == [
        "name:B\tTwo",
        "t-3",
        "name:id-a\tOne",
        'name:B"\tTwo',
        "t-1",
    ]
    paper = data.read_events(source, "lastfm", paper_items=True)
    assert sequences(paper)["u1"] == ["", "", "", "", "id-a"]


def test_archive_without_the_log(tmp_path):
    source = archive(tmp_path / "log.tar.gz", {"x/README.txt": b"hello"})
    with pytest.raises(DataError, match="README"):
        data.read_events(source, "lastfm")
    with pytest.raises(DataError, match="is a tar archive: unpack"):
        data.read_events(source)


TABLE = [("b", "x", 5), ("a", "y", 3), ("b", "z", 3), ("a", "x", 3), ("b", "y", 3)]
IN_TIME = {"b": ["z", "y", "x"], "a": ["y", "x"]}


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_table(tmp_path, separator, newline):
    lines = [("rating", "item", "user", "time")]
    lines += [("1", item, user, f"{when}") for user, item, when in TABLE]
    text = newline.join(separator.join(line) for line in lines)
    source = write(tmp_path / "log", "\ufeff" + text + newline)
    assert sequences(data.read_events(source)) == IN_TIME
    assert sequences(data.read_events(source, separator=separator)) == IN_TIME


def test_table_without_times_keeps_its_order(tmp_path):
    source = write(tmp_path / "log.csv", "user,item\n" + "".join(f"{u},{i}\n" for u, i, _ in TABLE))
    log = data.read_events(source)
    assert log.times is None
    assert sequences(log) == {"b": ["x", "z", "y"], "a": ["y", "x"]}


def test_table_with_named_columns(tmp_path):
    source = write(tmp_path / "log", "who,what,when,time\na,x,9,1\na,y,3,2\n")
    names = {"user_column": "who", "item_column": "what"}
    assert sequences(data.read_events(source, **names))["a"] == ["x", "y"]
    assert sequences(data.read_events(source, time_column="when", **names))["a"] == ["y", "x"]
    with pytest.raises(DataError, match="no column 'at'"):
        data.read_events(source, time_column="at", **names)


def test_quotes(tmp_path):
    source = write(tmp_path / "q.csv", 'user,note,item\na,"x, ""y""\nz","i, 1"\nb,,"i, 1"\n')
    assert sequences(data.read_events(source)) == {"a": ["i, 1"], "b": ["i, 1"]}
    source = write(tmp_path / "q.tsv", 'user\titem\na\t"x\nb\ty"\n')
    assert sequences(data.read_events(source)) == {"a": ['"x'], "b": ['y"']}


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("2009-05-04T23:08:57Z", 1241478537),
        ("2009-05-04 23:08:57", 1241478537),
        ("2009-05-04T23:08:57.25+02:00", 1241471337),
        ("2009-05-04", 1241395200),
        ("1241478537", 1241478537),
        ("1241478537.75", 1241478537),
        ("-1.5", -2),
        ("1969-12-31T23:59:58.5Z", -2),
    ],
)
def test_times(tmp_path, written, seconds):
    source = write(tmp_path / "log", f"user,item,time\na,x,{written}\n")
    assert data.read_events(source).times.tolist() == [seconds]


def test_times_of_several_kinds_in_one_file(tmp_path):
    written = ["2009-05-04T23:08:57Z", "12", "2009-05-04", "1.5", "2009-05-04 23:08Z"]
    text = "".join(f"a,{number},{when}\n" for number, when in enumerate(written))
    log = data.read_events(write(tmp_path / "log", "user,item,time\n" + text))
    assert log.times.tolist() == [1, 12, 1241395200, 1241478480, 1241478537]


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "times",
    [
        pa.array([5, 3, 3, 3, 3]),
        pa.array([5.5, 3.0, 3.2, 3.0, 3.9]),
        pa.array([5000, 3000, 3001, 3000, 3999], pa.timestamp("ms")),
        pa.array([f"1970-01-01T00:00:0{when}Z" for when in (5, 3, 3, 3, 3)]),
    ],
)
def test_parquet_table(tmp_path, times):
    users, items, _ = zip(*TABLE, strict=True)
    items = pa.array(items).dictionary_encode()
    source = parquet(tmp_path / "log.parquet", user=list(users), item=items, time=times)
    log = data.read_events(source)
    assert sequences(log) == IN_TIME
    assert sorted(log.times) == [3, 3, 3, 3, 5]


def test_parquet_table_of_numbers_with_nulls(tmp_path):
    source = parquet(tmp_path / "log.parquet", user=[7, None, 7, 8], item=[1, 2, None, 3])
    found = data.read_counted(source, max_malformed=0.5)
    assert sequences(found.log) == {"7": ["1"], "8": ["3"]}
    assert found.malformed == [(2, "no readable user"), (3, "no readable item")]


def test_parquet_refuses(tmp_path):
    with pytest.raises(DataError, match="one value"):
        data.read_events(parquet(tmp_path / "log", user=["a"], item=[["x"]]))
    with pytest.raises(DataError, match="'item' among 'user', 'items'; the nearest is 'items'"):
        data.read_events(parquet(tmp_path / "log", user=["a"], items=["x"]))
    write(tmp_path / "log", (tmp_path / "log").read_bytes()[:100])
    with pytest.raises(DataError, match="can't be read"):
        data.read_events(tmp_path / "log")


def test_progress(tmp_path):
    calls = []
    source = write(tmp_path / "log", BRIGHTKITE)
    data.read_events(source, "brightkite", progress=lambda *call: calls.append(call))
    assert calls[-1] == (len(BRIGHTKITE), len(BRIGHTKITE))


@pytest.mark.parametrize(
    "options",
    [
        {"like": "gowalla"},
        {"like": "lastfm", "item": "album"},
        {"item": "track"},
        {"paper_items": True},
        {"like": "lastfm", "item": "track", "paper_items": True},
        {"drop_null_place": True},
        {"separator": ", "},
        {"separator": '"'},
        {"max_malformed": 2},
    ],
)
def test_options_that_do_not_fit(tmp_path, options):
    with pytest.raises(SettingsError):
        data.read_events(write(tmp_path / "log", "user,item\na,x\n"), **options)


# malformed lines


@pytest.mark.parametrize("block", [64, 1 << 20])
def test_malformed_lines_are_counted_with_their_numbers(tmp_path, monkeypatch, caplog, block):
    monkeypatch.setattr(data, "BLOCK", block)
    lines = [f"u\t{1000 + number}\ti{number}".encode() for number in range(100)]
    lines[9] = b"u\t1\ti\tmore"
    lines[10] = b"\t1\tlost"
    lines[40] = b""
    lines[41] = b"u\t1"
    lines[42] = b"u\t1\t"
    lines[70] = b"u\t2009-02-30T00:00:00Z\ti"
    lines[80] = b"u\t1\t\xff"
    source = write(tmp_path / "log", b"user\ttime\titem\n" + b"\n".join(lines) + b"\n\n\n")
    with caplog.at_level(logging.WARNING):
        found = data.read_counted(source, max_malformed=0.07)
    assert (found.n_lines, found.n_malformed) == (100, 7)
    assert found.malformed == [
        (11, "4 columns, not 3"),
        (12, "no readable user"),
        (42, "no readable user, item, time"),
        (43, "2 columns, not 3"),
        (44, "no readable item"),
    ]
    assert found.log.n_events == 93
    assert "lost" not in found.log.item_ids
    assert "7 of 100 lines are malformed (line 11: 4 columns" in caplog.text
    with pytest.raises(DataError, match="line 11: 4 columns.*--max-malformed 0.06"):
        data.read_events(source, max_malformed=0.06)


def test_late_malformed_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 4096)
    lines = [f"u{number % 50}\t2009-05-04T00:00:00Z\t0\t0\ti" for number in range(5000)]
    lines[3000] = "u\tnever\t0\t0\ti"
    lines[4000] = "u"
    lines[4999] = "u\t2009-05-04T00:00:00Z\t0\t0\t"
    found = data.read_counted(write(tmp_path / "log", "\n".join(lines)), "brightkite")
    assert [line for line, _ in found.malformed] == [3001, 4001, 5000]
    assert (found.n_lines, found.n_malformed, found.log.n_events) == (5000, 3, 4997)


def test_bytes_that_are_not_utf8(tmp_path):
    good = "é\tñ 東京\tÿ\n".encode() * 200
    text = b"user\titem\tnote\n" + good + b"\xff\n" + b"u\t\xff\tx\n" + b"v\ti\t\xff\n"
    found = data.read_counted(write(tmp_path / "log", text))
    assert found.malformed == [(202, "1 columns, not 3"), (203, "no readable item")]
    assert sequences(found.log) == {"é": ["ñ 東京"] * 200, "v": ["i"]}


def test_ids_of_malformed_lines_get_no_number(tmp_path):
    text = "user,item,time\nghost,x,never\na,y,1\na,x,2\n"
    log = data.read_events(write(tmp_path / "log", text), max_malformed=0.5)
    assert log.user_ids.tolist() == ["a"]
    assert log.item_ids.tolist() == ["y", "x"]


def utf8(field):
    try:
        return field.decode() or None
    except UnicodeDecodeError:
        return None


@pytest.mark.parametrize("seed", range(40))
def test_against_reading_line_by_line(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    monkeypatch.setattr(data, "BLOCK", draw.choice([200, 300, 1000]))
    lines, events, malformed = [], [], []
    for number in range(1, 120):
        user, second = b"u%d" % draw.randrange(5), draw.randrange(60)
        ids = draw.choice([b"a0", b"a1", b""]), draw.choice(["né", 'b"', ""]).encode()
        line = [user, b"2009-01-01T00:00:%02dZ" % second, *ids, b"t", b"n"]
        fault = draw.randrange(40)
        if fault == 0:
            line[draw.randrange(4)] = draw.choice([b"", b"\xe9", b"2009-13-01T00:00:00Z"])
        if fault == 1:
            line = draw.choice([line[:5], [*line, b"\xff"], [b""], [b"\xff\xfe"]])
        lines.append(b"\t".join(line))
        user, when, *ids = [utf8(field) for field in line[:4]] if len(line) == 6 else [None] * 4
        # an id that is there counts, readable or not
        item = (ids[0] if line[2] else ids[1] and f"name:{ids[1]}") if len(line) == 6 else None
        if user and item and when == f"2009-01-01T00:00:{second:02}Z":
            events.append((user, second, item))
        else:
            malformed.append(number)
    lines.append(b"u0\t2009-01-01T00:00:00Z\tlast\t\t\t")
    events.append(("u0", 0, "last"))
    newline = draw.choice([b"\n", b"\r\n"])
    source = write(tmp_path / "log", newline.join(lines) + draw.choice([b"", newline, newline * 3]))
    log, n_lines, n_malformed, examples = data.read_counted(source, "lastfm", max_malformed=1)
    assert (n_lines, n_malformed) == (120, len(malformed))
    assert [line for line, _ in examples] == malformed[:5]
    wanted = {user: [] for user, _, _ in events}
    for user, _, item in sorted(reversed(events), key=lambda event: event[1]):
        wanted[user].append(item)
    assert sequences(log) == wanted
    assert log.user_ids.tolist() == list(wanted)
    assert log.item_ids.tolist() == list(dict.fromkeys(item for _, _, item in events))


def test_malformed_share_is_of_all_lines(tmp_path):
    good = "u\t2009-05-04T00:00:00Z\t0\t0\ti\n" * 99
    source = write(tmp_path / "log", good + "u\n")
    assert data.read_counted(source, "brightkite").n_malformed == 1
    with pytest.raises(DataError, match="2 of 101"):
        data.read_events(write(tmp_path / "log", good + "u\nu\n"), "brightkite")
    with pytest.raises(DataError, match="1 of 100"):
        data.read_events(write(tmp_path / "log", good + "u\n"), "brightkite", max_malformed=0)


# files that are no log; test_cli.py puts the same through the command


def test_wrong_separator_ends_early(tmp_path):
    source = write(tmp_path / "log", BRIGHTKITE.replace("\t", ",") * 50000)
    with pytest.raises(DataError, match="none of the first 1000 lines.*line 1: 1 columns, not 5"):
        data.read_events(source, "brightkite")


def test_long_line(tmp_path):
    source = write(tmp_path / "log", b"user,item\n" + b"x" * (3 * data.BLOCK))
    with pytest.raises(DataError, match="longer than"):
        data.read_events(source)
    with pytest.raises(DataError, match="no line ends"):
        data.read_events(write(tmp_path / "log", b"x" * (1 << 17)))


def test_damaged_gzip(tmp_path):
    rng = np.random.default_rng(0)
    text = "".join(
        f"{user}\t2009-05-04T00:00:00Z\t0\t0\t{item}\n"
        for user, item in rng.integers(0, 10**9, (50000, 2))
    )
    packed = gzip.compress(text.encode())
    flipped = bytearray(packed)
    flipped[-6] ^= 1
    for damaged in (packed[: len(packed) // 2], packed[:-4], bytes(flipped), packed[:5]):
        with pytest.raises(DataError, match="truncated or damaged"):
            data.read_events(write(tmp_path / "log.gz", damaged), "brightkite")
    whole = archive(tmp_path / "whole", {MEMBER: text.encode()}).read_bytes()
    with pytest.raises(DataError, match="truncated or damaged"):
        data.read_events(write(tmp_path / "log.tar.gz", whole[: len(whole) // 2]), "lastfm")


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
    parquet(directory / "train.parquet", user=[1], item=["x"])
    with pytest.raises(DataError, match="expected"):
        data.load(directory)
    stats = json.loads((directory / "stats.json").read_text())
    write(directory / "stats.json", json.dumps(stats | {"format": 0}))
    with pytest.raises(DataError, match="format"):
        data.load(directory)


# real logs


@pytest.mark.skipif(not REAL, reason="CRNN_DATA names no folder with the real logs")
@pytest.mark.parametrize(
    ("source", "like", "options", "entropy", "longest", "filtered", "prepared", "error"),
    [
        (
            "brightkite-part/checkins.tsv.gz",
            "table",
            {},
            2.5,
            None,
            (508, 7377, 193596),
            (508, 7320, 188413, 4920),
            8.8984,
        ),
        (
            "brightkite-tokyo/loc-brightkite_totalCheckins.txt.gz",
            "brightkite",
            {},
            2.5,
            None,
            (182, 1797, 47918),
            (182, 1789, 46573, 1315),
            7.4894,
        ),
        (
            "lastfm-tracks/userid-timestamp-artid-artname-traid-traname.tsv.gz",
            "lastfm",
            {"item": "track"},
            3.0,
            5120,
            (943, 59245, 3039284),
            (943, 59245, 2775660, 76057),
            10.9894,
        ),
    ],
)
def test_real_logs(source, like, options, entropy, longest, filtered, prepared, error):
    log = data.read_events(Path(REAL) / source, like, **options)
    log = data.filter_events(log, min_user_entropy=entropy)
    assert (log.n_users, log.n_items, log.n_events) == filtered
    train, heldout = data.split(log, max_train_events=longest)
    assert (train.n_users, train.n_items, train.n_events, heldout.n_events) == prepared
    assert round(math.log(train.n_items), 4) == error
