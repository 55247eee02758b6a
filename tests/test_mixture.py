"""The mixture output against the oracle, in every backend that has one, and whole trainings."""

import os
from dataclasses import replace
from typing import NamedTuple

import mixture_oracle
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crnn_np
from crnn_np import backends, data, evaluation, history, model, optim, outputs, tallies, training
from crnn_np.windows import Plan

EXACT = 1e-11  # of the largest element: two orders of summation in float64
SINGLE = 2e-5  # the same in float32
ROUNDED = 1e-6  # features and experts are float32

NAMES = tuple(backends.MODULES)
every_backend = pytest.mark.parametrize("name", NAMES)
seeds = st.integers(0, 2**32 - 1)


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=bool(os.environ.get("CI")))


class Problem(NamedTuple):
    """Cells of a log, the positions of their events, and parameters in float64."""

    sequences: list
    counted: list
    past: history.Past
    cells: outputs.Cells
    position: np.ndarray
    H: np.ndarray
    W_out: np.ndarray
    mixture: outputs.Mixture
    memory: int

    @property
    def arguments(self):
        return self.H, self.W_out, self.mixture, self.cells, self.past, self.memory

    @property
    def n_items(self):
        return len(self.W_out)

    def history(self, n):
        """Events of a cell's user up to its own."""
        return self.sequences[self.cells.user[n]][: self.position[n] + 1]

    def single(self):
        """The arguments in float32, as a backend takes them."""
        blocks = (b.astype(np.float32) for b in self.mixture)
        H, W_out = self.H.astype(np.float32), self.W_out.astype(np.float32)
        return H, W_out, outputs.Mixture(*blocks), *self.arguments[3:]


def read(sequences, counted, n_items):
    parts = [s[:n] for s, n in zip(sequences, counted, strict=True)]
    counts = history.count(data.from_sequences(parts, n_items))
    return tallies.past(data.from_sequences(sequences, n_items), counts)


def draw_blocks(rng, spec, n_users, n_items, size=1.0):
    """Blocks of the mixture, large enough to tell one from another."""
    shapes = model.shapes(spec, n_users, n_items)
    return outputs.Mixture(*(rng.normal(0, size, shapes[f]) for f in outputs.Mixture._fields))


def cells_of(sequences, pairs):
    """`Cells` of (user, position of the event before the target) pairs."""
    starts = np.cumsum([0, *map(len, sequences)])
    y = [sequences[u][t + 1] for u, t in pairs]
    user, at = [u for u, _ in pairs], [starts[u] + t for u, t in pairs]
    return outputs.Cells(np.array(y, np.int32), np.array(user, np.int32), np.array(at, np.int64))


def make(seed, n_items=5, pointers=2, memory=6, n_cells=5, size=1.0, longest=14):
    """Sequences in which items and contexts come again; n_items counts one that never occurs."""
    rng = np.random.default_rng(seed)
    lengths = [2, *rng.integers(0, longest + 1, 3)]
    sequences = [rng.integers(0, n_items - 1, n).tolist() for n in lengths]
    counted = [int(rng.integers(0, n + 1)) for n in lengths]
    pairs = [(u, t) for u, s in enumerate(sequences) for t in range(len(s) - 1)]
    pairs = [pairs[i] for i in rng.integers(0, len(pairs), n_cells)]
    D = 3
    spec = model.Spec(
        hidden_size=D, output="mixture", pointers=pointers, memory=memory, gate_size=3
    )
    return Problem(
        sequences,
        counted,
        read(sequences, counted, n_items),
        cells_of(sequences, pairs),
        np.array([t for _, t in pairs], int),
        rng.normal(0, 1, (n_cells, D)),
        rng.normal(0, size, (n_items, D)),
        draw_blocks(rng, spec, len(sequences), n_items, size),
        memory,
    )


problems = st.builds(
    make,
    seeds,
    n_items=st.integers(2, 7),
    pointers=st.integers(1, 3),
    memory=st.sampled_from([1, 2, 3, 6, 40]),
    n_cells=st.integers(1, 5),
    size=st.sampled_from([0.3, 1.0, 3.0]),
)

# float32 loses more digits where larger scores cancel
mild = st.builds(
    make,
    seeds,
    n_items=st.integers(2, 7),
    pointers=st.integers(1, 3),
    memory=st.sampled_from([1, 2, 3, 6, 40]),
    n_cells=st.integers(1, 5),
    size=st.just(0.3),
)


def experts(problem, n):
    """The other users' two distributions after a cell's event, by the oracle."""
    parts = [s[:c] for s, c in zip(problem.sequences, problem.counted, strict=True)]
    user, x = problem.cells.user[n], problem.history(n)[-1]
    return [
        mixture_oracle.bigram(parts, user, x, problem.n_items),
        mixture_oracle.unigram(parts, user, problem.n_items),
    ]


def known_features(problem, n):
    parts = [s[:c] for s, c in zip(problem.sequences, problem.counted, strict=True)]
    items, own = problem.history(n), parts[problem.cells.user[n]]
    times = sum(parts, []).count(items[-1]) - own.count(items[-1])
    return [*mixture_oracle.features(items, times).values()]


def full(problem, n, f=None):
    """The K distributions over all items and their shares in a cell, by the oracle."""
    blocks = problem.mixture
    user = problem.cells.user[n]
    f = problem.past.features[problem.cells.at[n]].astype(float) if f is None else f
    p = mixture_oracle.distributions(
        problem.history(n),
        experts(problem, n),
        problem.H[n],
        problem.W_out,
        blocks.tau,
        blocks.nu[user],
        problem.memory,
    )
    shares = mixture_oracle.gate(
        f, problem.H[n], blocks.gate_in, blocks.gate_out, blocks.gate_user[user]
    )
    return p, shares


def losses(problem):
    """The loss of each cell [..., N] as a function of the blocks, nu and gate_user by cell.

    Features and the experts' probabilities of the target are given, in float32, as a layer has
    them; test_history.py holds them against their definitions.
    """

    def f(H, W_out, tau, nu, gate_in, gate_out, gate_user):
        result = []
        for n, y in enumerate(problem.cells.y):
            at = problem.cells.at[n]
            h, known = H[..., n, :], np.zeros((2, problem.n_items))
            known[:, y] = problem.past.experts[at]
            p = mixture_oracle.distributions(
                problem.history(n),
                known.tolist(),
                h,
                W_out,
                tau,
                nu[..., n, :, :],
                problem.memory,
            )
            features = problem.past.features[at].astype(float)
            shares = mixture_oracle.gate(features, h, gate_in, gate_out, gate_user[..., n, :])
            result.append(-np.log(sum(g * q[y] for g, q in zip(shares, p, strict=True))))
        return np.stack(np.broadcast_arrays(*result), axis=-1)

    return f


BLOCKS = ("H", "W_out", *outputs.Mixture._fields)


def expected(problem):
    """Loss and gradients, in the order of BLOCKS, by the complex step of the oracle."""
    tau, nu, gate_in, gate_out, gate_user = problem.mixture
    user = problem.cells.user
    blocks = [
        problem.H, problem.W_out, tau, nu[user], gate_in, gate_out, gate_user[user],
    ]  # fmt: skip
    f = losses(problem)
    return f(*blocks).sum(), [oracle.gradient(f, blocks, i) for i in range(len(blocks))]


def assert_close(ours, expected, limit=EXACT, what=""):
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape, what
    size = max(np.max(np.abs(expected), initial=0.0), 1e-2)
    error = np.max(np.abs(ours - expected), initial=0.0) / size
    assert error <= limit, f"{what}: largest relative difference {error:.1e}, limit {limit:.0e}"


def moved(backend, arguments):
    """Where the backend computes."""
    *arrays, memory = arguments
    H, W_out, *tuples = arrays
    there = (model.on_device(backend, one) for one in tuples)
    return backend.to_device(H), backend.to_device(W_out), *there, memory


def gradients(name, arguments):
    """Loss and gradients of a backend, in the order of BLOCKS."""
    backend = backends.get(name)
    loss, dH, dW_out, dmixture = backend.mixture(*moved(backend, arguments))
    return loss, [*map(backend.to_host, (dH, dW_out, *dmixture))]


def scores(name, arguments):
    """nll and rank of a backend."""
    backend = backends.get(name)
    return [*map(backend.to_host, backend.mixture_score(*moved(backend, arguments)))]


# Loss and gradients


@every_backend
@examples(12)
@given(problem=problems)
def test_loss_and_gradients_are_the_oracles(name, problem):
    loss, found = gradients(name, problem.arguments)
    wanted_loss, wanted = expected(problem)
    assert_close(loss, wanted_loss, what="loss")
    for block, ours, theirs in zip(BLOCKS, found, wanted, strict=True):
        assert_close(ours, theirs, what=block)


@every_backend
@examples(40)
@given(problem=mild)
def test_loss_and_gradients_in_single_precision(name, problem):
    loss, found = gradients(name, problem.single())
    wanted_loss, wanted = gradients("numpy", problem.arguments)
    assert_close(loss, wanted_loss, SINGLE, "loss")
    for block, ours, theirs in zip(BLOCKS, found, wanted, strict=True):
        assert_close(ours, theirs, SINGLE, block)


@every_backend
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_are_of_the_parameters_type(name, dtype):
    problem = make(0)
    _, found = gradients(name, problem.single() if dtype == "float32" else problem.arguments)
    assert {block: g.dtype.name for block, g in zip(BLOCKS, found, strict=True)} == dict.fromkeys(
        BLOCKS, dtype
    )


@pytest.mark.parametrize("name", [n for n in NAMES if n != "numpy"])
@examples(15)
@given(problem=st.builds(make, seeds, memory=st.integers(1, 64), n_cells=st.just(200),
                         longest=st.just(90)))  # fmt: skip
def test_backends_agree_on_many_cells(name, problem):
    """More cells than are worked on at once; users and events occur many times."""
    loss, found = gradients(name, problem.arguments)
    wanted_loss, wanted = gradients("numpy", problem.arguments)
    assert_close(loss, wanted_loss, what="loss")
    for block, ours, theirs in zip(BLOCKS, found, wanted, strict=True):
        assert_close(ours, theirs, what=block)
    ours = scores(name, problem.arguments)
    theirs = scores("numpy", problem.arguments)
    assert_close(ours[0], theirs[0], what="nll")
    np.testing.assert_array_equal(ours[1], theirs[1])


@every_backend
@examples(40)
@given(problem=problems)
def test_the_loss_from_nothing_but_the_sequences(name, problem):
    """Features and experts by the oracle too, in float64: they are rounded in a `Past`."""
    loss = 0.0
    for n, y in enumerate(problem.cells.y):
        p, shares = full(problem, n, known_features(problem, n))
        loss -= np.log(mixture_oracle.mixed(shares, p)[y])
    found, _ = gradients(name, problem.arguments)
    assert found == pytest.approx(loss, rel=1e-5, abs=1e-5)


@every_backend
@examples(15)
@given(seed=seeds)
def test_large_scores_do_not_overflow(name, seed):
    """At 300 times the size, exp overflows without a shift."""
    problem = make(seed)
    large = problem.mixture._replace(tau=300 * problem.mixture.tau, nu=300 * problem.mixture.nu)
    problem = problem._replace(W_out=300 * problem.W_out, mixture=large)
    loss, found = gradients(name, problem.arguments)
    wanted_loss, wanted = expected(problem)
    assert_close(loss, wanted_loss, 300 * EXACT, "loss")
    for block, ours, theirs in zip(BLOCKS, found, wanted, strict=True):
        assert_close(ours, theirs, 300 * EXACT, block)
    nll, _ = scores(name, problem.arguments)
    assert nll.sum() == pytest.approx(loss, rel=ROUNDED, abs=ROUNDED)


@every_backend
def test_gradients_by_central_differences(name):
    """The oracle's complex step, once, against plain differences of the layer's own loss."""
    problem = make(3, pointers=1, memory=4, n_cells=3)
    rng = np.random.default_rng(0)
    _, found = gradients(name, problem.arguments)
    user = problem.cells.user
    for block, grad in zip(BLOCKS, found, strict=True):
        values = problem.H if block == "H" else problem.W_out
        values = getattr(problem.mixture, block, values)
        direction = rng.normal(size=values.shape)

        def loss(step, block=block, values=values, direction=direction):
            changed = values + step * direction
            moved = (
                problem._replace(mixture=problem.mixture._replace(**{block: changed}))
                if block in outputs.Mixture._fields
                else problem._replace(**{block: changed})
            )
            return gradients(name, moved.arguments)[0]

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        along = direction[user] if block in ("nu", "gate_user") else direction
        assert slope == pytest.approx((grad * along).sum(), rel=1e-6), block


@every_backend
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_cells(name, dtype):
    problem = make(0, n_cells=0)
    arguments = problem.single() if dtype == "float32" else problem.arguments
    loss, found = gradients(name, arguments)
    assert loss == 0
    shapes = [b.shape for b in (problem.H, problem.W_out, *problem.mixture)]
    shapes[3], shapes[6] = (0, *shapes[3][1:]), (0, *shapes[6][1:])
    assert [g.shape for g in found] == shapes
    assert not any(g.any() for g in found)
    nll, rank = scores(name, arguments)
    assert nll.shape == rank.shape == (0,)


@every_backend
@examples(30)
@given(problem=problems)
def test_the_loss_and_the_scores_are_sums_over_cells(name, problem):
    loss, found = gradients(name, problem.arguments)
    nll, rank = scores(name, problem.arguments)
    total, dW_out = 0.0, np.zeros_like(problem.W_out)
    for n in range(len(problem.H)):
        cells = outputs.Cells(*(column[n : n + 1] for column in problem.cells))
        one = problem._replace(H=problem.H[n : n + 1], cells=cells)
        cost, grads = gradients(name, one.arguments)
        assert_close(found[0][n], grads[0][0], what="H")
        assert_close(found[3][n], grads[3][0], what="nu")
        assert_close(found[6][n], grads[6][0], what="gate_user")
        score, place = scores(name, one.arguments)
        assert_close(score, nll[n : n + 1], what="nll")
        assert place[0] == rank[n]
        total, dW_out = total + cost, dW_out + grads[1]
    assert_close(loss, total, what="loss")
    assert_close(found[1], dW_out, what="W_out")


# Distributions, scores and ranks


@every_backend
@examples(40)
@given(problem=problems)
def test_scores_are_the_oracles(name, problem):
    nll, rank = scores(name, problem.arguments)
    assert nll.dtype == np.float64
    assert rank.dtype == np.int32
    for n, y in enumerate(problem.cells.y):
        p, shares = full(problem, n)
        every = mixture_oracle.mixed(shares, p)
        assert nll[n] == pytest.approx(-np.log(every[y]), rel=ROUNDED, abs=ROUNDED)
        assert mixture_oracle.rank(every, y, -1e-7) <= rank[n]
        assert rank[n] <= mixture_oracle.rank(every, y, 3e-6)


@every_backend
@examples(30)
@given(problem=mild)
def test_scores_in_single_precision(name, problem):
    nll, rank = scores(name, problem.single())
    for n, y in enumerate(problem.cells.y):
        every = mixture_oracle.mixed(*full(problem, n)[::-1])
        assert nll[n] == pytest.approx(-np.log(every[y]), rel=SINGLE, abs=SINGLE)
        assert mixture_oracle.rank(every, y, -SINGLE) <= rank[n]
        assert rank[n] <= mixture_oracle.rank(every, y, 2 * SINGLE)


@examples(40)
@given(problem=problems)
def test_each_distribution_is_the_oracles_and_sums_to_one(problem):
    p, shares = outputs.mixture_distributions(*problem.arguments)
    K = 3 + len(problem.mixture.tau)
    assert p.shape == (len(problem.H), K, problem.n_items)
    np.testing.assert_allclose(p.sum(axis=2), 1, rtol=1e-6)
    np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-6)
    for n in range(len(p)):
        wanted, gates = full(problem, n)
        assert_close(p[n], np.array(wanted, float), what="distributions")
        assert_close(shares[n], np.array(gates, float), what="shares")


def with_target(problem, n, item):
    """A cell alone, its target (and all that follows it) replaced in the log; same counts."""
    u, t = int(problem.cells.user[n]), int(problem.position[n])
    sequences = list(problem.sequences)
    sequences[u] = [*problem.sequences[u][: t + 1], item]
    parts = [s[:c] for s, c in zip(problem.sequences, problem.counted, strict=True)]
    counts = history.count(data.from_sequences(parts, problem.n_items))
    past = tallies.past(data.from_sequences(sequences, problem.n_items), counts)
    return problem._replace(
        sequences=sequences, past=past, cells=cells_of(sequences, [(u, t)]),
        position=problem.position[n : n + 1], H=problem.H[n : n + 1],
    )  # fmt: skip


@every_backend
@examples(20)
@given(problem=problems)
def test_probabilities_of_all_items_sum_to_one(name, problem):
    """Each item in turn stands in the log as the target; the loss and the score agree on it."""
    total, ranks, every = 0.0, [], []
    for item in range(problem.n_items):
        one = with_target(problem, 0, item)
        loss, _ = gradients(name, one.arguments)
        nll, rank = scores(name, one.arguments)
        assert nll[0] == pytest.approx(loss, rel=ROUNDED, abs=ROUNDED)
        total += np.exp(-loss)
        every.append(np.exp(-nll[0]))
        ranks.append(int(rank[0]))
    assert total == pytest.approx(1, abs=1e-6)
    assert sum(every) == pytest.approx(1, abs=1e-6)
    for item, rank in enumerate(ranks):
        assert mixture_oracle.rank(every, item, -1e-7) <= rank
        assert rank <= mixture_oracle.rank(every, item, 3e-6)


@every_backend
def test_items_that_occur_nowhere_tie_and_ties_count_against_us(name):
    """Three items that nobody ever met, with one row in W_out, are alike but for the target."""
    rng = np.random.default_rng(1)
    for seed in range(20):
        problem = make(seed, n_items=8, n_cells=4)
        problem = problem._replace(
            sequences=[[x % 5 for x in s] for s in problem.sequences],
        )
        past = read(problem.sequences, problem.counted, 8)
        W_out = problem.W_out
        W_out[5:] = rng.normal(size=3)
        nowhere = [problem._replace(past=past, W_out=W_out)] * 3
        found = [
            scores(name, with_target(p, 0, item).arguments)
            for p, item in zip(nowhere, (5, 6, 7), strict=True)
        ]
        every = mixture_oracle.mixed(*full(with_target(nowhere[0], 0, 5), 0)[::-1])
        above = sum(every[i] > every[5] for i in range(5))
        for nll, rank in found:
            assert nll[0] == pytest.approx(-np.log(every[5]), abs=1e-6)
            assert rank[0] == 3 + above


def test_rows_that_are_equal_tie_in_float32_where_logits_are_large():
    """Of 40 items that nobody met, where the softmax has nearly all of the gate."""
    rng = np.random.default_rng(40)
    problem = make(40, n_items=60, n_cells=20, longest=30)
    problem = problem._replace(sequences=[[x % 20 for x in s] for s in problem.sequences])
    past = read(problem.sequences, problem.counted, 60)
    W_out = 30 * problem.W_out
    W_out[20:] = 30 * rng.normal(size=3)
    gate_out = problem.mixture.gate_out.copy()
    gate_out[-1, 0] += 12
    mixture = problem.mixture._replace(gate_out=gate_out)
    problem = with_target(problem._replace(past=past, W_out=W_out, mixture=mixture), 0, 25)
    assert scores("numba", problem.single())[1] == scores("numpy", problem.arguments)[1]


@every_backend
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_probabilities_summed_in_another_order_tie(name, dtype):
    """A pointer gives item 1 the weights of item 0 in reverse; nothing else tells them apart."""
    rng = np.random.default_rng(2)
    items = [1, 2, 1, 2, 1, 0, 0, 0]  # lags 8, 6, 4 and lags 3, 2, 1: buckets 5, 4, 3 and 2, 1, 0
    spec = model.Spec(hidden_size=2, output="mixture", pointers=1, memory=9, gate_size=3)
    params = model.initialise(replace(spec, dtype=dtype), 1, 4, seed=0)
    H, W_out = np.ones((1, 2), dtype), np.ones((4, 2), dtype)
    for _ in range(30):
        weights = rng.normal(size=3)
        tau = np.empty(params.tau.shape, dtype)
        tau[0] = np.concatenate([weights, weights[::-1]])[:, None]
        for y in (0, 1):
            sequences = [[*items, y]]
            cells, past = cells_of(sequences, [(0, 7)]), read(sequences, [0], 4)
            blocks = params.mixture._replace(tau=tau)
            _, rank = scores(name, (H, W_out, blocks, cells, past, 9))
            assert rank[0] == 2


@every_backend
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("n_items", [3, 40, 300])
def test_a_layer_that_knows_nothing_ranks_a_new_item_last(name, dtype, n_items):
    """All items that the user never met are as likely; the target is one of them."""
    sequences = [[0, 1, 0, n_items - 1]]
    spec = model.Spec(hidden_size=2, output="mixture", memory=4, gate_size=3)
    params = model.initialise(replace(spec, dtype=dtype), 1, n_items, seed=0)
    H, W_out = np.ones((1, 2), dtype), np.zeros((n_items, 2), dtype)
    cells = cells_of(sequences, [(0, 2)])
    past = read(sequences, [3], n_items)
    _, rank = scores(name, (H, W_out, params.mixture, cells, past, 4))
    assert rank[0] == n_items


# Memory


@examples(20)
@given(seed=seeds, pointers=st.integers(1, 3))
def test_a_memory_of_one_points_at_the_present_event(seed, pointers):
    problem = make(seed, memory=1, pointers=pointers)
    p, _ = outputs.mixture_distributions(*problem.arguments)
    for n in range(len(p)):
        for k in range(pointers):
            assert p[n, 3 + k].tolist() == np.eye(problem.n_items)[problem.history(n)[-1]].tolist()


@every_backend
@examples(20)
@given(seed=seeds, longer=st.integers(15, 70))
def test_memory_beyond_the_history_changes_nothing(name, seed, longer):
    problem = make(seed, memory=14)
    n = problem.mixture.tau.shape[1]
    L = max(mixture_oracle.buckets(longer)) + 1
    tau = np.full((2, L, 5), 50.0)
    tau[:, :n] = problem.mixture.tau
    more = problem._replace(mixture=problem.mixture._replace(tau=tau), memory=longer)
    loss, found = gradients(name, problem.arguments)
    other_loss, other = gradients(name, more.arguments)
    assert_close(other_loss, loss, what="loss")
    dtau = other[2]
    assert not dtau[:, n:].any()
    other[2] = dtau[:, :n]
    for block, ours, theirs in zip(BLOCKS, other, found, strict=True):
        assert_close(ours, theirs, what=block)
    (nll, rank), (other_nll, other_rank) = (scores(name, p.arguments) for p in (problem, more))
    assert_close(other_nll, nll)
    np.testing.assert_array_equal(other_rank, rank)


def test_buckets_of_lags():
    assert outputs.lag_buckets(10).tolist() == [0, 1, 2, 3, 3, 4, 4, 5, 5, 5]
    for memory in (1, 2, 3, 64, 1000):
        assert outputs.lag_buckets(memory).tolist() == mixture_oracle.buckets(memory)


def test_matches_by_hand():
    """The item to come follows c, b, a."""
    past = [0, 1, 2, 9, 1, 2, 9, 2, 9, 7, 1, 3, 9, 0, 1, 2]
    codes = [mixture_oracle.match(past, s) for s in range(len(past))]
    NONE, SKIP, ONE, TWO, THREE = range(5)
    wanted = [NONE] * len(past)
    wanted[3], wanted[6], wanted[8] = THREE, TWO, ONE
    wanted[12] = wanted[15] = NONE
    wanted[12] = SKIP
    assert codes == wanted
    _, match, there = outputs.recall(
        read([past], [0], 10),
        outputs.Cells(np.array([0]), np.array([0]), np.array([len(past) - 1])),
        len(past) + 2,
    )
    assert match[0, : len(past)].tolist() == codes[::-1]
    assert there[0].tolist() == [True] * len(past) + [False] * 2


@every_backend
@examples(30)
@given(problem=problems, seed=seeds)
def test_other_users_are_only_seen_through_what_was_counted(name, problem, seed):
    """Another user's events and parameters, and this user's later events, change no score."""
    rng = np.random.default_rng(seed)
    one = with_target(problem, 0, int(problem.cells.y[0]))
    u, t = int(one.cells.user[0]), int(one.position[0])
    parts = [s[:c] for s, c in zip(problem.sequences, problem.counted, strict=True)]
    counts = history.count(data.from_sequences(parts, problem.n_items))
    sequences = [rng.integers(0, problem.n_items, rng.integers(0, 9)).tolist() for _ in parts]
    sequences[u] = one.sequences[u] + sequences[u]
    past = tallies.past(data.from_sequences(sequences, problem.n_items), counts)
    nu, gate_user = rng.normal(size=problem.mixture.nu.shape), problem.mixture.gate_user + 1
    nu[u], gate_user[u] = problem.mixture.nu[u], problem.mixture.gate_user[u]
    other = one._replace(
        past=past,
        cells=cells_of(sequences, [(u, t)]),
        mixture=problem.mixture._replace(nu=nu, gate_user=gate_user),
    )
    ours, theirs = gradients(name, other.arguments), gradients(name, one.arguments)
    assert_close(ours[0], theirs[0])
    for block, a, b in zip(BLOCKS, ours[1], theirs[1], strict=True):
        assert_close(a, b, what=block)
    (nll, rank), (other_nll, other_rank) = (scores(name, p.arguments) for p in (one, other))
    assert_close(other_nll, nll)
    np.testing.assert_array_equal(other_rank, rank)


# Whole models

SPEC = model.Spec(
    hidden_size=3, output="mixture", pointers=2, memory=7, gate_size=3, dtype="float64"
)


def random_parameters(rng, spec, n_users, n_items):
    params = model.initialise(spec, n_users, n_items, seed=1)
    return params._replace(**draw_blocks(rng, spec, n_users, n_items)._asdict())


@pytest.fixture
def events(monkeypatch):
    """Evaluate to (user, nll, rank) of each held-out event, in each user's order."""

    def each(user, first, nll, rank, *_):
        order = np.argsort(user, kind="stable")
        return user[order], nll[order], rank[order]

    monkeypatch.setattr(evaluation, "summarise", each)

    def evaluate(name, params, spec, train, heldout):
        return evaluation.evaluate(backends.get(name), spec, params, train, heldout)

    return evaluate


@every_backend
def test_later_held_out_events_do_not_leak_into_a_score(name, events):
    rng = np.random.default_rng(4)
    n_items = 6
    for _ in range(8):
        train = [rng.integers(0, n_items, n).tolist() for n in (9, 1, 5)]
        heldout = [rng.integers(0, n_items, n).tolist() for n in (6, 4, 5)]
        params = random_parameters(rng, SPEC, 3, n_items)
        logs = [data.from_sequences(s, n_items) for s in (train, heldout)]
        user, nll, rank = events(name, params, SPEC, *logs)
        u = int(rng.integers(3))
        kept = int(rng.integers(len(heldout[u])))
        changed = list(heldout)
        changed[u] = heldout[u][:kept] + [(x + 1) % n_items for x in heldout[u][kept:]]
        log = data.from_sequences(changed, n_items)
        user_, nll_, rank_ = events(name, params, SPEC, logs[0], log)
        np.testing.assert_array_equal(user, user_)
        position = np.concatenate([np.arange(len(h)) for h in heldout])
        same = (user != u) | (position < kept)
        assert_close(nll_[same], nll[same])
        np.testing.assert_array_equal(rank_[same], rank[same])
        assert (nll_[~same] != nll[~same]).all()


@every_backend
def test_the_present_target_does_not_leak_into_its_score(name, events):
    """Put each item in turn in a held-out event's place: the probabilities sum to one."""
    rng = np.random.default_rng(5)
    n_items = 5
    for place in (0, 2, 4):
        train = [rng.integers(0, n_items, n).tolist() for n in (8, 3)]
        heldout = [rng.integers(0, n_items, n).tolist() for n in (5, 3)]
        params = random_parameters(rng, SPEC, 2, n_items)
        total = 0.0
        for item in range(n_items):
            heldout[0][place] = item
            logs = [data.from_sequences(s, n_items) for s in (train, heldout)]
            total += np.exp(-events(name, params, SPEC, *logs)[1][place])
        assert total == pytest.approx(1, abs=1e-6)


@every_backend
def test_evaluation_is_the_oracle_event_by_event(name, events):
    """States by the oracle's cells, everything else from the sequences alone."""
    rng = np.random.default_rng(6)
    n_items = 6
    train = [rng.integers(0, n_items - 1, n).tolist() for n in (7, 2, 4)]
    heldout = [rng.integers(0, n_items, n).tolist() for n in (4, 3, 0)]
    params = random_parameters(rng, SPEC, 3, n_items)
    logs = [data.from_sequences(s, n_items) for s in (train, heldout)]
    _, nll, rank = events(name, params, SPEC, *logs)
    wanted, places = [], []
    for u, (known, later) in enumerate(zip(train, heldout, strict=True)):
        items = known + later
        T = len(items)
        window = oracle.Window(np.array([u]), np.array(items)[:, None], None, *np.ones((3, T, 1)))
        path = oracle.states("gru", params.W_h, params.W_in, np.zeros((1, 3)), 0.0, window)
        for t in range(len(known) - 1, T - 1):
            times = sum(train, []).count(items[t]) - known.count(items[t])
            f = mixture_oracle.features(items[: t + 1], times)
            h = path[t + 1, 0]
            others = [
                mixture_oracle.bigram(train, u, items[t], n_items),
                mixture_oracle.unigram(train, u, n_items),
            ]
            p = mixture_oracle.distributions(
                items[: t + 1], others, h, params.W_out, params.tau, params.nu[u], SPEC.memory
            )
            shares = mixture_oracle.gate(
                [*f.values()], h, params.gate_in, params.gate_out, params.gate_user[u]
            )
            every = mixture_oracle.mixed(shares, p)
            wanted.append(-np.log(every[items[t + 1]]))
            places.append(mixture_oracle.rank(every, items[t + 1], 1e-6))
    np.testing.assert_allclose(nll, wanted, rtol=1e-5, atol=1e-5)
    assert rank.tolist() == places


def tiny_log(seed=0, users=6, n_items=7):
    """Users who go round in circles of their own."""
    rng = np.random.default_rng(seed)
    sequences = []
    for u in range(users):
        circle = rng.permutation(n_items)[:3]
        sequences.append([int(circle[t % 3]) for t in range(12 + u)])
    return data.cut_tail(data.from_sequences(sequences, n_items), np.full(users, 3))


def tiny_model(backend="numpy", **settings):
    defaults = {"hidden_size": 4, "epochs": 3, "batch": 2, "window": 5, "memory": 8}
    defaults |= {"gate_size": 3, "output": "mixture"}
    return crnn_np.CollaborativeRNN(preset=None, backend=backend, **(defaults | settings))


@every_backend
def test_training_lowers_the_loss(name):
    train, heldout = tiny_log()
    fitted = tiny_model(name, epochs=6).fit(train)
    losses = [r.loss for r in fitted.reports]
    assert losses[-1] < losses[0] - 0.2
    assert isinstance(fitted.params, model.MixtureParams)
    assert isinstance(fitted.accumulators, model.MixtureAccumulators)
    before = model.initialise(fitted.settings.spec, train.n_users, train.n_items, 0)
    for block, old, new in zip(before._fields, before, fitted.params, strict=True):
        assert (old != new).any(), block
    untrained = tiny_model(name, epochs=1, learning_rate=0.0).fit(train)
    after, first = (m.evaluate(train, heldout)["nll"] for m in (fitted, untrained))
    assert after < first


@every_backend
def test_save_and_load(name, tmp_path):
    train, heldout = tiny_log()
    fitted = tiny_model(name).fit(train)
    fitted.save(tmp_path / "m")
    loaded = crnn_np.CollaborativeRNN.load(tmp_path / "m")
    assert loaded.settings == fitted.settings
    assert type(loaded.params) is model.MixtureParams
    assert type(loaded.accumulators) is model.MixtureAccumulators
    for ours, theirs in zip(
        (*loaded.params, *loaded.accumulators), (*fitted.params, *fitted.accumulators), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    assert loaded.evaluate(train, heldout) == fitted.evaluate(train, heldout)
    for m in (fitted, loaded):
        m.partial_fit(train)
    for ours, theirs in zip(loaded.params, fitted.params, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_softmax_model_still_loads_as_one(tmp_path):
    train, _ = tiny_log()
    tiny_model(output="softmax", epochs=1).fit(train).save(tmp_path / "m")
    assert type(crnn_np.CollaborativeRNN.load(tmp_path / "m").params) is model.Params


@every_backend
@pytest.mark.parametrize("early", [{}, {"patience": 1}, {"patience": 1, "refit": False}])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_checkpoint_goes_on_to_the_same_bytes(name, early, stop, tmp_path, monkeypatch):
    # Else an epoch is cut into runs by the time they take, and the order of its losses' sum varies.
    monkeypatch.setattr(training, "RUN_SECONDS", 0)
    train, _ = tiny_log()
    settings = {"epochs": 3, "dropout_in": 0.2, "dropout_out": 0.2, **early}
    whole = tiny_model(name, **settings).fit(train)
    file = tmp_path / "c"
    reports = tiny_model(name, **settings).epochs(train, checkpoint=file)
    for _ in range(stop):
        next(reports)
    reports.close()
    resumed = tiny_model(name, **settings).fit(train, checkpoint=file)
    for block, ours, theirs in zip(
        (*resumed.params._fields, *resumed.accumulators._fields),
        (*resumed.params, *resumed.accumulators),
        (*whole.params, *whole.accumulators),
        strict=True,
    ):
        assert ours.tobytes() == theirs.tobytes(), block
    assert [r.loss for r in resumed.reports] == [r.loss for r in whole.reports]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "numpy"])
@pytest.mark.parametrize("W_in_rows", ["touched", "dense"])
@pytest.mark.parametrize("sharing", ["collaborative", "pooled"])
def test_backends_train_alike(name, W_in_rows, sharing):
    train, heldout = tiny_log()
    settings = {
        "dtype": "float64", "W_in_rows": W_in_rows, "sharing": sharing, "eps": 1e-3,
        "dropout_in": 0.2, "dropout_out": 0.2,
    }  # fmt: skip
    ours, theirs = (tiny_model(n, **settings).fit(train) for n in (name, "numpy"))
    for block, a, b in zip(ours.params._fields, ours.params, theirs.params, strict=True):
        assert_close(a, b, 1e-9, block)
    for a, b in zip(ours.reports, theirs.reports, strict=True):
        assert_close(a.loss, b.loss, 1e-9)
    found = [m.evaluate(train, heldout) for m in (ours, theirs)]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


# One step


def a_window(name, seed=0, users=3, n_items=6, n=9):
    """The first window of all but the last user, with random parameters, and what is before."""
    rng = np.random.default_rng(seed)
    log = data.from_sequences([rng.integers(0, n_items, n) for _ in range(users)], n_items)
    params = random_parameters(rng, SPEC, users, n_items)
    plan = Plan(batch=users - 1, window=n)
    lengths = log.lengths.copy()
    lengths[-1] = 0
    piece = crnn_np.windows.epoch_slices(plan, lengths, 1).one(0)
    window = backends.get(name).window(log, piece, "float64")
    backend = backends.get(name)
    s0 = backend.to_device(np.zeros((1, users - 1, SPEC.hidden_size)))
    past = model.on_device(backend, evaluation.read_past(SPEC, log))
    return model.on_device(backend, params), s0, window, past


def blocks_of(backend, grads):
    values = (g.values[: g.count] if isinstance(g, model.RowGrad) else g for g in grads)
    return [*map(backend.to_host, values)]


@every_backend
@pytest.mark.parametrize("share", [0.1, 10.0])
def test_a_step_clips_the_norm_of_all_blocks_together(name, share):
    """As a step with a smaller scale; a limit above the norm changes nothing."""
    params, s0, window, past = a_window(name)
    backend = backends.get(name)
    grads = training.gradients(backend, SPEC, params, s0, window, 0, 1.0, past)[1]
    assert grads._fields == model.MixtureParams._fields
    norm = np.sqrt(sum((block**2).sum() for block in blocks_of(backend, grads)))

    def step(scale, clip):
        fresh = type(params)(*(b.copy() for b in params))
        state = model.new_accumulators(fresh)
        rule = optim.Rule(learning_rate=0.1, rho=0.9, eps=1e-2, clip=clip)
        training.step(backend, SPEC, rule, fresh, state, s0, window, 0, scale, past)
        return blocks_of(backend, fresh)

    clipped, scaled = step(1.0, share * norm), step(min(share, 1.0), 0.0)
    before = blocks_of(backend, params)
    for block, ours, theirs, old in zip(params._fields, clipped, scaled, before, strict=True):
        assert_close(ours, theirs, what=block)
        assert (ours != old).any(), block


@every_backend
def test_a_step_leaves_users_without_an_event_as_they_were(name):
    backend = backends.get(name)
    params, s0, window, past = a_window(name)
    fresh = type(params)(*(b.copy() for b in params))
    state = model.new_accumulators(fresh)
    rule = optim.Rule()
    training.step(backend, SPEC, rule, fresh, state, s0, window, 0, 1.0, past)
    for block in ("nu", "gate_user"):
        old, new, squares = blocks_of(backend, (getattr(x, block) for x in (params, fresh, state)))
        np.testing.assert_array_equal(new[2], old[2])
        assert not squares[2].any()
        assert (new[:2] != old[:2]).any(axis=tuple(range(1, new.ndim))).all()
