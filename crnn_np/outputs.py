"""Output layers with their losses: the softmax over the whole catalogue (Eqs. 10, 19, 20)."""

import numpy as np

Array = np.ndarray

ROWS = 128  # events scored at once, so that scores of a whole log never exist together


def softmax_loss(H: Array, W_out: Array, y: Array) -> tuple[complex | float, Array, Array]:
    """Summed negative log-likelihood and its gradients, Eqs. 27-28, 32 (sign of a loss) and 38.

    Parameters
    ----------
    H : real[N, D]
        States of the cells that have a target, after output dropout.
    W_out : real[I, D]
    y : int[N]
        Next item of each cell.

    Returns
    -------
    loss : float
        Sum over the N cells, in nats.
    dH : real[N, D]
    dW_out : real[I, D]
    """
    logits = H @ W_out.T
    logits -= logits.real.max(axis=1, keepdims=True)
    E = np.exp(logits)
    S = E.sum(axis=1, keepdims=True)
    n = np.arange(y.size)
    loss = (np.log(S[:, 0]) - logits[n, y]).sum(dtype=np.result_type(S.dtype, np.float64))
    P = E / S
    P[n, y] -= 1
    return loss, P @ W_out, P.T @ H


def softmax_score(H: Array, W_out: Array, y: Array) -> tuple[Array, Array]:
    """Negative log-likelihood and rank of each target among all items.

    Parameters
    ----------
    H : real[N, D]
    W_out : real[I, D]
    y : int[N]

    Returns
    -------
    nll : float64[N]
        In nats.
    rank : int32[N]
        1 is best; items that score the same as the target are ranked before it.
    """
    nll = np.empty(y.size, np.float64)
    rank = np.empty(y.size, np.int32)
    for lo in range(0, y.size, ROWS):
        part = slice(lo, lo + ROWS)
        # no BLAS: it sums rows at the edge of its tiles in another order, and equal rows must tie
        logits = np.einsum("nd,id->ni", H[part], W_out)
        target = np.take_along_axis(logits, y[part, None].astype(np.int64), axis=1)
        top = logits.max(axis=1, keepdims=True)
        S = np.exp(logits - top).sum(axis=1, dtype=np.float64)
        nll[part] = np.log(S) + (top - target)[:, 0]
        rank[part] = np.count_nonzero(~(logits < target), axis=1)
    return nll, rank


OUTPUTS = {"softmax": (softmax_loss, softmax_score)}
