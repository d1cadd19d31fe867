"""What users touch: few names, few arguments, no ``**kwargs``, docstrings everywhere, and examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import inspect
import itertools
import pkgutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest

import kimi_linear
import kimi_linear.ops

ROOT = Path(__file__).parents[2]
FACE_NAMES, OP_ARGUMENTS = 12, 12
# ``dataclasses.replace`` with its own convention: the names are a configuration's fields, and each is checked.
STARRED = {"kimi_linear.config.replace"}


def module_names() -> list[str]:
    """Every module that this machine can import (the kernels that need triton only where it is there)."""
    names = [module.name for module in pkgutil.walk_packages(kimi_linear.__path__, "kimi_linear.")]
    needs_triton = (".kernels.triton", ".kernels.hopper")
    has_triton = importlib.util.find_spec("triton") is not None
    return ["kimi_linear", *(name for name in names if has_triton or not any(part in name for part in needs_triton))]


def packages_with_a_face() -> list[types.ModuleType]:
    names = [name for name in module_names() if name.count(".") <= 1]
    modules = [importlib.import_module(name) for name in names]
    return [module for module in modules if hasattr(module, "__all__")]


def bad_signatures(functions: dict[str, object]) -> list[str]:
    """Functions with ``*args`` or ``**kwargs``; operations with more arguments than a caller can hold in mind."""
    found = []
    for name, function in functions.items():
        parameters = inspect.signature(function).parameters.values()
        starred = [p for p in parameters if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and name not in STARRED]
        found += [f"{name}: takes {str(p).partition(':')[0]}" for p in starred]
        if len(parameters) > OP_ARGUMENTS and name.startswith("kimi_linear.ops."):
            found.append(f"{name}: {len(parameters)} arguments, at most {OP_ARGUMENTS}")
    return found


def documented_constants(text: str) -> set[str]:
    """Names assigned at module level with a string right below."""
    body = ast.parse(text).body
    found = set()
    for node, below in itertools.pairwise(body):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
        )
        said = (
            isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str)
        )
        found |= {target.id for target in targets if said and isinstance(target, ast.Name)}
    return found


def undocumented(module: types.ModuleType) -> list[str]:
    """Public names without a docstring; for a class its public methods too, for a constant the string below it."""
    folder = Path(module.__file__).parent
    constants = {name for file in folder.glob("*.py") for name in documented_constants(file.read_text())}
    found = []
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)):
            found += [] if name in constants or name.startswith("__") else [name]
            continue
        # A dataclass or NamedTuple without a docstring is given its signature as one.
        if not inspect.getdoc(value) or value.__doc__.startswith(f"{name}("):
            found.append(name)
        if inspect.isclass(value):
            methods = {key: method for key, method in vars(value).items() if inspect.isroutine(method)}
            found += [f"{name}.{key}" for key, m in methods.items() if key[0] != "_" and not inspect.getdoc(m)]
    return [f"{module.__name__}.{name}" for name in found]


def test_the_public_face_is_small_and_real() -> None:
    names = kimi_linear.__all__
    assert len(names) <= FACE_NAMES, names
    assert len(set(names)) == len(names)
    for name in names:
        assert getattr(kimi_linear, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kimi_linear.no_such_name


def test_signatures_of_public_functions() -> None:
    functions = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in packages_with_a_face()
        for name in module.__all__
        if inspect.isfunction(getattr(module, name))
    }
    assert "kimi_linear.ops.chunk_kda" in functions
    most = max(len(inspect.signature(f).parameters) for n, f in functions.items() if n.startswith("kimi_linear.ops."))
    print(f"{len(functions)} public functions; an operation takes at most {most} of {OP_ARGUMENTS} arguments")
    assert bad_signatures(functions) == []


def test_every_public_name_has_a_docstring() -> None:
    assert [name for module in packages_with_a_face() for name in undocumented(module)] == []


@pytest.mark.parametrize("name", module_names())
def test_docstring_examples_run(name: str) -> None:
    failed, _ = doctest.testmod(importlib.import_module(name), report=True)
    assert failed == 0


def test_the_checks_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    code = '''
from dataclasses import dataclass
GOOD = 1
"""Said."""
BAD = 2

@dataclass
class Quiet:
    x: int
    def method(self): ...

def greedy(a, **kwargs): ...
def many(a, b, c, d, e, f, g, h, i, j, k, l, m):
    """Many.

    >>> 1 + 1
    3
    """
__all__ = ["GOOD", "BAD", "Quiet", "greedy", "many"]
'''
    (tmp_path / "bad_face.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("bad_face")
    assert undocumented(module) == [f"bad_face.{name}" for name in ("BAD", "Quiet", "Quiet.method", "greedy")]
    assert bad_signatures({"kimi_linear.ops.greedy": module.greedy, "kimi_linear.ops.many": module.many}) == [
        "kimi_linear.ops.greedy: takes **kwargs",
        "kimi_linear.ops.many: 13 arguments, at most 12",
    ]
    assert doctest.testmod(module).failed == 1
    assert "Expected:\n    3" in capsys.readouterr().out


def test_the_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """Built by the real build backend: modules, ``py.typed``, templates; no tests, no runs."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = (file for file in (ROOT / "kimi_linear").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    assert {file.relative_to(ROOT).as_posix() for file in files} == {n for n in inside if n.startswith("kimi_linear/")}
    assert "kimi_linear/py.typed" in inside
    others = {name.split("/")[0] for name in inside} - {"kimi_linear"}
    assert others == {f"kimi_linear-{kimi_linear.__version__}.dist-info"}
