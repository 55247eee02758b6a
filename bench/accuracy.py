"""Held-out errors of a preset or a variant of it over seeds, one JSON line a run.

    python bench/accuracy.py DIR --preset authors --seeds 0-5 [--set cell=tanh] [--out FILE]

A run that FILE holds already is not made again, so that a long list can be stopped and resumed.
"""

import json
import time
import tomllib
from pathlib import Path

import click
from machine import describe_machine

import crnn_np
from crnn_np import data

SHOWN = ("nll", "nll_after_first", "recall@20", "mrr@20")


def seed_range(text: str) -> range:
    """`"0-5"` or `"3"`."""
    first, _, last = text.partition("-")
    return range(int(first), int(last or first) + 1)


def run(split: crnn_np.Split, settings: dict) -> dict:
    """Fit one model and evaluate it on the held-out part."""
    model = crnn_np.CollaborativeRNN(**settings)
    began = time.time()
    model.fit(split.train)
    seconds = time.time() - began
    epochs = [
        {
            "phase": r.phase,
            "epoch": r.epoch,
            "loss": r.loss,
            "validation_nll": r.validation and r.validation["nll"],
            "events_per_second": r.events / r.seconds,
        }
        for r in model.reports
    ]
    return {
        "scores": model.evaluate(*split),
        "epochs": epochs,
        "seconds": seconds,
        "resolved": model.get_params(),
        "machine": describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--preset", default="authors", show_default=True)
@click.option("--seeds", type=seed_range, default="0-2", show_default=True)
@click.option("--set", "changes", multiple=True, help="A setting, TOML: cell='tanh'.")
@click.option("--out", type=click.Path(path_type=Path), default="accuracy.jsonl")
def main(directory: Path, preset: str, seeds: range, changes: tuple[str, ...], out: Path) -> None:
    """Train on the prepared data in DIRECTORY, once for each seed, and print held-out errors."""
    split = data.load(directory)
    like = data.load_stats(directory)["like"]
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    changed = tomllib.loads("\n".join(changes))
    records = []
    for seed in seeds:
        settings = {"preset": preset, "like": like, "seed": seed} | changed
        key = {"data": directory.resolve().name, "settings": settings}
        record = next((r for r in done if r["key"] == key), None)
        if record is None:
            record = {"key": key} | run(split, settings)
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")
        records.append(record)
        shown = "  ".join(f"{name} {record['scores'][name]:.4f}" for name in SHOWN)
        click.echo(f"{key['data']} {preset} {changed or ''} seed {seed}: {shown}")
    means = {name: sum(r["scores"][name] for r in records) / len(records) for name in SHOWN}
    shown = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
    click.echo(f"mean of {len(records)}: {shown}")


if __name__ == "__main__":
    main()
