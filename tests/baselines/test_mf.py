"""Matrix factorisation against Eqs. 8 to 10 written out with a dense matrix."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crnn_np import data
from crnn_np.baselines import MatrixFactorization, Uniform, mf, validation_parts
from crnn_np.errors import DataError, ModelError, SettingsError


def log_of(*sequences, n_items):
    return data.from_sequences([np.array(s, int) for s in sequences], n_items)


def matrix(log):
    """float64[U, I]: log(c + 1)."""
    counts = np.zeros((log.n_users, log.n_items))
    for u, (a, b) in enumerate(zip(log.indptr, log.indptr[1:], strict=False)):
        for i in log.items[a:b]:
            counts[u, i] += 1
    return np.log(counts + 1)


def objective(M, users, items, penalty):
    """Eq. 8."""
    value = 0.0
    for u, i in zip(*np.nonzero(M), strict=True):
        value += (M[u, i] - users[u] @ items[i]) ** 2
        value += penalty * (users[u] @ users[u] + items[i] @ items[i])
    return value


def solved(M, fixed, penalty):
    """The minimum of Eq. 8 over the factors of the rows of M; 0 for a row without entries."""
    out = np.zeros((M.shape[0], fixed.shape[1]))
    for r, row in enumerate(M):
        seen = fixed[row > 0]
        if len(seen):
            ridge = penalty * len(seen) * np.eye(fixed.shape[1])
            out[r] = np.linalg.solve(seen.T @ seen + ridge, seen.T @ row[row > 0])
    return out


def random_log(seed, users=12, items=30, length=40):
    """Users of unlike lengths, user 3 without events, the last item without any."""
    rng = np.random.default_rng(seed)
    lengths = np.where(np.arange(users) == 3, 0, rng.integers(1, length, users))
    popularity = np.append(rng.dirichlet(np.ones(items - 1)), 0)
    return log_of(*(rng.choice(items, n, p=popularity) for n in lengths), n_items=items)


def test_counts():
    by_user, by_item = mf.log_counts(log_of([2, 0, 2], [], [1, 2], n_items=4))
    assert by_user.indptr.tolist() == [0, 2, 2, 4]
    assert by_user.index.tolist() == [0, 2, 1, 2]
    np.testing.assert_allclose(by_user.value, np.log([2, 3, 2, 2]))
    assert by_item.indptr.tolist() == [0, 1, 2, 4, 4]
    assert by_item.index.tolist() == [0, 2, 0, 2]
    np.testing.assert_allclose(by_item.value, np.log([2, 2, 3, 2]))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rank", [1, 4, 17])
def test_half_pass(seed, rank):
    log = random_log(seed)
    M, (by_user, by_item) = matrix(log), mf.log_counts(log)
    rng = np.random.default_rng(seed)
    users, items = rng.standard_normal((12, rank)), rng.standard_normal((30, rank))
    users[3] = items[M.sum(axis=0) == 0] = 0
    expected = solved(M, items, 0.05)
    mf.solve_rows(*by_user, items, 0.05, users)
    np.testing.assert_allclose(users, expected, rtol=1e-10, atol=1e-10)
    expected = solved(M.T, users, 0.05)
    mf.solve_rows(*by_item, users, 0.05, items)
    np.testing.assert_allclose(items, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("penalty", [1e-3, 0.1, 1.0])
def test_objective_never_rises(penalty):
    log = random_log(0)
    M = matrix(log)
    values = []
    for passes in range(1, 12):
        learned = MatrixFactorization(rank=5, penalty=penalty, passes=passes).fit(log).learned
        values.append(objective(M, learned.users, learned.items, penalty))
    assert (np.diff(values) <= 1e-12 * values[0]).all()
    assert values[-1] < values[0]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.3]), st.integers(1, 6))
def test_errors_and_ranks(seed, penalty, rank):
    train = random_log(seed)
    rng = np.random.default_rng(seed)
    heldout = log_of(*rng.integers(0, 30, (12, 3)), n_items=30)
    model = MatrixFactorization(rank=rank, penalty=penalty, passes=4).fit(train)
    users, items, _ = model.learned
    nll, reciprocal, recall = [], [], []
    for u, future in enumerate(heldout.items.reshape(12, 3)):
        past = [] if train.lengths[u] else [0]  # an event without any history is no target
        z = [sum(a * b for a, b in zip(users[u], v, strict=True)) for v in items]
        z = np.array(z)
        p = np.exp(z) / np.exp(z).sum()
        future = future[len(past) :]
        ranks = np.array([np.sum(z >= z[i]) for i in future])
        nll.append(np.mean(-np.log(p[future])))
        recall.append(np.mean(ranks <= 7))
        reciprocal.append(np.mean((ranks <= 7) / ranks))
    scores = model.evaluate(train, heldout, n=7, per_user=True)
    np.testing.assert_allclose(scores["per_user"]["nll"], nll, rtol=1e-10)
    assert scores["recall@7"] == pytest.approx(np.mean(recall))
    assert scores["mrr@7"] == pytest.approx(np.mean(reciprocal))


def test_heldout_counts_are_not_used():
    train = random_log(1)
    model = MatrixFactorization(rank=3, penalty=0.1).fit(train)
    once = model.evaluate(train, log_of(*[[0]] * 12, n_items=30))["nll"]
    often = model.evaluate(train, log_of(*[[0, 0, 0]] * 12, n_items=30), per_user=True)
    with_history = train.lengths > 0
    assert np.mean(often["per_user"]["nll"][with_history]) == pytest.approx(once, rel=1e-12)


def test_without_events():
    train = random_log(2)
    users, items, _ = MatrixFactorization(rank=3, penalty=0.1).fit(train).learned
    assert not users[3].any()
    assert not items[29].any()
    # The second event of user 3 has a history, but the user no factor: a uniform distribution.
    model = MatrixFactorization(rank=3, penalty=0.1).fit(train)
    scores = model.evaluate(train, log_of([], [], [], [5, 7], *[[]] * 8, n_items=30), n=30)
    assert scores["nll"] == pytest.approx(np.log(30))
    assert scores["mrr@30"] == pytest.approx(1 / 30)


def test_nothing_to_evaluate():
    model = MatrixFactorization(rank=3, penalty=0.1).fit(random_log(2))
    with pytest.raises(DataError, match="no event to evaluate"):
        model.evaluate(random_log(2), log_of(*[[]] * 12, n_items=30))


@pytest.fixture(scope="module")
def tastes():
    """Users of two kinds, each kind with its own half of the items, often repeated or not."""
    rng = np.random.default_rng(0)
    popularity = rng.dirichlet(np.full(20, 0.3), 2)
    rows = [20 * (u % 2) + rng.choice(20, 100, p=popularity[u % 2]) for u in range(40)]
    return data.split(log_of(*rows, n_items=40), heldout_fraction=0.1)


def test_settings_have_the_lowest_validation_error(tastes, monkeypatch):
    monkeypatch.setattr(mf, "RANKS", (2, 16))
    monkeypatch.setattr(mf, "PENALTIES", (0.01, 1.0))
    part, validation, _ = validation_parts(tastes.train, None)

    def error(rank, penalty):
        model = MatrixFactorization(rank=rank, penalty=penalty, passes=5).fit(part)
        return model.evaluate(part, validation)["nll"]

    penalty = min(mf.PENALTIES, key=lambda penalty: error(16, penalty))
    rank = min(mf.RANKS, key=lambda rank: error(rank, penalty))
    chosen = MatrixFactorization(passes=5).fit(tastes.train)
    given = MatrixFactorization(rank=rank, penalty=penalty, passes=5).fit(tastes.train)
    for a, b in zip(chosen.learned, given.learned, strict=True):
        np.testing.assert_array_equal(a, b)
    assert chosen.evaluate(*tastes) == given.evaluate(*tastes)
    again = MatrixFactorization(passes=5).fit(part, validation)
    np.testing.assert_array_equal(again.learned.items, chosen.learned.items)
    model = MatrixFactorization(rank=2, passes=5).fit(tastes.train)
    assert model.learned.items.shape == (tastes.train.n_items, 2)


def test_better_than_uniform_and_repeatable(tastes, tmp_path):
    model = MatrixFactorization(rank=2, penalty=0.01).fit(tastes.train)
    assert model.score(*tastes) > Uniform().fit(tastes.train).score(*tastes)
    again = MatrixFactorization(rank=2, penalty=0.01).fit(tastes.train)
    other = MatrixFactorization(rank=2, penalty=0.01, passes=1, seed=1).fit(tastes.train)
    np.testing.assert_array_equal(model.learned.items, again.learned.items)
    assert not np.array_equal(model.learned.items, other.learned.items)
    model.save(tmp_path / "model")
    loaded = MatrixFactorization.load(tmp_path / "model")
    assert repr(loaded) == repr(model)
    assert loaded.evaluate(*tastes) == model.evaluate(*tastes)


@pytest.mark.parametrize(
    "wrong", [{"rank": 0}, {"penalty": 0.0}, {"penalty": float("nan")}, {"passes": 0}]
)
def test_settings_out_of_range(wrong):
    with pytest.raises(SettingsError, match="was expected"):
        MatrixFactorization(**wrong)


def test_not_fitted(tastes):
    with pytest.raises(ModelError, match="not fitted"):
        MatrixFactorization().evaluate(*tastes)
    assert "not fitted" in repr(MatrixFactorization())
