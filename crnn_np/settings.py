"""What the settings classes share: their checks, their help texts, and advice on wrong names."""

import difflib
import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

import numpy as np

from .errors import SettingsError

MOST = 1 << 62  # of whole numbers
LISTED = 60  # names at most in a message


def nearest(name: str, known: Iterable[str]) -> str:
    """Advice for a name that is not known: the nearest one that is, all of them, or how many."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    listed = ", ".join(known) if len(known) <= LISTED else f"the {len(known)} that are known"
    return f"expected one of {listed}"


def check(settings: Any, **bounds: tuple[float, float]) -> None:
    """Check a settings dataclass: types, choices, and inclusive bounds of numbers.

    Raises
    ------
    SettingsError
        With the field, what came and what was expected.
    """
    for field in fields(settings):
        value = getattr(settings, field.name)
        if get_origin(field.type) is Literal:
            if value not in get_args(field.type):
                choices = ", ".join(map(repr, get_args(field.type)))
                raise SettingsError(f"{field.name} is {value!r}: expected one of {choices}")
        elif field.type is bool:
            if not isinstance(value, bool):
                raise SettingsError(f"{field.name} is {value!r}: expected True or False")
        elif field.type in (int, float):
            number = isinstance(value, int if field.type is int else (int, float))
            if not number or isinstance(value, bool):
                raise SettingsError(f"{field.name} is {value!r}: expected a {field.type.__name__}")
            low, high = bounds[field.name]
            if not low <= value <= high:
                raise SettingsError(f"{field.name} is {value!r}: expected {low} to {high}")


def whole(name: str, value: Any, low: int, high: int = MOST, optional: bool = False) -> int | None:
    """A setting that is a whole number from `low` to `high`, as an int; or None, where `optional`.

    Raises
    ------
    SettingsError
        It is neither.
    """
    if value is None and optional:
        return None
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise SettingsError(f"{name} is {value!r}: a whole number was expected")
    if not low <= value <= high:
        expected = f"{low} or more" if high == MOST else f"{low} to {high}"
        raise SettingsError(f"{name} is {value!r}: {expected} was expected")
    return int(value)


def positive(name: str, value: Any) -> float | None:
    """A setting that is a positive number or None, as a float or None.

    Raises
    ------
    SettingsError
        It is neither.
    """
    if value is None:
        return None
    number = isinstance(value, (int, float, np.integer, np.floating))
    if not number or isinstance(value, bool) or not 0 < value < np.inf:
        raise SettingsError(f"{name} is {value!r}: a positive number or None was expected")
    return float(value)


def help_texts(cls: type) -> dict[str, str]:
    """The text of each field in the class's NumPy-style docstring, on one line."""
    attributes = inspect.getdoc(cls).partition("----------\n")[2]
    entries = re.findall(r"^(\w[\w, ]*) : .*\n((?:    .*\n?)+)", attributes, re.MULTILINE)
    return {
        name.strip(): " ".join(text.split()) for names, text in entries for name in names.split(",")
    }
