"""RMSprop (Tieleman and Hinton, 2012) on dense parameters and on rows.

    ms <- rho ms + (1 - rho) g^2
    w  <- w - learning_rate g / sqrt(ms + eps)

eps stands INSIDE the root and ms starts at 0. Which rows take part in a step is the row rule:

touched
    only the rows in the gradient decay and move (Algorithm 2 for W_h; sparse updates).
dense
    every row decays in every step; a row without a gradient only decays, so its decay can wait
    for its next gradient: ``rho ** (steps since its stamp)``, exactly.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from .settings import check

Array = np.ndarray


@dataclass(frozen=True)
class Rule:
    """Settings of the optimiser.

    Attributes
    ----------
    learning_rate : float
        Step size of RMSprop.
    rho : float
        Decay of the accumulators per step.
    eps : float
        Added to the accumulator inside the root. It goes together with the loss scale: 1e-8 on a
        mean over 1,280 cells acts as 0.0164 on their sum.
    W_in_rows : {"touched", "dense"}
        Row rule of W_in. W_h is always "touched" and W_out is dense.
    clip : float
        Largest norm of the whole gradient (all blocks together); 0 is off.
    """

    learning_rate: float = 0.0075
    rho: float = 0.997
    eps: float = 1e-8
    W_in_rows: Literal["touched", "dense"] = "touched"
    clip: float = 0.0

    def __post_init__(self) -> None:
        bounds = {"learning_rate": (0, 10), "rho": (0, 1), "eps": (1e-30, 10)}
        check(self, **bounds, clip=(0, float("inf")))


def rmsprop(rule: Rule, w: Array, ms: Array, g: Array) -> None:
    """One step on arrays of one shape, in place."""
    ms *= rule.rho
    ms += (1 - rule.rho) * g * g
    w -= rule.learning_rate * g / np.sqrt(ms + rule.eps)


def rmsprop_rows(
    rule: Rule, w: Array, ms: Array, stamp: Array | None, step: int, rows: Array, g: Array
) -> None:
    """One step on the given unique rows, in place.

    Parameters
    ----------
    w, ms : real[R, ...]
        Parameter and accumulator.
    stamp : int64[R] or None
        Step of each row's last update for the dense rule; None for the touched rule.
    step : int
        This step's number, counted from 1.
    rows : int[M]
    g : real[M, ...]
    """
    w_rows, ms_rows = w[rows], ms[rows]
    if stamp is not None:
        waited = (step - 1 - stamp[rows]).reshape(-1, *[1] * (g.ndim - 1))
        ms_rows *= (rule.rho**waited).astype(ms.dtype)
        stamp[rows] = step
    rmsprop(rule, w_rows, ms_rows, g)
    w[rows], ms[rows] = w_rows, ms_rows
