"""Every baseline predicts with a distribution over the whole catalogue, after any history."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crnn_np import data
from crnn_np.baselines import HMM, Bigram, MatrixFactorization, Personal, Uniform, Unigram

I, USERS = 23, 6

KINDS = {
    "uniform": lambda: Uniform(),
    "unigram": lambda: Unigram(epsilon=0.3),
    "bigram": lambda: Bigram(epsilon=0.01),
    "personal": lambda: Personal(),
    "matrix factorisation": lambda: MatrixFactorization(rank=4, penalty=0.01),
    "hmm": lambda: HMM(n_states=4, smoothing=0.01, iterations=5),
}


def log_of(*sequences):
    return data.from_sequences([np.array(s, int) for s in sequences], I)


@pytest.fixture(scope="module")
def fitted():
    """Each baseline after the same training part: user 4 has 1 event, user 5 none, item 22 none."""
    rng = np.random.default_rng(0)
    train = log_of(*(rng.integers(0, I - 1, n) for n in (40, 25, 12, 30, 1, 0)))
    return {name: make().fit(train) for name, make in KINDS.items()}


@pytest.mark.parametrize("name", KINDS)
@settings(deadline=None, max_examples=25)
@given(
    user=st.integers(0, USERS - 1),
    history=st.lists(st.integers(0, I - 1), min_size=1, max_size=30),
)
def test_sums_to_one(fitted, name, user, history):
    train = log_of(*(history if u == user else [] for u in range(USERS)))
    p = []
    for item in range(I):
        heldout = log_of(*([item] if u == user else [] for u in range(USERS)))
        p.append(np.exp(fitted[name].score(train, heldout)))
    assert min(p) > 0
    assert abs(sum(p) - 1) < 1e-6


def test_uniform_error_is_log_of_the_catalogue(fitted):
    train, heldout = log_of([1], *[[]] * 5), log_of([2, 3], *[[]] * 5)
    assert fitted["uniform"].score(train, heldout) == -np.log(I)
