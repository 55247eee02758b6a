"""The paper's tables and figures on the data at hand: ``make reproduce``.

    python bench/reproduce.py [--data data] [--profile quick|full] [--datasets a,b] [--models a,b]
                              [--preset NAME] [--seeds N] [--epochs N] [--out results] [--dry-run]

Prepares each raw log under --data, fits every model of ``reproduce.toml``, and writes one JSON file
a run, the tables as CSV and the page ``report.html`` (``report.py``). A run that is there is not
made again, and one that was broken off goes on after its last epoch, so that the command can be
stopped at any point and given again. A model that fails is shown as failed, and a log that can't be
prepared is named; the others finish, and the exit status is 1.
"""

import hashlib
import importlib.metadata
import json
import math
import platform
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import epoch_time
import numba
import report
from machine import describe_machine
from records import write_json
from tqdm import tqdm

import crnn_np
from crnn_np import cli, data, datasets, methods, planning, presets, reading, synthetic

BUILT_IN = "built-in"
SETTINGS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
RAW = {
    "loc-brightkite_totalCheckins.txt": "brightkite",
    "lastfm-dataset-1K.tar": "lastfm",
    "userid-timestamp-artid-artname-traid-traname.tsv": "lastfm",
}
LIBRARIES = ("numpy", "numba", "scipy", "hmmlearn")


class DataSet(NamedTuple):
    """A prepared data set: what ``data.json`` says of it, and its two parts."""

    facts: dict[str, Any]
    split: data.Split
    folder: Path


class Job(NamedTuple):
    """A run to make: a model on a data set, or a trial of a setting on its validation part."""

    of: DataSet
    model: str
    seed: int
    settings: dict[str, Any]
    trial: dict[str, Any] | None = None

    @property
    def file(self) -> Path:
        if self.trial is None:
            return self.of.folder / f"{self.model}-{self.seed}.json"
        tried = ",".join(f"{name}={value}" for name, value in self.trial.items()) or "epochs"
        return self.of.folder / "trials" / f"{self.model}-{tried}.json"

    @property
    def asked(self) -> dict[str, Any]:
        """What a run that is there already must have been made from, presets spelled out."""
        settings = methods.new(self.model, **self.settings).get_params()
        asked = {"settings": settings, "data_sha256": self.of.facts["sha256"]}
        return json.loads(json.dumps(asked))  # as a record has it

    @property
    def checkpoint(self) -> Path:
        """Another one for other settings or data, so that no run goes on from another's."""
        key = hashlib.sha256(json.dumps(self.asked).encode()).hexdigest()[:12]
        return self.file.with_name(f"{self.file.stem}.{key}.checkpoint")

    def __str__(self) -> str:
        what = f"seed {self.seed}"
        if self.trial is not None:
            what = "trial " + (", ".join(f"{k} {v}" for k, v in self.trial.items()) or "of epochs")
        return f"{self.of.facts['name']} {self.model} {what}"


def made(job: Job) -> dict[str, Any] | None:
    """The record of a run that was made before and did not fail."""
    if not job.file.exists():
        return None
    record = json.loads(job.file.read_text("utf-8"))
    return record if record["status"] == "done" and record["asked"] == job.asked else None


# ---------------------------------------------------------------- the data


def _is_table(file: Path) -> bool:
    """Whether a file is a raw table; `DataError` where it has no columns user and item."""
    name = file.name.lower().removesuffix(".gz")
    if not name.endswith((".csv", ".tsv", ".parquet")):
        return False
    if (file.parent / "stats.json").exists():  # a prepared data set
        return False
    reading.check_table(file)
    return True


def raw_logs(folder: Path) -> dict[str, tuple[Path, str]]:
    """Raw logs under a folder: name, file, and what it is like.

    A log in a folder of its own has that folder's name.
    """
    found = {}
    for file in sorted(folder.rglob("*")):
        like = RAW.get(file.name.removesuffix(".gz"))
        try:
            if not file.is_file() or (like is None and not _is_table(file)):
                continue
        except crnn_np.DataError as error:
            click.echo(f"left out: {error}")
            continue
        archive = file.parent.with_name(f"{file.parent.name}.tar.gz")
        unpacked = file.parent != folder and archive.name.removesuffix(".gz") in RAW
        if unpacked and archive.is_file():
            click.echo(f"{file} is left out: {archive} holds it")
            continue
        name = file.parent.name if file.parent != folder else like or file.name.partition(".")[0]
        if name in found:
            click.echo(f"{file} is left out: {found[name][0]} has the name {name} already")
            continue
        found[name] = file, like or "table"
    return found


def fetch(folder: Path, name: str) -> bool:
    """Download an original; where that can't be done, one line says what to put where."""
    try:
        datasets.fetch(name, folder, progress=sys.stderr.isatty())
    except crnn_np.DataError as error:
        reason = str(error).partition(";")[0]
        click.echo(
            f"{name} is not at hand ({reason}): put {datasets.KNOWN[name].file} into {folder}/"
        )
        return False
    return True


def prepare(name: str, file: Path, like: str, folder: Path) -> tuple[data.Split, str]:
    """Prepare a raw log as the paper does, unless it is prepared already; and a note on it."""
    with open(file, "rb") as stream:
        source = hashlib.file_digest(stream, "sha256").hexdigest()
    place, origin = folder / "prepared", folder / "prepared.json"
    before = json.loads(origin.read_text("utf-8")) if origin.exists() else {}
    if before.get("sha256") != source or not place.is_dir():
        arguments = ["prepare", str(file), "--like", like, "--out", str(place), "--force"]
        arguments += ["--max-train-events", "5120"] if like == "lastfm" else []
        note = ""
        try:
            cli.main(arguments, standalone_mode=False)
        except click.ClickException as error:
            if like != "lastfm":
                raise
            click.echo(f"{error.message}\n{name}: the artists can't be used, items are tracks")
            cli.main([*arguments, "--item", "track"], standalone_mode=False)
            note = "items are tracks, not artists"
        before = {"sha256": source, "file": file.name, "note": note}
        write_json(origin, before)
    return data.load(place), before["note"]


def describe(name: str, split: data.Split, like: str, note: str, folder: Path) -> DataSet:
    """What ``data.json`` is to say of a data set.

    Data in the format of one of the paper's, or with its name in theirs, get its published column.
    """
    train, heldout = split
    published = next((known for known in datasets.KNOWN if like == known or known in name), None)
    events = train.n_events + heldout.n_events
    is_paper, title = False, name
    if published:
        known = datasets.KNOWN[published]
        counts = (known.users, known.items, known.events)
        is_paper = (train.n_users, train.n_items, events) == counts
        title = known.title if is_paper else f"{name} (from {known.title})"
    facts = {
        "name": name,
        "title": title,
        "note": note,
        "like": like,
        "published": published,
        "is_paper": is_paper,
        "users": train.n_users,
        "items": train.n_items,
        "train_events": train.n_events,
        "heldout_events": heldout.n_events,
        "uniform_nll": math.log(train.n_items),
        "sha256": data.checksum(*split),
        "entropy": data.item_entropy(train).round(6).tolist(),
    }
    return DataSet(facts, split, folder)


def data_sets(
    folder: Path, names: list[str], out: Path, users: int | None
) -> tuple[list[DataSet], bool]:
    """The data sets to run on, each prepared, and whether these are all.

    Built-in data where there is none.
    """
    found = raw_logs(folder)
    absent = [name for name in datasets.KNOWN if name not in found]
    absent = [name for name in absent if name in names or not (names or found)]
    if any([fetch(folder, name) for name in absent]):
        found = raw_logs(folder)
    unknown = [name for name in names if name not in (*found, *datasets.KNOWN, BUILT_IN)]
    if unknown:
        raise click.ClickException(
            f"there are no data {', '.join(unknown)} under {folder}: expected some of "
            f"{', '.join([*found, *datasets.KNOWN, BUILT_IN])}"
        )
    chosen = [name for name in found if not names or name in names]
    if not chosen and names != [BUILT_IN]:
        click.echo("Going on with built-in data: drawn from a known C-GRU, and not the paper's")
    if not chosen or BUILT_IN in names:
        chosen.append(BUILT_IN)
    sets = []
    for name in chosen:
        if name == BUILT_IN:
            split, like, note = synthetic.draw().split, "table", "drawn from a known C-GRU"
        else:
            file, like = found[name]
            try:
                split, note = prepare(name, file, like, out / name)
            except (click.ClickException, crnn_np.CrnnError, OSError) as error:
                click.echo(f"{name} is left out: {error}", err=True)
                continue
        if users is not None and split.train.n_users > users:
            split = data.Split(*(epoch_time.first_users(part, users) for part in split))
            note = "; ".join(filter(None, [note, f"the first {users} users only"]))
        sets.append(describe(name, split, like, note, out / name))
    if not sets:
        raise click.ClickException(f"no data set of {', '.join(chosen)} can be used")
    return sets, len(sets) == len(chosen)


# ---------------------------------------------------------------- the plan


def rnn_settings(profile: dict[str, Any], facts: dict[str, Any], model: str) -> dict[str, Any]:
    """Of a model in ``reproduce.toml``, `choose` among them, with what the command line changes."""
    if "preset" in profile["changes"]:
        return {"like": facts["like"]} | profile["changes"]
    settings = profile["rnns"][model]
    for part in (facts["like"], "paper" if facts["is_paper"] else ""):
        settings = profile.get(part, {}).get("rnns", {}).get(model, settings)
    return {"like": facts["like"]} | settings | profile["changes"]


def trials(of: DataSet, model: str, profile: dict[str, Any]) -> tuple[list[Job], dict[str, Any]]:
    """The runs that choose a model's settings on the validation part, and its other settings."""
    if model not in methods.RNNS:
        return [], {}
    settings = rnn_settings(profile, of.facts, model)
    tried = settings.pop("choose", [])
    jobs = [Job(of, model, 0, settings | one | {"seed": 0, "refit": False}, one) for one in tried]
    return jobs, settings


def runs(of: DataSet, model: str, profile: dict[str, Any]) -> list[Job]:
    """The runs of a model; where trials are still to be made, without what they choose."""
    tried, settings = trials(of, model, profile)
    if model not in methods.RNNS:
        return [Job(of, model, 0, {})]
    records = [record for record in map(made, tried) if record]
    if records:
        best = min(records, key=lambda record: record["validation_nll"])
        settings |= best["trial"] | {"epochs": best["best_epoch"], "patience": 0}
    seeds = profile.get(of.facts["like"], {}).get("seeds", profile["seeds"])
    seeds = profile["seeds_asked"] or seeds
    return [Job(of, model, seed, settings | {"seed": seed}) for seed in range(seeds)]


class Expected(NamedTuple):
    """What a job will need: seconds, bytes, epochs at most."""

    seconds: float
    bytes: int
    epochs: int


def expect(job: Job) -> Expected:
    """Measured on a sample: windows of an RNN, a twentieth of the users for a baseline."""
    train, _ = job.of.split
    model = methods.new(job.model, **job.settings)
    if job.model in methods.RNNS:
        found = model.estimate(train)
        return Expected(found.seconds, found.bytes, model.settings.plan.epochs)
    for some in (2, max(train.n_users // 20, 2)):  # the first time its kernels are loaded
        part = data.Split(*(epoch_time.first_users(log, some) for log in job.of.split))
        began = time.perf_counter()
        model.fit(part.train).evaluate(*part)
        seconds = time.perf_counter() - began
    return Expected(seconds * train.n_events / max(part.train.n_events, 1), 0, 0)


class Plan:
    """All jobs with what they are expected to need; time left as they are done."""

    def __init__(self, jobs: list[Job], tell: Callable[[str], None]) -> None:
        self.jobs = jobs
        self.expected: dict[str, Expected] = {}
        self.done = [made(job) is not None for job in jobs]
        self.spent = self.foreseen = 0.0
        for job, done in zip(jobs, self.done, strict=True):
            key = self._key(job)
            if not done and key not in self.expected:
                tell(f"measuring what {key} will need")
                try:
                    self.expected[key] = expect(job)
                except Exception as error:  # the run itself will say so
                    tell(f"{job}: {error}")

    def _key(self, job: Job) -> str:
        """Jobs with one key need the same, whatever their seed."""
        return str(job).partition(" seed ")[0]

    def seconds(self, at: int) -> float:
        """What a job is expected to take; 0 where it is done, or nobody knows."""
        found = self.expected.get(self._key(self.jobs[at]))
        return found.seconds if found and not self.done[at] else 0.0

    def left(self, after: int) -> float:
        """Seconds that the jobs behind one will take, at the pace so far."""
        pace = self.spent / self.foreseen if self.foreseen > 10 else 1.0
        return pace * sum(map(self.seconds, range(after + 1, len(self.jobs))))

    def took(self, at: int, seconds: float) -> None:
        """Learn the pace from a job."""
        self.spent, self.foreseen = self.spent + seconds, self.foreseen + self.seconds(at)

    def lines(self) -> Iterator[str]:
        """Data set, model, runs, epochs, time and memory, model by model."""
        table = [("", "runs", "done", "epochs", "time", "memory")]
        for key in dict.fromkeys(map(self._key, self.jobs)):
            jobs = [at for at, job in enumerate(self.jobs) if self._key(job) == key]
            done = sum(self.done[at] for at in jobs)
            cells = ("", "", "")
            if key in self.expected:
                one = self.expected[key]
                time_left = planning.duration(one.seconds * (len(jobs) - done))
                room = f"{one.bytes / 1e9:.2f} GB" if one.bytes else ""
                cells = (str(one.epochs or ""), time_left, room)
            table.append((key, str(len(jobs)), str(done), *cells))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for key, *cells in table:
            aligned = [cell.rjust(n) for cell, n in zip(cells, widths[1:], strict=True)]
            yield "  ".join([key.ljust(widths[0]), *aligned]).rstrip()


# ---------------------------------------------------------------- the runs


def remove_checkpoints(job: Job, but: Path | None = None) -> None:
    """Remove what is left of a run that was broken off; all, or all with other settings."""
    for file in job.file.parent.glob(f"{job.file.stem}.*.checkpoint*"):
        if but is None or not file.name.startswith(but.name):
            file.unlink()


def run_job(job: Job, tell: Callable[[str, float], None]) -> dict[str, Any]:
    """Make a run: fit, evaluate, and all that its record says."""
    train, heldout = job.of.split
    model = methods.new(job.model, **job.settings)
    record: dict[str, Any] = {}
    began = time.perf_counter()
    if job.model in methods.RNNS:
        plan = model.settings.plan
        total = plan.epochs * (2 if plan.patience and plan.refit else 1)

        def progress(done: int, events: int, loss: float) -> None:
            share = (len(model.reports) + done / max(events, 1)) / total
            tell(f"epoch {len(model.reports) + 1} of {total}", share)

        job.file.parent.mkdir(parents=True, exist_ok=True)
        remove_checkpoints(job, but=job.checkpoint)
        for _ in model.epochs(train, progress=progress, checkpoint=job.checkpoint):
            pass
        record["epochs"] = [
            {
                "phase": r.phase,
                "epoch": r.epoch,
                "loss": r.loss,
                "validation_nll": r.validation and r.validation["nll"],
            }
            for r in model.reports
        ]
        record["epoch_seconds"] = [r.seconds for r in model.reports if r.phase != "keep"]
        record["parameters"] = sum(block.size for block in model.params)
        record["seconds"] = sum(record["epoch_seconds"])
    else:
        model.fit(train)
        record |= {"epochs": [], "epoch_seconds": [], "parameters": None}
        record["seconds"] = time.perf_counter() - began
    record |= {"fitted": repr(model), "resolved": model.get_params()}
    if job.trial is not None:
        best = model.reports[-1]
        return record | {"best_epoch": best.epoch, "validation_nll": best.validation["nll"]}
    scores = model.evaluate(train, heldout, per_user=True)
    per_user = {name: column.tolist() for name, column in scores.pop("per_user").items()}
    return record | {"scores": scores, "per_user": per_user}


def make(job: Job, chosen: list[dict[str, Any]], tell: Callable[[str, float], None]) -> bool:
    """Make a run and write its record, failed or done."""
    record = {
        "model": job.model,
        "seed": job.seed,
        "asked": job.asked,
        "settings": job.settings,
        "trial": job.trial,
        "chosen": chosen,
        "data_sha256": job.of.facts["sha256"],
        "versions": {"crnn_np": crnn_np.__version__, "python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in LIBRARIES},
        "threads": numba.config.NUMBA_NUM_THREADS,
        "machine": describe_machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    try:
        found = run_job(job, tell)
    except Exception as error:  # whatever one model does, the others are to finish
        message = f"{type(error).__name__}: {error}"
        write_json(job.file, record | {"status": "failed", "error": message})
        click.echo(f"{job} failed: {message}", err=True)
        return False
    write_json(job.file, record | {"status": "done", "error": None} | found)
    remove_checkpoints(job)
    return True


class Progress:
    """Where the plan stands: a bar on a terminal; elsewhere a line a job and every 20 seconds."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.shown = plan, 0.0
        self.bar = None
        if sys.stderr.isatty():
            form = "{percentage:3.0f} % |{bar:16}| {desc}"
            self.bar = tqdm(total=len(plan.jobs), leave=False, bar_format=form)

    def begin(self, at: int) -> None:
        self.at, self.began = at, time.perf_counter()
        self.shown, self.first = 0.0, None
        self.tell("begun", 0.0)

    def tell(self, what: str, share: float) -> None:
        if self.bar is None and time.monotonic() - self.shown < 20:
            return
        self.shown = time.monotonic()
        job = self.plan.jobs[self.at]
        here = self.plan.seconds(self.at) * (1 - share)
        if self.first is None and share > 0:
            self.first = time.perf_counter(), share  # a run that goes on does not begin at 0
        elif self.first is not None and share - self.first[1] > 0.02:
            spent = time.perf_counter() - self.first[0]
            here = spent / (share - self.first[1]) * (1 - share)
        left = planning.duration(here + self.plan.left(self.at))
        if self.bar is None:
            click.echo(
                f"[{self.at + 1}/{len(self.plan.jobs)}] {job}: {what}; {left} left", err=True
            )
            return
        self.bar.n = self.at + share
        self.bar.set_description_str(f"{job}: {what}; {left} left")

    def end(self) -> None:
        self.plan.took(self.at, time.perf_counter() - self.began)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def say(text: str) -> None:
    """A line on stderr, without disturbing a bar."""
    tqdm.write(text, file=sys.stderr)


def reproduce(
    sets: list[DataSet],
    names: list[str],
    profile: dict[str, Any],
    out: Path,
    dry_run: bool,
) -> bool:
    """Make the runs of all data sets; whether none failed."""

    def jobs_of(of: DataSet, model: str) -> list[Job]:
        return [*trials(of, model, profile)[0], *runs(of, model, profile)]

    plan = Plan([job for of in sets for name in names for job in jobs_of(of, name)], say)
    memory = max((one.bytes for one in plan.expected.values()), default=0)
    seconds = sum(map(plan.seconds, range(len(plan.jobs))))
    for line in plan.lines():
        click.echo(line)
    click.echo(
        f"in all about {planning.duration(seconds)} on this machine, beside Figure 1 right; "
        f"at most {memory / 1e9:.2f} GB of memory"
    )
    if dry_run:
        return True
    for of in sets:
        write_json(of.folder / "data.json", of.facts)
    progress, whole = Progress(plan), True
    for at, planned in enumerate(plan.jobs):
        tried, _ = trials(planned.of, planned.model, profile)
        job = planned
        if planned.trial is None:  # by now its trials are made
            job = runs(planned.of, planned.model, profile)[planned.seed]
        if made(job) is None:
            progress.begin(at)
            records = [record for record in map(made, tried) if record]
            chosen = [
                {
                    "settings": r["trial"] | {"epochs": r["best_epoch"]},
                    "validation_nll": r["validation_nll"],
                }
                for r in records
            ]
            if planned.trial is None and tried and not chosen:
                say(f"{job}: none of its trials was made; going on with {job.settings}")
            whole = make(job, chosen, progress.tell) and whole
            progress.end()
        if at + 1 == len(plan.jobs) or plan.jobs[at + 1].of is not planned.of:
            report.write(out)
    progress.close()
    return whole


def _names(context, parameter, value: str | None) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()] if value else []


@click.command()
@click.option("--data", "folder", type=click.Path(path_type=Path), default="data")
@click.option("--out", type=click.Path(path_type=Path), default="results")
@click.option("--profile", type=click.Choice(list(SETTINGS)), default="full")
@click.option("--datasets", callback=_names, help="Names with commas.  [default: all at hand]")
@click.option("--models", callback=_names, help=f"Some of {', '.join(methods.NAMES)}.")
@click.option(
    "--preset", type=click.Choice(presets.names()), help="For each RNN, and nothing else."
)
@click.option("--seeds", type=click.IntRange(1), help="Seeds of each RNN.")
@click.option("--epochs", type=click.IntRange(1), help="Epochs of each RNN, at most.")
@click.option(
    "--epoch-time/--no-epoch-time",
    "with_epoch_time",
    default=True,
    help="Whether to measure Figure 1 right, on the largest data set.",
)
@click.option("--dry-run", is_flag=True, help="Prepare the data and print the plan only.")
def main(
    folder: Path,
    out: Path,
    profile: str,
    datasets: list[str],
    models: list[str],
    preset: str | None,
    seeds: int | None,
    epochs: int | None,
    with_epoch_time: bool,
    dry_run: bool,
) -> None:
    """Make the paper's tables and figures from the raw logs under --data."""
    unknown = [name for name in models if name not in methods.NAMES]
    if unknown:
        raise click.ClickException(
            f"there are no models {', '.join(unknown)}: expected some of {', '.join(methods.NAMES)}"
        )
    changes = {"preset": preset, "epochs": epochs}
    chosen = SETTINGS[profile] | {
        "changes": {name: value for name, value in changes.items() if value is not None},
        "seeds_asked": seeds,
    }
    sets, whole = data_sets(folder, datasets, out, chosen.get("users"))
    names = [name for name in methods.NAMES if not models or name in models]
    whole = reproduce(sets, names, chosen, out, dry_run) and whole
    if with_epoch_time and not dry_run:
        largest = max(sets, key=lambda of: of.split.train.n_events)
        sizes, seconds = chosen["hidden_sizes"], chosen["seconds"]
        file = out / "epoch_time.json"
        name = largest.facts["name"]
        try:
            for row in epoch_time.measure(largest.split.train, name, sizes, seconds, file):
                say(epoch_time.line(row))
        except Exception as error:  # the page is to come all the same
            say(f"Figure 1 right failed: {type(error).__name__}: {error}")
            whole = False
    if not dry_run:
        click.echo(f"report: {report.write(out)}")
    if not whole:
        sys.exit(1)


if __name__ == "__main__":
    main()
