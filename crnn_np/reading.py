"""Raw files to an `EventLog`: the check-in file, the Last.fm-1K file, and any table."""

import codecs
import csv
import difflib
import io
import logging
import os
import tarfile
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .data import EventLog
from .errors import DataError, SettingsError

NULL_PLACE = "0" * 32
ARCHIVE_MEMBER = "userid-timestamp-"
SEPARATORS = "\t,;|"
BLOCK = 1 << 20  # bytes the parser takes at a time, and longest line
HOPELESS = 1000  # lines of which none has the right number of columns
N_EXAMPLES = 5
PACKED = {b"PK\3\4": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd"}
LAST = 253_402_300_799  # second of the year 9999
NUMBER = r"^-?\d{1,15}(\.\d*)?$"
DAY = r"^\d{4}-\d\d-\d\d"
CLOCK = r"[T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?"
ZONE = r"(Z|[+-]\d\d:?\d\d)$"
logger = logging.getLogger(__name__)

Progress = Callable[[int, int], object] | None


class Reading(NamedTuple):
    """A raw log, and what the file held beside it.

    Attributes
    ----------
    log : EventLog
    n_lines, n_malformed : int
        Lines of the file without its header, and how many of these were left out as malformed.
    malformed : list of (int, str)
        Line number (from 1, the header counts) and fault of the first few.
    """

    log: EventLog
    n_lines: int
    n_malformed: int
    malformed: list[tuple[int, str]]


def read_events(source: str | os.PathLike, like: str = "table", **options) -> EventLog:
    """Read a raw log.

    Parameters
    ----------
    source : path
        A text file, plain or gzip; the Last.fm-1K archive as it is downloaded (.tar.gz);
        a Parquet table.
    like : "brightkite", "lastfm" or "table"
        The SNAP check-in file, the Last.fm-1K file, or a table with named columns.
    **options
        See `read_counted`.

    Returns
    -------
    EventLog
        Unfiltered. Users and items are numbered by their first appearance in the file, from
        top to bottom. A user's events are in time order, those of the same second in file
        order; Brightkite and Last.fm files are newest first and are reversed before.

    Raises
    ------
    DataError
        The file is missing, unreadable or no such log, or too many lines are malformed.
    SettingsError
        An option does not fit.
    """
    return read_counted(source, like, **options).log


def read_counted(
    source: str | os.PathLike,
    like: str = "table",
    *,
    item: str = "artist",
    paper_items: bool = False,
    drop_null_place: bool = False,
    user_column: str = "user",
    item_column: str = "item",
    time_column: str | None = None,
    separator: str | None = None,
    max_malformed: float = 0.01,
    progress: Progress = None,
) -> Reading:
    """Read a raw log, as `read_events`, and say what was left out.

    A line is malformed if it has another number of columns, an empty user or item, a time that
    can't be read, or one of the three is not UTF-8. Blank lines at the end do not count. Lines
    inside one of the three, or inside quotes to the end of the file, are counted by themselves: a
    quote is left open.

    Parameters
    ----------
    source, like
        See `read_events`.
    item : "artist" or "track"
        What a Last.fm item is. Without an id it is ``name:ARTIST`` or ``name:ARTIST<tab>TRACK``.
    paper_items : bool
        Last.fm artists by id alone, as the paper's authors had it: all artists without an id
        become one item, whose id is the empty string.
    drop_null_place : bool
        Leave out Brightkite check-ins at the place of 32 zeros ("no place").
    user_column, item_column, time_column : str
        Columns of a table. Times are ISO 8601 (UTC if they do not say) or seconds since 1970, or
        milliseconds, where most would be after the year 9999 as seconds; by default they are in
        the column `time` if there is one, and without times the order of the file is the order.
    separator : str, optional
        Of the columns of a text table; by default found from the header. Quotes have no
        meaning where it is a tab.
    max_malformed : float
        Largest share of malformed lines, and of lines inside quotes that are left open.
    progress : callable, optional
        Called with (done, total), in bytes of a text file or rows of a Parquet file.

    Returns
    -------
    Reading

    Raises
    ------
    DataError, SettingsError
        See `read_events`.
    """
    source = Path(source)
    if like not in ("brightkite", "lastfm", "table"):
        raise SettingsError(f"like is {like!r}: brightkite, lastfm or table was expected")
    if item not in ("artist", "track"):
        raise SettingsError(f"item is {item!r}: artist or track was expected")
    if like != "lastfm" and (item != "artist" or paper_items):
        raise SettingsError(f"item and paper_items are for lastfm logs, not for {like}")
    if paper_items and item == "track":
        raise SettingsError("paper_items is a rule for artists: leave it out with item = track")
    columns = user_column, item_column, time_column, separator
    if like != "table" and columns != ("user", "item", None, None):
        raise SettingsError(f"columns and their separator are for tables, not for {like} logs")
    if like != "brightkite" and drop_null_place:
        raise SettingsError(f"drop_null_place is for brightkite logs, not for {like}")
    if separator is not None and (len(separator.encode()) != 1 or separator in '"\r\n'):
        raise SettingsError(f"separator is {separator!r}: a single character was expected")
    if not 0 <= max_malformed <= 1:
        raise SettingsError(f"max_malformed is {max_malformed}: 0 to 1 was expected")
    rows = _Rows()
    head = _peek(source)
    if _is_tar(head) and like != "lastfm":
        raise DataError(f"{source} is a tar archive: unpack it")
    wanted = (user_column, item_column, time_column)
    if like == "table" and head.startswith(b"PAR1"):
        batches = _parquet_batches(source, wanted, rows, progress)
    elif like == "table":
        batches = _table_batches(source, head, wanted, separator, rows, progress)
    elif like == "brightkite":
        batches = _brightkite_batches(source, head, rows, progress)
    else:
        batches = _lastfm_batches(source, head, item, paper_items, rows, progress)
    columns = _collect(batches, rows, NULL_PLACE if drop_null_place else None)
    _check_lines(source, rows, max_malformed)
    return Reading(_in_order(*columns, newest_first=like != "table"), *rows.count())


class _Rows:
    """Counts the rows of a file, and keeps the line numbers of malformed ones."""

    def __init__(self):
        self.header = 0
        self.place = "line"  # what is numbered
        self.left_out = array("q")  # lines
        self.n_delivered = 0
        self.n_unusable = 0
        self.last_written = None  # among the delivered rows
        self.n_lines = 0  # of the file, where a value may run over several lines
        self.n_swallowed = 0  # of these, inside quotes that were not meant to be
        self.opening = 0  # the first line that opens such a quote
        self.hopeless = False
        self.examples = []

    def wrong_columns(self, row) -> str:
        """The parser found a line with another number of columns."""
        self.left_out.append(row.number)
        self._note(row.number, f"{row.actual_columns} columns, not {row.expected_columns}")
        self.hopeless = len(self.left_out) == row.number - self.header == HOPELESS
        return "error" if self.hopeless else "skip"

    def delivered(self, usable: dict[str, np.ndarray]) -> np.ndarray:
        """The parser delivered rows; `usable` has a mask for each column. Returns their and."""
        good = np.logical_and.reduce(list(usable.values()))
        written = np.flatnonzero(usable["user"] | usable.get("time", usable["item"]))
        if written.size:
            self.last_written = self.n_delivered + int(written[-1])
        if self.n_unusable < N_EXAMPLES:
            for row in np.flatnonzero(~good)[:N_EXAMPLES]:
                faults = [name for name, mask in usable.items() if not mask[row]]
                line = self._line(self.n_delivered + int(row))
                self._note(line, f"no readable {', '.join(faults)}")
        self.n_unusable += good.size - int(good.sum())
        self.n_delivered += good.size
        return good

    def count(self) -> tuple[int, int, list]:
        """Lines, malformed lines and the first of these, without blank lines at the end."""
        last = self.header
        if self.left_out:
            last = self.left_out[-1]
        if self.last_written is not None:
            last = max(last, self._line(self.last_written))
        n_rows = self.n_delivered + len(self.left_out)
        n_blank = self.header + n_rows - last
        examples = [example for example in self.examples if example[0] <= last]
        return n_rows - n_blank, self.n_unusable + len(self.left_out) - n_blank, examples

    def _line(self, row: int) -> int:
        """Line number of a delivered row."""
        left_out = np.array(self.left_out, np.int64)
        line = self.header + row + 1
        return line + int(np.searchsorted(left_out - np.arange(left_out.size), line, side="right"))

    def _note(self, line: int, fault: str) -> None:
        if len(self.examples) < N_EXAMPLES or line < self.examples[-1][0]:
            self.examples = sorted([*self.examples, (line, fault)])[:N_EXAMPLES]


def _check_lines(source: Path, rows: _Rows, max_malformed: float) -> None:
    """Raise if there are too few lines or too many malformed ones; warn if there is any."""
    n_lines, n_malformed, examples = rows.count()
    if n_lines == 0:
        raise DataError(f"{source} holds no events")
    if rows.n_swallowed:
        found = (
            f"{source}: {rows.n_swallowed} of {rows.n_lines} lines are inside quotes that an "
            f"earlier line opens, the first one line {rows.opening}: is a quote left open there?"
        )
        if rows.n_swallowed > max_malformed * rows.n_lines:
            raise DataError(f"{found} More than --max-malformed {max_malformed:g} allows")
        logger.warning("%s", found)
    if n_malformed == 0:
        return
    shown = "; ".join(f"{rows.place} {line}: {fault}" for line, fault in examples)
    if n_malformed == n_lines:
        which = f"none of the first {n_lines} lines" if rows.hopeless else f"no {rows.place}"
        raise DataError(
            f"{source}: {which} can be read as an event ({shown}): is this the format and the "
            "separator that was meant?"
        )
    found = f"{source}: {n_malformed} of {n_lines} {rows.place}s are malformed ({shown})"
    if n_malformed > max_malformed * n_lines:
        raise DataError(f"{found}; more than --max-malformed {max_malformed:g} allows")
    logger.warning("%s; left out", found)


def _peek(source: Path) -> bytes:
    """Return the first bytes of the text of a file; raise if it can't hold a log."""
    with _reading(source):
        if source.is_dir():
            raise DataError(f"{source} is a directory: a log file was expected")
        if not source.exists():
            raise DataError(f"{source}: no such file")
        if not source.is_file():
            raise DataError(f"{source} is no plain file, which is read twice: make one of it first")
    with _reading(source), ExitStack() as stack:
        raw, stream = _open(source, stack)
        head = stream.read(1 << 16)
    if not head.removeprefix(codecs.BOM_UTF8).strip():
        raise DataError(f"{source} is empty")
    for magic, name in PACKED.items():
        if head.startswith(magic):
            raise DataError(f"{source} is a {name} file: unpack it, or pack it with gzip")
    if not head.startswith(b"PAR1") and not _is_tar(head) and b"\0" in head:
        raise DataError(f"{source} holds binary data (or UTF-16): text in UTF-8 was expected")
    return head


def _open(source: Path, stack: ExitStack):
    """Return the file and the stream of its unpacked bytes."""
    import pyarrow as pa

    raw = stack.enter_context(open(source, "rb", buffering=0))
    packed = raw.read(2) == b"\x1f\x8b"
    raw.seek(0)
    stream = stack.enter_context(pa.PythonFile(raw, mode="r"))
    if packed:
        stream = stack.enter_context(pa.CompressedInputStream(stream, "gzip"))
    return raw, stream


def _open_member(source: Path, stream, stack: ExitStack):
    """Return the stream of the log in the Last.fm archive."""
    import pyarrow as pa

    archive = stack.enter_context(tarfile.open(fileobj=stream, mode="r|", bufsize=BLOCK))
    names = []
    for member in archive:
        names.append(member.name)
        if member.isfile() and Path(member.name).name.startswith(ARCHIVE_MEMBER):
            return stack.enter_context(pa.PythonFile(archive.extractfile(member), mode="r"))
    raise DataError(
        f"{source}: no {ARCHIVE_MEMBER}*.tsv in the archive, which holds {', '.join(names)}"
    )


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


@contextmanager
def _reading(source: Path):
    """Turn the errors of reading a file into one `DataError`."""
    import pyarrow as pa

    try:
        yield
    except (OSError, EOFError, tarfile.TarError, csv.Error, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        if "straddling" in reason:
            raise DataError(
                f"{source}: a line is longer than {BLOCK} bytes: is this a text file, and is "
                "every quote closed?"
            ) from error
        advice = "" if getattr(error, "errno", None) else ": is it truncated or damaged?"
        raise DataError(f"{source} can't be read ({reason}){advice}") from error


def _text_batches(
    source: Path,
    head: bytes,
    rows: _Rows,
    n_columns: int,
    use: tuple,
    progress: Progress,
    separator: str = "\t",
) -> Iterator[list]:
    """Yield the columns `use` of a text file, in blocks of lines, as binary arrays.

    They hold the file's bytes taken for Latin-1, because the parser gives up at a malformed line
    that is not UTF-8; `_ids` undoes it.
    """
    import pyarrow as pa
    from pyarrow import csv as arrow_csv

    names = [str(column) for column in range(n_columns)]
    wanted = [names[column] for column in use]
    quoted = separator != "\t"
    with _reading(source), ExitStack() as stack:
        raw, stream = _open(source, stack)
        size = source.stat().st_size
        if _is_tar(head):
            stream = _open_member(source, stream, stack)
        if head.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        lines = _Lines(stream)
        try:
            reader = arrow_csv.open_csv(
                stack.enter_context(pa.PythonFile(lines, mode="r")) if quoted else stream,
                # one thread: the parser numbers malformed lines only then
                read_options=arrow_csv.ReadOptions(
                    column_names=names,
                    skip_rows=rows.header,
                    block_size=BLOCK,
                    use_threads=False,
                    encoding="latin-1",
                ),
                parse_options=arrow_csv.ParseOptions(
                    delimiter=separator,
                    quote_char='"' if quoted else False,
                    newlines_in_values=quoted,
                    ignore_empty_lines=False,
                    invalid_row_handler=rows.wrong_columns,
                ),
                convert_options=arrow_csv.ConvertOptions(
                    include_columns=sorted(set(wanted)),
                    column_types=dict.fromkeys(names, pa.binary()),
                    strings_can_be_null=False,
                ),
            )
            for batch in stack.enter_context(reader):
                if progress:
                    progress(raw.tell(), size)
                yield [batch.column(name) for name in wanted]
            if quoted:
                rows.n_lines = lines.count()
                if rows.n_lines > rows.header + rows.n_delivered + len(rows.left_out):
                    rows.place = "row"  # a value has several lines
                    rows.n_swallowed, rows.opening = _swallowed(source, separator, use)
        except pa.ArrowInvalid as error:
            if not rows.hopeless and "Empty CSV file" not in str(error):
                raise


class _Lines(io.RawIOBase):
    """A stream that counts its lines."""

    def __init__(self, stream):
        self.stream, self.n, self.begun = stream, 0, False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        block = self.stream.read(size)
        if block:
            self.n += block.count(b"\n")
            self.begun = not block.endswith(b"\n")
        return block

    def count(self) -> int:
        return self.n + self.begun


def _swallowed(source: Path, separator: str, use: tuple) -> tuple[int, int]:
    """Lines inside quotes that were not meant to be, and the first line that opens such a quote.

    Those of the columns `use`, and those of a quote that the file does not close.
    """
    n = first = 0
    record = []  # its lines

    def lines(text):
        for line in text:
            record.append(line)
            yield line

    limit = csv.field_size_limit(2 * BLOCK)  # the parser takes nearly as much
    try:
        with ExitStack() as stack:
            _, stream = _open(source, stack)
            text = io.TextIOWrapper(io.BufferedReader(stream), encoding="latin-1", newline="")
            reader = csv.reader(lines(stack.enter_context(text)), delimiter=separator)
            for row in reader:
                ours = any("\n" in row[place] for place in use if place < len(row))
                opened = len(record) > 1 and "".join(record).count('"') % 2
                if ours or opened:
                    first = first or reader.line_num - len(record) + 1
                    n += len(record) - 1
                record.clear()
    finally:
        csv.field_size_limit(limit)
    return n, first


def _brightkite_batches(
    source: Path, head: bytes, rows: _Rows, progress: Progress
) -> Iterator[tuple]:
    for user, time, item in _text_batches(source, head, rows, 5, (0, 1, 4), progress):
        yield _ids(user), _ids(item), _seconds(time)


def _lastfm_batches(
    source: Path, head: bytes, item: str, paper_items: bool, rows: _Rows, progress: Progress
) -> Iterator[tuple]:
    use = (0, 1, 2, 3) if item == "artist" else (0, 1, 4, 3, 5)
    for user, time, ids, *names in _text_batches(source, head, rows, 6, use, progress):
        if not paper_items:
            ids = _with_names(ids, names)
        yield _ids(user), _ids(ids, keep_empty=paper_items), _seconds(time)


def _with_names(ids, names: list):
    """Put ``name:`` and the names where an id is empty; null where the last name is, too."""
    import pyarrow as pa
    import pyarrow.compute as pc

    empty = pc.equal(pc.binary_length(ids), 0)
    if not pc.any(empty).as_py():
        return ids
    named = pc.binary_join_element_wise(*names, b"\t")
    named = pc.binary_join_element_wise(pa.scalar(b"name:"), named, b"")
    named = pc.if_else(pc.equal(pc.binary_length(names[-1]), 0), None, named)
    return pc.if_else(empty, named, ids)


def _table_batches(
    source: Path,
    head: bytes,
    wanted: tuple,
    separator: str | None,
    rows: _Rows,
    progress: Progress,
) -> Iterator[tuple]:
    """Read the header of a text table, then its rows."""
    separator, names, use = _header(source, head, wanted, separator)
    rows.header = 1
    for user, item, *time in _text_batches(
        source, head, rows, len(names), use, progress, separator=separator
    ):
        yield _ids(user), _ids(item), _seconds(time[0]) if time else None


def _header(source: Path, head: bytes, wanted: tuple, separator: str | None) -> tuple:
    """Separator of a text table, names of its columns, and where the wanted ones are."""
    line, *more = head.removeprefix(codecs.BOM_UTF8).splitlines()
    if not more and len(head) == 1 << 16:
        raise DataError(f"{source}: no line ends in the first {len(head)} bytes: not a table")
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{source}, line 1: not UTF-8 text: a header was expected") from error
    headers = {
        candidate: _header_names(text, candidate)
        for candidate in ([separator] if separator else SEPARATORS)
    }
    fitting = [key for key, names in headers.items() if not _missing(names, wanted)]
    best = fitting[0] if fitting else max(headers, key=lambda key: len(headers[key]))
    return best, headers[best], _positions(source, headers[best], wanted, separator)


def check_table(source: str | os.PathLike) -> None:
    """Raise DataError where a file is no table, text or Parquet, with the columns user and item."""
    import pyarrow.parquet as pq

    source, wanted = Path(source), ("user", "item", None)
    head = _peek(source)
    if head.startswith(b"PAR1"):
        with _reading(source):
            names = pq.read_schema(source).names
        _positions(source, names, wanted, None)
    else:
        _header(source, head, wanted, None)


def _header_names(line: str, separator: str) -> list[str]:
    quoting = csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL
    names = next(csv.reader([line], delimiter=separator, quoting=quoting), [])
    return [name.strip() for name in names]


def _missing(names: list[str], wanted: tuple) -> list[str]:
    return [name for name in wanted if name is not None and name not in names]


def _positions(source: Path, names: list[str], wanted: tuple, separator: str | None) -> tuple:
    """Positions of the columns user, item and, if there is one, time."""
    for name, option in zip(wanted, ("user", "item", "time"), strict=True):
        if names.count(name) > 1:
            raise DataError(f"{source}, line 1: {names.count(name)} columns are named {name!r}")
        if not _missing(names, (name,)):
            continue
        shown = ", ".join(repr(other) for other in names[:20])
        near = difflib.get_close_matches(name.lower(), [other.lower() for other in names], 1, 0.5)
        hint = [other for other in names if other.lower() in near][:1]
        advice = f"; the nearest is {hint[0]!r}: --{option}-column" if hint else ""
        if separator is not None and len(names) == 1:
            advice = f"; is {separator!r} the separator?"
        raise DataError(f"{source}, line 1: no column {name!r} among {shown}{advice}")
    user, item, time = wanted
    if time is None and "time" in names:
        time = "time"
    return tuple(names.index(name) for name in (user, item, time) if name is not None)


def _parquet_batches(
    source: Path, wanted: tuple, rows: _Rows, progress: Progress
) -> Iterator[tuple]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows.place = "row"
    with _reading(source), pq.ParquetFile(source) as file:
        schema = file.schema_arrow
        use = [schema.names[place] for place in _positions(source, schema.names, wanted, None)]
        for name in use:
            if pa.types.is_nested(schema.field(name).type):
                raise DataError(
                    f"{source}: column {name!r} holds {schema.field(name).type}: one value in "
                    "each row was expected"
                )
        for batch in file.iter_batches(columns=use):
            user, item, *time = (batch.column(name) for name in use)
            if progress:
                progress(rows.n_delivered + len(batch), file.metadata.num_rows)
            with _casting(source, use[0], user.type, "ids"):
                user = _texts(user).dictionary_encode()
            with _casting(source, use[1], item.type, "ids"):
                item = _texts(item).dictionary_encode()
            seconds = None
            if time:
                with _casting(source, use[2], time[0].type, "times"):
                    seconds = _seconds(time[0])
            yield (
                _numbered(user.indices, user.dictionary),
                _numbered(item.indices, item.dictionary),
                seconds,
            )


@contextmanager
def _casting(source: Path, name: str, kind, wanted: str):
    """Turn a failing cast of a column into a `DataError` with the column's name."""
    import pyarrow as pa

    try:
        yield
    except pa.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{source}: column {name!r} of type {kind} can't be read as {wanted} ({reason})"
        ) from error


def _texts(column):
    """Ids as strings; null where one is not a number in a column of numbers."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    return column.cast(pa.string())


def _seconds(column):
    """Seconds since 1970 (i64) of a column of times; null where one can't be read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_temporal(kind):
        return column.cast(pa.timestamp("s"), safe=False).cast(pa.int64())
    if pa.types.is_integer(kind):
        return column.cast(pa.int64())
    if pa.types.is_floating(kind):
        return _cast(pc.floor(column), pa.int64())
    column = column.cast(pa.string())
    try:
        return column.cast(pa.timestamp("s", "UTC")).cast(pa.int64())
    except pa.ArrowInvalid:
        pass
    result = pa.nulls(len(column), pa.int64())
    for pattern, kind in (
        (NUMBER, pa.float64()),
        (DAY + CLOCK + ZONE, pa.timestamp("ns", "UTC")),
        (DAY + f"({CLOCK})?$", pa.timestamp("ns")),
    ):
        fits = pc.fill_null(pc.match_substring_regex(column, pattern), False)
        values = _cast(column.filter(fits), kind)
        if pa.types.is_floating(kind):
            values = pc.floor(values)
        else:
            values = pc.floor_temporal(values, unit="second").cast(pa.timestamp("s", kind.tz))
        result = pc.replace_with_mask(result, fits, values.cast(pa.int64()))
    return result


def _cast(column, kind):
    """Cast, with null where a value can't be: halve until the culprits are alone."""
    import pyarrow as pa

    try:
        return column.cast(kind)
    except pa.ArrowInvalid:
        if len(column) == 1:
            return pa.nulls(1, kind)
        half = len(column) // 2
        return pa.concat_arrays([_cast(column[:half], kind), _cast(column[half:], kind)])


def _collect(batches: Iterator[tuple], rows: _Rows, drop_item: str | None) -> tuple:
    """Join batches (users, items, times): leave out rows with a null, number users and items.

    Returns i32[E], i32[E], i64[E] or None, and the ids of users and items.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    all_users, all_items, all_times = [], [], []
    for user, item, time in batches:
        columns = {"user": user, "item": item} | ({} if time is None else {"time": time})
        keep = rows.delivered({name: _is_valid(column) for name, column in columns.items()})
        if drop_item is not None:
            place = pc.index(item.dictionary, drop_item).as_py()
            keep &= pc.fill_null(item.indices, -1).to_numpy(zero_copy_only=False) != place
        if not keep.all():
            # encoded anew, so that an id of dropped rows only gets no number
            mask = pa.array(keep)
            user = user.filter(mask).dictionary_decode().dictionary_encode()
            item = item.filter(mask).dictionary_decode().dictionary_encode()
        all_users.append(user)
        all_items.append(item)
        if time is not None:
            all_times.append(pc.fill_null(time, 0).to_numpy()[keep])
    users, user_ids = _unify(all_users)
    items, item_ids = _unify(all_items)
    return users, items, np.concatenate(all_times) if all_times else None, user_ids, item_ids


def _is_valid(column) -> np.ndarray:
    return column.is_valid().to_numpy(zero_copy_only=False)


def _ids(column, keep_empty: bool = False):
    """Number the ids of a column of a text file by first appearance; null where unreadable."""
    import pyarrow as pa
    import pyarrow.compute as pc

    encoded = column.dictionary_encode()
    ids = encoded.dictionary.cast(pa.string())
    other = pc.invert(pc.string_is_ascii(ids))
    if pc.any(other).as_py():
        texts = [_utf8(text) for text in ids.filter(other).to_pylist()]
        ids = pc.replace_with_mask(ids, other, pa.array(texts, pa.string()))
    return _numbered(encoded.indices, ids, keep_empty)


def _utf8(text: str) -> str | None:
    try:
        return text.encode("latin-1").decode()
    except UnicodeDecodeError:
        return None


def _numbered(indices, ids, keep_empty: bool = False):
    """Make a dictionary array; null where an id is null or empty."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not keep_empty:
        ids = pc.if_else(pc.equal(pc.binary_length(ids), 0), None, ids)
    if ids.null_count:
        return ids.take(indices).dictionary_encode()
    return pa.DictionaryArray.from_arrays(indices, ids)


def _unify(chunks: list) -> tuple[np.ndarray, np.ndarray]:
    """Join columns that have a numbering each into one: numbers i32[E] and ids object[N]."""
    import pyarrow as pa

    if not chunks:
        return np.zeros(0, np.int32), np.zeros(0, object)
    chunks = pa.chunked_array(chunks).unify_dictionaries().chunks
    numbers = np.concatenate([chunk.indices.to_numpy() for chunk in chunks])
    return numbers, chunks[0].dictionary.to_numpy(zero_copy_only=False)


def _in_order(users, items, times, user_ids, item_ids, newest_first: bool) -> EventLog:
    """Sort events by user and time; those of the same second keep their order."""
    if newest_first:
        users, items, times = users[::-1], items[::-1], times[::-1]
    order = np.lexsort((users,) if times is None else (times, users))
    counts = np.bincount(users, minlength=len(user_ids))
    indptr = np.concatenate(([0], np.cumsum(counts)))
    if times is not None:
        times = times[order]
        if times.size and np.median(times) > LAST:
            times = times // 1000
    return EventLog(indptr, items[order], times, user_ids, item_ids)
