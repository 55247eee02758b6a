"""Numba's compiler, with the machine code kept on disk."""

from collections.abc import Callable
from typing import Any

import numba

from .errors import SettingsError


def compiled(**options: Any) -> Callable[[Callable], Callable]:
    """`numba.njit` with these options, and a cache on disk.

    Raises
    ------
    SettingsError
        There is no folder for the cache.
    """

    def compile_later(function: Callable) -> Callable:
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError as error:
            raise SettingsError(
                f"compiled code can be kept neither beside the package nor in the home directory "
                f"({error}): set NUMBA_CACHE_DIR to a folder that can be written"
            ) from error

    return compile_later
