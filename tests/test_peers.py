"""The parent's side of `bench/peers.py`; its contenders need PyTorch and minutes."""

import subprocess
import sys
from types import SimpleNamespace

import ablation
import machine
import numpy as np
import peers
import pytest
from click.testing import CliRunner

from crnn_np import data, synthetic, windows
from crnn_np.errors import DataError

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
    assert given["OMP_NUM_THREADS"] == "1"
    if not found:
        pytest.skip("threadpoolctl does not know NumPy's BLAS")
    assert found == ["1"] * len(found)


def test_a_contender_that_was_killed_has_failed():
    contender = peers.Contender(SPEC)
    contender.process.kill()
    contender.process.wait()
    contender.run(1)
    assert contender.failed == "ended with -9"
    contender.end()


@pytest.mark.parametrize("program", [peers, ablation])
def test_results_have_a_folder_before_anything_is_timed(program, tmp_path):
    for place in (tmp_path, tmp_path / "missing" / "found.json"):
        result = CliRunner().invoke(program.main, [str(tmp_path), "--json", str(place)])
        assert result.exit_code == 2
        assert f"{place} is no file in a folder that is there" in " ".join(result.output.split())


def test_the_ablation_is_written_after_every_epoch(tmp_path, monkeypatch):
    drawn = synthetic.draw(n_users=8, n_items=9, hidden_size=3, events=(40, 60))
    data.save(drawn.split, tmp_path / "data", {})
    names = "C-GRU", "the mixture without a network"
    variants = {name: ablation.VARIANTS[name] for name in names}
    monkeypatch.setattr(ablation, "VARIANTS", variants)
    written = []
    monkeypatch.setattr(ablation.records, "write_json", lambda _, found: written.append(found))
    arguments = [str(tmp_path / "data"), "--epochs", "2", "--json", str(tmp_path / "found.json")]
    result = CliRunner().invoke(ablation.main, arguments)
    assert result.exit_code == 0, result.output
    assert [list(found["results"]) for found in written] == [list(names)] * 2
    first, last = (found["results"]["C-GRU"] for found in written)
    assert last["nll"] <= first["nll"]
    assert first["parameters"] == last["parameters"] == 9 * 32 * 4 + 8 * 32 * 96


def test_only_full_windows_count():
    plan = windows.Plan(batch=2, window=4, order="length")
    log = data.from_sequences([np.zeros(n, int) for n in (13, 10, 9, 9, 5, 4)], 1)
    run = peers.full_windows(log, plan)
    assert run.key.size == 2 + 2  # the third ones have a column that ends; the last has none
    assert (run.length == 4).all()
    assert (run.start + 4 < log.lengths[run.user]).all()
    assert peers.full_windows(log, plan, 3).key.size == 3
    with pytest.raises(DataError, match="none of the 2 windows of 2 x 4 is full"):
        peers.full_windows(data.from_sequences([[0] * 4, [0] * 5], 1), plan)


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_units_of_the_systems(platform, unit, monkeypatch):
    usage = SimpleNamespace(ru_maxrss=1000)
    monkeypatch.setattr(machine.resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(machine.sys, "platform", platform)
    assert machine.peak_bytes() == 1000 * unit


def test_cores_without_affinity(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert machine.cores() >= 1
