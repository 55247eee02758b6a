"""Products of bfloat16: the fused run against the reference with its factors rounded by hand."""

from types import SimpleNamespace

import numba
import numpy as np
import pytest

from crnn_np import CollaborativeRNN, backends, model, training
from crnn_np.backends import jit, reference
from crnn_np.data import from_sequences
from crnn_np.errors import SettingsError
from crnn_np.evaluation import read_past
from crnn_np.model import Spec
from crnn_np.optim import Rule
from crnn_np.windows import Plan, epoch_slices

can = pytest.mark.skipif(not jit.HALF, reason="this processor cannot multiply bfloat16")

# Of the largest element. Beside rounding in float32 (1e-5), a factor that lies half-way between two
# bfloat16 can fall on either side; measured: 1.3e-4, against 2e-3 for the rounding itself.
LIMIT = 3e-4
RULE = Rule(learning_rate=0.01, eps=1e-2)
SIZES = {  # items, D, steps, columns, lengths
    "one item, unit, step and column": (1, 1, 1, 1, [25]),
    "two items, three units": (2, 3, 4, 2, [30, 17]),
    "an odd last tile": (97, 5, 3, 3, [30, 9, 22]),
    "a tile": (96, 16, 4, 2, [30, 44]),
    "rows left over": (101, 17, 7, 5, [40, 3, 52, 60, 11]),
    "more events than a block": (50, 6, 43, 7, [200] * 7),
    "wide units": (203, 70, 30, 20, [120] * 20),
}


def rounded(x):
    """float64 of the bfloat16 nearest to each float32, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def rounded_output(kind, H, W_out, y):
    """`reference.output` with the factors of its three products in bfloat16."""
    assert kind == "softmax"
    log2_e = np.float32(1 / np.log(2))
    W, n = rounded(W_out), np.arange(y.size)
    logits = rounded(H.astype(np.float32) * log2_e) @ W.T
    shift = logits.max(axis=1, keepdims=True)
    shift = np.where(np.abs(shift) > 60, shift, 0)  # as the fused run: only where there is need
    E = np.exp2(logits - shift)
    S = E.sum(axis=1, keepdims=True)
    loss = np.log(S[:, 0]).sum() + ((shift[:, 0] - logits[n, y]) * np.log(2)).sum()
    dH = rounded(E) @ W / S - W_out[y]
    closed = rounded(E)
    closed[n, y] = rounded(closed[n, y] - S[:, 0])
    return loss, dH, closed.T @ rounded(H / S)


ROUNDED = SimpleNamespace(**vars(reference) | {"output": rounded_output})


def random_log(rng, lengths, n_items):
    return from_sequences([rng.integers(0, n_items, n) for n in lengths], n_items)


def run(backend, spec, plan, log, start, windows=None):
    """Loss, parameters and accumulators after an epoch."""
    params = type(start)(*(block.astype(spec.dtype) for block in start))
    acc = model.new_accumulators(params)
    work = training.workspace(backend, spec, plan, log)
    s = np.zeros((1, plan.batch, spec.hidden_size), spec.dtype)
    part = epoch_slices(plan, log.lengths, 1).part(0, windows)
    loss, _ = training.train_run(
        backend, spec, RULE, plan.scale, params, acc, s, log, part, work, read_past(spec, log)
    )
    return loss, params, acc


def difference(found, expected):
    """Largest over blocks and losses, as a share of the block's largest element."""
    pairs = [(found[0], expected[0])]
    pairs += [(getattr(a, k), getattr(b, k)) for a, b in zip(found[1:], expected[1:], strict=True)
              for k in ("W_h", "W_in", "W_out")]  # fmt: skip
    return max(np.abs(a - b).max() / max(np.abs(b).max(), 1e-3) for a, b in pairs)


@can
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", SIZES)
def test_the_fused_run_rounds_the_factors_and_nothing_else(size, threads):
    n_items, D, T, B, lengths = SIZES[size]
    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("Numba was started with fewer threads")
    spec = Spec(hidden_size=D, dropout_in=0.2, dropout_out=0.2, products="bfloat16")
    plan = Plan(batch=B, window=T, seed=4)
    log = random_log(np.random.default_rng(3), lengths, n_items)
    start = model.initialise(spec, log.n_users, n_items, 1)
    numba.set_num_threads(threads)
    found = run(backends.get("numba"), spec, plan, log, start, windows=3)
    expected = run(ROUNDED, Spec(**vars(spec) | {"products": "full", "dtype": "float64"}),
                   plan, log, start, windows=3)  # fmt: skip
    exact = run(reference, Spec(**vars(spec) | {"products": "full", "dtype": "float64"}),
                plan, log, start, windows=3)  # fmt: skip
    error, rounding = difference(found, expected), difference(found, exact)
    assert error < LIMIT
    assert n_items < 3 or rounding > 5 * error


@can
def test_logits_that_are_too_large_for_the_plain_sums():
    """Logits of about 1e4: every sum of exponentials needs a shift."""
    spec = Spec(hidden_size=4, products="bfloat16")
    plan = Plan(batch=2, window=5, seed=4)
    log = random_log(np.random.default_rng(3), [30, 17], 103)
    start = model.initialise(spec, 2, 103, 1)
    start = start._replace(W_out=start.W_out * 3e4)
    found = run(backends.get("numba"), spec, plan, log, start, windows=1)
    full = Spec(**vars(spec) | {"products": "full", "dtype": "float64"})
    expected = run(ROUNDED, full, plan, log, start, windows=1)
    assert found[0] > 1e4
    assert difference(found, expected) < LIMIT


@can
@pytest.mark.parametrize("output", ["softmax", "mixture"])
def test_it_repeats_and_stays_near_the_full_products(output):
    spec = Spec(hidden_size=16, output=output, memory=9, products="bfloat16")
    plan = Plan(batch=4, window=16, loss_scale="mean")
    log = random_log(np.random.default_rng(3), [90, 70, 80, 20, 33], 120)
    start = model.initialise(spec, 5, 120, 1)
    backend = backends.get("numba")
    one, two = (run(backend, spec, plan, log, start) for _ in range(2))
    full = run(backend, Spec(**vars(spec) | {"products": "full"}), plan, log, start)
    assert one[0] == two[0]
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert one[0] != full[0]
    assert one[0] == pytest.approx(full[0], rel=1e-4)


@can
def test_no_event_and_a_loss_that_is_not_a_number():
    spec = Spec(hidden_size=3, products="bfloat16")
    plan = Plan(batch=2, window=4)
    log = random_log(np.random.default_rng(3), [1, 1, 1], 7)
    start = model.initialise(spec, 3, 7, 1)
    loss, params, _ = run(backends.get("numba"), spec, plan, log, start)
    assert loss == 0
    for a, b in zip(params, start, strict=True):
        np.testing.assert_array_equal(a, b)
    start.W_out[2, 1] = np.nan
    log = random_log(np.random.default_rng(3), [9, 9, 9], 7)
    assert np.isnan(run(backends.get("numba"), spec, plan, log, start)[0])


def small_log():
    return random_log(np.random.default_rng(3), [9, 12], 7)


@pytest.mark.parametrize(("name", "clip"), [("numpy", 0.0), ("cupy", 0.0), ("numba", 1.0)])
def test_only_the_fused_run_has_them(name, clip, monkeypatch):
    monkeypatch.setattr(jit, "HALF", True)
    monkeypatch.setattr(training, "workspace", lambda *_: None)
    with pytest.raises(SettingsError, match="set products to 'full', or the backend to 'numba'"):
        CollaborativeRNN(products="bfloat16", epochs=1, backend=name, clip=clip).fit(small_log())


def test_a_processor_that_cannot(monkeypatch):
    monkeypatch.setattr(jit, "HALF", False)
    with pytest.raises(SettingsError, match=r"this processor .* set products to 'full'"):
        CollaborativeRNN(products="bfloat16", epochs=1).fit(small_log())


def test_not_in_float64():
    with pytest.raises(SettingsError, match="set products to 'full', or dtype to 'float32'"):
        Spec(products="bfloat16", dtype="float64")
