"""The personal n-gram against a slow version written from its formulas."""

import numpy as np
import pytest

from crnn_np import data, tallies
from crnn_np.baselines import Personal, personal, targets

K = personal.K


def log_of(*sequences, n_items=7):
    return data.from_sequences([np.array(s, int) for s in sequences], n_items)


def random_log(seed, lengths, n_items=7):
    rng = np.random.default_rng(seed)
    return log_of(*(rng.integers(0, n_items, n) for n in lengths), n_items=n_items)


def sequences(log):
    return [log.items[a:b].tolist() for a, b in zip(log.indptr, log.indptr[1:], strict=False)]


def distributions(history, own, others, n_items):
    """The K distributions over all items, or None where there is no context."""
    own_parts = []
    lags = range(len(history) - 1, -1, -1)
    for half_life in personal.HALF_LIVES:
        own_parts.append(
            [(x, 2.0 ** (-lag / half_life)) for x, lag in zip(history, lags, strict=True)]
        )
    after = [s for s in range(1, len(history)) if history[s - 1] == history[-1]]
    for half_life in personal.MATCH_HALF_LIVES:
        weights = [2.0 ** (-k / half_life) for k in range(len(after))][::-1]
        own_parts.append([(history[s], w) for s, w in zip(after, weights, strict=True)])
    both = [s for s in after if s > 1 and history[s - 2] == history[-2]]
    own_parts.append([(history[s], 1.0) for s in both])
    pairs = [(b, 1.0) for o in others for a, b in zip(o, o[1:], strict=False) if a == history[-1]]
    own_parts.append(pairs)
    own_parts.append([(x, 1.0) for o in others for x in o])
    own_parts.append([(i, 1.0) for i in range(n_items)])
    found = []
    for part in own_parts:
        p = np.zeros(n_items)
        for item, weight in part:
            p[item] += weight
        found.append(p / p.sum() if p.sum() else None)
    return found, len(after)


def novelty(history):
    new, events, known = 1.0, 2.0, set()
    decay = 2 ** (-1 / tallies.NOVELTY_HALF_LIFE)
    for x in history:
        new, events = new * decay + (x not in known), events * decay + 1
        known.add(x)
    return new / events


def expected(model, train, heldout):
    """nll and rank of each held-out event."""
    fitted = sequences(train._replace(indptr=model.learned.indptr, items=model.learned.items))
    found = []
    for u, (past, future) in enumerate(zip(*map(sequences, (train, heldout)), strict=True)):
        whole = past + future
        others = fitted[:u] + fitted[u + 1 :]
        first = max(len(past), 1)
        took, gave = np.full((2, K), personal.USER_SHRINKAGE)
        for t in range(max(first - personal.TAIL, 1), len(whole)):
            parts, seen = distributions(whole[:t], fitted[u], others, train.n_items)
            row = np.searchsorted(personal.NOVELTY, novelty(whole[:t]), side="right")
            column = np.searchsorted(personal.CONTEXT, seen, side="right")
            w = model.learned.weights[row, column] * took / gave
            w = np.array([0 if p is None else x for p, x in zip(parts, w, strict=True)])
            w /= w.sum()
            mix = sum(x * p for x, p in zip(w, parts, strict=True) if p is not None)
            y = whole[t]
            took += [0 if p is None else x * p[y] / mix[y] for x, p in zip(w, parts, strict=True)]
            gave += w
            if t >= first:
                found.append((-np.log(mix[y]), np.sum(mix >= mix[y] * (1 - 1e-12))))
    return np.array(found)


@pytest.mark.parametrize("lengths", [(40, 25, 3, 1, 0, 12), (150, 9)])
def test_every_figure_from_the_formulas(lengths):
    log = random_log(1, lengths)
    heldout = [min(4, n) for n in lengths]
    train, test = data.cut_tail(log, heldout)
    model = Personal().fit(train)
    found = np.column_stack(model._score(targets(train, test)))
    wanted = expected(model, train, test)
    np.testing.assert_allclose(found[:, 0], wanted[:, 0], rtol=1e-10)
    np.testing.assert_array_equal(found[:, 1], wanted[:, 1])


def test_nothing_leaks_from_later_events():
    train, heldout = data.cut_tail(random_log(2, (60, 50, 40)), [9, 8, 7])
    model = Personal().fit(train)
    nll, rank = model._score(targets(train, heldout))
    changed = heldout._replace(items=heldout.items.copy())
    changed.items[changed.indptr[1] + 4 :] = 6 - heldout.items[changed.indptr[1] + 4 :]
    other_nll, other_rank = model._score(targets(train, changed))
    same = changed.indptr[1] + 4
    np.testing.assert_array_equal(nll[:same], other_nll[:same])
    np.testing.assert_array_equal(rank[:same], other_rank[:same])
    assert (nll[same:] != other_nll[same:]).any()


def test_repetition_is_learned_and_one_item_is_certain():
    habit = log_of(*([u, u + 1, u + 2] * 30 for u in range(4)))
    train, heldout = data.cut_tail(habit, [6] * 4)
    scores = Personal().fit(train).evaluate(train, heldout)
    assert scores["nll"] < 0.1
    assert scores["mrr@20"] == 1
    one = log_of([0, 0, 0], [0], n_items=1)
    assert Personal().fit(one).evaluate(one, one)["nll"] == pytest.approx(0, abs=1e-12)


def test_no_event_to_learn_weights_on():
    single = log_of([3], [2])
    model = Personal().fit(single)
    np.testing.assert_allclose(model.learned.weights, 1 / K)
    assert model.evaluate(single, log_of([2], [2]))["events"] == 2


def test_the_likelihood_does_not_fall(monkeypatch):
    """Of the M-step alone, with distributions missing here and there."""
    rng = np.random.default_rng(3)
    total = (rng.random((400, K)) < 0.6).astype(float)
    total[:, -1] = 1
    mass = rng.random((400, K)) ** 3 * total
    user, bucket = np.repeat(np.arange(8), 50), np.zeros(400, np.int64)
    monkeypatch.setattr(personal, "SHRINKAGE", 1e-12)
    found = []
    for iterations in range(12):
        monkeypatch.setattr(personal, "ITERATIONS", iterations)
        w = personal.learn_weights(mass, total, bucket, user)[0, 0] if iterations else np.ones(K)
        found.append(np.log((w * mass).sum(axis=1) / (w * (total > 0)).sum(axis=1)).sum())
    assert np.all(np.diff(found) > 0)


def test_a_bucket_without_events_has_its_parents_weights():
    rng = np.random.default_rng(4)
    total = np.ones((300, K))
    mass = rng.random((300, K))
    bucket = rng.integers(0, 8, 300)  # the lowest novelty only
    w = personal.learn_weights(mass, total, bucket, np.repeat(np.arange(3), 100))
    np.testing.assert_allclose(w.sum(axis=-1), 1)
    np.testing.assert_array_equal(w[1:], np.broadcast_to(w[1, 0], w[1:].shape))
    assert (w[0] != w[1]).any()


def test_a_saved_model_is_the_model(tmp_path):
    train, heldout = data.cut_tail(random_log(5, (60, 50, 40)), [9, 8, 7])
    model = Personal().fit(train)
    model.save(tmp_path / "m")
    found = Personal.load(tmp_path / "m").evaluate(train, heldout)
    assert found == model.evaluate(train, heldout) == Personal().fit(train).evaluate(train, heldout)
