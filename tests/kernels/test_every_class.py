"""The chunk kernels of the classes that test_triton.py does not compile: bf16 on sm_80, K = 256, and fp32."""

from __future__ import annotations

import pytest
import torch

from .launches import SHARED_LIMIT
from .test_triton import launched

pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")

CONSUMER_LIMIT = 99 * 1024
"""Shared memory of one program on sm_86 and sm_89, which take sm_80's entries."""
BF16, FP32 = torch.bfloat16, torch.float32
SPILLED = {
    (80, BF16): {"prepare_kernel": 112},
    # As at K = 128, where what spills nothing was slower.
    (90, BF16): {"tile_backward_kernel": 232, "anchored_backward_kernel": 24},
    # Products of three terms keep both operands split in registers, and a slice of 16 channels, the least there is, still multiplies
    # whole [C, C] gradients and their transposes. The inverse multiplies [C, C] by [C, C].
    (80, FP32): {
        "prepare_kernel": 8, "solve_kernel": 176, "scan_kernel": 8, "scan_backward_kernel": 72, "value_backward_kernel": 16,
        "anchored_backward_kernel": 176, "tile_backward_kernel": 144,
    },
    (90, FP32): {"solve_kernel": 72, "anchored_backward_kernel": 24, "tile_backward_kernel": 24},
}  # fmt: skip
"""Bytes a thread, by architecture and dtype."""


@pytest.mark.parametrize(
    ("arch", "key_dim", "value_dim", "inputs"),
    [
        (80, 128, 256, BF16),
        (80, 256, 256, BF16),
        (90, 256, 256, BF16),
        (100, 256, 256, BF16),
        (80, 128, 128, FP32),
        (90, 128, 128, FP32),
        (100, 128, 128, FP32),
    ],
)
@pytest.mark.unpoisoned
def test_compiles_within_bounds(arch: int, key_dim: int, value_dim: int, inputs: torch.dtype) -> None:
    """No more shared memory than there is, and registers spilled only where it is said."""
    launches = launched(arch, key_dim, value_dim, tokens=4000, inputs=inputs)
    assert {"solve_kernel", "build_kernel", "scan_kernel", "scan_backward_kernel", "value_backward_kernel"} <= {
        launch.kernel for launch in launches
    }
    for launch in launches:
        assert launch.shared <= (CONSUMER_LIMIT if arch == 80 else SHARED_LIMIT[arch]), launch
        assert launch.stack <= SPILLED.get((arch, inputs), {}).get(launch.kernel, 0), launch
