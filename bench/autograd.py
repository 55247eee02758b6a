"""Gradients and training steps against PyTorch's automatic differentiation.

The model is stated once more in PyTorch in float64, straight from Eqs. 12-24, and differentiated
by machine. Both backends, in float64 and in float32, are held against it: the loss and every
gradient of one window, five steps of RMSprop one by one, and a run of windows as training does it.

    python -m pip install '.[bench,test]'
    python bench/autograd.py           # the table; exit status 1 on failure
    python -m pytest bench/autograd.py

The error of a block is max|b - b*| / max|b*|; that of a parameter after training is
max|w - w*| / max|w* - w at the start|. A limit for float32 is about four times the largest error
measured (NumPy 2.4, Numba 0.68, AVX-512).
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

from crnn_np import backends, data, gradcheck, model, optim, training, windows

LIMITS = {
    # what: (float64, float32)
    "gradients": (1e-12, 1e-5),
    "steps": (1e-10, 2e-4),
    "run": (1e-10, 1e-3),
}
torch.set_num_threads(1)  # its threads spin, and the products are small
BLOCKS = "W_h", "W_in", "W_out"
STEPS = 5


class Case(NamedTuple):
    """Shape of a window and what is special about it."""

    T: int
    B: int
    D: int
    I: int
    cell: str = "gru"
    candidate: str = "tanh"
    sharing: str = "collaborative"
    dropout: float = 0.0
    W_in_rows: str = "touched"

    @property
    def name(self) -> str:
        """Shape and settings on one line."""
        words = [f"T={self.T} B={self.B} D={self.D} I={self.I}", self.cell, self.sharing]
        words += ["candidate sigmoid"] if self.candidate == "sigmoid" else []
        words += [f"dropout {self.dropout}"] if self.dropout else []
        words += ["W_in dense"] if self.W_in_rows == "dense" else []
        return ", ".join(words)


CASES = [
    Case(128, 20, 32, 500, dropout=0.25),
    Case(128, 20, 32, 500, cell="tanh"),
    Case(128, 1, 32, 500, candidate="sigmoid"),
    Case(64, 20, 32, 500, candidate="sigmoid", W_in_rows="dense"),
    Case(64, 4, 48, 1003, sharing="pooled", dropout=0.5),
    Case(40, 3, 128, 700),
    Case(17, 5, 33, 65, dropout=0.1, W_in_rows="dense"),
    Case(9, 3, 7, 11, cell="tanh", sharing="pooled", dropout=0.3),
    Case(1, 1, 1, 2),
]


class Result(NamedTuple):
    """One row of the table."""

    what: str
    block: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """False also where the error is NaN."""
        return self.error <= self.limit


def new_state(spec: model.Spec, h: torch.Tensor, a: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """One step of a cell: h [B, D], a [B, G*D], W [B, D, G*D] -> [B, D]."""
    D = h.shape[1]
    if spec.cell == "tanh":
        return torch.tanh(a + torch.einsum("bd,bdk->bk", h, W))
    gates = torch.sigmoid(a[:, : 2 * D] + torch.einsum("bd,bdk->bk", h, W[:, :, : 2 * D]))
    z, r = gates[:, :D], gates[:, D:]
    g = torch.sigmoid if spec.candidate == "sigmoid" else torch.tanh
    c = g(a[:, 2 * D :] + torch.einsum("bd,bdk->bk", r * h, W[:, :, 2 * D :]))
    return (1 - z) * h + z * c


class Peer:
    """The model, its accumulators and its gradients in PyTorch, float64."""

    def __init__(self, spec: model.Spec, params: model.Params):
        self.spec = spec
        self.params = [torch.tensor(p, dtype=torch.float64, requires_grad=True) for p in params]
        self.squares = [torch.zeros_like(p) for p in self.params]

    def masks(self, shape: tuple[int, int], key: int) -> list[torch.Tensor | float]:
        """The project's own dropout masks, for A and for H."""
        D, G, keep = self.spec.hidden_size, self.spec.gates, windows.dropout_keep
        rates = (
            (windows.INPUT, G * D, self.spec.dropout_in),
            (windows.OUTPUT, D, self.spec.dropout_out),
        )
        return [
            torch.tensor(keep(key, stream, *shape, width, p, "float64")) if p else 1.0
            for stream, width, p in rates
        ]

    def differentiate(
        self, s0: np.ndarray, window: windows.Window, key: int, scale: float
    ) -> tuple[float, dict[str, np.ndarray], np.ndarray]:
        """Loss, gradients by name (of scale * loss) and last state [B, D]."""
        W_h, W_in, W_out = self.params
        user, x, y = (torch.tensor(f).long() for f in window[:3])
        event, target, carry = (torch.tensor(f) > 0 for f in window[3:6])
        keep_in, keep_out = self.masks(x.shape, key)
        start = torch.tensor(s0[0], dtype=torch.float64, requires_grad=True)
        A = W_in[x] * keep_in
        A.retain_grad()
        W = W_h[user] if len(W_h) > 1 else W_h.expand(len(user), -1, -1)
        h, path = start, []
        for t in range(len(x)):
            h = torch.where(carry[t, :, None], h, torch.full_like(h, self.spec.init_state))
            h = torch.where(event[t, :, None], new_state(self.spec, h, A[t], W), h)
            path.append(h)
        logits = (torch.stack(path) * keep_out)[target] @ W_out.T
        loss = torch.nn.functional.cross_entropy(logits, y[target], reduction="sum")
        blocks = {**dict(zip(BLOCKS, self.params, strict=True)), "s0": start, "A": A}
        grads = torch.autograd.grad(scale * loss, list(blocks.values()))
        named = {name: g.numpy() for name, g in zip(blocks, grads, strict=True)}
        return loss.item(), named, h.detach().numpy()

    def step(
        self, rule: optim.Rule, s0: np.ndarray, window: windows.Window, key: int, scale: float
    ) -> tuple[float, np.ndarray]:
        """One step of RMSprop on whole arrays, the rows that take no part masked out."""
        loss, grads, s_T = self.differentiate(s0, window, key, scale)
        event = window.event > 0
        part = [torch.zeros(len(p), dtype=torch.bool) for p in self.params]
        part[0][window.user[event.any(axis=0)] if len(part[0]) > 1 else slice(None)] = True
        part[1][window.x[event] if rule.W_in_rows == "touched" else slice(None)] = True
        part[2][:] = True
        with torch.no_grad():
            for name, p, ms, rows in zip(BLOCKS, self.params, self.squares, part, strict=True):
                g = torch.tensor(grads[name])[rows]
                ms[rows] = rule.rho * ms[rows] + (1 - rule.rho) * g**2
                p[rows] -= rule.learning_rate * g / torch.sqrt(ms[rows] + rule.eps)
        return loss, s_T


def difference(ours: np.ndarray, exact: np.ndarray, size: np.ndarray | float) -> float:
    """Largest difference, relative to the largest element of `size`."""
    return float(np.max(np.abs(ours - exact)) / np.max(np.abs(size)))


class Setting:
    """A case with its sequences, parameters and windows, all drawn from one seed."""

    def __init__(self, case: Case, dtype: str):
        rng = np.random.default_rng(1)
        self.spec = model.Spec(
            hidden_size=case.D,
            cell=case.cell,
            candidate=case.candidate,
            sharing=case.sharing,
            init_state=0.1,
            dropout_in=case.dropout,
            dropout_out=case.dropout / 2,
            dtype=dtype,
        )
        self.rule = optim.Rule(0.0075, 0.997, 1e-8, W_in_rows=case.W_in_rows)
        self.plan = windows.Plan(batch=case.B, window=case.T, loss_scale="mean", seed=2)
        n_users = case.B + 2
        lengths = rng.integers(max(case.T // 2, 2), STEPS * case.T // 2 + 3, n_users)
        self.log = data.from_sequences([rng.integers(0, case.I, n) for n in lengths], case.I)
        self.params = model.initialise(self.spec, n_users, case.I, 3)
        self.run = windows.epoch_slices(self.plan, self.log.lengths, 1)

    def fresh(self) -> tuple[model.Params, model.Accumulators, Peer]:
        """Parameters before training, for the package and for the peer."""
        params = model.Params(*(p.copy() for p in self.params))
        return params, model.new_accumulators(params), Peer(self.spec, self.params)

    def window(self, k: int) -> tuple[windows.Window, int]:
        """Window k of the epoch and its key."""
        piece = self.run.one(k)
        return windows.window(self.log, piece, self.spec.dtype), piece.key

    def start(self) -> np.ndarray:
        """The state before an epoch, [1, B, D]."""
        return np.zeros((1, self.plan.batch, self.spec.hidden_size), self.spec.dtype)


def check_gradients(backend: str, setting: Setting, limit: float) -> Iterator[Result]:
    """Loss and gradients of the second window, the state carried into it."""
    _, _, peer = setting.fresh()
    module = backends.get(backend)
    first, second = setting.window(0), setting.window(min(1, setting.run.key.size - 1))
    s0 = peer.differentiate(setting.start(), *first, 1.0)[2][None].astype(setting.spec.dtype)
    loss, grads, ds0, dA, s_T = training.gradients(
        module, setting.spec, setting.params, s0, *second, 0.5
    )
    exact_loss, exact, exact_s_T = peer.differentiate(s0, *second, 0.5)
    ours = {
        "W_h": gradcheck.dense(grads.W_h, setting.params.W_h.shape),
        "W_in": gradcheck.dense(grads.W_in, setting.params.W_in.shape),
        "W_out": grads.W_out,
        "s0": ds0[0],
        "A": dA,
    }
    yield Result("gradients", "loss", abs(loss / exact_loss - 1), limit)
    for block, exact_block in exact.items():
        # A cell whose column starts anew has no gradient into the window's first state.
        size = exact_block if exact_block.any() else 1.0
        yield Result("gradients", block, difference(ours[block], exact_block, size), limit)
    yield Result("gradients", "s_T", difference(s_T[0], exact_s_T, exact_s_T), limit)


def compare_training(
    what: str,
    setting: Setting,
    params: model.Params,
    acc: model.Accumulators,
    peer: Peer,
    limit: float,
) -> Iterator[Result]:
    """Parameters and accumulators after training."""
    squares = list(acc[:3])
    if setting.rule.W_in_rows == "dense":
        owed = acc.step[0] - acc.stamp
        squares[1] = squares[1] * (setting.rule.rho**owed)[:, None]
    for block, ours, exact, before in zip(BLOCKS, params, peer.params, setting.params, strict=True):
        exact = exact.detach().numpy()
        yield Result(what, block, difference(ours, exact, exact - before), limit)
    for block, ours, exact in zip(BLOCKS, squares, peer.squares, strict=True):
        yield Result(what, f"ms of {block}", difference(ours, exact.numpy(), exact.numpy()), limit)


def check_steps(backend: str, setting: Setting, limit: float) -> Iterator[Result]:
    """Five windows through `training.step`; the peer carries its own state."""
    params, acc, peer = setting.fresh()
    s, exact_s = setting.start(), setting.start().astype(float)
    worst = 0.0
    for k in range(min(STEPS, setting.run.key.size)):
        window, key = setting.window(k)
        scale = setting.plan.scale
        loss, _, s = training.step(
            backends.get(backend), setting.spec, setting.rule, params, acc, s, window, key, scale
        )
        exact_loss, s_T = peer.step(setting.rule, exact_s, window, key, scale)
        exact_s = s_T[None]
        if exact_loss:
            worst = max(worst, abs(loss / exact_loss - 1))
    yield Result("steps", "loss", worst, limit)
    yield from compare_training("steps", setting, params, acc, peer, limit)


def check_run(backend: str, setting: Setting, limit: float) -> Iterator[Result]:
    """A whole epoch of up to twenty windows through `training.train_run`."""
    params, acc, peer = setting.fresh()
    module = backends.get(backend)
    run = setting.run.part(0, 20)
    s, exact_s, exact_loss = setting.start(), setting.start().astype(float), 0.0
    work = training.workspace(module, setting.spec, setting.plan, setting.log)
    scale = setting.plan.scale
    loss, _ = training.train_run(
        module, setting.spec, setting.rule, scale, params, acc, s, setting.log, run, work
    )
    for k in range(run.key.size):
        window_loss, s_T = peer.step(setting.rule, exact_s, *setting.window(k), scale)
        exact_s, exact_loss = s_T[None], exact_loss + window_loss
    yield Result("run", "loss", abs(loss / exact_loss - 1), limit)
    yield Result("run", "s_T", difference(s[0], exact_s[0], exact_s), limit)
    yield from compare_training("run", setting, params, acc, peer, limit)


def check(case: Case, backend: str, dtype: str) -> Iterator[Result]:
    """All checks of one case."""
    setting = Setting(case, dtype)
    column = 0 if dtype == "float64" else 1
    yield from check_gradients(backend, setting, LIMITS["gradients"][column])
    yield from check_steps(backend, setting, LIMITS["steps"][column])
    yield from check_run(backend, setting, LIMITS["run"][column])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_against_automatic_differentiation(case: Case, backend: str, dtype: str) -> None:
    """The rows of the table that `main` prints."""
    failed = [result for result in check(case, backend, dtype) if not result.passed]
    assert not failed


def main() -> int:
    """Print the table; 1 if anything failed, else 0."""
    failures = 0
    for case in CASES:
        print(case.name)
        for backend in ("numpy", "numba"):
            for dtype in ("float64", "float32"):
                for what, block, error, limit in (results := list(check(case, backend, dtype))):
                    verdict = "ok" if error <= limit else "FAILED"
                    print(
                        f"  {backend:6} {dtype:8} {what:10} {block:12} {error:9.1e} {limit:9.1e}"
                        f"  {verdict}"
                    )
                failures += sum(not result.passed for result in results)
    print(f"{failures} failed" if failures else "all passed")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
