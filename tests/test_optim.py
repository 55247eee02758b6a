"""RMSprop against a loop over elements, one step after the other."""

import math

import numpy as np
import pytest

from crnn_np import backends
from crnn_np.model import RowGrad
from crnn_np.optim import Rule, rmsprop, rmsprop_rows

LIMITS = {"float64": 3e-15, "float32": 2e-6}  # measured: 7e-16, 5e-7


def one_element(rule, w, ms, g):
    ms = rule.rho * ms + (1 - rule.rho) * g * g
    return w - rule.learning_rate * g / math.sqrt(ms + rule.eps), ms


def one_step(rule, w, ms, gradients, dense):
    """w, ms: lists of rows of floats; gradients: {row: list of floats}."""
    for row in range(len(w)):
        if row not in gradients and not dense:
            continue
        g = gradients.get(row, [0.0] * len(w[row]))
        pairs = [one_element(rule, *cell) for cell in zip(w[row], ms[row], g, strict=True)]
        w[row], ms[row] = [p[0] for p in pairs], [p[1] for p in pairs]


def make_steps(rng, n_rows, width, count):
    """Gradients of random rows: many or one or none, some rows again and again, some never."""
    for k in range(count):
        size = (3, 1, 0, 5)[k % 4]
        rows = rng.permutation(n_rows - 1)[:size]
        yield rows.astype(np.int32), rng.normal(0, 10.0 ** rng.integers(-4, 2), (size, width))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.6, 0.997])
def test_rows(dtype, dense, rho):
    rule = Rule(learning_rate=0.02, rho=rho, eps=1e-6)
    rng = np.random.default_rng(5)
    n_rows, width, count = 8, 3, 40
    w = rng.standard_normal((n_rows, width)).astype(dtype)
    ms = rng.random((n_rows, width)).astype(dtype)
    expected_w, expected_ms = w.tolist(), ms.tolist()
    stamp = np.zeros(n_rows, np.int64) if dense else None
    last = dict.fromkeys(range(n_rows), 0)
    for step, (rows, g) in enumerate(make_steps(rng, n_rows, width, count), 1):
        g = g.astype(dtype)
        rmsprop_rows(rule, w, ms, stamp, step, rows, g)
        gradients = dict(zip(rows.tolist(), g.tolist(), strict=True))
        one_step(rule, expected_w, expected_ms, gradients, dense)
        last |= dict.fromkeys(rows.tolist(), step)
        owed = [rho ** (step - last[row]) if dense else 1.0 for row in range(n_rows)]
        np.testing.assert_allclose(w, expected_w, rtol=LIMITS[dtype], atol=LIMITS[dtype])
        np.testing.assert_allclose(
            ms * np.array(owed)[:, None], expected_ms, rtol=2 * LIMITS[dtype], atol=1e-30
        )
        if dense:
            assert stamp.tolist() == [last[row] for row in range(n_rows)]
    assert w.dtype == ms.dtype == dtype


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_whole_array(dtype):
    rule = Rule(learning_rate=0.02, rho=0.9, eps=1e-3)
    rng = np.random.default_rng(6)
    w, ms = rng.standard_normal((4, 3)).astype(dtype), np.zeros((4, 3), dtype)
    expected_w, expected_ms = w.tolist(), ms.tolist()
    for _ in range(20):
        g = rng.standard_normal((4, 3)).astype(dtype)
        rmsprop(rule, w, ms, g)
        one_step(rule, expected_w, expected_ms, dict(enumerate(g.tolist())), False)
    np.testing.assert_allclose(w, expected_w, rtol=LIMITS[dtype], atol=LIMITS[dtype])
    np.testing.assert_allclose(ms, expected_ms, rtol=LIMITS[dtype])
    assert w.dtype == ms.dtype == dtype


def test_eps_stands_inside_the_root():
    """ms = 0.5 * 2^2 = 2, and 0.1 * 2 / sqrt(2 + 2) = 0.1."""
    w, ms = np.zeros(1), np.zeros(1)
    rmsprop(Rule(learning_rate=0.1, rho=0.5, eps=2.0), w, ms, np.array([2.0]))
    assert (w[0], ms[0]) == (pytest.approx(-0.1, rel=1e-15), 2.0)


def test_a_gradient_of_zero_moves_nothing():
    w, ms = np.ones(2), np.array([0.0, 4.0])
    rmsprop(Rule(rho=0.5), w, ms, np.zeros(2))
    assert w.tolist() == [1.0, 1.0]
    assert ms.tolist() == [0.0, 2.0]


def test_rows_that_wait_under_the_dense_rule_pay_at_their_next_gradient():
    """Three steps late: ms = 16 * 0.5^3 * 0.5 + 0.5 * 6^2 = 19, not 16 * 0.5 + 18 = 26."""
    rule = Rule(learning_rate=1.0, rho=0.5, eps=6.0)
    for stamp, expected in ((np.zeros(1, np.int64), 19.0), (None, 26.0)):
        w, ms = np.zeros((1, 1)), np.full((1, 1), 16.0)
        rmsprop_rows(rule, w, ms, stamp, 4, np.array([0]), np.array([[6.0]]))
        assert ms[0, 0] == expected
        assert w[0, 0] == pytest.approx(-6.0 / math.sqrt(expected + 6.0), rel=1e-15)


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_update_takes_the_first_count_rows_of_a_gradient(name):
    rule = Rule(learning_rate=0.5, rho=0.0, eps=1.0)
    w, ms = np.zeros((4, 1)), np.zeros((4, 1))
    grad = RowGrad(np.array([2, 1, 3, 0], np.int32), np.array([[1.0], [2.0], [9.0], [9.0]]), 2)
    backends.get(name).update(rule, w, ms, None, 1, grad)
    assert ms.ravel().tolist() == [0.0, 4.0, 1.0, 0.0]
    assert w.ravel() == pytest.approx([0.0, -1 / math.sqrt(5), -0.5 / math.sqrt(2), 0.0])


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_update_of_a_dense_gradient(name):
    rule = Rule(learning_rate=0.5, rho=0.0, eps=1.0)
    w, ms = np.zeros((2, 1)), np.zeros((2, 1))
    backends.get(name).update(rule, w, ms, None, 1, np.array([[1.0], [-2.0]]))
    assert ms.ravel().tolist() == [1.0, 4.0]
    assert w.ravel() == pytest.approx([-0.5 / math.sqrt(2), 1 / math.sqrt(5)])


@pytest.mark.parametrize("name", ["numpy", "numba"])
@pytest.mark.parametrize("stamp", [None, np.zeros(3, np.int64)])
def test_update_without_a_row_changes_nothing(name, stamp):
    w, ms = np.ones((3, 2)), np.ones((3, 2))
    grad = RowGrad(np.zeros(0, np.int32), np.zeros((0, 2)), 0)
    backends.get(name).update(Rule(), w, ms, stamp, 7, grad)
    assert (w == 1).all()
    assert (ms == 1).all()
