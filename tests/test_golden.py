"""Twenty training steps of the authors' own TensorFlow code (float32), replayed.

`data/authors_trace.npz` holds made-up sequences of 7 users over 23 items, what was fed in at each
step and what came out. First the oracle is held against it, so that a failure of the package
further down can't be a mistake in the mapping.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest

from crnn_np import backends, data, model, optim, training, windows

STEPS = 20
COST, PARAMETER = 1e-4, 1e-5
ACCUMULATOR = 2e-5  # of the block's largest, which is 5e-7 to 4e-5


def on_our_equations(gates, candidate, negate):
    """Columns r, z | candidate to z, r, candidate; their z is our 1 - z, so its weights negate."""
    D = candidate.shape[-1]
    r, z = gates[..., :D], gates[..., D:]
    return np.concatenate([-z if negate else z, r, candidate], axis=-1)


def parameters(trace, when, suffix=""):
    """W_h, W_in and W_out, or (suffix "_rms") their accumulators, in our layout."""
    negate = suffix == ""
    part = {
        name: trace[f"{when}_{name}{suffix}"]
        for name in (
            "gates_users",
            "gates_items",
            "candidate_users",
            "candidate_items",
            "output_weights",
        )
    }
    return (
        on_our_equations(part["gates_users"], part["candidate_users"], negate),
        on_our_equations(part["gates_items"], part["candidate_items"], negate),
        part["output_weights"].T,
    )


def read_step(trace, k):
    """What step k is fed: the padding id 0 is never an event and never a target."""
    item = trace[f"step{k:02d}_item"]
    target = trace[f"step{k:02d}_target"]
    window = oracle.Window(
        user=np.ascontiguousarray(trace[f"step{k:02d}_user"][:, 0]),
        x=np.ascontiguousarray(item.T),
        y=np.ascontiguousarray(target.T),
        event=np.ascontiguousarray((item != 0).T).astype(float),
        target=np.ascontiguousarray((target != 0).T).astype(float),
        carry=np.ones(item.T.shape),
    )
    return SimpleNamespace(
        window=window,
        s0=trace[f"step{k:02d}_state_in"],
        s_T=trace[f"step{k:02d}_state_out"],
        length=trace[f"step{k:02d}_length"],
        cost=trace[f"step{k:02d}_cost"],
    )


@pytest.fixture(scope="module")
def trace():
    with np.load(Path(__file__).parent / "data" / "authors_trace.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def settings(trace):
    return SimpleNamespace(
        rule=oracle.Rule(
            learning_rate=float(trace["learning_rate"]),
            rho=float(trace["rho"]),
            eps=float(trace["epsilon"]),
        ),
        scale=1.0 / float(trace["batch_size"] * trace["window"]),
    )


def assert_close(ours, theirs, limit, what):
    error = np.max(np.abs(np.asarray(ours, dtype=float) - theirs), initial=0.0)
    assert error < limit, f"{what}: largest difference {error:.1e}, limit {limit:.0e}"


def assert_parameters(trace, when, weights, squares):
    names = "W_h", "W_in", "W_out"
    for name, ours, theirs in zip(names, weights, parameters(trace, when), strict=True):
        assert_close(ours, theirs, PARAMETER, f"{name} {when}")
    for name, ours, theirs in zip(names, squares, parameters(trace, when, "_rms"), strict=True):
        limit = ACCUMULATOR * np.max(theirs)
        assert_close(ours, theirs, limit, f"accumulator of {name} {when}")


def test_the_trace_covers_the_cases_that_matter(trace):
    steps = [read_step(trace, k) for k in range(STEPS)]
    assert int(trace["num_steps"]) == STEPS
    windows = [step.window for step in steps]
    assert any((w.event.sum(axis=0) == 0).any() for w in windows)  # a padded user
    assert any(((w.event == 1) & (w.target == 0)).any() for w in windows)  # a last event
    assert any((step.s0 != 0).any() for step in steps)  # a carried state
    assert any(len(np.unique(w.x[w.event == 1])) < w.event.sum() for w in windows)


def test_oracle(trace, settings):
    model = oracle.Model("gru-sigmoid", *parameters(trace, "initial"))
    for k in range(STEPS):
        step = read_step(trace, k)
        cost, path = model.step(settings.rule, step.s0, step.window, settings.scale)
        assert_close(cost, step.cost, COST, f"cost of step {k}")
        for b, length in enumerate(step.length):
            assert_close(path[length, b], step.s_T[b], PARAMETER, f"state after step {k}")
        if k == 5:
            assert_parameters(trace, "after06", model.weights, model.squares)
    assert_parameters(trace, "final", model.weights, model.squares)


def cost_per_user(backend, spec, params, s0, window):
    """Summed loss of each user [B], from the functions of one window that evaluation uses."""
    A, W_h = model.gather(backend, spec, params, window, 0)
    states, _ = backend.cell_forward(
        spec.cell_kind, s0, spec.init_state, A, W_h, window.event, window.carry
    )
    cost = np.zeros(len(window.user))
    for b in range(len(cost)):
        cells = window.target[:, b] == 1
        H = np.ascontiguousarray(states[1:, 0, b][cells])
        nll, _ = backend.score(spec.output, H, params.W_out, window.y[:, b][cells])
        cost[b] = nll.sum()
    return cost


def package(trace, settings, dtype):
    """Settings, parameters and accumulators of the package before the first step."""
    spec = model.Spec(
        hidden_size=int(trace["hidden_size"]), cell="gru", candidate="sigmoid", dtype=dtype
    )
    params = model.Params(
        *(np.ascontiguousarray(W, dtype=dtype) for W in parameters(trace, "initial"))
    )
    rule = optim.Rule(**settings.rule._asdict())
    return spec, rule, params, model.new_accumulators(params)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_training_step(trace, settings, name, dtype):
    backend = backends.get(name)
    spec, rule, params, accumulators = package(trace, settings, dtype)
    for k in range(STEPS):
        step = read_step(trace, k)
        window = windows.Window(*step.window)
        window = window._replace(
            event=window.event.astype(dtype),
            target=window.target.astype(dtype),
            carry=window.carry.astype(dtype),
        )
        s0 = step.s0[None].astype(dtype)
        cost = cost_per_user(backend, spec, params, s0, window)
        assert_close(cost, step.cost, COST, f"cost of step {k}, user by user")
        loss, events, s_T = training.step(
            backend, spec, rule, params, accumulators, s0, window, 0, settings.scale
        )
        assert_close(loss, step.cost.sum(dtype=float), COST, f"cost of step {k}")
        assert events == window.target.sum()
        for b in np.flatnonzero(step.length == len(window.x)):
            assert_close(s_T[0, b], step.s_T[b], PARAMETER, f"state after step {k}")
        if k == 5:
            assert_parameters(trace, "after06", params, accumulators[:3])
    assert_parameters(trace, "final", params, accumulators[:3])


def read_run(trace):
    """The twenty steps as slices of a log: each user's sequence, and where each step reads it."""
    n_users, n_items = int(trace["num_users"]) + 1, int(trace["num_items"]) + 1
    sequences = [[] for _ in range(n_users)]
    pieces = []
    for k in range(STEPS):
        step = read_step(trace, k)
        length = step.window.event.sum(axis=0).astype(np.int32)
        fresh = ~step.s0.any(axis=1)
        start = np.zeros(len(length), np.int64)
        for b, u in enumerate(step.window.user):
            if fresh[b]:
                sequences[u] = []
            start[b] = len(sequences[u])
            sequences[u].extend(step.window.x[: length[b], b])
        first = np.zeros(len(length), np.int64)
        pieces.append(windows.Slice(step.window.user, start, length, fresh, first, np.uint64(k)))
    run = windows.Slice(*(np.stack(field) for field in zip(*pieces, strict=True)))
    return data.from_sequences(sequences, n_items), run


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_training_run(trace, settings, name, dtype):
    """The same through `train_run`, which a backend may fuse: steps 0 to 5 and 6 to 19."""
    backend = backends.get(name)
    spec, rule, params, accumulators = package(trace, settings, dtype)
    log, run = read_run(trace)
    batch, window = int(trace["batch_size"]), int(trace["window"])
    work = None
    if hasattr(backend, "workspace"):
        work = backend.workspace(spec, log.n_items, batch, window)
    s = np.zeros((1, batch, spec.hidden_size), dtype)
    for begin, end, when in ((0, 6, "after06"), (6, STEPS, "final")):
        part = run.part(begin, end)
        loss, events = training.train_run(
            backend, spec, rule, settings.scale, params, accumulators, s, log, part, work
        )
        steps = [read_step(trace, k) for k in range(begin, end)]
        cost = sum(step.cost.sum(dtype=float) for step in steps)
        assert_close(loss, cost, COST * len(steps), f"cost of steps {begin} to {end - 1}")
        assert events == sum(step.window.target.sum() for step in steps)
        assert_parameters(trace, when, params, accumulators[:3])
