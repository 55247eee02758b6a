"""Figure 1 right: the time of an epoch against the hidden size, C-GRU and P-GRU.

    python bench/epoch_time.py DIR [--sizes 16,32,64,128,256,512,768] [--seconds 30]
                               [--json epoch_time.json] [--svg epoch_time.svg]

Trains windows of the preset ``authors`` (20 users side by side, windows of 64) from all over the
first epoch of the prepared data in DIR for at least --seconds, and scales up by events where that
is not the whole epoch. Each point has a process of its own, whose largest memory is told. Where the
matrices of all users and their accumulators do not fit into 8 GB, or half of the memory, C-GRU runs
with the first users that do, and its rate counts for the events of all. A point that is in the file
is not measured again; a file of other data, processor, threads or version is begun anew. Where
there is a CUDA device every point is measured on it too; the memory is the host's.
"""

import json
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import click
import numba
import numpy as np
import report
from machine import describe_machine, memory_bytes, peak_bytes
from records import write_json

import crnn_np
from crnn_np import backends, data, methods, planning
from crnn_np.model import initialise, new_accumulators, shapes

MODELS = {"C-GRU": "c-gru", "P-GRU": "p-gru"}
BACKENDS = {"CPU": "numba", "GPU": "cupy"}
ROOM = min(8e9, memory_bytes() / 2)  # bytes of parameters and accumulators


def users_that_fit(model: crnn_np.CollaborativeRNN, log: crnn_np.EventLog) -> int:
    """How many users' parameters and accumulators fit into `ROOM` beside the items'."""
    spec = model.settings.spec
    number = 2 * np.dtype(spec.dtype).itemsize
    sizes = {name: np.prod(shape) for name, shape in shapes(spec, 1, log.n_items).items()}
    if spec.sharing == "pooled":
        return log.n_users
    room = ROOM / number - sizes["W_in"] - sizes["W_out"]
    return int(min(max(room // sizes["W_h"], 1), log.n_users))


def first_users(log: crnn_np.EventLog, n: int) -> crnn_np.EventLog:
    """A log of its first n users only, over the same items."""
    indptr = log.indptr[: n + 1]
    return log._replace(
        indptr=indptr, items=log.items[: indptr[-1]], times=None, user_ids=log.user_ids[:n]
    )


def devices() -> list[str]:
    """The CPU, and the GPU where there is one."""
    try:
        backends.get(BACKENDS["GPU"]).device()
    except crnn_np.DeviceError:
        return ["CPU"]
    return ["CPU", "GPU"]


def point(
    log: crnn_np.EventLog, name: str, hidden_size: int, device: str, seconds: float
) -> dict[str, Any]:
    """Measure one model with one hidden size; meant for a process of its own."""
    model = methods.new(MODELS[name], preset="authors", hidden_size=hidden_size)
    spec, rule, plan = model.settings
    backend = BACKENDS[device]
    planning.load_kernels(spec, rule, plan, backend)
    users = users_that_fit(model, log)
    some = first_users(log, users)
    params = initialise(spec, users, log.n_items, 0)
    module = backends.get(backend)
    found, measured = planning.sample_epoch(
        module, spec, rule, plan, params, new_accumulators(params), some, seconds
    )
    events, of_some = (int(np.maximum(x.lengths - 1, 0).sum()) for x in (log, some))
    whole = found * events / of_some
    note = None if users == log.n_users else f"{users} of {log.n_users} users, the others scaled"
    return {
        "model": name,
        "device": device,
        "hidden_size": hidden_size,
        "users": users,
        "users_note": note,
        "seconds_per_epoch": whole,
        "scaled": bool(users < log.n_users or measured < 0.999 * found),
        "measured_seconds": measured,
        "peak_gb": peak_bytes() / 1e9,
        "events_per_second": events / whole,
    }


def measure(
    log: crnn_np.EventLog, name: str, sizes: list[int], seconds: float, file: Path
) -> Iterator[dict[str, Any]]:
    """Measure the points that `file` has not yet; each is written and yielded.

    Parameters
    ----------
    name : str
        Of the data.
    sizes : list of int
        Hidden sizes.
    seconds : float
        Train windows for at least this long a point.
    """
    asked = {
        "data": name,
        "data_sha256": data.checksum(log),
        "seconds": seconds,
        "processor": describe_machine()["processor"],
        "threads": numba.config.NUMBA_NUM_THREADS,
        "version": crnn_np.__version__,
    }
    found = json.loads(file.read_text("utf-8")) if file.exists() else {}
    if {key: found.get(key) for key in asked} != asked:
        found = asked | {"rows": []}
    there = {(row["model"], row["hidden_size"], row["device"]) for row in found["rows"]}
    spawn = multiprocessing.get_context("spawn")
    for size, model, device in product(sizes, MODELS, devices()):
        if (model, size, device) in there:
            continue
        with ProcessPoolExecutor(1, mp_context=spawn) as process:
            row = process.submit(point, log, model, size, device, seconds).result()
        found["rows"].append(row)
        found |= {"machine": describe_machine(), "date": time.strftime("%Y-%m-%d")}
        write_json(file, found)
        yield row


def line(row: dict[str, Any]) -> str:
    """A point as a line of text."""
    scaled = f"scaled up from {row['measured_seconds']:.0f} s" if row["scaled"] else "whole"
    note = f"; {row['users_note']}" if row["users_note"] else ""
    return (
        f"{row['model']} {row['device']} D = {row['hidden_size']:4}: "
        f"{row['seconds_per_epoch']:9.1f} s an epoch ({scaled}), "
        f"{row['events_per_second']:9,.0f} events/s, {row['peak_gb']:.2f} GB{note}"
    )


def _sizes(context, parameter, value: str) -> list[int]:
    return [int(size) for size in value.split(",")]


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--sizes", callback=_sizes, default="16,32,64,128,256,512,768", show_default=True)
@click.option("--seconds", default=30.0, show_default=True)
@click.option("--json", "file", type=click.Path(path_type=Path), default="epoch_time.json")
@click.option("--svg", type=click.Path(path_type=Path), default="epoch_time.svg")
def main(directory: Path, sizes: list[int], seconds: float, file: Path, svg: Path) -> None:
    """Measure an epoch's time on the prepared data in DIRECTORY and draw it."""
    train, _ = data.load(directory)
    for row in measure(train, directory.resolve().name, sizes, seconds, file):
        click.echo(line(row))
    report.draw_epoch_time(json.loads(file.read_text("utf-8")), svg)
    click.echo(f"{file} and {svg} written")


if __name__ == "__main__":
    main()
