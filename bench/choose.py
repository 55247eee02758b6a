"""Choose the settings of the preset ``paper`` on a validation part; the held-out part stays unseen.

    python bench/choose.py DIR [--out bench/choose.jsonl] [--max-epochs 25]

At the end the best setting runs without stopping, and each patience is read off its curve.
Stages of a coordinate search: each varies one or two settings around the best so far (Eq. 3 on the
validation part, cut from the end of each user's training part). Every trial is one line of the
output; a trial that is there already is not run again, so the search can be stopped and resumed,
with the same data and the same epochs at most.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import click
from machine import describe_machine

import crnn_np
from crnn_np import data

START = {
    "hidden_size": 32,
    "learning_rate": 0.0075,
    "rho": 0.997,
    "eps": 1e-2,
    "dropout_in": 0.2,
    "dropout_out": 0.2,
}
STAGES = (
    {"learning_rate": (0.0075, 0.003, 0.02), "eps": (1e-2, 1e-1, 1e-3)},
    {"dropout_in": (0.0, 0.2, 0.4), "dropout_out": (0.0, 0.2, 0.4)},
    {"rho": (0.95, 0.99, 0.997, 0.999, 0.9997)},
    {"hidden_size": (16, 32, 64)},
)
PATIENCE = 2
PATIENCES = (1, 2, 3, 4, 5)


def stopped_at(curve: list[float], patience: int) -> float:
    """Lowest error that early stopping with this patience sees of a whole curve."""
    for epoch in range(len(curve)):
        if epoch - min(range(epoch + 1), key=curve.__getitem__) >= patience:
            return min(curve[: epoch + 1])
    return min(curve)


def run_trial(
    train: crnn_np.EventLog, chosen: dict, max_epochs: int, patience: int = PATIENCE
) -> dict:
    """Validation error after each epoch of one setting, until it stops falling."""
    settings = crnn_np.resolve("paper", **chosen, epochs=max_epochs, patience=patience)
    began, curve = time.time(), []
    try:
        for report in crnn_np.epochs(*settings, train):
            if report.phase != "choose":
                break
            curve.append(round(report.validation["nll"], 4))
    except crnn_np.TrainingError as error:
        return {"settings": chosen, "error": str(error)}
    return {
        "settings": chosen,
        "validation_nll": min(curve),
        "epoch": curve.index(min(curve)) + 1,
        "curve": curve,
        "seconds": round(time.time() - began),
    }


def read_trials(path: Path) -> list[dict]:
    """The trials so far, behind what they are trials of."""
    records = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            advice = "remove the line, or try another --out"
            raise click.ClickException(f"{path}:{number}: {error}: {advice}") from None
    if not records:
        raise click.ClickException(f"{path} is empty: remove it, or try another --out")
    return records


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default="bench/choose.jsonl")
@click.option("--max-epochs", default=25, show_default=True)
def main(directory: Path, out: Path, max_epochs: int) -> None:
    """Search the settings of the preset paper on the prepared data in DIRECTORY."""
    train = crnn_np.load(directory).train
    asked = {
        "data_sha256": data.checksum(train),
        "patience": PATIENCE,
        "max_epochs": max_epochs,
    }
    if out.exists():
        records = read_trials(out)
        for name, wanted in asked.items():
            if records[0].get(name) != wanted:
                raise click.ClickException(
                    f"{out} has {name} {records[0].get(name)}: {wanted} was expected for "
                    f"{directory}; try another --out"
                )
    else:
        about = {"data": directory.name, "train_events": train.n_events, "users": train.n_users}
        about |= {"machine": describe_machine(), "date": time.strftime("%Y-%m-%d")}
        records = [{"about": about} | asked]
        out.write_text(json.dumps(records[0]) + "\n")
    done = {json.dumps(r["settings"], sort_keys=True): r for r in records if "settings" in r}
    best = START
    for stage in STAGES:
        trials = []
        for values in itertools.product(*stage.values()):
            chosen = best | dict(zip(stage, values, strict=True))
            key = json.dumps(chosen, sort_keys=True)
            if key not in done:
                done[key] = run_trial(train, chosen, max_epochs)
                with out.open("a") as file:
                    file.write(json.dumps(done[key]) + "\n")
            trials.append(done[key])
            shown = {name: chosen[name] for name in stage}
            click.echo(f"{shown}: {trials[-1].get('validation_nll', 'diverged')}")
            sys.stdout.flush()
        best = min(trials, key=lambda r: r.get("validation_nll", float("inf")))["settings"]
        click.echo(f"best so far: {best}")
    whole = next((r for r in records if "whole" in r), None)
    if whole is None:
        whole = {"whole": run_trial(train, best, max_epochs, patience=max_epochs)}
        with out.open("a") as file:
            file.write(json.dumps(whole) + "\n")
    for patience in PATIENCES:
        click.echo(f"patience {patience}: {stopped_at(whole['whole']['curve'], patience)}")


if __name__ == "__main__":
    main()
