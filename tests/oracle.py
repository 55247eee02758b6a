"""The model stated a second time, slowly, for the tests: one window, straight from the equations.

Nothing of the package is used here. Every function takes leading axes (`...`) in front of the
shapes below and real or complex numbers, so that `gradient` can hand in one perturbed copy of a
block for each of its elements (complex-step derivative, exact to rounding).

Equation numbers are those of Ko, Maystre and Grossglauser (ACML 2016).
"""

from typing import NamedTuple

import numpy as np

GATES = {"tanh": 1, "gru": 3, "gru-sigmoid": 3}


class Window(NamedTuple):
    """The same fields as the package's window: user [B], all others [T, B]."""

    user: np.ndarray
    x: np.ndarray
    y: np.ndarray
    event: np.ndarray
    target: np.ndarray
    carry: np.ndarray


class Rule(NamedTuple):
    learning_rate: float
    rho: float
    eps: float
    W_in_rows: str = "touched"


class Model:
    """Three arrays and their RMSprop accumulators; `step` changes them in place."""

    def __init__(self, cell, W_h, W_in, W_out, init=0.0):
        self.cell = cell
        self.init = init
        self.weights = [np.array(W, dtype=float) for W in (W_h, W_in, W_out)]
        self.squares = [np.zeros_like(W) for W in self.weights]

    def step(self, rule, s0, window, scale, mask_in=None, mask_out=None):
        """Loss, gradient, update. Returns the loss of each user [B] and the states [T+1, B, D]."""

        def f(W_h, W_in, W_out):
            return losses(self.cell, W_h, W_in, W_out, s0, self.init, window, mask_in, mask_out)

        W_h, W_in, W_out = self.weights
        before = f(W_h, W_in, W_out)
        path = states(self.cell, W_h, W_in, s0, self.init, window, mask_in)
        grads = [scale * gradient(f, self.weights, i) for i in range(3)]
        rows = touched_rows(window, self.weights, rule)
        for W, square, grad, touched in zip(self.weights, self.squares, grads, rows, strict=True):
            rmsprop(rule, W, square, grad, touched)
        return before, path


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def product(h, W):
    return np.einsum("...d,...dk->...k", h, W)


def next_state(cell, h, a, W):
    """h_t from h_{t-1} = `h` [D], the item's row `a` [G*D] and the user's matrix `W` [D, G*D].

    tanh: Eqs. 17 and 18. GRU: Eqs. 21 to 24 with tanh, or the sigmoid of the authors' code, for
    the candidate's g.
    """
    D = h.shape[-1]
    if cell == "tanh":
        return np.tanh(a + product(h, W))
    z = sigmoid(a[..., :D] + product(h, W[..., :D]))
    r = sigmoid(a[..., D : 2 * D] + product(h, W[..., D : 2 * D]))
    g = {"gru": np.tanh, "gru-sigmoid": sigmoid}[cell]
    candidate = g(a[..., 2 * D :] + product(r * h, W[..., 2 * D :]))
    return (1 - z) * h + z * candidate


def states(cell, W_h, W_in, s0, init, window, mask_in=None):
    """All states [..., T+1, B, D]: W_h [U or 1, D, G*D], W_in [I, G*D], s0 [B, D]."""
    T, B = window.x.shape
    columns = []
    for b in range(B):
        u = window.user[b] if W_h.shape[-3] > 1 else 0
        h = s0[..., b, :]
        path = [h]
        for t in range(T):
            if not window.carry[t, b]:
                h = np.full_like(h, init)
            if window.event[t, b]:
                a = W_in[..., window.x[t, b], :]
                if mask_in is not None:
                    a = a * mask_in[t, b]
                h = next_state(cell, h, a, W_h[..., u, :, :])
            path.append(h)
        columns.append(np.stack(np.broadcast_arrays(*path), axis=-2))
    return np.stack(np.broadcast_arrays(*columns), axis=-2)


def log_softmax(W_out, h):
    """log P(. | h) [..., I] (Eqs. 12, 13 and 10)."""
    logits = np.einsum("...id,...d->...i", W_out, h)
    logits = logits - logits.real.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def losses(cell, W_h, W_in, W_out, s0, init, window, mask_in=None, mask_out=None):
    """-sum of log P(y_t | x_1 .. x_t) over the cells of each user that have a target [..., B]."""
    path = states(cell, W_h, W_in, s0, init, window, mask_in)
    T, B = window.x.shape
    total = []
    for b in range(B):
        sum_b = 0
        for t in range(T):
            if window.target[t, b]:
                h = path[..., t + 1, b, :]
                if mask_out is not None:
                    h = h * mask_out[t, b]
                sum_b = sum_b - log_softmax(W_out, h)[..., window.y[t, b]]
        total.append(np.asarray(sum_b))
    return np.stack(np.broadcast_arrays(*total), axis=-1)


def ranks(W_out, H, y):
    """1 + how many other items score at least as high as item y[n] with state H[n]."""
    result = []
    for h, target in zip(H, y, strict=True):
        scores = [sum(w * v for w, v in zip(row, h, strict=True)) for row in W_out]
        worse = [i for i, s in enumerate(scores) if i != target and s >= scores[target]]
        result.append(1 + len(worse))
    return result


def gradient(f, blocks, which, chunk=256):
    """Derivative of sum(f(*blocks)) with respect to blocks[which], element by element."""
    block = np.asarray(blocks[which], dtype=float)
    result = np.empty(block.size)
    for first in range(0, block.size, chunk):
        last = min(first + chunk, block.size)
        copies = np.repeat(block.astype(complex)[None], last - first, axis=0)
        copies.reshape(last - first, -1)[np.arange(last - first), np.arange(first, last)] += 1e-200j
        value = f(*blocks[:which], copies, *blocks[which + 1 :])
        result[first:last] = np.broadcast_to(value.imag.sum(axis=-1), last - first) / 1e-200
    return result.reshape(block.shape)


def touched_rows(window, weights, rule):
    """Rows that an RMSprop step decays and moves, for W_h, W_in and W_out.

    W_h and W_in: those of every event fed in, with or without a target; W_in with the rule
    "dense", and W_out: all.
    """
    W_h, W_in, W_out = weights
    T, B = window.x.shape
    fed = [(t, b) for t in range(T) for b in range(B) if window.event[t, b]]
    users = {int(window.user[b]) if len(W_h) > 1 else 0 for t, b in fed}
    items = {int(window.x[t, b]) for t, b in fed}
    if rule.W_in_rows == "dense":
        items = range(len(W_in))
    return sorted(users), sorted(items), range(len(W_out))


def rmsprop(rule, W, square, grad, rows):
    """ms <- rho ms + (1 - rho) g^2; w <- w - lr g / sqrt(ms + eps), in place, on some rows."""
    for row in rows:
        square[row] = rule.rho * square[row] + (1 - rule.rho) * grad[row] ** 2
        W[row] = W[row] - rule.learning_rate * grad[row] / np.sqrt(square[row] + rule.eps)
