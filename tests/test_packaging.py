"""What holds the package together: its layers, its import time, its version, its size."""

import ast
import configparser
import os
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest

import crnn_np

PACKAGE = Path(crnn_np.__file__).parent
CHECKOUT = Path(__file__).parents[1]

# A module imports only from the rows below its own; a package counts as one module.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["demo", "gradcheck", "methods"],
    ["estimator", "baselines", "synthetic"],
    ["presets", "planning"],
    ["training", "explain"],
    ["evaluation"],
    ["backends"],
    ["model"],
    ["cells", "outputs", "optim"],
    ["tallies"],
    ["history"],
    ["windows"],
    ["datasets", "reading"],
    ["data"],
    ["settings", "compiling"],
    ["errors"],
]
ROW = {name: row for row, names in enumerate(LAYERS) for name in names}
HEAVY = {"hmmlearn", "matplotlib", "numba", "pooch", "pyarrow", "safetensors", "scipy", "sklearn"}


def module_name(path: Path) -> str:
    """`crnn_np.backends.jit` for crnn_np/backends/jit.py, `crnn_np` for crnn_np/__init__.py."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source: str, package: str) -> list[tuple[int, str]]:
    """Line and full name of all that `source`, a module of `package`, imports from crnn_np."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join(parts + ([node.module] if node.module else []))
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
    return [(line, name) for line, name in found if name.split(".")[0] == "crnn_np"]


def breaches(source: str, module: str, package: str) -> list[str]:
    """The imports in `source` that do not point down LAYERS, each as one line of text."""
    own = module.split(".")[1]
    found = []
    for line, name in imports(source, package):
        target = name.split(".")[1] if "." in name else ""
        if target == own or target == "__version__":
            continue
        if target not in ROW:
            found.append(f"{module}, line {line}: {name} is not a module in LAYERS")
        elif ROW[target] <= ROW[own]:
            found.append(f"{module}, line {line}: {name} is not below {own} in LAYERS")
    return found


@pytest.mark.parametrize("module", [name for name in FILES if name != "crnn_np"])
def test_imports_point_down(module):
    own = module.split(".")[1]
    assert own in ROW, f"{module} has no place in LAYERS, nor in the table of docs/architecture.rst"
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = breaches(path.read_text(encoding="utf-8"), module, package)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "breach"),
    [
        ("from . import jit", None),
        ("from .jit import update", None),
        ("from ..windows import Window", None),
        ("from .. import __version__", None),
        ("import crnn_np.errors, numpy", None),
        ("from ..training import step", "crnn_np.training.step"),
        ("from .. import errors, estimator", "crnn_np.estimator"),
        ("def f():\n    from crnn_np.cli import main", "crnn_np.cli.main"),
        ("import crnn_np", "crnn_np"),
        ("from crnn_np import EventLog", "crnn_np.EventLog"),
    ],
)
def test_contract_can_fail(source, breach):
    found = breaches(source, "crnn_np.backends.reference", "crnn_np.backends")
    assert [text.split()[3] for text in found] == ([breach] if breach else [])


def fresh(code: str) -> str:
    """What `code` prints in a Python process of its own that finds this crnn_np."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)


def test_import_is_fast():
    timed = "import time; t = time.perf_counter(); import crnn_np; print(time.perf_counter() - t)"
    assert min(float(fresh(timed)) for _ in range(3)) < 0.5


@pytest.mark.parametrize("statement", ["import crnn_np", "from crnn_np import *"])
def test_import_leaves_heavy_libraries_alone(statement):
    loaded = fresh(f"{statement}\nimport sys; print(*sys.modules)").split()
    assert not HEAVY & set(loaded)


def test_public_names_exist():
    assert crnn_np.__all__
    missing = [name for name in crnn_np.__all__ if not hasattr(crnn_np, name)]
    assert not missing
    assert set(crnn_np.__all__) <= set(dir(crnn_np))


def test_version_stands_once():
    setup = configparser.ConfigParser()
    assert setup.read(CHECKOUT / "setup.cfg", encoding="utf-8")
    assert setup["metadata"]["version"] == "attr: crnn_np.__version__"
    latest = (CHECKOUT / "CHANGES.rst").read_text(encoding="utf-8").splitlines()[3]
    assert latest.split()[0] == crnn_np.__version__


def test_kernels_are_a_package():
    packaged = {
        p.name: p.read_text("utf-8")
        for p in resources.files("crnn_np.kernels").iterdir()
        if p.name.endswith((".cu", ".cuh"))
    }
    folder = CHECKOUT / "kernels"
    assert packaged == {p.name: p.read_text(encoding="utf-8") for p in folder.glob("*.cu*")}
    assert "common.cuh" in packaged


def test_no_large_files():
    files = [path for path in PACKAGE.rglob("*") if "__pycache__" not in path.parts]
    large = [str(path) for path in files if path.is_file() and path.stat().st_size > 500_000]
    assert not large
