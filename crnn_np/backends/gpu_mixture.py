"""The mixture of output layers for the CUDA backend: the host's part of ``kernels/mixture.cu``.

The pointers' weights are computed anew wherever they are needed, so that work arrays do not grow
with the memory: for N cells in C columns of up to T steps

    mix_forward   shares g, p_k(y) of all but the softmax, one block a cell
    (the softmax, whose gradients are scaled by r_0)
    mix_gate      dL/dlogits of the gate and through its tanh, one block a cell
    3 products    dgate_in, dgate_out, and what h gets through the gate
    mix_scores    dL/dscores summed by column, pointer, piece of the lags and match
    mix_tau, mix_column   the sums of those: dtau, dnu, dgate_user
    mix_move      RMSprop on all five blocks

9 launches for a window of a run. Sums of weights are in double, all in a fixed order. Work arrays
are some F + D + 2 Q + 6 K numbers a cell, and 48 bytes for each column, pointer and piece of the
lags; the past takes 80 bytes an event, and as much again while a model is evaluated. Ranks need
8 bytes for each item of a cell (`RankWork`), for as many cells at once as the caller has room for.
"""

from typing import Any, NamedTuple

import numpy as np

from ..history import FEATURES, FLOOR, SMOOTHING, Past
from ..outputs import MATCHES, TIE, Mixture, lag_buckets, ramps

Array = Any  # of the device


class Columns(NamedTuple):
    """The N cells of a window, by column.

    user int32[C], start int64[C]: position of the first step; cell int32[N]: step * C + column;
    number int32[T * C]: the cell at each of these places, -1 where there is none; y int32[N].
    """

    user: Array
    start: Array
    cell: Array
    number: Array
    y: Array


def pieces(memory: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut the lags into pieces, each of one bucket and at most `most` lags.

    Returns
    -------
    bounds : int32[pieces + 1]
        First lag of each piece.
    of_bucket : int32[L + 1]
        First piece of each bucket.
    """
    sizes = np.bincount(lag_buckets(memory))
    counts = -(-sizes // most)
    first = np.cumsum(sizes) - sizes
    bounds = [f + most * q for f, n in zip(first, counts, strict=True) for q in range(n)]
    of_bucket = np.concatenate([[0], np.cumsum(counts)])
    return np.array([*bounds, memory], np.int32), of_bucket.astype(np.int32)


def mixing_shapes(
    blocks: dict[str, tuple[int, ...]],
    memory: int,
    columns: int,
    cells: int,
    most: int,
    dtype: np.dtype,
) -> dict[str, tuple]:
    """Shape and dtype of the work arrays of `Mixing`.

    Parameters
    ----------
    blocks : dict
        Shapes of the blocks of `Mixture`.
    columns, cells : int
        The most that a window has.
    most : int
        Threads of a block.
    """
    P, L, _ = blocks["tau"]
    width, Q = blocks["gate_in"]
    K = blocks["gate_out"][1]
    n_pieces = pieces(memory, most)[0].size - 1
    wide = np.float64
    return {
        "bucket": ((memory,), np.int32),
        "ramp": ((memory,), dtype),
        "piece": ((n_pieces + 1,), np.int32),
        "of_bucket": ((L + 1,), np.int32),
        "shift": ((cells, P), dtype),
        "mass": ((cells, P), wide),
        "given": ((cells, width), dtype),
        "hidden": ((cells, Q + 1), dtype),
        "share": ((cells, K), wide),
        "p": ((cells, K), wide),
        "others": ((cells,), wide),
        "dgate": ((cells, K), dtype),
        "dhidden": ((cells, Q), dtype),
        "pull": ((cells, P), wide),
        "parts": ((columns, P, n_pieces, MATCHES + 1), wide),
        "dtau": (blocks["tau"], dtype),
        "dnu": ((columns, P, MATCHES + 1), dtype),
        "dgate_in": (blocks["gate_in"], dtype),
        "dgate_out": (blocks["gate_out"], dtype),
        "dgate_user": ((columns, K), dtype),
        "touched": ((columns,), np.int32),
    }


class RankWork(NamedTuple):
    """Work arrays of `Mixing.rank` for at most N cells."""

    extra: Array  # float64[N, I], what single items get beside the softmax and the unigram
    level: Array  # float64[N, 3]
    above: Array  # int32[tiles * N]


def rank_shapes(cells: int, n_items: int, tile: int) -> dict[str, tuple]:
    """Shape and dtype of each array of `RankWork`."""
    return {
        "extra": ((cells, n_items), np.float64),
        "level": ((cells, 3), np.float64),
        "above": ((-(-n_items // tile) * cells,), np.int32),
    }


class Mixing:
    """The mixture's own layer on a device: everything of it but the softmax.

    Parameters
    ----------
    dev
        Of `gpu.device`.
    threads : int
        Of a block.
    memory : int
    work : dict
        New arrays of `mixing_shapes`.
    """

    def __init__(self, dev: Any, threads: int, memory: int, work: dict[str, Array]) -> None:
        self.dev, self.threads, self.memory, self.work = dev, threads, memory, work
        bounds, of_bucket = pieces(memory, threads)
        constants = {"bucket": lag_buckets(memory), "ramp": ramps(memory)}
        constants |= {"piece": bounds, "of_bucket": of_bucket}
        for name, values in constants.items():
            work[name][...] = dev.xp.asarray(values.astype(work[name].dtype))

    def _arrays(self, *names: str) -> tuple[Array, ...]:
        return tuple(self.work[name] for name in names)

    def _reach(self, blocks: Mixture, columns: Columns) -> tuple[np.int32, ...]:
        P, L, _ = blocks.tau.shape
        return tuple(map(np.int32, (columns.user.size, self.memory, L, P)))

    def _small(self, width: int) -> int:
        """Threads of a block for so many elements."""
        return min(self.threads, 32 * -(-width // 32))

    def forward(self, blocks: Mixture, past: Past, columns: Columns, H: Array) -> None:
        """Shares and probabilities of the cells, but that of the softmax.

        H real[N, D], the cells' states after output dropout.
        """
        N, D = H.shape
        Q = blocks.gate_out.shape[0] - 1
        if N:
            known = past.indptr, past.items, past.features, past.experts
            arguments = (columns.cell, columns.user, columns.start, columns.y, *known, *blocks)
            arguments += self._arrays("bucket", "ramp")
            arguments += (H, *self._arrays("shift", "mass", "given", "hidden"))
            arguments += self._arrays("share", "p", "others")
            sizes = map(np.int32, (len(FEATURES), D, Q))
            arguments += (*self._reach(blocks, columns), *sizes)
            self.dev.launch("mix_forward", N, self.threads, arguments)

    def blend(self, N: int) -> tuple[Array, Array, Array]:
        """What the softmax must know: share [N, K], others [N], and p [N, K], where p_0 goes."""
        return tuple(array[:N] for array in self._arrays("share", "others", "p"))

    def backward(
        self, blocks: Mixture, past: Past, columns: Columns, scale: float, dH: Array
    ) -> None:
        """Gradients times scale, in work arrays, after the softmax; dH [N, D] += the gate's."""
        N, F = len(dH), len(FEATURES)
        P, L, _ = blocks.tau.shape
        Q, K = blocks.gate_out.shape[0] - 1, blocks.gate_out.shape[1]
        C, T = columns.user.size, columns.number.size // max(columns.user.size, 1)
        w, launch = self.work, self.dev.launch
        if N == 0:
            for array in (*self.gradients, w["touched"]):
                array.fill(0)
            return
        arguments = (blocks.gate_out, *self._arrays("hidden", "mass", "share", "p", "others"))
        arguments += self._arrays("dgate", "dhidden", "pull")
        sizes = np.int32(P), np.int32(Q), self.dev.dtype.type(scale)
        launch("mix_gate", N, self._small(max(Q, K)), (*arguments, *sizes))
        given, hidden, dgate, dhidden = (
            array[:N] for array in self._arrays("given", "hidden", "dgate", "dhidden")
        )
        self.dev.product(given.T, dhidden, w["dgate_in"])
        self.dev.product(hidden.T, dgate, w["dgate_out"])
        self.dev.product(dhidden, blocks.gate_in[F:].T, dH, 1.0)

        n_pieces = w["piece"].size - 1
        steps, points = np.int32(T), np.int32(n_pieces)
        arguments = (columns.number, columns.user, columns.start, columns.y, past.indptr)
        arguments += (past.items, blocks.tau, blocks.nu)
        arguments += self._arrays("bucket", "ramp", "shift", "p", "pull", "piece", "parts")
        count, memory, buckets, pointers = self._reach(blocks, columns)
        arguments += (count, steps, memory, buckets, pointers)
        launch("mix_scores", (C * P, n_pieces), self.threads, arguments)
        arguments = (*self._arrays("parts", "of_bucket", "dtau"), count, points)
        launch("mix_tau", (L, P), self.threads, arguments)
        arguments = (columns.number, *self._arrays("parts", "dgate", "dnu", "dgate_user"))
        arguments += (w["touched"], count, steps, pointers, points)
        launch("mix_column", C, self._small(max(P * (MATCHES + 1), K, T)), arguments)

    @property
    def gradients(self) -> Mixture:
        """Those of the last `backward`; nu and gate_user have a row for each column."""
        return Mixture(*self._arrays(*(f"d{name}" for name in Mixture._fields)))

    def move(
        self, numbers: tuple[Any, ...], blocks: Mixture, squares: Mixture, columns: Columns
    ) -> None:
        """RMSprop by the gradients of `backward`; numbers are those of the rule.

        The rows of users without a cell are left alone.
        """
        C = columns.user.size
        row = [int(np.prod(block.shape[1:])) for block in blocks]
        whole = [block.size for block in blocks]
        sizes = whole[0], row[1], whole[2], whole[3], row[4]
        arguments = (*blocks, *squares, *self.gradients, columns.user, self.work["touched"])
        arguments += (*map(np.int32, (C, *sizes)), *numbers)
        total = whole[0] + whole[2] + whole[3] + C * (row[1] + row[4])
        self.dev.launch("mix_move", -(-total // self.threads), self.threads, arguments)

    def rank(
        self,
        blocks: Mixture,
        past: Past,
        columns: Columns,
        H: Array,
        W_out: Array,
        target: Array,
        nll: Array,
        rank: Array,
        work: RankWork,
        tile: int,
    ) -> None:
        """From the softmax's nll to that of the mixture, and the targets' ranks; after `forward`.

        Parameters
        ----------
        H : real[N, D]
        target : real[N]
            The targets' logits, summed in the order of `mix_count`.
        nll : float64[N]
        rank : int32[N]
        tile : int
            Items of a thread block.
        """
        (N, D), n_items = H.shape, len(W_out)
        launch, counts, (extra, level, above) = self.dev.launch, past.counts, work
        tiles = -(-n_items // tile)
        extra.fill(0)
        arguments = (columns.cell, columns.user, columns.start, columns.y, past.indptr)
        arguments += (past.items, blocks.tau, blocks.nu)
        arguments += self._arrays("bucket", "ramp", "shift", "mass", "share", "others")
        arguments += (*counts, extra, level, nll, *self._reach(blocks, columns))
        arguments += (np.int32(n_items), np.int64(counts.items.size))
        arguments += tuple(map(np.float64, (SMOOTHING, FLOOR, TIE)))
        launch("mix_extra", N, self.threads, arguments)
        arguments = (H, W_out, target, level, extra, counts.unigram, above)
        sizes = map(np.int32, (N, n_items, tile, D))
        grid = -(-N // (self.threads // 4)), tiles
        launch("mix_count", grid, self.threads, (*arguments, *sizes, np.float64(FLOOR)))
        arguments = (above, rank, np.int32(N), np.int32(tiles))
        launch("mix_rank", -(-N // self.threads), self.threads, arguments)


def cells_alone(dev: Any, cells: Any, past: Past) -> Columns:
    """`Columns` in which each cell is a column of one step."""
    numbers = dev.xp.arange(cells.y.size).astype(np.int32)
    user, at = cells.user.astype(np.int32, copy=False), cells.at.astype(np.int64, copy=False)
    return Columns(user, at - past.indptr[user], numbers, numbers, cells.y.astype(np.int32))
