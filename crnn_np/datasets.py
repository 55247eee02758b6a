"""The data sets of the paper: where they are, what Table 1 says of them, and their download."""

import gzip
import hashlib
import json
import logging
import os
import tarfile
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

from .errors import DataError, SettingsError

CHECKSUMS = "checksums.json"
BLOCK = 1 << 20

logger = logging.getLogger(__name__)


class DataSet(NamedTuple):
    """A public data set.

    Attributes
    ----------
    title : str
    url, file : str
        Download place, and the name that the file keeps.
    member, member_md5 : str or None
        The log inside an archive and its MD5, from the data set's own README.
    users, items, events : int
        Row of the paper's Table 1 (after the filter).
    uniform_nll : float
        Error in nats of a uniform guess, same row.
    min_user_entropy : float
        Nats; the cutoff of the authors' filter.
    """

    title: str
    url: str
    file: str
    member: str | None
    member_md5: str | None
    users: int
    items: int
    events: int
    uniform_nll: float
    min_user_entropy: float


KNOWN = {
    "brightkite": DataSet(
        title="Brightkite",
        url="https://snap.stanford.edu/data/loc-brightkite_totalCheckins.txt.gz",
        file="loc-brightkite_totalCheckins.txt.gz",
        member=None,
        member_md5=None,
        users=1679,
        items=23243,
        events=599618,
        uniform_nll=10.05,
        min_user_entropy=2.5,
    ),
    "lastfm": DataSet(
        title="Last.fm-1K",
        url="http://mtg.upf.edu/static/datasets/last.fm/lastfm-dataset-1K.tar.gz",
        file="lastfm-dataset-1K.tar.gz",
        member="userid-timestamp-artid-artname-traid-traname.tsv",
        member_md5="64747b21563e3d2aa95751e0ddc46b68",
        users=954,
        items=48188,
        events=4320170,
        uniform_nll=10.78,
        min_user_entropy=3.0,
    ),
}


def fetch(
    name: str, directory: str | os.PathLike = ".", url: str | None = None, progress: bool = False
) -> Path:
    """Download a known data set, unless it is there already.

    The file takes its name only when it is whole and checked. Its SHA-256 is compared with the
    one in ``checksums.json`` beside it; the first download has nothing to compare with, stores
    its own there and logs it. The MD5 of Last.fm's log is known and compared then.

    Parameters
    ----------
    name : "brightkite" or "lastfm"
    directory : path
        Made if need be.
    url : str, optional
        Another download place.
    progress : bool
        Show a bar on stderr.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    DataError
        The download fails, is cut short, or has another checksum.
    SettingsError
        No such data set.
    """
    if name not in KNOWN:
        raise SettingsError(f"{name!r} is no known data set: {' or '.join(KNOWN)} was expected")
    known = KNOWN[name]
    url = url or known.url
    target = Path(directory) / known.file
    checksum = _read_checksums(target.parent).get(known.file)
    if target.exists():
        try:
            _check(target, target, known, checksum)
        except OSError as error:
            raise DataError(
                f"{target} can't be read ({error.strerror or error}): a data file was expected; "
                "move it away, or give another folder"
            ) from error
        logger.info("%s is there already", target)
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
            part = Path(folder) / known.file
            _download(url, part, target, progress)
            _check(part, target, known, checksum)
            os.replace(part, target)
    except OSError as error:
        raise DataError(f"{target} can't be written: {error.strerror or error}") from error
    return target


def _download(url: str, part: Path, target: Path, progress: bool) -> None:
    import pooch
    import requests

    # identity: the file is to arrive packed as it is
    download = pooch.HTTPDownloader(
        progressbar=progress, chunk_size=BLOCK, timeout=60, headers={"Accept-Encoding": "identity"}
    )
    logger.info("downloading %s to %s", url, target)
    try:
        download(url, part, None)
    except requests.RequestException as error:
        response = error.response
        reason = type(error).__name__ if response is None else f"HTTP status {response.status_code}"
        raise DataError(
            f"{url} can't be downloaded ({reason}); try again, or download it by hand to {target}"
        ) from error


def _check(file: Path, target: Path, known: DataSet, checksum: str | None) -> None:
    """Compare the checksums of a file; store its SHA-256 under the target where none is known."""
    advice = f"delete {target} and download it again" if file == target else "try again"
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if checksum is not None:
        if found != checksum:
            raise DataError(
                f"{known.file} has SHA-256 {found}: {checksum} was expected from "
                f"{target.parent / CHECKSUMS}; {advice}, or delete that entry if the data changed"
            )
        return
    try:
        md5 = _md5_of_log(file, known.member)
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{known.file} is cut short or damaged ({error}); {advice}") from error
    if known.member_md5 not in (None, md5):
        raise DataError(
            f"{known.member} in {known.file} has MD5 {md5}: {known.member_md5} was expected; "
            f"{advice}"
        )
    checksums = _read_checksums(target.parent) | {known.file: found}
    path = target.parent / CHECKSUMS
    try:
        path.write_text(json.dumps(checksums, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        logger.warning("%s can't be written (%s): the SHA-256 is not stored", path, reason)
        return
    logger.info(
        "No SHA-256 of %s was known; stored in %s to compare later downloads with: %s",
        known.file,
        path,
        found,
    )


def _md5_of_log(file: Path, member: str | None) -> str:
    """Read a gzip file, or a member of an archive, to its end; raise if it is damaged."""
    digest = hashlib.md5(usedforsecurity=False)
    with gzip.open(file, "rb") as stream:
        if member is None:
            while block := stream.read(BLOCK):
                digest.update(block)
            return digest.hexdigest()
        with tarfile.open(fileobj=stream, mode="r|", bufsize=BLOCK) as archive:
            for info in archive:
                if Path(info.name).name == member:
                    log = archive.extractfile(info)
                    while block := log.read(BLOCK):
                        digest.update(block)
                    return digest.hexdigest()
    raise tarfile.ReadError(f"no {member} in it")


def _read_checksums(directory: Path) -> dict:
    path = directory / CHECKSUMS
    if not path.exists():
        return {}
    try:
        checksums = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}): delete it") from error
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror or error}): delete it") from error
    if not isinstance(checksums, dict):
        raise DataError(
            f"{path} holds a {type(checksums).__name__}: an object was expected; delete it"
        )
    return checksums
