"""The collaborative GRU of Eqs. 21-24 in PyTorch, as the peers of `peers.py`.

A contender is made from the numbers of users and items, D, the settings of RMSprop and the number
of users side by side; `run` trains on windows (users int64[B], x int64[B, T + 1]). Everything is
made on PyTorch's default device, where the windows must be too.
"""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.functional import cross_entropy, embedding

Windows = Iterable[tuple[torch.Tensor, torch.Tensor]]


CHUNK = 16  # steps that torch.compile unrolls; all 128 take minutes to compile


def recurrence(W, A, h):
    """States [B, T, D] of the GRU with W_h of each user, W [B, D, 3D], from A = W_in[x]."""
    D = h.shape[2]
    W_zr, W_c = W[:, :, : 2 * D], W[:, :, 2 * D :]
    states = []
    for t in range(A.shape[1]):
        zr = torch.sigmoid(torch.bmm(h, W_zr) + A[:, t : t + 1, : 2 * D])
        z, r = zr.chunk(2, -1)
        new = torch.tanh(torch.bmm(r * h, W_c) + A[:, t : t + 1, 2 * D :])
        h = h + z * (new - h)
        states.append(h)
    return torch.cat(states, 1)


def output_loss(H, W_out, y):
    """Mean loss over the cells of a window."""
    return cross_entropy(H.reshape(-1, H.shape[2]) @ W_out.T, y.reshape(-1))


def half_loss(H, W_out, y):
    """`output_loss` with the factors of its three products in bfloat16, and its logits."""
    logits = H.reshape(-1, H.shape[2]).bfloat16() @ W_out.bfloat16().T
    return cross_entropy(logits.float(), y.reshape(-1))


def normal(*shape: int, D: int) -> torch.Tensor:
    return torch.randn(*shape) / math.sqrt(D)


class Eager:
    """What a user writes with care: one parameter for each user, torch.optim.RMSprop."""

    def __init__(self, users: int, items: int, D: int, rule, B: int) -> None:
        self.W_in = nn.Parameter(normal(items, 3 * D, D=D))
        self.W_out = nn.Parameter(normal(items, D, D=D))
        self.W_h = [nn.Parameter(normal(D, 3 * D, D=D)) for _ in range(users)]
        self.optimiser = torch.optim.RMSprop(
            [self.W_in, self.W_out, *self.W_h], lr=rule.learning_rate, alpha=rule.rho, eps=rule.eps
        )
        self.h = torch.zeros(B, 1, D)

    def run(self, windows: Windows) -> None:
        for user, x in windows:
            self.optimiser.zero_grad(set_to_none=True)
            W = torch.stack([self.W_h[u] for u in user.tolist()])
            H = recurrence(W, embedding(x[:, :-1], self.W_in), self.h)
            self.h = H[:, -1:].detach()
            output_loss(H, self.W_out, x[:, 1:]).backward()
            self.optimiser.step()


class Rows:
    """RMSprop in place, with the numbers of `rule`."""

    def rmsprop(self, w, ms, g):
        rule = self.rule
        ms.mul_(rule.rho).addcmul_(g, g, value=1 - rule.rho)
        w.addcdiv_(g, (ms + rule.eps).sqrt_(), value=-rule.learning_rate)

    def move_rows(self, w, ms, rows, g):
        some, squares = w[rows], ms[rows]
        self.rmsprop(some, squares, g)
        w[rows], ms[rows] = some, squares

    def move_items(self, w, ms, x, dA):
        """Move the rows x by the gradients of A = w[x]."""
        rows, place = torch.unique(x.reshape(-1), return_inverse=True)
        g = dA.new_zeros(rows.numel(), dA.shape[2])
        g.index_add_(0, place, dA.reshape(-1, dA.shape[2]))
        self.move_rows(w, ms, rows, g)


class ByHand(Rows):
    """Automatic differentiation of a window, everything around it by hand.

    Only the window's rows of W_in and W_h have gradients and move; RMSprop is in place.
    """

    compiled, output_loss = False, staticmethod(output_loss)

    def __init__(self, users: int, items: int, D: int, rule, B: int) -> None:
        self.W_in, self.W_out = normal(items, 3 * D, D=D), normal(items, D, D=D)
        self.W_h = normal(users, D, 3 * D, D=D)
        self.squares = [torch.zeros_like(w) for w in (self.W_h, self.W_in, self.W_out)]
        self.h, self.rule = torch.zeros(B, 1, D), rule
        compiled = torch.compile if self.compiled else lambda f, **options: f
        self.recurrence = compiled(recurrence, dynamic=False)
        self.loss = compiled(self.output_loss, dynamic=False)
        self.move = compiled(self.rmsprop, dynamic=False)

    def run(self, windows: Windows) -> None:
        for user, x in windows:
            W, A = self.W_h[user], self.W_in[x[:, :-1]]
            leaves = [leaf.requires_grad_() for leaf in (W, A, self.W_out)]
            h, states = self.h, []
            for some in A.split(CHUNK, dim=1):
                states.append(self.recurrence(W, some, h))
                h = states[-1][:, -1:]
            self.h = h.detach()
            loss = self.loss(torch.cat(states, 1), self.W_out, x[:, 1:])
            dW, dA, dW_out = torch.autograd.grad(loss, leaves)
            with torch.no_grad():
                self.W_out.requires_grad_(False)
                self.move(self.W_out, self.squares[2], dW_out)
                self.move_rows(self.W_h, self.squares[0], user, dW)
                self.move_items(self.W_in, self.squares[1], x[:, :-1], dA)


class Compiled(ByHand):
    """The same with torch.compile around the loss and around RMSprop of W_out."""

    compiled = True


class CompiledHalf(Compiled):
    """The same with the products of the output layer in bfloat16."""

    output_loss = staticmethod(half_loss)


class Pooled:
    """Another model, for scale: one nn.GRU for all users, with torch's fused loop over steps."""

    def __init__(self, users: int, items: int, D: int, rule, B: int) -> None:
        self.W_in, self.gru = nn.Embedding(items, D), nn.GRU(D, D, batch_first=True)
        self.W_out = nn.Linear(D, items, bias=False)
        parameters = nn.ModuleList([self.W_in, self.gru, self.W_out]).parameters()
        self.optimiser = torch.optim.RMSprop(
            parameters, lr=rule.learning_rate, alpha=rule.rho, eps=rule.eps
        )
        self.h = torch.zeros(1, B, D)

    def run(self, windows: Windows) -> None:
        for _, x in windows:
            self.optimiser.zero_grad(set_to_none=True)
            H, h = self.gru(self.W_in(x[:, :-1]), self.h)
            loss = cross_entropy(self.W_out(H.reshape(-1, H.shape[2])), x[:, 1:].reshape(-1))
            loss.backward()
            self.optimiser.step()
            self.h = h.detach()


class PooledByHand(Rows, Pooled):
    """The same, but only the rows of W_in that a window touches have gradients and move."""

    def __init__(self, users: int, items: int, D: int, rule, B: int) -> None:
        super().__init__(users, items, D, rule, B)
        self.rule, self.squares = rule, torch.zeros(items, D)
        self.W_in.requires_grad_(False)

    def run(self, windows: Windows) -> None:
        for _, x in windows:
            self.optimiser.zero_grad(set_to_none=True)
            A = self.W_in(x[:, :-1]).requires_grad_()
            H, h = self.gru(A, self.h)
            cross_entropy(self.W_out(H.reshape(-1, H.shape[2])), x[:, 1:].reshape(-1)).backward()
            self.optimiser.step()
            self.h = h.detach()
            self.move_items(self.W_in.weight, self.squares, x[:, :-1], A.grad)
