"""Raw files of every kind to a log."""

import gzip
import io
import logging
import math
import os
import random
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from crnn_np import data, reading
from crnn_np.errors import DataError, SettingsError

REAL = os.environ.get("CRNN_DATA")
MEMBER = "lastfm-dataset-1K/userid-timestamp-artid-artname-traid-traname.tsv"


def sequences(log):
    """The log as {user id: [item id, ...]}."""
    return {
        user: list(log.item_ids[log.items[start:stop]])
        for user, start, stop in zip(log.user_ids, log.indptr, log.indptr[1:], strict=False)
    }


def write(path, text, pack=False):
    content = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(content) if pack else content)
    return path


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
    log = reading.read_events(source, "brightkite")
    assert sequences(log) == {"7": ["first", "second", "last"], "3": ["first", "0" * 32]}
    assert log.user_ids.tolist() == ["7", "3"]
    assert log.item_ids.tolist() == ["last", "second", "first", "0" * 32]
    assert log.times.tolist() == [1230854401, 1230854401, 1230854405, 1230767999, 1230768000]
    assert log.items.dtype == np.int32
    assert log.times.dtype == np.int64
    found = reading.read_counted(source, "brightkite", drop_null_place=True)
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
    log = reading.read_events(source, "lastfm")
    assert sequences(log) == {"u1": ["name:B", 'name:B"', "name:id-a", 'name:B"', "id-a"]}
    tracks = reading.read_events(source, "lastfm", item="track")
    assert sequences(tracks)["u1"] == [
        "name:B\tTwo",
        "t-3",
        "name:id-a\tOne",
        'name:B"\tTwo',
        "t-1",
    ]
    paper = reading.read_events(source, "lastfm", paper_items=True)
    assert sequences(paper)["u1"] == ["", "", "", "", "id-a"]


def test_archive_without_the_log(tmp_path):
    source = archive(tmp_path / "log.tar.gz", {"x/README.txt": b"hello"})
    with pytest.raises(DataError, match="README"):
        reading.read_events(source, "lastfm")
    with pytest.raises(DataError, match="is a tar archive: unpack"):
        reading.read_events(source)


TABLE = [("b", "x", 5), ("a", "y", 3), ("b", "z", 3), ("a", "x", 3), ("b", "y", 3)]
IN_TIME = {"b": ["z", "y", "x"], "a": ["y", "x"]}


@pytest.mark.parametrize("separator", ["\t", ",", ";", "|"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_text_table(tmp_path, separator, newline):
    lines = [("rating", "item", "user", "time")]
    lines += [("1", item, user, f"{when}") for user, item, when in TABLE]
    text = newline.join(separator.join(line) for line in lines)
    source = write(tmp_path / "log", "\ufeff" + text + newline)
    assert sequences(reading.read_events(source)) == IN_TIME
    assert sequences(reading.read_events(source, separator=separator)) == IN_TIME


def test_table_without_times_keeps_its_order(tmp_path):
    source = write(tmp_path / "log.csv", "user,item\n" + "".join(f"{u},{i}\n" for u, i, _ in TABLE))
    log = reading.read_events(source)
    assert log.times is None
    assert sequences(log) == {"b": ["x", "z", "y"], "a": ["y", "x"]}


def test_table_with_named_columns(tmp_path):
    source = write(tmp_path / "log", "who,what,when,time\na,x,9,1\na,y,3,2\n")
    names = {"user_column": "who", "item_column": "what"}
    assert sequences(reading.read_events(source, **names))["a"] == ["x", "y"]
    assert sequences(reading.read_events(source, time_column="when", **names))["a"] == ["y", "x"]
    with pytest.raises(DataError, match="no column 'at'"):
        reading.read_events(source, time_column="at", **names)


def test_quotes(tmp_path):
    source = write(tmp_path / "q.csv", 'user,note,item\na,"x, ""y""\nz","i, 1"\nb,,"i, 1"\n')
    assert sequences(reading.read_events(source)) == {"a": ["i, 1"], "b": ["i, 1"]}
    source = write(tmp_path / "q.tsv", 'user\titem\na\t"x\nb\ty"\n')
    assert sequences(reading.read_events(source)) == {"a": ['"x'], "b": ['y"']}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("item", ['"5 inch', 'x,"5 inch'])
def test_a_quote_left_open(tmp_path, caplog, pack, item):
    lines = ["user,item,note", *["a,x,n"] * 40, f"b,{item}", *["c,y,n"] * 30]
    source = write(tmp_path / "q.csv", pack("\n".join(lines).encode()))
    told = "30 of 72 lines are inside quotes .* first one line 42: is a quote left open"
    with pytest.raises(DataError, match=told):
        reading.read_events(source)
    reading.read_events(source, max_malformed=0.5)
    assert "is a quote left open there?" in caplog.text


def test_an_id_of_two_lines_is_told_and_a_note_of_two_lines_is_not(tmp_path, caplog):
    text = "user,item,note\n" + "a,x,n\n" * 200
    reading.read_events(write(tmp_path / "q.csv", text + 'a,x,"n\nn"\n'))
    assert not caplog.text
    log = reading.read_events(write(tmp_path / "q.csv", text + 'a,"x\nx",n\na,x,n\n'))
    assert "1 of 204 lines" in caplog.text
    assert log.n_events == 202
    reading.read_events(write(tmp_path / "q.csv", text + 'a,x,"n\nn"\n,x,n\n'))
    assert "1 of 202 rows are malformed (row 203: no readable user)" in caplog.text


def test_a_long_note_of_many_lines(tmp_path):
    note = "a line\n" * 200_000
    log = reading.read_events(write(tmp_path / "n.csv", f'user,item,note\na,x,"{note}"\na,y,n\n'))
    assert log.n_events == 2


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
    assert reading.read_events(source).times.tolist() == [seconds]


def test_times_of_several_kinds_in_one_file(tmp_path):
    written = ["2009-05-04T23:08:57Z", "12", "2009-05-04", "1.5", "2009-05-04 23:08Z"]
    text = "".join(f"a,{number},{when}\n" for number, when in enumerate(written))
    log = reading.read_events(write(tmp_path / "log", "user,item,time\n" + text))
    assert log.times.tolist() == [1, 12, 1241395200, 1241478480, 1241478537]


def test_milliseconds(tmp_path):
    """In the order of the milliseconds, kept as seconds; one wild number does not make them so."""
    when = 1241478537
    text = "user,item,time\n" + "".join(f"a,{ms},{when}{ms}\n" for ms in ("750", "250", "500"))
    log = reading.read_events(write(tmp_path / "log", text))
    assert sequences(log) == {"a": ["250", "500", "750"]}
    assert log.times.tolist() == [when] * 3
    text = f"user,item,time\na,x,{when}\na,y,{when + 1}\na,z,{10**14}\n"
    log = reading.read_events(write(tmp_path / "log", text))
    assert log.times.tolist() == [when, when + 1, 10**14]


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
    log = reading.read_events(source)
    assert sequences(log) == IN_TIME
    assert sorted(log.times) == [3, 3, 3, 3, 5]


def test_parquet_table_of_numbers_with_nulls(tmp_path):
    source = parquet(tmp_path / "log.parquet", user=[7, None, 7, 8], item=[1, 2, None, 3])
    found = reading.read_counted(source, max_malformed=0.5)
    assert sequences(found.log) == {"7": ["1"], "8": ["3"]}
    assert found.malformed == [(2, "no readable user"), (3, "no readable item")]
    source = parquet(tmp_path / "log.parquet", user=[7.0, float("nan")], item=["a", "b"])
    with pytest.raises(DataError, match=r"1 of 2 rows are malformed \(row 2: no readable user\)"):
        reading.read_events(source)


def test_parquet_refuses(tmp_path):
    with pytest.raises(DataError, match="one value"):
        reading.read_events(parquet(tmp_path / "log", user=["a"], item=[["x"]]))
    with pytest.raises(DataError, match="'item' among 'user', 'items'; the nearest is 'items'"):
        reading.read_events(parquet(tmp_path / "log", user=["a"], items=["x"]))
    clock = pa.array([1], pa.time32("ms"))
    with pytest.raises(DataError, match="'time' of type time32.* can't be read as times"):
        reading.read_events(parquet(tmp_path / "log", user=["a"], item=["x"], time=clock))
    with pytest.raises(DataError, match="'item' of type binary can't be read as ids"):
        reading.read_events(parquet(tmp_path / "log", user=["a"], item=[b"\xff"]))
    write(tmp_path / "log", (tmp_path / "log").read_bytes()[:100])
    with pytest.raises(DataError, match="can't be read"):
        reading.read_events(tmp_path / "log")


def test_progress(tmp_path):
    calls = []
    source = write(tmp_path / "log", BRIGHTKITE)
    reading.read_events(source, "brightkite", progress=lambda *call: calls.append(call))
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
        {"like": "brightkite", "user_column": "who"},
        {"like": "lastfm", "separator": ";"},
        {"max_malformed": 2},
    ],
)
def test_options_that_do_not_fit(tmp_path, options):
    with pytest.raises(SettingsError):
        reading.read_events(write(tmp_path / "log", "user,item\na,x\n"), **options)


# malformed lines


@pytest.mark.parametrize("block", [64, 1 << 20])
def test_malformed_lines_are_counted_with_their_numbers(tmp_path, monkeypatch, caplog, block):
    monkeypatch.setattr(reading, "BLOCK", block)
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
        found = reading.read_counted(source, max_malformed=0.07)
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
        reading.read_events(source, max_malformed=0.06)


def test_late_malformed_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", 4096)
    lines = [f"u{number % 50}\t2009-05-04T00:00:00Z\t0\t0\ti" for number in range(5000)]
    lines[3000] = "u\tnever\t0\t0\ti"
    lines[4000] = "u"
    lines[4999] = "u\t2009-05-04T00:00:00Z\t0\t0\t"
    found = reading.read_counted(write(tmp_path / "log", "\n".join(lines)), "brightkite")
    assert [line for line, _ in found.malformed] == [3001, 4001, 5000]
    assert (found.n_lines, found.n_malformed, found.log.n_events) == (5000, 3, 4997)


def test_bytes_that_are_not_utf8(tmp_path):
    good = "é\tñ 東京\tÿ\n".encode() * 200
    text = b"user\titem\tnote\n" + good + b"\xff\n" + b"u\t\xff\tx\n" + b"v\ti\t\xff\n"
    found = reading.read_counted(write(tmp_path / "log", text))
    assert found.malformed == [(202, "1 columns, not 3"), (203, "no readable item")]
    assert sequences(found.log) == {"é": ["ñ 東京"] * 200, "v": ["i"]}


def test_ids_of_malformed_lines_get_no_number(tmp_path):
    text = "user,item,time\nghost,x,never\na,y,1\na,x,2\n"
    log = reading.read_events(write(tmp_path / "log", text), max_malformed=0.5)
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
    monkeypatch.setattr(reading, "BLOCK", draw.choice([200, 300, 1000]))
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
    log, n_lines, n_malformed, examples = reading.read_counted(source, "lastfm", max_malformed=1)
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
    assert reading.read_counted(source, "brightkite").n_malformed == 1
    with pytest.raises(DataError, match="2 of 101"):
        reading.read_events(write(tmp_path / "log", good + "u\nu\n"), "brightkite")
    with pytest.raises(DataError, match="1 of 100"):
        reading.read_events(write(tmp_path / "log", good + "u\n"), "brightkite", max_malformed=0)


# files that are no log; test_cli.py puts the same through the command


def test_wrong_separator_ends_early(tmp_path):
    source = write(tmp_path / "log", BRIGHTKITE.replace("\t", ",") * 50000)
    with pytest.raises(DataError, match="none of the first 1000 lines.*line 1: 1 columns, not 5"):
        reading.read_events(source, "brightkite")


def test_long_line(tmp_path):
    source = write(tmp_path / "log", b"user,item\n" + b"x" * (3 * reading.BLOCK))
    with pytest.raises(DataError, match="longer than"):
        reading.read_events(source)
    with pytest.raises(DataError, match="no line ends"):
        reading.read_events(write(tmp_path / "log", b"x" * (1 << 17)))


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
            reading.read_events(write(tmp_path / "log.gz", damaged), "brightkite")
    whole = archive(tmp_path / "whole", {MEMBER: text.encode()}).read_bytes()
    with pytest.raises(DataError, match="truncated or damaged"):
        reading.read_events(write(tmp_path / "log.tar.gz", whole[: len(whole) // 2]), "lastfm")


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
    log = reading.read_events(Path(REAL) / source, like, **options)
    log = data.filter_events(log, min_user_entropy=entropy)
    assert (log.n_users, log.n_items, log.n_events) == filtered
    train, heldout = data.split(log, max_train_events=longest)
    assert (train.n_users, train.n_items, train.n_events, heldout.n_events) == prepared
    assert round(math.log(train.n_items), 4) == error
