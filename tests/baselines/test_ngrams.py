"""Uniform, unigram and bigram against Eqs. 4 to 7 written out with dense counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crnn_np import data
from crnn_np.baselines import Bigram, Uniform, Unigram, validation_parts
from crnn_np.baselines.ngrams import EPSILONS
from crnn_np.errors import DataError, ModelError, SettingsError

ALL = [Uniform, Unigram, Bigram]
SMOOTHED = [Unigram, Bigram]


def log_of(*sequences, n_items):
    return data.from_sequences([np.array(s, int) for s in sequences], n_items)


@st.composite
def splits(draw):
    n_items = draw(st.integers(1, 6))
    items = st.integers(0, n_items - 1)
    train = draw(st.lists(st.lists(items, max_size=9), min_size=1, max_size=4))
    train[0] = train[0] or [0]
    heldout = [draw(st.lists(items, max_size=4)) for _ in train]
    heldout[0] = heldout[0] or [0]
    return data.Split(log_of(*train, n_items=n_items), log_of(*heldout, n_items=n_items))


def sequences(log):
    return [log.items[a:b].tolist() for a, b in zip(log.indptr, log.indptr[1:], strict=False)]


def distribution(kind, epsilon, train, before):
    """The I probabilities after the item `before`, one equation after the other."""
    I = train.n_items
    if kind is Uniform:
        return np.full(I, 1 / I)
    c, b = np.zeros(I), np.zeros((I, I))
    for sequence in sequences(train):
        for t, i in enumerate(sequence):
            c[i] += 1
            if t > 0:
                b[i, sequence[t - 1]] += 1
    counts = c if kind is Unigram else b[:, before]
    return (counts + epsilon) / (counts + epsilon).sum()


def expected(kind, epsilon, split):
    """User, whether first, negative log-likelihood and rank of each held-out event."""
    rows = []
    for u, (past, future) in enumerate(zip(*map(sequences, split), strict=True)):
        for k, i in enumerate(future):
            before = (past + future)[: len(past) + k]
            if before:
                p = distribution(kind, epsilon, split.train, before[-1])
                rows.append((u, bool(past) and k == 0, -np.log(p[i]), np.sum(p >= p[i])))
    return rows


@settings(deadline=None)
@given(splits(), st.sampled_from(ALL), st.sampled_from([0.01, 0.5, 2.0]), st.integers(1, 4))
def test_errors_and_ranks(split, kind, epsilon, n):
    rows = expected(kind, epsilon, split)
    model = kind().fit(split.train) if kind is Uniform else kind(epsilon=epsilon).fit(split.train)
    if not rows:
        with pytest.raises(DataError, match="no event to evaluate"):
            model.evaluate(*split, n=n)
        return
    scores = model.evaluate(*split, n=n, per_user=True)
    users = sorted({row[0] for row in rows})
    assert scores["events"] == len(rows)
    assert scores["per_user"]["user"].tolist() == users

    def of_users(value, kept=lambda row: True):
        means = [[value(r) for r in rows if r[0] == u and kept(r)] for u in users]
        return [np.mean(m) for m in means if m]

    reciprocal = lambda row: 1 / row[3] if row[3] <= n else 0.0  # noqa: E731
    np.testing.assert_allclose(scores["per_user"]["nll"], of_users(lambda row: row[2]), rtol=1e-12)
    np.testing.assert_allclose(scores["nll"], np.mean(of_users(lambda row: row[2])), rtol=1e-12)
    assert scores[f"recall@{n}"] == pytest.approx(np.mean(of_users(lambda row: row[3] <= n)))
    assert scores[f"mrr@{n}"] == pytest.approx(np.mean(of_users(reciprocal)))
    later = of_users(lambda row: row[2], lambda row: not row[1])
    if later:
        assert scores["nll_after_first"] == pytest.approx(np.mean(later))
    else:
        assert scores["nll_after_first"] is None


@pytest.mark.parametrize("kind", ALL)
def test_distributions_sum_to_one(kind):
    rng = np.random.default_rng(0)
    I = 50
    train = log_of(*rng.integers(0, I - 5, (40, 30)), n_items=I)
    model = kind().fit(train)
    for before in (0, 17, I - 1):  # item I - 1 never occurs: a context that was not seen
        history = log_of(*[[before]] * I, *[[0]] * 40, n_items=I)
        every = log_of(*[[i] for i in range(I)], *[[]] * 40, n_items=I)
        model._user_ids = history.user_ids
        p = np.exp(-model.evaluate(history, every, per_user=True)["per_user"]["nll"])
        assert abs(p.sum() - 1) < 1e-6
        if kind is Bigram and before == I - 1:
            np.testing.assert_allclose(p, 1 / I)


def test_uniform():
    train, heldout = log_of([0, 1, 2], n_items=7), log_of([3, 0], n_items=7)
    scores = Uniform().fit(train).evaluate(train, heldout, n=7)
    assert scores["nll"] == np.log(7)
    assert scores["perplexity"] == pytest.approx(7)
    assert scores["recall@7"] == 1
    assert scores["mrr@7"] == pytest.approx(1 / 7)
    assert Uniform().fit(train).evaluate(train, heldout, n=6)["recall@6"] == 0


def test_bigrams_never_cross_users():
    train = log_of([0, 1], [], [2, 0], n_items=3)
    model = Bigram(epsilon=1e-6).fit(train)
    keys, counts, _ = model.learned
    assert keys.tolist() == [0 * 3 + 1, 2 * 3 + 0]
    assert counts.tolist() == [1, 1]


def test_first_heldout_event_follows_the_last_training_event():
    train = log_of([0, 1, 0, 2], [2, 1], n_items=3)
    heldout = log_of([1], [0, 1], n_items=3)
    scores = Bigram(epsilon=1e-9).fit(train).evaluate(train, heldout, per_user=True)
    # User 0: 1 always follows 2. User 1: 0 always follows 1, then 1 follows 0 half the time.
    np.testing.assert_allclose(scores["per_user"]["nll"], [0, np.log(2) / 2], atol=1e-6)


def test_ties_count_against_us():
    train = log_of([0, 1, 0, 2, 0, 1, 0, 3, 0], n_items=6)
    model = Bigram(epsilon=0.1).fit(train)
    ranks = {}
    for i in range(6):
        after = [1.0 / model.evaluate(train, log_of([i], n_items=6), n=6)["mrr@6"]]
        ranks[i] = round(after[0])
    assert ranks == {1: 1, 2: 3, 3: 3, 0: 6, 4: 6, 5: 6}


@pytest.fixture(scope="module")
def walk():
    """Users who mostly go from item i to i + 1."""
    rng = np.random.default_rng(3)
    steps = np.where(rng.random((30, 80)) < 0.7, 1, rng.integers(0, 20, (30, 80)))
    log = log_of(*(steps.cumsum(axis=1) % 20), n_items=20)
    return data.split(log, heldout_fraction=0.1)


@pytest.mark.parametrize("kind", SMOOTHED)
def test_epsilon_has_the_lowest_validation_error(walk, kind):
    part, validation, whole = validation_parts(walk.train, None)
    errors = [
        kind(epsilon=epsilon).fit(part).evaluate(part, validation)["nll"] for epsilon in EPSILONS
    ]
    best = EPSILONS[int(np.argmin(errors))]
    chosen, given = kind().fit(walk.train), kind(epsilon=best).fit(walk.train)
    assert whole is walk.train
    assert chosen.learned.epsilon == [best]
    assert chosen.learned.counts.sum() == given.learned.counts.sum()
    assert chosen.evaluate(*walk) == given.evaluate(*walk)


@pytest.mark.parametrize("kind", SMOOTHED)
def test_given_validation_part(walk, kind):
    part, validation, whole = validation_parts(walk.train, None)
    ours, theirs = kind().fit(part, validation), kind().fit(whole)
    for a, b in zip(ours.learned, theirs.learned, strict=True):
        np.testing.assert_array_equal(a, b)


def test_order_matters_here(walk):
    errors = [kind().fit(walk.train).evaluate(*walk)["nll"] for kind in (Bigram, Unigram, Uniform)]
    assert errors[0] < errors[1] - 0.5
    assert abs(errors[1] - errors[2]) < 0.2
    assert Bigram().fit(walk.train).score(*walk) == -errors[0]


@pytest.mark.parametrize("kind", ALL)
def test_save_and_load(walk, kind, tmp_path):
    model = kind().fit(walk.train)
    model.save(tmp_path / "model")
    loaded = kind.load(tmp_path / "model")
    assert repr(loaded) == repr(model)
    assert loaded.get_params() == model.get_params()
    assert loaded.evaluate(*walk) == model.evaluate(*walk)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_load_refuses_other_files(walk, tmp_path):
    Unigram().fit(walk.train).save(tmp_path / "unigram")
    (tmp_path / "rubbish").write_bytes(b"rubbish")
    with pytest.raises(ModelError, match="this is a Unigram, a Bigram was expected"):
        Bigram.load(tmp_path / "unigram")
    with pytest.raises(ModelError, match="not a safetensors file"):
        Bigram.load(tmp_path / "rubbish")
    with pytest.raises(ModelError, match="no such model file"):
        Bigram.load(tmp_path / "nothing")


def test_settings():
    model = Bigram(epsilon=0.1)
    assert model.get_params() == {"epsilon": 0.1}
    assert model.set_params(epsilon=None) is model
    assert repr(model) == "Bigram(epsilon=None)  # not fitted"
    assert Uniform().get_params() == {}
    with pytest.raises(SettingsError, match="did you mean 'epsilon'"):
        model.set_params(epsilom=1)
    with pytest.raises(SettingsError, match="Uniform has none"):
        Uniform().set_params(epsilon=1)
    with pytest.raises(TypeError):
        Bigram(0.1)


@pytest.mark.parametrize("epsilon", [0, -1, float("inf"), float("nan")])
def test_epsilon_must_be_positive(epsilon):
    with pytest.raises(SettingsError, match="a positive number"):
        Unigram(epsilon=epsilon)


@pytest.mark.parametrize("kind", ALL)
def test_misuse(walk, kind):
    model = kind()
    with pytest.raises(ModelError, match="not fitted"):
        model.evaluate(*walk)
    with pytest.raises(ModelError, match="not fitted"):
        model.save("nowhere")
    with pytest.raises(DataError, match="no event"):
        model.fit(log_of([], n_items=3))
    other = log_of([0, 1], n_items=3)
    with pytest.raises(ModelError, match="not the same"):
        model.fit(walk.train).evaluate(other, other)


def test_unigram_and_bigram_of_one_user_by_hand():
    train, heldout = log_of([0, 0, 1, 0], n_items=3), log_of([0, 2], n_items=3)
    unigram = Unigram(epsilon=0.5).fit(train).evaluate(train, heldout)["nll"]
    bigram = Bigram(epsilon=0.5).fit(train).evaluate(train, heldout)["nll"]
    assert unigram == pytest.approx(-(np.log(3.5 / 5.5) + np.log(0.5 / 5.5)) / 2)
    assert bigram == pytest.approx(-(np.log(1.5 / 3.5) + np.log(0.5 / 3.5)) / 2)
