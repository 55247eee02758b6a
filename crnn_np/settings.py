"""What the settings classes share: their checks, their help texts, and advice on wrong names."""

import difflib
import inspect
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin

from .errors import SettingsError

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


def help_texts(cls: type) -> dict[str, str]:
    """The text of each field in the class's NumPy-style docstring, on one line."""
    attributes = inspect.getdoc(cls).partition("----------\n")[2]
    entries = re.findall(r"^(\w[\w, ]*) : .*\n((?:    .*\n?)+)", attributes, re.MULTILINE)
    return {
        name.strip(): " ".join(text.split()) for names, text in entries for name in names.split(",")
    }
