"""Checks, help texts and advice of the settings classes."""

from dataclasses import FrozenInstanceError, fields

import pytest

from crnn_np.errors import CrnnError, SettingsError
from crnn_np.model import Spec
from crnn_np.optim import Rule
from crnn_np.settings import help_texts, nearest
from crnn_np.windows import Plan

CLASSES = [Spec, Rule, Plan]


def test_nearest():
    known = ["epochs", "eps", "batch"]
    assert nearest("epoch", known) == "did you mean 'epochs'?"
    assert nearest("batches", iter(known)) == "did you mean 'batch'?"
    assert nearest("zzz", known) == "expected one of epochs, eps, batch"


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_has_a_help_text_on_one_line(cls):
    texts = help_texts(cls)
    assert list(texts) == [field.name for field in fields(cls)]
    for text in texts.values():
        assert len(text) >= 10
        assert text == " ".join(text.split())
        assert " : " not in text


def test_help_texts_are_those_of_the_docstring():
    assert help_texts(Plan)["batch"] == "B, users side by side."
    assert help_texts(Rule)["learning_rate"] == "Step size of RMSprop."
    texts = help_texts(Spec)
    assert texts["dropout_in"] == texts["dropout_out"]
    assert texts["dropout_out"].endswith("never on the recurrent path.")
    assert texts["dtype"].startswith("Of all parameters and work arrays but a mixture's own, ")


@pytest.mark.parametrize(
    ("cls", "name", "wrong", "expected"),
    [
        (Spec, "cell", "lstm", "'gru', 'tanh'"),
        (Spec, "sharing", None, "'collaborative', 'pooled'"),
        (Spec, "dtype", "float16", "'float32', 'float64'"),
        (Spec, "hidden_size", 0, "1 to 65536"),
        (Spec, "hidden_size", 32.0, "int"),
        (Spec, "hidden_size", True, "int"),
        (Spec, "hidden_size", "32", "int"),
        (Spec, "init_state", -1.01, "-1 to 1"),
        (Spec, "dropout_in", 1.0, "0 to 0.99"),
        (Spec, "dropout_out", -0.1, "0 to 0.99"),
        (Rule, "learning_rate", -1e-9, "0 to 10"),
        (Rule, "learning_rate", float("nan"), "0 to 10"),
        (Rule, "learning_rate", "fast", "float"),
        (Rule, "rho", 1.001, "0 to 1"),
        (Rule, "eps", 0.0, "1e-30 to 10"),
        (Rule, "W_in_rows", "all", "'touched', 'dense'"),
        (Rule, "clip", -1.0, "0 to inf"),
        (Plan, "batch", 0, "1 to 65536"),
        (Plan, "window", 0, "1 to 65536"),
        (Plan, "order", "sorted", "'random', 'length'"),
        (Plan, "loss_scale", 1.0, "'sum', 'mean'"),
        (Plan, "epochs", 0, "1 to"),
        (Plan, "patience", -1, "0 to"),
        (Plan, "patience", None, "int"),
        (Plan, "validation_fraction", 0.51, "0 to 0.5"),
        (Plan, "seed", -1, "0 to"),
        (Plan, "validation_range", (0, 5), "1 <= shortest <= longest"),
        (Plan, "validation_range", (6, 5), "1 <= shortest <= longest"),
        (Plan, "validation_range", (3,), "shortest"),
        (Plan, "validation_range", 5, "shortest"),
        (Plan, "validation_range", ("3", "500"), "shortest"),
        (Plan, "validation_range", (3.5, 7), "shortest"),
        (Plan, "refit", "false", "expected"),
        (Plan, "refit", 2, "expected"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(cls, name, wrong, expected):
    with pytest.raises(SettingsError, match=name) as caught:
        cls(**{name: wrong})
    assert repr(wrong) in str(caught.value)
    assert expected in str(caught.value)
    assert isinstance(caught.value, CrnnError)


@pytest.mark.parametrize(
    ("cls", "name", "values"),
    [
        (Spec, "hidden_size", [1, 65536]),
        (Spec, "init_state", [-1, 1]),
        (Spec, "dropout_in", [0, 0.99]),
        (Rule, "learning_rate", [0, 10]),
        (Rule, "rho", [0, 1.0]),
        (Rule, "eps", [1e-30, 10]),
        (Rule, "clip", [0, float("inf")]),
        (Plan, "batch", [1, 65536]),
        (Plan, "epochs", [1]),
        (Plan, "validation_fraction", [0, 0.5]),
        (Plan, "validation_range", [(1, 1), (3, 500)]),
        (Plan, "refit", [True, False]),
    ],
)
def test_bounds_are_inclusive(cls, name, values):
    for value in values:
        assert getattr(cls(**{name: value}), name) == value


@pytest.mark.parametrize("cls", CLASSES)
def test_settings_are_frozen_and_compare_by_value(cls):
    assert cls() == cls()
    name = fields(cls)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(cls(), name, 1)
