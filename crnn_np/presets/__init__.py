"""Settings that ship, ``authors``, ``mixture`` and ``paper``, with any field overridden."""

import tomllib
from dataclasses import fields
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from ..datasets import KNOWN
from ..errors import SettingsError
from ..model import Spec
from ..optim import Rule
from ..settings import nearest
from ..windows import Plan

CLASSES = (Spec, Rule, Plan)
LIKES = (*KNOWN, "table")


class Settings(NamedTuple):
    """The model, the optimiser, and the windows and batches."""

    spec: Spec
    rule: Rule
    plan: Plan

    def flat(self) -> dict[str, Any]:
        """All fields in one dict."""
        return {name: value for part in self for name, value in vars(part).items()}


def names() -> list[str]:
    """Presets that ship with the package."""
    files = resources.files(__name__).iterdir()
    return sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml"))


def resolve(preset: str | None = "paper", like: str | None = None, **changes: Any) -> Settings:
    """Settings of a preset with some of them changed.

    Parameters
    ----------
    preset : str or None
        One of `names`; None starts from the defaults of the classes.
    like : str, optional
        Kind of log ("brightkite", "lastfm", "table"): a preset may have other settings for it.
    **changes
        Fields of `Spec`, `Rule` and `Plan`.

    Raises
    ------
    SettingsError
        There is no such preset or setting, or a value is out of range.
    """
    chosen: dict[str, Any] = {}
    if preset is not None:
        if preset not in names():
            raise SettingsError(f"preset {preset!r}: {nearest(preset, names())}")
        chosen = tomllib.loads((resources.files(__name__) / f"{preset}.toml").read_text("utf-8"))
        special = chosen.pop("like", {})
        chosen |= special.get(like, {})
    if like is not None and like not in LIKES:
        raise SettingsError(f"like is {like!r}: {nearest(like, LIKES)}")
    chosen |= {k: v.item() if isinstance(v, np.generic) else v for k, v in changes.items()}
    known = [f.name for cls in CLASSES for f in fields(cls)]
    for name in chosen:
        if name not in known:
            raise SettingsError(f"there is no setting {name!r}: {nearest(name, known)}")
    if isinstance(chosen.get("validation_range"), list):
        chosen["validation_range"] = tuple(chosen["validation_range"])
    parts = []
    for cls in CLASSES:
        own = {f.name for f in fields(cls)}
        parts.append(cls(**{name: value for name, value in chosen.items() if name in own}))
    return Settings(*parts)
