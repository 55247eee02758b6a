"""Training speed beside PyTorch on the same machine, interleaved.

    pip install 'crnn_np[bench]'
    python bench/peers.py [DIR] [--rounds 7] [--threads 2] [--json FILE]

Both sides take full windows of the presets' batches, "1 x 128" (paper) and "20 x 64" (authors), of
the collaborative GRU with its tanh candidate, without dropout. Rounds alternate; the ratio is taken
round by round. DIR is a prepared data set: its users, items and sequences; without it, the shape
of Brightkite in the paper (1,679 users, 23,243 items) with items drawn Zipf-like.

The peer is what a PyTorch user would write with care: one W_h parameter for each user, so that
only the window's users are moved, the users stacked for one batched product a step, the other
tables dense as torch.optim has them.
"""

import json
import math
import os
import statistics
import time
from pathlib import Path

import click
import numpy as np
import torch
from machine import describe_machine
from torch import nn

import crnn_np
from crnn_np import backends, model
from crnn_np.windows import Slice, epoch_slices

BATCHES = {"1 x 128": "paper", "20 x 64": "authors"}


class EagerGRU(nn.Module):
    """The collaborative GRU of Eqs. 21-24 for automatic differentiation."""

    def __init__(self, users: int, items: int, D: int) -> None:
        super().__init__()
        scale = 1 / math.sqrt(D)
        self.W_in = nn.Embedding(items, 3 * D)
        self.W_out = nn.Linear(D, items, bias=False)
        self.W_h = nn.ParameterList(
            [nn.Parameter(torch.randn(D, 3 * D) * scale) for _ in range(users)]
        )
        for table in (self.W_in.weight, self.W_out.weight):
            nn.init.normal_(table, 0, scale)

    def forward(self, user, x, h):
        """Loss (mean over cells) and the last state of a window x [B, T]."""
        y, x = x[:, 1:], x[:, :-1]
        D = h.shape[1]
        W = torch.stack([self.W_h[u] for u in user])
        W_zr, W_c = W[:, :, : 2 * D], W[:, :, 2 * D :]
        A = self.W_in(x)
        h, states = h.unsqueeze(1), []
        for t in range(x.shape[1]):
            a = A[:, t : t + 1]
            zr = torch.sigmoid(torch.bmm(h, W_zr) + a[..., : 2 * D])
            z, r = zr.chunk(2, -1)
            new = torch.tanh(torch.bmm(r * h, W_c) + a[..., 2 * D :])
            h = h + z * (new - h)
            states.append(h)
        H = torch.cat(states, 1).reshape(-1, D)
        loss = nn.functional.cross_entropy(self.W_out(H), y.reshape(-1))
        return loss, h.squeeze(1)


class Eager:
    """PyTorch eager with torch.optim.RMSprop."""

    name = "PyTorch eager"

    def __init__(self, users: int, items: int, rule: crnn_np.Rule, D: int, B: int) -> None:
        torch.manual_seed(0)
        self.net = EagerGRU(users, items, D)
        self.optimiser = torch.optim.RMSprop(
            self.net.parameters(), lr=rule.learning_rate, alpha=rule.rho, eps=rule.eps
        )
        self.h = torch.zeros(B, D)

    def run(self, windows) -> None:
        for user, x in windows:
            self.optimiser.zero_grad(set_to_none=True)
            loss, h = self.net(user.tolist(), x, self.h)
            loss.backward()
            self.optimiser.step()
            self.h = h.detach()


class Ours:
    """`train_run` of the Numba backend."""

    name = "crnn_np numba"

    def __init__(self, log, settings, run: Slice) -> None:
        spec, rule, plan = settings
        self.backend = backends.get("numba")
        params = model.initialise(spec, log.n_users, log.n_items, 0)
        work = self.backend.workspace(spec, log.n_items, plan.batch, plan.window)
        s = np.zeros((1, plan.batch, spec.hidden_size), spec.dtype)
        self.arguments = (spec, rule, plan.scale, params, model.new_accumulators(params), s, log)
        self.work, self.slices = work, run

    def run(self, first: int, last: int) -> int:
        part = self.slices.part(first, last)
        return self.backend.train_run(*self.arguments, part, self.work)[1]


def zipf_log(users: int, items: int, length: int) -> crnn_np.EventLog:
    """Sequences whose items are drawn with probability 1 / rank."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, items + 1)
    draws = rng.choice(items, (users, length), p=share / share.sum())
    return crnn_np.from_sequences(draws, items)


def full_windows(log, plan, K: int) -> Slice:
    """At most K windows of an epoch, the fullest ones, each followed by a next event."""
    run = epoch_slices(plan, log.lengths, 1)
    ends = run.start + run.length < log.lengths[run.user]
    order = np.argsort(-(run.length.sum(axis=1) + ends.all(axis=1)), kind="stable")[:K]
    return Slice(*(field[order] for field in run))


def torch_windows(log, run: Slice):
    """The same windows for PyTorch: users, and x [B, T + 1] with the event that follows."""
    for k in range(run.key.size):
        piece = run.one(k)
        T = int(piece.length.max())
        at = log.indptr[piece.user] + piece.start
        index = np.minimum(at[:, None] + np.arange(T + 1), log.n_events - 1)
        yield piece.user, torch.from_numpy(log.items[index].astype(np.int64))


def compare(log, preset: str, D: int, rounds: int) -> dict:
    """Events per second of both sides over alternating rounds."""
    settings = crnn_np.resolve(
        preset, hidden_size=D, candidate="tanh", dropout_in=0.0, dropout_out=0.0
    )
    plan = settings.plan
    cells = plan.batch * plan.window
    ours_windows, peer_windows = max(4, 8192 // cells), max(2, 2048 // cells)
    run = full_windows(log, plan, ours_windows)
    ours = Ours(log, settings, run)
    peer = Eager(log.n_users, log.n_items, settings.rule, D, plan.batch)
    windows = list(torch_windows(log, run.part(0, peer_windows)))
    ours.run(0, 1)
    peer.run(windows[:1])
    rates = {ours.name: [], peer.name: []}
    for _ in range(rounds):
        began = time.perf_counter()
        events = ours.run(0, run.key.size)
        rates[ours.name].append(events / (time.perf_counter() - began))
        began = time.perf_counter()
        peer.run(windows)
        events = sum(x.shape[0] * (x.shape[1] - 1) for _, x in windows)
        rates[peer.name].append(events / (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
    return {
        "batch": f"{plan.batch} x {plan.window}",
        "events_per_second": {name: statistics.median(v) for name, v in rates.items()},
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


@click.command()
@click.argument("directory", required=False, type=click.Path(exists=True, file_okay=False))
@click.option("--hidden-size", "D", default=32, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--threads", default=os.cpu_count(), show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(directory, D: int, rounds: int, threads: int, json_file: Path | None) -> None:
    """Print training events per second beside PyTorch's, and their ratio."""
    import numba

    torch.set_num_threads(threads)
    numba.set_num_threads(threads)
    log = crnn_np.load(directory).train if directory else zipf_log(1679, 23243, 520)
    about = describe_machine() | {
        "threads": threads,
        "torch": torch.__version__,
        "data": Path(directory).name if directory else "Zipf-like",
        "users": log.n_users,
        "items": log.n_items,
        "hidden_size": D,
        "date": time.strftime("%Y-%m-%d"),
    }
    click.echo(json.dumps(about))
    click.echo(f"{'batch':10}{'crnn_np':>12}{'PyTorch eager':>16}{'times':>8}  (range)")
    rows = []
    for batch, preset in BATCHES.items():
        row = compare(log, preset, D, rounds)
        rows.append(row)
        ours, peer = row["events_per_second"].values()
        low, high = row["ratio_range"]
        click.echo(
            f"{batch:10}{ours:12,.0f}{peer:16,.0f}{row['ratio']:8.1f}  ({low:.1f} to {high:.1f})"
        )
    if json_file:
        json_file.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
