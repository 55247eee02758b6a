"""The command crnn-np: prepare and fetch."""

import gzip
import json
import os
import re
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from crnn_np import cli, data, datasets, presets, reading
from crnn_np.backends import gpu
from crnn_np.cli import main
from crnn_np.errors import DataError, DeviceError
from crnn_np.estimator import CollaborativeRNN


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def fails(*arguments):
    """Run, expect one line and status 1, return the line."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    [line] = result.output.splitlines()
    assert line.startswith("Error: ")
    return line


def events(n=3000, seed=0):
    rng = np.random.default_rng(seed)
    return zip(
        rng.integers(0, 12, n),
        rng.integers(0, 30, n),
        rng.integers(10**9, 10**9 + 99, n),
        strict=True,
    )


def table(path, header="user,item,time", separator=","):
    rows = [separator.join(header.split(","))]
    rows += [separator.join((f"ü{user}", f"i{item}", f"{time}")) for user, item, time in events()]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def brightkite(path):
    times = np.datetime_as_string(np.datetime64("2009-01-01", "s") - np.arange(3000), "s")
    path.write_text(
        "".join(
            f"{user}\t{time}Z\t0\t0\tp{item}\n"
            for (user, item, _), time in zip(events(), times, strict=True)
        )
    )
    return path


def test_prepare(tmp_path):
    source, out = table(tmp_path / "log.csv"), tmp_path / "set"
    result = run("prepare", source, "--out", out)
    assert result.exit_code == 0, result.output
    stats = json.loads((out / "stats.json").read_text())
    parts = data.load(out)
    assert stats["users"] == parts.train.n_users == 12
    assert stats["items"] == parts.train.n_items == 30
    assert stats["train_events"] + stats["heldout_events"] == 3000
    assert stats["uniform_nll"] == pytest.approx(np.log(30))
    assert (stats["lines_read"], stats["lines_skipped"], stats["like"]) == (3000, 0, "table")
    assert sorted(parts.train.user_ids) == sorted(f"ü{user}" for user in range(12))
    log = reading.read_events(source)
    whole = data.concatenate(*parts)
    assert np.array_equal(whole.times, log.times)
    assert np.array_equal(whole.item_ids[whole.items], log.item_ids[log.items])
    rows = [line.split() for line in result.output.splitlines()]
    assert ["split", "12", "30", "3,000"] in [row[:4] for row in rows]
    assert "paper" not in result.output


def test_options_reach_the_filter_and_the_split(tmp_path):
    source, out = table(tmp_path / "log.csv", "who,what,when"), tmp_path / "set"
    settings = {
        "--min-item-events": 90,
        "--min-user-events": 200,
        "--min-user-entropy": 2.9,
        "--heldout-fraction": 0.2,
        "--heldout-range": "5,30",
        "--max-train-events": 50,
        "--user-column": "who",
        "--item-column": "what",
        "--time-column": "when",
        "--separator": ",",
    }
    result = run("prepare", source, "--out", out, *(x for pair in settings.items() for x in pair))
    assert result.exit_code == 0, result.output
    log = reading.read_events(source, user_column="who", item_column="what", time_column="when")
    wanted = data.split(data.filter_events(log, 90, 200, 2.9), 0.2, (5, 30), 50)
    found = data.load(out)
    for part, other in zip(wanted, found, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(part, other, strict=True))
    assert found.heldout.lengths.max() == 30
    assert found.train.lengths.max() == 50


@pytest.mark.parametrize("like", ["brightkite", "lastfm"])
def test_known_data_stand_beside_the_paper(tmp_path, like):
    source = tmp_path / "log"
    if like == "brightkite":
        brightkite(source)
    else:
        source.write_text(
            "".join(f"u{u}\t{t}\ta{i}\tname\t\t\n" for u, i, t in events()), encoding="utf-8"
        )
    result = run("prepare", source, "--like", like, "--out", tmp_path / "set")
    assert result.exit_code == 0, result.output
    header, *_, ours, paper, note, _ = result.output.splitlines()
    known = datasets.KNOWN[like]
    for number in (known.users, known.items, known.events):
        assert f"{number:,}" in paper
    assert f"{known.uniform_nll:.2f}" in paper
    assert header.index("users") + len("users") == ours.index("12") + len("12")
    assert note.startswith("Not the paper's counts")
    stats = data.load_stats(tmp_path / "set")
    assert stats["like"] == like
    assert stats["settings"]["min_user_entropy"] == {"brightkite": 2.5, "lastfm": 3.0}[like]


def test_malformed_lines_are_told(tmp_path):
    source, out = table(tmp_path / "log.csv"), tmp_path / "set"
    lines = source.read_text(encoding="utf-8").splitlines()
    lines[10] = "u,i"
    lines[20] = "u,i,noon"
    source.write_text("\n".join(lines), encoding="utf-8")
    result = run("prepare", source, "--out", out)
    assert result.exit_code == 0
    assert "line 11: 2 columns, not 3; line 21: no readable time" in result.output
    stats = data.load_stats(out)
    assert (stats["lines_read"], stats["lines_skipped"]) == (3000, 2)
    assert [example["line"] for example in stats["malformed"]] == [11, 21]
    line = fails("prepare", source, "--out", tmp_path / "no", "--max-malformed", 0)
    assert "line 11" in line


def test_force(tmp_path):
    source, out = table(tmp_path / "log.csv"), tmp_path / "set"
    assert run("prepare", source, "--out", out).exit_code == 0
    before = (out / "train.parquet").read_bytes()
    assert "--force" in fails("prepare", source, "--out", out)
    assert run("prepare", source, "--out", out, "--force").exit_code == 0
    assert (out / "train.parquet").read_bytes() == before
    assert "no prepared data set" in fails("prepare", source, "--out", tmp_path, "--force")
    (out / "my.model").touch()
    assert "other files too, my.model" in fails("prepare", source, "--out", out, "--force")
    assert (out / "my.model").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "set"]


RUBBISH = np.random.default_rng(0).bytes(100_000)
GOOD = b"7\t2009-01-02T00:00:05Z\t1.0\t2.0\tplace\n"


@pytest.mark.parametrize(
    ("content", "options", "told"),
    [
        (b"", (), "is empty"),
        (gzip.compress(b"", mtime=0), (), "is empty"),
        (b"\xef\xbb\xbf", (), "is empty"),
        (b"user,user,item\na,b,x\n", (), "2 columns are named 'user'"),
        (b"user,item\n", (), "holds no events"),
        (b"\n\n\n", ("--like", "lastfm"), "is empty"),
        (None, (), "no such file"),
        ("directory", (), "is a directory"),
        (b"user;item\na;x\n", ("--separator", ","), "no column 'user' among 'user;item'; is ','"),
        (b"user,item\n" + b"a\tx\n" * 50, (), "no line can be read .*line 2: 1 columns, not 2"),
        (GOOD.replace(b"\t", b",") * 9, ("--like", "brightkite"), "line 1: 1 columns, not 5"),
        (GOOD * 9, ("--like", "lastfm"), "line 1: 5 columns, not 6"),
        (GOOD * 9, (), "line 1: no column 'user' among '7'"),
        (b"User,thing\na,x\n", (), "no column 'user' .* nearest is 'User': --user-column"),
        (b"user,thing\na,x\n", (), "no column 'item' among 'user', 'thing'"),
        (b"user,items\na,x\n", (), "nearest is 'items': --item-column"),
        (gzip.compress(GOOD * 9, mtime=0)[:-9], ("--like", "brightkite"), "truncated or damaged"),
        (RUBBISH, (), "binary data"),
        (RUBBISH, ("--like", "lastfm"), "binary data"),
        (gzip.compress(RUBBISH, mtime=0), ("--like", "brightkite"), "binary data"),
        (RUBBISH.replace(b"\0", b""), (), "not UTF-8"),
        (RUBBISH.replace(b"\0", b""), ("--like", "lastfm"), "can be read as an event"),
        ("user,item\na,x\n".encode("utf-16"), (), "UTF-16"),
        (b"PK\3\4" + RUBBISH, (), "is a zip file: unpack it"),
        (b"PAR1" + RUBBISH, (), "can't be read"),
        (b"user,item\na,x\n", (), "the filter left nothing: no item .*--min-item-events"),
        (b"user,item\n" + b"a,x\n" * 10, (), "no user .*--min-user-events"),
        (b"user,item\n" + b"a,x\n" * 20, (), "entropy .*--min-user-entropy"),
    ],
)
def test_files_that_are_no_log(tmp_path, content, options, told):
    source = tmp_path / "source"
    if content == "directory":
        source.mkdir()
    elif content is not None:
        source.write_bytes(content)
    with pytest.raises(DataError, match=told):
        raise DataError(fails("prepare", source, "--out", tmp_path / "set", *options))
    assert [path.name for path in tmp_path.iterdir()] in ([], ["source"])


@pytest.mark.parametrize(
    "options",
    [
        ("--heldout-range", "3"),
        ("--heldout-range", "9,3"),
        ("--heldout-range", "3,99999999999999999999"),
        ("--heldout-fraction", "2"),
        ("--like", "gowalla"),
        ("--nonsense", "1"),
    ],
)
def test_wrong_options(tmp_path, options):
    result = run("prepare", table(tmp_path / "log.csv"), "--out", tmp_path / "set", *options)
    assert result.exit_code == 2
    assert options[0] in result.output
    assert not (tmp_path / "set").exists()


def test_options_that_do_not_fit(tmp_path):
    source = table(tmp_path / "log.csv")
    assert "lastfm" in fails("prepare", source, "--out", tmp_path / "set", "--paper-items")


def test_names_that_are_too_long(tmp_path):
    source, name = table(tmp_path / "log.csv"), "a" * 300
    assert "can't be read" in fails("prepare", tmp_path / name, "--out", tmp_path / "set")
    assert "can't be written" in fails("prepare", source, "--out", tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "is no plain file" in fails("prepare", tmp_path / "pipe", "--out", tmp_path / "set")


def module(*arguments, **environment):
    command = [sys.executable, "-m", "crnn_np", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items()} | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_same_bytes_whatever_the_environment(tmp_path):
    first = brightkite(tmp_path / "log.txt")
    second = table(tmp_path / "log.csv")
    surroundings = [
        {"PYTHONHASHSEED": "0", "TZ": "UTC", "LC_ALL": "C"},
        {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo", "LC_ALL": "C.UTF-8"},
    ]
    written = []
    for number, environment in enumerate(surroundings):
        for source, like in ((first, "brightkite"), (second, "table")):
            out = tmp_path / f"{like}{number}"
            result = module("prepare", source, "--like", like, "--out", out, **environment)
            assert result.returncode == 0, result.stderr
        written.append(
            {
                (like, name): (tmp_path / f"{like}{number}" / name).read_bytes()
                for like in ("brightkite", "table")
                for name in data.FILES
            }
        )
    assert written[0] == written[1]


def test_error_of_the_module(tmp_path):
    result = module("prepare", tmp_path / "none", "--out", tmp_path / "set")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"Error: {tmp_path / 'none'}: no such file\n"


def test_parquet_source(tmp_path):
    users, items, times = zip(*events(), strict=True)
    source = tmp_path / "log.parquet"
    pq.write_table(pa.table({"user": users, "item": items, "time": times}), source)
    assert run("prepare", source, "--out", tmp_path / "set").exit_code == 0
    assert data.load(tmp_path / "set").train.n_items == 30


def test_fetch(tmp_path, monkeypatch):
    file = tmp_path / "file"
    calls = []

    def fetched(*arguments, **options):
        calls.append((arguments, options))
        return file

    monkeypatch.setattr(datasets, "fetch", fetched)
    result = run("fetch", "lastfm", "--to", tmp_path, "--url", "http://localhost/x")
    assert result.exit_code == 0
    assert result.output == f"{file}\n"
    assert calls == [(("lastfm", str(tmp_path), "http://localhost/x"), {"progress": False})]


def test_fetch_fails_with_one_line(tmp_path):
    result = run("fetch", "brightkite", "--to", tmp_path, "--url", "http://127.0.0.1:1/x")
    assert result.exit_code == 1
    [_, line] = result.output.splitlines()
    assert line.startswith("Error: http://127.0.0.1:1/x can't be downloaded")
    assert run("fetch", "gowalla").exit_code == 2


@pytest.mark.parametrize("command", [(), ("prepare",), ("fetch",)])
def test_help(command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


# train and evaluate


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A small prepared data set, and the same one as if it came from Last.fm."""
    rng = np.random.default_rng(0)
    log = data.from_sequences([rng.integers(0, 9, n) for n in (30, 40, 25)], 9)
    parts = data.cut_tail(log, [3, 4, 0])
    folder = tmp_path_factory.mktemp("prepared")
    for like in ("table", "lastfm"):
        data.save(parts, folder / like, {"like": like, "lines_read": 95, "lines_skipped": 0})
    return folder


SMALL = ("--preset", "authors", "--backend", "numpy", "--hidden-size", 3, "--epochs", 2)


def test_train_then_evaluate(prepared, tmp_path):
    out = tmp_path / "small.model"
    result = run("train", prepared / "table", "--out", out, *SMALL, "--dropout-out", 0.1)
    assert result.exit_code == 0, result.output
    assert "epoch 2/2: loss" in result.output
    assert "events/s" in result.output
    first, *epochs = map(json.loads, (tmp_path / "small.model.jsonl").read_text().splitlines())
    assert (first["settings"]["hidden_size"], first["settings"]["dropout_out"]) == (3, 0.1)
    assert [line["epoch"] for line in epochs] == [1, 2]
    assert all(line["events"] == 85 and line["loss"] > 0 for line in epochs)

    result = run("evaluate", out, prepared / "table", "--json", "--per-user", "-n", 2)
    assert result.exit_code == 0, result.output
    scores = json.loads(result.output)
    model = CollaborativeRNN.load(out)
    parts = data.load(prepared / "table")
    assert scores["nll"] == model.evaluate(*parts)["nll"]
    assert scores["per_user"]["user"] == ["0", "1"]
    assert np.mean(scores["per_user"]["nll"]) == pytest.approx(scores["nll"])
    result = run("evaluate", out, prepared / "table")
    assert f"{scores['nll']:.4f}" in result.output
    assert "7 held-out events of 2 of 3 users" in result.output


def test_early_stopping_reports_both_phases(prepared, tmp_path):
    out = tmp_path / "small.model"
    arguments = ("--patience", 1, "--validation-range", "2,2", "--log", tmp_path / "log")
    result = run("train", prepared / "table", "--out", out, *SMALL, *arguments)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()[1:]]
    chosen = [line for line in lines if line["phase"] == "choose"]
    refit = [line for line in lines if line["phase"] == "refit"]
    assert all(line["validation"]["nll"] > 0 for line in chosen)
    assert len(refit) == chosen[-1]["best_epoch"]
    assert "validation" in result.output


@pytest.mark.parametrize("options", [(), ("--patience", 9, "--refit", "false")])
def test_a_broken_training_goes_on_from_its_checkpoint(prepared, tmp_path, monkeypatch, options):
    def training(out):
        arguments = (*SMALL, "--out", tmp_path / out, "--checkpoint", tmp_path / "c", *options)
        return run("train", prepared / "table", *arguments)

    assert training("straight").exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(CollaborativeRNN, "save", lambda *_: sys.exit(7))
        patch.setattr(cli, "_epoch_line", lambda report: sys.exit(7))
        assert training("broken").exit_code == 7
    assert (tmp_path / "c").is_file()
    assert training("whole").exit_code == 0
    whole, straight = (CollaborativeRNN.load(tmp_path / out) for out in ("whole", "straight"))
    for one, other in zip(whole.params, straight.params, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not list(tmp_path.glob("c*"))


def test_a_checkpoint_that_goes_takes_no_other_file(prepared, tmp_path):
    (tmp_path / "c.best").write_text("precious")
    arguments = (*SMALL, "--out", tmp_path / "m", "--checkpoint", tmp_path / "c")
    assert run("train", prepared / "table", *arguments).exit_code == 0
    assert (tmp_path / "c.best").read_text() == "precious"
    assert not (tmp_path / "c").exists()


def test_a_model_replaces_no_pipe(prepared, tmp_path):
    os.mkfifo(tmp_path / "m")
    told = "m is no regular file: --out would replace it"
    assert told in fails("train", prepared / "table", "--out", tmp_path / "m", *SMALL)


def test_train_and_evaluate_a_baseline_by_name(prepared, tmp_path):
    out = tmp_path / "bigram.model"
    result = run("train", prepared / "table", "--model", "bigram", "--out", out)
    assert result.exit_code == 0, result.output
    assert "Bigram(epsilon=None)  # 3 users, 9 items, epsilon" in result.output
    result = run("evaluate", out, prepared / "table")
    assert result.exit_code == 0, result.output
    assert "7 held-out events of 2 of 3 users" in result.output


def test_an_rnn_by_name(prepared, tmp_path):
    out = tmp_path / "m"
    result = run("train", prepared / "table", "--model", "c-tanh", "--out", out, *SMALL)
    assert result.exit_code == 0, result.output
    assert CollaborativeRNN.load(out).settings.spec.cell == "tanh"


@pytest.mark.parametrize(
    ("given", "preset"),
    [
        (("--model", "mixture"), "mixture"),
        (("--output", "mixture"), "mixture"),
        (("--model", "mixture", "--preset", "authors"), "authors"),
        ((), "paper"),
    ],
)
def test_the_preset_that_goes_with_a_model(prepared, tmp_path, given, preset):
    options = ("--backend", "numpy", "--epochs", 1, "--patience", 0)
    result = run("train", prepared / "table", "--out", tmp_path / "m", *given, *options)
    assert result.exit_code == 0, result.output
    settings = CollaborativeRNN.load(tmp_path / "m").settings
    assert settings.rule == presets.resolve(preset).rule
    assert settings.spec.output == ("mixture" if given else "softmax")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (("--pointers", 2), "--pointers has no effect where output is softmax"),
        (("--cell", "tanh", "--candidate", "sigmoid"), "--candidate has no effect where cell is"),
        (("--validation-fraction", 0.1), "--validation-fraction has no effect where patience is 0"),
    ],
)
def test_an_option_that_nothing_reads(prepared, tmp_path, given, told):
    options = ("--preset", "paper", "--patience", 0, "--epochs", 1, *given)
    result = run("train", prepared / "table", "--out", tmp_path / "m", *options)
    assert result.exit_code == 2
    assert told in result.output
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("patience", [0, 2])
def test_train_learns_nothing_from_the_held_out_part(prepared, tmp_path, patience):
    parts, stats = data.load(prepared / "table"), data.load_stats(prepared / "table")
    heldout = parts.heldout._replace(items=(parts.heldout.items + 1) % parts.heldout.n_items)
    data.save(parts._replace(heldout=heldout), tmp_path / "other", stats)
    assert not np.array_equal(data.load(tmp_path / "other").heldout.items, parts.heldout.items)
    models = []
    for directory in prepared / "table", tmp_path / "other":
        options = ("--backend", "numpy", "--epochs", 3, "--patience", patience)
        result = run("train", directory, "--out", tmp_path / "m", *options)
        assert result.exit_code == 0, result.output
        models.append((tmp_path / "m").read_bytes())
    assert models[0] == models[1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no full disk")
def test_a_log_that_can_not_be_written_loses_no_model(prepared, tmp_path):
    options = ("--backend", "numpy", "--epochs", 2, "--patience", 0, "--log", "/dev/full")
    result = run("train", prepared / "table", "--out", tmp_path / "m", *options)
    assert result.exit_code == 1
    assert "/dev/full: the log can't be written (No space left on device)" in result.output
    assert CollaborativeRNN.load(tmp_path / "m")._epoch == 1
    options = ("-m", "crnn_np", "evaluate", str(tmp_path / "m"), str(prepared / "table"))
    plain = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}  # written at the end
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [sys.executable, *options], stdout=full, stderr=subprocess.PIPE, text=True, env=plain
        )
    assert ended.returncode == 1
    assert "Error: a file can't be read or written: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_an_id_that_the_terminal_lacks(tmp_path):
    given = ["-m", "crnn_np", "train", str(tmp_path / "数"), "--out", str(tmp_path / "m")]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    ended = subprocess.run([sys.executable, *given], env=environment, capture_output=True)
    assert ended.returncode != 0
    assert b"\\u6570" in ended.stderr
    assert b"Traceback" not in ended.stderr


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty folder, the current one and that of temporary files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_dry_run_prints_the_plan_and_leaves_no_file(prepared, empty, backend):
    options = ("--preset", "authors", "--backend", backend, "--hidden-size", 3, "--epochs", 7)
    result = run("train", prepared / "table", "--dry-run", *options, "--window", 8)
    assert result.exit_code == 0, result.output
    first, *_, sizes, memory, time = result.output.splitlines()
    assert first.startswith("3 users, 9 items, 88 training events; CollaborativeRNN(")
    assert sizes == f"5 windows an epoch, {3 * 3 * 9 + 9 * 9 + 9 * 3} parameters"
    assert re.fullmatch(r"memory: \d+\.\d\d GB at its peak", memory)
    assert re.fullmatch(r"time: [\d.e-]+ s an epoch, [\d.e-]+ s for 7 epochs", time)
    assert not list(empty.iterdir())


def test_a_dry_run_without_the_device(prepared, empty, monkeypatch):
    """It counts what the device has to hold, and cannot measure."""

    def missing(*args):
        raise DeviceError("no CUDA device")

    monkeypatch.setattr(gpu, "device", missing)
    options = ("--backend", "cupy", "--hidden-size", 3, "--products", "tf32", "--dry-run")
    result = run("train", prepared / "table", *options)
    assert result.exit_code == 0, result.output
    memory, time = result.output.splitlines()[-2:]
    assert re.fullmatch(
        r"memory: not estimated: no device; on the device \d+\.\d\d GB at its peak", memory
    )
    assert time == "time: not estimated: no device"
    assert not list(empty.iterdir())


def test_a_dry_run_with_early_stopping(prepared, empty):
    options = (*SMALL, "--patience", 1, "--out", "m", "--log", "l")
    for refit, end in ((True, "for 2 epochs and as many of the refit"), (False, "for 2 epochs")):
        result = run("train", prepared / "table", "--dry-run", *options, "--refit", refit)
        assert result.exit_code == 0, result.output
        time = result.output.splitlines()[-1]
        assert " its validation, at most " in time
        assert time.endswith(end)
    assert not list(empty.iterdir())


def test_a_dry_run_refuses_what_training_refuses(prepared, empty):
    wrong = ("--dry-run", "--dropout-in", "1.5")
    assert "dropout_in is 1.5" in fails("train", prepared / "table", *SMALL, *wrong)
    assert "no such directory" in fails("train", empty / "nowhere", *SMALL, "--dry-run")
    assert not list(empty.iterdir())


def test_only_a_dry_run_needs_no_out(prepared, empty):
    result = run("train", prepared / "table", *SMALL)
    assert result.exit_code == 2
    assert "Missing option '--out'" in result.output
    assert not list(empty.iterdir())


def test_training_begins_with_its_memory(prepared, tmp_path):
    result = run("train", prepared / "table", "--out", tmp_path / "m", *SMALL)
    assert re.match(r"memory: \d+\.\d\d GB at its peak", result.output.splitlines()[1])


def test_the_preset_follows_the_kind_of_log(prepared, tmp_path):
    for like, hidden_size in (("table", 32), ("lastfm", 128)):
        out = tmp_path / like
        arguments = ("--preset", "authors", "--backend", "numpy", "--epochs", 1)
        assert run("train", prepared / like, "--out", out, *arguments).exit_code == 0
        assert CollaborativeRNN.load(out).settings.spec.hidden_size == hidden_size


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a, p: [*a[:2], p / "nowhere" / "m", *a[3:]], "its folder does not exist"),
        (lambda a, p: [*a, "--checkpoint", p / "nowhere" / "c"], "c: its folder does not exist"),
        (lambda a, p: [p / "nowhere", *a[1:]], "no such directory"),
        (lambda a, p: [*a, "--dropout-in", "1.5"], "dropout_in is 1.5: expected 0 to 0.99"),
        (lambda a, p: [*a, "--learning-rate", "-1"], "learning_rate is -1.0: expected 0 to 10"),
        (lambda a, p: [*a[:3], "--model", "bigram", "--seed", 1], "there is no setting "),
        (lambda a, p: [*a[:2], p, *a[3:]], "is a directory: --out needs the name of a file"),
        (lambda a, p: [*a, "--log", p / "m"], "m is the file of --out too: choose another"),
        (lambda a, p: [*a, "--checkpoint", p / "m"], "choose another name for --checkpoint"),
        (lambda a, p: [*a, "--log", a[0] / "stats.json"], "choose another name for --log"),
        (lambda a, p: [*a, "--model", "c-gru", "--cell", "tanh"], "c-gru has cell 'gru' and"),
    ],
)
def test_train_refuses(prepared, tmp_path, change, error):
    arguments = change([prepared / "table", "--out", tmp_path / "m", *SMALL], tmp_path)
    assert error in fails("train", *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "option", [("--preset", "paper"), ("--backend", "numpy"), ("--log", "x"), ("--dry-run",)]
)
def test_a_baseline_has_no_such_option(prepared, tmp_path, option):
    arguments = ("--out", tmp_path / "m", "--model", "unigram")
    result = run("train", prepared / "table", *arguments, *option)
    assert result.exit_code == 2
    assert f"unigram has no {option[0]}" in result.output
    assert not list(tmp_path.iterdir())


def test_a_training_that_does_not_begin_leaves_the_old_log(prepared, tmp_path):
    out, log = tmp_path / "m", tmp_path / "m.jsonl"
    assert run("train", prepared / "table", "--out", out, *SMALL).exit_code == 0
    before = log.read_bytes()
    (tmp_path / "c").write_text("no checkpoint")
    fails_late = run(
        "train", prepared / "table", "--out", out, *SMALL, "--checkpoint", tmp_path / "c"
    )
    assert fails_late.exit_code == 1
    assert log.read_bytes() == before


def test_evaluate_refuses_a_checkpoint(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(CollaborativeRNN, "save", lambda *_: sys.exit(7))
    options = (*SMALL, "--out", tmp_path / "m", "--checkpoint", tmp_path / "c")
    assert run("train", prepared / "table", *options).exit_code == 7
    assert "is a checkpoint, not a model" in fails("evaluate", tmp_path / "c", prepared / "table")


def test_evaluate_with_another_backend(prepared, tmp_path):
    out = tmp_path / "m"
    assert run("train", prepared / "table", "--out", out, *SMALL).exit_code == 0
    fitted = CollaborativeRNN.load(out)
    fitted.backend = "cupy"
    fitted.save(out)
    assert "or use backend 'numba'" in fails("evaluate", out, prepared / "table")
    assert run("evaluate", out, prepared / "table", "--backend", "numpy").exit_code == 0
    baseline = tmp_path / "b"
    assert run("train", prepared / "table", "--model", "bigram", "--out", baseline).exit_code == 0
    refused = run("evaluate", baseline, prepared / "table", "--backend", "numpy")
    assert refused.exit_code == 2
    assert "holds a baseline, which has no --backend" in refused.output


def test_evaluate_tells_json_of_infinity(prepared, tmp_path, monkeypatch):
    out = tmp_path / "m"
    assert run("train", prepared / "table", "--out", out, *SMALL).exit_code == 0
    scores = dict.fromkeys(("nll", "perplexity"), float("inf"))
    monkeypatch.setattr(CollaborativeRNN, "evaluate", lambda *_, **__: scores)
    result = run("evaluate", out, prepared / "table", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == {"nll": None, "perplexity": None}


def test_evaluate_refuses(prepared, tmp_path):
    out = tmp_path / "m"
    assert run("train", prepared / "table", "--out", out, *SMALL).exit_code == 0
    other = data.cut_tail(data.from_sequences([[0, 1, 2, 3], [1, 2, 3, 0]], 4), [1, 1])
    data.save(other, tmp_path / "other", {"like": "table", "lines_read": 8, "lines_skipped": 0})
    for model, directory, error in (
        (tmp_path / "nothing", prepared / "table", "no such model file"),
        (prepared / "table" / "stats.json", prepared / "table", "not a safetensors file"),
        (out, tmp_path / "other", "the model knows 3 users and the data have 2"),
    ):
        assert error in fails("evaluate", model, directory)
