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


def interpreted(script: str) -> list[list[str]]:
    """The words of every line that a script prints under Triton's interpreter."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE / script)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


INPUTS = ("output", "state", "q", "k", "v", "gate", "beta", "A_log", "dt_bias", "initial_state")
ROUNDING = 1e-5
"""Relative error in fp32, where nothing but rounding is left."""
CANCELS = {"gate": 5e-5, "A_log": 1e-4, "dt_bias": 1.5e-4}
"""At the strong gates: a step that forgets everything has a gradient of almost nothing, left of sums that cancel, and those are
as large as the quiet steps around it make them. The gate's derivative then favours the strong steps over the quiet ones. And a
running log-decay of -766 is known to 2^-15."""


def test_interpreted_at_every_gate_and_layout() -> None:
    """Outputs, states and every gradient, at gates up to e^-766 in a tile."""
    cases = interpreted("interpreted.py")
    assert len(cases) == 20
    for name, *errors in cases:
        _, gate, kind = name.split(",")
        names = INPUTS if kind == "raw" else [name for name in INPUTS if name not in ("A_log", "dt_bias")]
        for of, error in zip(names, errors, strict=True):
            limit = CANCELS.get(of, ROUNDING) if gate in ("fast", "stress", "mixed") else ROUNDING
            assert float(error) < limit, (name, of, error)


# Tiles times channels that are anchored past their start, and that are steep.
CASES = {
    "one-tile": (0, 3),
    "partial-last-tile": (0, 2),
    "first-token-of-a-tile": (0, 2),
    "exactly-the-range": (0, 0),
    "exactly-the-deepest": (1, 0),
    "just-over": (0, 1),
}


def test_channels_that_one_anchor_does_not_serve() -> None:
    """They take the path that they are meant to take, up to the last bit of the range, and are exact on it.

    What a prefix computes, gradients too, does not change when later gates of the same tile change its anchors. And gradients
    of 2^-60 are as exact as those of one.
    """
    lines = interpreted("interpreted_tiles.py")
    cases = {name: tuple(map(float, numbers)) for kind, name, *numbers in lines if kind == "case"}
    assert {name: numbers[:2] for name, numbers in cases.items()} == CASES
    assert all(error < ROUNDING for *_, error in cases.values()), cases
    small = {name: float(difference) for kind, name, difference in (line for line in lines if line[0] == "small")}
    assert set(small) == {"exactly-the-range", "exactly-the-deepest"}
    assert all(difference < ROUNDING for difference in small.values()), small
    prefixes = {name: tuple(map(float, numbers)) for kind, name, *numbers in lines if kind == "prefix"}
    assert set(prefixes) == {"early", "late"}
    for name, (_, flat, anchored, _, _, steep, output, gradients) in prefixes.items():
        assert flat == 0, name
        assert steep == 32, name
        assert anchored > 0 or name == "early", name
        assert output < ROUNDING, (name, output)
        assert gradients < ROUNDING, (name, gradients)


def launched(
    arch: int, key_dim: int, value_dim: int, tokens: int = 200, inputs: torch.dtype = torch.bfloat16,
    plain: torch.dtype | None = None,
) -> list[Launch]:  # fmt: skip
    """Every kernel of both directions for packed sequences and the norm; a raw gate, or log-decays of the dtype ``plain``."""
    from kimi_linear.kernels.triton.chunk_kda import Problem, backward, forward_to_train

    def made(*shape: int, dtype: torch.dtype = inputs) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    wide = torch.float32
    problem = Problem(
        q=made(1, tokens, 1, key_dim), k=made(1, tokens, 1, key_dim), v=made(1, tokens, 1, value_dim),
        gate=made(1, tokens, 1, key_dim, dtype=plain or inputs), beta=made(1, tokens, 1, dtype=wide),
        A_log=None if plain else made(1, dtype=wide), dt_bias=None if plain else made(key_dim, dtype=wide), lower_bound=None, scale=1.0, normalize=True,
        initial_state=made(2, 1, value_dim, key_dim, dtype=wide), cu_seqlens=torch.tensor([0, tokens // 2, tokens]),
    )  # fmt: skip
    with compiled_for(arch) as launches:
        output, state, saved = forward_to_train(problem)
        backward(problem, saved, output, output, state)
    return launches


CHUNK_KERNELS = {
    "prepare_kernel", "solve_kernel", "value_backward_kernel", "anchor_kernel", "anchored_backward_kernel",
    "tile_backward_kernel", "token_backward_kernel", "steep_backward_kernel",
}  # fmt: skip


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 128), (64, 64), (32, 32), (128, 256)])
@pytest.mark.unpoisoned
def test_compiles_within_bounds(key_dim: int, value_dim: int, arch: int) -> None:
    """Every bf16 configuration of the table: no more shared memory than there is, spills only where they were timed."""
    launches = [launch for launch in launched(arch, key_dim, value_dim) if launch.kernel in CHUNK_KERNELS]
    assert {launch.kernel for launch in launches} == CHUNK_KERNELS
    for launch in launches:
        assert launch.shared <= SHARED_LIMIT[arch], launch
        assert launch.stack <= SPILLED.get(launch.kernel, 0), launch


SPILLED = {
    "tile_backward_kernel": 384, "value_backward_kernel": 8, "anchored_backward_kernel": 48, "solve_kernel": 24, "prepare_kernel": 48,
}  # fmt: skip
"""Bytes a thread, where what spills nothing was slower on a GPU: see docs/LOG.md."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.unpoisoned
def test_log_decays_of_any_type_compile(dtype: torch.dtype) -> None:
    assert {launch.kernel for launch in launched(90, 32, 32, plain=dtype)} >= CHUNK_KERNELS


@pytest.mark.unpoisoned
def test_another_length_compiles_nothing_new() -> None:
    first, second = launched(90, 32, 32), launched(90, 32, 32, tokens=328)
    assert [launch.variant for launch in first] == [launch.variant for launch in second]
