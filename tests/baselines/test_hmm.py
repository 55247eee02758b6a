"""The hidden Markov model against hmmlearn, and its predictions against sums over the states."""

import numpy as np
import pytest
from hmmlearn.hmm import CategoricalHMM
from hypothesis import given, settings
from hypothesis import strategies as st

from crnn_np import data
from crnn_np.baselines import HMM, Unigram, hmm, validation_parts
from crnn_np.errors import ModelError, SettingsError


def log_of(*sequences, n_items):
    return data.from_sequences([np.array(s, int) for s in sequences], n_items)


def models(n_states, n_items, implementation="scaling", **settings):
    common = {"n_features": n_items, "emissionprob_prior": 1.01, "random_state": 0} | settings
    theirs = CategoricalHMM(n_states, implementation=implementation, **common)
    return theirs, hmm.SideBySide(n_states, **common)


def sequences(seed, count, longest, n_items=17):
    """Items and lengths; the first sequence has 1 event."""
    rng = np.random.default_rng(seed)
    lengths = np.append(1, rng.integers(1, longest, count))
    return rng.integers(0, n_items, (lengths.sum(), 1)), lengths


def test_threads(monkeypatch):
    x, lengths = sequences(0, 150, 30)
    _, model = models(4, 17)
    model._init(x, lengths)
    one, log_one = model._do_estep(x, lengths)
    monkeypatch.setattr(hmm.numba, "get_num_threads", lambda: 3)
    three, log_three = model._do_estep(x, lengths)
    for name in one:
        np.testing.assert_allclose(one[name], three[name], rtol=1e-10)
    np.testing.assert_allclose(log_one, log_three, rtol=1e-12)


@pytest.mark.parametrize("implementation", ["scaling", "log"])
@pytest.mark.parametrize(
    ("count", "longest", "n_states"), [(0, 2, 3), (5, 2, 3), (40, 60, 1), (80, 40, 7), (3, 900, 5)]
)
def test_expected_counts(implementation, count, longest, n_states):
    x, lengths = sequences(1, count, longest)
    theirs, ours = models(n_states, 17, implementation)
    theirs._init(x, lengths)
    ours._init(x, lengths)
    expected, expected_log = theirs._do_estep(x, lengths)
    stats, log_likelihood = ours._do_estep(x, lengths)
    assert stats.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(stats[name], expected[name], rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(log_likelihood, expected_log, rtol=1e-10)


@pytest.mark.parametrize("prior", [1, 1.01, 3])
def test_parameters_after_several_passes(prior):
    x, lengths = sequences(2, 60, 80)
    theirs, ours = models(6, 17, n_iter=12, tol=-np.inf, emissionprob_prior=prior)
    theirs.fit(x, lengths)
    ours.fit(x, lengths)
    assert ours.monitor_.iter == theirs.monitor_.iter == 12
    assert (np.diff(ours.monitor_.history) > 0).all()
    if prior == 1:
        np.testing.assert_allclose(ours.monitor_.history, theirs.monitor_.history, rtol=1e-10)
    for name in ("startprob_", "transmat_", "emissionprob_"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), atol=1e-8)


def predictions(learned, history):
    """float64[I]: p(next item | history), the forward recursion in plain sums, unscaled."""
    joint = learned.first * learned.emit[history[0]]
    for item in history[1:]:
        joint = (joint @ learned.move) * learned.emit[item]
    return (joint / joint.sum()) @ learned.move @ learned.emit.T


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_errors_and_ranks(draw):
    items = st.integers(0, 6)
    users = draw.draw(st.integers(1, 5))
    train = [draw.draw(st.lists(items, max_size=9)) for _ in range(users)]
    train[0] = train[0] or [0]
    heldout = [draw.draw(st.lists(items, max_size=4)) for _ in range(users)]
    heldout[0] = heldout[0] or [6]
    log, future = log_of(*train, n_items=9), log_of(*heldout, n_items=9)
    model = HMM(n_states=3, smoothing=0.1, iterations=3).fit(log)
    expected = []
    for past, then in zip(train, heldout, strict=True):
        rows = []
        for k, i in enumerate(then):
            if past + then[:k]:
                p = predictions(model.learned, past + then[:k])
                close = np.sum(p >= p[i] * (1 - 1e-9))
                rows.append((-np.log(p[i]), close <= 4, (close <= 4) / close))
        if rows:
            expected.append(np.mean(rows, axis=0))
    scores = model.evaluate(log, future, n=4, per_user=True)
    np.testing.assert_allclose(scores["per_user"]["nll"], np.array(expected)[:, 0], rtol=1e-8)
    assert scores["recall@4"] == pytest.approx(np.mean(expected, axis=0)[1])
    assert scores["mrr@4"] == pytest.approx(np.mean(expected, axis=0)[2])


def test_ties_of_many_items_are_exact():
    n_items = 2 * hmm.TILE + 3
    log = log_of([0, 1, 0, 1, 2], [2, 1, 0], n_items=n_items)
    model = HMM(n_states=3, smoothing=0.01, iterations=4).fit(log)
    for unseen in (3, hmm.TILE, n_items - 1):
        heldout = log_of([unseen], [unseen], n_items=n_items)
        scores = model.evaluate(log, heldout, n=n_items)
        assert scores[f"mrr@{n_items}"] == pytest.approx(1 / n_items)
        assert np.isfinite(scores["nll"])


@pytest.fixture(scope="module")
def moods():
    """Users who stay on one half of the items for long, then move to the other."""
    rng = np.random.default_rng(0)
    sides = (rng.random((40, 100)) < 0.05).cumsum(axis=1) % 2
    return data.split(
        log_of(*(10 * sides + rng.integers(0, 10, sides.shape)), n_items=20), heldout_fraction=0.1
    )


def test_learns_the_moods(moods, tmp_path):
    model = HMM(n_states=2, smoothing=0.01, iterations=120, seed=1).fit(moods.train)
    assert model.score(*moods) > Unigram().fit(moods.train).score(*moods) + 0.3
    again = HMM(n_states=2, smoothing=0.01, iterations=120, seed=1).fit(moods.train)
    other = HMM(n_states=2, smoothing=0.01, iterations=120, seed=2).fit(moods.train)
    for a, b in zip(model.learned, again.learned, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(model.learned.emit, other.learned.emit)
    model.save(tmp_path / "model")
    loaded = HMM.load(tmp_path / "model")
    assert repr(loaded) == repr(model)
    assert loaded.evaluate(*moods) == model.evaluate(*moods)


def test_settings_have_the_lowest_validation_error(moods, monkeypatch):
    monkeypatch.setattr(hmm, "STATES", (1, 2))
    monkeypatch.setattr(hmm, "SMOOTHINGS", (0.01, 5.0))
    monkeypatch.setattr(hmm, "CHECK", 60)
    monkeypatch.setattr(hmm, "MOST", 120)
    monkeypatch.setattr(hmm, "GAIN", -np.inf)
    part, validation, _ = validation_parts(moods.train, None)

    def error(n_states, passes, smoothing):
        model = HMM(n_states=n_states, smoothing=smoothing, iterations=passes, seed=1).fit(part)
        return model.evaluate(part, validation)["nll"]

    best = min(
        (error(*given), given)
        for given in [(1, 60, 0.01), (2, 60, 0.01), (2, 120, 0.01), (2, 60, 5.0), (2, 120, 5.0)]
    )[1]
    chosen = HMM(seed=1).fit(moods.train)
    assert (chosen.learned.first.size, chosen.learned.iterations[0]) == best[:2]
    assert chosen.learned.smoothing == [best[2]]
    given = HMM(n_states=best[0], iterations=best[1], smoothing=best[2], seed=1).fit(moods.train)
    assert chosen.evaluate(*moods) == given.evaluate(*moods)
    again = HMM(seed=1).fit(part, validation)
    np.testing.assert_array_equal(again.learned.emit, chosen.learned.emit)


def test_users_with_no_event_or_one():
    train = log_of([], [0, 1, 0, 1, 0], [2], [], n_items=4)
    model = HMM(n_states=2, iterations=2).fit(train)
    scores = model.evaluate(train, log_of([1, 0], [1], [3], [], n_items=4), per_user=True)
    assert scores["per_user"]["user"].tolist() == [0, 1, 2]
    assert scores["events"] == 3
    assert np.isfinite(scores["per_user"]["nll"]).all()
    single = HMM(n_states=2, smoothing=0.1, iterations=2).fit(log_of([1], n_items=3))
    assert np.isfinite(single.score(log_of([1], n_items=3), log_of([2], n_items=3)))


@pytest.mark.parametrize(
    "wrong",
    [{"n_states": 0}, {"iterations": 0}, {"smoothing": 0.0}, {"smoothing": float("inf")}],
)
def test_settings_out_of_range(wrong):
    with pytest.raises(SettingsError, match="was expected"):
        HMM(**wrong)


def test_not_fitted(moods):
    with pytest.raises(ModelError, match="not fitted"):
        HMM().evaluate(*moods)
    assert "not fitted" in repr(HMM())
