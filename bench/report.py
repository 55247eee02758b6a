"""The page and the tables of ``make reproduce``, from the runs at hand.

    python bench/report.py RESULTS

Writes RESULTS/report.html, one page that needs neither network nor script, and a CSV a table into
each data set's folder. Every measured number links to the run it comes from. A model without a run
stays empty. Published numbers come from ``published.toml``.
"""

import csv
import io
import json
import statistics
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import click
import figures
import numpy as np
from figures import draw_epoch_time as draw_epoch_time
from figures import svg
from records import BEYOND, BINS, NAMES, RNNS, STATIC, TABLE2, DataSet, Score, read

CSS = Path(__file__).with_suffix(".css").read_text("utf-8")
MEASURES = ("nll", "recall@20", "mrr@20")
NOT_RUN = '<span class="none">not run</span>'


# ---------------------------------------------------------------- the tables as CSV


def write_csv(path: Path, head: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Floats with six decimals, None as an empty cell."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(head)
    for row in rows:
        table.writerow([f"{x:.6f}" if isinstance(x, float) else x for x in row])
    path.write_text(text.getvalue(), encoding="utf-8")


def table1(of: DataSet) -> list[tuple[str, str, float | int, float | int | None]]:
    """Key, name, measured and published value of each column of the paper's Table 1."""
    facts, published = of.facts, of.published["table1"]
    facts = facts | {"events": facts["train_events"] + facts["heldout_events"]}
    names = {
        "users": "Users",
        "items": "Items",
        "events": "Events",
        "train_events": "of these in the training part",
        "heldout_events": "of these held out",
        "uniform_nll": "Error of uniform",
    }
    return [(key, name, facts[key], published.get(key)) for key, name in names.items()]


def write_tables(of: DataSet, folder: Path) -> None:
    """All tables of a data set; nothing but the data and the runs' errors is in them."""
    rows = [(key, measured, published) for key, _, measured, published in table1(of)]
    write_csv(folder / "table1.csv", ("quantity", "measured", "published"), rows)
    for table in ("table2", "figure1_left"):
        rows = []
        for model in of.known(table):
            score = of.score(model) or Score(None, None, 0)
            rows.append((model, *score, of.published[table].get(model)))
        head = ("model", "nll", "nll_sd", "seeds", "published_nll")
        write_csv(folder / f"{table}.csv", head, rows)
    rows = [(u, entropy, BINS[k], *errors) for u, entropy, k, *errors in of.users()]
    write_csv(folder / "figure2.csv", ("user", "entropy", "bin", "c-gru", "bigram"), rows)
    rows = []
    for model in NAMES:
        scores = [of.score(model, measure) or Score(None, None, 0) for measure in MEASURES]
        pairs = [x for score in scores for x in score[:2]]
        rows.append((model, len(of.runs[model]), *pairs))
    head = [f"{measure}{end}" for measure in MEASURES for end in ("", "_sd")]
    write_csv(folder / "errors.csv", ("model", "seeds", *head), rows)


# ---------------------------------------------------------------- the page


def link(href: str, text: str) -> str:
    return f'<a href="{escape(href)}">{escape(text)}</a>'


def unbroken(model: str) -> str:
    """A model's name that is never broken at its hyphen."""
    return f'<span class="name">{NAMES[model]}</span>'


def measured(of: DataSet, model: str, measure: str = "nll", digits: int = 3) -> str:
    """A measured number: a run's with its address, or a mean over runs with theirs."""
    score = of.score(model, measure)
    if score is None:
        failed = any(run["model"] == model and "/trials/" not in run["href"] for run in of.failed)
        return '<span class="none">failed</span>' if failed else NOT_RUN
    if score.n == 1:
        return link(of.runs[model][0]["href"], f"{score.mean:.{digits}f}")
    return f"{score.mean:.{digits}f} ± {score.spread:.{digits}f} {seeds(of, model)}"


def seeds(of: DataSet, model: str) -> str:
    """A small link for each run of a model."""
    links = " ".join(link(run["href"], str(run["seed"])) for run in of.runs[model])
    return f'<small class="seeds">seeds {links}</small>'


def table(key: str, caption: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in a box of its own that scrolls; the first cell of each row heads it."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for first, *cells in rows:
        lines.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{c}</td>" for c in cells))
    body = "</tr>\n".join(lines) + "</tr>" if lines else ""
    return (
        f'<div class="table"><p class="caption" id="{key}-caption">{caption}</p>'
        f'<div class="scroll" id="{key}" tabindex="0" role="region" '
        f'aria-labelledby="{key}-caption">'
        f"<table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div></div>"
    )


def figure(key: str, title: str, drawn: str, caption: str) -> str:
    return (
        f'<figure id="{key}"><h3>{escape(title)}</h3><div class="card">{drawn}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def best(values: dict[str, float | None]) -> str | None:
    """The model with the lowest error."""
    there = {model: value for model, value in values.items() if value is not None}
    return min(there, key=there.get) if there else None


def verdict(worse: float | None, better: float | None) -> str:
    """Whether one error is over another."""
    if worse is None or better is None:
        return '<span class="none">not known</span>'
    answer = "yes" if worse > better else "no"
    return f'<b class="{answer}">{answer}</b>'


def order_rows(of: DataSet) -> Iterable[list[str]]:
    """The paper's claims, each with its two numbers and whether they hold here and there."""
    published = of.published["figure1_left"] | of.published["table2"]
    scores = {model: of.score(model) for model in (*TABLE2, *RNNS)}
    found = {model: score and score.mean for model, score in scores.items()}
    claims = [(model, "bigram") for model in STATIC] + [("bigram", model) for model in RNNS]
    for worse, better in claims:
        cells = [f"{unbroken(worse)} is worse than {unbroken(better)}"]
        cells += [verdict(found[worse], found[better]), measured(of, worse), measured(of, better)]
        if published:
            cells.append(verdict(published.get(worse), published.get(better)))
        yield cells
    others = {model: found[model] for model in found if model != "c-gru"}
    rival, ours = best(others), found["c-gru"]
    whole = None not in others.values()
    lost = rival is not None and ours is not None and others[rival] <= ours
    answer = verdict(others[rival], ours) if whole or lost else verdict(None, None)
    after = f" (next: {unbroken(rival)})" if rival else ""
    cells = [f"{unbroken('c-gru')} is the best of the paper’s models{after}", answer]
    cells += [measured(of, rival) if rival else NOT_RUN, measured(of, "c-gru")]
    if published:
        theirs = min(value for model, value in published.items() if model != "c-gru")
        cells.append(verdict(theirs, published["c-gru"]))
    yield cells


def csv_link(of: DataSet, name: str) -> str:
    return f" ({link(quote(of.facts['name']) + f'/{name}.csv', 'CSV')})"


def errors_table(of: DataSet, key: str) -> str:
    """Table 2, measured beside published, the lowest error of each column in bold."""
    published = of.published["table2"]
    models = of.known("table2")
    lowest = best({model: (of.score(model) or Score(None, None, 0)).mean for model in models})
    lowest_published = best(published)
    rows = []
    for model in models:
        cells = [NAMES[model], measured(of, model)]
        if model in BEYOND:
            cells[0] += ' <small class="beyond">beyond the paper</small>'
        if model == lowest:
            cells[1] = f"<b>{cells[1]}</b>"
        if published:
            number = f"{published[model]:.2f}" if model in published else ""
            cells.append(f"<b>{number}</b>" if model == lowest_published else number)
        rows.append(cells)
    caption = "<b>Table 2.</b> Eq. 3 error in nats per event; lower is better, the best is bold."
    head = ["Model", "Measured", *(["Published"] if published else [])]
    return table(key, caption + csv_link(of, "table2"), head, rows)


def bins_table(of: DataSet, key: str) -> str:
    """The numbers behind Figure 2."""
    rows, users = [], of.users()
    for k, bin_name in enumerate(BINS):
        inside = [row for row in users if row[2] == k]
        if not inside:
            continue
        cells = [bin_name, str(len(inside))]
        cells.append(f"{min(r[1] for r in inside):.2f} to {max(r[1] for r in inside):.2f}")
        for model, column in (("c-gru", 3), ("bigram", 4)):
            values = [row[column] for row in inside if row[column] is not None]
            cell = NOT_RUN
            if values:
                cell = f"{np.mean(values):.3f} ± {np.std(values):.3f} {seeds(of, model)}"
            cells.append(cell)
        rows.append(cells)
    caption = "<b>Figure 2 in numbers.</b> Mean ± standard deviation over the users of a bin, nats."
    head = ("Entropy", "Users", "Nats", NAMES["c-gru"], NAMES["bigram"])
    nothing = [[NOT_RUN, "", "", NOT_RUN, NOT_RUN]]
    return table(key, caption + csv_link(of, "figure2"), head, rows or nothing)


def section(of: DataSet, key: str) -> str:
    """All of a data set."""
    facts, published = of.facts, of.published
    paper = published.get("title")
    source = link(f"{quote(facts['name'])}/data.json", "data.json")
    note = f"{escape(facts['note'][:1].upper() + facts['note'][1:])}. " if facts["note"] else ""
    text = f"<p>{note}Facts of the data: {source}.</p>"
    if paper and not facts["is_paper"]:
        text += (
            f'<p class="warn">These are not the paper’s data. Numbers published for {escape(paper)}'
            " stand beside them to compare the order of the models, not the values.</p>"
        )
    rows = []
    for _, name, value, theirs in table1(of):
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
        cells = [name, link(f"{quote(facts['name'])}/data.json", shown)]
        rows.append(cells + ([f"{theirs:,}" if theirs else ""] if paper else []))
    column = ["Published"] if paper else []
    parts = [
        table(
            f"{key}-table1",
            "<b>Table 1.</b> The data; the error in nats per event." + csv_link(of, "table1"),
            ["", "Here", *column],
            rows,
        ),
        errors_table(of, f"{key}-table2"),
        table(
            f"{key}-order",
            "<b>Does the paper’s order hold?</b> Computed from the errors, Eq. 3 in nats.",
            ["Claim", "Here", "Worse", "Better", *(["Paper"] if paper else [])],
            order_rows(of),
        ),
        bins_table(of, f"{key}-bins"),
    ]
    rows = []
    for model in NAMES:
        cells = [measured(of, model, "nll"), measured(of, model, "perplexity", 1)]
        cells += [measured(of, model, name, 4) for name in MEASURES[1:]]
        sizes = {run["parameters"] for run in of.runs[model]} - {None}
        size = " / ".join(f"{n:,}" for n in sorted(sizes))
        if size:
            size = link(of.runs[model][0]["href"], size)
        rows.append([NAMES[model], *cells, str(len(of.runs[model])), size])
    head = ("Model", "Eq. 3 (nats)", "Perplexity", "Recall@20", "MRR@20", "Runs", "Parameters")
    caption = (
        "<b>All measures.</b> Means over users of each user’s mean; mean ± standard deviation over "
        "seeds; for Recall and MRR higher is better." + csv_link(of, "errors")
    )
    measures = table(f"{key}-measures", caption, head, rows)
    marks = "Diamonds: the paper’s values. " if published["figure1_left"] else ""
    shown = (
        ("figure1-left", "Figure 1, left: recurrent networks", figures.draw_figure1_left,
         f"{marks}Lower (left) is better." + csv_link(of, "figure1_left"),
         "Errors of P-GRU, C-tanh and C-GRU"),
        ("figure2", "Figure 2: users by difficulty", figures.draw_figure2,
         "Users in three bins of equal numbers. Bars: quartiles; dots: medians; "
         "solid lines: means of all users; a user’s error is the mean over seeds."
         + csv_link(of, "figure2"),
         "Distribution of the users' errors of C-GRU and bigram in three bins by entropy"),
        ("curves", "Learning curves", figures.draw_curves,
         "One line a run; with early stopping, of its part before the refit. Where the runs of a "
         "model have no validation part, the error is that of the best trial on it.",
         "Training loss and validation error per epoch of the recurrent networks"),
        ("users", "Error of each user against entropy", figures.draw_users,
         "One mark a user and model." + csv_link(of, "figure2"),
         "Each user's error against the entropy of the training sequence, C-GRU and bigram"),
    )  # fmt: skip
    drawn = []
    for name, title, draw, caption, alt in shown:
        picture = svg(draw, of, f"{key}-{name}-svg", alt)
        drawn.append(figure(f"{key}-{name}", title, picture or NOT_RUN, caption))
    title = escape(facts["title"])
    return (
        f'<section id="{key}"><h2>{title}</h2>{text}<div class="grid">{"".join(parts)}</div>'
        f'{measures}<div class="grid">{"".join(drawn)}</div></section>'
    )


def epoch_section(found: dict[str, Any]) -> str:
    """Figure 1 right and its points."""
    drawn = svg(
        figures.epoch_time_figure, found, "epoch-time-svg", "Seconds per epoch by hidden size"
    )
    rows = []
    for row in sorted(found["rows"], key=lambda row: (row["model"], row["hidden_size"])):
        how = f"scaled up from {row['measured_seconds']:.1f} s" if row["scaled"] else "whole epoch"
        note = f"; {row['users_note']}" if row["users_note"] else ""
        cells = [unbroken(row["model"].lower()), str(row["hidden_size"]), escape(row["device"])]
        cells.append(link("epoch_time.json", f"{row['seconds_per_epoch']:,.1f}"))
        cells.append(link("epoch_time.json", f"{row['events_per_second']:,.0f}"))
        cells.append(link("epoch_time.json", f"{row['peak_gb']:.2f}"))
        rows.append([*cells, escape(how + note)])
    head = ("Model", "D", "Device", "Seconds an epoch", "Events/s", "Peak GB", "How")
    shown = table("epoch-time-table", "<b>Figure 1, right, in numbers.</b>", head, rows)
    where = f"Measured on {escape(found['data'])}, {escape(machine(found))}, {found['date']}."
    caption = f"Hollow marks: scaled up from part of an epoch or of the users. {where}"
    title = "Figure 1, right: time of an epoch"
    return (
        f'<section id="epoch-time"><h2>Time of an epoch</h2><div class="grid">'
        f"{figure('figure1-right', title, drawn, caption)}</div>{shown}</section>"
    )


def machine(record: dict[str, Any]) -> str:
    at = record["machine"]
    return f"{at['processor']}, {at['cores']} cores, {at['memory_gb']} GB"


def times_section(sets: list[DataSet]) -> str:
    """What each model's runs took, and with which settings."""
    rows = []
    for of in sets:
        for model, runs in of.runs.items():
            if not runs:
                continue
            took = ", ".join(link(run["href"], f"{run['seconds']:,.2f}") for run in runs)
            epochs = ", ".join(str(len(run["epoch_seconds"])) for run in runs)
            per = [x for run in runs for x in run["epoch_seconds"]]
            each = f"{statistics.median(per):,.2f}" if per else ""
            settings = {
                ", ".join(f"{k} {v}" for k, v in run["settings"].items() if k != "seed")
                for run in runs
            }
            places = {f"{machine(run)}, threads: {run['threads']}" for run in runs}
            cells = [f"{escape(of.facts['title'])}: {unbroken(model)}", took, epochs if per else ""]
            cells += [
                each,
                escape("; ".join(sorted(places))),
                escape("; or ".join(sorted(settings))),
            ]
            rows.append(cells)
    head = ("Model", "Seconds, by seed", "Epochs", "Median epoch (s)", "Machine", "Settings")
    caption = "<b>Times of the runs.</b> Training only; of a baseline with its choice of settings."
    shown = table("times", caption, head, rows)
    return f'<section id="runs"><h2>Times and settings</h2>{shown}</section>'


def trouble(sets: list[DataSet]) -> str:
    """Runs that failed or were made on other data, each with what it says."""
    lines = []
    for of in sets:
        for run in of.failed:
            what = f"{of.facts['title']}: {NAMES[run['model']]}, seed {run['seed']}"
            lines.append(f"<li>{link(run['href'], what)}: {escape(run['error'] or '')}</li>")
        for run in of.stale:
            what = f"{of.facts['title']}: {NAMES[run['model']]}, seed {run['seed']}"
            lines.append(f"<li>{link(run['href'], what)}: left out, made on other data</li>")
    if not lines:
        return ""
    title = "Failed runs and runs left out"
    return f'<section id="failed"><h2>{title}</h2><ul>{"".join(lines)}</ul></section>'


def head(sets: list[DataSet]) -> str:
    """What was measured, where, when and with what."""
    runs = [run for of in sets for model in of.runs.values() for run in model]
    titles = "; ".join(escape(of.facts["title"]) for of in sets) or "no data set yet"
    text = f"<p>Errors of the paper’s models on: {titles}"
    if runs:
        dates = sorted({run["date"] for run in runs})
        versions = {", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in runs}
        places = "; ".join(sorted({machine(run) for run in runs}))
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        text += f". Measured on {escape(places)}; {when}; {escape('; or '.join(sorted(versions)))}"
    text += ". Every measured number links to the run it comes from.</p>"
    other = [escape(of.facts["title"]) for of in sets if not of.facts["is_paper"]]
    if other:
        text += f'<p class="warn">Not the paper’s data: {"; ".join(other)}.</p>'
    return text


def write(results: Path) -> Path:
    """Write the page and the CSVs from the runs in a folder.

    Parameters
    ----------
    results : Path
        Has a folder with ``data.json`` for each data set, and maybe ``epoch_time.json``.

    Returns
    -------
    Path
        ``report.html`` in it.
    """
    results = Path(results)
    sets = [read(file.parent) for file in sorted(results.glob("*/data.json"))]
    for of in sets:
        write_tables(of, results / of.facts["name"])
    sections = [section(of, f"data{k}") for k, of in enumerate(sets, 1)]
    links = [link(f"#data{k}", of.facts["title"]) for k, of in enumerate(sets, 1)]
    timing = results / "epoch_time.json"
    if timing.exists():
        sections.append(epoch_section(json.loads(timing.read_text("utf-8"))))
        links.append(link("#epoch-time", "Time of an epoch"))
    sections += [times_section(sets), trouble(sets)]
    links.append(link("#runs", "Times and settings"))
    links += [link("#failed", "Failed runs")] if sections[-1] else []
    title = "Collaborative recurrent neural networks: the paper’s tables and figures"
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{CSS}</style></head>\n<body><header><h1>{title}</h1>"
        f"{head(sets)}<nav>{' '.join(links)}</nav></header>\n<main>{''.join(sections)}</main>"
        "</body></html>\n"
    )
    path = results / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


@click.command()
@click.argument("results", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(results: Path) -> None:
    """Write the page and the tables from the runs in RESULTS."""
    click.echo(write(results))


if __name__ == "__main__":
    main()
