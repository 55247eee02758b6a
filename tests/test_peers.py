"""The parent's side of `bench/peers.py`; its contenders need PyTorch and minutes."""

import subprocess
import sys

import peers
import pytest

SPEC = {"name": "nobody", "threads": 3, "directory": None, "device": "cpu", "seconds": 0.1}
BLAS = """
import numpy, threadpoolctl
print(*(p["num_threads"] for p in threadpoolctl.threadpool_info() if p["user_api"] == "blas"))
"""


@pytest.mark.parametrize("name", ["best product", "PyTorch by hand, tuned malloc"])
def test_numpys_blas_has_the_contenders_threads(name, monkeypatch):
    given = {}
    monkeypatch.setattr(subprocess, "Popen", lambda *_, env, **__: given.update(env))
    peers.Contender(SPEC | {"name": name, "threads": 1})
    monkeypatch.undo()
    found = subprocess.check_output([sys.executable, "-c", BLAS], env=given, text=True).split()
    assert found == ["1"] * len(found)
    assert given["OMP_NUM_THREADS"] == "1"
