"""How Numba compiles, and keeps the machine code on disk."""

from collections.abc import Callable
from typing import Any

import numba
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler

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


class _Part(JITCodeLibrary):
    """Code that is optimised, and becomes machine code, in its compiled callers alone.

    Numba would do both for it too, and then for each caller with all that it calls: a function at
    the bottom of six others seven times, which was a third of the time that the softmax's took.
    """

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0

    @property
    def codegen(self) -> "_Part":
        """Numba asks for it to call `set_env`."""
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """Where there is no machine code there is no place for it."""


class _PartCompiler(Compiler):
    def __init__(self, typing: Any, target: Any, library: Any, *rest: Any) -> None:
        super().__init__(typing, target, _Part(target.codegen(), "part"), *rest)


# Options of `numba.njit` for functions that only compiled ones call. They allocate nothing: without
# the counting of references, and wrappers for other callers, they compile in half the time.
PART = {
    "pipeline_class": _PartCompiler,
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
    "_nrt": False,
}
