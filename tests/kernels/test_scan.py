"""The scans without a GPU: interpreted at small shapes, compiled for every architecture, and the cost model by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")

HERE = Path(__file__).parent


def test_interpreted_in_every_layout_at_every_gate_whole_and_cut() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreted_scan.py")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    checks = [line.split() for line in done.stdout.splitlines()]
    assert len(checks) == 95
    for name, error, bound in checks:
        assert float(error) <= float(bound), (name, error, bound)
