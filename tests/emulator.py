"""A device for `crnn_np.backends.gpu` that needs no GPU: the same kernels, compiled as C++.

`EmulatedDevice` has what the backend knows of a device: ``xp``, ``launch``, ``product`` and three
numbers. Its arrays refuse to be mixed with arrays of the host, as CuPy's do, and begin as NaN. The
threads of a block run in lock-step (fast), or as real threads in a process of their own under the
sanitizers. The blocks of a kernel that meet at a barrier of the grid are all alive at once.
"""

import collections
import ctypes
import functools
import hashlib
import itertools
import os
import re
import shutil
import struct
import subprocess
import tempfile
import unittest
import weakref
from pathlib import Path

import numpy as np

from crnn_np.backends import gpu

CHECKOUT = Path(__file__).parents[1]
SOURCES = sorted((CHECKOUT / "kernels").glob("*.cu"))
BUILD = CHECKOUT / "build" / "emulator"
HEADERS = sorted(Path(__file__).parent.glob("emulator*.hpp"))
FLAGS = ["-std=c++17", "-w", "-fPIC", "-fno-gnu-unique", "-U_FORTIFY_SOURCE"]
SANITIZERS = {
    "address": [
        "-fsanitize=address,undefined",
        "-fsanitize-sections=shared_memory",
        "-fno-sanitize-recover=all",
        "-fno-inline",  # compiles in half the time
    ],
    "thread": ["-fsanitize=thread"],
}
LARGEST_SHARED = 227 << 10  # bytes of a block on Hopper
LARGEST_BLOCK = 1024  # threads
LONGEST = 120  # seconds of a launch under a sanitizer
SIGNATURE = re.compile(
    r'extern "C" __global__ void\s*(?:__launch_bounds__\((\d+)\)\s*)?(\w+)\(([^)]*)\)'
)
TYPES = {
    "int": np.int32,
    "unsigned": np.uint32,
    "long long": np.int64,
    "unsigned long long": np.uint64,
    "unsigned char": np.uint8,
    "double": np.float64,
    "float": np.float32,
}


class EmulatorError(Exception):
    """A launch that a device would refuse, or that the emulator or a sanitizer found wrong."""


class Array(np.lib.mixins.NDArrayOperatorsMixin):
    """An array of the device: NumPy's results, but no way to the host except `get`."""

    PLAIN = {"shape", "dtype", "size", "ndim", "nbytes", "itemsize", "flags", "strides", "__len__"}
    METHODS = {
        *("T", "all", "any", "argmax", "argmin", "argsort", "astype", "copy", "cumsum", "dot"),
        *("fill", "max", "mean", "min", "nonzero", "prod", "ravel", "repeat", "reshape", "sort"),
        *("squeeze", "sum", "swapaxes", "take", "transpose", "view"),
    }

    def __init__(self, host: np.ndarray) -> None:
        self._host = host

    def __getattr__(self, name):
        if name in Array.PLAIN:
            return getattr(self._host, name)
        if name in Array.METHODS:
            found = getattr(self._host, name)
            return on_device(found) if callable(found) else wrap(found)
        raise AttributeError(f"the emulated device's arrays have no {name!r}")

    def __len__(self) -> int:
        return len(self._host)

    def __repr__(self) -> str:
        return f"device array {self.dtype}{list(self.shape)}"

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion of a device array to a NumPy array")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        return on_device(getattr(ufunc, method))(*inputs, **kwargs)

    def __array_function__(self, function, types, args, kwargs):
        if not all(issubclass(t, Array) for t in types):
            raise TypeError(f"numpy.{function.__name__} of arrays of the host and of the device")
        return getattr(Namespace(), function.__name__)(*args, **kwargs)

    def __getitem__(self, key):
        return wrap(self._host[unwrap(key)])

    def __setitem__(self, key, value) -> None:
        self._host[unwrap(key)] = unwrap(value)

    def get(self) -> np.ndarray:
        """A copy on the host."""
        return self._host.copy()

    def set(self, host: np.ndarray) -> None:
        """Copy from the host, same shape and dtype."""
        if host.shape != self._host.shape or host.dtype != self._host.dtype:
            raise TypeError(f"set: {host.dtype}{host.shape} to {self.dtype}{self.shape}")
        self._host[...] = host

    def item(self):
        """The one element, as a Python scalar."""
        return self._host.item()

    def __float__(self) -> float:
        return float(self._host)

    def __int__(self) -> int:
        return int(self._host)

    def __bool__(self) -> bool:
        return bool(self._host)


class Tally:
    """Bytes of the arrays of the emulated device that are made from now on, and the most of them.

    Give its `made` to `Array` as a new ``__init__``.
    """

    def __init__(self) -> None:
        self.now = self.most = 0
        self.alive = set()
        self.make = Array.__init__

    def made(self, array: Array, host: np.ndarray) -> None:
        """Count the memory of a new array, once for all that share it."""
        self.make(array, host)
        while isinstance(host.base, np.ndarray):
            host = host.base
        if id(host) not in self.alive:
            self.alive.add(id(host))
            weakref.finalize(host, self.gone, id(host), host.nbytes)
            self.now += host.nbytes
            self.most = max(self.most, self.now)

    def gone(self, number: int, size: int) -> None:
        """An array's memory is free again."""
        self.alive.remove(number)
        self.now -= size


def wrap(result):
    """NumPy's result as the device's: arrays, and scalars too, as CuPy has it."""
    if isinstance(result, tuple):
        return tuple(wrap(r) for r in result)
    return Array(np.asarray(result)) if isinstance(result, np.ndarray | np.generic) else result


def unwrap(value):
    """A device array's memory; TypeError for an array of the host."""
    if isinstance(value, Array):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError("Unsupported type <class 'numpy.ndarray'>: an array of the host")
    if isinstance(value, tuple | list):
        return type(value)(unwrap(v) for v in value)
    return value


def on_device(function):
    """A NumPy function that takes and gives device arrays."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        return wrap(function(*unwrap(args), **{k: unwrap(v) for k, v in kwargs.items()}))

    return call


class Namespace:
    """The part of CuPy's name space that the emulated device has."""

    FUNCTIONS = {
        *("arange", "ascontiguousarray", "broadcast_to", "concatenate", "count_nonzero"),
        *("flatnonzero", "ones", "sum", "zeros", "zeros_like"),
    }

    def __getattr__(self, name):
        if name in Namespace.FUNCTIONS:
            return on_device(getattr(np, name))
        raise AttributeError(f"the emulated device has no {name!r}")

    def empty(self, shape, dtype=np.float64) -> Array:
        """New memory: NaN, or all bits set."""
        host = np.empty(shape, dtype)
        host.reshape(-1).view(np.uint8)[...] = 0xFF
        return Array(host)

    def argsort(self, a: Array, kind: str) -> Array:
        """Where each element goes; CuPy sorts a copy, beside as much again for keys and places."""
        beside = self.empty((3, a.size), np.int64)
        order = a.argsort(kind=kind)
        del beside
        return order

    def asarray(self, a, dtype=None) -> Array:
        """A device array as it is, anything else copied to the device."""
        if isinstance(a, Array):
            return a if dtype is None else a.astype(dtype, copy=False)
        return Array(np.array(a, dtype))


def parameters(text: str) -> list[tuple[str, str, bool, bool]]:
    """C type, element type, is a pointer, is const, for each parameter of a kernel."""
    found = []
    for parameter in filter(None, (p.strip() for p in text.split(","))):
        c_type = re.sub(r"\b__restrict__\b", "", parameter[: re.search(r"\w+$", parameter).start()])
        element = " ".join(c_type.replace("*", " ").replace("const", " ").split())
        found.append((c_type, element, "*" in c_type, "const" in c_type))
    return found


def compiler() -> str:
    """The C++ compiler; without one a test is skipped."""
    found = shutil.which("g++") or shutil.which("c++")
    if not found:
        raise unittest.SkipTest("the emulated device needs a C++ compiler: apt install g++")
    return found


def signatures(source: Path) -> dict[str, tuple[list, int]]:
    """The parameters of each kernel of a file, and the threads of its largest block."""
    text = re.sub(r"\s+", " ", source.read_text(encoding="utf-8"))
    return {
        name: (parameters(args), int(bound or LARGEST_BLOCK))
        for bound, name, args in SIGNATURE.findall(text)
    }


@functools.cache
def build(source: Path, real: str, sanitizer: str | None) -> Path:
    """Compile one kernel file to a library or driver, once for each content."""
    calls = []
    for name, (params, _) in signatures(source).items():
        given = (f"*static_cast<{p[0]} *>(a[{i}])" for i, p in enumerate(params))
        calls.append(f'{{"{name}", [](void **a) {{ {name}({", ".join(given)}); }}}},')
    unit = "\n".join(
        [
            '#include "emulator.hpp"',
            f'#include "{source.resolve()}"',
            "const emulator::Kernel emulator_kernels[] = {",
            *calls,
            "};",
            '#include "emulator_launch.hpp"'
            if sanitizer is None
            else '#include "emulator_driver.hpp"',
        ]
    )
    flags = [*FLAGS, f"-DREAL={real}"]
    if sanitizer is None:
        flags += ["-O2", "-shared"]
    else:
        flags += ["-O1", "-g", "-pthread", "-DEMULATOR_THREADS", *SANITIZERS[sanitizer]]
    included = [*HEADERS, *sorted((CHECKOUT / "kernels").glob("*.cuh"))]
    parts = [unit, *flags, *(p.read_text(encoding="utf-8") for p in (source, *included))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    made = BUILD / f"{source.stem}-{real}-{sanitizer or 'plain'}-{digest}"
    if not made.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as work:
            (Path(work) / "unit.cpp").write_text(unit, encoding="utf-8")
            include = [f"-I{Path(__file__).parent}", f"-I{CHECKOUT / 'kernels'}"]
            command = [compiler(), *flags, *include, "unit.cpp", "-o", "made"]
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
            if done.returncode:
                raise EmulatorError(f"{source.name} does not compile as C++\n{done.stderr}")
            os.replace(Path(work) / "made", made)
    return made


def round_tf32(x: np.ndarray) -> np.ndarray:
    """The nearest numbers with 10 bits of mantissa, ties to even."""
    assert x.dtype == np.float32
    bits = np.ascontiguousarray(x).view(np.uint32)
    with np.errstate(over="ignore"):
        near = (bits + np.uint32(0xFFF) + (bits >> 13 & 1)) & ~np.uint32(0x1FFF)
    return np.where(np.isnan(x), x, near.view(np.float32))


class EmulatedDevice:
    """What the backend knows of a device, on the CPU.

    Parameters
    ----------
    dtype : float32 or float64
        What `real` is in the kernels.
    sanitizer : {None, "address", "thread"}
        None runs the threads of a block in lock-step. "address" (with undefined behaviour) and
        "thread" run them as real threads, in a process of their own.
    reverse : bool
        In lock-step, the last block goes first, and in it the last thread.
    shared_limit : int
        Bytes of shared memory that a block may have.
    capability : int
        Compute capability, 75 for 7.5.
    multiprocessors : int
        As many blocks can be alive at once.
    sources : list of Path
        Kernel files.

    Attributes
    ----------
    launches : Counter
        How often each kernel was launched.
    """

    def __init__(
        self,
        dtype,
        sanitizer=None,
        reverse=False,
        shared_limit=LARGEST_SHARED,
        capability=90,
        multiprocessors=4,
        sources=None,
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.capability = capability
        self.xp = Namespace()
        self.shared_limit = shared_limit
        self.multiprocessors = multiprocessors
        self.launches = collections.Counter()
        self.runs = {}
        self.sanitizer = sanitizer
        self.reverse = reverse
        self.sources = SOURCES if sources is None else sources

    @functools.cached_property
    def kernels(self) -> dict:
        """For each kernel: file, number in it, parameters, largest block, if it is cooperative."""
        found = {}
        for source in self.sources:
            cooperative = gpu.GRID_BARRIER in source.read_text(encoding="utf-8")
            for number, (name, signature) in enumerate(signatures(source).items()):
                assert name not in found, f"two kernels are called {name}"
                found[name] = source, number, *signature, cooperative
        return found

    def launch(self, name, grid, block, arguments, shared=0) -> None:
        """Run a kernel on all blocks of a grid."""
        if name not in self.kernels:
            raise EmulatorError(f"no kernel {name!r}: there are {', '.join(self.kernels)}")
        grid_x, grid_y = grid if isinstance(grid, tuple) else (grid, 1)
        if not (0 < grid_x < 1 << 31 and 0 < grid_y < 1 << 16):
            raise EmulatorError(f"{name}: a grid of {grid}")
        source, number, params, largest, cooperative = self.kernels[name]
        if block % 32 or not 32 <= block <= largest:
            raise EmulatorError(f"{name}: a block of {block}")
        if not 0 <= shared <= self.shared_limit:
            raise EmulatorError(f"{name}: {shared} bytes of shared memory")
        if cooperative and grid_x * grid_y > self.multiprocessors:
            raise EmulatorError(f"{name}: a grid of {grid} can't be alive at once")
        given = self.check(name, params, arguments)
        self.launches[name] += 1
        if source not in self.runs:
            made = build(source, {4: "float", 8: "double"}[self.dtype.itemsize], self.sanitizer)
            self.runs[source] = Driver(made) if self.sanitizer else Library(made, self.reverse)
        sizes = tuple(map(int, (grid_x, grid_y, block, shared, cooperative)))
        self.runs[source](name, number, sizes, params, given)

    def check(self, name, params, arguments) -> list[np.ndarray]:
        """The arguments' memory; EmulatorError where they are not what the kernel expects."""
        if len(arguments) != len(params):
            raise EmulatorError(f"{name}: {len(arguments)} arguments, expected {len(params)}")
        given = []
        for k, (argument, param) in enumerate(zip(arguments, params, strict=True)):
            c_type, element, pointer, _ = param
            where = f"{name}, argument {k} ({c_type.strip()})"
            dtype = self.dtype if element == "real" else np.dtype(TYPES[element])
            if pointer != isinstance(argument, Array) or not (
                pointer or isinstance(argument, np.generic)
            ):
                raise EmulatorError(f"{where}: a {type(argument).__name__}")
            same = argument.dtype == dtype
            if not same and not (dtype == np.uint8 and argument.dtype == np.bool_):
                raise EmulatorError(f"{where}: its dtype is {argument.dtype}")
            if pointer and not argument.flags.c_contiguous:
                raise EmulatorError(f"{where}: not C-contiguous")
            given.append(argument._host if pointer else np.asarray(argument))
        return given

    def product(
        self, a: Array, b: Array, out: Array, beta: float = 0.0, tf32: bool = False
    ) -> None:
        """out = a b + beta out, of matrices or batches of them, transposed or padded views too."""
        assert a.dtype == b.dtype == out.dtype == self.dtype, "product: mixed dtypes"
        assert (a.ndim, b.ndim, out.ndim) in ((2, 2, 2), (3, 3, 3)), "product: not matrices"
        for x in (a, b, out):
            gpu.leading(x)  # what cuBLAS can't take fails here too
        factors = [round_tf32(x._host) if tf32 else x._host for x in (a, b)]
        result = np.matmul(*factors)
        out._host[...] = result if beta == 0 else result + self.dtype.type(beta) * out._host


class Library:
    """A kernel file compiled for lock-step, in this process."""

    def __init__(self, path: Path, reverse: bool) -> None:
        self.loaded = ctypes.CDLL(str(path))
        self.loaded.emulator_launch.restype = ctypes.c_char_p
        self.reverse = reverse

    def __call__(self, name, number, sizes, params, given) -> None:
        values = (ctypes.c_void_p * len(given))()
        keep = []
        for k, (array, param) in enumerate(zip(given, params, strict=True)):
            if param[2]:
                keep.append(ctypes.c_void_p(array.ctypes.data))
                values[k] = ctypes.addressof(keep[-1])
            else:
                values[k] = array.ctypes.data
        *grid_and_block, shared, cooperative = sizes
        said = self.loaded.emulator_launch(
            number, *grid_and_block, ctypes.c_long(shared), cooperative, values, int(self.reverse)
        )
        if said:
            raise EmulatorError(f"{name}: {said.decode()}")


def largest_around(k, given, params) -> int:
    """Number of the largest array in which array k lies, k's own where there is no larger one.

    Of several in one place, the first.
    """
    spans = [(a.ctypes.data, a.ctypes.data + a.nbytes) for a in given]
    first, last = spans[k]
    around = [j for j, (a, b) in enumerate(spans) if params[j][2] and a <= first and last <= b]
    return max(around, key=lambda j: given[j].nbytes)


class Driver:
    """A kernel file under a sanitizer, in a process of its own for each launch.

    Each array travels there and back, in memory of exactly its size. One that lies inside another
    lies inside it there too.
    """

    OPTIONS = {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }

    def __init__(self, path: Path) -> None:
        # The thread sanitizer needs a memory layout without much randomness.
        self.command = [str(path)]
        if (
            subprocess.run(["setarch", "-R", "true"], capture_output=True, check=False).returncode
            == 0
        ):
            self.command = ["setarch", "-R", str(path)]

    def __call__(self, name, number, sizes, params, given) -> None:
        sent = [struct.pack("7q", number, *sizes, len(given))]
        written = [a for a, p in zip(given, params, strict=True) if p[2] and not p[3] and a.size]
        for a, b in itertools.combinations(written, 2):
            if a.ctypes.data != b.ctypes.data and np.may_share_memory(a, b):
                raise EmulatorError(f"{name}: two arrays that it writes to overlap")
        for k, (array, param) in enumerate(zip(given, params, strict=True)):
            whole = largest_around(k, given, params) if param[2] and array.nbytes else k
            offset = array.ctypes.data - given[whole].ctypes.data
            kind = param[2] + (param[2] and param[3])
            sent.append(struct.pack("4q", kind, whole, offset, array.nbytes))
            sent.append(array.tobytes())
        try:
            done = subprocess.run(
                self.command,
                input=b"".join(sent),
                capture_output=True,
                check=False,
                env={**os.environ, **self.OPTIONS},
                timeout=LONGEST,
            )
        except subprocess.TimeoutExpired as error:
            raise EmulatorError(f"{name}: not all blocks arrive, or it is too slow") from error
        if done.returncode:
            raise EmulatorError(f"{name}: {done.stderr.decode(errors='replace')}")
        at = 0
        for array, param in zip(given, params, strict=True):
            if param[2] and not param[3]:
                got = np.frombuffer(done.stdout, array.dtype, array.size, at)
                array[...] = got.reshape(array.shape)
                at += array.nbytes
        assert at == len(done.stdout), f"{name}: {len(done.stdout)} bytes came back, expected {at}"
