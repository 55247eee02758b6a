"""The page and the tables of ``make reproduce``, from made-up runs."""

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import figures
import records
import report

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
MACHINE = {"processor": "Some <CPU> & co", "cores": 2, "memory_gb": 8.2, "load": [0.1, 0.2, 0.3]}
ERRORS = {
    "uniform": 8.9,
    "unigram": 7.9,
    "mf": 7.7,
    "hmm": 7.2,
    "bigram": 5.6,
    "personal": 5.3,
    "p-gru": 5.5,
    "c-tanh": 5.2,
    "c-gru": 5.1,
}
VOID = {"meta", "br"}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_data(folder, users, title="Some <shop> & more", published="brightkite", **facts):
    rng = np.random.default_rng(users)
    told = {
        "name": folder.name,
        "title": title,
        "note": "a <part>",
        "published": published,
        "is_paper": False,
        "users": users,
        "items": 7320,
        "train_events": 180000,
        "heldout_events": 5000,
        "uniform_nll": 8.8984,
        "sha256": "abc",
        "entropy": rng.normal(3, 0.7, users).clip(0.1).tolist(),
    }
    write_json(folder / "data.json", told | facts)
    return told


def make_run(folder, told, model, seed, **changes):
    """A run whose users' errors grow with their entropy."""
    rng = np.random.default_rng([seed, sorted(ERRORS).index(model)])
    nll = ERRORS[model] + (np.array(told["entropy"]) - 3) + rng.normal(0, 0.9, told["users"])
    nll = (nll + ERRORS[model] + 0.01 * seed - nll.mean()).clip(0.05)
    if model == "uniform":
        nll[:] = told["uniform_nll"]
    recurrent = model in records.RNNS
    curve = (ERRORS[model] + 3.5 * np.exp(-np.arange(1, 26) / 4) + rng.normal(0, 0.03, 25)).tolist()
    epochs = [
        {"phase": "choose", "epoch": k, "loss": loss - 0.3, "validation_nll": loss}
        for k, loss in enumerate(curve, 1)
    ]
    record = {
        "model": model,
        "seed": seed,
        "status": "done",
        "error": None,
        "settings": {"preset": "authors", "seed": seed} if recurrent else {},
        "chosen": [],
        "parameters": 1_256_000 if recurrent else None,
        "scores": {
            "nll": float(nll.mean()),
            "perplexity": float(np.exp(nll.mean())),
            "recall@20": 0.4 - ERRORS[model] / 50,
            "mrr@20": 0.2 - ERRORS[model] / 100 + seed / 1000,
        },
        "per_user": {"user": list(range(told["users"])), "nll": nll.tolist()},
        "epochs": epochs if recurrent else [],
        "versions": {"crnn_np": "0.1.0", "python": "3.11.7", "numpy": "2.4.6"},
        "threads": 2,
        "data_sha256": "abc",
        "date": "2026-11-21",
        "machine": MACHINE,
        "seconds": 812.25,
        "epoch_seconds": [32.5] * 25 if recurrent else [],
    }
    write_json(folder / f"{model}-{seed}.json", record | changes)


def fail_run(folder, model, seed):
    asked = {"model": model, "seed": seed, "settings": {}, "machine": MACHINE, "date": "2026-11-21"}
    error = "MemoryError: <no> room & more"
    write_json(folder / f"{model}-{seed}.json", asked | {"status": "failed", "error": error})


def make_results(results, users=30):
    """A whole data set with a failed seed, one with missing and failed models, one without runs."""
    whole = results / "brightkite-part"
    told = make_data(whole, users, "Brightkite, a part")
    for model in ERRORS:
        for seed in range(3 if model in records.RNNS else 1):
            make_run(whole, told, model, seed)
    fail_run(whole, "c-tanh", 3)
    part = results / "a&<b"
    told = make_data(part, users - 1, published=None)
    make_run(part, told, "bigram", 0)
    make_run(part, told, "c-gru", 0)
    fail_run(part, "hmm", 0)
    make_run(part, told, "mf", 0, data_sha256="of other data")
    make_data(results / "lastfm", users, "Last.fm-1K", "lastfm", is_paper=True)
    rows = [
        {
            "model": model,
            "device": "CPU",
            "hidden_size": size,
            "users": 508,
            "users_note": "400 of 508 users <kept>" if size > 256 else None,
            "seconds_per_epoch": 0.1 * size ** (1.6 if model == "C-GRU" else 1.2),
            "scaled": size > 64,
            "measured_seconds": 30.0,
            "peak_gb": 1.25,
            "events_per_second": 1e6 / size,
        }
        for model in ("C-GRU", "P-GRU")
        for size in (16, 32, 64, 128, 256, 512, 768)
    ]
    told = {"data": "brightkite-part", "machine": MACHINE, "date": "2026-11-21", "rows": rows}
    write_json(results / "epoch_time.json", told)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = make_results(tmp_path_factory.mktemp("results"))
    assert report.write(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def page(results):
    return (results / "report.html").read_text("utf-8")


def table(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def record(path):
    return json.loads(path.read_text())


class Tags(HTMLParser):
    """Ids, addresses, cells of each table by its box's id; fails where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.cells = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs["href"]] if tag == "a" else []
        if attrs.get("class") == "scroll":
            self.rows = self.cells.setdefault(attrs["id"], [])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append(["", []])
        if tag == "a" and {"td", "th"} & set(self.open):
            self.rows[-1][-1][1].append(attrs["href"])

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_data(self, text):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1][0] += text

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def tags(page):
    return Tags(page)


def row(tags, key, name):
    return next(r for r in tags.cells[key] if r[0][0].startswith(name))


def test_tables(results):
    folder = results / "brightkite-part"
    nll = [record(folder / f"c-gru-{seed}.json")["scores"]["nll"] for seed in range(3)]
    rows = table(folder / "table2.csv")
    assert [r["model"] for r in rows] == [
        *("unigram", "mf", "hmm", "bigram", "c-gru", "uniform", "personal", "mixture")
    ]
    found = rows[4]
    assert float(found["nll"]) == pytest.approx(np.mean(nll), abs=1e-6)
    assert float(found["nll_sd"]) == pytest.approx(np.std(nll, ddof=1), abs=1e-6)
    assert (found["seeds"], found["published_nll"]) == ("3", "6.020000")
    assert (rows[0]["nll_sd"], rows[0]["seeds"]) == ("", "1")
    assert rows[6]["published_nll"] == ""
    rows = table(folder / "figure1_left.csv")
    assert [r["published_nll"] for r in rows] == ["6.450000", "6.080000", "6.020000"]
    rows = {r["quantity"]: r for r in table(folder / "table1.csv")}
    assert (rows["events"]["measured"], rows["events"]["published"]) == ("185000", "599618")
    rows = {r["model"]: r for r in table(folder / "errors.csv")}
    assert list(rows) == list(records.NAMES)
    assert float(rows["p-gru"]["mrr@20"]) == pytest.approx(0.2 - 0.055 + 0.001, abs=1e-6)
    assert float(rows["p-gru"]["mrr@20_sd"]) == pytest.approx(0.001, abs=1e-6)


def test_bins_of_equal_numbers_of_users(results):
    folder = results / "brightkite-part"
    rows = table(folder / "figure2.csv")
    assert [int(r["user"]) for r in rows] == list(range(30))
    bins = {k: [float(r["entropy"]) for r in rows if r["bin"] == k] for k in records.BINS}
    assert [len(values) for values in bins.values()] == [10, 10, 10]
    assert max(bins["low"]) <= min(bins["middle"])
    assert max(bins["middle"]) <= min(bins["high"])
    errors = [record(folder / f"c-gru-{s}.json")["per_user"]["nll"][7] for s in range(3)]
    assert float(rows[7]["c-gru"]) == pytest.approx(np.mean(errors), abs=1e-6)


def test_what_is_missing_stays_empty(results, tags):
    rows = {r["model"]: r for r in table(results / "a&<b" / "errors.csv")}
    assert (rows["hmm"]["nll"], rows["hmm"]["seeds"], rows["mf"]["nll"]) == ("", "0", "")
    assert rows["c-gru"]["nll"] != ""
    assert table(results / "lastfm" / "figure2.csv") == []
    # Folders are in order of their names: data1 is "a&<b", data2 brightkite-part, data3 lastfm.
    assert row(tags, "data1-table2", "HMM")[1] == ["failed", []]
    assert row(tags, "data1-table2", "MF")[1] == ["not run", []]
    assert row(tags, "data1-table2", "C-GRU")[1][1] == ["a%26%3Cb/c-gru-0.json"]
    assert [cell for cell, _ in tags.cells["data1-table2"][0]] == ["Model", "Measured"]
    for _, number, published in tags.cells["data3-table2"][1:]:
        assert number == ["not run", []]
        assert published[1] == []
    assert row(tags, "data3-table2", "Unigram")[2][0] == "8.60"


def test_measured_beside_published(tags):
    found = row(tags, "data2-table2", "C-GRU")
    assert re.fullmatch(r"\d\.\d{3} ± 0\.\d{3} seeds 0 1 2", found[1][0])
    assert found[1][1] == [f"brightkite-part/c-gru-{seed}.json" for seed in range(3)]
    assert found[2][0] == "6.02"
    assert "beyond the paper" in row(tags, "data2-table2", "Personal")[0][0]
    assert [cell for cell, _ in row(tags, "data3-table1", "Users")] == ["Users", "30", "954"]


def test_every_measured_number_has_a_link(results, page, tags):
    for link in tags.links:
        if not link.startswith("#"):
            assert (results / unquote(link)).is_file(), link
        else:
            assert link[1:] in tags.ids
    for key, rows in tags.cells.items():
        head = [name for name, _ in rows[0]]
        for name, cell in ((n, c) for r in rows[1:] for n, c in zip(head, r, strict=True)):
            if name in ("Measured", "Worse", "Better", "Here", "C-GRU", "Bigram", "Perplexity"):
                assert cell[1] or cell[0] in ("not run", "failed", "not known", "yes", "no"), key
    assert len(set(tags.ids)) == len(tags.ids)


def test_the_order(tmp_path, tags):
    found = {r[0][0]: [cell for cell, _ in r[1:]] for r in tags.cells["data2-order"][1:]}
    assert len(found) == 7
    assert {cells[0] for cells in found.values()} == {"yes"}
    assert {cells[3] for cells in found.values()} == {"yes"}
    found = [[cell for cell, _ in r] for r in tags.cells["data1-order"][1:]]
    assert [r[1] for r in found] == ["not known"] * 5 + ["yes", "not known"]
    folder = tmp_path / "turned"
    told = make_data(folder, 9)
    for model, nll in (("c-gru", 6.0), ("bigram", 5.0)):
        make_run(folder, told, model, 0, scores={"nll": nll, "perplexity": 1.0} | FLAT)
    report.write(tmp_path)
    found = Tags((tmp_path / "report.html").read_text("utf-8")).cells["data1-order"]
    assert [r[1][0] for r in found[-2:]] == ["no", "no"]
    assert [cell for cell, _ in found[-1][2:4]] == ["5.000", "6.000"]


FLAT = {"recall@20": 0.1, "mrr@20": 0.1}


def test_text_is_escaped_and_errors_are_told(page, tags):
    assert "Some &lt;shop&gt; &amp; more" in page
    assert "<shop>" not in page
    assert "MemoryError: &lt;no&gt; room &amp; more" in page
    assert "left out, made on other data" in page
    assert "Not the paper’s data: Some &lt;shop&gt; &amp; more; Brightkite, a part.<" in page
    assert not re.search(r"<script|<link|https?://(?!www\.w3\.org/)", page)


def test_a_report_made_again_has_the_same_bytes(results, tmp_path):
    again = shutil.copytree(results, tmp_path / "again")
    tables = sorted(again.rglob("*.csv"))
    before = [path.read_bytes() for path in tables]
    for path in again.glob("*/*-*.json"):
        run = record(path)
        write_json(path, run | {"seconds": 1.5, "epoch_seconds": [], "date": "2027-01-01"})
    for path in tables:
        path.unlink()
    report.write(again)
    assert sorted(again.rglob("*.csv")) == tables
    assert [path.read_bytes() for path in tables] == before
    page = (again / "report.html").read_bytes()
    report.write(again)
    assert (again / "report.html").read_bytes() == page


def test_without_anything(tmp_path):
    result = CliRunner().invoke(report.main, [str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(tmp_path / "report.html")
    assert "no data set yet" in (tmp_path / "report.html").read_text("utf-8")


def test_curves_of_the_best_trial(tmp_path):
    folder = tmp_path / "shop"
    told = make_data(folder, 9)
    epochs = [
        {"phase": "train", "epoch": k, "loss": 5.0 / k, "validation_nll": None} for k in (1, 2)
    ]
    make_run(folder, told, "c-gru", 0, epochs=epochs)
    for k, best in enumerate((5.5, 5.4)):
        make_run(folder, told, "c-gru", k + 1, validation_nll=best)
        (folder / "trials").mkdir(exist_ok=True)
        (folder / f"c-gru-{k + 1}.json").rename(folder / "trials" / f"c-gru-rate={k}.json")
    of = records.read(folder)
    assert len(of.runs["c-gru"]) == 1
    loss, validation = figures.draw_curves(of).axes
    (line,) = loss.lines
    assert line.get_ydata().tolist() == [5.0, 2.5]
    (line,) = validation.lines
    expected = [e["validation_nll"] for e in of.trials["c-gru"][1]["epochs"]]
    assert line.get_ydata().tolist() == expected


def test_epoch_time_as_a_file(results, tmp_path):
    report.draw_epoch_time(record(results / "epoch_time.json"), tmp_path / "time.svg")
    assert "hidden size D" in (tmp_path / "time.svg").read_text("utf-8")


PROBE = """<pre id="probe"></pre><iframe id="page" src="report.html" width="{width}" height="900"
style="border:0"></iframe><script>
document.getElementById("page").onload = e => {{
  const page = e.target.contentDocument, root = page.documentElement;
  const seen = q => [...page.querySelectorAll(q)].filter(x => x.getBoundingClientRect().height > 9);
  document.getElementById("probe").textContent = JSON.stringify({{
    width: root.clientWidth, scroll: Math.max(root.scrollWidth, page.body.scrollWidth),
    tables: seen(".scroll table").map(x => x.parentNode.id), figures: seen("figure .card").length,
    wide: [...page.querySelectorAll("svg, p, h1, h2, h3, li, .scroll")]
      .filter(x => x.getBoundingClientRect().right > root.clientWidth + 1).map(x => x.outerHTML)
  }});
}};</script>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("width", [360, 390, 1280])
def test_in_a_browser(results, tags, width, tmp_path):
    (results / "probe.html").write_text(PROBE.format(width=width), "utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update"
    flags += " --allow-file-access-from-files --virtual-time-budget=10000 --dump-dom"
    command = [BROWSER, *flags.split(), f"--user-data-dir={tmp_path}"]
    address = (results / "probe.html").as_uri()
    dom = subprocess.run(
        [*command, address], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    found = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', dom, re.DOTALL)[1])
    assert found["scroll"] <= found["width"] <= width
    assert found["wide"] == []
    assert found["tables"] == list(tags.cells)
    assert found["figures"] == 3 * 4 + 1
