"""The presets say what the sources say, and nothing that is not a setting."""

import tomllib
from dataclasses import fields
from importlib import resources

import numpy as np
import pytest

from crnn_np import presets
from crnn_np.errors import SettingsError
from crnn_np.model import Spec
from crnn_np.optim import Rule
from crnn_np.windows import Plan

FIELDS = [field.name for cls in (Spec, Rule, Plan) for field in fields(cls)]

# The authors' own code and the settings of their published Brightkite figure.
BRIGHTKITE = {
    "hidden_size": 32,
    "cell": "gru",
    "sharing": "collaborative",
    "candidate": "sigmoid",
    "output": "softmax",
    "init_state": 0.0,
    "dropout_in": 0.0,
    "dropout_out": 0.0,
    "learning_rate": 0.0075,
    "rho": 0.997,
    "eps": 1e-8,
    "W_in_rows": "touched",
    "clip": 0.0,
    "batch": 20,
    "window": 64,
    "order": "length",
    "loss_scale": "mean",
    "epochs": 25,
    "patience": 0,
}
LASTFM = BRIGHTKITE | {"hidden_size": 128, "learning_rate": 0.01, "epochs": 10}

# What the paper gives: Algorithms 1 and 2, Section 4. Rates and sizes it does not give.
PAPER = {
    "cell": "gru",
    "sharing": "collaborative",
    "candidate": "tanh",
    "output": "softmax",
    "W_in_rows": "touched",
    "batch": 1,
    "window": 128,
    "order": "random",
    "loss_scale": "sum",
    "refit": True,
}


def differences(settings, expected):
    flat = settings.flat()
    return {name: flat[name] for name, value in expected.items() if flat[name] != value}


@pytest.mark.parametrize(
    ("preset", "like", "expected"),
    [
        ("authors", None, BRIGHTKITE),
        ("authors", "brightkite", BRIGHTKITE),
        ("authors", "table", BRIGHTKITE),
        ("authors", "lastfm", LASTFM),
        ("paper", None, PAPER),
        ("paper", "lastfm", PAPER),
    ],
)
def test_values(preset, like, expected):
    assert differences(presets.resolve(preset, like), expected) == {}


def test_paper_has_dropout_and_early_stopping():
    spec, _, plan = presets.resolve("paper")
    assert max(spec.dropout_in, spec.dropout_out) > 0
    assert 0 < plan.patience < plan.epochs


def test_the_eps_of_the_authors_acts_on_a_mean_over_1280_cells():
    assert presets.resolve("authors").plan.scale == 1 / 1280


def test_names_are_the_files():
    assert presets.names() == ["authors", "mixture", "paper"]


@pytest.mark.parametrize("preset", presets.names())
def test_every_key_of_a_file_is_a_setting(preset):
    text = (resources.files(presets) / f"{preset}.toml").read_text("utf-8")
    keys = tomllib.loads(text)
    special = keys.pop("like", {})
    assert set(special) <= {"brightkite", "lastfm", "table"}
    for table in (keys, *special.values()):
        assert table
        assert set(table) <= set(FIELDS)


def test_no_two_classes_share_a_field():
    assert len(set(FIELDS)) == len(FIELDS)


def test_flat_has_every_field():
    assert list(presets.resolve("paper").flat()) == FIELDS


def test_without_a_preset_the_defaults_of_the_classes():
    assert presets.resolve(None) == (Spec(), Rule(), Plan())


def test_changes_win_over_the_preset_and_over_what_it_says_of_a_kind_of_log():
    changed = presets.resolve("authors", "lastfm", hidden_size=8, eps=1e-3, seed=5)
    expected = LASTFM | {"hidden_size": 8, "eps": 1e-3, "seed": 5}
    assert differences(changed, expected) == {}


def test_a_list_stands_for_the_range():
    """As it comes from a JSON file."""
    changed = presets.resolve(None, validation_range=[2, 9])
    assert changed.plan == Plan(validation_range=(2, 9))


def test_a_number_of_numpy_is_a_number():
    """As it comes from a search over settings."""
    changed = presets.resolve(None, hidden_size=np.int64(4), rho=np.float64(0.5))
    assert changed == presets.resolve(None, hidden_size=4, rho=0.5)
    assert type(changed.spec.hidden_size) is int


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"preset": "author"}, "did you mean 'authors'?"),
        ({"preset": "zzz"}, "expected one of authors, mixture, paper"),
        ({"preset": "paper", "like": "lastfmm"}, "did you mean 'lastfm'?"),
        ({"preset": "authors", "like": "lastfmm"}, "did you mean 'lastfm'?"),
        ({"hiden_size": 3}, "did you mean 'hidden_size'?"),
        ({"w_in_rows": "dense"}, "did you mean 'W_in_rows'?"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"validation_range": 5}, "validation_range is 5"),
    ],
)
def test_what_is_not_known_names_the_nearest(arguments, advice):
    with pytest.raises(SettingsError) as caught:
        presets.resolve(**arguments)
    assert advice in str(caught.value)
