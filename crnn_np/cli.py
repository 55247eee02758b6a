"""The command ``crnn-np``."""

import errno
import json
import logging
import math
import multiprocessing
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import click
import numpy as np

from . import backends, data, datasets, methods, planning, presets, reading
from .demo import check_picture, demo
from .errors import CrnnError, ModelError
from .estimator import CollaborativeRNN
from .explain import MATCHED, NEEDED, picture
from .settings import help_texts
from .training import keeps_best

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Commands(click.Group):
    """A group of commands that end with one line and status 1 on an error of ours."""

    def invoke(self, context):
        try:
            return super().invoke(context)
        except CrnnError as error:
            raise click.ClickException(" ".join(str(error).split())) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # click ends quietly
                raise
            try:
                sys.stdout.flush()
            except OSError:  # nor at the end, where Python would try once more
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise click.ClickException(f"a file can't be read or written: {error}") from error


class _ToStderr(logging.Handler):
    def emit(self, record):
        click.echo(self.format(record), err=True)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(package_name="crnn-np")
def main():
    """Collaborative recurrent networks: predict each user's next item.

    \b
    crnn-np fetch brightkite --to raw
    crnn-np prepare raw/loc-brightkite_totalCheckins.txt.gz --like brightkite --out bk
    crnn-np train bk --preset mixture --out bk.model
    crnn-np evaluate bk.model bk
    crnn-np explain bk.model --user 241 --plot 241.png
    """
    for stream in (sys.stdout, sys.stderr):  # ids may have letters that a terminal lacks
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logger = logging.getLogger("crnn_np")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _ToStderr) for handler in logger.handlers):
        logger.addHandler(_ToStderr())


class _Range(click.ParamType):
    name = "LOW,HIGH"

    def convert(self, value, parameter, context):
        if isinstance(value, tuple):
            return value
        try:
            low, high = (int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not two whole numbers with a comma, such as 3,500")
        if not 0 <= low <= high < 1 << 62:
            self.fail(f"{value!r} is not a range of numbers of events, such as 3,500")
        return low, high


def _separator(context, parameter, value):
    return {"tab": "\t", "\\t": "\t"}.get(value, value)


@main.command()
@click.argument("source", type=click.Path())
@click.option(
    "--like",
    type=click.Choice(["brightkite", "lastfm", "table"]),
    default="table",
    show_default=True,
    help="What SOURCE is: SNAP's check-in file, the Last.fm-1K file or archive, or a CSV, TSV or "
    "Parquet table with a header.",
)
@click.option("--out", required=True, type=click.Path(), help="Directory to make.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace the prepared data set at --out, where nothing else lies in that directory.",
)
@click.option("--user-column", default="user", show_default=True, help="Tables: column of users.")
@click.option("--item-column", default="item", show_default=True, help="Tables: column of items.")
@click.option(
    "--time-column",
    help="Tables: column of times, ISO 8601 (UTC if they do not say), or seconds or "
    "milliseconds since 1970.  "
    "[default: time, if there is one; without times the order of the file is the order]",
)
@click.option(
    "--separator",
    callback=_separator,
    help="Text tables: one character, or 'tab'.  [default: found from the header]",
)
@click.option(
    "--item",
    type=click.Choice(["artist", "track"]),
    default="artist",
    show_default=True,
    help="Last.fm: what an item is. The name stands in where the id is empty.",
)
@click.option(
    "--paper-items",
    is_flag=True,
    help="Last.fm: artists by id alone, so that all without an id are one item, as in the "
    "paper's code.",
)
@click.option("--drop-null-place", is_flag=True, help="Brightkite: drop the place of 32 zeros.")
@click.option(
    "--min-item-events",
    default=10,
    show_default=True,
    type=click.IntRange(min=0),
    help="Drop items with fewer events; first.",
)
@click.option(
    "--min-user-events",
    default=11,
    show_default=True,
    type=click.IntRange(min=0),
    help="Drop users with fewer events; second.",
)
@click.option(
    "--min-user-entropy",
    type=float,
    help="Drop users whose item entropy in nats is at most this; third; -1 keeps all.  "
    "[default: 2.5, with --like lastfm 3.0]",
)
@click.option(
    "--heldout-fraction",
    default=0.025,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Share of each user's events, at the end, to hold out.",
)
@click.option(
    "--heldout-range",
    default=(3, 500),
    show_default="3,500",
    type=_Range(),
    help="Fewest and most events of a user to hold out.",
)
@click.option(
    "--max-train-events",
    type=click.IntRange(min=1),
    help="Keep only the last N training events of each user; the paper kept 5120 of Last.fm.",
)
@click.option(
    "--max-malformed",
    default=0.01,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Share of malformed lines that may be left out.",
)
def prepare(
    source,
    like,
    out,
    force,
    min_item_events,
    min_user_events,
    min_user_entropy,
    heldout_fraction,
    heldout_range,
    max_train_events,
    **options,
):
    """Read, filter and split the log SOURCE; write it to a directory.

    Prints the row of the paper's Table 1 for the data, beside the paper's own.
    """
    data.check_destination(out, force)
    if min_user_entropy is None:
        min_user_entropy = datasets.KNOWN.get(like, datasets.KNOWN["brightkite"]).min_user_entropy
    settings = {
        "min_item_events": min_item_events,
        "min_user_events": min_user_events,
        "min_user_entropy": min_user_entropy,
    }
    with _progress(source) as progress:
        log, n_lines, n_malformed, malformed = reading.read_counted(
            source, like, progress=progress, **options
        )
    filtered = data.filter_events(log, **settings)
    parts = data.split(filtered, heldout_fraction, heldout_range, max_train_events)
    stats = data.save(
        parts,
        out,
        {
            "lines_read": n_lines,
            "lines_skipped": n_malformed,
            "like": like,
            "malformed": [{"line": line, "fault": fault} for line, fault in malformed],
            "settings": settings
            | {
                "heldout_fraction": heldout_fraction,
                "heldout_range": list(heldout_range),
                "max_train_events": max_train_events,
            }
            | {name: options[name] for name in ("item", "paper_items", "drop_null_place")},
        },
        replace=force,
    )
    click.echo(_table(log, filtered, stats))
    click.echo(f"{n_lines} lines read, {n_malformed} left out as malformed; written to {out}")


def _table(log, filtered, stats) -> str:
    """Counts of each stage, and the row of Table 1 where the paper has one."""
    known = datasets.KNOWN.get(stats["like"])
    rows = [
        ("", "users", "items", "events", "training", "held out", "uniform error (nats)"),
        ("read", log.n_users, log.n_items, log.n_events, "", "", ""),
        ("filtered", filtered.n_users, filtered.n_items, filtered.n_events, "", "", ""),
    ]
    train, heldout = stats["train_events"], stats["heldout_events"]
    ours = (stats["users"], stats["items"], train + heldout)
    rows.append(("split", *ours, train, heldout, f"{stats['uniform_nll']:.4f}"))
    note = ""
    if known:
        paper = (known.users, known.items, known.events)
        rows.append((f"paper: {known.title}", *paper, "", "", f"{known.uniform_nll:.2f}"))
        if ours == paper:
            note = "\nThese are the paper's counts."
        else:
            note = "\nNot the paper's counts: this is other data, or it was cut otherwise."
    return _align(rows) + note


def _align(rows) -> str:
    """Rows as lines, the first column aligned left, the others right."""
    text = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    lines = []
    for name, *cells in text:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)


@contextmanager
def _progress(source):
    """A bar on a terminal, a line every 10 seconds elsewhere."""
    if not sys.stderr.isatty():
        shown = time.monotonic()

        def tell(done, total):
            nonlocal shown
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                click.echo(f"{source}: {done / total:.0%} read", err=True)

        yield tell
        return
    from tqdm import tqdm

    with tqdm(desc="reading", unit="B", unit_scale=True, leave=False) as bar:

        def move(done, total):
            bar.total = total
            bar.update(done - bar.n)

        yield move


@main.command()
@click.argument("name", type=click.Choice(list(datasets.KNOWN)))
@click.option(
    "--to",
    "directory",
    default=".",
    show_default=True,
    type=click.Path(),
    help="Directory for the file.",
)
@click.option("--url", help="Another download place.")
def fetch(name, directory, url):
    """Download the original data set NAME and check it.

    Its SHA-256 is kept in checksums.json beside the file: the first download stores and prints
    it, later ones are compared with it.
    """
    click.echo(datasets.fetch(name, directory, url, progress=sys.stderr.isatty()))


_backend_option = click.option(
    "--backend",
    type=click.Choice(list(backends.MODULES)),
    help="To compute with.  [default: the one that the model was trained with]",
)


def _settings_options(command):
    """One option for each field of the settings classes, with its choices and its help text."""
    for cls in reversed(presets.CLASSES):
        texts = help_texts(cls)
        for field in reversed(fields(cls)):
            kind = field.type
            if get_origin(kind) is Literal:
                kind = click.Choice(get_args(kind))
            elif kind is bool:
                kind = click.BOOL
            elif kind not in (int, float):
                kind = _Range()
            flag = "--" + field.name.replace("_", "-").lower()
            command = click.option(flag, field.name, type=kind, help=texts[field.name])(command)
    return command


@main.command()
@click.argument("directory", type=click.Path())
@click.option("--out", type=click.Path(), help="Model file to write.  [required without --dry-run]")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only print what the training will need, windows, parameters, memory and time, after "
    "some seconds of measuring; write nothing.",
)
@click.option(
    "--model",
    "name",
    type=click.Choice(methods.NAMES),
    help="The model, by its name in the paper's tables. Those before p-gru are baselines: they "
    "choose their settings on a validation part.  [default: what preset and options say]",
)
@click.option(
    "--preset",
    type=click.Choice(presets.names()),
    help="Settings to start from; the options below change single ones.  [default: mixture with "
    "--model or --output mixture, else paper]",
)
@click.option(
    "--backend",
    type=click.Choice(list(backends.MODULES)),
    default="numba",
    show_default=True,
    help="numpy is the plain, slow reference.",
)
@click.option("--log", "log_file", type=click.Path(), help="JSON lines.  [default: OUT.jsonl]")
@click.option(
    "--checkpoint",
    type=click.Path(),
    help="File to write after each epoch. Where it is there, training goes on from it, with the "
    "same number of threads to the same bytes as without a break. It goes when training has ended.",
)
@_settings_options
def train(directory, out, dry_run, name, preset, backend, log_file, checkpoint, **changes):
    """Train on the prepared data in DIRECTORY and write the model OUT.

    \b
    crnn-np train bk --preset authors --out bk.model
    crnn-np train bk --preset paper --hidden-size 64 --seed 1 --out bk.model
    crnn-np train bk --preset paper --hidden-size 512 --dry-run
    crnn-np train bk --model bigram --out bigram.model

    The preset gives every setting; its Last.fm column is taken where the data were prepared with
    --like lastfm. OUT.jsonl gets a line with the settings and one for each epoch. Without early
    stopping the model is written after each epoch, so that an interrupted training leaves the last
    one; with early stopping from when the number of epochs is known. A --checkpoint keeps either.
    """
    if not (out or dry_run):
        raise click.MissingParameter(param_hint="'--out'", param_type="option")
    log_path = Path(log_file or f"{out}.jsonl")
    if not dry_run:
        places = [("--out", out), ("--log", log_path)]
        if checkpoint:
            places += [("--checkpoint", checkpoint), ("--checkpoint", f"{checkpoint}.best")]
        _check_places(directory, places)
    parts = data.load(directory)
    given = changes = {key: value for key, value in changes.items() if value is not None}
    if name in methods.BASELINES:
        source = click.get_current_context().get_parameter_source
        strange = ("dry_run", "checkpoint", "preset", "backend", "log_file")
        named = [x for x in strange if source(x) is click.core.ParameterSource.COMMANDLINE]
        if named:
            flags = " and no ".join("--" + x.removesuffix("_file").replace("_", "-") for x in named)
            raise click.BadOptionUsage("--model", f"{name} has no {flags}")
        model = methods.new(name, **changes).fit(parts.train)
        model.save(out)
        click.echo(f"{model}\nmodel written to {out}")
        return
    preset = preset or ("mixture" if "mixture" in (name, changes.get("output")) else "paper")
    like = data.load_stats(directory)["like"]
    changes = changes | {"preset": preset, "like": like, "backend": backend}
    model = methods.new(name, **changes) if name else CollaborativeRNN(**changes)
    _check_used(given, model.settings)
    if dry_run:
        _dry_run(model, parts.train)
        return
    click.echo(
        f"{parts.train.n_users} users, {parts.train.n_items} items, "
        f"{parts.train.n_events} training events; {model}"
    )
    settings = *model.settings, parts.train
    needed = planning.memory(*settings, backend=backend)
    click.echo(_memory_line(needed, planning.device_memory(*settings, backend=backend)))
    lines, mode = [{"data": str(directory), "settings": model.get_params()}], "w"
    with _epoch_progress() as progress:  # only now: its clock would count the compilation
        for report in model.epochs(parts.train, progress=progress, checkpoint=checkpoint):
            if report.phase != "choose":
                model.save(out)
            record = report._asdict()
            del record["params"], record["accumulators"]
            lines.append(record | {"events_per_second": report.events / report.seconds})
            _write_log(log_path, lines, mode)
            lines, mode = [], "a"
            click.echo(_epoch_line(report))
    if checkpoint:
        Path(checkpoint).unlink(missing_ok=True)
        if keeps_best(model.settings.plan):
            Path(f"{checkpoint}.best").unlink(missing_ok=True)
    click.echo(f"model written to {out}, log to {log_path}")


def _check_used(given, settings):
    """Raise where an option was given that nothing reads with these settings."""
    spec, _, plan = settings
    idle = {}
    if spec.output != "mixture":
        idle |= dict.fromkeys(("pointers", "memory", "gate_size"), f"output is {spec.output}")
    if spec.cell == "tanh":
        idle["candidate"] = "cell is tanh"
    if not plan.patience:
        early = "refit", "validation_range", "validation_fraction"
        idle |= dict.fromkeys(early, "patience is 0")
    for name in given:
        if name in idle:
            option = "--" + name.replace("_", "-")
            raise click.BadOptionUsage(
                option, f"{option} has no effect where {idle[name]}: leave it out, or change that"
            )


def _check_places(directory, places):
    """Raise where a file can't be written, or would be written over another one."""
    taken = {(Path(directory) / name).resolve(): f"a file of {directory}" for name in data.FILES}
    for option, place in places:
        path = Path(place)
        try:
            if not path.absolute().parent.is_dir():
                raise ModelError(f"{path}: its folder does not exist; make it first")
            if path.is_dir():
                raise ModelError(f"{path} is a directory: {option} needs the name of a file")
            if path.exists() and not path.is_file() and option != "--log":
                raise ModelError(f"{path} is no regular file: {option} would replace it")
        except OSError as error:
            raise ModelError(f"{path} can't be written ({error.strerror})") from error
        if not os.access(path.absolute().parent, os.W_OK):
            raise ModelError(f"{path}: its folder can't be written to; choose another")
        where = path.resolve()
        if where in taken:
            raise ModelError(f"{path} is {taken[where]}: choose another name for {option}")
        taken[where] = f"the file of {option} too"


def _write_log(path, lines, mode):
    """JSON lines, after each epoch; not before, so that a failing start leaves an older log."""
    try:
        with open(path, mode, encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise ModelError(f"{path}: the log can't be written ({error.strerror})") from error


def _dry_run(model, log):
    """Print what training will need."""
    click.echo(
        f"{log.n_users:,} users, {log.n_items:,} items, {log.n_events:,} training events; {model}"
    )
    if model.backend == "numba":
        click.echo("Measuring, for some seconds; a first run compiles its kernels, up to a minute.")
        # Compiled elsewhere: the compiler's memory is no part of a later run that finds them.
        spawn = multiprocessing.get_context("spawn")
        compiling = spawn.Process(
            target=planning.load_kernels, args=(*model.settings, model.backend)
        )
        compiling.start()
        compiling.join()
    plan = model.settings.plan
    found = model.estimate(log)
    click.echo(f"{found.windows:,} windows an epoch, {found.parameters:,} parameters")
    click.echo(_memory_line(found.bytes, found.device_bytes))
    if found.bytes is None:
        click.echo("time: not estimated: no device")
        return
    time_line = f"time: {planning.duration(found.seconds_per_epoch)} an epoch, "
    if plan.patience:
        time_line += f"{planning.duration(found.validation_seconds)} its validation, at most "
    time_line += (
        f"{planning.duration(found.seconds)} for {plan.epochs} epoch{'s' * (plan.epochs > 1)}"
    )
    if plan.patience and plan.refit:
        time_line += " and as many of the refit"
    click.echo(time_line)


def _memory_line(n_bytes, on_device) -> str:
    host = "not estimated: no device" if n_bytes is None else f"{n_bytes / 1e9:.2f} GB at its peak"
    there = f"; on the device {on_device / 1e9:.2f} GB at its peak" if on_device else ""
    return f"memory: {host}{there}"


def _epoch_line(report) -> str:
    if report.phase == "keep":
        return f"keeping the parameters of epoch {report.epoch}"
    line = (
        f"{report.phase} epoch {report.epoch}/{report.epochs}: loss {report.loss:.4f} nats, "
        f"{report.events / report.seconds:,.0f} events/s"
    )
    if report.validation:
        error = report.validation["nll"]
        line += f", validation {error:.4f} (lowest after epoch {report.best_epoch})"
    return line


@contextmanager
def _epoch_progress():
    """For `epochs`: a bar on a terminal, a line every 30 seconds elsewhere."""
    if not sys.stderr.isatty():
        began = shown = time.monotonic()
        before = 0

        def tell(done, total, loss):
            nonlocal began, shown, before
            now = time.monotonic()
            if done < before:
                began = now
            before = done
            if now - shown > 30:
                shown = now
                rate = done / max(now - began, 1e-9)
                click.echo(
                    f"{done:,} of {total:,} events, {rate:,.0f} events/s, loss "
                    f"{loss / max(done, 1):.4f}, {(total - done) / max(rate, 1):.0f} s left",
                    err=True,
                )

        yield tell
        return
    from tqdm import tqdm

    with tqdm(unit=" events", unit_scale=True, leave=False) as bar:

        def move(done, total, loss):
            if done < bar.n:
                bar.reset(total)
            bar.total = total
            bar.set_postfix(loss=f"{loss / max(done, 1):.4f}", refresh=False)
            bar.update(done - bar.n)

        yield move


@main.command()
@click.argument("model", type=click.Path())
@click.argument("directory", type=click.Path())
@_backend_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--per-user", is_flag=True, help="Add every user's errors.")
@click.option(
    "-n", default=20, show_default=True, type=click.IntRange(min=1), help="Of Recall@n and MRR@n."
)
def evaluate(model, directory, backend, as_json, per_user, n):
    """Errors of the model file MODEL on the held-out part of the data in DIRECTORY.

    Replays each user's history, then predicts each held-out event from all before it. nll is
    Eq. 3 of the paper: the mean over users of each user's mean, in nats.
    """
    fitted = _load_model(model, backend)
    parts = data.load(directory)
    scores = fitted.evaluate(parts.train, parts.heldout, n=n, per_user=per_user)
    table = scores.pop("per_user", None)
    if table is not None:
        table = {name: column.tolist() for name, column in table.items()}
        table["user"] = parts.train.user_ids[table["user"]].tolist()
    if as_json:
        found = scores | ({"per_user": table} if table else {})
        click.echo(json.dumps(_finite(found), allow_nan=False))
        return
    click.echo(f"{'':12}{'users':>12}{'events':>12}{'without first':>16}")
    for name in ("nll", f"recall@{n}", f"mrr@{n}"):
        later = scores[f"{name}_after_first"]
        shown = "" if later is None else f"{later:.4f}"
        click.echo(f"{name:12}{scores[name]:12.4f}{scores[f'{name}_events']:12.4f}{shown:>16}")
    click.echo(
        f"perplexity {scores['perplexity']:.2f}; {scores['events']} held-out events of "
        f"{scores['users_evaluated']} of {scores['users']} users"
    )
    if table:
        click.echo("\t".join(table))
        for row in zip(*table.values(), strict=True):
            click.echo("\t".join(map(str, row)))


def _load_model(path, backend):
    """The model in a file, to be computed with a backend, or where None with its own."""
    found = methods.load(path)
    if backend and not isinstance(found, CollaborativeRNN):
        raise click.BadOptionUsage("--backend", f"{path} holds a baseline, which has no --backend")
    return found.set_params(backend=backend) if backend else found


def _finite(found):
    """What JSON can hold: null for numbers that are not finite."""
    if isinstance(found, dict):
        return {key: _finite(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_finite(value) for value in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


@main.command()
@click.argument("model", type=click.Path())
@_backend_option
@click.option("--user", required=True, help="Id of the user, as in the raw log.")
@click.option(
    "--top",
    default=10,
    show_default=True,
    type=click.IntRange(min=1),
    help="Number of items, and of past events.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Picture to write, with 40 of the items at most; .png, .svg or .pdf.",
)
def explain(model, backend, user, top, plot):
    """What the model file MODEL expects of a user's next event, and where from.

    \b
    crnn-np explain bk.model --user 241
    crnn-np explain bk.model --user 241 --top 5 --plot 241.png

    For models with output "mixture". The next event is the one after all that the model was
    trained on. Three tables: the share that the gate gives each expert; the most probable items,
    with what each expert adds to their probability; the past events that the pointers used most,
    with what each pointer adds to the probability of their items. The match says how much of what
    came before a past event equals what comes before the next one: none, skip (the item two before
    alone), one item, two or three.
    """
    if plot:
        check_picture(plot)
    fitted = _load_model(model, backend)
    if not isinstance(fitted, CollaborativeRNN):
        raise ModelError(NEEDED)
    found = fitted.explain(user, top)
    if plot:
        picture(found, plot)
    click.echo(_explanation(found, top, len(fitted.params.W_in)))
    if plot:
        click.echo(f"\nPicture: {plot}")


def _explanation(found, top, n_items) -> str:
    """The tables of an explanation; what is not listed is summed up in a last row."""

    def row(cells, values):
        return [" ".join(str(cell).split()) for cell in cells] + [f"{v:.4f}" for v in values]

    shares = [("expert", "share")]
    shares += [row([name], [g]) for name, g in zip(found.experts, found.shares, strict=True)]

    items = [("next item", "p", *found.experts)]
    values = np.column_stack([found.p, found.parts])
    items += [row([item], v) for item, v in zip(found.items, values, strict=True)]
    if n_items > len(values):
        rest = np.append(1.0, found.shares) - values.sum(axis=0)
        items.append(row([f"{n_items - len(values):,} others"], rest.clip(0)))

    times = [] if found.past_times is None else [_time(t) for t in found.past_times]
    when = ["time (UTC)"] if times else []
    pointers = found.experts[-found.weights.shape[1] :]
    past = [("past event", "lag", *when, "match", "weight", *pointers)]
    values = np.column_stack([found.weights.sum(axis=1), found.weights])
    largest = np.argsort(-values[:, 0], kind="stable")
    for s in largest[:top]:
        cells = [found.past_items[s], s + 1, *times[s : s + 1], MATCHED[found.match[s]]]
        past.append(row(cells, values[s]))
    if len(values) > top:
        blank = [""] * (len(when) + 2)
        rest = values[largest[top:]].sum(axis=0)
        past.append(row([f"{len(values) - top:,} others", *blank], rest))

    last = f" at {times[0]} UTC" if times else ""
    head = " ".join(f"User {found.user}: the event after {found.past_items[0]}{last}".split())
    return "\n\n".join([head, *map(_align, (shares, items, past))])


def _time(seconds) -> str:
    return str(np.datetime64(int(seconds), "s")).replace("T", " ")


main.add_command(demo)
