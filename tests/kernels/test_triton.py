"""The chunk kernels without a GPU: interpreted at small shapes, and compiled for every architecture that they serve."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .launches import SHARED_LIMIT, Launch, compiled_for

pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")

HERE = Path(__file__).parent


def test_interpreted_at_every_gate_and_layout() -> None:
    """fp32, where the only errors are rounding: outputs, states and every gradient, at gates up to e^-766.

    At the strong gates a chunk's log2-decay reaches -4,400, where fp32 steps by 2^-12 = 2.4e-4; what is left of the chunk
    after a token is a difference of two such sums. bf16 rounds its factors by 4e-3 and sees none of it.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / "interpreted.py")], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    cases = [line.split() for line in done.stdout.splitlines()]
    assert len(cases) == 20
    for name, *errors in cases:
        limit = 5e-4 if "stress" in name or "mixed" in name else 3e-5
        assert all(float(error) < limit for error in errors), (name, errors)


def launched(arch: int, key_dim: int, value_dim: int, tokens: int = 200) -> list[Launch]:
    """Every kernel of both directions for packed sequences, a raw gate and the norm, in bf16."""
    from kimi_linear.kernels.triton.chunk_kda import Problem, backward, forward

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    wide = torch.float32
    problem = Problem(
        q=made(1, tokens, 1, key_dim), k=made(1, tokens, 1, key_dim), v=made(1, tokens, 1, value_dim),
        gate=made(1, tokens, 1, key_dim), beta=made(1, tokens, 1, dtype=wide), A_log=made(1, dtype=wide),
        dt_bias=made(key_dim, dtype=wide), lower_bound=None, scale=1.0, normalize=True,
        initial_state=made(2, 1, value_dim, key_dim, dtype=wide), cu_seqlens=torch.tensor([0, tokens // 2, tokens]),
    )  # fmt: skip
    with compiled_for(arch) as launches:
        output, state, _ = forward(problem)
        backward(problem, output, output, state)
    return launches


CHUNK_KERNELS = ("prepare_kernel", "solve_kernel", "value_backward_kernel", "key_backward_kernel")


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 128), (64, 64), (32, 32), (128, 256)])
@pytest.mark.unpoisoned
def test_compiles_within_bounds(key_dim: int, value_dim: int, arch: int) -> None:
    """Every bf16 configuration of the table: no more shared memory than there is, spills only where they were timed."""
    launches = [launch for launch in launched(arch, key_dim, value_dim) if launch.kernel in CHUNK_KERNELS]
    assert {launch.kernel for launch in launches} == set(CHUNK_KERNELS)
    for launch in launches:
        assert launch.shared <= SHARED_LIMIT[arch], launch
        assert launch.stack <= SPILLED.get(launch.kernel, 0), launch


SPILLED = {"prepare_kernel": 256, "key_backward_kernel": 512}
"""Bytes a thread, where narrower slices that spill nothing were slower on an H200: see docs/LOG.md."""


@pytest.mark.unpoisoned
def test_another_length_compiles_nothing_new() -> None:
    first, second = launched(90, 32, 32), launched(90, 32, 32, tokens=328)
    assert [launch.variant for launch in first] == [launch.variant for launch in second]
