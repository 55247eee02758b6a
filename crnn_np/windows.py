"""From sequences to windows: the order of users, batches, windows and the random key.

A `Plan` says how. `epoch_slices` turns the lengths of the sequences into the slices of an epoch,
a few numbers each; `window` reads one slice from the log. Dropout masks are a counter-based hash
of (key, step, column, unit): nothing is stored, and every backend makes the same bits.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from .data import EventLog
from .errors import SettingsError
from .settings import check

Array = np.ndarray

INPUT, OUTPUT = np.uint64(1), np.uint64(2)  # dropout streams of one key
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Plan:
    """Settings of a training run.

    Attributes
    ----------
    batch : int
        B, users side by side.
    window : int
        T, steps of a window; back-propagation stops at its start, the state is carried on.
    order : {"random", "length"}
        "random": users in a new random order every epoch (Algorithm 2). "length": users of like
        length side by side, the batches in random order (the authors' code).
    loss_scale : {"sum", "mean"}
        Factor on the gradients: 1, or 1 / (batch * window), constant even where a window is
        shorter or a batch smaller.
    epochs : int
        Number of epochs; the most there can be with early stopping.
    patience : int
        Early stopping: give up after this many epochs without a better validation error. 0 trains
        for all epochs and uses no validation part.
    refit : bool
        After early stopping, train anew on the whole training part for the number of epochs that
        was best, instead of keeping the best epoch's parameters.
    validation_fraction : float
        Length of the validation part, cut from the end of each user's training part, as a share
        of what that part and the held-out part are together.
    validation_range : (int, int)
        Shortest and longest validation part of a user.
    seed : int
        Of the initial weights, the order of users and the dropout masks.
    """

    batch: int = 1
    window: int = 128
    order: Literal["random", "length"] = "random"
    loss_scale: Literal["sum", "mean"] = "sum"
    epochs: int = 25
    patience: int = 0
    refit: bool = True
    validation_fraction: float = 0.025
    validation_range: tuple[int, int] = (3, 500)
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {"batch": (1, 1 << 16), "window": (1, 1 << 16), "epochs": (1, 1 << 31)}
        bounds |= {"patience": (0, 1 << 31), "validation_fraction": (0, 0.5)}
        check(self, **bounds, seed=(0, 1 << 62))
        pair = self.validation_range
        whole = isinstance(pair, tuple) and len(pair) == 2 and all(type(n) is int for n in pair)
        if not whole or not 1 <= pair[0] <= pair[1]:
            raise SettingsError(
                f"validation_range is {pair!r}: expected whole numbers, 1 <= shortest <= longest"
            )

    @property
    def scale(self) -> float:
        """The factor on the gradients that `loss_scale` names."""
        return 1.0 if self.loss_scale == "sum" else 1.0 / (self.batch * self.window)


class Slice(NamedTuple):
    """Where to read a window: for each of B columns, a user and a stretch of their sequence.

    A run of K slices is the same tuple with an axis K before the others.

    Attributes
    ----------
    user : int32[B]
        Each at most once among the columns with a length.
    start : int64[B]
        Position in the user's sequence.
    length : int32[B]
        Events from there; 0 is a column of padding.
    fresh : bool[B]
        The column begins a sequence: its state starts anew.
    target_from : int64[B]
        Targets at earlier positions carry no loss.
    key : uint64
        Of the dropout masks.
    """

    user: Array
    start: Array
    length: Array
    fresh: Array
    target_from: Array
    key: Array

    def one(self, k: int) -> "Slice":
        """Slice k of a run."""
        return Slice(*(field[k] for field in self))

    def part(self, start: int, stop: int) -> "Slice":
        """Slices start..stop - 1 of a run, as a run."""
        return Slice(*(field[start:stop] for field in self))


class Window(NamedTuple):
    """One window of events, T steps of B users side by side.

    Attributes
    ----------
    user : int32[B]
    x, y : int32[T, B]
        Items, and the items that follow them; 0 where there is none.
    event : real[T, B]
        1 at an event, 0 at padding, where the state is held.
    target : real[T, B]
        1 where y counts in the loss.
    carry : real[T, B]
        0 where a new sequence starts before the step.
    at : int64[T, B] or None
        Index of each event in the log, 0 at padding; None where the window is of no log.
    """

    user: Array
    x: Array
    y: Array
    event: Array
    target: Array
    carry: Array
    at: Array | None = None


def mix(z: Array) -> Array:
    """Finaliser of SplitMix64 (Steele, Lea and Flood, 2014) on uint64."""
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def dropout_threshold(p: float) -> np.uint64:
    """A unit is dropped where the 24 random bits of its hash are below this."""
    return np.uint64(round(p * 2**24))


def dropout_keep(
    key: int, stream: np.uint64, T: int, B: int, width: int, p: float, dtype: np.dtype
) -> Array:
    """Dropout mask of a window (Srivastava et al., 2014).

    Parameters
    ----------
    key : uint64
    stream : uint64
        `INPUT` or `OUTPUT`.
    p : float
        Probability that an element is dropped.

    Returns
    -------
    real[T, B, width]
        0 where dropped, 1 / (1 - p) where kept.
    """
    with np.errstate(over="ignore"):
        start = mix(np.uint64(key) + stream)
        counter = np.arange(1, T * B * width + 1, dtype=np.uint64).reshape(T, B, width)
        bits = mix(start + counter * GOLDEN) >> np.uint64(40)
    return (bits >= dropout_threshold(p)).astype(dtype) / np.dtype(dtype).type(1 - p)


def window_keys(seed: int, epoch: int, count: int) -> Array:
    """uint64[count]: one key for each window of an epoch."""
    with np.errstate(over="ignore"):
        start = mix(mix(np.uint64(seed) * GOLDEN) + np.uint64(epoch))
        return mix(start + np.arange(count, dtype=np.uint64) * GOLDEN)


def _run(groups: list[Array], lengths: Array, target_from: Array, batch: int, T: int) -> Slice:
    """Windows of groups of at most `batch` users, group after group, without keys."""
    users, starts, parts, fresh, first = [], [], [], [], []
    for group in groups:
        n = np.zeros(batch, np.int64)
        u = np.zeros(batch, np.int32)
        u[: group.size], n[: group.size] = group, lengths[group]
        start = np.arange(0, n.max(initial=0), T)[:, None]
        length = np.clip(n - start, 0, T)
        users.append(np.broadcast_to(u, length.shape))
        starts.append(np.broadcast_to(start, length.shape))
        parts.append(length)
        fresh.append(np.broadcast_to(start == 0, length.shape))
        first.append(np.broadcast_to(target_from[u], length.shape))
    empty = np.zeros((0, batch))
    columns = [np.concatenate([empty, *c]) for c in (users, starts, parts, fresh, first)]
    types = (np.int32, np.int64, np.int32, np.bool_, np.int64)
    columns = [np.ascontiguousarray(c, t) for c, t in zip(columns, types, strict=True)]
    return Slice(*columns, np.zeros(len(columns[0]), np.uint64))


def epoch_slices(plan: Plan, lengths: Array, epoch: int) -> Slice:
    """The run of slices of one training epoch; it depends on the plan's seed and `epoch` only.

    Parameters
    ----------
    lengths : int64[U]
        Events of each user; users without an event take no part.
    epoch : int
        Counted from 1.
    """
    rng = np.random.default_rng([plan.seed, epoch])
    users = np.flatnonzero(lengths)
    if plan.order == "length":
        users = users[np.argsort(lengths[users], kind="stable")]
    else:
        users = rng.permutation(users)
    groups = [users[i : i + plan.batch] for i in range(0, users.size, plan.batch)]
    if plan.order == "length":
        groups = [groups[i] for i in rng.permutation(len(groups))]
    run = _run(groups, lengths, np.zeros(lengths.size, np.int64), plan.batch, plan.window)
    return run._replace(key=window_keys(plan.seed, epoch, run.key.size))


def replay_slices(lengths: Array, target_from: Array, batch: int = 64, window: int = 128) -> Slice:
    """Slices that replay every user's sequence once, with targets from a position on.

    Parameters
    ----------
    lengths : int64[U]
    target_from : int64[U]
        Position of each user's first event that is to be predicted.
    """
    users = np.flatnonzero(lengths > target_from)
    users = users[np.argsort(lengths[users], kind="stable")]
    groups = [users[i : i + batch] for i in range(0, users.size, batch)]
    return _run(groups, lengths, target_from, batch, window)


def window(log: EventLog, piece: Slice, dtype: np.dtype) -> Window:
    """Read one slice from the log; as many steps as its longest column has."""
    T = int(piece.length.max(initial=0))
    t = np.arange(T)[:, None]
    position = piece.start + t
    event = t < piece.length
    first = log.indptr[piece.user]
    n = log.indptr[piece.user + 1] - first
    followed = event & (position + 1 < n)
    target = followed & (position + 1 >= piece.target_from)
    index = first + position
    items = log.items
    x = np.where(event, items[np.where(event, index, 0)], 0)
    y = np.where(followed, items[np.where(followed, index + 1, 0)], 0)
    carry = ~(piece.fresh & (t == 0))
    return Window(
        piece.user,
        x.astype(np.int32),
        y.astype(np.int32),
        event.astype(dtype),
        target.astype(dtype),
        carry.astype(dtype),
        np.where(event, index, 0),
    )
