"""Candidates for the short convolution, the norms and the sum over partial results; see ``benchmarks/ops/tune.py``."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from benchmarks.ops._problem import Problem, Run
from kimi_linear.kernels.triton.configs import Config

TOKENS = 8192


def problems() -> list[Problem]:
    """Every entry of the pointwise kernels."""
    return [*_convolutions(), *_norms(), _column_sum()]


def _convolutions() -> list[Problem]:
    found = []
    for dtype, taps in ((torch.bfloat16, 4), (torch.bfloat16, 8), (torch.float32, 4), (torch.float32, 8)):
        name = f"{8 * dtype.itemsize} bit, W <= {taps}"
        size = TOKENS * 4096 * dtype.itemsize
        about = f"T={TOKENS} D=4096 W={taps}"
        forward = _grid(BT=(64, 128), BD=(128, 256, 512), U=(4, 8), num_warps=(1, 2, 4))
        backward = _grid(BT=(64, 128), BD=(64, 128, 256), U=(2, 4), num_warps=(1, 2, 4))
        # Channels a thread: fewer waste the bus, more the registers.
        fit = [c for c in forward if 4 <= c["BD"] // (32 * c.num_warps) <= 8 and (taps == 4 or c["U"] == 4)]
        fit_back = [c for c in backward if 2 <= c["BD"] // (32 * c.num_warps) <= 4]
        found += [
            Problem(
                kernel="short_conv_forward", shape_class=name, about=about, moved=2 * size,
                candidates=tuple(fit), build=_convolution(dtype, taps, False),
            ),
            Problem(
                kernel="short_conv_backward", shape_class=name, about=about, moved=3 * size,
                candidates=tuple(fit_back), build=_convolution(dtype, taps, True),
            ),
        ]  # fmt: skip
    return found


def _convolution(dtype: torch.dtype, taps: int, back: bool) -> Callable[[str], Run]:
    def build(device: str) -> Run:
        from kimi_linear.kernels.triton.short_conv import backward, forward

        x, dy = (torch.randn(1, TOKENS, 4096, device=device).to(dtype) for _ in range(2))
        weight = torch.randn(4096, taps, device=device)
        if not back:
            return lambda config: (forward([x], [weight], None, None, None, True, config)[0][0],)

        def run(config: Config) -> tuple[torch.Tensor, ...]:
            (dx,), dweight, _, _ = backward([x], [weight], None, None, None, [dy], None, True, config)
            return dx, dweight

        return run

    return build


def _norms() -> list[Problem]:
    found = []
    for width in (64, 128, 256, 1024, 4096, 8192):
        rows = TOKENS * 4096 // width
        numbers = (512, 1024, 2048, 4096, 8192, 16384)  # of a program's tile
        blocks = sorted({max(1, n // width) for n in numbers})
        warps = (1, 2, 4, 8) if width <= 1024 else (4, 8, 16)
        forward = _grid(BR=tuple(blocks), num_warps=warps)
        back = _grid(BR=tuple(blocks), PROGRAMS=(1056, 2112) if width <= 1024 else (132, 264), num_warps=warps)
        size, name, about = 2 * rows * width, f"D <= {width}", f"{rows} rows of {width}, bf16"
        for kernel, passes, candidates in (
            ("l2norm_forward", 2, forward),
            ("l2norm_backward", 3, forward),
            ("gated_rmsnorm_forward", 3, forward),
            ("gated_rmsnorm_backward", 5, back),
        ):
            tiles = [c for c in candidates if 8 <= c["BR"] * width // (32 * c.num_warps) <= 32]
            found.append(
                Problem(
                    kernel=kernel, shape_class=name, about=about, moved=passes * size,
                    candidates=tuple(tiles), build=_norm(kernel, rows, width),
                )
            )  # fmt: skip
    return found


def _norm(kernel: str, rows: int, width: int) -> Callable[[str], Run]:
    def build(device: str) -> Run:
        from kimi_linear.kernels.triton import gated_rmsnorm, l2norm

        x, gate, dy = (torch.randn(rows, width, device=device).bfloat16() for _ in range(3))
        weight = torch.randn(width, device=device)
        runs: dict[str, Run] = {
            "l2norm_forward": lambda config: (l2norm.forward(x, 1e-6, config),),
            "l2norm_backward": lambda config: (l2norm.backward(x, dy, 1e-6, config),),
            "gated_rmsnorm_forward": lambda config: (gated_rmsnorm.forward(x, gate, weight, 1e-5, "sigmoid", config),),
            "gated_rmsnorm_backward": lambda config: gated_rmsnorm.backward(
                x, gate, weight, dy, 1e-5, "sigmoid", True, config
            ),
        }
        return runs[kernel]

    return build


def _column_sum() -> Problem:
    def build(device: str) -> Run:
        from kimi_linear.kernels.triton.column_sum import column_sum

        partial, target = torch.randn(64, 4, 4096, device=device), torch.empty(4096, 4, device=device)

        def run(config: Config) -> tuple[torch.Tensor, ...]:
            column_sum(partial, target, None, config)
            return (target.clone(),)

        return run

    return Problem(
        kernel="column_sum", shape_class="any", about="64 parts of 4 x 4096, and a copy", moved=64 * 4 * 4096 * 4,
        candidates=tuple(_grid(BP=(32, 64, 128), BD=(16, 32, 64), num_warps=(4, 8))), build=build,
    )  # fmt: skip


def _grid(*, num_warps: tuple[int, ...], **constants: tuple[int, ...]) -> list[Config]:
    """Every combination."""
    names = list(constants)
    return [
        Config(constants=dict(zip(names, values, strict=True)), num_warps=warps)
        for *values, warps in itertools.product(*constants.values(), num_warps)
    ]
