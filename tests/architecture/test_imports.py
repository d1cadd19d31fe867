"""Who may import whom: the floors hold, importing is cheap, has no side effects, and needs no optional package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OPTIONAL = (
    "triton",
    "transformers",
    "tokenizers",
    "tiktoken",
    "huggingface_hub",
    "tensorboard",
    "matplotlib",
    "playwright",
    "fla",
    "lm_eval",
)
COLD = ("triton", "transformers", "tensorboard", "matplotlib", "tyro", "rich")
MOST_SECONDS = 0.3


def python(code: str, cwd: Path = ROOT) -> dict:
    """What a fresh interpreter prints as JSON on its last line."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def lint_imports(folder: Path) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    # The folder itself comes first on the path, so that a copy is read instead of the installed package.
    env = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


@cache
def contracts() -> subprocess.CompletedProcess:
    return lint_imports(ROOT)


def test_the_floors_hold() -> None:
    assert contracts().returncode == 0, contracts().stdout + contracts().stderr


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("ops/bad.py", "from kimi_linear import config", "kimi_linear.ops is not allowed to import kimi_linear.config"),
        (
            "model/bad.py",
            "def f():\n    import kimi_linear.data",
            "kimi_linear.model is not allowed to import kimi_linear.data",
        ),
        ("reference/bad.py", "import numpy", "kimi_linear.reference is not allowed to import numpy"),
        ("attic/__init__.py", "", "kimi_linear.attic"),
    ],
    ids=["upward", "sibling, inside a function", "the reference needs torch only", "a folder without a floor"],
)
def test_a_broken_floor_is_seen(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    """The real contracts on a copy of the package with one bad line."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "kimi_linear", tmp_path / "kimi_linear", ignore=shutil.ignore_patterns("__pycache__"))
    bad = tmp_path / "kimi_linear" / file
    bad.parent.mkdir(exist_ok=True)
    bad.write_text(f'"""A bad example."""\n\n{line}\n')
    done = lint_imports(tmp_path)
    assert done.returncode != 0
    assert complaint in " ".join(done.stdout.split()), done.stdout


IMPORT_FACE = """
import json, sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import kimi_linear
seconds = time.perf_counter() - start
for name in getattr(kimi_linear, "__all__", []):
    getattr(kimi_linear, name)
print(json.dumps({"seconds": seconds, "modules": sorted(set(sys.modules) - before)}))
"""


def heavy(modules: list[str], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(m == name or m.startswith(name + ".") for m in modules)]


def test_the_public_face_imports_nothing_heavy() -> None:
    """``import kimi_linear`` and every public name of it: under 0.3 s more than torch itself, and none of COLD."""
    runs = [python(IMPORT_FACE) for _ in range(2)]
    assert heavy(runs[0]["modules"], COLD) == []
    fastest = min(run["seconds"] for run in runs)
    print(f"import kimi_linear: {fastest:.3f} s more than torch")
    assert fastest < MOST_SECONDS


def test_a_heavy_import_is_seen() -> None:
    assert heavy(["os", "matplotlib.pyplot", "richer"], COLD) == ["matplotlib"]


IMPORT_ALL = """
import importlib, json, logging, os, pkgutil, sys
import torch

BLOCKED = set({blocked!r})

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
for name in [n for n in sys.modules if n.partition(".")[0] in BLOCKED]:
    del sys.modules[name]

def world():
    return {{
        "threads": torch.get_num_threads(), "dtype": str(torch.get_default_dtype()), "cuda": torch.cuda.is_initialized(),
        "random": torch.get_rng_state().sum().item(), "environ": dict(os.environ), "files": sorted(os.listdir()),
        "handlers": len(logging.getLogger().handlers), "grad": torch.is_grad_enabled(), "path": list(sys.path),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "matmul": torch.get_float32_matmul_precision(),
    }}

import {package}
before, failed, names = world(), {{}}, []
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    if ".kernels.triton." in module.name or ".kernels.hopper." in module.name:
        continue
    names.append(module.name)
    try:
        importlib.import_module(module.name)
    except Exception as error:
        failed[module.name] = f"{{type(error).__name__}}: {{error}}"
after = world()
changed = {{key: [before[key], after[key]] for key in before if before[key] != after[key]}}
print(json.dumps({{"names": names, "failed": failed, "changed": changed}}))
"""


def test_every_module_imports_without_optional_packages_and_without_side_effects(tmp_path: Path) -> None:
    found = python(IMPORT_ALL.format(blocked=OPTIONAL, package="kimi_linear"), cwd=tmp_path)
    assert "kimi_linear.ops.kda" in found["names"]
    assert found["failed"] == {}
    assert found["changed"] == {}


def test_a_module_that_needs_triton_or_changes_the_world_is_seen(tmp_path: Path) -> None:
    package = tmp_path / "bad_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "needs.py").write_text("import triton\n")
    (package / "acts.py").write_text("import os, torch\nos.environ['BAD'] = '1'\ntorch.set_num_threads(7)\n")
    found = python(IMPORT_ALL.format(blocked=OPTIONAL, package="bad_package"), cwd=tmp_path)
    assert list(found["failed"]) == ["bad_package.needs"]
    assert set(found["changed"]) == {"environ", "threads"}
