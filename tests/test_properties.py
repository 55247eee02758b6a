"""What must hold for any window: both backends against the oracle, and against themselves.

Windows are drawn at random with padding anywhere, targets missing anywhere, sequences that begin
in the middle, items and users that occur twice, and garbage in the padding.
"""

import os
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crnn_np import backends, data, model, optim, training, windows

EXACT = 1e-11  # of the largest element: two orders of summation in float64
CLOSE = 1e-10  # the same after divisions by the square root of small accumulators

KINDS = {
    "tanh": {"cell": "tanh"},
    "gru": {"cell": "gru", "candidate": "tanh"},
    "gru-sigmoid": {"cell": "gru", "candidate": "sigmoid"},
}
seeds = st.integers(0, 2**32 - 1)
both_backends = pytest.mark.parametrize("name", ["numpy", "numba"])


def examples(n):
    return settings(
        max_examples=n,
        deadline=None,
        derandomize=bool(os.environ.get("CI")),
    )


class Problem(NamedTuple):
    spec: model.Spec
    params: model.Params
    s0: np.ndarray
    window: windows.Window
    rng: np.random.Generator

    @property
    def shape(self):
        return self.window.x.shape


def draw_window(rng, T, B, n_users, n_items, full=False):
    """With `full`, every cell has an event and a target and no sequence begins inside."""
    chances = [1.0, 0.8, 0.4]
    event = rng.random((T, B)) < (1.0 if full else rng.choice(chances))
    target = event & (rng.random((T, B)) < (1.0 if full else rng.choice(chances)))
    carry = rng.random((T, B)) < (1.0 if full else rng.choice([1.0, 0.7]))
    return windows.Window(
        user=rng.integers(0, n_users, B, dtype=np.int32),
        x=rng.integers(0, n_items, (T, B), dtype=np.int32),
        y=rng.integers(0, n_items, (T, B), dtype=np.int32),
        event=event.astype(float),
        target=target.astype(float),
        carry=carry.astype(float),
    )


@st.composite
def problems(draw, kind=None, sharing=None, dropout=0.0, full=False, steps=(1, 7), columns=(1, 4)):
    D, n_items = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    T, B = draw(st.integers(*steps)), draw(st.integers(*columns))
    n_users = draw(st.integers(1, 6))
    kind = kind or draw(st.sampled_from(sorted(KINDS)))
    spec = model.Spec(
        hidden_size=D,
        sharing=sharing or draw(st.sampled_from(["collaborative", "pooled"])),
        init_state=draw(st.sampled_from([0.0, 0.1, -0.7])),
        dropout_in=dropout,
        dropout_out=dropout,
        dtype="float64",
        **KINDS[kind],
    )
    rng = np.random.default_rng(draw(seeds))
    G = oracle.GATES[kind]
    matrices = n_users if spec.sharing == "collaborative" else 1
    size = rng.choice([0.3, 1.0, 3.0])
    params = model.Params(
        size * rng.standard_normal((matrices, D, G * D)),
        size * rng.standard_normal((n_items, G * D)),
        size * rng.standard_normal((n_items, D)),
    )
    s0 = rng.uniform(-1, 1, (1, B, D))
    return Problem(spec, params, s0, draw_window(rng, T, B, n_users, n_items, full), rng)


def assert_close(ours, expected, limit=EXACT, what=""):
    ours, expected = np.asarray(ours), np.asarray(expected)
    assert ours.shape == expected.shape, what
    size = max(np.max(np.abs(expected), initial=0.0), 1e-2)
    error = np.max(np.abs(ours - expected), initial=0.0) / size
    assert error <= limit, f"{what}: largest relative difference {error:.1e}, limit {limit:.0e}"


def dense(grad, like):
    rows = grad.rows[: grad.count]
    assert len(set(rows.tolist())) == grad.count
    whole = np.zeros_like(like)
    whole[rows] = grad.values[: grad.count]
    return whole


def run(name, problem, window=None, s0=None, key=0, scale=1.0):
    """Loss, gradients (dense) and last state of one window by the package."""
    spec, params = problem.spec, problem.params
    window = problem.window if window is None else window
    s0 = problem.s0 if s0 is None else s0
    loss, grads, ds0, dA, s_T = training.gradients(
        backends.get(name), spec, params, s0, window, key, scale
    )
    return SimpleNamespace(
        loss=loss,
        W_h=dense(grads.W_h, params.W_h),
        W_in=dense(grads.W_in, params.W_in),
        W_out=grads.W_out,
        s0=ds0,
        A=dA,
        s_T=s_T,
        touched=[set(g.rows[: g.count].tolist()) for g in (grads.W_h, grads.W_in)],
    )


def score(name, problem, window=None, y=None):
    """Negative log-likelihood [T, B] of y (or the window's targets) in every cell."""
    backend, spec, params = backends.get(name), problem.spec, problem.params
    window = problem.window if window is None else window
    y = window.y if y is None else y
    A, W_h = model.gather(backend, spec, params, window, 0)
    states, _ = backend.cell_forward(
        spec.cell_kind, problem.s0, spec.init_state, A, W_h, window.event, window.carry
    )
    H = np.ascontiguousarray(states[1:, 0].reshape(-1, spec.hidden_size))
    nll, _ = backend.score(spec.output, H, params.W_out, np.ascontiguousarray(y.ravel()))
    return nll.reshape(y.shape)


def masks(spec, window, key):
    """The package's own dropout masks, or None: what the oracle multiplies in."""
    if not spec.dropout_in:
        return None, None
    D, shape = spec.hidden_size, window.x.shape
    return (
        windows.dropout_keep(
            key, windows.INPUT, *shape, spec.gates * D, spec.dropout_in, spec.dtype
        ),
        windows.dropout_keep(key, windows.OUTPUT, *shape, D, spec.dropout_out, spec.dtype),
    )


def same_results(a, b, blocks=("loss", "W_h", "W_in", "W_out")):
    for block in blocks:
        assert_close(getattr(a, block), getattr(b, block), what=block)


# Loss and gradients


@both_backends
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("sharing", ["collaborative", "pooled"])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_loss_and_gradients_are_the_oracles(name, kind, sharing, dropout):
    @examples(40)
    @given(problems(kind, sharing, dropout), st.integers(0, 2**64 - 1))
    def check(problem, key):
        spec, params, s0, window, _ = problem
        mask_in, mask_out = masks(spec, window, key)
        scale = 0.125
        ours = run(name, problem, key=np.uint64(key), scale=scale)

        def f(W_h, W_in, W_out, s0):
            return oracle.losses(
                kind, W_h, W_in, W_out, s0, spec.init_state, window, mask_in, mask_out
            )

        blocks = [*params, s0[0]]
        assert_close(ours.loss, f(*blocks).sum(), what="loss")
        for i, (block, grad) in enumerate(
            zip(
                ("W_h", "W_in", "W_out", "s0"),
                (ours.W_h, ours.W_in, ours.W_out, ours.s0[0]),
                strict=True,
            )
        ):
            assert_close(grad, scale * oracle.gradient(f, blocks, i), what=block)
        path = oracle.states(kind, *params[:2], s0[0], spec.init_state, window, mask_in)
        assert_close(ours.s_T[0], path[-1], what="s_T")

    check()


@both_backends
@examples(40)
@given(problem=problems())
def test_gradient_of_the_gathered_rows(name, problem):
    """dA [T, B, G*D] is the gradient of W_in if every cell had an item of its own."""
    spec, params, s0, window, _ = problem
    cells = window.x.size
    own = window._replace(x=np.arange(cells, dtype=np.int32).reshape(window.x.shape))
    rows = params.W_in[window.x.ravel()]

    def f(W_in):
        return oracle.losses(
            spec.cell_kind, params.W_h, W_in, params.W_out, s0[0], spec.init_state, own
        )

    expected = oracle.gradient(f, [rows], 0).reshape(*window.x.shape, -1)
    assert_close(run(name, problem).A, expected, what="dA")


@both_backends
@examples(60)
@given(problem=problems())
def test_gradients_have_the_rows_of_every_event_and_no_other(name, problem):
    rows = oracle.touched_rows(problem.window, problem.params, oracle.Rule(0, 0, 0))
    assert run(name, problem).touched == [set(rows[0]), set(rows[1])]


@both_backends
@examples(40)
@given(problem=problems(full=True), item=st.integers(0, 8))
def test_an_item_in_every_cell_sums_its_gradients(name, problem, item):
    x = np.full_like(problem.window.x, min(item, len(problem.params.W_in) - 1))
    ours = run(name, problem, problem.window._replace(x=x))
    assert_close(ours.W_in[x[0, 0]], ours.A.sum(axis=(0, 1)))
    assert np.count_nonzero(np.any(ours.W_in, axis=1)) <= 1


@both_backends
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@examples(40)
@given(
    base=st.sampled_from([0, 60, 80, 88, 89, 95, 120, 700, 710, 800]),
    sign=st.sampled_from([1, -1]),
    where=st.sampled_from(["all", "one", "half"]),
    n_items=st.sampled_from([2, 5, 60]),
    seed=seeds,
)
def test_large_scores(name, dtype, base, sign, where, n_items, seed):
    """Where exp of a score, or the sum over items, overflows or vanishes without a shift."""
    rng = np.random.default_rng(seed)
    N, D = 5, 4
    H = rng.standard_normal((N, D)).astype(dtype)
    W_out = rng.standard_normal((n_items, D)).astype(dtype)
    H[:, 0] = 1
    W_out[{"all": slice(None), "one": 0, "half": slice(0, None, 2)}[where], 0] += sign * base
    y = rng.integers(0, n_items, N, dtype=np.int32)

    def f(H, W_out):
        nll = [-oracle.log_softmax(W_out, H[..., n, :])[..., y[n]] for n in range(N)]
        return np.stack(np.broadcast_arrays(*nll), axis=-1)

    loss, dH, dW_out = backends.get(name).output("softmax", H, W_out, y)
    nll, _ = backends.get(name).score("softmax", H, W_out, y)
    blocks = [H.astype(float), W_out.astype(float)]
    rounding = np.finfo(dtype).eps * 100 * (1 + base)  # of a score
    assert_close(loss, f(*blocks).sum(), N * rounding, "loss")
    assert_close(nll, f(*blocks), rounding, "nll")
    assert_close(dH, oracle.gradient(f, blocks, 0), rounding, "dH")
    assert_close(dW_out, oracle.gradient(f, blocks, 1), rounding, "dW_out")


# Padding, splits, permutations


@both_backends
@examples(60)
@given(problem=problems(), steps=st.integers(0, 3), columns=st.integers(0, 2))
def test_padding_changes_nothing(name, problem, steps, columns):
    spec, params, s0, window, rng = problem
    T, B = problem.shape
    wide = draw_window(rng, T + steps, B + columns, len(params.W_h), len(params.W_in))
    for field in ("event", "target"):
        getattr(wide, field)[:] = 0
        getattr(wide, field)[:T, :B] = getattr(window, field)
    wide.carry[:] = 1
    for field in ("x", "y", "carry"):
        getattr(wide, field)[:T, :B] = getattr(window, field)
    wide.user[:B] = window.user
    more = rng.uniform(-1, 1, (1, columns, spec.hidden_size))
    alone = run(name, problem)
    padded = run(name, problem, wide, np.concatenate([s0, more], axis=1))
    same_results(padded, alone)
    assert padded.touched == alone.touched
    assert_close(padded.s_T[:, :B], alone.s_T)
    assert_close(padded.s_T[:, B:], more)
    assert_close(padded.s0[:, :B], alone.s0)
    assert not padded.s0[:, B:].any()
    assert_close(padded.A[:T, :B], alone.A)
    assert not padded.A[T:].any()
    assert not padded.A[:, B:].any()


def part(window, start, stop):
    cells = (np.ascontiguousarray(f[start:stop]) for f in window[1:6])
    return windows.Window(window.user, *cells)


@both_backends
@examples(60)
@given(problem=problems(steps=(2, 7)), cut=st.integers(1, 6))
def test_a_window_cut_in_two_with_the_state_carried(name, problem, cut):
    cut = min(cut, len(problem.window.x) - 1)
    whole = run(name, problem)
    first = run(name, problem, part(problem.window, 0, cut))
    second = run(name, problem, part(problem.window, cut, None), first.s_T)
    assert_close(first.loss + second.loss, whole.loss, what="loss")
    assert_close(first.W_out + second.W_out, whole.W_out, what="W_out")
    assert_close(second.s_T, whole.s_T, what="s_T")


@both_backends
@examples(60)
@given(problem=problems(steps=(2, 7)), cut=st.integers(1, 6))
def test_a_sequence_that_begins_inside_a_window_is_one_of_its_own(name, problem, cut):
    cut = min(cut, len(problem.window.x) - 1)
    problem.window.carry[cut] = 0
    whole = run(name, problem)
    first = run(name, problem, part(problem.window, 0, cut))
    rest = part(problem.window, cut, None)
    rest.carry[0] = 1
    second = run(name, problem, rest, np.full_like(problem.s0, problem.spec.init_state))
    for block in ("loss", "W_h", "W_in", "W_out"):
        assert_close(getattr(first, block) + getattr(second, block), getattr(whole, block))
    assert_close(first.s0, whole.s0, what="ds0")
    assert_close(second.s_T, whole.s_T, what="s_T")


def column(window, order):
    return windows.Window(
        np.ascontiguousarray(window.user[order]),
        *(np.ascontiguousarray(f[:, order]) for f in window[1:6]),
    )


@both_backends
@examples(60)
@given(problem=problems(columns=(2, 4)))
def test_permuting_the_users_permutes_the_results(name, problem):
    order = problem.rng.permutation(problem.shape[1])
    ours = run(name, problem)
    other = run(name, problem, column(problem.window, order), problem.s0[:, order].copy())
    same_results(other, ours)
    assert_close(other.s_T, ours.s_T[:, order])
    assert_close(other.s0, ours.s0[:, order])
    assert_close(other.A, ours.A[:, order])


@both_backends
@examples(60)
@given(problem=problems(columns=(2, 4)))
def test_a_batch_is_the_sum_of_its_users(name, problem):
    batch = run(name, problem)
    singles = [
        run(name, problem, column(problem.window, [b]), problem.s0[:, [b]].copy())
        for b in range(problem.shape[1])
    ]
    for block in ("loss", "W_h", "W_in", "W_out"):
        assert_close(sum(getattr(s, block) for s in singles), getattr(batch, block), what=block)
    for block in ("s_T", "s0", "A"):
        together = np.concatenate([getattr(s, block) for s in singles], axis=1)
        assert_close(together, getattr(batch, block), what=block)


# Updates


def copies(problem):
    params = model.Params(*(block.copy() for block in problem.params))
    return params, model.new_accumulators(params)


@both_backends
@pytest.mark.parametrize("W_in_rows", ["touched", "dense"])
@examples(60)
@given(problem=problems())
def test_rows_not_touched_are_unchanged_to_the_bit(name, W_in_rows, problem):
    rule = optim.Rule(learning_rate=0.1, rho=0.9, eps=1e-8, W_in_rows=W_in_rows)
    spec, _, s0, window, rng = problem
    params, accumulators = copies(problem)
    for block in accumulators[:3]:
        block += rng.random(block.shape)
    before = [block.copy() for block in (*params, *accumulators[:3])]
    training.step(backends.get(name), spec, rule, params, accumulators, s0, window, 0, 1.0)
    touched = oracle.touched_rows(window, params, oracle.Rule(0, 0, 0))
    for i, rows in enumerate(touched[:2]):
        others = np.setdiff1d(np.arange(len(params[i])), rows)
        np.testing.assert_array_equal(params[i][others], before[i][others])
        np.testing.assert_array_equal(accumulators[i][others], before[i + 3][others])
        if len(rows):
            assert np.all(accumulators[i][list(rows)] != before[i + 3][list(rows)])


@both_backends
@pytest.mark.parametrize("W_in_rows", ["touched", "dense"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_steps_are_the_oracles(name, W_in_rows, dropout):
    """The dense rule of the oracle decays and moves every row of W_in in every step."""

    @examples(60)
    @given(problems(dropout=dropout, columns=(1, 3)))
    def check(problem):
        spec, _, s0, window, rng = problem
        expected_rule = oracle.Rule(learning_rate=0.05, rho=0.8, eps=1e-6, W_in_rows=W_in_rows)
        rule = optim.Rule(**expected_rule._asdict())
        params, accumulators = copies(problem)
        expected = oracle.Model(spec.cell_kind, *params, init=spec.init_state)
        T, B = problem.shape
        for key in range(4):
            loss, events, s_T = training.step(
                backends.get(name), spec, rule, params, accumulators, s0, window, key, 0.5
            )
            cost, path = expected.step(rule, s0[0], window, 0.5, *masks(spec, window, key))
            assert_close(loss, cost.sum(), CLOSE, "loss")
            assert_close(s_T[0], path[-1], CLOSE, "s_T")
            assert events == window.target.sum()
            s0 = s_T
            window = draw_window(rng, T, B, len(params.W_h), len(params.W_in))
        assert_steps(rule, params, accumulators, expected, CLOSE)

    check()


def assert_steps(rule, params, accumulators, expected, limit):
    """Parameters and accumulators, after the decay that the dense rule still owes."""
    squares = [block.copy() for block in accumulators[:3]]
    if rule.W_in_rows == "dense":
        owed = accumulators.step[0] - accumulators.stamp
        squares[1] *= rule.rho ** owed[:, None].astype(float)
    for i, block in enumerate(("W_h", "W_in", "W_out")):
        assert_close(params[i], expected.weights[i], limit, block)
        assert_close(squares[i], expected.squares[i], limit, f"accumulator of {block}")


def read(sequences, T, piece):
    """The window of T steps that a slice names, read event by event."""
    B = len(piece.user)
    x, y = np.zeros((T, B), np.int32), np.zeros((T, B), np.int32)
    event, target, carry = np.zeros((T, B)), np.zeros((T, B)), np.ones((T, B))
    for b in range(B):
        sequence = sequences[piece.user[b]]
        if piece.fresh[b]:
            carry[0, b] = 0
        for t in range(piece.length[b]):
            position = piece.start[b] + t
            x[t, b], event[t, b] = sequence[position], 1
            if position + 1 < len(sequence) and position + 1 >= piece.target_from[b]:
                y[t, b], target[t, b] = sequence[position + 1], 1
    return oracle.Window(piece.user, x, y, event, target, carry)


def train_run(name, spec, rule, plan, params, accumulators, log, run):
    backend = backends.get(name)
    work = None
    if hasattr(backend, "workspace"):
        work = backend.workspace(spec, log.n_items, plan.batch, plan.window)
    s = np.zeros((1, plan.batch, spec.hidden_size), spec.dtype)
    return *training.train_run(
        backend, spec, rule, plan.scale, params, accumulators, s, log, run, work
    ), s


@st.composite
def logs(draw, dropout=0.0):
    problem = draw(problems(dropout=dropout, columns=(1, 3)))
    n_items = len(problem.params.W_in)
    n_users = draw(st.integers(1, 5))
    rng = problem.rng
    if problem.spec.sharing == "collaborative":
        G = problem.spec.gates
        D = problem.spec.hidden_size
        problem = problem._replace(
            params=problem.params._replace(W_h=rng.standard_normal((n_users, D, G * D)))
        )
    sequences = [rng.integers(0, n_items, n) for n in rng.integers(1, 13, n_users)]
    plan = windows.Plan(
        batch=problem.shape[1],
        window=problem.shape[0],
        order=draw(st.sampled_from(["random", "length"])),
        loss_scale=draw(st.sampled_from(["sum", "mean"])),
        seed=draw(st.integers(0, 1000)),
    )
    return problem, sequences, plan


@both_backends
@pytest.mark.parametrize("W_in_rows", ["touched", "dense"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_training_run_is_the_oracles(name, W_in_rows, dropout):
    """An epoch as `train_run` does it, fused or not, against the oracle window by window."""

    @examples(60)
    @given(logs(dropout), st.sampled_from([1.0, 300.0]))
    def check(drawn, size):
        problem, sequences, plan = drawn
        spec = problem.spec
        W_out = size * problem.params.W_out  # at 300 exp overflows without a shift
        problem = problem._replace(params=problem.params._replace(W_out=W_out))
        expected_rule = oracle.Rule(learning_rate=0.05, rho=0.8, eps=1e-6, W_in_rows=W_in_rows)
        rule = optim.Rule(**expected_rule._asdict())
        params, accumulators = copies(problem)
        expected = oracle.Model(spec.cell_kind, *params, init=spec.init_state)
        log = data.from_sequences(sequences, n_items=len(params.W_in))
        pieces = windows.epoch_slices(plan, log.lengths, 1)
        loss, events, s = train_run(name, spec, rule, plan, params, accumulators, log, pieces)
        cost, cells = 0.0, 0
        state = np.zeros((plan.batch, spec.hidden_size))
        for k in range(len(pieces.key)):
            piece = pieces.one(k)
            window = read(sequences, plan.window, piece)
            kept = masks(spec, window, piece.key)
            losses, path = expected.step(rule, state, window, plan.scale, *kept)
            cost, cells, state = cost + losses.sum(), cells + window.target.sum(), path[-1]
        limit = CLOSE * size  # the rounding of a score grows with it
        assert_close(loss, cost, limit, "loss")
        assert events == cells
        assert_close(s[0], state, limit, "state")
        assert_steps(rule, params, accumulators, expected, limit)

    check()


@both_backends
@examples(60)
@given(drawn=logs())
def test_an_epoch_without_learning_costs_what_the_whole_sequences_cost(name, drawn):
    """Slices, the carried state and its reset: each user's sequence as one long window."""
    problem, sequences, plan = drawn
    spec = problem.spec
    rule = optim.Rule(learning_rate=0.0)
    params, accumulators = copies(problem)
    log = data.from_sequences(sequences, n_items=len(params.W_in))
    pieces = windows.epoch_slices(plan, log.lengths, 1)
    loss, events, _ = train_run(name, spec, rule, plan, params, accumulators, log, pieces)
    total = 0.0
    for u, sequence in enumerate(sequences):
        n = len(sequence) - 1
        whole = oracle.Window(
            np.array([u]), sequence[:-1, None], sequence[1:, None], *np.ones((3, n, 1))
        )
        start = np.full((1, spec.hidden_size), spec.init_state)
        total += oracle.losses(spec.cell_kind, *problem.params, start, spec.init_state, whole).sum()
    assert events == sum(len(sequence) - 1 for sequence in sequences)
    assert_close(loss, total, what="loss")


# Scores


@both_backends
@examples(60)
@given(problem=problems(steps=(2, 7)), t=st.integers(0, 5))
def test_later_events_and_other_users_do_not_leak(name, problem, t):
    T, B = problem.shape
    t = min(t, T - 2)
    u = problem.rng.integers(B)
    other = draw_window(problem.rng, T, B, len(problem.params.W_h), len(problem.params.W_in))
    other.user[u] = problem.window.user[u]
    for field in ("x", "y", "event", "carry"):
        getattr(other, field)[: t + 1, u] = getattr(problem.window, field)[: t + 1, u]
    assert_close(score(name, problem, other)[: t + 1, u], score(name, problem)[: t + 1, u])


@both_backends
@examples(60)
@given(problem=problems(), size=st.sampled_from([1.0, 30.0, 1000.0]))
def test_scores_are_a_probability_distribution(name, problem, size):
    params = problem.params._replace(W_out=size * problem.params.W_out)
    problem = problem._replace(params=params)
    total = 0.0
    for item in range(len(params.W_out)):
        total = total + np.exp(-score(name, problem, y=np.full_like(problem.window.y, item)))
    assert_close(total, np.ones(problem.shape), 1e-12)


@both_backends
@examples(60)
@given(problem=problems())
def test_the_loss_is_the_sum_of_the_scores(name, problem):
    nll = score(name, problem)
    assert_close((nll * problem.window.target).sum(), run(name, problem).loss)


@both_backends
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@examples(60)
@given(N=st.integers(0, 9), D=st.integers(1, 5), n_items=st.integers(1, 40), seed=seeds)
def test_rank_counts_ties_against_us(name, dtype, N, D, n_items, seed):
    """Small whole numbers: sums are exact, so equal scores are equal to the bit."""
    rng = np.random.default_rng(seed)
    H = rng.integers(-2, 3, (N, D)).astype(dtype)
    W_out = rng.integers(-2, 3, (n_items, D)).astype(dtype)
    y = rng.integers(0, n_items, N, dtype=np.int32)
    _, rank = backends.get(name).score("softmax", H, W_out, y)
    assert rank.tolist() == oracle.ranks(W_out, H, y)


@both_backends
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@examples(60)
@given(D=st.integers(1, 40), n_items=st.integers(2, 300), seed=seeds)
def test_two_items_with_one_row_tie(name, dtype, D, n_items, seed):
    rng = np.random.default_rng(seed)
    H = rng.standard_normal((6, D)).astype(dtype)
    W_out = rng.standard_normal((n_items, D)).astype(dtype)
    pair = rng.choice(n_items, 2, replace=False)
    W_out[pair[1]] = W_out[pair[0]]
    exact = H.astype(float) @ W_out.T.astype(float)
    lead = exact - exact[:, pair[:1]]
    lead[:, pair] = 0
    near = 1e-5 if dtype == "float32" else 1e-13
    for item in pair:
        y = np.full(6, item, np.int32)
        _, rank = backends.get(name).score("softmax", H, W_out, y)
        assert np.all(rank >= 2 + (lead > near).sum(axis=1))
        assert np.all(rank <= (lead > -near).sum(axis=1))


# Dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dropout_mask(p, dtype):
    T, B, width = 64, 20, 96
    keep = windows.dropout_keep(np.uint64(7), windows.INPUT, T, B, width, p, dtype)
    assert keep.shape == (T, B, width)
    assert keep.dtype == dtype
    kept = keep > 0
    np.testing.assert_allclose(keep[kept], 1 / (1 - p), rtol=1e-6)
    for axes in ((0, 1, 2), (1, 2), (0, 2), (0, 1)):
        rate = kept.mean(axis=axes)
        n = kept.size / rate.size
        assert np.max(np.abs(rate - (1 - p))) < 5 * np.sqrt(p * (1 - p) / n)


def test_dropout_masks_are_unrelated():
    """Between steps, users and units, between the two streams, and from key to key."""
    T, B, width, p = 64, 20, 96, 0.5

    def draw(key, stream=windows.INPUT):
        return windows.dropout_keep(np.uint64(key), stream, T, B, width, p, "float64") - 1

    a = draw(12345)
    pairs = [
        (a[1:], a[:-1]),
        (a[:, 1:], a[:, :-1]),
        (a[..., 1:], a[..., :-1]),
        (a[..., 32:64], a[..., :32]),
        (a, draw(12345, windows.OUTPUT)),
        (a, draw(12346)),
        (a, draw(12344)),
    ]
    keys = windows.window_keys(0, 1, 3)
    pairs += [(draw(keys[0]), draw(keys[1])), (draw(keys[1]), draw(keys[2]))]
    pairs += [(draw(keys[0]), draw(windows.window_keys(0, 2, 1)[0]))]
    pairs += [(draw(keys[0]), draw(windows.window_keys(1, 1, 1)[0]))]
    for one, other in pairs:
        assert abs(np.mean(one * other)) < 5 / np.sqrt(one.size)


def test_every_window_of_every_epoch_has_a_key_of_its_own():
    keys = [windows.window_keys(seed, epoch, 500) for seed in range(4) for epoch in range(1, 6)]
    assert len(np.unique(keys)) == 4 * 5 * 500


@examples(60)
@given(
    problem=problems(dropout=0.5, steps=(5, 7), columns=(2, 4)),
    key=st.integers(0, 2**64 - 2),
)
def test_dropout_depends_on_the_key_and_not_on_the_backend(problem, key):
    spec, (T, B) = problem.spec, problem.shape
    params = model.initialise(spec, B, 9, seed=0)
    sequences = [problem.rng.integers(0, 9, T + 1) for _ in range(B)]
    log = data.from_sequences(sequences, n_items=9)
    plan = windows.Plan(batch=B, window=T)

    def loss(name, key):
        column = np.zeros((1, B), np.int64)
        piece = windows.Slice(
            user=np.arange(B, dtype=np.int32)[None],
            start=column,
            length=np.full((1, B), T, np.int32),
            fresh=np.ones((1, B), bool),
            target_from=column,
            key=np.array([key], np.uint64),
        )
        fresh = model.Params(*(block.copy() for block in params))
        accumulators = model.new_accumulators(fresh)
        return train_run(name, spec, optim.Rule(), plan, fresh, accumulators, log, piece)[0]

    assert_close(loss("numba", key), loss("numpy", key))
    assert loss("numpy", key + 1) != loss("numpy", key)
    assert loss("numba", key + 1) != loss("numba", key)


@both_backends
@examples(10)
@given(problem=problems(dropout=0.4), key=st.integers(0, 2**64 - 1))
def test_the_recurrent_path_is_never_dropped(name, problem, key):
    """Without items at the input, the states are those without dropout."""
    params = problem.params._replace(W_in=np.zeros_like(problem.params.W_in))
    problem = problem._replace(params=params)
    plain = problem._replace(
        spec=model.Spec(**{**vars(problem.spec), "dropout_in": 0.0, "dropout_out": 0.0})
    )
    assert_close(run(name, problem, key=np.uint64(key)).s_T, run(name, plain).s_T)
