"""The models by name: made, fitted, saved and read again without knowing which one it is."""

import numpy as np
import pytest

from crnn_np import baselines, methods, model
from crnn_np.data import cut_tail, from_sequences
from crnn_np.errors import CrnnError, ModelError, SettingsError

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
@pytest.mark.parametrize("settings", [{}, {"preset": "mixture"}, {"cell": "gru"}])
def test_an_rnn_is_what_its_name_says(name, settings):
    if name == "c-tanh":
        settings = settings | {"cell": "tanh"}
    spec = methods.new(name, **settings).settings.spec
    cell = ("c-" if spec.sharing == "collaborative" else "p-") + spec.cell
    assert (cell, spec.output) == (("c-gru", name) if name == "mixture" else (name, "softmax"))


@pytest.mark.parametrize(
    ("name", "settings", "advice"),
    [
        ("bigrams", {}, "there is no model 'bigrams': did you mean 'bigram'?"),
        ("unigram", {"epsilons": 1.0}, "no setting 'epsilons' of unigram: did you mean 'epsilon'?"),
        ("uniform", {"seed": 1}, "there is no setting 'seed' of uniform: it has none"),
        ("c-gru", {"cell": "tanh"}, "c-gru has cell 'gru' and 'tanh' was given"),
        ("c-gru", {"output": "mixture"}, "c-gru has output 'softmax' and 'mixture' was given"),
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


CHANGES = {
    "uniform": {"n_items": lambda a: a[:0]},
    "bigram": {"counts": lambda a: a[1:], "epsilon": lambda a: a[:0]},
    "personal": {
        "indptr": lambda a: a - 1,
        "items": lambda a: a + 9,
        "weights": lambda a: a[:, 1:],
    },
    "mf": {"users": lambda a: a[1:], "items": lambda a: a[:, 1:]},
    "hmm": {"move": lambda a: a[1:], "emit": lambda a: a[1:]},
    "c-gru": {"W_in": lambda a: a[1:], "W_h": lambda a: a[1:]},
    "mixture": {"tau": lambda a: a[:, 1:], "nu": lambda a: a[..., None]},
}


@pytest.mark.parametrize(
    ("name", "block"), [(n, b) for n, blocks in CHANGES.items() for b in blocks]
)
def test_arrays_that_do_not_fit_are_refused(tmp_path, monkeypatch, name, block):
    fitted, file = small(name).fit(TRAIN), tmp_path / "model"
    owner, attribute = fitted, "learned" if name in methods.BASELINES else "params"
    blocks = getattr(owner, attribute)
    changed = blocks._replace(**{block: CHANGES[name][block](getattr(blocks, block))})
    setattr(owner, attribute, changed)
    fitted.save(file)
    with pytest.raises(ModelError, match=f"{file}: .*it is damaged, or was not written by this"):
        methods.load(file)


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("baseline", "os", "a model of kind 'os': expected one of Uniform, Unigram"),
        ("cell", "lstm", "cell is 'lstm'"),
        ("output", "mixture", "tau has the shape None"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, monkeypatch, key, value, advice):
    fitted = small("c-gru").fit(TRAIN)
    save = model.save

    def change(path, params, acc, settings, *ids):
        save(path, params, acc, settings | {key: value}, *ids)

    monkeypatch.setattr(model, "save", change)
    fitted.save(tmp_path / "model")
    with pytest.raises(CrnnError, match=advice):
        methods.load(tmp_path / "model")


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_a_damaged_header_is_refused(tmp_path, monkeypatch, text):
    fitted = small("c-gru").fit(TRAIN)
    monkeypatch.setattr(model.json, "dumps", lambda *_, **__: text)
    fitted.save(tmp_path / "model")
    monkeypatch.undo()
    with pytest.raises(ModelError, match="its settings can't be read"):
        methods.load(tmp_path / "model")


@pytest.mark.parametrize("name", ["unigram", "mf", "c-gru"])
def test_a_held_out_or_validation_part_of_other_items_is_refused(name):
    other = HELDOUT._replace(item_ids=HELDOUT.item_ids[::-1])
    fitted = small(name)
    with pytest.raises(ModelError, match="not the same in the same order"):
        fitted.fit(TRAIN, other)
    with pytest.raises(ModelError, match="not the same in the same order"):
        fitted.fit(TRAIN).evaluate(TRAIN, other)


@pytest.mark.parametrize(
    ("name", "settings", "advice"),
    [
        ("mf", {"seed": -1}, "seed is -1: 0 or more"),
        ("mf", {"rank": 2.5}, "rank is 2.5: a whole number"),
        ("mf", {"passes": None}, "passes is None: a whole number"),
        ("mf", {"penalty": "x"}, "penalty is 'x': a positive number or None"),
        ("hmm", {"seed": 1 << 32}, f"seed is {1 << 32}: 0 to {(1 << 32) - 1}"),
        ("hmm", {"n_states": 0}, "n_states is 0: 1 or more"),
        ("bigram", {"epsilon": float("nan")}, "epsilon is nan: a positive number"),
    ],
)
def test_wrong_settings_of_baselines(name, settings, advice):
    with pytest.raises(SettingsError, match=advice):
        methods.new(name, **settings)


def test_settings_may_be_numbers_of_numpy(tmp_path):
    fitted = methods.new("mf", rank=np.int64(2), penalty=np.float32(0.5), seed=np.uint8(3))
    fitted.fit(TRAIN).save(tmp_path / "model")
    assert methods.load(tmp_path / "model").get_params() == fitted.get_params()
