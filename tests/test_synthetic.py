"""The drawn log follows its generator, and nothing else does as well."""

import numpy as np
import oracle
import pytest

from crnn_np import backends, data, evaluation, synthetic
from crnn_np.baselines import Bigram, Unigram
from crnn_np.errors import SettingsError


@pytest.fixture(scope="module")
def drawn():
    return synthetic.draw(n_users=60, n_items=50, hidden_size=6, events=(300, 500))


def sequences(log):
    return [log.items[a:b] for a, b in zip(log.indptr, log.indptr[1:], strict=False)]


def test_shapes(drawn):
    train, heldout = drawn.split
    lengths = train.lengths + heldout.lengths
    assert (train.n_users, train.n_items) == (heldout.n_users, heldout.n_items) == (60, 50)
    assert lengths.min() >= 300
    assert lengths.max() <= 500
    assert len(set(lengths.tolist())) > 20
    np.testing.assert_array_equal(heldout.lengths, np.rint(0.1 * lengths))
    assert drawn.params.W_h.shape == (60, 6, 18)
    assert drawn.params.W_in.shape == (50, 18)
    assert drawn.params.W_out.shape == (50, 6)


@pytest.mark.parametrize("cell", ["gru", "tanh"])
def test_same_seed_same_log(cell):
    first, again, other = (
        synthetic.draw(5, 10, 4, cell, (10, 20), seed=seed) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.split.train.items, again.split.train.items)
    assert not np.array_equal(first.params.W_h, other.params.W_h)


@pytest.mark.parametrize("cell", ["gru", "tanh"])
def test_events_follow_the_softmax(cell):
    """Each event's place in the distribution of the oracle is uniform, and the errors agree."""
    drawn = synthetic.draw(8, 12, 4, cell, (150, 200), seed=4)
    W_h, W_in, W_out = drawn.params
    log = data.concatenate(*drawn.split)
    places, nlls, rng = [], [], np.random.default_rng(0)
    for u, x in enumerate(sequences(log)):
        h, nll = np.zeros(4), []
        for before, after in zip(x, x[1:], strict=False):
            h = oracle.next_state(cell, h, W_in[before], W_h[u])
            p = np.exp(W_out @ h)
            p /= p.sum()
            places.append(p[:after].sum() + rng.random() * p[after])
            nll.append(-np.log(p[after]))
        nlls.append(np.mean(nll[-drawn.split.heldout.lengths[u] :]))
    assert drawn.lowest_error()["nll"] == pytest.approx(np.mean(nlls), rel=1e-9)
    counts = np.bincount((np.array(places) * 10).astype(int), minlength=10)
    chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
    assert chi_square < 27.9  # 9 degrees of freedom, one draw in a thousand lies above


def test_the_bound_is_low_and_the_dynamics_are_each_users_own(drawn):
    train, heldout = drawn.split
    bound = drawn.lowest_error()["nll"]
    neighbour = drawn.params._replace(W_h=np.roll(drawn.params.W_h, 1, axis=0))
    swapped = evaluation.evaluate(backends.get("numpy"), drawn.spec, neighbour, train, heldout)
    bigram = Bigram().fit(train).evaluate(train, heldout)["nll"]
    unigram = Unigram().fit(train).evaluate(train, heldout)["nll"]
    assert bound < 0.6 * np.log(train.n_items)
    assert swapped["nll"] > bound + 1
    assert bound + 0.5 < bigram < unigram - 0.5
    assert unigram < np.log(train.n_items)


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_users": 0},
        {"n_items": 0},
        {"events": (0, 3)},
        {"events": (5, 4)},
        {"heldout_fraction": 1.0},
        {"heldout_fraction": -0.1},
        {"cell": "lstm"},
        {"hidden_size": 0},
    ],
)
def test_impossible_settings(wrong):
    with pytest.raises(SettingsError):
        synthetic.draw(**wrong)
