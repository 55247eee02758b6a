"""Collaborative recurrent neural networks for activity logs, trained by hand-written gradients."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CollaborativeRNN": "estimator",
    "CrnnError": "errors",
    "DataError": "errors",
    "DeviceError": "errors",
    "EventLog": "data",
    "Explanation": "explain",
    "ModelError": "errors",
    "Params": "model",
    "Plan": "windows",
    "Report": "training",
    "Rule": "optim",
    "Settings": "presets",
    "SettingsError": "errors",
    "Spec": "model",
    "Split": "data",
    "TrainingError": "errors",
    "concatenate": "data",
    "cut_tail": "data",
    "epochs": "training",
    "filter_events": "data",
    "from_sequences": "data",
    "load": "data",
    "read_events": "reading",
    "resolve": "presets",
    "split": "data",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
