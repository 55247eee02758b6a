"""One EM pass of the HMM baseline against hmmlearn's own, at the size of Brightkite.

    python bench/hmm.py [--threads 2] [--states 50] [--rounds 5]

Each runs alone on the same random events and probabilities, in turn; a pass is the E-step and the
M-step. hmmlearn's `scaling` is the faster of its two ways.
"""

import statistics
import time
from collections.abc import Callable

import click
import numba
import numpy as np
from hmmlearn.hmm import CategoricalHMM
from machine import describe_machine

from crnn_np.baselines.hmm import SideBySide


def sequences(events: int, users: int, items: int) -> tuple[np.ndarray, np.ndarray]:
    """Items int64[E, 1] of which few are frequent, and lengths int64[users], a few long."""
    rng = np.random.default_rng(0)
    share = rng.lognormal(0, 1.2, users)
    lengths = 1 + rng.multinomial(events - users, share / share.sum())
    popularity = 1 / np.arange(1, items + 1) ** 0.8
    return rng.choice(items, (events, 1), p=popularity / popularity.sum()), lengths


def passes(kind: type, states: int, items: int, x: np.ndarray, lengths: np.ndarray) -> Callable:
    """A call that does one pass of EM and returns the log-likelihood before it."""
    model = kind(
        states,
        n_features=items,
        emissionprob_prior=1.01,
        implementation="scaling",
        random_state=0,
    )
    model._init(x, lengths)

    def call() -> float:
        stats, log_likelihood = model._do_estep(x, lengths)
        model._compute_lower_bound(log_likelihood)
        model._do_mstep(stats)
        return log_likelihood

    return call


@click.command()
@click.option("--threads", default=2, show_default=True)
@click.option("--events", default=600_000, show_default=True)
@click.option("--users", default=1679, show_default=True)
@click.option("--items", default=23_243, show_default=True)
@click.option("--states", default=50, show_default=True)
@click.option("--rounds", default=5, show_default=True)
def main(threads: int, events: int, users: int, items: int, states: int, rounds: int) -> None:
    """Print the seconds of a pass and their ratio."""
    numba.set_num_threads(threads)
    x, lengths = sequences(events, users, items)
    kinds = {"hmmlearn, scaling": CategoricalHMM, "crnn_np": SideBySide}
    calls = {name: passes(kind, states, items, x, lengths) for name, kind in kinds.items()}
    before = [call() for call in calls.values()]
    if not np.isclose(*before, rtol=1e-10):
        raise SystemExit(f"the log-likelihoods differ: {before}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    click.echo(str(describe_machine() | {"threads": threads, "date": time.strftime("%Y-%m-%d")}))
    click.echo(f"{events:,} events, {users:,} users, {items:,} items, {states} states, {rounds=}")
    for name, values in seconds.items():
        click.echo(f"  {name:20}{statistics.median(values):8.3f} s, fastest {min(values):.3f} s")
    theirs, ours = seconds.values()
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    low, high = min(ratios), max(ratios)
    click.echo(f"  ratio {statistics.median(ratios):.1f} (from {low:.1f} to {high:.1f})")


if __name__ == "__main__":
    main()
