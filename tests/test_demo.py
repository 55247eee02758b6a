"""A tiny run of the demo, and its command."""

import numpy as np
import pytest
from click.testing import CliRunner

from crnn_np import CollaborativeRNN, demo, synthetic
from crnn_np.baselines import Bigram, Uniform

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def drawn():
    return synthetic.draw(n_users=6, n_items=9, hidden_size=3, events=(30, 50))


def test_compare(drawn):
    told = []
    small = {"hidden_size": 3, "epochs": 2, "batch": 3, "window": 16, "backend": "numpy"}
    compared = {
        "uniform": Uniform(),
        "bigram": Bigram(),
        "C-GRU": CollaborativeRNN(preset=None, **small),
    }
    results = list(demo.compare(drawn, compared, lambda *progress: told.append(progress)))
    assert [r.name for r in results] == ["uniform", "bigram", "C-GRU", demo.BOUND]
    *models, bound = results
    assert bound.scores == drawn.lowest_error()
    for r in models:
        assert r.excess == pytest.approx(r.scores["nll"] - bound.scores["nll"])
        assert r.excess > 0
        assert r.seconds > 0
    assert models[0].scores["nll"] == pytest.approx(np.log(9))
    predicted = 2 * (drawn.split.train.n_events - 6)
    assert told[-1] == (predicted, predicted)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_table_lines_up(drawn):
    results = list(demo.compare(drawn, {"uniform": Uniform()}))
    lines = [demo.header(), *map(demo.row, results)]
    assert lines[1].startswith("uniform")
    assert lines[1].index("2.197") + 5 == lines[0].index("(nats)") + 6
    assert lines[2].startswith(demo.BOUND)
    assert len(lines[2]) <= len(lines[1]) == len(lines[0])


def test_the_three_networks_are_of_one_size():
    sizes = []
    for name, model in demo.models().items():
        if name in demo.RNNS:
            spec = model.settings.spec
            users = 1 if spec.sharing == "pooled" else 100
            D, G = spec.hidden_size, spec.gates
            sizes.append(users * D * G * D + 200 * (G + 1) * D)
    assert max(sizes) < 1.05 * min(sizes)


def test_command(tmp_path):
    out = tmp_path / "picture.png"
    result = CliRunner().invoke(demo.demo, ["--quick", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(PNG)
    assert str(out) in result.output
    lines = [line for line in result.output.splitlines() if line]
    table = lines[lines.index(demo.header()) + 1 : -1]
    names = [*demo.models(), demo.BOUND]
    assert [line[:18].strip() for line in table] == names


@pytest.mark.parametrize(
    ("name", "fault"), [("nowhere/picture.png", "folder"), ("picture.doc", "should end in")]
)
def test_picture_is_checked_before_the_work(tmp_path, name, fault):
    result = CliRunner().invoke(demo.demo, ["--out", str(tmp_path / name)])
    assert result.exit_code == 1
    assert fault in str(result.exception)
    assert result.output == ""
