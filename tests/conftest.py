"""The emulated device in the place of a GPU, for the backend "cupy"."""

import functools

import emulator
import pytest

from crnn_np import training
from crnn_np.backends import gpu
from crnn_np.errors import DeviceError

SMALL = {"THREADS": 64, "CELL_THREADS": 64, "TILE": 16}


def emulate(monkeypatch, shrunk=True, **options):
    """Put an emulated device in the backend's place for the GPU."""
    made = functools.cache(lambda dtype="float32": emulator.EmulatedDevice(dtype, **options))
    monkeypatch.setattr(gpu, "device", made)
    if shrunk:
        _shrink(monkeypatch)


def _shrink(monkeypatch):
    """Small blocks and tiles, so that small cases have several of them."""
    for name, value in SMALL.items():
        monkeypatch.setattr(gpu, name, value)


@functools.cache
def there() -> bool:
    """Whether this machine has a CUDA device."""
    try:
        gpu.device()
    except DeviceError:
        return False
    return True


ON_DEVICE = [pytest.param(name, marks=pytest.mark.gpu) for name in ("device", "device-small")]


@pytest.fixture(params=["emulator", *ON_DEVICE])
def cupy(request, monkeypatch):
    """The module of backend "cupy": on the emulated device, and on a real one with both sizes."""
    if request.param == "emulator":
        emulate(monkeypatch)
    elif not there():
        pytest.skip("no CUDA device")
    elif request.param == "device-small":
        _shrink(monkeypatch)
    return gpu


@pytest.fixture
def unshrunk(request, monkeypatch):
    """The module of backend "cupy" on the device that a test asks for, with its own sizes."""
    if request.param == "emulator":
        emulate(monkeypatch, shrunk=False)
    elif not there():
        pytest.skip("no CUDA device")
    return gpu


@pytest.fixture(autouse=True)
def _a_device_for_the_parameter_cupy(request, monkeypatch):
    given = getattr(request.node, "callspec", None)
    if given and "cupy" in map(str, given.params.values()):
        # Else the clock says how many windows make a run, and so how a loss is rounded.
        monkeypatch.setattr(training, "RUN_SECONDS", 1e9)
        if not there():
            emulate(monkeypatch)
