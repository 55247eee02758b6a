"""Compiled code and its place on disk."""

import subprocess
import sys

import numba
import pytest

from crnn_np.compiling import compiled
from crnn_np.errors import SettingsError

NOWHERE = """
import sys
from numba.core import caching
caching.CacheImpl._locator_classes = caching.CompileResultCacheImpl._locator_classes = []
from crnn_np.__main__ import main
main()
"""


def test_options_reach_the_compiler():
    add = compiled(nogil=True, fastmath={"contract"})(lambda x: x + 1)
    assert add(1) == 2
    assert add.targetoptions["nogil"]
    assert add.targetoptions["fastmath"] == {"contract"}


def test_no_place_on_disk(monkeypatch):
    def refuse(**options):
        assert options == {"cache": True}
        raise RuntimeError("cannot cache function")

    monkeypatch.setattr(numba, "njit", lambda **options: lambda function: refuse(**options))
    with pytest.raises(SettingsError, match=r"\(cannot cache function\): set NUMBA_CACHE_DIR to"):
        compiled()(len)


def test_a_command_that_finds_no_place_on_disk_ends_in_one_line():
    given = [sys.executable, "-c", NOWHERE, "demo", "--quick"]
    ended = subprocess.run(given, capture_output=True, text=True)
    assert ended.returncode == 1
    [error] = [line for line in ended.stderr.splitlines() if not line[:1].isdigit()]
    assert error.startswith("Error: compiled code can be kept neither")
    assert "Traceback" not in ended.stderr
