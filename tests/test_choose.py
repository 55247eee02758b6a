"""`bench/choose.py` goes on only with the trials of the same search."""

import json
from pathlib import Path

import choose
import pytest
from click.testing import CliRunner

from crnn_np import data, synthetic


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Two prepared data sets, and a search whose trials cost nothing."""
    for name, seed in (("one", 1), ("other", 2)):
        drawn = synthetic.draw(n_users=5, n_items=9, hidden_size=3, events=(30, 50), seed=seed)
        data.save(drawn.split, tmp_path / name, {})

    def run_trial(train, chosen, max_epochs, patience=choose.PATIENCE):
        tried.append(chosen)
        return {"settings": chosen, "validation_nll": 1.0, "epoch": 1, "curve": [1.0]}

    tried = []
    monkeypatch.setattr(choose, "run_trial", run_trial)
    return tmp_path, tried


def run(*arguments):
    return CliRunner().invoke(choose.main, [str(argument) for argument in arguments])


def test_a_search_is_resumed_with_the_same_data_and_epochs_only(prepared):
    folder, tried = prepared
    options = ("--out", folder / "found.jsonl", "--max-epochs", 3)
    assert run(folder / "one", *options).exit_code == 0
    n, written = len(tried), (folder / "found.jsonl").read_text()
    result = run(folder / "one", *options)
    assert result.exit_code == 0
    assert "patience 1: 1.0" in result.output
    for wrong, fault in (
        ((folder / "other", *options), "has data_sha256 "),
        ((folder / "one", *options[:3], 4), "has max_epochs 3: 4 was expected"),
    ):
        result = run(*wrong)
        assert result.exit_code == 1
        assert fault in result.output
        assert "try another --out" in result.output
    assert (len(tried), (folder / "found.jsonl").read_text()) == (n, written)


def test_trials_that_cannot_be_read(prepared):
    folder, tried = prepared
    options = folder / "one", "--out", folder / "found.jsonl"
    assert run(*options).exit_code == 0
    whole = (folder / "found.jsonl").read_text()
    n, lines = len(tried), whole.count("\n")
    for left, fault in ((whole[:-9], f":{lines}: "), ("", " is empty: remove it")):
        (folder / "found.jsonl").write_text(left)
        result = run(*options)
        assert result.exit_code == 1
        assert str(folder / "found.jsonl") + fault in result.output
        assert (len(tried), (folder / "found.jsonl").read_text()) == (n, left)


def test_the_file_that_ships_says_what_it_was_made_from():
    lines = Path(choose.__file__).with_suffix(".jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    [limit] = [p.default for p in choose.main.params if p.name == "max_epochs"]
    assert (first["patience"], first["max_epochs"]) == (choose.PATIENCE, limit)
    assert len(first["data_sha256"]) == 64
