"""The page and the tables of ``make reproduce``, from the runs at hand.

    python bench/report.py RESULTS

Writes RESULTS/report.html, one page that needs neither network nor script, and a CSV a table into
each data set's folder. Every measured number links to the run it comes from. A model without a run
stays empty. Published numbers come from ``published.toml``.
"""

import csv
import io
import json
import re
import statistics
import tomllib
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import click
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

PUBLISHED = tomllib.loads(Path(__file__).with_name("published.toml").read_text("utf-8"))
NAMES = {
    "uniform": "Uniform",
    "unigram": "1-gram",
    "bigram": "2-gram",
    "personal": "Personal",
    "mf": "MF",
    "hmm": "HMM",
    "p-gru": "P-GRU",
    "c-tanh": "C-tanh",
    "c-gru": "C-GRU",
}
STATIC, RNNS = ("unigram", "mf", "hmm"), ("p-gru", "c-tanh", "c-gru")
TABLE2 = ("unigram", "mf", "hmm", "bigram", "c-gru")
BEYOND = ("uniform", "personal")  # rows that Table 2 of the paper has not
MEASURES = ("nll", "recall@20", "mrr@20")
BINS = ("low", "middle", "high")
ERROR = "Eq. 3 error (nats per event)"
NOT_RUN = '<span class="none">not run</span>'
# Okabe and Ito: told apart by every kind of eye.
COLORS = {"c-gru": "#0072B2", "bigram": "#E69F00", "c-tanh": "#D55E00", "p-gru": "#009E73"}
STYLE = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.titlesize": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "crnn_np",
}
WIDTH = 4.2  # inches


class Score(NamedTuple):
    """Mean over a model's runs, standard deviation (None for one run), number of runs."""

    mean: float
    spread: float | None
    n: int


class DataSet(NamedTuple):
    """A data set's folder as read.

    Attributes
    ----------
    facts : dict
        ``data.json``.
    runs : dict of str to list of dict
        Finished runs of each model, by seed; each has its address as ``href``.
    trials : dict of str to list of dict
        Finished trials on the validation part.
    failed, stale : list of dict
        Runs and trials that failed, and those made on other data than ``data.json`` tells.
    """

    facts: dict[str, Any]
    runs: dict[str, list[dict[str, Any]]]
    trials: dict[str, list[dict[str, Any]]]
    failed: list[dict[str, Any]]
    stale: list[dict[str, Any]]

    @property
    def published(self) -> dict[str, dict[str, float]]:
        none = {"table1": {}, "table2": {}, "figure1_left": {}}
        return PUBLISHED.get(self.facts["published"], none)

    def score(self, model: str, measure: str = "nll") -> Score | None:
        values = [run["scores"][measure] for run in self.runs[model]]
        if not values:
            return None
        spread = statistics.stdev(values) if len(values) > 1 else None
        return Score(statistics.fmean(values), spread, len(values))

    def known(self, table: str) -> list[str]:
        """Models of a table of the paper, ours behind them."""
        return [*TABLE2, *BEYOND] if table == "table2" else list(RNNS)

    def per_user(self, model: str) -> dict[int, float]:
        """Each user's error, the mean over the model's runs."""
        errors: dict[int, list[float]] = {}
        for run in self.runs[model]:
            for user, nll in zip(run["per_user"]["user"], run["per_user"]["nll"], strict=True):
                errors.setdefault(user, []).append(nll)
        return {user: statistics.fmean(values) for user, values in sorted(errors.items())}

    def users(self) -> list[tuple[int, float, int, float | None, float | None]]:
        """User, entropy, bin, errors of C-GRU and 2-gram; bins of equal numbers of users."""
        ours, theirs = self.per_user("c-gru"), self.per_user("bigram")
        entropy = self.facts["entropy"]
        ranked = sorted({*ours, *theirs}, key=lambda user: (entropy[user], user))
        rows = []
        for k, part in enumerate(np.array_split(np.array(ranked, int), len(BINS))):
            rows += [(u, entropy[u], k, ours.get(u), theirs.get(u)) for u in part.tolist()]
        return sorted(rows)


def read(folder: Path) -> DataSet:
    """Read a data set's folder."""
    facts = json.loads((folder / "data.json").read_text("utf-8"))
    of = DataSet(facts, {name: [] for name in NAMES}, {name: [] for name in NAMES}, [], [])
    for kept, place in ((of.runs, folder), (of.trials, folder / "trials")):
        for model in NAMES:
            for file in sorted(place.glob(f"{model}-*.json")):
                run = json.loads(file.read_text("utf-8"))
                run["href"] = quote(file.relative_to(folder.parent).as_posix())
                if run.get("data_sha256", facts["sha256"]) != facts["sha256"]:
                    of.stale.append(run)
                elif run["status"] != "done":
                    of.failed.append(run)
                else:
                    kept[model].append(run)
            kept[model].sort(key=lambda run: run["seed"])
    return of


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


# ---------------------------------------------------------------- the figures


def new_figure(height: float, rows: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, sharex=True)


def below(axes: Any, columns: int) -> None:
    """A legend above the axes, where it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2,
            columnspacing=1.2, handletextpad=0.5,
        )  # fmt: skip


def draw_figure1_left(of: DataSet) -> Figure:
    """Errors of the RNNs: every seed, the mean with its spread, what the paper has."""
    figure, axes = new_figure(2.3)
    labels = {"seed": "one seed", "mean": "mean ± std. dev.", "published": "published"}
    for y, model in enumerate(RNNS):
        score, published = of.score(model), of.published["figure1_left"].get(model)
        if score:
            values = [run["scores"]["nll"] for run in of.runs[model]]
            axes.plot(
                values, [y] * len(values), "o", color=COLORS[model], alpha=0.45, markersize=4.5,
                markeredgewidth=0, label=labels.pop("seed", None),
            )  # fmt: skip
            axes.errorbar(
                score.mean, y, xerr=score.spread or 0, color=COLORS[model], fmt="|", capsize=4,
                markersize=16, markeredgewidth=2, label=labels.pop("mean", None),
            )  # fmt: skip
            axes.annotate(
                f"{score.mean:.3f}", (score.mean, y), (0, 11), textcoords="offset points",
                ha="center",
            )  # fmt: skip
        if published is not None:
            axes.plot(
                published, y, "D", color="black", markerfacecolor="none", markersize=6,
                label=labels.pop("published", None),
            )  # fmt: skip
    axes.set_yticks(range(len(RNNS)), [NAMES[model] for model in RNNS])
    axes.set_ylim(len(RNNS) - 0.5, -0.75)
    axes.margins(x=0.14)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(ERROR)
    below(axes, 3)
    return figure


def draw_figure2(of: DataSet) -> Figure:
    """Errors of the users in three bins by entropy."""
    figure, axes = new_figure(3.3)
    rows = of.users()
    for side, model, column in ((-0.2, "c-gru", 3), (0.2, "bigram", 4)):
        color, errors = COLORS[model], []
        for k in range(len(BINS)):
            values = [r[column] for r in rows if r[2] == k and r[column] is not None]
            errors += values
            if not values:
                continue
            body = axes.violinplot(values, [k + side], widths=0.36, showextrema=False)["bodies"][0]
            body.set(facecolor=color, edgecolor=color, alpha=0.45, linewidth=1)
            low, middle, high = np.percentile(values, (25, 50, 75))
            axes.vlines(k + side, low, high, color="#333333", linewidth=3)
            axes.plot(k + side, middle, "o", color="white", markeredgecolor="#333333", markersize=5)
        if errors:
            axes.axhline(np.mean(errors), color=color, linewidth=1.4, label=f"{NAMES[model]}, mean")
    uniform = of.facts["uniform_nll"]
    axes.axhline(uniform, color="#333333", linewidth=1.2, linestyle="--", label="uniform")
    axes.set_xticks(range(len(BINS)), BINS)
    axes.set_xlim(-0.5, len(BINS) - 0.5)
    axes.set_xlabel("users by the entropy of their training sequence")
    axes.set_ylabel(ERROR)
    axes.set_ylim(bottom=0)
    below(axes, 3)
    return figure


def draw_curves(of: DataSet) -> Figure:
    """Training loss and validation error per epoch; the best trial's where the runs have none."""
    figure, (loss, validation) = new_figure(4.4, 2)
    for model in RNNS:
        runs = of.runs[model]
        seen = [run for run in runs if any(e["validation_nll"] is not None for e in run["epochs"])]
        tried = sorted(of.trials[model], key=lambda run: run["validation_nll"])[:1]
        panels = (
            (loss, runs, ("train", "refit"), "loss"),
            (validation, seen or tried, ("choose", "train"), "validation_nll"),
        )
        for axes, shown, phases, key in panels:
            for n, run in enumerate(shown):
                told = [e for e in run["epochs"] if e["phase"] != "keep" and e[key] is not None]
                phase = phases[0] if any(e["phase"] == phases[0] for e in told) else phases[1]
                told = [e for e in told if e["phase"] == phase] or told
                x, y = [e["epoch"] for e in told], [e[key] for e in told]
                label = NAMES[model] if n == 0 else None
                axes.plot(x, y, ".-", color=COLORS[model], lw=0.9, ms=4, label=label)
    loss.set_ylabel("training loss (nats per event)")
    validation.set_ylabel("validation error (nats)")
    validation.set_xlabel("epoch")
    validation.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not validation.lines:
        validation.text(
            0.5, 0.5, "no epoch was validated", ha="center", transform=validation.transAxes
        )
    below(loss, 3)
    return figure


def draw_users(of: DataSet) -> Figure:
    """Each user's error against the entropy of the training sequence."""
    figure, axes = new_figure(3.3)
    for model, column, mark in (("bigram", 4, "^"), ("c-gru", 3, "o")):
        pairs = [(r[1], r[column]) for r in of.users() if r[column] is not None]
        if pairs:
            axes.plot(
                *zip(*pairs, strict=True), mark, color=COLORS[model], alpha=0.5, markersize=3.2,
                markeredgewidth=0, label=NAMES[model],
            )  # fmt: skip
    uniform = of.facts["uniform_nll"]
    axes.axhline(uniform, color="#333333", linewidth=1.2, linestyle="--", label="uniform")
    axes.set_xlabel("entropy of the training sequence (nats)")
    axes.set_ylabel(ERROR)
    axes.set_ylim(bottom=0)
    below(axes, 3)
    return figure


def epoch_time_figure(found: dict[str, Any]) -> Figure:
    """Seconds per epoch against the hidden size, one line for each model and device."""
    figure, axes = new_figure(3.2)
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in sorted(found["rows"], key=lambda row: row["hidden_size"]):
        groups.setdefault((row["model"], row["device"]), []).append(row)
    for (model, device), rows in sorted(groups.items()):
        style = "-" if device == "CPU" else "--"
        x, y = [r["hidden_size"] for r in rows], [r["seconds_per_epoch"] for r in rows]
        color = COLORS[model.lower()]
        axes.plot(x, y, style, color=color, linewidth=1.4, label=f"{model}, {device}")
        for r in rows:
            face = "white" if r["scaled"] else color
            axes.plot(
                r["hidden_size"], r["seconds_per_epoch"], "o", color=color, markerfacecolor=face,
                markersize=5,
            )  # fmt: skip
    axes.plot([], [], "o", color="#333333", markerfacecolor="white", label="scaled up")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({row["hidden_size"] for row in found["rows"]})
    axes.set_xticks(sizes, sizes)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("hidden size D")
    axes.set_ylabel("time of an epoch (seconds)")
    below(axes, 3)
    return figure


def draw_epoch_time(found: dict[str, Any], path: Path) -> None:
    """Figure 1 right as a file of its own.

    Parameters
    ----------
    found : dict
        As ``epoch_time.json``.
    path : Path
        Any format of matplotlib.
    """
    with matplotlib.rc_context(STYLE):
        epoch_time_figure(found).savefig(path)


def svg(draw: Any, of: Any, key: str, alt: str) -> str:
    """A figure inside the page; its ids are made its own."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        draw(of).savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{key}-", drawn)
    box = re.search(r'viewBox="[^"]*"', drawn)[0]
    title = f'<title id="{key}-title">{escape(alt)}</title>'
    opened = (
        f'<svg {box} role="img" aria-labelledby="{key}-title" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink">{title}'
    )
    return re.sub(r"<svg.*?>", lambda _: opened, drawn, count=1, flags=re.DOTALL)


# ---------------------------------------------------------------- the page


def link(href: str, text: str) -> str:
    return f'<a href="{escape(href)}">{escape(text)}</a>'


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
    return f'<small class="seeds">seeds {links}</small>' if links else ""


def table(key: str, caption: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in a box of its own that scrolls; the first cell of each row heads it."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = []
    for first, *cells in rows:
        lines.append(f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{c}</td>" for c in cells))
    body = "</tr>\n".join(lines) + "</tr>" if lines else ""
    return (
        f'<div class="scroll" id="{key}" tabindex="0" role="region" aria-label="{key}">'
        f"<table><caption>{caption}</caption><thead><tr>{top}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>"
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
    """Whether one error is over another, and the two."""
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
        cells = [f"{NAMES[worse]} is worse than {NAMES[better]}"]
        cells += [verdict(found[worse], found[better]), measured(of, worse), measured(of, better)]
        if published:
            cells.append(verdict(published.get(worse), published.get(better)))
        yield cells
    others = {model: found[model] for model in found if model != "c-gru"}
    rival, ours = best(others), found["c-gru"]
    whole = None not in others.values()
    lost = rival is not None and ours is not None and others[rival] <= ours
    answer = verdict(others[rival], ours) if whole or lost else verdict(None, None)
    name = f" (next: {NAMES[rival]})" if rival else ""
    cells = [f"C-GRU is the best of the paper’s models{name}", answer]
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
    for k, name in enumerate(BINS):
        inside = [row for row in users if row[2] == k]
        if not inside:
            continue
        cells = [name, str(len(inside))]
        cells.append(f"{min(r[1] for r in inside):.2f} to {max(r[1] for r in inside):.2f}")
        for model, column in (("c-gru", 3), ("bigram", 4)):
            values = [row[column] for row in inside if row[column] is not None]
            cell = NOT_RUN
            if values:
                runs = " ".join(link(r["href"], str(r["seed"])) for r in of.runs[model])
                cell = f"{np.mean(values):.3f} ± {np.std(values):.3f} "
                cell += f'<small class="seeds">seeds {runs}</small>'
            cells.append(cell)
        rows.append(cells)
    caption = "<b>Figure 2 in numbers.</b> Mean ± standard deviation over the users of a bin, nats."
    head = ("Entropy", "Users", "Nats", NAMES["c-gru"], NAMES["bigram"])
    return table(key, caption + csv_link(of, "figure2"), head, rows)


def number(value: float | int | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def section(of: DataSet, key: str) -> str:
    """All of a data set."""
    facts, published = of.facts, of.published
    paper = published.get("title")
    source = link(f"{quote(facts['name'])}/data.json", "data.json")
    note = f"{escape(facts['note'])}. " if facts["note"] else ""
    text = f"<p>{note}Facts of the data: {source}.</p>"
    if paper and not facts["is_paper"]:
        text += (
            f'<p class="warn">These are not the paper’s data. Numbers published for {escape(paper)}'
            " stand beside them to compare the order of the models, not the values.</p>"
        )
    rows = []
    for _, name, value, theirs in table1(of):
        cells = [name, link(f"{quote(facts['name'])}/data.json", number(value))]
        rows.append(cells + ([f"{theirs:,}" if theirs else ""] if paper else []))
    column = [f"Published, {paper}"] if paper else []
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
            ["Claim", "Here", "Worse", "Better", *(["In the paper"] if paper else [])],
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
    figures = (
        ("figure1-left", "Figure 1, left: recurrent networks", draw_figure1_left,
         f"{marks}Lower (left) is better." + csv_link(of, "figure1_left"),
         "Errors of P-GRU, C-tanh and C-GRU"),
        ("figure2", "Figure 2: users by difficulty", draw_figure2,
         "Users in three bins of equal numbers. Bars: quartiles; dots: medians; "
         "solid lines: means of all users; a user’s error is the mean over seeds."
         + csv_link(of, "figure2"),
         "Distribution of the users' errors of C-GRU and 2-gram in three bins by entropy"),
        ("curves", "Learning curves", draw_curves,
         "One line a run. Where the runs of a model have no validation part, the error is that of "
         "the best trial on it.",
         "Training loss and validation error per epoch of the recurrent networks"),
        ("users", "Error of each user against entropy", draw_users,
         "One mark a user and model." + csv_link(of, "figure2"),
         "Each user's error against the entropy of the training sequence, C-GRU and 2-gram"),
    )  # fmt: skip
    drawn = [
        figure(f"{key}-{name}", title, svg(draw, of, f"{key}-{name}-svg", alt), caption)
        for name, title, draw, caption, alt in figures
    ]
    title = escape(facts["title"])
    return (
        f'<section id="{key}"><h2>{title}</h2>{text}<div class="grid">{"".join(parts)}</div>'
        f'{measures}<div class="grid">{"".join(drawn)}</div></section>'
    )


def epoch_section(found: dict[str, Any]) -> str:
    """Figure 1 right and its points."""
    drawn = svg(epoch_time_figure, found, "epoch-time-svg", "Seconds per epoch by hidden size")
    rows = []
    for row in sorted(found["rows"], key=lambda row: (row["model"], row["hidden_size"])):
        how = f"scaled up from {row['measured_seconds']:.1f} s" if row["scaled"] else "whole epoch"
        note = f"; {row['users_note']}" if row["users_note"] else ""
        cells = [f"{row['model']}, D = {row['hidden_size']}", escape(row["device"])]
        cells.append(link("epoch_time.json", f"{row['seconds_per_epoch']:,.1f}"))
        cells.append(link("epoch_time.json", f"{row['events_per_second']:,.0f}"))
        cells.append(link("epoch_time.json", f"{row['peak_gb']:.2f}"))
        rows.append([*cells, escape(how + note)])
    head = ("Model", "Device", "Seconds an epoch", "Events/s", "Peak GB", "How")
    shown = table("epoch-time-table", "<b>Figure 1, right, in numbers.</b>", head, rows)
    where = f"Measured on {escape(found['data'])}, {escape(machine(found))}, {found['date']}."
    caption = f"Hollow marks: scaled up from part of an epoch or of the users. {where}"
    title = "Figure 1, right: time of an epoch"
    return (
        f'<section id="epoch-time"><h2>Time of an epoch</h2><div class="grid">'
        f"{figure('figure1-right', title, drawn, caption)}{shown}</div></section>"
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
            took = ", ".join(link(run["href"], f"{run['seconds']:,.1f}") for run in runs)
            epochs = ", ".join(str(len(run["epoch_seconds"])) for run in runs)
            per = [x for run in runs for x in run["epoch_seconds"]]
            each = f"{statistics.median(per):,.2f}" if per else ""
            settings = {
                ", ".join(f"{k} {v}" for k, v in run["settings"].items() if k != "seed")
                for run in runs
            }
            places = {f"{machine(run)}, {run['threads']} threads" for run in runs}
            cells = [f"{escape(of.facts['title'])}: {NAMES[model]}", took, epochs if per else ""]
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
    return f'<section id="failed"><h2>Failed runs</h2><ul>{"".join(lines)}</ul></section>'


def head(sets: list[DataSet]) -> str:
    """What was measured, where, when and with what."""
    runs = [run for of in sets for model in of.runs.values() for run in model]
    titles = ", ".join(escape(of.facts["title"]) for of in sets) or "no data set yet"
    text = f"<p>Errors of the paper’s models on {titles}"
    if runs:
        dates = sorted({run["date"] for run in runs})
        versions = {", ".join(f"{k} {v}" for k, v in run["versions"].items()) for run in runs}
        places = "; ".join(sorted({machine(run) for run in runs}))
        when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        text += f", measured on {escape(places)}, {when}, with {escape('; or '.join(versions))}"
    text += ". Every measured number links to the run it comes from.</p>"
    other = [escape(of.facts["title"]) for of in sets if not of.facts["is_paper"]]
    if other:
        text += f'<p class="warn">Not the paper’s data: {", ".join(other)}.</p>'
    return text


CSS = """
:root{color-scheme:light dark;--fg:#1d2329;--bg:#fff;--soft:#5b6570;--line:#d9dee3;--link:#0b5cad;
--warn:#fff6df;--yes:#00694a;--no:#a83f00}
@media(prefers-color-scheme:dark){:root{--fg:#e6e9ec;--bg:#14181c;--soft:#a4adb6;--line:#39424b;
--link:#7db8f2;--warn:#3a3119;--yes:#5fd0a8;--no:#ff9c63}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:74rem;padding:1.2rem .9rem 4rem;color:var(--fg);background:var(--bg);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:.2rem 0 .6rem}
h2{font-size:1.3rem;margin:2.8rem 0 .5rem;padding-top:.6rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:0 0 .4rem}
p{max-width:46rem;margin:.4rem 0}
a{color:var(--link);text-underline-offset:.15em;text-decoration-thickness:1px}
nav a{display:inline-block;margin-right:1rem;padding:.3rem 0}
.warn{background:var(--warn);padding:.5rem .75rem;border-radius:6px}
.grid{display:grid;gap:1.6rem 2rem;margin:1.2rem 0;align-items:start;
grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}
.scroll{overflow-x:auto;min-width:0;max-width:100%}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums;
overflow-wrap:normal}
caption{text-align:left;padding-bottom:.4rem}
th,td{padding:.32rem .9rem .32rem 0;border-bottom:1px solid var(--line);text-align:left;
vertical-align:baseline}
thead th{color:var(--soft);font-weight:600}
tbody th{font-weight:500}
td{white-space:nowrap}
td:last-child{padding-right:.2rem}
#times td:nth-child(n+5),#epoch-time-table td:last-child{white-space:normal;min-width:15rem}
small,.none{color:var(--soft)}
.none{font-style:italic}
.seeds a{padding:0 .18rem}
.beyond{display:block}
.yes{color:var(--yes)}.no{color:var(--no)}
figure{margin:0;min-width:0}
figcaption{color:var(--soft);font-size:.88rem;margin-top:.35rem;max-width:32rem}
.card{background:#fff;border:1px solid var(--line);border-radius:8px;padding:.4rem;max-width:32rem}
svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,sans-serif!important}
"""


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
