"""The model: its settings, parameters and gradients, `gather` and `scatter`, and model files.

`gather` turns item rows into dense activations and `scatter` turns their gradients back into rows:
a cell sees neither items nor dropout nor the sharing of W_h.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import numpy as np

from .cells import CELLS
from .data import EventLog, check_log, is_sound
from .errors import ModelError, SettingsError
from .history import FEATURES
from .outputs import MATCHES, STATIC, Mixture, lag_buckets
from .settings import check
from .windows import INPUT, Window, dropout_keep

Array = np.ndarray

FORMAT = "crnn_np model 2"
HISTORY = EventLog._fields[:3]  # what a file keeps of a history, beside the ids


@dataclass(frozen=True)
class Spec:
    """Settings of the model.

    Attributes
    ----------
    hidden_size : int
        D, number of hidden units.
    cell : {"gru", "tanh"}
        Eqs. 21-24 or 14-15.
    sharing : {"collaborative", "pooled"}
        A W_h for every user (C-RNN), or one for all (P-RNN).
    candidate : {"tanh", "sigmoid"}
        Nonlinearity of the GRU's candidate: tanh, or sigmoid as in the authors' code.
    output : {"softmax", "mixture"}
        Output layer: the softmax over all items, or its mixture with pointers into the user's own
        past and the other users' bigram and unigram (`outputs`).
    pointers : int
        Of the mixture: P, distributions over the items of the user's past.
    memory : int
        Of the mixture: events that the pointers reach back.
    gate_size : int
        Of the mixture: Q, hidden units of the gate.
    init_state : float
        Every unit of the state before a sequence (epsilon in Algorithm 1).
    dropout_in, dropout_out : float
        Probability of dropping an element of W_in[x], and of h before the output layer (Zaremba
        et al., 2014); never on the recurrent path.
    dtype : {"float32", "float64"}
        Of all parameters and work arrays but a mixture's own, which are float64, on a GPU some
        of them.
    products : {"full", "bfloat16", "tf32"}
        Factors of the output layer's matrix products in training, with sums in float32: as they
        are; rounded to 8 bits, for processors that multiply bfloat16 (AMX, AMD's AVX512_BF16;
        backend numba); or rounded to 11 bits for the tensor cores of a GPU (backend cupy).
    """

    hidden_size: int = 32
    cell: Literal["gru", "tanh"] = "gru"
    sharing: Literal["collaborative", "pooled"] = "collaborative"
    candidate: Literal["tanh", "sigmoid"] = "tanh"
    output: Literal["softmax", "mixture"] = "softmax"
    pointers: int = 1
    memory: int = 4096
    gate_size: int = 16
    init_state: float = 0.0
    dropout_in: float = 0.0
    dropout_out: float = 0.0
    dtype: Literal["float32", "float64"] = "float32"
    products: Literal["full", "bfloat16", "tf32"] = "full"

    def __post_init__(self) -> None:
        dropout = (0, 0.99)
        bounds = {"hidden_size": (1, 1 << 16), "init_state": (-1, 1), "pointers": (1, 16)}
        bounds |= {"memory": (1, 1 << 16), "gate_size": (1, 1 << 12)}
        check(self, **bounds, dropout_in=dropout, dropout_out=dropout)
        if self.products != "full" and self.dtype != "float32":
            raise SettingsError(
                f"products is {self.products!r} and dtype is {self.dtype!r}: set products to "
                "'full', or dtype to 'float32'"
            )

    @property
    def cell_kind(self) -> str:
        """Key in `cells.CELLS`."""
        return "gru-sigmoid" if (self.cell, self.candidate) == ("gru", "sigmoid") else self.cell

    @property
    def gates(self) -> int:
        """G: 3 for the GRU (z, r, candidate), 1 for tanh."""
        return CELLS[self.cell_kind].gates


class Params(NamedTuple):
    """W_h real[U or 1, D, G*D], W_in real[I, G*D], W_out real[I, D]."""

    W_h: Array
    W_in: Array
    W_out: Array


class MixtureParams(NamedTuple):
    """`Params` of a mixture, with the blocks of `outputs.Mixture`."""

    W_h: Array
    W_in: Array
    W_out: Array
    tau: Array
    nu: Array
    gate_in: Array
    gate_out: Array
    gate_user: Array

    @property
    def mixture(self) -> Mixture:
        """The mixture's own blocks."""
        return Mixture(*self[3:])


class RowGrad(NamedTuple):
    """A gradient of some rows: rows int32[M], unique in the first `count`; values real[M, ...]."""

    rows: Array
    values: Array
    count: int


class Grads(NamedTuple):
    """Gradients of the parameters: rows of W_h and W_in, the whole of W_out."""

    W_h: RowGrad
    W_in: RowGrad
    W_out: Array


class MixtureGrads(NamedTuple):
    """`Grads` of a mixture: rows of nu and gate_user, the whole of the other new blocks."""

    W_h: RowGrad
    W_in: RowGrad
    W_out: Array
    tau: Array
    nu: RowGrad
    gate_in: Array
    gate_out: Array
    gate_user: RowGrad


class Accumulators(NamedTuple):
    """State of RMSprop: mean squares shaped like `Params`, and what the dense row rule needs.

    stamp int64[I] is the step of each row of W_in's last update, step int64[1] the steps so far.
    """

    W_h: Array
    W_in: Array
    W_out: Array
    stamp: Array
    step: Array


class MixtureAccumulators(NamedTuple):
    """`Accumulators` of a mixture."""

    W_h: Array
    W_in: Array
    W_out: Array
    stamp: Array
    step: Array
    tau: Array
    nu: Array
    gate_in: Array
    gate_out: Array
    gate_user: Array

    @property
    def mixture(self) -> Mixture:
        """Mean squares of the mixture's own blocks."""
        return Mixture(*self[5:])


def shapes(spec: Spec, n_users: int, n_items: int) -> dict[str, tuple[int, ...]]:
    """Shape of each block of `Params`, or of `MixtureParams`."""
    D, G = spec.hidden_size, spec.gates
    matrices = n_users if spec.sharing == "collaborative" else 1
    blocks = {"W_h": (matrices, D, G * D), "W_in": (n_items, G * D), "W_out": (n_items, D)}
    if spec.output == "mixture":
        P, Q, K = spec.pointers, spec.gate_size, STATIC + spec.pointers
        blocks |= {
            "tau": (P, int(lag_buckets(spec.memory)[-1]) + 1, MATCHES),
            "nu": (n_users, P, MATCHES + 1),
            "gate_in": (len(FEATURES) + D, Q),
            "gate_out": (Q + 1, K),
            "gate_user": (n_users, K),
        }
    return blocks


def blank(spec: Spec, n_users: int, n_items: int) -> Params | MixtureParams:
    """Parameters that are 0."""
    kind = MixtureParams if spec.output == "mixture" else Params
    blocks = shapes(spec, n_users, n_items).values()
    return kind(*(np.zeros(shape, spec.dtype) for shape in blocks))


def initialise(spec: Spec, n_users: int, n_items: int, seed: int) -> Params | MixtureParams:
    """Parameters drawn from N(0, 1/D) (Section 2.3); each block has a stream of its own.

    The pointers of a mixture start as caches that forget, each slower than the one before and with
    more trust in matching contexts; its gate starts even, its users alike.
    """
    blocks = []
    for name, shape in shapes(spec, n_users, n_items).items():
        rng = np.random.default_rng([seed, *name.encode()])
        if name == "tau":
            bucket = lag_buckets(spec.memory)
            lag = np.bincount(bucket, np.log(np.arange(1, bucket.size + 1))) / np.bincount(bucket)
            p = np.arange(spec.pointers)[:, None, None]
            blocks.append(np.arange(MATCHES) * (p + 1) - lag[:, None] / (3 * p + 1))
        elif name in ("nu", "gate_user"):
            blocks.append(np.zeros(shape))
        elif name in ("gate_in", "gate_out"):
            scale = 1.0 if name == "gate_in" else 0.1
            blocks.append(rng.standard_normal(shape) * scale / np.sqrt(shape[0]))
        else:
            values = rng.standard_normal(shape, np.dtype(spec.dtype).type)
            blocks.append(values / values.dtype.type(np.sqrt(spec.hidden_size)))
    kind = MixtureParams if spec.output == "mixture" else Params
    return kind(*(block.astype(spec.dtype, copy=False) for block in blocks))


def new_accumulators(params: Params | MixtureParams) -> Accumulators | MixtureAccumulators:
    """RMSprop's state before the first step."""
    squares = [np.zeros_like(block) for block in params]
    counters = [np.zeros(len(params.W_in), np.int64), np.zeros(1, np.int64)]
    kind = MixtureAccumulators if isinstance(params, MixtureParams) else Accumulators
    return kind(*squares[:3], *counters, *squares[3:])


def on_device(backend: ModuleType, blocks: tuple | None) -> tuple | None:
    """A named tuple of arrays, or of such tuples, where a backend computes; None stays None.

    The same arrays where that is the host.
    """
    if blocks is None:
        return None
    parts = (
        on_device(backend, b) if isinstance(b, tuple) else backend.to_device(b) for b in blocks
    )
    return type(blocks)(*parts)


def _input_keep(backend: ModuleType, spec: Spec, window: Window, key: int) -> Array | None:
    if not spec.dropout_in:
        return None
    width = spec.gates * spec.hidden_size
    keep = dropout_keep(key, INPUT, *window.x.shape, width, spec.dropout_in, spec.dtype)
    return backend.to_device(keep)


def gather(
    backend: ModuleType, spec: Spec, params: Params, window: Window, key: int
) -> tuple[Array, Array]:
    """The rows that a window needs: A = W_in[x] with input dropout, and the users' W_h.

    Returns
    -------
    A : real[T, B, G*D]
    W_h : real[B or 1, D, G*D]
    """
    A = backend.take_rows(params.W_in, window.x.ravel()).reshape(*window.x.shape, -1)
    keep = _input_keep(backend, spec, window, key)
    A = A if keep is None else A * keep
    pooled = spec.sharing == "pooled"
    return A, params.W_h if pooled else backend.take_rows(params.W_h, window.user)


def scatter(
    backend: ModuleType, spec: Spec, window: Window, key: int, dA: Array, dW_h: Array
) -> tuple[RowGrad, RowGrad]:
    """Gradients of the rows that the window touched, the inverse of `gather`.

    Rows are touched by every event, with or without a target, and by nothing else.

    Returns
    -------
    dW_h, dW_in : RowGrad
    """
    keep = _input_keep(backend, spec, window, key)
    dA = dA if keep is None else dA * keep
    event = window.event > 0
    dW_in = backend.sum_rows(window.x[event], dA[event])
    if spec.sharing == "pooled":
        row = backend.to_device(np.zeros(1, np.int32))
        return RowGrad(row, dW_h, int(event.any())), dW_in
    users = event.any(axis=0)
    return backend.sum_rows(window.user[users], dW_h[users]), dW_in


def check_params(
    spec: Spec,
    n_users: int,
    n_items: int,
    params: Params | MixtureParams | None,
    accumulators: Accumulators | MixtureAccumulators | None,
) -> None:
    """Raise ModelError where parameters to go on from are not what a training writes to.

    Compiled code believes their shapes, types and order.
    """
    wanted = {name: (shape, spec.dtype) for name, shape in shapes(spec, n_users, n_items).items()}
    state = {"stamp": ((n_items,), "int64"), "step": ((1,), "int64")}
    for what, blocks, expected in (
        ("params", params, wanted),
        ("accumulators", accumulators, wanted | state),
    ):
        for name, (shape, dtype) in expected.items() if blocks is not None else ():
            block = getattr(blocks, name, None)
            found = getattr(block, "shape", None), str(getattr(block, "dtype", None))
            if found != (shape, dtype):
                raise ModelError(
                    f"{name} of {what} is {found[1]} {found[0]}, expected {dtype} {shape} with "
                    f"these settings, {n_users} users and {n_items} items"
                )
            if not (block.flags.c_contiguous and block.flags.writeable):
                raise ModelError(
                    f"{name} of {what} is a view or read-only: give a copy, which training can "
                    "write to"
                )


def check_ids(user_ids: Array, item_ids: Array, log: EventLog) -> None:
    """Raise ModelError where a log does not have a model's users and items, in the same order.

    DataError where it is no sound log (`data.check_log`).
    """
    check_log(log)
    for what, ours, theirs in (
        ("users", user_ids, log.user_ids),
        ("items", item_ids, log.item_ids),
    ):
        if not np.array_equal(ours, theirs):
            raise ModelError(
                f"the model knows {len(ours)} {what} and the data have {len(theirs)}, and they are "
                "not the same in the same order; use the data that the model was fitted on"
            )


def _pack(ids: Array) -> tuple[Array, Array]:
    encoded = [str(i).encode() for i in ids]
    ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends


def _unpack(text: Array, ends: Array) -> Array:
    whole = text.tobytes()
    starts = np.concatenate([[0], ends[:-1]])
    parts = (whole[a:b].decode() for a, b in zip(starts, ends, strict=True))
    return np.array(list(parts), dtype=object)


def save(
    path: str | os.PathLike,
    params: Params,
    acc: Accumulators | None,
    settings: dict[str, Any],
    user_ids: Array,
    item_ids: Array,
    history: EventLog | None = None,
) -> None:
    """Write one safetensors file: parameters, accumulators, settings and original ids.

    It is written beside `path` and renamed, so that a file is never half written.

    Parameters
    ----------
    history : EventLog, optional
        Sequences to keep with the model, of the same users and items.

    Raises
    ------
    ModelError
        The folder does not exist or cannot be written.
    """
    from safetensors.numpy import save_file

    arrays = {f"params.{k}": v for k, v in params._asdict().items()}
    if acc is not None:
        arrays |= {f"accumulators.{k}": v for k, v in acc._asdict().items()}
    for name, ids in (("user_ids", user_ids), ("item_ids", item_ids)):
        arrays[f"{name}.utf8"], arrays[f"{name}.ends"] = _pack(ids)
    if history is not None:
        kept = zip(HISTORY, history, strict=False)
        arrays |= {f"history.{k}": v for k, v in kept if v is not None}
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    # One entry: safetensors writes several in any order, and the file would not repeat.
    metadata = {FORMAT: json.dumps(settings, sort_keys=True)}
    try:
        part.touch()
        mode = part.stat().st_mode  # safetensors lets nobody else read what it writes
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, part, metadata)
        part.chmod(mode)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        raise ModelError(
            f"{path}: the model could not be written ({error}); "
            "choose a file name in an existing folder with enough space"
        ) from error


class Saved(NamedTuple):
    """What a model file holds."""

    params: Params
    accumulators: Accumulators | None
    settings: dict[str, Any]
    user_ids: Array
    item_ids: Array
    history: EventLog | None = None


def _read(path: str | os.PathLike, arrays: bool = True) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays and settings of a model file."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ModelError(f"{path}: no such model file; `crnn-np train` writes one")
    try:
        with safe_open(path, "numpy") as f:
            metadata = f.metadata() or {}
            names = f.keys() if arrays else ()
            found = {name: f.get_tensor(name) for name in names}
    except (SafetensorError, TypeError) as error:  # TypeError: a type that NumPy lacks
        raise ModelError(
            f"{path}: not a safetensors file of NumPy arrays, or cut short ({error})"
        ) from error
    if FORMAT not in metadata:
        there = ", ".join(map(repr, sorted(metadata))) or "nothing"
        raise ModelError(
            f"{path}: its header has {there}, expected {FORMAT!r}; "
            "was it written by another program or version?"
        )
    try:
        return found, dict(json.loads(metadata[FORMAT]))
    except (ValueError, TypeError) as error:
        raise ModelError(f"{path}: its settings can't be read ({error}): it is damaged") from error


def load_settings(path: str | os.PathLike) -> dict[str, Any]:
    """Settings in a file that `save` wrote, without its arrays.

    Raises
    ------
    ModelError
        There is no such file, or it is not a model of this package.
    """
    return _read(path, arrays=False)[1]


def load(path: str | os.PathLike, kind: type = Params) -> Saved:
    """Read a file that `save` wrote.

    Parameters
    ----------
    kind : NamedTuple type
        What ``params`` is: `Params`, or what a baseline has learned.

    Raises
    ------
    ModelError
        There is no such file, or it is not a model of this package.
    """
    arrays, settings = _read(path)
    mixture = kind is Params and "params.tau" in arrays
    kind = MixtureParams if mixture else kind
    try:
        params = kind(*(arrays[f"params.{k}"] for k in kind._fields))
        acc = None
        if "accumulators.step" in arrays:
            state = MixtureAccumulators if mixture else Accumulators
            acc = state(*(arrays[f"accumulators.{k}"] for k in state._fields))
        ids = [
            _unpack(arrays[f"{name}.utf8"], arrays[f"{name}.ends"])
            for name in ("user_ids", "item_ids")
        ]
        history = None
        if "history.indptr" in arrays:
            times = arrays.get("history.times")
            history = EventLog(arrays["history.indptr"], arrays["history.items"], times, *ids)
        return Saved(params, acc, settings, *ids, history)
    except KeyError as error:
        raise ModelError(f"{path}: the model file has no {error}") from error
    except ValueError as error:
        raise ModelError(f"{path}: its ids can't be read ({error}): it is damaged") from error


def check_blocks(
    path: str | os.PathLike,
    blocks: tuple,
    wanted: dict[str, tuple[int | str, ...]],
    **sizes: int,
) -> None:
    """Check the blocks of a named tuple that was read from a file.

    Parameters
    ----------
    wanted : dict
        Shape of each block, of sizes or their letters.
    **sizes
        Those of the letters that are known; another letter is the same size wherever it stands.

    Raises
    ------
    ModelError
        A block is not there, or of another shape.
    """
    found = {name: block.shape for name, block in blocks._asdict().items()}
    for name, letters in wanted.items():
        for n, size in zip(letters, found.get(name, ()), strict=False):
            if isinstance(n, str):
                sizes.setdefault(n, size)
        shape = tuple(sizes.get(n, n) for n in letters)
        if found.get(name) != shape:
            raise ModelError(
                f"{path}: {name} has the shape {found.get(name)} and not {shape}, as its settings "
                "and ids say: it is damaged, or was not written by this package"
            )


def check_saved(path: str | os.PathLike, saved: Saved, spec: Spec) -> None:
    """Raise ModelError where the arrays of a network's file do not fit its settings and ids."""
    n_users, n_items = len(saved.user_ids), len(saved.item_ids)
    wanted = shapes(spec, n_users, n_items)
    check_blocks(path, saved.params, wanted)
    if saved.accumulators is not None:
        wanted |= {"stamp": (n_items,), "step": (1,)}
        check_blocks(path, saved.accumulators, wanted)
    check_history(path, saved.history)


def check_history(path: str | os.PathLike, history: EventLog | None) -> None:
    """Raise ModelError where the sequences in a model file are not of its users and items."""
    if history is not None and not is_sound(history):
        raise ModelError(
            f"{path}: its sequences hold numbers out of range or order: it is damaged, or was not "
            "written by this package"
        )
