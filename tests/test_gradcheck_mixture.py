"""The gradient check fails on mistakes that one could make in the mixture output."""

import pytest
from test_gradcheck import REFERENCE, backend_with, twin

from crnn_np import gradcheck, outputs, training

TANH = {"tanh": gradcheck.CELLS["tanh"]}


@pytest.fixture
def failing(monkeypatch):
    """Blocks of the mixture that fail in one cell and one window, ragged and with dropout."""
    monkeypatch.setattr(gradcheck, "CELLS", TANH)
    monkeypatch.setattr(gradcheck, "OWN_BLOCKS", {"mixture": gradcheck.OWN_BLOCKS["mixture"]})
    monkeypatch.setattr(gradcheck, "CASES", gradcheck.CASES[3:4])

    def blocks(backend=None, gradients=training.gradients):
        rows = list(gradcheck.check(REFERENCE, backend, gradients))
        assert {row.sharing for row in rows} == {"collaborative", "pooled"}
        assert {row.block for row in rows} == {*gradcheck.BLOCKS, *outputs.Mixture._fields}
        return {row.block for row in rows if not row.passed}

    return blocks


def mutant(old, new):
    """A reference with one piece of `mixture_loss` exchanged."""
    wrong = twin(outputs, old, new, "def mixture_loss")
    return backend_with(mixture=wrong.mixture_loss)


def test_every_block_passes_in_the_reference(failing):
    assert failing() == set()


STATE = {"W_h", "W_in", "ds0", "dA"}  # what the gradient of h goes on to
POINTER, GATE = {"tau", "nu"}, {"gate_in", "gate_out", "gate_user"}
MUTATIONS = {
    "the pointer's target term dropped": (" - hit * pull)", ")", POINTER),
    "the pointer's target term with the wrong share": (
        "(g / total)[", "(np.sqrt(g) / total)[", POINTER,
    ),
    "the pointer's share in all of it dropped": (
        "alpha * (r[:, STATIC:].T[:, :, None] - hit * pull)", "alpha * (0 - hit * pull)", POINTER,
    ),
    "the pointer's distribution dropped": ("dscores = alpha * (", "dscores = (", POINTER),
    "the pointers' shares out of order": (
        "pull = (g / total)[:, STATIC:]", "pull = (g / total)[:, :STATIC-1:-1]", POINTER,
    ),
    "an expert's share for the pointer's": (
        "(r[:, STATIC:].T", "(r[:, STATIC - 1 : -1].T", POINTER,
    ),
    "nu's ramp left out": ("d @ ramps(memory)", "d.sum(axis=1)", {"nu"}),
    "nu's last column left out": ("dnu[:, k, -1] = d @ ramps(memory)", "pass", {"nu"}),
    "events of one match overwritten, not added": (
        "np.add.at(dnu[:, k], (n[:, None], match), d)", "dnu[n[:, None], k, match] = d", {"nu"},
    ),
    "events of one bucket overwritten, not added": (
        "np.add.at(dtau, (slice(None), lag_buckets(memory), match), dscores)",
        "dtau[:, lag_buckets(memory), match] = dscores.sum(axis=1, keepdims=True)",
        {"tau"},
    ),
    "the lag for its bucket": (
        "(slice(None), lag_buckets(memory), match)",
        "(slice(None), np.minimum(np.arange(memory), dtau.shape[1] - 1), match)",
        {"tau"},
    ),
    "r for g - r": ("dgate = g - r", "dgate = r", GATE | STATE),
    "r - g for g - r": ("dgate = g - r", "dgate = r - g", GATE | STATE),
    "g for g - r": ("dgate = g - r", "dgate = g", GATE | STATE),
    "the gate's hidden derivative missing": (
        " * (1 - hidden * hidden))[", ")[", {"gate_in"} | STATE,
    ),
    "the gate's hidden derivative of a sigmoid": (
        "(1 - hidden * hidden)", "hidden * (1 - hidden)", {"gate_in"} | STATE,
    ),
    "h's gradient through the gate dropped": (
        " + dgiven[:, -H.shape[1] :]", "", STATE,
    ),
    "the first counts' gradient for h's": (
        "dgiven[:, -H.shape[1] :]", "dgiven[:, : H.shape[1]]", STATE,
    ),
    "h's gradient through the softmax dropped": (
        "dlogits @ W_out + dgiven", "dgiven", STATE,
    ),
    "the softmax not scaled by r_0": ("P_0 * r[:, :1]", "P_0 * 1", {"W_out"} | STATE),
    "the softmax scaled by g_0": ("P_0 * r[:, :1]", "P_0 * g[:, :1]", {"W_out"} | STATE),
    "the softmax's target not scaled by r_0": (
        "dlogits[n, cells.y] -= r[:, 0]", "dlogits[n, cells.y] -= 1", {"W_out"} | STATE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_mixture_fails(name, failing):
    """In the blocks concerned, and in no other."""
    old, new, blocks = MUTATIONS[name]
    assert failing(mutant(old, new)) == blocks


IN_TRAINING = {
    "a user's gradients written to another user": (
        "backend.sum_rows(own.user,", "backend.sum_rows(own.user[::-1],", {"nu", "gate_user"},
    ),
    "rows of nu and gate_user not scaled": (
        "rows * scale)", "rows)", {"nu", "gate_user"},
    ),
    "tau not scaled": ("d.tau * scale", "d.tau", {"tau"}),
    "gate_in not scaled": ("d.gate_in * scale", "d.gate_in", {"gate_in"}),
    "gate_out not scaled": ("d.gate_out * scale", "d.gate_out", {"gate_out"}),
    "dropout left out of h's gradient": ("dH *= keep", "pass", STATE),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_TRAINING)
def test_a_wrong_use_of_the_mixture_fails(name, failing):
    old, new, blocks = IN_TRAINING[name]
    wrong = twin(training, old, new, "def gradients")
    assert failing(gradients=wrong.gradients) == blocks


def test_a_user_who_occurs_twice_is_summed(failing):
    """Rows of one user overwritten in `sum_rows`."""
    reference = backend_with()

    def sum_rows(index, values):
        grad = reference.sum_rows(index, values)
        last = {int(i): v for i, v in zip(index, values, strict=True)}
        for k in range(grad.count):
            grad.values[k] = last[int(grad.rows[k])]
        return grad

    assert {"nu", "gate_user"} <= failing(backend_with(sum_rows=sum_rows))
