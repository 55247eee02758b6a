"""`CollaborativeRNN`: settings in and out, fit and what follows it, files, and clear errors."""

import numpy as np
import pytest

from crnn_np import training
from crnn_np.data import cut_tail, from_sequences
from crnn_np.errors import CrnnError, ModelError, SettingsError, TrainingError
from crnn_np.estimator import CollaborativeRNN
from crnn_np.presets import resolve

RNG = np.random.default_rng(0)
SEQUENCES = [RNG.integers(0, 9, n).tolist() for n in (30, 12, 21, 5)]
TRAIN, HELDOUT = cut_tail(from_sequences(SEQUENCES, 9), [4, 3, 3, 1])
SMALL = {
    "preset": None,
    "backend": "numpy",
    "hidden_size": 3,
    "learning_rate": 0.05,
    "window": 8,
    "epochs": 2,
    "dropout_in": 0.2,
}


def small(**changes):
    return CollaborativeRNN(**(SMALL | changes))


def content(model):
    return b"".join(block.tobytes() for block in (*model.params, *model.accumulators))


# Settings


def test_settings_are_keyword_only():
    with pytest.raises(TypeError):
        CollaborativeRNN("authors")


def test_the_preset_is_paper_unless_another_is_named():
    assert CollaborativeRNN().settings == resolve("paper")
    assert CollaborativeRNN(preset="authors", like="lastfm").settings == resolve(
        "authors", "lastfm"
    )
    assert CollaborativeRNN(preset=None).settings == resolve(None)
    changed = CollaborativeRNN(preset="authors", epochs=3, seed=7)
    assert changed.settings == resolve("authors", epochs=3, seed=7)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"hiden_size": 3}, "did you mean 'hidden_size'?"),
        ({"epoch": 3}, "did you mean 'epochs'?"),
        ({"preset": "author"}, "did you mean 'authors'?"),
        ({"backend": "cuda"}, "expected one of numpy, numba"),
        ({"hidden_size": -1}, "hidden_size is -1"),
    ],
)
def test_wrong_settings(settings, advice):
    with pytest.raises(SettingsError) as caught:
        CollaborativeRNN(**settings)
    assert advice in str(caught.value)
    model = small()
    before = model.get_params()
    with pytest.raises(SettingsError) as caught:
        model.set_params(**settings)
    assert advice in str(caught.value)
    assert model.get_params() == before


@pytest.mark.parametrize("settings", [{}, {"preset": "authors", "like": "lastfm"}, SMALL])
def test_get_params_makes_an_equal_model(settings):
    model = CollaborativeRNN(**settings)
    params = model.get_params()
    again = CollaborativeRNN(**params)
    assert again.get_params() == params == model.get_params(deep=False)
    assert (again.settings, again.backend) == (model.settings, model.backend)
    assert CollaborativeRNN().set_params(**params).get_params() == params


def test_set_params():
    model = small()
    assert model.set_params(epochs=5, backend="numba", cell="tanh") is model
    assert model.get_params() == small().get_params() | {
        "epochs": 5,
        "backend": "numba",
        "cell": "tanh",
    }
    assert model.set_params() is model


def test_set_params_takes_a_preset():
    """Its settings, as the constructor would; whatever else is named wins over it."""
    model = small().set_params(preset="authors", epochs=3)
    assert model.settings == resolve("authors", epochs=3)


def test_set_params_takes_no_kind_of_log_alone():
    """There is no preset left in the settings that could say more of it."""
    model = small()
    with pytest.raises(SettingsError, match="like is 'lastfm' and no preset is set"):
        model.set_params(like="lastfm")
    assert model.get_params() == small().get_params()
    model.set_params(preset="authors", like="lastfm")
    assert model.settings == resolve("authors", "lastfm")


@pytest.mark.parametrize(
    "settings",
    [
        {"preset": None},
        {"preset": None, "backend": "numpy"},
        {"preset": "authors"},
        SMALL | {"validation_range": (2, 9), "W_in_rows": "dense", "refit": False, "eps": 1e-9},
    ],
)
def test_repr_is_the_model(settings):
    model = CollaborativeRNN(**settings)
    assert repr(model).endswith("# not fitted")
    assert "\n" not in repr(model)
    again = eval(repr(model))
    assert again.get_params() == model.get_params()
    assert repr(again) == repr(model)


def test_repr_says_what_was_fitted():
    model = small().fit(TRAIN)
    assert repr(model).endswith("# 4 users, 9 items, 2 epochs")
    assert eval(repr(model)).get_params() == model.get_params()


# Fit


def test_fit_returns_the_model_and_keeps_reports_without_arrays():
    model = small()
    assert model.reports == []
    assert model.fit(TRAIN) is model
    assert [(r.phase, r.epoch, r.events) for r in model.reports] == [
        ("train", 1, 53),
        ("train", 2, 53),
    ]
    assert {(r.params, r.accumulators) for r in model.reports} == {(None, None)}


def test_fit_is_training_epochs():
    model = small(dropout_out=0.3).fit(TRAIN)
    last = list(training.epochs(*model.settings, TRAIN, backend="numpy"))[-1]
    for ours, theirs in zip(model.params, last.params, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_fit_begins_anew():
    model = small().fit(TRAIN)
    first = content(model)
    assert content(model.fit(TRAIN)) == first
    assert len(model.reports) == 2
    assert content(model.set_params(seed=1).fit(TRAIN)) != first


def test_epochs_keeps_the_model_up_to_date():
    model = small(epochs=3)
    for k, report in enumerate(model.epochs(TRAIN), 1):
        assert model.params is report.params
        assert len(model.reports) == k
        assert repr(model).endswith(f"{k} epochs")
        assert np.isfinite(model.score(TRAIN, HELDOUT))


def test_epochs_shows_progress():
    calls = []
    list(small(epochs=1).epochs(TRAIN, progress=lambda *args: calls.append(args)))
    assert calls[-1][:2] == (53, 53)


def test_fit_with_a_validation_part():
    settings = {"epochs": 6, "patience": 2, "learning_rate": 0.2}
    model = small(**settings).fit(TRAIN, HELDOUT)
    chosen = [r.validation["nll"] for r in model.reports if r.phase == "choose"]
    best = int(np.argmin(chosen)) + 1
    whole = from_sequences(SEQUENCES, 9)
    straight = small(**settings).set_params(epochs=best, patience=0).fit(whole)
    assert content(model) == content(straight)
    kept = small(refit=False, **settings).fit(TRAIN, HELDOUT)
    assert kept.evaluate(TRAIN, HELDOUT)["nll"] == min(chosen)
    assert kept.reports[-1].phase == "keep"
    assert repr(kept).endswith(f"{best} epochs")


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_partial_fit_goes_on_from_epoch_to_epoch(backend):
    straight = small(backend=backend, epochs=4).fit(TRAIN)
    model = small(backend=backend, epochs=2, patience=0).fit(TRAIN)
    for _ in range(2):
        assert model.partial_fit(TRAIN) is model
    alone = small(backend=backend, patience=3)
    for _ in range(4):
        alone.partial_fit(TRAIN)
    assert content(model) == content(straight) == content(alone)
    assert [r.epoch for r in model.reports] == [1, 2, 3, 4]


def test_partial_fit_goes_on_after_refitting():
    model = small(epochs=5, patience=1, learning_rate=0.2).fit(TRAIN, HELDOUT)
    best = model.reports[-1].best_epoch
    whole = from_sequences(SEQUENCES, 9)
    straight = small(epochs=best + 1, learning_rate=0.2).fit(whole)
    assert content(model.partial_fit(whole)) == content(straight)


# Evaluation


def test_evaluate_and_score():
    model = small().fit(TRAIN)
    found = model.evaluate(TRAIN, HELDOUT, n=4, per_user=True)
    assert (found["users"], found["users_evaluated"], found["events"]) == (4, 4, 11)
    assert 0 < found["mrr@4"] <= found["recall@4"] <= 1
    assert found["nll"] == pytest.approx(found["per_user"]["nll"].mean(), rel=1e-12)
    assert model.score(TRAIN, HELDOUT) == -found["nll"]
    assert "recall@20" in model.evaluate(TRAIN, HELDOUT)


def test_both_backends_evaluate_alike():
    model = small().fit(TRAIN)
    plain = model.evaluate(TRAIN, HELDOUT)
    fast = model.set_params(backend="numba").evaluate(TRAIN, HELDOUT)
    assert fast == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("call", ["evaluate", "score", "save"])
def test_not_fitted(call, tmp_path):
    arguments = [tmp_path / "m"] if call == "save" else [TRAIN, HELDOUT]
    with pytest.raises(ModelError, match="not fitted"):
        getattr(small(), call)(*arguments)
    assert not list(tmp_path.iterdir())


def renamed(log, **ids):
    return log._replace(**{name: np.array(list(values), object) for name, values in ids.items()})


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (renamed(TRAIN, user_ids="wxyz"), "4 users"),
        (renamed(TRAIN, user_ids="1023"), "4 users"),
        (renamed(TRAIN, item_ids="012345687"), "9 items"),
        (from_sequences(SEQUENCES[:3], 9), "4 users"),
        (from_sequences(SEQUENCES, 10), "9 items"),
    ],
)
def test_other_users_or_items(other, what):
    model = small().fit(TRAIN)
    before = content(model)
    for call in (lambda: model.evaluate(other, HELDOUT), lambda: model.partial_fit(other)):
        with pytest.raises(ModelError, match=f"the model knows {what}"):
            call()
    assert content(model) == before


def test_held_out_events_of_other_users_or_items():
    model = small().fit(TRAIN)
    for ids in ({"user_ids": "wxyz"}, {"item_ids": "012345687"}):
        with pytest.raises(CrnnError):
            model.evaluate(TRAIN, renamed(HELDOUT, **ids))


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("change", [{"hidden_size": 5}, {"cell": "tanh"}, {"init_state": 0.9}])
def test_new_settings_are_for_the_next_fit(backend, change):
    """What is fitted stays as it is."""
    model = small(backend=backend).fit(TRAIN)
    before = model.score(TRAIN, HELDOUT)
    model.set_params(**change)
    assert model.score(TRAIN, HELDOUT) == before
    model.fit(TRAIN)
    assert model.score(TRAIN, HELDOUT) != before


@pytest.mark.parametrize("change", [{"hidden_size": 2}, {"cell": "tanh"}, {"sharing": "pooled"}])
def test_partial_fit_does_not_go_on_with_settings_that_do_not_fit(change):
    model = small().fit(TRAIN).set_params(**change)
    with pytest.raises(CrnnError):
        model.partial_fit(TRAIN)


def test_a_fit_that_fails_leaves_no_half_of_a_model(monkeypatch):
    """Neither the old parameters under the new ids nor the other way round."""
    model = small().fit(TRAIN)
    other = from_sequences([[0, 1, 2, 11], [3, 4]])

    def diverge(*args, **kwargs):
        raise TrainingError("the loss is nan")

    monkeypatch.setattr(training, "_train_epoch", diverge)
    with pytest.raises(TrainingError):
        model.fit(other)
    with pytest.raises(ModelError):
        model.evaluate(other, other)


# Files


@pytest.mark.parametrize("changes", [{}, {"cell": "tanh", "W_in_rows": "dense", "clip": 1.0}])
def test_a_saved_model_is_the_model(tmp_path, changes):
    model = small(validation_range=(2, 9), **changes).fit(TRAIN)
    model.save(tmp_path / "m")
    again = CollaborativeRNN.load(tmp_path / "m")
    assert repr(again) == repr(model)
    assert again.get_params() == model.get_params()
    assert again.evaluate(TRAIN, HELDOUT) == model.evaluate(TRAIN, HELDOUT)
    assert content(again) == content(model)
    with pytest.raises(ModelError):
        again.evaluate(renamed(TRAIN, user_ids="wxyz"), HELDOUT)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_training_goes_on_from_a_file(tmp_path, backend):
    straight = small(backend=backend, epochs=3).fit(TRAIN)
    small(backend=backend, epochs=2).fit(TRAIN).save(tmp_path / "m")
    again = CollaborativeRNN.load(tmp_path / "m").partial_fit(TRAIN)
    assert content(again) == content(straight)
    assert repr(again).endswith("3 epochs")


def test_load_refuses_what_is_no_model(tmp_path):
    with pytest.raises(ModelError, match="no such model file"):
        CollaborativeRNN.load(tmp_path / "missing")


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_dense_rows_after_touched_ones_keep_their_mean_squares(backend):
    fitted = small(backend=backend, W_in_rows="touched").fit(TRAIN)
    before = fitted.accumulators.W_in.copy()
    steps = int(fitted.accumulators.step[0])
    fitted.set_params(W_in_rows="dense").partial_fit(TRAIN)
    more = int(fitted.accumulators.step[0]) - steps
    decayed = fitted.settings.rule.rho**more * before
    assert (fitted.accumulators.W_in >= decayed * (1 - 1e-5)).all()
