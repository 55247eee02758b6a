"""Activity logs: the filter, the split, and the prepared form on disk.

A raw file becomes an `EventLog` (`reading.read_events`), loses rare items and uninformative users
(`filter_events`), is cut in two parts in time (`split`) and stored (`save`, `load`).
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .errors import DataError, SettingsError

FORMAT = 1
FILES = ("train.parquet", "heldout.parquet", "users.parquet", "items.parquet", "stats.json")


class EventLog(NamedTuple):
    """Sequences of events of many users, one user after the other.

    Attributes
    ----------
    indptr : i64[U + 1]
        User u's events are ``items[indptr[u]:indptr[u + 1]]``.
    items : i32[E]
        Item of each event, 0 <= item < I; a user's events are in time order.
    times : i64[E] or None
        Seconds since 1970 UTC; None where the source has no times.
    user_ids, item_ids : object[U], object[I]
        The ids (str) of the source.
    """

    indptr: np.ndarray
    items: np.ndarray
    times: np.ndarray | None
    user_ids: np.ndarray
    item_ids: np.ndarray

    @property
    def n_users(self) -> int:
        return len(self.indptr) - 1

    @property
    def n_items(self) -> int:
        return len(self.item_ids)

    @property
    def n_events(self) -> int:
        return len(self.items)

    @property
    def lengths(self) -> np.ndarray:
        """Number of events of each user, i64[U]."""
        return np.diff(self.indptr)


class Split(NamedTuple):
    """The training part and the held-out part of a log, over the same users and items."""

    train: EventLog
    heldout: EventLog


def is_sound(log: EventLog) -> bool:
    """Whether the numbers of a log are in range and order."""
    indptr, items = log.indptr, log.items
    return bool(
        indptr.shape == (len(log.user_ids) + 1,)
        and (indptr[0], indptr[-1]) == (0, items.size)
        and (np.diff(indptr) >= 0).all()
        and (items.size == 0 or 0 <= items.min() <= items.max() < log.n_items)
    )


def check_log(log: EventLog) -> None:
    """Raise DataError where this is no log, or its numbers are not in range and order."""
    if not isinstance(log, EventLog):
        raise DataError(
            f"a {type(log).__name__} came, an EventLog was expected: make one with from_sequences, "
            "read_events or load, whose result has two, train and heldout"
        )
    if not is_sound(log):
        raise DataError(
            "the log's numbers do not fit each other: indptr rises from 0 to the number of events, "
            "with one number more than users, and items are 0 to n_items - 1; make it with "
            "from_sequences"
        )


def from_sequences(
    sequences: Iterable[Sequence[int] | np.ndarray], n_items: int | None = None
) -> EventLog:
    """Make a log of sequences of item numbers, one sequence per user.

    Parameters
    ----------
    sequences : iterable of 1-D integer sequences
    n_items : int, optional
        Number of items; by default the largest number + 1.

    Returns
    -------
    EventLog
        Without times; the ids are ``str(index)``.

    Raises
    ------
    DataError
        An item is no integer in [0, n_items).
    """
    parts = [np.asarray(sequence) for sequence in sequences]
    for user, part in enumerate(parts):
        if part.ndim != 1 or (part.size and part.dtype.kind not in "iu"):
            raise DataError(
                f"sequence {user} has shape {part.shape} and type {part.dtype}: "
                "a one-dimensional sequence of integers was expected"
            )
    indptr = np.cumsum([0] + [part.size for part in parts], dtype=np.int64)
    items = np.concatenate([part.astype(np.int64) for part in parts] or [np.zeros(0, np.int64)])
    if n_items is None:
        n_items = int(items.max(initial=-1)) + 1
    if n_items > np.iinfo(np.int32).max:
        raise DataError(
            f"items run up to {n_items - 1}: they are numbers from 0 on, without gaps; "
            "`read_events` makes them of ids"
        )
    if items.size and not 0 <= items.min() <= items.max() < n_items:
        raise DataError(
            f"items run from {items.min()} to {items.max()}: with n_items = {n_items} "
            f"0 to {n_items - 1} was expected"
        )
    return EventLog(
        indptr, items.astype(np.int32), None, _numbered_ids(len(parts)), _numbered_ids(n_items)
    )


def cut_tail(log: EventLog, lengths: Sequence[int] | np.ndarray) -> Split:
    """Cut the last ``lengths[u]`` events of each user off as the held-out part.

    Parameters
    ----------
    log : EventLog
    lengths : i64[U]
        0 <= lengths <= log.lengths.

    Returns
    -------
    Split
        Users and items are numbered as in `log`.

    Raises
    ------
    SettingsError
        `lengths` has another shape or is out of range.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.shape != (log.n_users,):
        raise SettingsError(f"lengths has shape {lengths.shape}: ({log.n_users},) was expected")
    if ((lengths < 0) | (lengths > log.lengths)).any():
        raise SettingsError("lengths must lie between 0 and each user's number of events")
    first = np.repeat(log.indptr[1:] - lengths, log.lengths)
    held = np.arange(log.n_events) >= first
    return Split(_select(log, ~held), _select(log, held))


def concatenate(train: EventLog, heldout: EventLog) -> EventLog:
    """Append each user's held-out events to their training events.

    Parameters
    ----------
    train, heldout : EventLog
        Over the same users and items.

    Returns
    -------
    EventLog
        With times only if both parts have them.

    Raises
    ------
    DataError
        The parts have other numbers of users or items.
    """
    if (train.n_users, train.n_items) != (heldout.n_users, heldout.n_items):
        raise DataError(
            f"the parts do not belong together: {train.n_users} users and {train.n_items} items "
            f"in the first, {heldout.n_users} and {heldout.n_items} in the second"
        )
    indptr = train.indptr + heldout.indptr
    to_train = np.arange(train.n_events) + np.repeat(heldout.indptr[:-1], train.lengths)
    to_heldout = np.arange(heldout.n_events) + np.repeat(train.indptr[1:], heldout.lengths)

    def join(first, second):
        joined = np.empty(len(first) + len(second), first.dtype)
        joined[to_train] = first
        joined[to_heldout] = second
        return joined

    times = None
    if train.times is not None and heldout.times is not None:
        times = join(train.times, heldout.times)
    items = join(train.items, heldout.items)
    return train._replace(indptr=indptr, items=items, times=times)


def checksum(*logs: EventLog | None) -> str:
    """SHA-256 of the sequences of some logs, in hexadecimal; ids and times do not count."""
    digest = hashlib.sha256()
    for log in logs:
        if log is not None:
            digest.update(np.ascontiguousarray(log.indptr, np.int64).tobytes())
            digest.update(np.ascontiguousarray(log.items, np.int32).tobytes())
    return digest.hexdigest()


def filter_events(
    log: EventLog,
    min_item_events: int = 10,
    min_user_events: int = 11,
    min_user_entropy: float = 2.5,
) -> EventLog:
    """Drop rare items, then short users, then users who repeat themselves.

    One pass in this order, as in the code of the paper's authors: items with fewer than
    `min_item_events` events, users with fewer than `min_user_events` of the remaining events,
    users whose item entropy is at most `min_user_entropy`. Items and users without events go
    as well; the others are renumbered in their old order.

    Parameters
    ----------
    log : EventLog
    min_item_events, min_user_events : int
    min_user_entropy : float
        Nats; a negative number keeps every user.

    Returns
    -------
    EventLog

    Raises
    ------
    DataError
        Nothing is left; the text says which of the three emptied the log.
    """
    if log.n_events == 0:
        raise DataError("the log has no events")
    counts = np.bincount(log.items, minlength=log.n_items)
    log = _select(log, (counts >= min_item_events)[log.items])
    if log.n_events == 0:
        raise DataError(
            f"the filter left nothing: no item has min_item_events = {min_item_events} events "
            f"(the most frequent has {counts.max()}); lower --min-item-events"
        )
    log, longest = _select_users(log, log.lengths >= max(min_user_events, 1)), log.lengths.max()
    if log.n_events == 0:
        raise DataError(
            f"the filter left nothing: no user has min_user_events = {min_user_events} events "
            f"of frequent items (the longest has {longest}); lower --min-user-events"
        )
    entropy = item_entropy(log)
    log = _select_users(log, entropy > min_user_entropy)
    if log.n_events == 0:
        raise DataError(
            f"the filter left nothing: no user's item entropy is over min_user_entropy = "
            f"{min_user_entropy:g} nats (the highest is {entropy.max():.4g}); "
            "lower --min-user-entropy"
        )
    return _renumber_items(log, np.bincount(log.items, minlength=log.n_items) > 0)


def split(
    log: EventLog,
    heldout_fraction: float = 0.025,
    heldout_range: tuple[int, int] = (3, 500),
    max_train_events: int | None = None,
) -> Split:
    """Hold out the end of each user's sequence.

    Of a user's n events the last ``round(heldout_fraction * n)`` (halves to even), clipped to
    `heldout_range`, are held out; at least one event stays in the training part. Items are
    those of the training parts before these are cut to their last `max_train_events` events;
    held-out events of other items are dropped, so a user may be left without any.

    Parameters
    ----------
    log : EventLog
    heldout_fraction : float
        In [0, 1].
    heldout_range : (int, int)
        Fewest and most held-out events of a user.
    max_train_events : int, optional
        Default: no limit. The paper used 5120 for Last.fm.

    Returns
    -------
    Split
        Items are renumbered in their old order, users keep their numbers.

    Raises
    ------
    SettingsError
        A setting is out of range.
    """
    low, high = heldout_range
    if not 0 <= heldout_fraction <= 1:
        raise SettingsError(f"heldout_fraction is {heldout_fraction}: 0 to 1 was expected")
    if not 0 <= low <= high < 1 << 62:
        raise SettingsError(f"heldout_range is {low},{high}: 0 <= fewest <= most was expected")
    if max_train_events is not None and max_train_events < 1:
        raise SettingsError(f"max_train_events is {max_train_events}: at least 1 was expected")
    lengths = log.lengths
    n_heldout = np.clip(np.rint(heldout_fraction * lengths).astype(np.int64), low, high)
    train, heldout = cut_tail(log, np.clip(n_heldout, 0, np.maximum(lengths - 1, 0)))
    known = np.bincount(train.items, minlength=log.n_items) > 0
    heldout = _renumber_items(_select(heldout, known[heldout.items]), known)
    train = _renumber_items(train, known)
    if max_train_events is not None:
        train = cut_tail(train, np.minimum(train.lengths, max_train_events)).heldout
    return Split(train, heldout)


def save(split: Split, directory: str | os.PathLike, stats: dict, replace: bool = False) -> dict:
    """Write a prepared data set: four Parquet files and ``stats.json``.

    Everything is written to a temporary directory beside `directory`, which then takes the
    name: no reader ever sees a half-written data set. Same input, same bytes.

    Parameters
    ----------
    split : Split
    directory : path
        Must not exist, or with `replace` be a prepared data set.
    stats : dict
        Entries for ``stats.json`` beside the counts that follow from `split`: `lines_read`,
        `lines_skipped`, `like` and whatever else should be kept (JSON values).
    replace : bool

    Returns
    -------
    dict
        The contents of ``stats.json``.

    Raises
    ------
    DataError
        `directory` is taken, or can't be written.
    """
    directory = Path(directory)
    check_destination(directory, replace)
    stats = {
        **{"lines_read": None, "lines_skipped": None, "like": "table"},
        **stats,
        **_counts(split),
        "uniform_nll": math.log(split.train.n_items),
        "format": FORMAT,
    }
    tables = {
        "train": _event_table(split.train),
        "heldout": _event_table(split.heldout),
        "users": _id_table(split.train.user_ids),
        "items": _id_table(split.train.item_ids),
    }
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        new, old = work / "new", work / "old"
        try:
            new.mkdir()
            for name, table in tables.items():
                _write_parquet(table, new / f"{name}.parquet")
            text = json.dumps(stats, indent=2, sort_keys=True) + "\n"
            (new / "stats.json").write_text(text, encoding="utf-8")
            if directory.exists():
                os.rename(directory, old)
            try:
                os.rename(new, directory)
            except BaseException:
                if old.exists() and not directory.exists():
                    os.rename(old, directory)
                raise
        finally:
            if directory.exists() or not old.exists():
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise DataError(
            f"{directory}: can't write the data set: {error.strerror or error}"
        ) from error
    return stats


def check_destination(directory: str | os.PathLike, replace: bool = False) -> None:
    """Raise `DataError` unless `save` may write to `directory`."""
    directory = Path(directory)
    try:
        if not directory.exists():
            return
    except OSError as error:
        raise DataError(f"{directory} can't be written ({error.strerror})") from error
    if not (directory / "stats.json").is_file() or not (directory / "train.parquet").is_file():
        raise DataError(f"{directory} exists and is no prepared data set: choose another place")
    if not replace:
        raise DataError(f"{directory} holds a prepared data set already: --force replaces it")
    others = sorted({path.name for path in directory.iterdir()} - set(FILES))
    if others:
        raise DataError(
            f"{directory} holds other files too, {', '.join(others[:5])}: move them elsewhere, "
            "since all of it is replaced"
        )


def load(directory: str | os.PathLike) -> Split:
    """Read a data set that `save` wrote.

    Parameters
    ----------
    directory : path

    Returns
    -------
    Split

    Raises
    ------
    DataError
        The directory is missing, incomplete or damaged.
    """
    directory = Path(directory)
    stats = load_stats(directory)
    user_ids = _read_ids(directory / "users.parquet")
    item_ids = _read_ids(directory / "items.parquet")
    train = _read_events_table(directory / "train.parquet", user_ids, item_ids)
    heldout = _read_events_table(directory / "heldout.parquet", user_ids, item_ids)
    result = Split(train, heldout)
    for key, value in _counts(result).items():
        if stats.get(key) != value:
            raise DataError(
                f"{directory}: {value} {key} in the files, {stats.get(key)} in stats.json: "
                "the data set is damaged, prepare it again"
            )
    return result


def load_stats(directory: str | os.PathLike) -> dict:
    """Read ``stats.json`` of a prepared data set; raises `DataError` if there is none."""
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory}: no such directory; `crnn-np prepare` makes one")
    missing = [name for name in FILES if not (directory / name).is_file()]
    if missing:
        raise DataError(
            f"{directory} is no whole prepared data set: {', '.join(missing)} missing; "
            "`crnn-np prepare` makes one"
        )
    path = directory / "stats.json"
    try:
        stats = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error}): prepare the data again") from error
    if not isinstance(stats, dict) or stats.get("format") != FORMAT:
        raise DataError(f"{path} is not of format {FORMAT}: prepare the data again")
    return stats


def _numbered_ids(n: int) -> np.ndarray:
    return np.array([str(index) for index in range(n)], dtype=object)


def _select(log: EventLog, keep: np.ndarray) -> EventLog:
    """Keep the events of a mask; users and items keep their numbers."""
    kept_before = np.concatenate(([0], np.cumsum(keep)))
    times = None if log.times is None else log.times[keep]
    return log._replace(indptr=kept_before[log.indptr], items=log.items[keep], times=times)


def _select_users(log: EventLog, keep: np.ndarray) -> EventLog:
    """Keep the users of a mask and renumber them."""
    indptr = np.concatenate(([0], np.cumsum(log.lengths[keep])))
    selected = _select(log, np.repeat(keep, log.lengths))
    return selected._replace(indptr=indptr, user_ids=log.user_ids[keep])


def _renumber_items(log: EventLog, keep: np.ndarray) -> EventLog:
    """Keep the items of a mask, which must cover all events, and renumber them."""
    number = np.cumsum(keep, dtype=np.int32) - np.int32(1)
    return log._replace(items=number[log.items], item_ids=log.item_ids[keep])


def item_entropy(log: EventLog) -> np.ndarray:
    """Entropy in nats of each user's own distribution of items, f64[U]."""
    users = np.repeat(np.arange(log.n_users), log.lengths)
    pairs, counts = np.unique(users * log.n_items + log.items, return_counts=True)
    users = pairs // log.n_items
    share = counts / log.lengths[users]
    return np.bincount(users, weights=-share * np.log(share), minlength=log.n_users)


def _counts(split: Split) -> dict:
    return {
        "users": split.train.n_users,
        "items": split.train.n_items,
        "train_events": split.train.n_events,
        "heldout_events": split.heldout.n_events,
    }


def _event_table(log: EventLog):
    import pyarrow as pa

    columns = {
        "user": np.repeat(np.arange(log.n_users, dtype=np.int32), log.lengths),
        "item": log.items,
    }
    if log.times is not None:
        columns["time"] = log.times
    return pa.table(columns)


def _id_table(ids: np.ndarray):
    import pyarrow as pa

    return pa.table({"id": pa.array(ids, pa.string())})


def _write_parquet(table, path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(
        table,
        path,
        compression="zstd",
        use_dictionary=[name for name in table.column_names if name in ("user", "item")],
        write_page_checksum=True,
    )


def _read_parquet(path: Path, types: dict) -> dict:
    """Columns of a Parquet file as Arrow arrays, checked against `types` (name: type)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # read_table imports Arrow's data sets, and sees a meaning in an = in the directory's name
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is damaged ({reason}): prepare the data again") from error
    found = dict(zip(table.column_names, table.schema.types, strict=True))
    if any(types.get(name) != kind for name, kind in found.items()) or any(
        column.null_count for column in table.columns
    ):
        raise DataError(f"{path} holds {found}: {types} was expected; prepare the data again")
    return {name: table.column(name) for name in table.column_names}


def _read_ids(path: Path) -> np.ndarray:
    import pyarrow as pa

    return _read_parquet(path, {"id": pa.string()})["id"].to_numpy()


def _read_events_table(path: Path, user_ids: np.ndarray, item_ids: np.ndarray) -> EventLog:
    import pyarrow as pa

    types = {"user": pa.int32(), "item": pa.int32(), "time": pa.int64()}
    columns = {
        name: np.require(column.to_numpy(), requirements=["C", "W"])
        for name, column in _read_parquet(path, types).items()
    }
    if "user" not in columns or "item" not in columns:
        raise DataError(f"{path} lacks a column of user, item: prepare the data again")
    users, items = columns["user"], columns["item"]
    indptr = np.searchsorted(users, np.arange(len(user_ids) + 1))
    log = EventLog(indptr, items, columns.get("time"), user_ids, item_ids)
    if (np.diff(users) < 0).any() or not is_sound(log):
        raise DataError(f"{path} holds numbers out of range or order: prepare the data again")
    return log
