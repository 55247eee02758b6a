"""`make reproduce` on tiny logs: what is run, what is written, and going on after a break."""

import csv
import gzip
import json
import shutil
import subprocess
from pathlib import Path

import epoch_time
import numpy as np
import pytest
import reproduce
from click.testing import CliRunner
from machine import describe_machine

from crnn_np import datasets, estimator, methods, model, presets, synthetic
from crnn_np.baselines import Bigram
from crnn_np.errors import DataError

RNN = {"preset": None, "hidden_size": 3, "window": 8, "batch": 2, "epochs": 2, "loss_scale": "mean"}
PROFILE = {
    "seeds": 2,
    "hidden_sizes": [2, 3],
    "seconds": 0.01,
    "rnns": {
        "c-gru": RNN,
        "c-tanh": RNN
        | {
            "patience": 1,
            "validation_range": [2, 3],
            "choose": [{"learning_rate": 0.01}, {"hidden_size": 2, "learning_rate": 0.1}],
        },
    },
    "lastfm": {"seeds": 1, "rnns": {"c-gru": RNN | {"hidden_size": 4}}},
}
MODELS = ("uniform", "bigram", "c-tanh", "c-gru")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(reproduce.SETTINGS, "full", PROFILE)
    monkeypatch.setattr(reproduce.planning, "SAMPLE_SECONDS", 0.01)


def rows(n=3000, seed=0):
    rng = np.random.default_rng(seed)
    return zip(rng.integers(0, 12, n), rng.integers(0, 40, n), range(n), strict=True)


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """A folder of raw logs: a table, and Last.fm's format without artists."""
    folder = tmp_path_factory.mktemp("raw")
    (folder / "shop").mkdir()
    with gzip.open(folder / "shop" / "log.tsv.gz", "wt") as file:
        file.write("user\titem\n")
        file.writelines(f"u{user}\ti{item}\n" for user, item, _ in rows())
    (folder / "lastfm-part").mkdir()
    name = "userid-timestamp-artid-artname-traid-traname.tsv"
    (folder / "lastfm-part" / name).write_text(
        "".join(
            f"u{user}\t2009-01-01T00:{t // 60 % 60:02}:{t % 60:02}Z\t\t\tt{item}\t\n"
            for user, item, t in rows(seed=1)
        )
    )
    (folder / "README.csv").write_text("other,columns\n1,2\n")
    return folder


def run(logs, out, *arguments, models=MODELS, **options):
    given = ["--data", logs, "--out", out, "--models", ",".join(models), "--no-epoch-time"]
    return CliRunner().invoke(reproduce.main, [str(a) for a in (*given, *arguments)], **options)


def record(file):
    return json.loads(Path(file).read_text())


def errors(out):
    """What must not depend on where a run was broken off: all but times, dates and machines."""
    kept = ("model", "seed", "status", "settings", "chosen", "scores", "per_user")

    def steady(found):
        # The training loss is summed in parts of an epoch that depend on the pace.
        epochs = [e | {"loss": round(e["loss"], 9)} for e in found.get("epochs") or []]
        return {k: found.get(k) for k in kept} | {"epochs": epochs}

    return {
        str(file.relative_to(out)): steady(record(file))
        for file in sorted(out.glob("*/**/*-*.json"))
    } | {str(file.relative_to(out)): file.read_bytes() for file in sorted(out.rglob("*.csv"))}


@pytest.fixture(scope="module")
def whole(logs, tmp_path_factory):
    """The results of a run without a break."""
    out = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(reproduce.SETTINGS, "full", PROFILE)
        result = run(logs, out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_the_runs_of_a_plan(whole):
    out, printed = whole
    names = {p.name for p in (out / "shop").glob("*-*.json")}
    assert names == {
        *("uniform-0.json", "bigram-0.json", "c-gru-0.json", "c-gru-1.json"),
        *("c-tanh-0.json", "c-tanh-1.json"),
    }
    assert {p.name for p in (out / "lastfm-part").glob("c-gru-*.json")} == {"c-gru-0.json"}
    found = record(out / "shop" / "c-gru-1.json")
    assert found["status"] == "done"
    assert found["resolved"]["seed"] == 1
    assert len(found["per_user"]["nll"]) == found["scores"]["users_evaluated"]
    assert np.mean(found["per_user"]["nll"]) == pytest.approx(found["scores"]["nll"])
    assert [e["epoch"] for e in found["epochs"]] == [1, 2]
    assert {"numpy", "numba", "crnn_np"} < set(found["versions"])
    assert found["machine"]["cores"]
    assert record(out / "lastfm-part" / "c-gru-0.json")["resolved"]["hidden_size"] == 4
    assert not list(out.rglob("*.checkpoint*"))
    assert "shop c-gru" in printed
    assert (out / "report.html").is_file()


def test_the_facts_of_the_data(whole, logs):
    out, printed = whole
    shop = record(out / "shop" / "data.json")
    assert (shop["published"], shop["is_paper"]) == (None, False)
    assert shop["note"] == ""
    assert shop["uniform_nll"] == pytest.approx(np.log(shop["items"]))
    assert len(shop["entropy"]) == shop["users"] == 12
    lastfm = record(out / "lastfm-part" / "data.json")
    assert lastfm["published"] == "lastfm"
    assert lastfm["note"] == "items are tracks, not artists"
    assert "the artists can't be used" in printed


def test_settings_are_chosen_on_the_validation_part(whole):
    out, _ = whole
    tried = [record(file) for file in (out / "shop" / "trials").glob("*.json")]
    best = min(tried, key=lambda r: r["validation_nll"])
    expected = PROFILE["rnns"]["c-tanh"] | best["trial"] | {"like": "table", "patience": 0}
    expected |= {"epochs": best["best_epoch"]}
    del expected["choose"]
    for seed in (0, 1):
        found = record(out / "shop" / f"c-tanh-{seed}.json")
        assert found["settings"] == expected | {"seed": seed}
        assert sorted(one["validation_nll"] for one in found["chosen"]) == sorted(
            one["validation_nll"] for one in tried
        )
        assert {e["phase"] for e in found["epochs"]} == {"train"}


def test_settings_for_the_papers_own_data_and_trials_of_nothing_but_epochs(tmp_path):
    profile = {
        "rnns": {"c-gru": {"preset": "authors", "epochs": 3, "choose": [{}]}},
        "paper": {"rnns": {"c-gru": {"preset": "authors"}}},
        "changes": {"epochs": 9},
        "seeds_asked": None,
        "seeds": 1,
    }
    for is_paper, names in ((False, ["trials/c-gru-epochs.json"]), (True, [])):
        facts = {"name": "x", "like": "table", "is_paper": is_paper, "sha256": "0"}
        of = reproduce.DataSet(facts, None, tmp_path)
        tried, settings = reproduce.trials(of, "c-gru", profile)
        assert [str(job.file.relative_to(tmp_path)) for job in tried] == names
        assert [str(job) for job in tried] == ["x c-gru trial of epochs"] * len(names)
        assert settings == {"like": "table", "preset": "authors", "epochs": 9}


def test_nothing_is_made_twice(whole, logs):
    out, _ = whole
    before = {file: file.stat().st_mtime_ns for file in out.glob("*/*-*.json")}
    result = run(logs, out)
    assert result.exit_code == 0, result.output
    assert {file: file.stat().st_mtime_ns for file in out.glob("*/*-*.json")} == before


class Broken(BaseException):
    """As if the process were killed."""


@pytest.mark.parametrize("where", range(1, 42, 5))
def test_broken_off_anywhere_it_goes_on_to_the_same_errors(
    whole, logs, tmp_path, monkeypatch, where
):
    """Killed before a record or a checkpoint is written; then given again."""
    calls = 0

    def counted(function):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls == where:
                raise Broken
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(reproduce, "write_json", counted(reproduce.write_json))
        patch.setattr(model, "save", counted(model.save))
        with pytest.raises(Broken):
            run(logs, tmp_path, catch_exceptions=False)
    result = run(logs, tmp_path)
    assert result.exit_code == 0, result.output
    assert errors(tmp_path) == errors(whole[0])


def test_a_model_that_fails_is_shown_and_the_others_finish(logs, tmp_path, monkeypatch):
    def fails(self, train, validation):
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Bigram, "_fit", fails)
        result = run(logs, tmp_path, "--datasets", "shop", models=("bigram", "c-gru"))
    assert result.exit_code == 1
    failed = record(tmp_path / "shop" / "bigram-0.json")
    assert (failed["status"], failed["error"]) == ("failed", "MemoryError: no room")
    assert record(tmp_path / "shop" / "c-gru-0.json")["status"] == "done"
    assert "MemoryError: no room" in (tmp_path / "report.html").read_text()
    result = run(logs, tmp_path, "--datasets", "shop", models=("bigram", "c-gru"))
    assert result.exit_code == 0, result.output
    assert record(tmp_path / "shop" / "bigram-0.json")["status"] == "done"


def test_a_log_that_cannot_be_prepared_is_named_and_the_others_finish(logs, tmp_path):
    for name in ("empty", "good"):
        (tmp_path / "raw" / name).mkdir(parents=True)
    (tmp_path / "raw" / "empty" / "log.csv").write_text("user,item\na,b\n")
    text = gzip.decompress((logs / "shop" / "log.tsv.gz").read_bytes())
    (tmp_path / "raw" / "good" / "log.tsv").write_bytes(text)
    result = run(tmp_path / "raw", tmp_path / "out", models=("uniform",))
    assert result.exit_code == 1
    assert result.output.count("empty is left out: ") == 1
    assert record(tmp_path / "out" / "good" / "uniform-0.json")["status"] == "done"
    assert "good" in (tmp_path / "out" / "report.html").read_text()
    result = run(tmp_path / "raw", tmp_path / "out", "--datasets", "empty", models=("uniform",))
    assert result.exit_code == 1
    assert "Error: no data set of empty can be used" in result.output


def test_data_whose_prepared_form_was_deleted_are_prepared_again(logs, tmp_path):
    for _ in range(2):
        result = run(logs, tmp_path, "--datasets", "shop", models=("uniform",))
        assert result.exit_code == 0, result.output
        shutil.rmtree(tmp_path / "shop" / "prepared")


def test_other_settings_are_other_runs(logs, tmp_path):
    for epochs in (1, 3):
        options = ("--datasets", "shop", "--epochs", epochs, "--seeds", 1)
        assert run(logs, tmp_path, *options, models=("c-gru",)).exit_code == 0
        assert len(record(tmp_path / "shop" / "c-gru-0.json")["epochs"]) == epochs
    assert not (tmp_path / "shop" / "c-gru-1.json").exists()
    options = ("--datasets", "shop", "--epochs", 1, "--preset", "paper", "--seeds", 1)
    assert run(logs, tmp_path, *options, models=("c-gru",)).exit_code == 0
    found = record(tmp_path / "shop" / "c-gru-0.json")["resolved"]
    assert (found["dropout_out"], found["hidden_size"], found["patience"]) == (0.2, 32, 3)


def test_a_run_does_not_go_on_from_one_with_other_settings(logs, tmp_path, monkeypatch):
    """Broken off, then asked for with other settings: begun anew, and nothing is left behind."""

    def breaks(*_, **__):
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(reproduce.crnn_np.CollaborativeRNN, "evaluate", breaks)
        with pytest.raises(Broken):
            run(logs, tmp_path, "--datasets", "shop", models=("c-gru",), catch_exceptions=False)
    assert len(list(tmp_path.rglob("*.checkpoint*"))) == 1
    options = ("--datasets", "shop", "--epochs", 1, "--seeds", 1)
    result = run(logs, tmp_path, *options, models=("c-gru",))
    assert result.exit_code == 0, result.output
    assert len(record(tmp_path / "shop" / "c-gru-0.json")["epochs"]) == 1
    assert not list(tmp_path.rglob("*.checkpoint*"))


def test_a_run_is_made_anew_where_its_preset_changed(logs, tmp_path, monkeypatch):
    options = ("--datasets", "shop", "--epochs", 1, "--seeds", 1)
    file = tmp_path / "shop" / "c-gru-0.json"

    def written():
        result = run(logs, tmp_path, *options, models=("c-gru",))
        assert result.exit_code == 0, result.output
        return file.stat().st_mtime_ns

    assert written() == written()
    default = presets.resolve

    def changed(preset="paper", like=None, **settings):
        return default(preset, like, **{"learning_rate": 0.001} | settings)

    monkeypatch.setattr(estimator, "resolve", changed)
    assert written() == written()
    assert record(file)["resolved"]["learning_rate"] == 0.001


def test_what_is_no_raw_log_is_left_out(whole, tmp_path, capsys):
    (tmp_path / "bad.csv.gz").write_bytes(b"no gzip")
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    assert reproduce.raw_logs(tmp_path) == {}
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert list(whole[0].rglob("train.parquet"))
    assert reproduce.raw_logs(whole[0]) == {}


def test_an_archive_and_what_was_unpacked_from_it_are_one_log(tmp_path, capsys):
    unpacked = tmp_path / "lastfm-dataset-1K" / "userid-timestamp-artid-artname-traid-traname.tsv"
    unpacked.parent.mkdir()
    unpacked.touch()
    assert reproduce.raw_logs(tmp_path) == {"lastfm-dataset-1K": (unpacked, "lastfm")}
    archive = tmp_path / "lastfm-dataset-1K.tar.gz"
    archive.touch()
    assert reproduce.raw_logs(tmp_path) == {"lastfm": (archive, "lastfm")}
    assert capsys.readouterr().out == f"{unpacked} is left out: {archive} holds it\n"


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("a.csv", '"user","item"'),
        ("a.CSV", "user,item"),
        ("a.csv", "\ufeffuser,item"),
        ("a.csv", "user;item"),
        ("a.tsv", "time\tuser\titem"),
    ],
)
def test_tables_that_prepare_reads_are_raw_logs(tmp_path, name, header):
    (tmp_path / name).write_text(f"{header}\n", encoding="utf-8")
    assert reproduce.raw_logs(tmp_path) == {"a": (tmp_path / name, "table")}


def test_tables_without_the_columns_are_named(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("User,item\n")
    assert reproduce.raw_logs(tmp_path) == {}
    said = f"left out: {tmp_path}/a.csv, line 1: no column 'user' among 'User', 'item'"
    assert capsys.readouterr().out.startswith(said)


def test_a_dry_run_prints_the_plan_only(logs, tmp_path):
    result = run(logs, tmp_path, "--dry-run", "--datasets", "shop")
    assert result.exit_code == 0, result.output
    assert not list(tmp_path.glob("*/*-*.json"))
    assert not list(tmp_path.glob("*/data.json"))
    lines = result.stdout.splitlines()
    [line] = [x for x in lines if x.startswith("shop c-gru ")]
    assert line.split()[2:5] == ["2", "0", "2"]
    assert line.endswith(" GB")
    assert len([x for x in lines if x.startswith("shop c-tanh trial ")]) == 2
    assert lines[-1].startswith("in all about ")
    assert "GB of memory" in lines[-1]


@pytest.fixture
def offline(monkeypatch):
    def refused(name, *_, **__):
        raise DataError(f"https://example.org/{name} can't be downloaded (ConnectionError); try")

    monkeypatch.setattr(datasets, "fetch", refused)


def test_without_data_it_goes_on_with_the_built_in(offline, tmp_path, monkeypatch):
    drawn = synthetic.draw(n_users=6, n_items=9, hidden_size=3, events=(30, 50))
    monkeypatch.setattr(synthetic, "draw", lambda: drawn)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "other.csv").write_text("other,columns\n")
    result = run(tmp_path / "nothing", tmp_path / "out", models=("bigram", "c-gru"))
    assert result.exit_code == 0, result.output
    for known in datasets.KNOWN.values():
        assert f": put {known.file} into {tmp_path}/nothing/" in result.output
    assert result.output.count("left out: ") == 1
    facts = record(tmp_path / "out" / "built-in" / "data.json")
    assert facts["note"] == "drawn from a known C-GRU"
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("--datasets", "shop,ship", "there are no data ship under"),
        ("--models", "c-gru,gru", "there are no models gru: expected some of uniform"),
    ],
)
def test_wrong_names(logs, tmp_path, option, value, error):
    result = run(logs, tmp_path, option, value)
    assert result.exit_code == 1
    assert error in result.output
    assert not list(tmp_path.iterdir())


def test_quick_takes_the_first_users(logs, tmp_path, monkeypatch):
    monkeypatch.setitem(reproduce.SETTINGS, "quick", PROFILE | {"users": 5})
    arguments = ("--profile", "quick", "--datasets", "shop")
    assert run(logs, tmp_path, *arguments, models=("uniform",)).exit_code == 0
    facts = record(tmp_path / "shop" / "data.json")
    assert facts["users"] == 5
    assert facts["note"] == "the first 5 users only"


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(("profile", "out"), [("full", "'found'"), ("quick", "'found/quick'")])
def test_make_keeps_quick_results_apart(profile, out):
    command = ["make", "--dry-run", "reproduce", f"PROFILE={profile}", "RESULTS=found"]
    printed = subprocess.check_output(command, cwd=Path(__file__).parents[1], text=True)
    assert f"--out {out} " in printed


def test_epoch_time(tmp_path, monkeypatch):
    log = synthetic.draw(n_users=6, n_items=9, hidden_size=3, events=(30, 50)).split.train
    for name, users in (("c-gru", 3), ("p-gru", 6)):
        new = methods.new(name, preset="authors", hidden_size=4)
        with monkeypatch.context() as patch:
            patch.setattr(epoch_time, "ROOM", 8 * (9 * 12 + 9 * 4 + 3.5 * 4 * 12))
            assert epoch_time.users_that_fit(new, log) == users
    file = tmp_path / "epoch_time.json"
    found = list(epoch_time.measure(log, "drawn", [2, 3], 0.01, file))
    assert [(r["model"], r["hidden_size"]) for r in found] == [
        *(("C-GRU", 2), ("P-GRU", 2)),
        *(("C-GRU", 3), ("P-GRU", 3)),
    ]
    assert all(r["seconds_per_epoch"] > 0 and r["peak_gb"] > 0.01 for r in found)
    assert record(file)["rows"] == found
    assert not list(epoch_time.measure(log, "drawn", [2, 3], 0.01, file))
    other = describe_machine() | {"processor": "another"}
    monkeypatch.setattr(epoch_time, "describe_machine", lambda: other)
    assert len(list(epoch_time.measure(log, "drawn", [2], 0.01, file))) == 2
    assert len(record(file)["rows"]) == 2


def test_tables_are_csv(whole):
    out, _ = whole
    with open(out / "shop" / "errors.csv", newline="") as file:
        table = list(csv.reader(file))
    assert len(table) > len(MODELS)
