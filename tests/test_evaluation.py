"""Errors on held-out events against plain loops, user by user and event by event."""

import math

import numpy as np
import oracle
import pytest

from crnn_np import backends, evaluation
from crnn_np.baselines import Bigram
from crnn_np.data import cut_tail, from_sequences
from crnn_np.errors import DataError, SettingsError
from crnn_np.model import Params, Spec

LIMITS = {"float64": 1e-14, "float32": 1e-7}  # measured: 1e-15, 3e-8
KINDS = {
    "tanh": {"cell": "tanh"},
    "gru": {"cell": "gru"},
    "gru-sigmoid": {"cell": "gru", "candidate": "sigmoid"},
}


def mean(values):
    return sum(values) / len(values)


def plain_summary(rows, n_users, n):
    """What `summarise` promises of rows (user, first, nll, rank)."""
    measures = {
        "nll": lambda nll, rank: nll,
        f"recall@{n}": lambda nll, rank: 1.0 if rank <= n else 0.0,
        f"mrr@{n}": lambda nll, rank: 1.0 / rank if rank <= n else 0.0,
    }
    expected = {}
    users = sorted({row[0] for row in rows})
    for name, measure in measures.items():
        per_user, later = [], []
        for user in users:
            own = [row for row in rows if row[0] == user]
            per_user.append(mean([measure(row[2], row[3]) for row in own]))
            rest = [measure(row[2], row[3]) for row in own if not row[1]]
            if rest:
                later.append(mean(rest))
        expected[name] = mean(per_user)
        expected[f"{name}_events"] = mean([measure(row[2], row[3]) for row in rows])
        expected[f"{name}_after_first"] = mean(later) if later else None
    expected["perplexity"] = math.exp(expected["nll"])
    counts = {"users": n_users, "users_evaluated": len(users), "events": len(rows)}
    return expected | counts


def assert_summary(found, expected, limit=1e-13):
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=limit, abs=limit), name


def summarise(rows, n_users, **options):
    user, first, nll, rank = map(np.array, zip(*rows, strict=True))
    return evaluation.summarise(user, first, nll, rank, n_users, **options)


# user, first, nll, rank
BY_HAND = [
    (4, True, 1.0, 1),
    (1, True, 2.0, 20),
    (4, False, 3.0, 21),
    (2, True, 8.0, 5),
    (4, False, 5.0, 4),
    (1, False, 4.0, 2),
]


def test_summary_by_hand():
    """Users 1, 2 and 4 of six; user 2 has one held-out event only."""
    found = summarise(BY_HAND, 6)
    expected = {
        "nll": (3 + 8 + 3) / 3,
        "recall@20": (1 + 1 + 2 / 3) / 3,
        "mrr@20": ((1 / 20 + 1 / 2) / 2 + 1 / 5 + (1 + 0 + 1 / 4) / 3) / 3,
        "nll_events": 23 / 6,
        "recall@20_events": 5 / 6,
        "mrr@20_events": (1 + 1 / 20 + 1 / 5 + 1 / 4 + 1 / 2) / 6,
        "nll_after_first": (4 + 4) / 2,
        "recall@20_after_first": (1 + 1 / 2) / 2,
        "mrr@20_after_first": (1 / 2 + 1 / 8) / 2,
        "perplexity": math.exp(14 / 3),
        "users": 6,
        "users_evaluated": 3,
        "events": 6,
    }
    assert_summary(found, expected)
    assert_summary(plain_summary(BY_HAND, 6, 20), expected)
    types = {type(found[name]) for name in ("users", "users_evaluated", "events")}
    assert types == {int}
    assert {type(value) for value in found.values()} == {int, float}


@pytest.mark.parametrize("n", [1, 5, 20])
@pytest.mark.parametrize("seed", range(3))
def test_summary(seed, n):
    rng = np.random.default_rng(seed)
    n_users = 30
    rows = []
    for user in rng.permutation(n_users)[:20].tolist():
        for k in range(rng.integers(1, 9)):
            rows.append((user, k == 0, rng.exponential(5), int(rng.integers(1, 41))))
    assert_summary(summarise(rows, n_users, n=n), plain_summary(rows, n_users, n))


def test_summary_per_user():
    found = summarise(BY_HAND, 6, per_user=True)["per_user"]
    assert list(found) == ["user", "events", "nll", "recall@20", "mrr@20"]
    assert found["user"].tolist() == [1, 2, 4]
    assert found["events"].tolist() == [2, 1, 3]
    assert found["nll"].tolist() == [3, 8, 3]
    assert found["recall@20"].tolist() == [1, 1, pytest.approx(2 / 3)]
    assert found["mrr@20"].tolist() == pytest.approx([11 / 40, 1 / 5, 5 / 12])


def test_summary_where_every_user_has_one_event():
    found = summarise([(0, True, 2.0, 3), (1, True, 4.0, 30)], 2)
    assert (found["nll"], found["recall@20"], found["mrr@20"]) == (3, 0.5, 1 / 6)
    for name in ("nll", "recall@20", "mrr@20"):
        assert found[f"{name}_after_first"] is None


def test_summary_of_nothing():
    empty = np.zeros(0)
    with pytest.raises(DataError, match="no event to evaluate"):
        evaluation.summarise(empty.astype(int), empty.astype(bool), empty, empty, 3)


# A whole evaluation


def replay(kind, params, init, sequences, n_heldout):
    """Rows (user, first, nll, rank), one user and one event at a time."""
    rows = []
    for user, sequence in enumerate(sequences):
        h = np.full(params.W_out.shape[1], init)
        W = params.W_h[user if len(params.W_h) > 1 else 0]
        for i in range(1, len(sequence)):
            h = oracle.next_state(kind, h, params.W_in[sequence[i - 1]], W)
            first = len(sequence) - n_heldout[user]
            if i >= first:
                nll = -oracle.log_softmax(params.W_out, h)[sequence[i]]
                rank = oracle.ranks(params.W_out, [h], [sequence[i]])[0]
                rows.append((user, i == first, float(nll), rank))
    return rows


def make(kind, sharing, lengths, heldout, seed=0, D=4, n_items=40, dtype="float64", size=1.0):
    rng = np.random.default_rng(seed)
    spec = Spec(
        hidden_size=D,
        sharing=sharing,
        init_state=0.3,
        dropout_in=0.5,
        dropout_out=0.5,
        dtype=dtype,
        **KINDS[kind],
    )
    G = oracle.GATES[kind]
    matrices = len(lengths) if sharing == "collaborative" else 1
    shapes = (matrices, D, G * D), (n_items, G * D), (n_items, D)
    params = Params(*((size * rng.standard_normal(shape)).astype(dtype) for shape in shapes))
    sequences = [rng.integers(0, n_items, n).tolist() for n in lengths]
    return spec, params, sequences, cut_tail(from_sequences(sequences, n_items), heldout)


# Users without a held-out event, with one only, with a history of one event, of more than two
# windows of 128, of exactly one, with nothing but held-out events, and with nothing.
LENGTHS = [9, 5, 1, 300, 128, 129, 4, 0, 30, 12]
HELDOUT = [3, 1, 0, 7, 1, 2, 3, 0, 0, 12]


@pytest.mark.parametrize("name", backends.MODULES)
@pytest.mark.parametrize("sharing", ["collaborative", "pooled"])
@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_is_a_replay_of_one_user_at_a_time(name, kind, sharing):
    """Dropout is off; the first held-out event is predicted from the last training event."""
    spec, params, sequences, (train, heldout) = make(kind, sharing, LENGTHS, HELDOUT)
    rows = replay(kind, params, spec.init_state, sequences, HELDOUT)
    backend = backends.get(name)
    found = evaluation.evaluate(backend, spec, params, train, heldout, 5, per_user=True)
    per_user = found.pop("per_user")
    assert_summary(found, plain_summary(rows, len(LENGTHS), 5), LIMITS["float64"])
    assert per_user["user"].tolist() == [0, 1, 3, 4, 5, 6, 9]
    assert per_user["events"].tolist() == [3, 1, 7, 1, 2, 3, 11]
    for user, nll in zip(per_user["user"], per_user["nll"], strict=True):
        assert nll == pytest.approx(mean([r[2] for r in rows if r[0] == user]), rel=1e-12)


@pytest.mark.parametrize("name", backends.MODULES)
@pytest.mark.parametrize("at_once", [1, 7, 10**9])
def test_evaluate_many_users(name, at_once, monkeypatch):
    """More users than stand side by side, scored in portions of any size."""
    monkeypatch.setattr(evaluation, "SCORED_AT_ONCE", at_once)
    rng = np.random.default_rng(1)
    lengths = rng.integers(2, 20, 150)
    heldout = rng.integers(0, lengths)
    spec, params, sequences, parts = make("gru", "collaborative", lengths, heldout, D=2)
    rows = replay("gru", params, spec.init_state, sequences, heldout)
    found = evaluation.evaluate(backends.get(name), spec, params, *parts)
    assert_summary(found, plain_summary(rows, 150, 20), LIMITS["float64"])


@pytest.mark.parametrize("name", backends.MODULES)
def test_evaluate_in_float32(name):
    spec, params, sequences, parts = make("gru", "pooled", LENGTHS, HELDOUT, dtype="float32")
    wide = Params(*(block.astype(float) for block in params))
    rows = replay("gru", wide, np.float32(spec.init_state), sequences, HELDOUT)
    found = evaluation.evaluate(backends.get(name), spec, params, *parts)
    expected = plain_summary(rows, len(LENGTHS), 20)
    for what in ("nll", "nll_events", "nll_after_first"):
        assert found[what] == pytest.approx(expected[what], abs=LIMITS["float32"])
    assert (found["users_evaluated"], found["events"]) == (7, 28)


@pytest.mark.parametrize("name", backends.MODULES)
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("n_items", [20, 21])
def test_a_model_that_knows_nothing_gets_the_last_rank(name, dtype, n_items):
    """All scores are 0: every rank is the number of items, and the error its logarithm."""
    spec, params, _, parts = make(
        "gru", "pooled", [6, 4, 9], [2, 3, 1], n_items=n_items, dtype=dtype, size=0.0
    )
    found = evaluation.evaluate(backends.get(name), spec, params, *parts)
    assert found["nll"] == pytest.approx(math.log(n_items), rel=1e-6)
    assert found["recall@20"] == (1 if n_items == 20 else 0)
    assert found["mrr@20"] == pytest.approx(1 / 20 if n_items == 20 else 0, rel=1e-12)


@pytest.mark.parametrize("name", backends.MODULES)
def test_ties_count_against_us(name):
    """tanh(large) = 1, so the scores are the sums of small whole numbers in rows of W_out."""
    spec = Spec(hidden_size=2, cell="tanh", sharing="pooled", dtype="float32")
    W_out = np.array([[3, 0], [1, 2], [2, 2], [4, 1], [0, 3], [1, 1]], np.float32)  # 3 3 4 5 3 2
    params = Params(
        np.zeros((1, 2, 2), np.float32),
        np.full((6, 2), 50, np.float32),
        np.ascontiguousarray(W_out),
    )
    ranks = {0: 5, 1: 5, 2: 2, 3: 1, 4: 5, 5: 6}
    sequences = [[0, item] for item in ranks]
    train, heldout = cut_tail(from_sequences(sequences), [1] * 6)
    found = evaluation.evaluate(
        backends.get(name), spec, params, train, heldout, n=6, per_user=True
    )
    assert found["per_user"]["mrr@6"].tolist() == [1 / rank for rank in ranks.values()]


@pytest.mark.parametrize("name", backends.MODULES)
def test_evaluate_changes_nothing_it_is_given(name):
    spec, params, _, parts = make("gru", "collaborative", LENGTHS, HELDOUT)
    before = [block.tobytes() for block in (*params, *(log.items for log in parts))]
    evaluation.evaluate(backends.get(name), spec, params, *parts)
    assert [block.tobytes() for block in (*params, *(log.items for log in parts))] == before


@pytest.mark.parametrize("heldout", [[0, 0], [1, 0]])
def test_evaluate_without_a_held_out_event_that_has_one_before_it(heldout):
    spec, params, _, parts = make("gru", "pooled", [1, 5], heldout)
    with pytest.raises(DataError, match="no event to evaluate"):
        evaluation.evaluate(backends.get("numpy"), spec, params, *parts)


@pytest.mark.parametrize("n", [0, -1, 2.5, "a", None])
def test_the_cut_off_is_a_whole_number_from_1(n):
    spec, params, _, parts = make("gru", "pooled", [3, 5], [1, 1])
    with pytest.raises(SettingsError, match="^n is "):
        evaluation.evaluate(backends.get("numpy"), spec, params, *parts, n=n)
    with pytest.raises(SettingsError, match="^n is "):
        Bigram().fit(parts[0]).evaluate(*parts, n=n)


def test_evaluate_refuses_parts_of_different_logs():
    spec, params, _, (train, _) = make("gru", "pooled", [3, 5], [1, 1])
    with pytest.raises(DataError, match="do not belong together"):
        evaluation.evaluate(backends.get("numpy"), spec, params, train, from_sequences([[0]]))
