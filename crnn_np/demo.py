"""The demo: models trained on a log whose lowest attainable error is known, a table, a picture."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from .baselines import Baseline, Bigram, Uniform, Unigram
from .data import EventLog, from_sequences
from .errors import SettingsError
from .estimator import CollaborativeRNN
from .explain import write_figure
from .synthetic import Drawn, draw

Progress = Callable[[int, int], object]
Model = Baseline | CollaborativeRNN

# Chosen on a validation part cut from the training part of the demo's log. With these sizes each
# of the three has about 25,600 parameters, and takes about as long to train.
SHARED = {"preset": None, "batch": 20, "window": 64, "loss_scale": "mean", "rho": 0.997}
RNNS = {
    "P-GRU": {"sharing": "pooled", "hidden_size": 29, "learning_rate": 0.005, "epochs": 20},
    "C-tanh": {"cell": "tanh", "hidden_size": 14, "learning_rate": 0.003, "epochs": 30},
    "C-GRU": {"hidden_size": 8, "learning_rate": 0.01, "epochs": 40},
}
BOUND = "lowest attainable"
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#CCCCCC"  # told apart by every kind of eye


class Result(NamedTuple):
    """A model's errors on the held-out part.

    Attributes
    ----------
    name : str
    scores : dict
        As `evaluation.summarise` says; ``nll`` is Eq. 3 in nats.
    excess : float
        ``nll`` over that of the generator, in nats.
    seconds : float
        To fit.
    """

    name: str
    scores: dict[str, Any]
    excess: float
    seconds: float


def models(quick: bool = False) -> dict[str, Model]:
    """The models to compare, simple ones first; with `quick`, one epoch for each RNN."""
    changes = {"epochs": 1} if quick else {}
    rnns = {name: CollaborativeRNN(**SHARED | own | changes) for name, own in RNNS.items()}
    return {"uniform": Uniform(), "unigram": Unigram(), "bigram": Bigram()} | rnns


def compile_kernels() -> float:
    """Compile what the models need, or read it from Numba's cache; seconds it took."""
    began = time.perf_counter()
    log = from_sequences([[0, 1, 0], [1, 1, 0]])
    for own in RNNS.values():
        CollaborativeRNN(**SHARED | own | {"epochs": 1}).fit(log).evaluate(log, log)
    return time.perf_counter() - began


def compare(
    drawn: Drawn, compared: dict[str, Model], progress: Progress | None = None
) -> Iterator[Result]:
    """Fit each model on the training part and score it on the held-out part; the bound is last.

    Parameters
    ----------
    drawn : Drawn
        `synthetic.draw`.
    compared : dict of str to model
        Anything with the estimator's fit and evaluate.
    progress : callable, optional
        Called with (events done, events in all) while an RNN is trained.
    """
    bound = drawn.lowest_error()
    for name, model in compared.items():
        began = time.perf_counter()
        _fit(model, drawn.split.train, progress)
        seconds = time.perf_counter() - began
        scores = model.evaluate(*drawn.split)
        yield Result(name, scores, scores["nll"] - bound["nll"], seconds)
    yield Result(BOUND, bound, 0.0, 0.0)


def _fit(model: Model, train: EventLog, progress: Progress | None) -> None:
    if progress is None or isinstance(model, Baseline):
        model.fit(train)
        return
    before = 0

    def tell(done: int, of_epoch: int, loss: float) -> None:
        progress(before + done, of_epoch * model.settings.plan.epochs)

    for report in model.epochs(train, progress=tell):
        before += report.events


def header() -> str:
    """The names of the columns of `row`."""
    columns = ("error (nats)", "excess", "perplexity", "Recall@20", "MRR@20", "seconds")
    return f"{'':18}" + "".join(f"{name:>13}" for name in columns)


def row(result: Result) -> str:
    """A result as a line of the table."""
    scores = result.scores
    cells = [
        f"{scores['nll']:.3f}",
        f"{result.excess:+.3f}",
        f"{scores['perplexity']:.1f}",
        f"{scores['recall@20']:.3f}",
        f"{scores['mrr@20']:.3f}",
        f"{result.seconds:.1f}",
    ]
    if result.name == BOUND:
        cells[1] = cells[-1] = ""
    return f"{result.name:18}" + "".join(f"{cell:>13}" for cell in cells).rstrip()


def picture(results: list[Result], n_items: int, title: str, path: Path) -> None:
    """Draw each model's error: what nobody can avoid, and the rest; any format of matplotlib."""
    from matplotlib.figure import Figure

    *compared, bound = results
    lowest, highest = bound.scores["nll"], float(np.log(n_items))
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.barh([r.name for r in compared], lowest, 0.62, color=GREY, label="unavoidable")
    for label, color, recurrent in (("recurrent network", BLUE, True), ("baseline", ORANGE, False)):
        group = [r for r in compared if (r.name in RNNS) == recurrent]
        names, excess = [r.name for r in group], [r.excess for r in group]
        axes.barh(names, excess, 0.62, left=lowest, color=color, label=label)
    for r in compared:
        error = r.scores["nll"]
        axes.text(error, r.name, f"  {error:.2f}  (+{r.excess:.2f})", va="center")
    for x, style, text in ((lowest, "--", "lowest attainable"), (highest, ":", f"log {n_items}")):
        axes.axvline(x, color="black", linestyle=style, linewidth=1.2)
        axes.text(x, 1.02, f"{text} = {x:.2f}", ha="center", transform=axes.get_xaxis_transform())
    axes.set_xlim(0, 1.2 * highest)
    axes.set_xlabel("error on the held-out events, Eq. 3 (nats per event)")
    axes.set_title(title, fontsize="medium", loc="left", pad=22)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="upper right", bbox_to_anchor=(0.8, 1), frameon=False)
    write_figure(figure, path)


def check_picture(path: Path) -> None:
    """Refuse before the work what could not be written after it."""
    from matplotlib.figure import Figure

    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".") not in known:
        raise SettingsError(
            f"{path}: the name should end in .png, .svg, .pdf or another format of matplotlib"
        )
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"{path}: its folder does not exist; make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise SettingsError(f"{path}: its folder can't be written to; choose another")


def _bar() -> Progress | None:
    """A bar for each training where stderr is a terminal."""
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    bar = None

    def move(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = tqdm(total=total, unit=" events", unit_scale=True, leave=False)
        bar.update(done - bar.n)
        if done == total:
            bar.close()
            bar = None

    return move


@click.command()
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default="crnn_np-demo.png",
    show_default=True,
    help="Picture to write; .png, .svg or .pdf.",
)
@click.option(
    "--quick", is_flag=True, help="A tenth of the data and one epoch: shows that it runs, no more."
)
def demo(out: Path, quick: bool) -> None:
    """Train on a built-in data set and compare with the lowest attainable error.

    The data are drawn from a known C-GRU in which every user has dynamics of their own, so the
    error that no model can go below is known: it is the generator's own. Takes a minute or two,
    the first time one more to compile.
    """
    check_picture(out)
    drawn = draw(events=(200, 400)) if quick else draw()
    train, heldout = drawn.split
    D = drawn.spec.hidden_size
    title = (
        f"{train.n_users} users, {train.n_items} items, {train.n_events:,} training events "
        f"drawn from a known C-GRU, D = {D}"
    )
    click.echo(f"{title}; {heldout.n_events:,} held out")
    click.echo(f"kernels ready after {compile_kernels():.1f} s\n")
    click.echo(header())
    results = []
    for result in compare(drawn, models(quick), _bar()):
        click.echo(row(result))
        results.append(result)
    picture(results, train.n_items, title, out)
    click.echo(f"\nPicture: {out}")
