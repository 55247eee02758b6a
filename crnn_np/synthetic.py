"""A log drawn from a known collaborative RNN, so that the lowest attainable error is known."""

from typing import Any, NamedTuple

import numpy as np

from . import backends
from .cells import CELLS
from .data import Split, cut_tail, from_sequences
from .errors import SettingsError
from .evaluation import evaluate
from .model import Params, Spec

Array = np.ndarray


class Drawn(NamedTuple):
    """A log and the model that it was drawn from.

    Attributes
    ----------
    split : Split
        Over all items of the generator, also those that never occur.
    params : Params
        float64.
    spec : Spec
    """

    split: Split
    params: Params
    spec: Spec

    def lowest_error(self, n: int = 20, per_user: bool = False) -> dict[str, Any]:
        """Errors of the generator itself on the held-out events, as `evaluation.summarise` says.

        The expectation of its ``nll`` is the conditional entropy of an event given all before it:
        on average over draws, no model has a lower one.
        """
        reference = backends.get("numpy")
        return evaluate(reference, self.spec, self.params, *self.split, n, per_user)


def draw(
    n_users: int = 100,
    n_items: int = 200,
    hidden_size: int = 8,
    cell: str = "gru",
    events: tuple[int, int] = (2000, 4000),
    heldout_fraction: float = 0.1,
    recurrence: float = 2.0,
    sharpness: float = 8.0,
    seed: int = 0,
) -> Drawn:
    """Draw a collaborative RNN, and from it a sequence for each user (Eqs. 16-24).

    The first item of a sequence is uniform, each other one is drawn from the model's softmax.

    Parameters
    ----------
    n_users, n_items, hidden_size : int
        U, I, D.
    cell : {"gru", "tanh"}
    events : (int, int)
        Shortest and longest sequence; lengths are uniform between them.
    heldout_fraction : float
        In [0, 1); the end of each sequence, rounded to whole events.
    recurrence : float
        Each user's W_h is drawn from N(0, recurrence^2 / D), and W_in from N(0, 1): the larger,
        the more the next item depends on the user's own dynamics.
    sharpness : float
        W_out is drawn from N(0, sharpness^2 / D): the larger, the lower the entropy.
    seed : int

    Raises
    ------
    SettingsError
        A size or a range is impossible.
    """
    shortest, longest = events
    if min(n_users, n_items) < 1 or not 1 <= shortest <= longest:
        raise SettingsError(
            f"{n_users} users, {n_items} items, {shortest} to {longest} events: at least one of "
            "each was expected, and a range of events that does not fall"
        )
    if not 0 <= heldout_fraction < 1:
        raise SettingsError(f"heldout_fraction is {heldout_fraction}: 0 to below 1 was expected")
    spec = Spec(hidden_size=hidden_size, cell=cell, dtype="float64")
    D, width = hidden_size, spec.gates * hidden_size
    rng = np.random.default_rng(seed)
    params = Params(
        rng.standard_normal((n_users, D, width)) * (recurrence / np.sqrt(D)),
        rng.standard_normal((n_items, width)),
        rng.standard_normal((n_items, D)) * (sharpness / np.sqrt(D)),
    )
    lengths = rng.integers(shortest, longest, n_users, endpoint=True)
    items = _sample(spec, params, int(lengths.max()), rng)
    log = from_sequences([row[:n] for row, n in zip(items, lengths, strict=True)], n_items)
    heldout = np.rint(heldout_fraction * lengths).astype(np.int64)
    return Drawn(cut_tail(log, np.minimum(heldout, lengths - 1)), params, spec)


def _sample(spec: Spec, params: Params, T: int, rng: np.random.Generator) -> Array:
    """int64[U, T]: T events of every user, by inversion of the softmax's distribution."""
    forward = CELLS[spec.cell_kind].forward
    n_users, n_items = len(params.W_h), len(params.W_out)
    items = np.empty((n_users, T), np.int64)
    items[:, 0] = rng.integers(0, n_items, n_users)
    s = np.full((1, n_users, spec.hidden_size), spec.init_state)
    one = np.ones((1, n_users))
    for t in range(1, T):
        A = params.W_in[items[:, t - 1]][None]
        s = forward(s, spec.init_state, A, params.W_h, one, one)[0][-1]
        logits = s[0] @ params.W_out.T
        logits -= logits.max(axis=1, keepdims=True)
        mass = np.exp(logits, out=logits).cumsum(axis=1)
        level = rng.random((n_users, 1)) * mass[:, -1:]
        items[:, t] = np.count_nonzero(mass[:, :-1] <= level, axis=1)
    return items
