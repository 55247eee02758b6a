"""What each part of the mixture is worth: it is built up part by part, and taken apart again.

    python bench/ablation.py DIR [--epochs 12] [--seed 0] [--json FILE]

Trains every variant on the training part of a prepared data set DIR, less its validation part, in
turns of an epoch, so that the speeds compare, and prints its lowest error on the validation part
(Eq. 3, nats) with Recall@20 and MRR@20 of that epoch. The held-out part is not touched. Settings
are those of the preset ``mixture``.

A distribution is left out by a share of the gate that starts at 0 and so stays there; a block of
parameters by holding it at 0 after every window. A bag is what is left of a GRU without W_h: its
state is a gated moving average of the items' embeddings.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numba
import numpy as np
import records
from machine import describe_machine
from tqdm import tqdm

import crnn_np
from crnn_np import backends, evaluation, model, presets, training
from crnn_np.history import FEATURES
from crnn_np.windows import epoch_slices

F, Q = len(FEATURES), slice(None, -1)
NEVER = -1e9  # logit of a distribution that is left out


class Variant(NamedTuple):
    """Settings that differ, what is set before training, and what is held at 0 during it."""

    settings: dict
    begin: Callable[[model.MixtureParams], None]
    hold: Sequence[tuple[str, Any]]  # block and index


def leave_out(*distributions: int) -> Callable[[model.MixtureParams], None]:
    """Give these distributions no share."""

    def begin(params: model.MixtureParams) -> None:
        params.gate_out[-1, list(distributions)] = NEVER

    return begin


def nothing(params: model.Params) -> None:
    """Leave the parameters as they are."""


ALL = slice(None)
EVEN = [("gate_in", ALL), ("gate_out", Q)]  # a gate of a constant and the user's own row
D = presets.resolve("mixture").spec.hidden_size
BAG = slice(D, None)  # the second half of 2 D units
BAG_ONLY = [("W_h", (ALL, BAG))] + [
    ("W_h", (ALL, ALL, slice(k * D, (k + 1) * D))) for k in (1, 3, 5)
]
VARIANTS = {
    "C-GRU": Variant({"output": "softmax"}, nothing, []),
    "+ pointer": Variant({}, leave_out(1, 2), EVEN),
    "+ bigram and unigram": Variant({}, nothing, EVEN),
    "+ gate with counts": Variant({}, nothing, [("gate_in", slice(F, None))]),
    "+ state in the gate: the mixture": Variant({}, nothing, []),
    "+ bag": Variant({"hidden_size": 2 * D}, nothing, BAG_ONLY),
    "the mixture with two pointers": Variant({"pointers": 2}, nothing, []),
    "the mixture with tanh cells": Variant({"cell": "tanh", "learning_rate": 0.002}, nothing, []),
    "the mixture with a pooled GRU": Variant({"sharing": "pooled"}, nothing, []),
    "the mixture with a bag for the GRU": Variant({}, nothing, [("W_h", ALL)]),
    "the mixture without recurrence": Variant(
        {"cell": "tanh", "learning_rate": 0.002}, nothing, [("W_h", ALL)]
    ),
    "the mixture without a network": Variant(
        {},
        leave_out(0),
        [("gate_in", slice(F, None)), ("W_h", ALL), ("W_in", ALL), ("W_out", ALL)],
    ),
}


class Trial:
    """A variant in training."""

    def __init__(self, variant: Variant, log: crnn_np.EventLog, seed: int) -> None:
        settings = presets.resolve("mixture", seed=seed, **variant.settings)
        self.spec, self.rule, self.plan = settings
        self.variant, self.backend = variant, backends.get("numba")
        self.part, self.validation, _ = training.validation_split(self.plan, log, None)
        self.params = model.initialise(self.spec, log.n_users, log.n_items, seed)
        self.parameters = self.count()
        self.params = model.initialise(self.spec, log.n_users, log.n_items, seed)
        self.acc = model.new_accumulators(self.params)
        variant.begin(self.params)
        self.hold()
        self.past = evaluation.read_past(self.spec, self.part)
        self.work = training.workspace(self.backend, self.spec, self.plan, self.part)
        self.rates: list[float] = []
        self.scores: list[dict] = []

    def count(self) -> int:
        """How many parameters are not held at 0; all others become 1."""
        for block in self.params:
            block[...] = 1
        self.hold()
        return int(sum(np.count_nonzero(block) for block in self.params))

    def hold(self) -> None:
        for name, index in self.variant.hold:
            getattr(self.params, name)[index] = 0

    def epoch(self) -> None:
        """Train one more epoch and validate."""
        run = epoch_slices(self.plan, self.part.lengths, len(self.rates) + 1)
        s = np.zeros((1, self.plan.batch, self.spec.hidden_size), self.spec.dtype)
        size = 1 if self.variant.hold else run.key.size
        events, began = 0, time.perf_counter()
        for k in range(0, run.key.size, size):
            _, n = training.train_run(
                self.backend, self.spec, self.rule, self.plan.scale, self.params, self.acc, s,
                self.part, run.part(k, k + size), self.work, self.past,
            )  # fmt: skip
            self.hold()
            events += n
        self.rates.append(events / (time.perf_counter() - began))
        self.scores.append(
            evaluation.evaluate(self.backend, self.spec, self.params, self.part, self.validation)
        )

    def result(self) -> dict:
        best = min(self.scores, key=lambda score: score["nll"])
        return {
            "parameters": self.parameters,
            "events_per_second": statistics.median(self.rates),
            "epoch": self.scores.index(best) + 1,
            **{name: best[name] for name in ("nll", "recall@20", "mrr@20")},
        }


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False))
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), callback=records.in_a_folder)
def main(directory: str, epochs: int, seed: int, json_file: Path | None) -> None:
    """Print parameters, speed and validation errors of each variant."""
    about = describe_machine() | {
        "threads": numba.get_num_threads(),
        "data": Path(directory).name,
        "date": time.strftime("%Y-%m-%d"),
    }
    click.echo(json.dumps(about))
    log = crnn_np.load(directory).train
    trials = {name: Trial(variant, log, seed) for name, variant in VARIANTS.items()}
    for _ in tqdm(range(epochs), disable=None, leave=False):
        for trial in trials.values():
            trial.epoch()
        results = {name: trial.result() for name, trial in trials.items()}
        if json_file:
            records.write_json(json_file, {"about": about, "results": results})
    click.echo(
        f"{'':40}{'parameters':>12}{'events/s':>10}{'epoch':>7}{'nats':>8}{'Recall@20':>11}"
        f"{'MRR@20':>8}"
    )
    for name, found in results.items():
        click.echo(
            f"{name:40}{found['parameters']:12,}{found['events_per_second']:10,.0f}"
            f"{found['epoch']:7}{found['nll']:8.3f}{found['recall@20']:11.3f}{found['mrr@20']:8.3f}"
        )


if __name__ == "__main__":
    main()
