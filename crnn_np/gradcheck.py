"""Check every gradient: ``python -m crnn_np.gradcheck``.

The NumPy reference is held against the complex-step derivative of its own forward pass
(Squire and Trapp, 1998), ``Im f(x + ih) / h`` with h = 1e-30, which has no cancellation; every
other backend is held against the reference. The error of a block is max|g - g*| / max|g*|; a
block whose largest |g*| is below 1e-6 is a broken test case and fails too.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import product
from types import ModuleType
from typing import NamedTuple

import click
import numpy as np

from . import backends, training
from .cells import CELLS
from .data import EventLog, from_sequences
from .errors import DeviceError
from .evaluation import read_past, target_cells
from .history import Past
from .model import Params, RowGrad, Spec, gather, initialise, on_device
from .outputs import Mixture
from .windows import OUTPUT, Window, dropout_keep

Array = np.ndarray

STEP = 1e-30
AT_ONCE = 64  # perturbations in one forward pass
SMALLEST = 1e-6
BLOCKS = ("W_h", "W_in", "W_out", "ds0", "dA")
OWN_BLOCKS = {"softmax": (), "mixture": Mixture._fields}  # of an output layer
USERS, ITEMS, D = 4, 6, 3
BEFORE = 9  # events of a user before the window
KEY = np.uint64(20160)


class Limit(NamedTuple):
    """The most that a backend in a dtype may differ from its oracle."""

    backend: str
    dtype: str
    against: str
    limit: float


LIMITS = (
    Limit("numpy", "float64", "complex step", 1e-12),
    Limit("numba", "float64", "numpy float64", 1e-11),
    Limit("numba", "float32", "numpy float64", 2e-6),  # measured: 8e-7
    Limit("cupy", "float64", "numpy float64", 1e-11),
    Limit("cupy", "float32", "numpy float64", 2e-6),  # measured on the emulated device: 8e-7
)


class Case(NamedTuple):
    """One window with everything that can go wrong in it."""

    T: int
    B: int
    ragged: bool
    resets: bool
    dropout: float
    init: float
    scale: float


CASES = (
    Case(1, 3, False, False, 0.0, 0.0, 1.0),
    Case(2, 3, False, True, 0.3, 0.2, 1.0),
    Case(7, 3, True, True, 0.0, 0.2, 1.0),
    Case(7, 3, True, True, 0.4, 0.0, 1.0 / 21),
    Case(128, 2, True, True, 0.0, -0.1, 1.0),
    Case(128, 2, True, False, 0.25, 0.0, 1.0 / 256),
)


class Row(NamedTuple):
    """A line of the table: the worst case of one block."""

    backend: str
    dtype: str
    cell: str
    sharing: str
    output: str
    block: str
    shape: tuple[int, ...]
    largest: float
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit and self.largest >= SMALLEST


def make_window(case: Case, rng: np.random.Generator) -> Window:
    """A window in float64: items occur twice, columns end early or pause, sequences start anew."""
    T, B = case.T, case.B
    x = rng.integers(0, ITEMS - 1, (T, B)).astype(np.int32)
    if B > 1:
        x[:, 1] = x[:, 0]
    y = rng.integers(0, ITEMS - 1, (T, B)).astype(np.int32)
    event, target, carry = np.ones((3, T, B))
    if case.ragged:
        event[T - T // 3 :, 0] = event[T // 3, 0] = 0
        target[T - T // 3 - 1 :, 0] = target[T // 3, 0] = 0
        target[T // 2, 1] = 0
    if case.resets:
        carry[T // 2, 1] = 0
        carry[0, B - 1] = 0
    x[event == 0], y[target == 0] = 0, 0
    user = rng.permutation(USERS)[:B].astype(np.int32)
    return Window(user, x, y, event, target, carry)


def in_a_log(window: Window, rng: np.random.Generator) -> tuple[Window, EventLog]:
    """The window as a stretch of a log, in which a mixture finds the past of its events."""
    T, B = window.x.shape
    sequences = [rng.integers(0, ITEMS - 1, T + BEFORE + 1) for _ in range(USERS)]
    for user, x, y, event in zip(window.user, window.x.T, window.y.T, window.event.T, strict=True):
        sequences[user][BEFORE:-1] = np.where(event > 0, x, sequences[user][BEFORE:-1])
        sequences[user][-1] = y[-1]
    log = from_sequences(sequences, n_items=ITEMS)
    at = np.where(window.event > 0, log.indptr[window.user] + BEFORE + np.arange(T)[:, None], 0)
    y = np.where(window.target > 0, log.items[at + 1], 0).astype(np.int32)
    return window._replace(y=y, at=at), log


def complex_step(
    spec: Spec, params: Params, s0: Array, window: Window, case: Case, past: Past | None
) -> dict:
    """Derivative of the reference's loss with respect to every element of every block.

    Perturbed copies of the window stand side by side as further columns.

    Returns
    -------
    dict
        Block name to float64 array; W_h and W_in as whole tables.
    """
    reference = backends.get("numpy")
    A0, W_h0 = gather(reference, spec, params, window, KEY)
    T, B, width = A0.shape
    cells = window.target > 0
    keep = 1.0
    if spec.dropout_out:
        keep = dropout_keep(KEY, OUTPUT, T, B, spec.hidden_size, spec.dropout_out, "float64")

    def loss(H: Array, W_out: Array, blocks: Mixture) -> complex:
        if spec.output == "mixture":
            own = target_cells(window)
            return reference.mixture(H, W_out, blocks, own, past, spec.memory)[0]
        return reference.output(spec.output, H, W_out, window.y[cells])[0]

    def losses(
        perturb: Callable[[int, Array, Array, Array, Array], None], start: int, stop: int
    ) -> Array:
        P = stop - start
        A = np.repeat(A0[None], P, axis=0).astype(complex)
        W_h = np.repeat(np.broadcast_to(W_h0, (B, *W_h0.shape[1:]))[None], P, 0).astype(complex)
        s = np.repeat(s0[0][None], P, axis=0).astype(complex)
        W_out = np.repeat(params.W_out[None], P, axis=0).astype(complex)
        for p in range(P):
            perturb(start + p, A[p], W_h[p], s[p], W_out[p])
        side_by_side = A.transpose(1, 0, 2, 3).reshape(T, P * B, width)
        states, _ = reference.cell_forward(
            spec.cell_kind,
            s.reshape(1, P * B, -1),
            spec.init_state,
            side_by_side,
            W_h.reshape(P * B, *W_h0.shape[1:]),
            np.tile(window.event, P),
            np.tile(window.carry, P),
        )
        H = states[1:, 0].reshape(T, P, B, -1)
        own = params.mixture if spec.output == "mixture" else None
        out = [loss((H[:, p] * keep)[cells], W_out[p], own) for p in range(P)]
        return np.array(out).imag * case.scale / STEP

    def derivative(shape: tuple[int, ...], perturb: Callable) -> Array:
        size = int(np.prod(shape))
        parts = [losses(perturb, i, min(i + AT_ONCE, size)) for i in range(0, size, AT_ONCE)]
        return np.concatenate(parts).reshape(shape)

    h = 1j * STEP
    keep_in = gather(reference, spec, params._replace(W_in=np.ones_like(params.W_in)), window, KEY)
    keep_in = keep_in[0]
    pooled = spec.sharing == "pooled"
    matrix = np.prod(params.W_h.shape[1:])

    def in_W_h(i, A, W_h, s, W_out):
        owner, element = divmod(i, matrix)
        columns = slice(None) if pooled else window.user == owner
        W_h[columns, *np.unravel_index(element, params.W_h.shape[1:])] += h

    def in_W_in(i, A, W_h, s, W_out):
        item, column = divmod(i, width)
        A[..., column] += h * keep_in[..., column] * ((window.x == item) & (window.event > 0))

    def in_W_out(i, A, W_h, s, W_out):
        W_out.flat[i] += h

    def in_s0(i, A, W_h, s, W_out):
        s.flat[i] += h

    def in_A(i, A, W_h, s, W_out):
        A.flat[i] += h

    def in_output(name: str) -> Array:
        states = reference.cell_forward(
            spec.cell_kind, s0, spec.init_state, A0, W_h0, window.event, window.carry
        )[0]
        H, block = (states[1:, 0] * keep)[cells], getattr(params, name)
        found = np.empty(block.size)
        for i in range(block.size):
            changed = block.astype(complex)
            changed.flat[i] += h
            own = params.mixture._replace(**{name: changed})
            found[i] = loss(H, params.W_out, own).imag * case.scale / STEP
        return found.reshape(block.shape)

    return {
        "W_h": derivative(params.W_h.shape, in_W_h),
        "W_in": derivative(params.W_in.shape, in_W_in),
        "W_out": derivative(params.W_out.shape, in_W_out),
        **{name: in_output(name) for name in OWN_BLOCKS[spec.output]},
        "ds0": derivative(s0.shape, in_s0),
        "dA": derivative(A0.shape, in_A),
    }


def dense(grad: RowGrad, shape: tuple[int, ...]) -> Array:
    """The rows of a gradient in an array of the parameter's shape."""
    table = np.zeros(shape, grad.values.dtype)
    rows = grad.rows[: grad.count]
    assert np.unique(rows).size == rows.size, "rows of a RowGrad are unique"
    table[rows] = grad.values[: grad.count]
    return table


def by_hand(
    backend: ModuleType,
    spec: Spec,
    params: Params,
    s0: Array,
    window: Window,
    case: Case,
    past: Past | None = None,
    gradients: Callable = training.gradients,
) -> dict[str, Array]:
    """The hand-written gradients of one window in a backend, as whole tables."""
    dtype = np.dtype(spec.dtype)
    real = {k: getattr(window, k).astype(dtype) for k in ("event", "target", "carry")}
    there = {k: v for k, v in window._replace(**real)._asdict().items() if v is not None}
    window = Window(**{k: backend.to_device(v) for k, v in there.items()})
    params = on_device(backend, type(params)(*(block.astype(dtype) for block in params)))
    s0, past = backend.to_device(s0.astype(dtype)), on_device(backend, past)
    _, grads, ds0, dA, _ = gradients(backend, spec, params, s0, window, KEY, case.scale, past)
    blocks = {}
    for name, grad in grads._asdict().items():
        if isinstance(grad, RowGrad):
            rows, values = map(backend.to_host, grad[:2])
            blocks[name] = dense(RowGrad(rows, values, grad.count), getattr(params, name).shape)
        else:
            blocks[name] = backend.to_host(grad)
    return {**blocks, "ds0": backend.to_host(ds0), "dA": backend.to_host(dA)}


def setting(case: Case, cell: str, sharing: str, output: str):
    """Spec, float64 parameters, state, window and past of a case."""
    name, _, candidate = cell.partition("-")
    spec = Spec(
        hidden_size=D,
        cell=name,
        sharing=sharing,
        candidate=candidate or "tanh",
        output=output,
        init_state=case.init,
        dropout_in=case.dropout,
        dropout_out=case.dropout,
        pointers=2,
        memory=12,
        gate_size=3,
        dtype="float64",
    )
    rng = np.random.default_rng([case.T, len(cell), len(sharing)])
    params = initialise(spec, USERS, ITEMS, seed=7)
    s0, window = rng.normal(0, 0.5, (1, case.B, D)), make_window(case, rng)
    if output == "softmax":
        return spec, params, s0, window, None
    window, log = in_a_log(window, rng)
    own = {name: rng.normal(0, 0.5, getattr(params, name).shape) for name in Mixture._fields}
    return spec, params._replace(**own), s0, window, read_past(spec, log)


def block_error(found: Array, wanted: Array) -> float:
    """max|g - g*| / max|g*|; infinite where a value is not a number."""
    error = np.abs(found - wanted).max() / max(np.abs(wanted).max(), np.finfo(float).tiny)
    return float(error) if np.isfinite(error) else np.inf


@cache
def oracle(against: str, case: Case, cell: str, sharing: str, output: str) -> dict[str, Array]:
    """What the gradients of a case must be."""
    spec, params, s0, window, past = setting(case, cell, sharing, output)
    if against == "complex step":
        return complex_step(spec, params, s0, window, case, past)
    return by_hand(backends.get("numpy"), spec, params, s0, window, case, past)


def check(
    limit: Limit, backend: ModuleType | None = None, gradients: Callable = training.gradients
) -> Iterator[Row]:
    """Rows of the table for one backend and dtype.

    Parameters
    ----------
    limit : Limit
    backend : module, optional
        Stands in for ``limit.backend``; with `gradients`, the way in for mutation tests.
    """
    backend = backend or backends.get(limit.backend)
    for cell, sharing, output in product(CELLS, ("collaborative", "pooled"), OWN_BLOCKS):
        worst: dict[str, Row] = {}
        for case in CASES:
            spec, params, s0, window, past = setting(case, cell, sharing, output)
            wanted = oracle(limit.against, case, cell, sharing, output)
            own = replace(spec, dtype=limit.dtype)
            found = by_hand(backend, own, params, s0, window, case, past, gradients)
            for block in wanted:
                largest = float(np.abs(wanted[block]).max())
                error = block_error(found[block], wanted[block])
                row = Row(
                    limit.backend,
                    limit.dtype,
                    cell,
                    sharing,
                    output,
                    block,
                    wanted[block].shape,
                    largest,
                    error,
                    limit.limit,
                )
                old = worst.get(block)
                if old is None or (row.passed, -row.error) < (old.passed, -old.error):
                    worst[block] = row
        yield from worst.values()


def _fault(backend: str) -> str | None:
    """Why a backend can't compute on this machine; None where it can."""
    try:
        backends.get(backend).to_device(np.zeros(1))
    except DeviceError as error:
        return str(error)
    return None


@click.command()
@click.option(
    "--backend",
    "names",
    multiple=True,
    type=click.Choice(tuple(backends.MODULES)),
    help="Check this backend only; may be given more than once.",
)
def main(names: tuple[str, ...]) -> None:
    """Check the gradient of every block, cell, sharing and output layer, in every backend.

    Each line shows a block's worst case out of windows of 1, 2, 7 and 128 steps, with items that
    occur more than once, ragged ends, sequences that start in the middle, dropout, a state that
    does not start at 0, and both loss scales. Exit status 1 if a line fails, or a backend that was
    asked for is not there.
    """
    click.echo(
        f"{'backend':8} {'dtype':8} {'cell':12} {'sharing':14} {'output':8} {'block':9} "
        f"{'shape':14} {'max|g*|':>8} {'error':>8} {'limit':>8}"
    )
    failed = count = 0
    faults = {name: _fault(name) for name in names or backends.MODULES}
    missing = {name: fault for name, fault in faults.items() if fault}
    for limit in LIMITS:
        if limit.backend in missing or limit.backend not in faults:
            continue
        click.echo(f"-- {limit.backend} {limit.dtype} against {limit.against}")
        for row in check(limit):
            count += 1
            failed += not row.passed
            shape = "x".join(map(str, row.shape))
            verdict = "ok" if row.passed else "FAILED"
            if row.largest < SMALLEST:
                verdict += " (broken test case: the gradient vanishes)"
            click.echo(
                f"{row.backend:8} {row.dtype:8} {row.cell:12} {row.sharing:14} {row.output:8} "
                f"{row.block:9} {shape:14} {row.largest:8.1e} {row.error:8.1e} {row.limit:8.0e} "
                f"{verdict}"
            )
    for name, fault in missing.items():
        click.echo(f"-- {name}: not checked: {fault}")
    click.echo(f"{count - failed} of {count} blocks passed")
    sys.exit(1 if failed or (names and missing) else 0)


if __name__ == "__main__":
    main()
