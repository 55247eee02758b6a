"""Why a mixture expects what it expects of a user's next event: shares, items, and past events."""

import os
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from .data import EventLog
from .errors import ModelError, SettingsError
from .evaluation import read_past
from .model import MixtureParams, Spec, gather, on_device
from .outputs import EXPERTS, STATIC, Cells, attention, mixture_distributions, recall
from .settings import nearest, whole
from .windows import replay_slices

Array = np.ndarray

MATCHED = ("none", "skip", "one", "two", "three")
"""Names of the context matches that `outputs.recall` counts."""

NEEDED = "explain needs a model with output 'mixture'; train one with --preset mixture"

# Told apart by every kind of eye; the pointers are shades of purple, the faster ones lighter.
COLORS = ("#0072B2", "#E69F00", "#009E73")
MATCH_COLORS = ("#AAAAAA", "#FEC44F", "#EC7014", "#B03A02", "#4D1A03")
MATCH_MARKS = "ovs^D"
DRAWN = 40  # items at most in the picture
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "svg.hashsalt": "crnn_np",
}


class Explanation(NamedTuple):
    """What a mixture expects after a user's last known event, and where from.

    Attributes
    ----------
    user : str
    experts : tuple of str
        Names of the K experts: "softmax", "bigram", "unigram", "pointer" or "pointer 1", ...
    shares : float64[K]
        What the gate gives each expert, g_k; their sum is 1.
    items : object[n]
        Ids of the most probable next items, the most probable first.
    p : float64[n]
        Their probabilities.
    parts : float64[n, K]
        What each expert adds to them, g_k p_k(item).
    past_items : object[M]
        Ids of the past events that the pointers reach; the event of lag s is at s - 1.
    past_times : int64[M] or None
        Their times in seconds since 1970 UTC; None where the data have none.
    match : int64[M]
        How much of what came before them equals what comes before the next event: index in
        `MATCHED`.
    weights : float64[M, P]
        What each pointer adds to the probability of their items, g_k alpha_s.
    """

    user: str
    experts: tuple[str, ...]
    shares: Array
    items: Array
    p: Array
    parts: Array
    past_items: Array
    past_times: Array | None
    match: Array
    weights: Array


def explain(
    backend: ModuleType,
    spec: Spec,
    params: MixtureParams,
    log: EventLog,
    user: str,
    n: int = 10,
) -> Explanation:
    """Explain what is expected of a user's next event.

    Parameters
    ----------
    log : EventLog
        All that is known of the users.
    user : str
        Original id.
    n : int
        Number of items.

    Raises
    ------
    ModelError
        There is no such user, or nothing is known of them.
    SettingsError
        `n` is no whole number from 1.
    """
    n = whole("n", n, 1)
    found = np.flatnonzero(log.user_ids == user)
    if not found.size:
        raise ModelError(f"the model knows no user {user!r}: {nearest(str(user), log.user_ids)}")
    u = int(found[0])
    first, end = log.indptr[u : u + 2]
    if first == end:
        raise ModelError(f"no event of user {user!r} is known, at least 1 is expected")

    own = slice(first, end)
    times = None if log.times is None else log.times[own]
    alone = log._replace(indptr=log.indptr.clip(first, end) - first, items=log.items[own])
    H = _replay(backend, replace(spec, dropout_in=0.0, dropout_out=0.0), params, alone)
    past = read_past(spec, alone, log)
    cells = Cells(np.zeros(1, np.int32), np.array([u], np.int32), alone.indptr[u + 1 : u + 2] - 1)
    p, g = mixture_distributions(H, params.W_out, params.mixture, cells, past, spec.memory)
    parts = (g[0, :, None] * p[0]).T
    total = parts.sum(axis=1)
    best = np.argsort(-total, kind="stable")[:n]

    items, match, there = recall(past, cells, spec.memory)
    alpha = attention(params.mixture, cells, match, there)
    known = there[0]
    return Explanation(
        user,
        (*EXPERTS, *_pointers(spec.pointers)),
        g[0],
        log.item_ids[best],
        total[best],
        parts[best],
        log.item_ids[items[0, known]],
        None if times is None else times[::-1][: known.sum()],
        match[0, known],
        (g[0, STATIC:, None] * alpha[:, 0, known]).T,
    )


def _pointers(n: int) -> list[str]:
    return ["pointer"] if n == 1 else [f"pointer {k + 1}" for k in range(n)]


def _replay(backend: ModuleType, spec: Spec, params: MixtureParams, log: EventLog) -> Array:
    """The state real[1, D] after the sequence of the log's only user with events."""
    run = replay_slices(log.lengths, np.zeros(log.n_users, np.int64), batch=1)
    params = on_device(backend, params)
    s = backend.to_device(np.zeros((1, 1, spec.hidden_size), spec.dtype))
    for k in range(run.key.size):
        window = backend.window(log, run.one(k), spec.dtype)
        A, W_h = gather(backend, spec, params, window, 0)
        states, _ = backend.cell_forward(
            spec.cell_kind, s, spec.init_state, A, W_h, window.event, window.carry
        )
        s = states[-1]
    return backend.to_host(s)[0]


def shorten(text: str, width: int = 24) -> str:
    """A text on one line, without its middle where it is too long."""
    text = " ".join(text.split())
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[:half]}…{text[-half:]}"


def picture(found: Explanation, path: str | os.PathLike) -> None:
    """Draw shares, the first 40 items and past events, to a file of any format of matplotlib.

    Raises
    ------
    SettingsError
        The file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    shades = matplotlib.colormaps["RdPu"](np.linspace(0.45, 1, found.weights.shape[1]))
    colors = [*COLORS, *shades]
    names = [shorten(name) for name in found.items[:DRAWN]]
    heights = [0.24 * len(found.shares) + 0.5, 0.24 * len(names) + 0.5, 2.4]
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # ids in scripts that the font lacks
        figure = Figure(figsize=(7, sum(heights) + 0.6), layout="constrained")
        shares, items, past = figure.subplots(3, height_ratios=heights)
        figure.suptitle(
            f"Next event of user {shorten(found.user)}, after {shorten(found.past_items[0])}",
            parse_math=False,
            fontsize=10,
        )
        _draw_bars(shares, found.experts, found.shares[:, None] * np.eye(len(colors)), colors)
        shares.set_title("share of each expert", loc="left")
        _draw_bars(items, names, found.parts[:DRAWN], colors)
        items.set_title("most probable next items; colours as above", loc="left")
        items.set_xlabel("probability")
        _draw_past(past, found)
        write_figure(figure, path)


def write_figure(figure: Any, path: str | os.PathLike) -> None:
    """Write a figure of matplotlib, in the format that the name ends in, never by half.

    Raises
    ------
    SettingsError
        The file cannot be written.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        figure.savefig(part, format=path.suffix[1:], dpi=150)
        part.replace(path)
    except OSError as error:
        raise SettingsError(f"{path}: the picture could not be written ({error})") from error
    finally:
        part.unlink(missing_ok=True)


def _draw_bars(axes: Any, names: tuple[str, ...] | list[str], parts: Array, colors: list) -> None:
    """A stacked bar for each row of `parts`, the first on top, with its sum behind it."""
    y = np.arange(len(names))
    left = np.zeros(len(names))
    for part, color in zip(parts.T, colors, strict=True):
        axes.barh(y, part, 0.66, left=left, color=color)
        left += part
    for at, total in zip(y, left, strict=True):
        axes.annotate(f"{total:.3f}", (total, at), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(y, names, parse_math=False)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 1.1 * left.max())


def _draw_past(axes: Any, found: Explanation) -> None:
    """The pointers' weight of each past event against its lag, coloured by match."""
    from matplotlib.ticker import NullLocator, ScalarFormatter

    weight = found.weights.sum(axis=1)
    lag = np.arange(1, weight.size + 1)
    for kind, name in enumerate(MATCHED):
        of = found.match == kind
        if of.any():
            axes.plot(
                lag[of], weight[of], MATCH_MARKS[kind], color=MATCH_COLORS[kind], label=name,
                markersize=3 + kind / 2, markeredgewidth=0,
            )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(0.8, 1.25 * weight.size)
    ticks = [
        t for t in (1, 2, 5, 10, 20, 50, 100, 200, 500, *10 ** np.arange(3, 6)) if t <= lag[-1]
    ]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yscale("log")
    axes.set_ylim(max(weight.min(), weight.max() / 1e5) / 2, 2 * weight.max())
    axes.set_xlabel("lag (events)")
    axes.set_ylabel("weight in the mixture")
    axes.set_title("past events by match", loc="left")
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=len(MATCHED), borderaxespad=0.2,
        columnspacing=1, handletextpad=0.1,
    )  # fmt: skip
