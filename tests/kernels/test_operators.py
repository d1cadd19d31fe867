"""The operators of chunked KDA on the CPU, under Triton's interpreter: torch's rules kept, and the right states handed out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")

HERE = Path(__file__).parent


def test_states_and_registrations() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreted_operators.py")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert sorted(kind for kind, _, _ in lines) == ["mamba2"] * 14 + ["opcheck"] * 8 + ["past the end"] + ["value"] * 6
    for kind, name, found in lines:
        if kind in ("value", "mamba2"):
            assert float(found) < 2e-5, name  # fp32 rounding, some times what is seen
        else:
            assert found == "True", (kind, name)
