"""Time and memory of `crnn-np prepare` on 19 million generated lines in Last.fm-1K's format.

    python bench/prepare.py [--lines N] [--form tsv|tsv.gz|tar.gz] [--item artist|track]

The lines are drawn at random with the real file's numbers of users, artists and tracks, lengths
of fields, artists without an id, names with stray quotes and accents, and a few malformed lines.
Wanted: at most 90 s and 4 GB on 2 cores.
"""

import argparse
import gzip
import io
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from machine import cores, peak_bytes

LINES, USERS, ARTISTS, NAMELESS, TRACKS = 19_150_868, 992, 177_000, 69_420, 1_500_000
MEMBER = "lastfm-dataset-1K/userid-timestamp-artid-artname-traid-traname.tsv"
WORDS = (
    'the of and black blue night love "live" café señor mañana Björk Sigur Rós 東京 radio state '
    'machine brothers white moon river city remix feat. intro outro part ii acoustic 7" 12" '
    "orchestra young old dead silver golden heart fire rain summer winter song dance waltz"
).split()


def names(rng, n: int, low: int, high: int) -> pa.Array:
    """n names of `low` to `high` words."""
    words = pa.array(WORDS)
    lengths = rng.integers(low, high + 1, n)
    columns = []
    for position in range(high):
        column = words.take(pa.array(rng.integers(0, len(WORDS), n)))
        columns.append(pc.if_else(pa.array(position < lengths), column, None))
    joined = pc.binary_join_element_wise(*columns, " ", null_handling="skip")
    return pc.binary_join_element_wise(joined, pc.cast(pa.array(np.arange(n)), pa.string()), " ")


def uuids(rng, n: int, empty: np.ndarray) -> pa.Array:
    """n random identifiers like those of MusicBrainz; empty where the mask says so."""
    text = rng.bytes(16 * n).hex()
    values = (text[i : i + 32] for i in range(0, 32 * n, 32))
    return pa.array(
        "" if none else f"{v[:8]}-{v[8:12]}-{v[12:16]}-{v[16:20]}-{v[20:]}"
        for v, none in zip(values, empty, strict=True)
    )


def log_blocks(lines: int, seed: int = 0):
    """Yield the file as blocks of bytes, one user after the other, newest first."""
    rng = np.random.default_rng(seed)
    artist_ids = uuids(rng, ARTISTS, np.arange(ARTISTS) >= ARTISTS - NAMELESS)  # the rarest
    artist_names = names(rng, ARTISTS, 1, 3)
    track_ids = uuids(rng, TRACKS, rng.random(TRACKS) < 0.11)
    track_names = names(rng, TRACKS, 1, 5)
    first_track = np.sort(rng.integers(0, TRACKS, ARTISTS))
    n_tracks = np.maximum(np.diff(np.append(first_track, TRACKS)), 1)
    popularity = 1 / np.arange(1, ARTISTS + 1) ** 0.8
    share = rng.lognormal(0, 1.2, USERS)
    counts = np.maximum((share / share.sum() * lines).astype(int), 1)
    counts[counts.argmax()] += lines - counts.sum()
    popularity /= popularity.sum()
    for user, count in enumerate(counts, 1):
        favourites = rng.choice(ARTISTS, min(ARTISTS, 50 + count // 15), p=popularity)
        weights = 1 / np.arange(1, len(favourites) + 1) ** 0.7
        runs = rng.choice(favourites, count // 3 + 1, p=weights / weights.sum())
        artist = np.repeat(runs, 3)[:count]
        track = np.minimum(first_track[artist] + rng.integers(0, n_tracks[artist]), TRACKS - 1)
        seconds = 1_241_000_000 - np.cumsum(rng.integers(1, 1 + 140_000_000 // count, count))
        when = pc.strftime(pa.array(seconds, pa.timestamp("s")), "%Y-%m-%dT%H:%M:%SZ")
        columns = (
            pa.repeat(f"user_{user:06d}", count),
            when,
            artist_ids.take(pa.array(artist)),
            artist_names.take(pa.array(artist)),
            track_ids.take(pa.array(track)),
            track_names.take(pa.array(track)),
        )
        rows = pc.binary_join_element_wise(*columns, "\t")
        broken = rng.random(count) < 1e-5
        rows = pc.if_else(pa.array(broken), f"user_{user:06d}\tbroken line", rows)
        text = pc.binary_join(pa.ListArray.from_arrays([0, count], rows), "\n")
        yield text.buffers()[2].to_pybytes() + b"\n"


def write(path: Path, form: str, lines: int) -> int:
    """Write the log; returns the number of bytes of its text."""
    if form == "tar.gz":
        with tempfile.TemporaryFile(dir=path.parent) as plain:
            size = sum(plain.write(block) for block in log_blocks(lines))
            plain.seek(0)
            with tarfile.open(path, "w:gz", compresslevel=1) as archive:
                readme = tarfile.TarInfo("lastfm-dataset-1K/README.txt")
                archive.addfile(readme, io.BytesIO())
                member = tarfile.TarInfo(MEMBER)
                member.size = size
                archive.addfile(member, plain)
        return size
    with gzip.open(path, "wb", 1) if form == "tsv.gz" else open(path, "wb") as file:
        return sum(file.write(block) for block in log_blocks(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=LINES)
    parser.add_argument("--form", choices=("tsv", "tsv.gz", "tar.gz"), default="tsv")
    parser.add_argument("--item", choices=("artist", "track"), default="artist")
    parser.add_argument("--keep", type=Path, help="file to keep the log in, and to reuse")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = arguments.keep or Path(folder) / f"log.{arguments.form}"
        if not source.exists():
            start = time.perf_counter()
            size = write(source, arguments.form, arguments.lines)
            print(f"{size / 1e9:.2f} GB of text made in {time.perf_counter() - start:.0f} s")
        command = [sys.executable, "-m", "crnn_np", "prepare", str(source), "--like", "lastfm"]
        command += ["--item", arguments.item, "--out", str(Path(folder) / "prepared")]
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = usage.ru_utime + usage.ru_stime
    peak, load = peak_bytes(resource.RUSAGE_CHILDREN), os.getloadavg()[0]
    print(f"prepare: {seconds:.1f} s (wanted: 90), {peak / 2**30:.2f} GiB (wanted: 3.7)")
    print(f"{cpu:.1f} s of processor time on {cores()} cores; load of the machine {load:.1f}")


if __name__ == "__main__":
    main()
