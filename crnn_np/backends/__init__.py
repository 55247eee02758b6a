"""The table of backends: the same functions of one window, in NumPy, Numba and CUDA."""

import importlib
from types import ModuleType

from ..errors import SettingsError

MODULES = {"numpy": "reference", "numba": "jit", "cupy": "gpu"}
FUNCTIONS = (
    "to_device",
    "to_host",
    "window",
    "cell_forward",
    "cell_backward",
    "output",
    "score",
    "mixture",
    "mixture_score",
    "take_rows",
    "sum_rows",
    "update",
)

Backend = ModuleType
"""A module with `FUNCTIONS`; `workspace`, `train_run` and `PRODUCTS` where it has a fused run,
`device`, `training_bytes` and `scoring_bytes` where it computes on a device."""


def check_name(name: str) -> None:
    """Raise SettingsError where there is no backend of this name."""
    if name not in MODULES:
        raise SettingsError(f"backend {name!r}: expected one of {', '.join(MODULES)}")


def get(name: str) -> Backend:
    """The backend of this name, imported on first use.

    Raises
    ------
    SettingsError
        There is no such backend.
    """
    check_name(name)
    return importlib.import_module(f".{MODULES[name]}", __name__)
