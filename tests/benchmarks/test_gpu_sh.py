"""benchmarks/gpu.sh runs its parts in order, goes on after one that fails, and says which."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")

PYTHON = """#!/bin/sh
echo "called: $*"
case "$*" in
  -) exit $GPU ;;
  *pytest*) exit 1 ;;
  *kda*) mkdir -p "$TRITON_CACHE_DIR/abc"; echo "tuned before: $(cat "$TRITON_CACHE_DIR"/*/*.json)"; echo best >"$TRITON_CACHE_DIR/abc/x.autotune.json" ;;
esac
case "$*" in
  *kda_decode*) echo page >benchmarks/results/kda_decode.md; sleep 30 ;;
esac
exit 0
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """gpu.sh beside empty scripts, and a Python that only says how it was called."""
    (tmp_path / "benchmarks/ops").mkdir(parents=True)
    (tmp_path / "benchmarks/results").mkdir()
    shutil.copy(ROOT / "benchmarks/gpu.sh", tmp_path / "benchmarks")
    for name in ("_report", "kda", "kda_cpu", "kda_decode", "shapes", "tune"):
        (tmp_path / f"benchmarks/ops/{name}.py").write_text('if __name__ == "__main__":\n    pass\n')
    (tmp_path / "benchmarks/ops/tune_norms.py").touch()  # no main part, so no script
    (tmp_path / "benchmarks/model").mkdir()
    (tmp_path / "benchmarks/model/speed.py").touch()
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return tmp_path


def run(
    clone: Path, *parts: str, gpu: int = 0, seconds: int = 20, tuned: Path | None = None
) -> subprocess.CompletedProcess:
    settings = {
        "PYTHON": str(clone / "python"),
        "OUT": str(clone / "out"),
        "GPU": str(gpu),
        "SECONDS_EACH": str(seconds),
        "TRITON_CACHE_DIR": str(clone / "cache"),
        "TUNED": str(tuned or ""),
    }
    command = ["bash", str(clone / "benchmarks/gpu.sh"), *parts]
    return subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=60)


def called(done: subprocess.CompletedProcess) -> list[str]:
    return [line.removeprefix("called: ") for line in done.stdout.splitlines() if line.startswith("called: -m")]


def test_every_part_runs_though_one_fails_and_one_is_too_slow(clone: Path) -> None:
    done = run(clone, seconds=1)
    assert called(done) == [
        "-m pytest -m gpu -q -p no:benchmark -p no:cacheprovider tests",
        "-m benchmarks.ops.kda",
        "-m benchmarks.ops.kda_decode",
    ]
    assert done.returncode == 1
    assert "== failed: tests (status 1)" in done.stdout
    assert "== failed: kda_decode (status 124, out of time)" in done.stdout
    assert (clone / "out/kda_decode.md").read_text() == "page\n"
    assert "-m benchmarks.ops.kda" in (clone / "out/gpu.log").read_text()


def test_parts_are_chosen_and_given_flags(clone: Path) -> None:
    done = run(clone, "kda: --mode forward --shapes targets", "tune", "model/speed")
    assert called(done) == [
        "-m benchmarks.ops.kda --mode forward --shapes targets",
        "-m benchmarks.ops.tune",
        "-m benchmarks.model.speed",
    ]
    assert done.returncode == 0
    done = run(clone, "kdb")
    assert (done.returncode, called(done)) == (1, [])
    assert "expected tests, a script with its folder, or one of kda kda_decode tune, got kdb" in done.stderr


def test_a_machine_without_a_gpu_is_told_so(clone: Path) -> None:
    done = run(clone, gpu=1)
    assert (done.returncode, called(done)) == (2, [])


def test_what_was_tuned_is_kept_for_another_machine(clone: Path) -> None:
    done = run(clone, "kda")
    assert "tuned before: best" not in done.stdout
    shutil.rmtree(clone / "cache")
    done = run(clone, "kda", tuned=clone / "out/tuned.tgz")
    assert done.returncode == 0
    assert "tuned before: best" in done.stdout
    assert run(clone, "kda", tuned=clone / "none.tgz").returncode == 2
