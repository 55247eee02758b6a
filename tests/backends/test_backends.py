"""One table of functions, the same in every backend."""

import inspect

import numpy as np
import pytest

from crnn_np import backends
from crnn_np.errors import SettingsError

DTYPES = ["float32", "float64"]
every_backend = pytest.mark.parametrize("name", backends.MODULES)
on_the_host = pytest.mark.parametrize("name", ["numpy", "numba"])


@every_backend
@pytest.mark.parametrize("function", backends.FUNCTIONS)
def test_signatures_are_those_of_the_reference(name, function):
    ours = inspect.signature(getattr(backends.get(name), function)).parameters
    reference = inspect.signature(getattr(backends.get("numpy"), function)).parameters
    assert list(ours) == list(reference)
    for parameter in ours.values():
        assert parameter.default is parameter.empty
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD


@every_backend
def test_a_fused_run_comes_with_its_workspace(name):
    module = backends.get(name)
    assert hasattr(module, "train_run") == hasattr(module, "workspace")
    assert hasattr(module, "train_run") == (name != "numpy")


@every_backend
def test_get(name):
    backends.check_name(name)
    module = backends.get(name)
    assert module is backends.get(name)
    assert module.__name__ == f"crnn_np.backends.{backends.MODULES[name]}"


@pytest.mark.parametrize("call", [backends.get, backends.check_name])
@pytest.mark.parametrize("name", ["cuda", "", None, "jit"])
def test_a_backend_that_there_is_not(call, name):
    with pytest.raises(SettingsError, match="expected one of numpy, numba, cupy") as caught:
        call(name)
    assert repr(name) in str(caught.value)


def arguments(dtype, cell="gru"):
    """Arguments of each pure function, T = 3, B = 2, D = 4, 6 items."""
    rng = np.random.default_rng(0)
    T, B, D, G = 3, 2, 4, 1 if cell == "tanh" else 3

    def draw(*shape):
        return rng.standard_normal(shape).astype(dtype)

    s0, A, W_h = draw(1, B, D), draw(T, B, G * D), draw(B, D, G * D)
    event, carry = np.ones((T, B), dtype), np.ones((T, B), dtype)
    event[2, 1] = carry[1, 0] = 0
    states, cache = backends.get("numpy").cell_forward(cell, s0, 0.5, A, W_h, event, carry)
    H, W_out, y = draw(5, D), draw(6, D), rng.integers(0, 6, 5).astype(np.int32)
    return {
        "cell_forward": (cell, s0, 0.5, A, W_h, event, carry),
        "cell_backward": (cell, draw(T, B, D), states, cache, 0.5, W_h, event, carry),
        "output": ("softmax", H, W_out, y),
        "score": ("softmax", H, W_out, y),
        "take_rows": (W_out, y),
        "sum_rows": (y, H),
        "to_device": (H,),
        "to_host": (H,),
    }


def arrays(value):
    if isinstance(value, np.ndarray):
        return [value]
    return [array for part in value for array in arrays(part)] if isinstance(value, tuple) else []


@on_the_host
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("function", arguments("float32"))
def test_functions_keep_the_type_and_leave_their_arguments_alone(name, dtype, function):
    given = arguments(dtype)[function]
    before = [array.copy() for array in arrays(given)]
    result = getattr(backends.get(name), function)(*given)
    for array, copy in zip(arrays(given), before, strict=True):
        np.testing.assert_array_equal(array, copy)
    kinds = {array.dtype.name for array in arrays(result)}
    assert kinds <= {"score": {"float64", "int32"}, "sum_rows": {dtype, "int32"}}.get(
        function, {dtype}
    )


@on_the_host
@pytest.mark.parametrize(("cell", "width"), [("tanh", 4), ("gru", 12), ("gru-sigmoid", 12)])
def test_shapes_of_a_cell(name, cell, width):
    module, given = backends.get(name), arguments("float64", cell)
    states, cache = module.cell_forward(*given["cell_forward"])
    assert states.shape == (4, 1, 2, 4)
    assert cache.shape[:2] == (3, 2)
    ds0, dA, dW_h = module.cell_backward(*given["cell_backward"])
    assert (ds0.shape, dA.shape, dW_h.shape) == ((1, 2, 4), (3, 2, width), (2, 4, width))


@on_the_host
def test_sum_rows(name):
    index = np.array([7, 0, 7, 3, 0, 7], np.int32)
    values = np.arange(12.0).reshape(6, 2)
    rows, sums, count = backends.get(name).sum_rows(index, values)
    assert count == 3
    assert rows[:3].tolist() == [0, 3, 7]
    assert sums[:3].tolist() == [[10, 12], [6, 7], [14, 17]]
    assert rows.dtype == np.int32
    assert len(rows) == len(sums) == 6


@on_the_host
def test_sum_rows_of_matrices_and_of_nothing(name):
    module = backends.get(name)
    values = np.arange(12.0).reshape(3, 2, 2)
    rows, sums, count = module.sum_rows(np.array([4, 1, 4]), values)
    assert rows[:count].tolist() == [1, 4]
    np.testing.assert_array_equal(sums[:count], [values[1], values[0] + values[2]])
    rows, sums, count = module.sum_rows(np.zeros(0, np.int32), np.zeros((0, 2)))
    assert (count, rows.shape, sums.shape) == (0, (0,), (0, 2))


@on_the_host
def test_take_rows(name):
    table = np.arange(24.0).reshape(4, 3, 2)
    taken = backends.get(name).take_rows(table, np.array([3, 0, 3], np.int32))
    np.testing.assert_array_equal(taken, [table[3], table[0], table[3]])
    taken[:] = -1
    assert table.min() == 0
