"""The recurrent cells of the paper, forward directly followed by backward (Section 2.2-2.4).

Every function works on one window: T steps of B users side by side, states of D units.

    h_prev_t = carry_t * states[t] + (1 - carry_t) * init
    states[t + 1] = event_t * cell(h_prev_t, A_t) + (1 - event_t) * h_prev_t

so a cell with ``event = 0`` (padding) holds its state and ``carry = 0`` starts a new sequence.
Products are written on rows, ``h @ W_h[u]``; the columns of ``W_h`` and ``A`` are z, r, candidate.
The functions accept complex arrays, which the complex-step derivative of the gradient check needs.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Cell(NamedTuple):
    """A recurrent cell: number of gates G, and its two passes."""

    gates: int
    forward: Callable
    backward: Callable


def sigmoid(x: Array) -> Array:
    """Logistic function, stable for any x and analytic in complex x."""
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def _times(h: Array, W_h: Array) -> Array:
    """h[B, D] times W_h[B or 1, D, K], each user with their own matrix: [B, K]."""
    return np.matmul(h[:, None, :], W_h)[:, 0, :]


def _add_outer(dW_h: Array, h: Array, da: Array) -> None:
    """Add h_b (outer) da_b to dW_h[b], or their sum over b where W_h is shared."""
    outer = h[:, :, None] * da[:, None, :]
    dW_h += outer if dW_h.shape[0] == outer.shape[0] else outer.sum(axis=0, keepdims=True)


def _new_states(s0: Array, A: Array, W_h: Array) -> Array:
    states = np.empty((A.shape[0] + 1, *s0.shape), np.result_type(s0, A, W_h))
    states[0] = s0
    return states


def tanh_forward(
    s0: Array, init: float, A: Array, W_h: Array, event: Array, carry: Array
) -> tuple[Array, Array]:
    """Elman cell, Eqs. 14-15 and 17-18: h_t = tanh(A_t + h_prev_t W_h).

    Parameters
    ----------
    s0 : real[1, B, D]
        State before the window.
    init : float
        Every unit of a new sequence's state (epsilon in Algorithm 1).
    A : real[T, B, D]
        Input activations, W_in[x] with dropout applied.
    W_h : real[B or 1, D, D]
    event, carry : real[T, B]

    Returns
    -------
    states : real[T + 1, 1, B, D]
    cache : real[T, B, 0]
        Nothing: the backward pass needs the states only.
    """
    states = _new_states(s0, A, W_h)
    for t in range(A.shape[0]):
        e, c = event[t, :, None], carry[t, :, None]
        h_prev = c * states[t, 0] + (1 - c) * init
        h = np.tanh(A[t] + _times(h_prev, W_h))
        states[t + 1, 0] = e * h + (1 - e) * h_prev
    return states, np.empty((*A.shape[:2], 0), states.dtype)


def tanh_backward(
    dH: Array, states: Array, cache: Array, init: float, W_h: Array, event: Array, carry: Array
) -> tuple[Array, Array, Array]:
    """Back-propagation through time of `tanh_forward`, Appendix A (Eqs. 31-37).

    Parameters
    ----------
    dH : real[T, B, D]
        Gradient of the loss with respect to the states after each step, from the output layer.

    Returns
    -------
    ds0 : real[1, B, D]
    dA : real[T, B, D]
    dW_h : real[B or 1, D, D]
    """
    dA = np.zeros_like(dH)
    dW_h = np.zeros_like(W_h)
    ds = np.zeros_like(dH[0])
    W_T = W_h.transpose(0, 2, 1)
    for t in range(dH.shape[0] - 1, -1, -1):
        e, c = event[t, :, None], carry[t, :, None]
        h_prev = c * states[t, 0] + (1 - c) * init
        h = states[t + 1, 0]
        dh = dH[t] + ds
        dA[t] = e * dh * (1 - h * h)
        _add_outer(dW_h, h_prev, dA[t])
        ds = c * ((1 - e) * dh + _times(dA[t], W_T))
    return ds[None], dA, dW_h


def _gru_forward(candidate: Callable):
    def forward(
        s0: Array, init: float, A: Array, W_h: Array, event: Array, carry: Array
    ) -> tuple[Array, Array]:
        """Gated recurrent unit, Eqs. 21-24, the reset gate before the product.

        Shapes as in `tanh_forward` with A real[T, B, 3D], W_h real[B or 1, D, 3D] and
        cache real[T, B, 3D] holding z, r and the candidate.
        """
        D = s0.shape[-1]
        states = _new_states(s0, A, W_h)
        cache = np.empty(A.shape, states.dtype)
        W_zr, W_c = W_h[:, :, : 2 * D], W_h[:, :, 2 * D :]
        for t in range(A.shape[0]):
            e, c = event[t, :, None], carry[t, :, None]
            h_prev = c * states[t, 0] + (1 - c) * init
            zr = sigmoid(A[t, :, : 2 * D] + _times(h_prev, W_zr))
            z, r = zr[:, :D], zr[:, D:]
            new = candidate(A[t, :, 2 * D :] + _times(r * h_prev, W_c))
            h = (1 - z) * h_prev + z * new
            states[t + 1, 0] = e * h + (1 - e) * h_prev
            cache[t, :, : 2 * D], cache[t, :, 2 * D :] = zr, new
        return states, cache

    return forward


def _gru_backward(candidate_slope: Callable):
    def backward(
        dH: Array, states: Array, cache: Array, init: float, W_h: Array, event: Array, carry: Array
    ) -> tuple[Array, Array, Array]:
        """Back-propagation through time of the GRU, Eqs. 21-24 differentiated as in Appendix A.

        Shapes as in `tanh_backward` with dA real[T, B, 3D] and dW_h real[B or 1, D, 3D].
        """
        D = dH.shape[-1]
        dA = np.zeros(cache.shape, dH.dtype)
        dW_h = np.zeros_like(W_h)
        ds = np.zeros_like(dH[0])
        W_zr_T = W_h[:, :, : 2 * D].transpose(0, 2, 1)
        W_c_T = W_h[:, :, 2 * D :].transpose(0, 2, 1)
        for t in range(dH.shape[0] - 1, -1, -1):
            e, c = event[t, :, None], carry[t, :, None]
            h_prev = c * states[t, 0] + (1 - c) * init
            z, r, new = cache[t, :, :D], cache[t, :, D : 2 * D], cache[t, :, 2 * D :]
            dh = dH[t] + ds
            da_c = e * dh * z * candidate_slope(new)
            drh = _times(da_c, W_c_T)
            da_z = e * dh * (new - h_prev) * z * (1 - z)
            da_r = drh * h_prev * r * (1 - r)
            dA[t] = np.concatenate([da_z, da_r, da_c], axis=1)
            _add_outer(dW_h[:, :, : 2 * D], h_prev, dA[t, :, : 2 * D])
            _add_outer(dW_h[:, :, 2 * D :], r * h_prev, da_c)
            dh_prev = (1 - e * z) * dh + drh * r + _times(dA[t, :, : 2 * D], W_zr_T)
            ds = c * dh_prev
        return ds[None], dA, dW_h

    return backward


CELLS: dict[str, Cell] = {
    "tanh": Cell(1, tanh_forward, tanh_backward),
    "gru": Cell(3, _gru_forward(np.tanh), _gru_backward(lambda c: 1 - c * c)),
    "gru-sigmoid": Cell(3, _gru_forward(sigmoid), _gru_backward(lambda c: c * (1 - c))),
}
