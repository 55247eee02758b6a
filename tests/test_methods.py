"""The models by name: made, fitted, saved and read again without knowing which one it is."""

import numpy as np
import pytest

from crnn_np import baselines, methods
from crnn_np.data import cut_tail, from_sequences
from crnn_np.errors import ModelError, SettingsError

RNG = np.random.default_rng(0)
LOG = from_sequences([RNG.integers(0, 9, n) for n in (60, 40, 33)], 9)
TRAIN, HELDOUT = cut_tail(LOG, [5, 4, 3])
SMALL = {"preset": None, "hidden_size": 3, "window": 8, "epochs": 2, "backend": "numpy"}


def small(name):
    return methods.new(name, **(SMALL if name in methods.RNNS else {}))


def test_every_baseline_has_a_name():
    assert sorted(methods.BASELINES.values()) == sorted(baselines._HOMES)


@pytest.mark.parametrize("name", methods.NAMES)
def test_the_same_interface(tmp_path, name):
    fitted = small(name).fit(TRAIN)
    scores = fitted.evaluate(TRAIN, HELDOUT)
    assert scores["events"] == 12
    fitted.save(tmp_path / "model")
    found = methods.load(tmp_path / "model")
    assert type(found) is type(fitted)
    assert found.get_params() == fitted.get_params()
    assert found.evaluate(TRAIN, HELDOUT) == scores


@pytest.mark.parametrize("name", methods.RNNS)
def test_an_rnn_is_what_its_name_says(name):
    spec = small(name).settings.spec
    cell = ("c-" if spec.sharing == "collaborative" else "p-") + spec.cell
    assert (cell, spec.output) == (("c-gru", name) if name == "mixture" else (name, "softmax"))


@pytest.mark.parametrize(
    ("name", "settings", "advice"),
    [
        ("bigrams", {}, "there is no model 'bigrams': did you mean 'bigram'?"),
        ("unigram", {"epsilons": 1.0}, "no setting 'epsilons' of unigram: did you mean 'epsilon'?"),
        ("uniform", {"seed": 1}, "there is no setting 'seed' of uniform: it has none"),
        ("c-gru", {"cell": "tanh"}, "c-gru has cell 'gru' and 'tanh' was given"),
        ("p-gru", {"hidden": 3}, "there is no setting 'hidden'"),
    ],
)
def test_wrong_names(name, settings, advice):
    with pytest.raises(SettingsError) as caught:
        methods.new(name, **settings)
    assert advice in str(caught.value)


def test_what_is_no_model_file(tmp_path):
    with pytest.raises(ModelError, match="no such model file"):
        methods.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ModelError, match="not a safetensors file"):
        methods.load(tmp_path / "text")
