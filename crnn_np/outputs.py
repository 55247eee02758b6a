"""Output layers with their losses, in plain NumPy, forward directly followed by backward.

The softmax over the whole catalogue (Eqs. 10, 19, 20), and, beyond the paper, its mixture with the
user's own past and with what the other users did. With K = 3 + P distributions,

    p(y) = sum over k of g_k p_k(y),    L = -log p(y),    r_k = g_k p_k(y) / p(y)

k = 0 is the softmax, whose gradients are those of the softmax alone times r_0. k = 1 and 2 are the
other users' bigram and unigram (`history`), which have no parameters. The others are pointers into
the user's last `memory` events x_s, s = 1 the latest:

    score_s = tau[bucket of s, match of s] + nu_u[match of s] + nu_u[-1] ramp(s)
    alpha = softmax(score),    p_k(y) = sum of alpha_s over x_s = y
    dL/dscore_s = r_k alpha_s (1 - [x_s = y] / p_k(y))

The match of s says how much of what came before x_s equals what came before y: nothing, the item
two before alone (a skip), one item, two, or three. The gate is

    g = softmax([tanh([f, h] gate_in), 1] gate_out + gate_user[u]),    dL/dlogit_k = g_k - r_k

with the counts f of the past (`history.FEATURES`) and the state h.
"""

from typing import NamedTuple

import numpy as np

from .history import Past, distributions

Array = np.ndarray

MATCHES = 5  # none, skip, one, two, three
STATIC = 3  # distributions that are no pointers
EXPERTS = ("softmax", "bigram", "unigram")

TIE = 1e-6  # relative difference of probabilities that are summed in another order
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


def lag_buckets(memory: int) -> Array:
    """int64[memory]: bucket of the lags 1, 2, ...; two a doubling, and none for the last alone."""
    lag = np.arange(1, memory + 1)
    lag[2:] = np.minimum(lag[2:], memory - 1)
    _, bucket = np.unique(np.floor(2 * np.log2(lag)), return_inverse=True)
    return bucket.astype(np.int64)


def ramps(memory: int) -> Array:
    """float64[memory]: what nu_u's last column goes with, log(lag) / 4."""
    return np.log(np.arange(1, memory + 1)) / 4


class Mixture(NamedTuple):
    """The mixture's own parameters, or their gradients.

    tau real[P, L, MATCHES]; nu real[U, P, MATCHES + 1]; gate_in real[F + D, Q];
    gate_out real[Q + 1, K]; gate_user real[U, K]. In a gradient of N cells, nu and gate_user have
    a row for each cell instead of each user.
    """

    tau: Array
    nu: Array
    gate_in: Array
    gate_out: Array
    gate_user: Array


class Cells(NamedTuple):
    """The N cells of a window that have a target.

    y int32[N], the next item; user int32[N]; at int64[N], index of the cell's event in the past.
    """

    y: Array
    user: Array
    at: Array


def recall(past: Past, cells: Cells, memory: int) -> tuple[Array, Array, Array]:
    """The last events of each cell's user, the latest first, and how much their contexts match.

    Returns
    -------
    items, match : int[N, memory]
    there : bool[N, memory]
        False beyond the start of the user's sequence.
    """
    first, at = past.indptr[cells.user][:, None], cells.at[:, None]
    s = at - np.arange(memory)

    def same(back: int) -> Array:
        inside = (s - back >= first) & (at - back + 1 >= first)
        return inside & (
            past.items[np.maximum(s - back, 0)] == past.items[np.maximum(at - back + 1, 0)]
        )

    one, two, three = same(1), same(2), same(3)
    match = np.where(one, 2 + two + (two & three), two)
    return past.items[np.maximum(s, 0)], match, s >= first


def _softmax(x: Array) -> Array:
    e = np.exp(x - x.real.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def attention(mixture: Mixture, cells: Cells, match: Array, there: Array) -> Array:
    """alpha real[P, N, memory], 0 where no event is there."""
    memory = match.shape[1]
    n, nu = np.arange(len(match))[:, None], mixture.nu[cells.user].swapaxes(0, 1)
    scores = mixture.tau[:, lag_buckets(memory), match] + nu[:, n, match]
    scores = scores + nu[:, :, -1:] * ramps(memory)
    return _softmax(np.where(there, scores, -np.inf))


def gate(mixture: Mixture, user: Array, f: Array, H: Array) -> tuple[Array, Array, Array]:
    """Shares g [N, K] of the distributions; the gate's input [N, F + D] and hidden [N, Q + 1]."""
    given = np.concatenate([f, H], axis=1)
    hidden = np.concatenate([np.tanh(given @ mixture.gate_in), np.ones((len(H), 1))], axis=1)
    return _softmax(hidden @ mixture.gate_out + mixture.gate_user[user]), given, hidden


def mixture_loss(
    H: Array, W_out: Array, mixture: Mixture, cells: Cells, past: Past, memory: int
) -> tuple[complex | float, Array, Array, Mixture]:
    """Summed negative log-likelihood of the mixture and its gradients.

    Parameters
    ----------
    H : real[N, D]
        States of the cells, after output dropout.
    W_out : real[I, D]
    memory : int
        Events that the pointers reach back.

    Returns
    -------
    loss : float
        Sum over the N cells, in nats.
    dH : real[N, D]
    dW_out : real[I, D]
    dmixture : Mixture
    """
    n = np.arange(cells.y.size)
    P_0 = _softmax(H @ W_out.T)
    items, match, there = recall(past, cells, memory)
    alpha = attention(mixture, cells, match, there)
    hit = items == cells.y[:, None]
    pointed = (alpha * hit).sum(axis=2)
    p = np.concatenate([P_0[n, cells.y, None], past.experts[cells.at], pointed.T], axis=1)
    g, given, hidden = gate(mixture, cells.user, past.features[cells.at], H)
    total = (g * p).sum(axis=1, keepdims=True)
    loss = -np.log(total).sum(dtype=np.result_type(total.dtype, np.float64))

    r = g * p / total
    dlogits = P_0 * r[:, :1]
    dlogits[n, cells.y] -= r[:, 0]
    dgate = g - r
    dhidden = (dgate @ mixture.gate_out.T * (1 - hidden * hidden))[:, :-1]
    dgiven = dhidden @ mixture.gate_in.T
    pull = (g / total)[:, STATIC:].T[:, :, None]
    dscores = alpha * (r[:, STATIC:].T[:, :, None] - hit * pull)
    dtau = np.zeros(mixture.tau.shape, dscores.dtype)
    dnu = np.zeros((n.size, *mixture.nu.shape[1:]), dscores.dtype)
    np.add.at(dtau, (slice(None), lag_buckets(memory), match), dscores)
    for k, d in enumerate(dscores):
        np.add.at(dnu[:, k], (n[:, None], match), d)
        dnu[:, k, -1] = d @ ramps(memory)
    dH = dlogits @ W_out + dgiven[:, -H.shape[1] :]
    grads = (dH, dlogits.T @ H, dtau, dnu, given.T @ dhidden, hidden.T @ dgate, dgate)
    dtype = np.result_type(H, W_out, *mixture)
    dH, dW_out, *own = (grad.astype(dtype, copy=False) for grad in grads)
    return loss, dH, dW_out, Mixture(*own)


def mixture_distributions(
    H: Array, W_out: Array, mixture: Mixture, cells: Cells, past: Past, memory: int
) -> tuple[Array, Array]:
    """Every distribution over all items, float64[N, K, I], and the gate's shares [N, K]."""
    items, match, there = recall(past, cells, memory)
    alpha = attention(mixture, cells, match, there)
    p = np.zeros((len(H), mixture.gate_out.shape[1], len(W_out)))
    # no BLAS: it sums rows at the edge of its tiles in another order, and equal rows must tie
    p[:, 0] = _softmax(np.einsum("nd,id->ni", H, W_out).astype(np.float64))
    for n, (user, at) in enumerate(zip(cells.user, cells.at, strict=True)):
        p[n, 1:STATIC] = distributions(past, user, at)
        for k, weights in enumerate(alpha[:, n], STATIC):
            p[n, k] = np.bincount(items[n], weights, minlength=len(W_out))
    return p, gate(mixture, cells.user, past.features[cells.at], H)[0]


def mixture_score(
    H: Array, W_out: Array, mixture: Mixture, cells: Cells, past: Past, memory: int
) -> tuple[Array, Array]:
    """Negative log-likelihood and rank of each target, as `softmax_score`."""
    nll, rank = np.empty(cells.y.size), np.empty(cells.y.size, np.int32)
    for n, y in enumerate(cells.y):
        one = Cells(*(column[n : n + 1] for column in cells))
        p, g = mixture_distributions(H[n : n + 1], W_out, mixture, one, past, memory)
        every = g[0] @ p[0]
        nll[n] = -np.log(every[y])
        rank[n] = np.count_nonzero(~(every < every[y] * (1 - TIE)))
    return nll, rank
