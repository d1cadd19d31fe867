"""The Makefile's promises: it installs once, again only when the pins change, and says what is wrong with a Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
        os.utime(tmp_path / name, (1000, 1000))
    return tmp_path


def make(folder: Path, *words: str) -> subprocess.CompletedProcess:
    # Not the flags of a make that runs these tests.
    env = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    command = ["make", "--no-print-directory", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def stamp(folder: Path, *names: str, when: int) -> None:
    (folder / ".venv").mkdir(exist_ok=True)
    for name in names:
        (folder / ".venv" / name).touch()
        os.utime(folder / ".venv" / name, (when, when))


def test_the_second_call_installs_nothing(clone: Path) -> None:
    first = make(clone, "-n", "demo").stdout
    assert "-m venv .venv" in first
    assert "pip install" in first
    assert "-c constraints.txt -e ." in first
    stamp(clone, ".made", ".core", when=2000)
    second = make(clone, "-n", "demo").stdout
    assert "pip" not in second
    assert "kimi-linear demo" in second
    assert "'.[dev]'" in make(clone, "-n", "test").stdout
    stamp(clone, ".dev", when=2000)
    assert "pip" not in make(clone, "-n", "test", "demo", "lint", "types").stdout


def test_a_changed_pin_installs_again_into_the_same_environment(clone: Path) -> None:
    stamp(clone, ".made", ".core", ".dev", when=2000)
    os.utime(clone / "constraints.txt", (3000, 3000))
    again = make(clone, "-n", "test").stdout
    assert "pip install" in again
    assert "-m venv" not in again


def test_an_old_python_is_refused_with_the_way_out(clone: Path) -> None:
    old = clone / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && { echo Python 3.9.2; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    done = make(clone, "install", f"PYTHON={old}")
    assert done.returncode != 0
    assert f"PYTHON: expected Python >= 3.11, got Python 3.9.2 from {old}" in done.stderr
    assert not (clone / ".venv").exists()
    done = make(clone, "install", "PYTHON=")
    assert "make PYTHON=/path/to/python3.11" in done.stderr
    assert not (clone / ".venv").exists()


def test_every_target_is_in_the_help() -> None:
    listed = make(ROOT, "help").stdout
    for target in ("demo", "test", "lint", "types", "bench"):
        assert f"make {target} " in listed
