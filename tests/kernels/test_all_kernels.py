"""Every kernel as the backend launches it: under the sanitizers, and in reverse order."""

import numpy as np
import pytest
from conftest import emulate

from crnn_np import training
from crnn_np.backends import gpu
from crnn_np.data import cut_tail, from_sequences
from crnn_np.evaluation import evaluate
from crnn_np.model import Spec
from crnn_np.optim import Rule
from crnn_np.windows import Plan

CASES = {
    "gru": (Spec(hidden_size=3, dropout_in=0.2, dropout_out=0.2), Rule(W_in_rows="dense")),
    "tanh": (Spec(hidden_size=5, cell="tanh", sharing="pooled"), Rule()),
    "step by step": (Spec(hidden_size=3, cell="tanh"), Rule(clip=1.0, W_in_rows="dense")),
    "slices": (Spec(hidden_size=30, sharing="pooled"), Rule()),
    "slices, tanh": (Spec(hidden_size=45, cell="tanh", sharing="pooled"), Rule()),
    "mixture": (Spec(hidden_size=3, output="mixture", pointers=2, memory=5, gate_size=2), Rule()),
}
ITEMS = 19  # more than one tile
SHARED = 8000  # bytes of a block, less than the matrices of 30 and 45 units


def results(monkeypatch, case, **options):
    """Bytes of a short training and an evaluation, and the device."""
    emulate(monkeypatch, shared_limit=SHARED, **options)
    spec, rule = CASES[case]
    rng = np.random.default_rng(3)
    log = from_sequences([rng.integers(0, ITEMS, n) for n in (5, 3, 1)], ITEMS)
    train, heldout = cut_tail(log, np.array([1, 1, 0]))
    plan = Plan(batch=2, window=2, epochs=1)
    *_, last = training.epochs(spec, rule, plan, train, backend="cupy")
    found = evaluate(gpu, spec, last.params, train, heldout, n=3)
    blocks = [block.tobytes() for block in (*last.params, *last.accumulators)]
    return blocks, found, gpu.device(spec.dtype)


@pytest.fixture(scope="module")
def plain():
    """The results of each case in lock-step, first thread first."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield {case: results(monkeypatch, case) for case in CASES}


def test_these_cases_launch_every_kernel(plain):
    launched = {name for _, _, device in plain.values() for name in device.launches}
    assert launched == set(plain["gru"][2].kernels)


@pytest.mark.parametrize("case", CASES)
def test_same_bits_in_reverse_order(monkeypatch, plain, case):
    assert results(monkeypatch, case, reverse=True)[:2] == plain[case][:2]


@pytest.mark.parametrize("case", [name for name in CASES if "slices" not in name])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_same_bits_under_a_sanitizer(monkeypatch, plain, case, sanitizer):
    """`test_pooled_cu.py` has the slices, which would take long here."""
    assert results(monkeypatch, case, sanitizer=sanitizer)[:2] == plain[case][:2]
