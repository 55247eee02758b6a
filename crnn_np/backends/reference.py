"""The NumPy reference: slow, plain, and the measure of every other backend.

Letters in shapes: T steps, B users side by side, S state vectors, D hidden units, G gates, I items,
N cells with a target. Functions that differentiate accept complex arrays.
"""

import numpy as np

from ..cells import CELLS
from ..data import EventLog
from ..history import Past
from ..model import RowGrad
from ..optim import Rule, rmsprop, rmsprop_rows
from ..outputs import OUTPUTS, Cells, Mixture, mixture_loss, mixture_score
from ..windows import Slice, Window
from ..windows import window as read_window

Array = np.ndarray

__all__ = [
    "cell_backward",
    "cell_forward",
    "mixture",
    "mixture_score",
    "output",
    "score",
    "sum_rows",
    "take_rows",
    "to_device",
    "to_host",
    "update",
    "window",
]


def to_device(array: Array) -> Array:
    """An array where this backend computes."""
    return array


def to_host(array: Array) -> Array:
    """An array of this backend as a NumPy array."""
    return array


def window(log: EventLog, piece: Slice, dtype: np.dtype) -> Window:
    """Read one slice from the log (`windows.window`)."""
    return read_window(log, piece, dtype)


def cell_forward(
    cell: str, s0: Array, init: float, A: Array, W_h: Array, event: Array, carry: Array
) -> tuple[Array, Array]:
    """States after each step of a window, and what the backward pass needs (`cells`).

    s0 [S, B, D], A [T, B, G*D], W_h [B or 1, D, G*D], event and carry [T, B]
    -> states [T + 1, S, B, D], cache [T, B, ...].
    """
    return CELLS[cell].forward(s0, init, A, W_h, event, carry)


def cell_backward(
    cell: str,
    dH: Array,
    states: Array,
    cache: Array,
    init: float,
    W_h: Array,
    event: Array,
    carry: Array,
) -> tuple[Array, Array, Array]:
    """Back-propagation through time (`cells`).

    dH [T, B, D] -> ds0 [S, B, D], dA [T, B, G*D], dW_h [B or 1, D, G*D].
    """
    return CELLS[cell].backward(dH, states, cache, init, W_h, event, carry)


def output(kind: str, H: Array, W_out: Array, y: Array) -> tuple[float, Array, Array]:
    """Loss of N cells in nats, dH [N, D] and dW_out [I, D] (`outputs`)."""
    return OUTPUTS[kind][0](H, W_out, y)


def score(kind: str, H: Array, W_out: Array, y: Array) -> tuple[Array, Array]:
    """Negative log-likelihood float64[N] and rank int32[N] of each target (`outputs`)."""
    return OUTPUTS[kind][1](H, W_out, y)


def mixture(
    H: Array, W_out: Array, mixture: Mixture, cells: Cells, past: Past, memory: int
) -> tuple[float, Array, Array, Mixture]:
    """Loss of N cells in nats, dH [N, D], dW_out [I, D] and the other gradients (`outputs`)."""
    return mixture_loss(H, W_out, mixture, cells, past, memory)


def take_rows(table: Array, index: Array) -> Array:
    """Rows of a table: [R, ...] and int[M] -> [M, ...]."""
    return table[index]


def sum_rows(index: Array, values: Array) -> RowGrad:
    """Sum the values that belong to one row, by sort and segmented sum.

    Parameters
    ----------
    index : int[M]
    values : real[M, ...]

    Returns
    -------
    RowGrad
        Its rows sorted.
    """
    rows = np.zeros(index.size, np.int32)
    sums = np.zeros_like(values)
    if index.size == 0:
        return RowGrad(rows, sums, 0)
    order = np.argsort(index, kind="stable")
    ordered = index[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[0] - 1))
    rows[: starts.size] = ordered[starts]
    sums[: starts.size] = np.add.reduceat(values[order], starts, axis=0)
    return RowGrad(rows, sums, starts.size)


def update(
    rule: Rule,
    param: Array,
    accumulator: Array,
    stamp: Array | None,
    step: int,
    grad: RowGrad | Array,
) -> None:
    """One step of RMSprop, in place: on the rows of a `RowGrad`, or on a dense gradient.

    `stamp` int64[R] selects the dense rule for rows, None the touched rule (`optim`).
    """
    if isinstance(grad, RowGrad):
        rows, values, count = grad
        rmsprop_rows(rule, param, accumulator, stamp, step, rows[:count], values[:count])
    else:
        rmsprop(rule, param, accumulator, grad)
