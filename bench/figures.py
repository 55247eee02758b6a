"""The figures of ``make reproduce``; each is None where none of its models was run."""

import io
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from records import BINS, NAMES, RNNS, DataSet

ERROR = "Eq. 3 error (nats per event)"
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


# ---------------------------------------------------------------- the figures


def new_figure(height: float, rows: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, sharex=True)


def legend(axes: Any, columns: int) -> None:
    """A legend above the axes, where it covers nothing."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2,
            columnspacing=1.2, handletextpad=0.5,
        )  # fmt: skip


def draw_figure1_left(of: DataSet) -> Figure | None:
    """Errors of the RNNs: every seed, the mean with its spread, what the paper has."""
    if not (of.published["figure1_left"] or any(of.runs[model] for model in RNNS)):
        return None
    figure, axes = new_figure(2.3)
    labels = {"seed": "one seed", "mean": "mean ± std. dev.", "published": "published"}
    for y, model in enumerate(RNNS):
        score, published = of.score(model), of.published["figure1_left"].get(model)
        if score:
            values = [run["scores"]["nll"] for run in of.runs[model]]
            axes.plot(
                values, [y] * len(values), "o", color=COLORS[model], markersize=5,
                alpha=0.45 if score.spread else 1, markeredgewidth=0,
                label=labels.pop("seed", None),
            )  # fmt: skip
            if score.spread is not None:
                axes.errorbar(
                    score.mean, y, xerr=score.spread, color=COLORS[model], fmt="|", capsize=4,
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
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel(ERROR)
    legend(axes, 3)
    return figure


def draw_figure2(of: DataSet) -> Figure | None:
    """Errors of the users in three bins by entropy."""
    rows = of.users()
    if not rows:
        return None
    figure, axes = new_figure(3.3)
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
            mean = f"{NAMES[model]}, mean"
            axes.axhline(np.mean(errors), color=color, linewidth=1.4, zorder=0.5, label=mean)
    uniform = of.facts["uniform_nll"]
    axes.axhline(uniform, color="#333333", linewidth=1.2, linestyle="--", label="uniform")
    axes.set_xticks(range(len(BINS)), BINS)
    axes.set_xlim(-0.5, len(BINS) - 0.5)
    axes.set_xlabel("users by the entropy of their training sequence")
    axes.set_ylabel(ERROR)
    axes.set_ylim(bottom=0)
    legend(axes, 3)
    return figure


def draw_curves(of: DataSet) -> Figure | None:
    """Training loss and validation error per epoch; the best trial's where the runs have none."""
    if not any(of.runs[model] for model in RNNS):
        return None
    figure, (loss, validation) = new_figure(4.4, 2)
    for model in RNNS:
        runs = of.runs[model]
        seen = [run for run in runs if any(e["validation_nll"] is not None for e in run["epochs"])]
        tried = sorted(of.trials[model], key=lambda run: run["validation_nll"])[:1]
        panels = (
            (loss, runs, ("train", "choose"), "loss"),
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
    loss.set_ylabel("training loss (nats)")
    validation.set_ylabel("validation error (nats)")
    validation.set_xlabel("epoch")
    validation.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not validation.lines:
        validation.set_yticks([])
        validation.text(
            0.5, 0.5, "no epoch was validated", ha="center", transform=validation.transAxes
        )
    legend(loss, 3)
    return figure


def draw_users(of: DataSet) -> Figure | None:
    """Each user's error against the entropy of the training sequence."""
    rows = of.users()
    if not rows:
        return None
    figure, axes = new_figure(3.3)
    for model, column, mark in (("bigram", 4, "^"), ("c-gru", 3, "o")):
        pairs = [(r[1], r[column]) for r in rows if r[column] is not None]
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
    legend(axes, 3)
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
    legend(axes, 3)
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


def svg(draw: Callable[[Any], Figure | None], of: Any, key: str, alt: str) -> str:
    """A figure as part of a page, empty where there is none; its ids begin with `key`."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = draw(of)
        if figure is None:
            return ""
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
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
