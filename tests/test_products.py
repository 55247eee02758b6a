"""Rounded products: the fused runs against the reference with its factors rounded by hand."""

from types import SimpleNamespace

import numba
import numpy as np
import pytest
from conftest import emulate

from crnn_np import CollaborativeRNN, backends, model, training
from crnn_np.backends import gpu, jit, reference
from crnn_np.data import cut_tail, from_sequences
from crnn_np.errors import SettingsError
from crnn_np.evaluation import evaluate, read_past
from crnn_np.model import Spec
from crnn_np.optim import Rule
from crnn_np.windows import Plan, epoch_slices

can = pytest.mark.skipif(not jit.HALF, reason="this processor cannot multiply bfloat16")
needs_amx = pytest.mark.skipif(not jit.AMX, reason="this processor has no AMX")

# Of a block's norm; measured: 1e-6, against 2e-3 and more for rounding to bfloat16, 1e-5 for TF32.
NEAR = 2e-6
# With many factors some lie half-way between two bfloat16 and fall on either side; measured with
# 5 seeds: 1.1e-4.
HALF_WAY = {"more events than a block": 2e-4, "wide units": 2e-4}
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


def rounded(x, bits=8):
    """float64 of the numbers of so many bits nearest to each float32, ties to even.

    8 are those of bfloat16, 11 those of TF32.
    """
    part, exponent = np.frexp(np.float32(x).astype(np.float64))
    return np.ldexp(np.rint(np.ldexp(part, bits)), exponent - bits)


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


def tf32_output(kind, H, W_out, y):
    """`reference.output` as a GPU has it, by tiles, with the factors of its products in TF32."""
    assert kind == "softmax"
    W, n, tile = rounded(W_out, 11), np.arange(y.size), np.arange(len(W_out)) // gpu.TILE
    logits = rounded(H, 11) @ W.T
    shift = np.maximum.reduceat(logits, np.flatnonzero(np.diff(tile, prepend=-1)), axis=1)
    E = np.exp(logits - shift[:, tile])
    factor = np.exp(shift - shift.max(axis=1, keepdims=True))
    S = (E * factor[:, tile]).sum(axis=1, keepdims=True)
    loss = (np.log(S[:, 0]) + shift.max(axis=1) - logits[n, y]).sum()
    dH = (rounded(E, 11) * factor[:, tile]) @ W / S - W_out[y]
    # G of the target's tile is on the common shift, and so is E there, where S comes off.
    own = tile == tile[y][:, None]
    closed = np.where(own, E * factor[:, tile], E)
    closed[n, y] -= S[:, 0]
    G = H[:, None] / S[:, None] * np.where(own, 1, factor[:, tile])[:, :, None]
    return loss, dH, np.einsum("ni,nid->id", rounded(closed, 11), rounded(G, 11))


TF32 = SimpleNamespace(**vars(reference) | {"output": tf32_output})


def random_log(rng, lengths, n_items):
    return from_sequences([rng.integers(0, n_items, n) for n in lengths], n_items)


def run(backend, spec, plan, log, start, windows=None):
    """Loss, parameters and accumulators after an epoch."""
    params = type(start)(*(block.astype(spec.dtype) for block in start))
    params, acc, past = (
        model.on_device(backend, blocks)
        for blocks in (params, model.new_accumulators(params), read_past(spec, log))
    )
    work = training.workspace(backend, spec, plan, log)
    s = backend.to_device(np.zeros((1, plan.batch, spec.hidden_size), spec.dtype))
    part = epoch_slices(plan, log.lengths, 1).part(0, windows)
    loss, _ = training.train_run(
        backend, spec, RULE, plan.scale, params, acc, s, log, part, work, past
    )
    host = SimpleNamespace(to_device=backend.to_host)
    return loss, model.on_device(host, params), model.on_device(host, acc)


def difference(found, expected):
    """Largest over blocks and losses, as a share of the norm."""
    pairs = [(found[0], expected[0])]
    pairs += [(getattr(a, k), getattr(b, k)) for a, b in zip(found[1:], expected[1:], strict=True)
              for k in ("W_h", "W_in", "W_out")]  # fmt: skip
    return max(np.linalg.norm(a - b) / max(np.linalg.norm(b), 0.1) for a, b in pairs)


@pytest.fixture
def threads(request):
    """So many threads for the kernels, where Numba was started with them."""
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("Numba was started with fewer threads")
    before = numba.get_num_threads()
    numba.set_num_threads(request.param)
    yield request.param
    numba.set_num_threads(before)


@can
@pytest.mark.parametrize("amx", [False, pytest.param(True, marks=needs_amx)])
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("size", SIZES)
def test_the_fused_run_rounds_the_factors_and_nothing_else(size, threads, amx, monkeypatch):
    monkeypatch.setattr(jit, "AMX", amx)
    n_items, D, T, B, lengths = SIZES[size]
    spec = Spec(hidden_size=D, dropout_in=0.2, dropout_out=0.2, products="bfloat16")
    plan = Plan(batch=B, window=T, seed=4)
    log = random_log(np.random.default_rng(3), lengths, n_items)
    start = model.initialise(spec, log.n_users, n_items, 1)
    found = run(backends.get("numba"), spec, plan, log, start, windows=3)
    expected = run(ROUNDED, Spec(**vars(spec) | {"products": "full", "dtype": "float64"}),
                   plan, log, start, windows=3)  # fmt: skip
    exact = run(reference, Spec(**vars(spec) | {"products": "full", "dtype": "float64"}),
                plan, log, start, windows=3)  # fmt: skip
    error, rounding = difference(found, expected), difference(found, exact)
    assert error < HALF_WAY.get(size, NEAR)
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
    assert difference(found, expected) < NEAR


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


@pytest.mark.parametrize(
    ("products", "name", "clip", "advice"),
    [
        ("bfloat16", "numpy", 0.0, "'full', or the backend to 'numba' and clip to 0"),
        ("bfloat16", "cupy", 0.0, "'full' or 'tf32', or the backend to 'numba' and clip to 0"),
        ("bfloat16", "numba", 1.0, "'full', or the backend to 'numba' and clip to 0"),
        ("tf32", "numpy", 0.0, "'full', or the backend to 'cupy' and clip to 0"),
        ("tf32", "numba", 0.0, "'full' or 'bfloat16', or the backend to 'cupy' and clip to 0"),
        ("tf32", "cupy", 1.0, "'full', or the backend to 'cupy' and clip to 0"),
    ],
)
def test_only_a_fused_run_has_them(products, name, clip, advice, monkeypatch):
    monkeypatch.setattr(jit, "HALF", True)
    asked = CollaborativeRNN(products=products, epochs=1, backend=name, clip=clip)
    for wrong in (asked.fit, asked.estimate):
        with pytest.raises(SettingsError, match=f"is '{products}', .* set products to {advice}"):
            wrong(small_log())


def test_a_kernel_that_does_not_give_the_registers_of_amx(monkeypatch):
    monkeypatch.setattr(jit.sys, "platform", "linux")
    monkeypatch.setattr(jit.platform, "machine", lambda: "x86_64")
    for answer in (0, -1):
        kernel = SimpleNamespace(syscall=lambda *numbers, answer=answer: answer)
        monkeypatch.setattr(jit.ctypes, "CDLL", lambda name, kernel=kernel: kernel)
        assert jit._may_use_amx() == (answer == 0)
    monkeypatch.setattr(jit.sys, "platform", "darwin")
    monkeypatch.setattr(jit.ctypes, "CDLL", None)
    assert not jit._may_use_amx()


def test_a_processor_that_cannot(monkeypatch):
    monkeypatch.setattr(jit, "HALF", False)
    with pytest.raises(SettingsError, match=r"this processor .* set products to 'full'"):
        CollaborativeRNN(products="bfloat16", epochs=1).fit(small_log())


@pytest.mark.parametrize("products", ["bfloat16", "tf32"])
def test_not_in_float64(products):
    with pytest.raises(SettingsError, match="set products to 'full', or dtype to 'float32'"):
        Spec(products=products, dtype="float64")


# TF32 on a GPU


@pytest.fixture
def ampere(cupy):
    """The device of `cupy` multiplies TF32."""
    if cupy.device().capability < cupy.AMPERE:
        pytest.skip("this GPU has no TF32")


@pytest.mark.parametrize("size", SIZES)
def test_a_run_on_a_gpu_rounds_the_factors_and_nothing_else(size, monkeypatch):
    emulate(monkeypatch)
    n_items, D, T, B, lengths = SIZES[size]
    spec = Spec(hidden_size=D, dropout_in=0.2, dropout_out=0.2, products="tf32")
    plan = Plan(batch=B, window=T, seed=4)
    log = random_log(np.random.default_rng(3), lengths, n_items)
    start = model.initialise(spec, log.n_users, n_items, 1)
    found = run(gpu, spec, plan, log, start, windows=1)
    full = Spec(**vars(spec) | {"products": "full", "dtype": "float64"})
    error = difference(found, run(TF32, full, plan, log, start, windows=1))
    rounding = difference(found, run(reference, full, plan, log, start, windows=1))
    assert error < NEAR
    assert n_items < 3 or rounding > 5 * error


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("output", ["softmax", "mixture"])
def test_tf32_repeats_and_stays_near_the_full_products(cupy, output):
    """On a device too, whose rounding of the factors is its own."""
    spec = Spec(hidden_size=16, output=output, memory=9, products="tf32")
    plan = Plan(batch=4, window=16, loss_scale="mean")
    log = random_log(np.random.default_rng(3), [90, 70, 80, 20, 33], 120)
    start = model.initialise(spec, 5, 120, 1)
    one, two = (run(cupy, spec, plan, log, start) for _ in range(2))
    full = run(cupy, Spec(**vars(spec) | {"products": "full"}), plan, log, start)
    assert one[0] == two[0]
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert one[0] != full[0]
    assert one[0] == pytest.approx(full[0], rel=1e-4)


@pytest.mark.parametrize(("products", "expected"), [("full", 0), ("tf32", 5)])
def test_only_the_products_of_the_softmax_are_in_tf32(products, expected, monkeypatch):
    """Three of them, two of which go on with a last tile; the mixture's own three are not."""
    emulate(monkeypatch)
    dev, asked = gpu.device("float32"), []
    product = dev.product

    def recorded(a, b, out, beta=0.0, tf32=False):
        asked.append(tf32)
        product(a, b, out, beta, tf32)

    monkeypatch.setattr(dev, "product", recorded)
    spec = Spec(hidden_size=3, output="mixture", memory=9, products=products)
    log = random_log(np.random.default_rng(3), [20, 20], 20)
    start = model.initialise(spec, 2, 20, 1)
    run(gpu, spec, Plan(batch=2, window=9), log, start, windows=1)
    assert (sum(asked), len(asked)) == (expected, 5 + 3)


def test_evaluation_is_not_in_tf32(cupy):
    log = random_log(np.random.default_rng(3), [30, 20, 40], 50)
    parts = cut_tail(log, np.full(3, 5))
    params = model.initialise(Spec(hidden_size=6), 3, 50, 1)
    full, tf32 = (
        evaluate(cupy, Spec(hidden_size=6, products=products), params, *parts)
        for products in ("full", "tf32")
    )
    assert full == tf32


@pytest.mark.usefixtures("ampere")
def test_no_loss_is_negative(cupy):
    """Also where the target has nearly all of the probability, for its logit is rounded too."""
    rng = np.random.default_rng(3)
    W_out = rng.standard_normal((40, 8)).astype(np.float32)
    y = np.arange(40, dtype=np.int32)
    H = 6 * W_out
    exact = (H.astype(float) * W_out).sum(axis=1)
    logits = rounded(H, 11) @ rounded(W_out, 11).T
    assert (np.logaddexp.reduce(logits, axis=1) - exact).min() < -1e-3
    dev = cupy.device("float32")
    H, W_out, y = map(cupy.to_device, (H, W_out, y))
    work = cupy.OutputWork(**cupy._allocate(cupy._output_shapes(40, 40, 8, dev.dtype)))
    loss, dH = dev.xp.zeros(40, np.float64), dev.xp.empty((40, 8), dev.dtype)
    dW_out = dev.xp.empty((40, 8), dev.dtype)
    cupy._softmax(dev, H, W_out, y, 1.0, work, loss, dH, dW_out, tf32=True)
    assert cupy.to_host(loss).min() >= 0
    assert np.isfinite(cupy.to_host(dH)).all()


def test_a_device_that_cannot(monkeypatch):
    emulate(monkeypatch, capability=75)
    settings = {"products": "tf32", "epochs": 1, "backend": "cupy"}
    with pytest.raises(SettingsError, match=r"is 7\.5, expected 8\.0 .* set products to 'full'"):
        CollaborativeRNN(**settings).fit(small_log())
