"""The scans without a GPU: interpreted at small shapes, compiled for every architecture, and the cutting rule by itself."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .launches import SHARED_LIMIT, Launch, compiled_for

pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")

HERE = Path(__file__).parent


def test_interpreted_in_every_layout_whole_and_cut() -> None:
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
    assert len(checks) == 143
    for name, error, bound in checks:
        assert float(error) <= float(bound), (name, error, bound)


def launched(
    arch: int, key_dim: int, value_dim: int, tokens: int = 4000, most: int = 4, forgets: bool = True
) -> list[Launch]:
    """Every kernel of both directions, with all that they can do switched on, in bf16; sequences in up to ``most`` segments."""
    from kimi_linear.kernels.triton.cuts import Cut
    from kimi_linear.kernels.triton.scan import scan
    from kimi_linear.kernels.triton.scan_backward import scan_backward

    chunks, cut = 2 * -(-tokens // 128), Cut(most=most)

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    erase, read, write = (made(chunks, 1, 64, key_dim) for _ in range(3))
    u, pairs, output = made(chunks, 1, 64, value_dim), made(chunks, 1, 64, 64), made(1, tokens, 1, value_dim)
    decay = made(chunks, 1, key_dim, dtype=torch.float32)
    state = made(2, 1, value_dim, key_dim, dtype=torch.float32)
    bounds = decay.amax(-1) if forgets else None
    layout = torch.tensor([0, tokens // 2, tokens]), torch.tensor([0, chunks // 2, chunks], dtype=torch.int32)
    with compiled_for(arch) as launches:
        result = scan(
            erase, u, read, write, pairs, decay, state, output, *layout, forgets=bounds, save=True, export=[(0, 64)],
            cut=cut,
        )  # fmt: skip
        scan_backward(
            erase, read, write, pairs, decay, output, state, result.operators, *layout, forgets=bounds, lost=result.lost,
            cut=cut,
        )  # fmt: skip
    return launches


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("key_dim", [32, 64, 128, 256])
@pytest.mark.unpoisoned
def test_compiles_without_spills(key_dim: int, arch: int) -> None:
    """Every bf16 configuration of the table: no spilled register, no more shared memory than there is."""
    value_dim = max(key_dim, 64)
    whole = launched(arch, key_dim, value_dim, most=1)
    assert [launch.kernel.removesuffix("_kernel") for launch in whole] == ["scan", "scan_backward"]
    cut, told = (launched(arch, key_dim, value_dim, forgets=forgets) for forgets in (False, True))
    for launches in (cut, told):
        assert [launch.kernel.removesuffix("_kernel") for launch in launches] == [
            "build", "combine", "scan", "scan_backward", "combine", "scan_backward"
        ]  # fmt: skip
    # Walks that write outputs do not ask what is forgotten.
    assert [a.variant == b.variant for a, b in zip(cut, told, strict=True)] == [False, False, True, False, False, True]
    for launch in whole + cut + told:
        assert launch.stack == 0, launch
        assert launch.shared <= SHARED_LIMIT[arch], launch


@pytest.mark.unpoisoned
def test_another_length_compiles_nothing_new() -> None:
    """Neither the number of tokens, nor of chunks, boundaries or segments is in the compiled code."""
    first, second = launched(90, 32, 32), launched(90, 32, 32, tokens=4224)
    assert [launch.variant for launch in first] == [launch.variant for launch in second]


def test_a_sequence_that_is_not_cut_is_summed_in_one_order() -> None:
    """Beside longer ones it is walked with their configuration: another slice of V at most, whose columns are independent."""
    from kimi_linear.kernels.triton.configs import table

    for kernel in ("kda_scan", "kda_scan_backward"):
        for arch, classes in table()[kernel].items():
            for name, whole in classes.items():
                segmented = table()[f"{kernel}_segmented"][arch][name]
                assert (whole["BK"], whole.num_warps) == (segmented["BK"], segmented.num_warps), (kernel, arch, name)


def test_a_cut_follows_the_length_alone_and_leaves_room_for_every_boundary() -> None:
    from kimi_linear.kernels.triton.cuts import Cut, choose_cut, plan

    assert choose_cut(32, 128).segments(10**6) == 1  # 32 heads in slices of 64 leave two segments at most
    assert choose_cut(4, 128).segments(1024) == 16
    assert choose_cut(4, 128).segments(31) == 1  # fewer than four segments of eight chunks
    assert choose_cut(1, 128).segments(1024) == 32  # joined one after the other, so no more
    draw = random.Random(0)
    for _ in range(200):
        cut = Cut(most=draw.randint(1, 40), least=draw.randint(1, 12))
        sizes = [draw.choice([0, 1, 7, 40, 300]) for _ in range(draw.randint(1, 12))]
        first = [sum(sizes[:n]) for n in range(len(sizes))]
        made = plan(cut, len(sizes), sum(sizes) + draw.randint(0, 3), packed=True)
        taken: list[int] = []
        for n, size in enumerate(sizes):
            begin = n * made.apart if made.apart else first[n] // cut.least
            taken += range(begin, begin + cut.segments(size) - 1)
        assert len(set(taken)) == len(taken), (cut, sizes)
        assert max(taken, default=-1) < made.boundaries or not taken, (cut, sizes)
        rows = plan(cut, 3, 3 * sizes[0], packed=False)
        assert rows.boundaries == 3 * (cut.segments(sizes[0]) - 1)
