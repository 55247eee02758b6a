"""The gradient check passes on the code, and fails on the mistakes that others made in it."""

import inspect
import types

import pytest
from click.testing import CliRunner

from crnn_np import backends, cells, gradcheck, model, training
from crnn_np.backends import reference
from crnn_np.errors import DeviceError

REFERENCE = gradcheck.LIMITS[0]
OWN_BLOCKS = gradcheck.OWN_BLOCKS


def twin(module, old, new, after=""):
    """A copy of a module with one piece of its source exchanged, after a mark."""
    source = inspect.getsource(module)
    start = source.index(after)
    assert old in source[start:], f"{old!r} is no longer in {module.__name__}"
    source = source[:start] + source[start:].replace(old, new, 1)
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update(__package__=module.__package__, __name__=module.__name__)
    exec(compile(source, module.__file__, "exec"), copy.__dict__)
    return copy


def backend_with(**functions):
    own = {name: getattr(reference, name) for name in backends.FUNCTIONS}
    return types.SimpleNamespace(**(own | functions))


def failing(backend=None, gradients=training.gradients, outputs=("softmax",)):
    """(cell, block) of the lines that fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradcheck, "OWN_BLOCKS", {name: OWN_BLOCKS[name] for name in outputs})
        rows = list(gradcheck.check(REFERENCE, backend, gradients))
    return {(row.cell, row.block) for row in rows if not row.passed}


def backward_of(module):
    return backend_with(
        cell_backward=lambda cell, *args: module.CELLS[cell].backward(*args),
    )


def test_every_line_passes_in_the_reference():
    assert failing(outputs=OWN_BLOCKS) == set()


TANH, GRU = "def tanh_backward", "def _gru_backward"
MUTATIONS = {
    "h_t for h_{t-1} in dW_h, tanh": (
        TANH, "_add_outer(dW_h, h_prev, dA[t])", "_add_outer(dW_h, h, dA[t])", ("tanh", "W_h"),
    ),
    "h_t for h_{t-1} in dW_h, GRU": (
        GRU,
        "_add_outer(dW_h[:, :, : 2 * D], h_prev,",
        "_add_outer(dW_h[:, :, : 2 * D], states[t + 1, 0],",
        ("gru", "W_h"),
    ),
    "dropped carry, tanh": (TANH, "ds = c * (", "ds = (", ("tanh", "dA")),
    "dropped carry, GRU": (GRU, "ds = c * dh_prev", "ds = dh_prev", ("gru", "dA")),
    "skipped t = 0, tanh": (TANH, "- 1, -1, -1)", "- 1, 0, -1)", ("tanh", "dA")),
    "skipped t = 0, GRU": (GRU, "- 1, -1, -1)", "- 1, 0, -1)", ("gru", "dA")),
    "unmasked padding, tanh": (TANH, "dA[t] = e * dh", "dA[t] = dh", ("tanh", "W_in")),
    "unmasked padding, GRU": (GRU, "da_z = e * dh", "da_z = dh", ("gru", "dA")),
    "z mirrored": (GRU, "da_c = e * dh * z *", "da_c = e * dh * (1 - z) *", ("gru", "dA")),
    "reset gate after the product": (
        GRU,
        "_add_outer(dW_h[:, :, 2 * D :], r * h_prev, da_c)",
        "_add_outer(dW_h[:, :, 2 * D :], h_prev, r * da_c)",
        ("gru", "W_h"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_cell_fails(name):
    after, old, new, found = MUTATIONS[name]
    assert found in failing(backward_of(twin(cells, old, new, after)))


def test_overwritten_duplicate_item_rows_fail():
    def sum_rows(index, values):
        grad = reference.sum_rows(index, values)
        last = {int(i): v for i, v in zip(index, values, strict=True)}
        for k in range(grad.count):
            grad.values[k] = last[int(grad.rows[k])]
        return grad

    assert ("gru", "W_in") in failing(backend_with(sum_rows=sum_rows))


def test_dropout_left_out_of_the_backward_pass_fails():
    wrong = twin(model, "dA = dA if keep is None else dA * keep", "", "def scatter")
    mutant = twin(training, "", "")
    wrong.RowGrad = model.RowGrad
    mutant.scatter = wrong.scatter
    assert ("gru", "W_in") in failing(gradients=mutant.gradients)
    mutant = twin(training, "dH *= keep", "pass")
    assert ("gru", "dA") in failing(gradients=mutant.gradients)


@pytest.mark.parametrize(
    ("old", "new", "block"),
    [
        ("dH[cells] = dH_cells * scale", "dH[cells] = dH_cells", "dA"),
        ("dW_out * scale", "dW_out", "W_out"),
    ],
)
def test_a_wrong_scale_fails(old, new, block):
    assert ("gru", block) in failing(gradients=twin(training, old, new).gradients)


def test_a_vanishing_gradient_is_a_broken_case():
    row = gradcheck.Row("numpy", "float64", "gru", "pooled", "softmax", "dA", (1,), 1e-7, 0.0, 1.0)
    assert not row.passed


def test_the_command_reports_every_backend_and_its_status(monkeypatch):
    result = CliRunner().invoke(gradcheck.main, [])
    assert result.exit_code == 0, result.output
    assert "270 of 270 blocks passed" in result.output
    monkeypatch.setattr(gradcheck, "LIMITS", (REFERENCE._replace(limit=0.0),))
    result = CliRunner().invoke(gradcheck.main, [])
    assert result.exit_code == 1
    assert "FAILED" in result.output


def test_a_backend_that_is_asked_for_and_missing_is_a_failure(monkeypatch):
    def missing(array):
        raise DeviceError("backend 'cupy' needs CuPy; or use backend 'numba'")

    monkeypatch.setattr(backends.get("cupy"), "to_device", missing)
    monkeypatch.setattr(gradcheck, "LIMITS", ())
    for arguments, status in (([], 0), (["--backend", "numpy"], 0), (["--backend", "cupy"], 1)):
        result = CliRunner().invoke(gradcheck.main, arguments)
        assert result.exit_code == status
        said = "-- cupy: not checked: backend 'cupy' needs CuPy; or use backend 'numba'"
        assert (said in result.output) == ("numpy" not in arguments)
