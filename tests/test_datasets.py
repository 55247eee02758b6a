"""Downloads, against a server on localhost."""

import errno
import gzip
import hashlib
import io
import json
import logging
import socket
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from crnn_np import datasets
from crnn_np.errors import DataError, SettingsError

BRIGHTKITE = gzip.compress(b"7\t2009-01-02T00:00:05Z\t1.0\t2.0\tplace\n" * 500, mtime=0)
LOG = b"u1\t2009-05-04T23:08:57Z\tid-a\tA\tt-1\tOne\n" * 500


def archive(member=datasets.KNOWN["lastfm"].member, log=LOG):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in {"x/README.txt": b"hello", f"x/{member}": log}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Serve what the test put into `server.body`; /short cuts it, /missing has none."""

    def do_GET(self):
        self.server.asked.append(self.path)
        body = self.server.body
        self.send_response(404 if self.path == "/missing" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path == "/short" else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        server.body = BRIGHTKITE
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def lastfm(monkeypatch):
    """The known data set, with the MD5 of the log made here."""
    md5 = hashlib.md5(LOG).hexdigest()
    known = datasets.KNOWN["lastfm"]._replace(member_md5=md5)
    monkeypatch.setitem(datasets.KNOWN, "lastfm", known)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_first_download_stores_and_tells_the_checksum(server, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "crnn_np"):
        file = datasets.fetch("brightkite", tmp_path / "raw", f"{server.url}/file")
    assert file == tmp_path / "raw" / "loc-brightkite_totalCheckins.txt.gz"
    assert file.read_bytes() == BRIGHTKITE
    sha256 = hashlib.sha256(BRIGHTKITE).hexdigest()
    checksums = json.loads((tmp_path / "raw" / "checksums.json").read_text())
    assert checksums == {file.name: sha256}
    assert f"stored in {tmp_path / 'raw' / 'checksums.json'}" in caplog.text
    assert sha256 in caplog.text
    assert names(tmp_path / "raw") == ["checksums.json", file.name]


def test_later_downloads_are_compared(server, tmp_path):
    file = datasets.fetch("brightkite", tmp_path, server.url)
    datasets.fetch("brightkite", tmp_path, server.url)
    assert len(server.asked) == 1
    file.unlink()
    server.body = gzip.compress(b"something else", mtime=0)
    with pytest.raises(DataError, match="SHA-256 .* was expected from .*checksums.json"):
        datasets.fetch("brightkite", tmp_path, server.url)
    assert names(tmp_path) == ["checksums.json"]
    server.body = BRIGHTKITE
    assert datasets.fetch("brightkite", tmp_path, server.url) == file


def test_file_that_is_there_is_compared(server, tmp_path):
    file = datasets.fetch("brightkite", tmp_path, server.url)
    file.write_bytes(BRIGHTKITE[:-9])
    with pytest.raises(DataError, match="delete .* and download it again"):
        datasets.fetch("brightkite", tmp_path, server.url)
    (tmp_path / "checksums.json").unlink()
    with pytest.raises(DataError, match="cut short or damaged"):
        datasets.fetch("brightkite", tmp_path, server.url)
    (tmp_path / "checksums.json").write_text("{")
    with pytest.raises(DataError, match="no JSON"):
        datasets.fetch("brightkite", tmp_path, server.url)


def test_file_put_there_by_hand(tmp_path):
    (tmp_path / "loc-brightkite_totalCheckins.txt.gz").write_bytes(BRIGHTKITE)
    datasets.fetch("brightkite", tmp_path, "http://127.0.0.1:1/nothing-is-asked")
    assert "checksums.json" in names(tmp_path)


def test_file_in_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, caplog):
    """As root no folder is read-only, so the write itself is refused."""
    file = tmp_path / "loc-brightkite_totalCheckins.txt.gz"
    file.write_bytes(BRIGHTKITE)

    def refused(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "write_text", refused)
    assert datasets.fetch("brightkite", tmp_path) == file
    assert "checksums.json can't be written (Read-only file system)" in caplog.text
    assert names(tmp_path) == [file.name]


def test_folder_of_the_files_name(tmp_path):
    (tmp_path / "loc-brightkite_totalCheckins.txt.gz").mkdir()
    with pytest.raises(DataError, match="can't be read .Is a directory.* give another folder"):
        datasets.fetch("brightkite", tmp_path)


def test_checksums_that_are_none(tmp_path):
    (tmp_path / "checksums.json").write_text("[]")
    with pytest.raises(DataError, match="holds a list: an object was expected; delete it"):
        datasets.fetch("brightkite", tmp_path)
    (tmp_path / "checksums.json").unlink()
    (tmp_path / "checksums.json").mkdir()
    with pytest.raises(DataError, match="can't be read .Is a directory"):
        datasets.fetch("brightkite", tmp_path)


@pytest.mark.usefixtures("lastfm")
def test_md5_of_the_log_in_the_archive(server, tmp_path):
    server.body = archive()
    assert datasets.fetch("lastfm", tmp_path / "good", server.url).exists()
    server.body = archive(log=LOG + b"more\n")
    with pytest.raises(DataError, match="has MD5 .* was expected"):
        datasets.fetch("lastfm", tmp_path / "other", server.url)
    server.body = archive(member="other.tsv")
    with pytest.raises(DataError, match="no userid-timestamp"):
        datasets.fetch("lastfm", tmp_path / "other", server.url)
    assert names(tmp_path / "other") == []


@pytest.mark.parametrize(
    ("place", "reason"), [("/missing", "HTTP status 404"), ("/short", "ChunkedEncodingError|Conn")]
)
def test_failed_download(server, tmp_path, place, reason):
    with pytest.raises(DataError, match=reason) as caught:
        datasets.fetch("brightkite", tmp_path, server.url + place)
    assert f"by hand to {tmp_path / 'loc-brightkite_totalCheckins.txt.gz'}" in str(caught.value)
    assert names(tmp_path) == []


def test_connection_refused(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DataError, match="ConnectionError.*by hand"):
        datasets.fetch("brightkite", tmp_path, f"http://127.0.0.1:{port}/file")
    with pytest.raises(DataError, match="by hand"):
        datasets.fetch("brightkite", tmp_path, "nonsense")
    assert names(tmp_path) == []


def test_body_that_is_no_gzip(server, tmp_path):
    server.body = b"<html>This data set has moved.</html>"
    with pytest.raises(DataError, match="cut short or damaged"):
        datasets.fetch("brightkite", tmp_path, server.url)
    flipped = bytearray(BRIGHTKITE)
    flipped[len(flipped) // 2] ^= 255
    for body in (BRIGHTKITE[:-20], bytes(flipped)):
        server.body = body
        with pytest.raises(DataError, match="cut short or damaged"):
            datasets.fetch("brightkite", tmp_path, server.url)
    assert names(tmp_path) == []


def test_refuses(tmp_path):
    with pytest.raises(SettingsError, match="brightkite or lastfm"):
        datasets.fetch("gowalla", tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="can't be written"):
        datasets.fetch("brightkite", tmp_path / "file")
