"""Training: fused runs against the loop over `step`, early stopping, and what a run leaves."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from crnn_np import backends, model, training
from crnn_np.data import Split, concatenate, cut_tail, from_sequences
from crnn_np.errors import DataError, ModelError, SettingsError, TrainingError
from crnn_np.evaluation import evaluate, read_past
from crnn_np.model import Spec
from crnn_np.optim import Rule
from crnn_np.windows import Plan, epoch_slices

KINDS = {
    "tanh": {"cell": "tanh"},
    "gru": {"cell": "gru"},
    "gru-sigmoid": {"cell": "gru", "candidate": "sigmoid"},
    "mixture": {"output": "mixture", "pointers": 2, "memory": 11, "gate_size": 4},
}
# Largest difference from the reference in float64 after a run, as a share of the block's largest.
EXACT = 1e-11
ROUNDED = 1.5e-5  # float32; measured: 5e-6, in float64 5e-15


def random_log(rng, lengths, n_items):
    return from_sequences([rng.integers(0, n_items, n) for n in lengths], n_items)


def copies(blocks):
    return type(blocks)(*(block.copy() for block in blocks))


def run_epochs(name, spec, rule, plan, log, start, n_epochs=1):
    """Parameters, accumulators, loss, events and last state after some epochs of `train_run`."""
    backend = backends.get(name)
    params = type(start)(*(block.astype(spec.dtype) for block in start))
    acc = model.new_accumulators(params)
    past = read_past(spec, log)
    work = None
    if hasattr(backend, "workspace"):
        work = backend.workspace(spec, log.n_items, plan.batch, plan.window)
    loss, events = 0.0, 0
    for epoch in range(1, n_epochs + 1):
        s = np.zeros((1, plan.batch, spec.hidden_size), spec.dtype)
        run = epoch_slices(plan, log.lengths, epoch)
        part = training.train_run(
            backend, spec, rule, plan.scale, params, acc, s, log, run, work, past
        )
        loss, events = loss + part[0], events + part[1]
    return SimpleNamespace(params=params, acc=acc, loss=loss, events=events, s=s)


def errors(found, expected):
    """Largest difference of each block, as a share of the largest element, or of what is small."""
    blocks = {"s": (found.s, expected.s, 1e-3), "loss": (found.loss, expected.loss, 1.0)}
    for name in expected.params._fields:
        blocks[name] = getattr(found.params, name), getattr(expected.params, name), 1e-3
        squares = getattr(found.acc, name), getattr(expected.acc, name), 1e-9
        blocks[f"accumulator of {name}"] = squares
    shares = {}
    for name, (one, other, small) in blocks.items():
        assert np.shape(one) == np.shape(other), name
        largest = max(np.max(np.abs(other), initial=0.0), small)
        shares[name] = float(np.max(np.abs(one - other), initial=0.0) / largest)
    return shares


def assert_same_run(spec, rule, plan, log, start, limits, n_epochs=1, windows=20):
    """numba in both precisions against the loop over `step` in float64."""
    steps = sum(epoch_slices(plan, log.lengths, e).key.size for e in range(1, n_epochs + 1))
    assert steps >= windows
    expected = None
    for name, dtype, limit in limits:
        own = Spec(**{**vars(spec), "dtype": dtype})
        found = run_epochs(name, own, rule, plan, log, start, n_epochs)
        expected = expected or found
        assert all(np.isfinite(block).all() for block in (*found.params, *found.acc))
        assert found.events == expected.events
        assert found.acc.step.tolist() == [steps]
        np.testing.assert_array_equal(found.acc.stamp, expected.acc.stamp)
        squares = (getattr(found.acc, name) for name in found.params._fields)
        assert {b.dtype.name for b in (*found.params, *squares)} == {dtype}
        for block, error in errors(found, expected).items():
            assert error <= limit, f"{name} {dtype} {block}: {error:.1e}, limit {limit:.0e}"


def both(rounded=ROUNDED):
    return [("numpy", "float64", 0.0), ("numba", "float64", EXACT), ("numba", "float32", rounded)]


# Fused runs


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("W_in_rows", ["touched", "dense"])
@pytest.mark.parametrize("sharing", ["collaborative", "pooled"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fused_run_is_the_loop_over_steps(kind, sharing, W_in_rows, dropout):
    spec = Spec(
        hidden_size=5,
        sharing=sharing,
        init_state=0.2,
        dropout_in=dropout,
        dropout_out=dropout,
        **KINDS[kind],
    )
    rule = Rule(W_in_rows=W_in_rows)
    plan = Plan(batch=3, window=4, order="length", loss_scale="mean", seed=4)
    log = random_log(np.random.default_rng(3), [1, 4, 0, 9, 25, 12, 17, 30, 2], 60)
    start = model.initialise(spec, log.n_users, log.n_items, 1)
    assert_same_run(spec, rule, plan, log, start, both(), n_epochs=2)


SIZES = {  # items, D, steps, columns, lengths
    "one item": (1, 3, 4, 2, [30, 90]),
    "one item, unit, step and column": (1, 1, 1, 1, [25]),
    "two items, windows of one step": (2, 2, 1, 1, [12, 15]),
    "one unit": (30, 1, 3, 2, [30, 40, 20]),
    "more columns than users": (20, 4, 3, 9, [60, 7, 33, 64]),
    "one user": (20, 4, 3, 1, [70]),
    "sequences of one event": (20, 4, 3, 1, [1] * 25),
    "sequences as long as a window": (20, 4, 5, 2, [5] * 50),
    "a tile of items less one": (95, 4, 2, 2, [30, 44, 3]),
    "a tile of items": (96, 4, 2, 2, [30, 44, 3]),
    "a tile of items and one": (97, 4, 2, 2, [30, 44, 3]),
    "many tiles": (1025, 17, 2, 3, [30, 44, 3]),
    "as many events as a block": (90, 5, 16, 8, [400] * 8),
    "one event more": (90, 5, 43, 3, [900] * 3),
    "blocks and a remainder": (70, 4, 37, 20, [700] * 20),
    "four vectors of units, then two": (101, 100, 5, 3, [100] * 3),
    "wide units": (50, 65, 60, 9, [1200] * 9),
}


@pytest.mark.parametrize("output", ["softmax", "mixture"])
@pytest.mark.parametrize("case", SIZES)
def test_a_fused_run_of_odd_sizes(case, output):
    n_items, D, T, B, lengths = SIZES[case]
    spec = Spec(hidden_size=D, output=output, memory=9)
    rule = Rule(learning_rate=0.005, rho=0.9, eps=1e-2)
    plan = Plan(batch=B, window=T)
    log = random_log(np.random.default_rng(7), lengths, n_items)
    start = model.initialise(spec, log.n_users, n_items, 1)
    # with one item all distributions are alike and the gate's gradient is what rounding leaves
    limits = both(1e-4 if (n_items, output) == (1, "mixture") else ROUNDED)
    assert_same_run(spec, rule, plan, log, start, limits, windows=18)


@pytest.mark.parametrize("size", [20, 60, 120, 1e3, 1e4])
def test_a_fused_run_with_large_logits(size):
    """With sums of exponentials that overflow or vanish where nothing is taken off the logits."""
    spec = Spec(hidden_size=4, cell="tanh", init_state=0.5)
    rule = Rule(learning_rate=0.01, rho=0.9, eps=1e-2)
    plan = Plan(batch=2, window=6, loss_scale="mean")
    log = random_log(np.random.default_rng(8), [60, 50, 44, 20], 70)
    start = model.initialise(spec, log.n_users, log.n_items, 1)
    start = start._replace(W_in=3 * start.W_in)
    H = np.tanh(start.W_in)
    start = start._replace(W_out=start.W_out * size / np.abs(H @ start.W_out.T).max())
    limits = [("numpy", "float64", 0.0), ("numba", "float64", EXACT)]
    assert_same_run(spec, rule, plan, log, start, limits, windows=15)
    single = run_epochs("numba", spec, rule, plan, log, start)
    expected = run_epochs(
        "numpy", Spec(**{**vars(spec), "dtype": "float64"}), rule, plan, log, start
    )
    assert all(np.isfinite(block).all() for block in (*single.params, *single.acc))
    assert single.loss == pytest.approx(expected.loss, rel=1.5e-7)  # measured: 5e-8


@pytest.mark.parametrize("shift", [-1e4, -80, -30, 30, 80, 1e4])
def test_logits_that_are_all_large_or_all_small(shift):
    """The probabilities are those without the shift."""
    spec = Spec(hidden_size=2, cell="tanh", sharing="pooled", init_state=0.5, dtype="float64")
    rule = Rule(learning_rate=0.0)
    plan = Plan(batch=2, window=6)
    log = random_log(np.random.default_rng(8), [30, 25], 50)
    start = model.initialise(spec, 2, 50, 1)
    W_in, W_out = start.W_in.copy(), start.W_out.copy()
    W_in[:, 0] = 50  # the first unit is 1
    start = start._replace(W_in=W_in, W_h=np.zeros_like(start.W_h), W_out=W_out)
    plain = run_epochs("numpy", spec, rule, plan, log, start)
    W_out[:, 0] += shift
    for name in ("numpy", "numba"):
        for dtype, limit in (("float64", 4e-17), ("float32", 1e-8)):  # measured: a quarter
            own = Spec(**{**vars(spec), "dtype": dtype})
            found = run_epochs(name, own, rule, plan, log, start)
            assert found.loss == pytest.approx(plain.loss, rel=limit * max(15, abs(shift)))


@pytest.mark.parametrize("name", backends.MODULES)
def test_a_run_in_parts_gives_the_same_bytes(name, monkeypatch):
    """How many windows go between two calls of `progress` depends on the clock."""
    log = random_log(np.random.default_rng(1), [40, 33, 25, 14, 2], 30)
    spec, rule = Spec(hidden_size=4, dropout_in=0.2), Rule()
    plan = Plan(batch=2, window=3, epochs=2, order="length")
    digests = set()
    for seconds in (0.0, 1e9):
        monkeypatch.setattr(training, "RUN_SECONDS", seconds)
        last = list(training.epochs(spec, rule, plan, log, backend=name))[-1]
        digests.add(digest(last))
    assert len(digests) == 1


# Epochs


def digest(report):
    return b"".join(block.tobytes() for block in (*report.params, *report.accumulators))


LOG = random_log(np.random.default_rng(2), [30, 9, 14, 1, 22, 3], 12)
SPEC = Spec(hidden_size=3)
RULE = Rule(learning_rate=0.05, rho=0.9, eps=1e-4)
PLAN = Plan(batch=2, window=8, loss_scale="mean", validation_range=(2, 4))


def train(plan=PLAN, log=LOG, spec=SPEC, rule=RULE, backend="numpy", **options):
    return list(training.epochs(spec, rule, plan, log, backend=backend, **options))


def with_(plan=PLAN, **changes):
    return Plan(**{**vars(plan), **changes})


@pytest.mark.parametrize("backend", backends.MODULES)
def test_the_same_seed_gives_the_same_bytes(backend):
    log = random_log(np.random.default_rng(1), [70, 33, 25, 64, 2], 120)
    spec = Spec(hidden_size=8, dropout_in=0.2, dropout_out=0.2)
    plan = Plan(batch=3, window=8, epochs=2, seed=1)
    runs = [
        digest(train(p, log, spec, backend=backend)[-1])
        for p in (plan, plan, plan, with_(plan, seed=2))
    ]
    assert runs[0] == runs[1] == runs[2] != runs[3]


def test_reports():
    reports = train(with_(epochs=3))
    assert [r.phase for r in reports] == ["train"] * 3
    assert [(r.epoch, r.epochs) for r in reports] == [(1, 3), (2, 3), (3, 3)]
    assert {r.events for r in reports} == {29 + 8 + 13 + 0 + 21 + 2}
    assert {(r.validation, r.best_epoch) for r in reports} == {(None, None)}
    assert all(r.seconds > 0 for r in reports)
    assert reports[0].params is reports[2].params
    assert reports[2].loss < reports[0].loss


def test_the_loss_is_the_mean_in_nats_whatever_the_scale():
    """Weights of zero give every item the same probability."""
    zeros = model.Params(*(0 * block for block in model.initialise(SPEC, 6, 12, 0)))
    still = Rule(learning_rate=0.0)
    for scale in ("sum", "mean"):
        reports = train(with_(epochs=1, loss_scale=scale), rule=still, params=copies(zeros))
        assert reports[0].loss == pytest.approx(math.log(12), rel=1e-6)


@pytest.mark.parametrize("backend", backends.MODULES)
def test_training_learns_what_follows_what(backend):
    """Users count up or down in a ring of 5 items; alone the item does not tell which."""
    ring = [np.arange(60) * (1 if u % 2 else 4) % 5 for u in range(6)]
    spec = Spec(hidden_size=8)
    rule = Rule(learning_rate=0.02, rho=0.9, eps=1e-4)
    plan = Plan(batch=2, window=16, epochs=30, loss_scale="mean")
    reports = train(plan, from_sequences(ring), spec, rule, backend)
    assert reports[0].loss > 0.5
    assert reports[-1].loss < 0.1


@pytest.mark.parametrize("patience", [0, 2])
def test_a_log_without_a_pair_of_events(patience):
    with pytest.raises(DataError, match="no user has two training events"):
        train(with_(patience=patience), from_sequences([[1], [0], []], 3))


def test_progress():
    calls = []
    train(with_(epochs=1), progress=lambda *args: calls.append(args))
    done, totals, losses = zip(*calls, strict=True)
    assert set(totals) == {73}
    assert list(done) == sorted(set(done))
    assert done[-1] == 73
    report = train(with_(epochs=1))[0]
    assert losses[-1] / 73 == pytest.approx(report.loss)


@pytest.mark.parametrize("backend", backends.MODULES)
@pytest.mark.parametrize("W_in_rows", ["touched", "dense"])
def test_going_on_gives_the_same_bytes_as_training_straight_through(backend, W_in_rows):
    spec = Spec(hidden_size=3, dropout_in=0.3, dropout_out=0.3)
    rule = Rule(learning_rate=0.05, W_in_rows=W_in_rows)
    straight = train(with_(epochs=5), spec=spec, rule=rule, backend=backend)[-1]
    last = train(with_(epochs=2), spec=spec, rule=rule, backend=backend)[-1]
    params, acc = copies(last.params), copies(last.accumulators)
    more = train(
        with_(epochs=3),
        spec=spec,
        rule=rule,
        backend=backend,
        params=params,
        accumulators=acc,
        first_epoch=3,
    )
    assert [(r.epoch, r.epochs) for r in more] == [(3, 5), (4, 5), (5, 5)]
    assert more[-1].params is params
    assert digest(more[-1]) == digest(straight)


@pytest.mark.parametrize("backend", backends.MODULES)
@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (
            model.initialise(SPEC, 6, 11, 0),
            r"W_in of params is float32 \(11, 9\), expected float32",
        ),
        (model.initialise(Spec(hidden_size=2), 6, 12, 0), r"expected float32 \(6, 3, 9\) with"),
        (model.initialise(Spec(hidden_size=3, dtype="float64"), 6, 12, 0), "W_h .* is float64"),
        (model.initialise(SPEC, 6, 12, 0)._replace(W_out=np.zeros((3, 12), "f4").T), "is a view"),
        (model.initialise(SPEC, 6, 12, 0)._replace(W_out=[[0.0]]), "W_out of params is None None"),
    ],
)
def test_parameters_of_another_training(backend, wrong, told):
    with pytest.raises(ModelError, match=told):
        train(backend=backend, params=wrong)


def test_accumulators_of_another_training():
    params = model.initialise(SPEC, 6, 12, 0)
    short = model.new_accumulators(params)._replace(stamp=np.zeros(11, np.int64))
    with pytest.raises(ModelError, match=r"stamp of accumulators is int64 \(11,\), expected"):
        train(params=params, accumulators=short)


@pytest.mark.parametrize("backend", backends.MODULES)
def test_a_log_whose_numbers_do_not_fit(backend):
    for bad in (
        LOG._replace(item_ids=LOG.item_ids[:5]),
        LOG._replace(items=np.where(LOG.items == LOG.items[3], -1, LOG.items).astype(np.int32)),
        LOG._replace(indptr=LOG.indptr[::-1].copy()),
    ):
        with pytest.raises(DataError, match="the log's numbers do not fit each other"):
            train(backend=backend, log=bad)
        with pytest.raises(DataError, match="the log's numbers do not fit each other"):
            train(backend=backend, validation=bad)


def test_what_is_no_log():
    for given in (None, [[0, 1, 2]], Split(LOG, LOG)):
        with pytest.raises(DataError, match=f"a {type(given).__name__} came, an EventLog was"):
            train(log=given)


def test_going_on_without_accumulators_starts_new_ones():
    params = model.initialise(SPEC, 6, 12, PLAN.seed)
    assert digest(train(with_(epochs=1), params=params)[-1]) == digest(train(with_(epochs=1))[-1])


# Early stopping


def script(monkeypatch, values, seen=None):
    """Stands in for the evaluation: these errors, one after the other."""
    values = iter(values)

    def scripted(module, spec, params, part, heldout):
        if seen is not None:
            seen.append((copies(params), part, heldout))
        return {"nll": next(values)}

    monkeypatch.setattr(training, "evaluate", scripted)


@pytest.mark.parametrize(
    ("patience", "nlls", "best"),
    [
        (1, [5, 4, 3, 3.5], 3),
        (1, [5, 6], 1),
        (2, [5, 6, 4, 4, 4.1], 3),
        (3, [5, 4, 4.5, 3.9, 4, 4, 4], 4),
        (2, [5, float("nan"), 4, float("nan"), float("inf")], 3),
        (3, [5, 4, 3, 2, 1, 0.9, 0.8, 0.7], 8),
        (9, [5, 4, 6, 6, 6, 6, 6, 6], 2),
    ],
)
@pytest.mark.parametrize("refit", [True, False])
def test_patience(monkeypatch, patience, nlls, best, refit):
    """The best epoch is the first with the lowest error; 8 epochs at most."""
    script(monkeypatch, nlls)
    reports = train(with_(epochs=8, patience=patience, refit=refit))
    chosen = [r for r in reports if r.phase == "choose"]
    assert [r.epoch for r in chosen] == list(range(1, len(nlls) + 1))
    assert {r.epochs for r in chosen} == {8}
    for report, nll in zip(chosen, nlls, strict=True):
        assert repr(report.validation) == repr({"nll": nll})
        earlier = [v for v in nlls[: report.epoch] if not math.isnan(v)]
        assert report.best_epoch == nlls.index(min(earlier)) + 1
    rest = reports[len(nlls) :]
    assert {(r.phase, r.best_epoch) for r in rest} == {("refit" if refit else "keep", best)}
    assert [r.epoch for r in rest] == (list(range(1, best + 1)) if refit else [best])
    if refit:
        assert {r.epochs for r in rest} == {best}
        assert {r.validation for r in rest} == {None}
    else:
        assert rest[0].validation == {"nll": nlls[best - 1]}


@pytest.mark.parametrize("backend", backends.MODULES)
@pytest.mark.parametrize("given", [True, False])
def test_refit_trains_anew_on_the_whole(monkeypatch, backend, given):
    script(monkeypatch, [5, 4, 3, 6, 6])
    split = cut_tail(LOG, [2, 0, 3, 0, 5, 1])
    options = {"log": split.train, "validation": split.heldout} if given else {}
    reports = train(with_(epochs=9, patience=2), backend=backend, **options)
    straight = train(with_(epochs=3), backend=backend)
    assert digest(reports[-1]) == digest(straight[-1])
    assert [r.loss for r in reports[5:]] == [r.loss for r in straight]


@pytest.mark.parametrize("backend", backends.MODULES)
@pytest.mark.parametrize("given", [True, False])
def test_without_refit_the_best_epoch_is_kept(monkeypatch, backend, given):
    seen = []
    script(monkeypatch, [5, 4, 3, 6, 6], seen)
    lengths = [2, 0, 3, 0, 5, 1] if given else training.validation_lengths(PLAN, LOG.lengths)
    split = cut_tail(LOG, lengths)
    options = {"log": split.train, "validation": split.heldout} if given else {}
    reports = train(with_(epochs=9, patience=2, refit=False), backend=backend, **options)
    straight = train(with_(epochs=3), split.train, backend=backend)
    assert len(reports) == 6
    assert digest(reports[-1]) == digest(straight[-1])
    for kept, then in zip(reports[-1].params, seen[2][0], strict=True):
        np.testing.assert_array_equal(kept, backends.get(backend).to_host(then))
    assert reports[-1].validation == {"nll": 3}


@pytest.mark.parametrize("given", [True, False])
def test_the_validation_error_is_that_of_the_epoch(given):
    """Of the parameters as they then are, on each user's last events."""
    lengths = np.array([4, 2, 3, 0, 2, 1]) if given else np.array([2, 2, 2, 0, 2, 2])
    split = cut_tail(LOG, lengths)
    options = {"log": split.train, "validation": split.heldout} if given else {}
    plan = with_(epochs=3, patience=3, refit=False)
    module = backends.get("numpy")
    found = []
    log = options.pop("log", LOG)
    for report in training.epochs(SPEC, RULE, plan, log, backend="numpy", **options):
        if report.phase == "choose":
            assert report.validation == evaluate(module, SPEC, report.params, *split)
            assert report.validation["events"] == lengths.sum()
            found.append(report.validation["nll"])
    assert len(set(found)) == 3
    assert report.phase == "keep"
    assert report.epoch == np.argmin(found) + 1


@pytest.mark.parametrize("given", [True, False])
def test_no_gradient_comes_from_the_validation_part(monkeypatch, given):
    lengths = [5, 2, 3, 0, 4, 1]
    split = cut_tail(LOG, lengths)
    poison = split.heldout._replace(items=11 - split.heldout.items)
    assert (poison.items != split.heldout.items).any()
    kept = []
    for heldout in (split.heldout, poison):
        script(monkeypatch, [5, 4, 6])
        plan = with_(epochs=9, patience=1, refit=False)
        if given:
            reports = train(plan, split.train, validation=heldout)
        else:
            monkeypatch.setattr(training, "validation_lengths", lambda *_: np.array(lengths))
            reports = train(plan, concatenate(split.train, heldout))
        kept.append([digest(reports[-1]), *(r.loss for r in reports)])
    assert kept[0] == kept[1]


def test_lengths_of_the_validation_part():
    """0.025 / 0.975 of the training part, 3 to 500 events, and at least one event stays."""
    plan = Plan()
    expected = {0: 0, 1: 0, 2: 1, 3: 2, 4: 3, 5: 3, 136: 3, 137: 4, 195: 5, 1950: 50, 40_000: 500}
    found = training.validation_lengths(plan, np.array(list(expected)))
    assert found.dtype == np.int64
    assert found.tolist() == list(expected.values())
    own = Plan(validation_fraction=0.25, validation_range=(1, 7))
    found = training.validation_lengths(own, np.array([0, 1, 2, 3, 9, 30]))
    assert found.tolist() == [0, 0, 1, 1, 3, 7]


@pytest.mark.parametrize("fraction", [0.025, 0.1, 0.3])
def test_the_validation_part_is_as_long_as_the_held_out_part(fraction):
    whole = np.arange(20, 5000, 7)
    heldout = np.clip(np.rint(fraction * whole), 3, 500).astype(int)
    plan = Plan(validation_fraction=fraction)
    found = training.validation_lengths(plan, whole - heldout)
    uncut = heldout < 500
    assert np.abs(found - heldout)[uncut].max() <= 1
    assert (found == heldout).mean() > 0.9


def test_early_stopping_takes_no_parameters():
    params = model.initialise(SPEC, 6, 12, 3)
    with pytest.raises(SettingsError, match="patience is 1"):
        train(with_(epochs=2, patience=1), params=params)


# Checkpoints


def same_but_for_seconds(one, other):
    """The reports of two trainings, without what a break may change."""
    return [
        [r._replace(seconds=0, params=None, accumulators=None) for r in reports]
        for reports in (one, other)
    ]


@pytest.mark.parametrize("backend", backends.MODULES)
@pytest.mark.parametrize("changes", [{}, {"patience": 2}, {"patience": 2, "refit": False}])
def test_a_training_stopped_anywhere_goes_on_to_the_same_bytes(
    tmp_path, monkeypatch, backend, changes
):
    nlls = [5, 4, 6, 4.5]

    def begin(checkpoint, skip=0):
        script(monkeypatch, nlls[skip:])
        spec = Spec(hidden_size=3, dropout_in=0.2)
        rule = Rule(learning_rate=0.05, rho=0.9, eps=1e-4, W_in_rows="dense")
        plan = with_(epochs=4, **changes)
        return training.epochs(spec, rule, plan, LOG, backend=backend, checkpoint=checkpoint)

    straight = list(begin(None))
    for stop in range(1, len(straight) + 1):
        file = tmp_path / f"{stop}"
        broken = begin(file)
        for _ in range(stop):
            next(broken)
        broken.close()
        resumed = list(begin(file, skip=stop))
        one, other = same_but_for_seconds(straight, resumed)
        assert one == other
        assert digest(resumed[-1]) == digest(straight[-1])


def test_a_checkpoint_goes_on_to_more_epochs(tmp_path):
    file = tmp_path / "c"
    train(with_(epochs=2), checkpoint=file)
    more = train(with_(epochs=3), checkpoint=file)
    assert [(r.epoch, r.epochs) for r in more] == [(1, 3), (2, 3), (3, 3)]
    assert digest(more[-1]) == digest(train(with_(epochs=3))[-1])
    with pytest.raises(SettingsError, match=r"ends at 2 and .*/c has 3 of them: ask for as many"):
        train(with_(epochs=2), checkpoint=file)


@pytest.mark.parametrize(
    "change",
    [
        {"plan": with_(epochs=2, seed=5)},
        {"rule": Rule()},
        {"spec": Spec(hidden_size=3, cell="tanh")},
        {"backend": "numba"},
        {"log": LOG._replace(items=11 - LOG.items)},
        {"log": LOG._replace(item_ids=np.append(LOG.item_ids, "more"))},
        {"first_epoch": 2},
    ],
)
def test_a_checkpoint_of_another_training(tmp_path, change):
    file = tmp_path / "c"
    train(with_(epochs=2), checkpoint=file)
    before = file.read_bytes()
    with pytest.raises(ModelError, match="is no checkpoint of a training with these settings"):
        train(**{"plan": with_(epochs=2), "checkpoint": file} | change)
    assert file.read_bytes() == before


def test_what_is_no_checkpoint(tmp_path):
    file = tmp_path / "c"
    file.write_text("nothing")
    with pytest.raises(ModelError, match="not a safetensors file"):
        train(with_(epochs=2), checkpoint=file)
    with pytest.raises(ModelError, match="could not be written"):
        train(with_(epochs=2), checkpoint=tmp_path / "nowhere" / "c")


def test_a_checkpoint_takes_no_other_file(tmp_path):
    (tmp_path / "c.best").write_text("precious")
    plan = with_(epochs=2, patience=1, refit=False)
    with pytest.raises(ModelError, match="c.best: not a safetensors file"):
        train(plan, checkpoint=tmp_path / "c")
    train(with_(epochs=2, patience=1), checkpoint=tmp_path / "c")
    assert (tmp_path / "c.best").read_text() == "precious"
    report = train(with_(epochs=1))[-1]
    ids = LOG.user_ids, LOG.item_ids
    model.save(tmp_path / "d.best", report.params, report.accumulators, {}, *ids)
    with pytest.raises(ModelError, match="d.best is a model, and the checkpoint's second file"):
        train(plan, checkpoint=tmp_path / "d")
    plan = with_(epochs=2, patience=2, refit=False)
    next(training.epochs(SPEC, RULE, plan, LOG, backend="numpy", checkpoint=tmp_path / "e"))
    (tmp_path / "e").unlink(missing_ok=True)
    assert (tmp_path / "e.best").is_file()
    assert digest(train(plan, checkpoint=tmp_path / "e")[-1]) == digest(train(plan)[-1])


def test_checkpoints_begin_anew(tmp_path):
    params = model.initialise(SPEC, 6, 12, 3)
    with pytest.raises(SettingsError, match="is a checkpoint and parameters to go on from"):
        train(params=params, checkpoint=tmp_path / "c")


def test_early_stopping_begins_with_the_first_epoch():
    with pytest.raises(SettingsError, match="first_epoch is 3 and patience is 2"):
        train(with_(patience=2), first_epoch=3)


# Divergence


def test_parameters_that_the_last_window_spoils(monkeypatch):
    def spoil(backend, spec, rule, plan, params, *_):
        params.W_out[-1, -1] = np.nan
        return 1.0, 1

    monkeypatch.setattr(training, "_train_epoch", spoil)
    with pytest.raises(TrainingError, match="W_out is infinite or NaN somewhere after epoch 1"):
        train(with_(epochs=2))


@pytest.mark.parametrize("backend", backends.MODULES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "mixture"])
def test_far_too_large_steps_stay_finite(backend, dtype, kind):
    """States are bounded and the softmax is safe, so that huge weights only give a large loss."""
    spec = Spec(hidden_size=3, dtype=dtype, **KINDS[kind])
    rule = Rule(learning_rate=10.0, rho=1.0, eps=1e-14)  # 1e8 times the gradient
    report = train(with_(epochs=10), spec=spec, rule=rule, backend=backend)[-1]
    assert max(np.abs(block).max() for block in report.params) > 1e6
    assert all(np.isfinite(block).all() for block in (*report.params, *report.accumulators))
    assert 1e5 < report.loss < 1e10


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_far_too_large_steps_of_a_mixture_are_an_error(backend):
    """Where all that knows the next item has lost its share, its probability is 0."""
    spec = Spec(hidden_size=3, dtype="float64", **KINDS["mixture"])
    rule = Rule(learning_rate=10.0, rho=1.0, eps=1e-14)
    with np.errstate(all="ignore"), pytest.raises(TrainingError, match="lower learning_rate"):
        train(with_(epochs=10), spec=spec, rule=rule, backend=backend)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("backend", backends.MODULES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("patience", [0, 2])
def test_divergence_is_an_error_that_leaves_nothing_behind(
    temporary, monkeypatch, backend, dtype, patience
):
    """Weights so large that scores overflow."""

    def enormous(*args):
        params = model.initialise(*args)
        return params._replace(W_out=np.copysign(np.finfo(dtype).max, params.W_out))

    monkeypatch.setattr(training, "initialise", enormous)
    spec = Spec(hidden_size=3, init_state=0.5, dtype=dtype)
    plan = with_(epochs=9, patience=patience, refit=False)
    with np.errstate(all="ignore"), pytest.raises(TrainingError) as caught:
        train(plan, spec=spec, backend=backend)
    assert str(caught.value).startswith("epoch 1, windows 1 to 4: the loss is ")
    assert str(caught.value).endswith("expected; lower learning_rate or set clip")
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_validation_error_that_is_never_finite(temporary, monkeypatch, value):
    script(monkeypatch, [value] * 9)
    with pytest.raises(TrainingError, match=f"validation error was {value}"):
        train(with_(epochs=9, patience=3))
    assert not list(temporary.iterdir())


def test_the_kept_parameters_are_on_disk_and_go(temporary, monkeypatch):
    script(monkeypatch, [5, 4, 6, 6])
    plan = with_(epochs=4, patience=9, refit=False)
    seen = []
    for report in training.epochs(SPEC, RULE, plan, LOG, backend="numpy"):
        seen.append((report.phase, len(list(temporary.rglob("best")))))
    assert seen == [("choose", 1)] * 4 + [("keep", 1)]
    assert not list(temporary.iterdir())


def test_a_loop_that_is_left_early_leaves_nothing_behind(temporary, monkeypatch):
    script(monkeypatch, [5, 4, 6, 6])
    plan = with_(epochs=4, patience=9, refit=False)
    reports = training.epochs(SPEC, RULE, plan, LOG, backend="numpy")
    next(reports)
    assert list(temporary.iterdir())
    reports.close()
    assert not list(temporary.iterdir())


# Clipping


def gradient_norms(acc, rho):
    """Norm of each block of the first step's gradient: the accumulators are (1 - rho) g^2."""
    return [math.sqrt(block.sum(dtype=float) / (1 - rho)) for block in acc[:3]]


def one_step(clip, backend="numpy", dtype="float64"):
    spec = Spec(hidden_size=3, dtype=dtype)
    rule = Rule(rho=0.5, clip=clip)
    plan = with_(epochs=1, batch=6, window=40, loss_scale="sum")
    report = train(plan, spec=spec, rule=rule, backend=backend)[-1]
    assert report.accumulators.step.tolist() == [1]
    return report.accumulators


@pytest.mark.parametrize("backend", backends.MODULES)
@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-12), ("float32", 1e-6)])
def test_clipping_scales_all_blocks_to_a_common_norm(backend, dtype, limit):
    free = gradient_norms(one_step(0.0, "numpy", dtype), 0.5)
    norm = math.hypot(*free)
    for clip in (norm / 10, norm * 0.999):
        clipped = one_step(clip, backend, dtype)
        assert {block.dtype.name for block in clipped[:3]} == {dtype}
        blocks = gradient_norms(clipped, 0.5)
        assert math.hypot(*blocks) == pytest.approx(clip, rel=limit)
        for found, before in zip(blocks, free, strict=True):
            assert found == pytest.approx(before * clip / norm, rel=limit)


@pytest.mark.parametrize("clip", [1.001, 1e3, float("inf")])
def test_a_smaller_gradient_is_not_clipped(clip):
    free = one_step(0.0)
    norm = math.hypot(*gradient_norms(free, 0.5))
    for one, other in zip(one_step(clip * norm), free, strict=True):
        np.testing.assert_array_equal(one, other)


def test_clipping_goes_through_step(monkeypatch):
    jit = backends.get("numba")

    def fused(*_):
        raise AssertionError("the fused run knows no clipping")

    monkeypatch.setattr(jit, "train_run", fused)
    rule = Rule(learning_rate=0.01, rho=0.9, eps=1e-4, clip=0.05)
    spec = Spec(hidden_size=3, dtype="float64", dropout_in=0.2)
    start = model.initialise(spec, LOG.n_users, LOG.n_items, 1)
    limits = [("numpy", "float64", 0.0), ("numba", "float64", EXACT)]
    assert_same_run(spec, rule, with_(window=2), LOG, start, limits, windows=20)
    with pytest.raises(AssertionError, match="knows no clipping"):
        run_epochs("numba", spec, RULE, PLAN, LOG, start)
