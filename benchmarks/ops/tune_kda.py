"""Candidates for the kernels of chunked KDA; see ``benchmarks/ops/tune.py``.

A candidate is judged by whole calls that use it, forward and backward, and forward alone: outputs, final states and every gradient
must be those of the present entry. It is timed alone: the launches that these calls made are made again, on the same tensors. A
forward alone keeps less, and what is fastest in it need not be so in a training.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.ops._problem import Problem, Run
from benchmarks.ops.shapes import CHUNK
from kimi_linear.kernels.triton.configs import Config, config_of
from kimi_linear.kernels.triton.segments import shape_class
from kimi_linear.testing.factories import GateKind, kda_inputs

TOKENS = 8192
WIDTH = 4096
"""H * K: 32 heads of 128."""
GATES: tuple[GateKind, ...] = ("init", "fast")
"""What is timed, one after the other: nothing is anchored in the first, in the second many channels are, and few tiles are steep."""


OF_FORWARD = ("kda_prepare", "kda_solve")
"""Launched by a forward alone, too, and then timed in both."""


def problems() -> list[Problem]:
    """Every entry that is served on a GPU: bf16, K up to 128."""
    return [
        Problem(
            kernel=kernel, shape_class=shape_class(dim, torch.bfloat16),
            about=f"T={TOKENS} H={WIDTH // dim} K=V={dim}, bf16, gates {', '.join(GATES)}",
            moved=int(len(GATES) * (1 + (kernel in OF_FORWARD)) * bytes_of(dim) * TOKENS * WIDTH // dim),
            candidates=tuple(_whole_rows(c, dim) if kernel == "kda_prepare" else c for c in candidates),
            build=partial(_build, kernel, dim),
        )
        for kernel, (candidates, bytes_of) in KERNELS.items()
        for dim in (32, 64, 128)
    ]  # fmt: skip


def _grid(
    *, num_warps: tuple[int, ...] = (4,), num_stages: tuple[int, ...] = (1,), maxnreg: tuple[int | None, ...] = (None,),
    **constants: int,
) -> list[Config]:  # fmt: skip
    return [
        Config(constants=constants, num_warps=warps, num_stages=stages, maxnreg=registers)
        for warps, stages, registers in itertools.product(num_warps, num_stages, maxnreg)
    ]


def _whole_rows(config: Config, dim: int) -> Config:
    """In 16 bits a slice of prepare's is the whole of a row."""
    return replace(config, constants={"BK": dim})


# Names in the table; candidates; bytes per token and head that must move, from K = V.
# Of steep_backward that is its flags, as nearly every program of it ends there.
# Never 8 warps where a product has 32 columns: illegal memory accesses on sm_90 (Triton 3.6.0; docs/LOG.md).
KERNELS: dict[str, tuple[list[Config], Callable[[int], float]]] = {
    "kda_prepare": (
        _grid(BK=128, num_warps=(1, 2, 4), num_stages=(1, 2, 3)),
        lambda d: 12 * d + 4 * CHUNK + 9 * 4 * d / CHUNK,
    ),
    "kda_solve": (
        [config for B in (64, 128) for config in _grid(BK=B, BV=B, maxnreg=(None, 168))]
        + _grid(BK=64, BV=64, num_warps=(8,)),
        lambda d: 8 * d + 4 * CHUNK,
    ),
    "kda_value_backward": (
        [config for BV in (32, 64, 128) for config in _grid(BV=BV, num_stages=(1, 2))],
        lambda d: 14 * d + 6 * CHUNK,
    ),
    "kda_anchor": (_grid(num_warps=(1, 2, 4, 8)), lambda d: 12 * d + 4 * 4 * d / CHUNK),
    "kda_anchored_backward": (
        [config for BK, BV in ((64, 32), (64, 64), (64, 128)) for config in _grid(BK=BK, BV=BV, num_stages=(1, 2, 3))],
        lambda d: 20 * d + 4 * d * d / CHUNK + 4 * CHUNK,
    ),
    "kda_tile_backward": (
        [config for BK, BV in ((64, 32), (64, 64), (64, 128)) for config in _grid(BK=BK, BV=BV, num_stages=(1, 2, 3))],
        lambda d: 20 * d + 4 * d * d / CHUNK + 4 * CHUNK,
    ),
    "kda_token_backward": (_grid(num_warps=(1, 2, 4, 8)), lambda d: 20 * d + 4 * 4 * d / CHUNK),
    "kda_steep_backward": (_grid(num_warps=(1, 2, 4)), lambda d: 4 * 4 / CHUNK),
}


class _Recorder:
    """In place of a kernel: launches it, and keeps every launch."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.launches: list[Callable[[], object]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def launch(*arguments: object, **options: object) -> object:
            self.launches.append(partial(self.kernel[grid], *arguments, **options))
            return self.launches[-1]()

        return launch


def _build(kernel: str, dim: int, device: str) -> Run:
    runs = [_build_one(kernel, dim, gate, device) for gate in GATES]
    return lambda config: tuple(x for run in runs for x in run(config))


def _build_one(kernel: str, dim: int, gate: GateKind, device: str) -> Run:
    from kimi_linear.kernels.triton import chunk_kda

    inputs = kda_inputs(
        1, TOKENS, WIDTH // dim, key_dim=dim, gate=gate, raw=True, normalized=False, dtype=torch.bfloat16, device=device,
        drawn_on=device,
    )  # fmt: skip
    parts = inputs.gate
    assert not isinstance(parts, torch.Tensor)
    problem = chunk_kda.Problem(
        q=inputs.q, k=inputs.k, v=inputs.v, gate=parts.x, beta=inputs.beta, A_log=parts.A_log, dt_bias=parts.dt_bias,
        lower_bound=None, scale=dim**-0.5, normalize=True, initial_state=inputs.initial_state, cu_seqlens=None,
    )  # fmt: skip
    d_output, d_state = torch.randn_like(inputs.v), torch.randn_like(inputs.initial_state)
    symbol = f"{kernel.removeprefix('kda_')}_kernel"
    known: dict[str, tuple[list[Callable[[], object]], tuple[torch.Tensor, ...]]] = {}

    def run(config: Config) -> tuple[torch.Tensor, ...]:
        """The results of whole calls; from the second time on the launches alone, and the first results."""
        if str(config) in known:
            launches, results = known[str(config)]
            for launch in launches:
                launch()
            return results
        recorder = _Recorder(getattr(chunk_kda, symbol))

        def chosen(name: str, x: torch.Tensor, shape: str) -> Config:
            return config if name == kernel else config_of(name, x, shape)

        with patch.object(chunk_kda, symbol, recorder), patch.object(chunk_kda, "config_of", chosen):
            output, state, saved = chunk_kda.forward_to_train(problem)
            gradients = chunk_kda.backward(problem, saved, output, d_output, d_state)
            alone = chunk_kda.forward(problem)
        assert recorder.launches, f"{symbol} is launched by neither pass"
        # Copies, for a launch that is made again may write to what it wrote before.
        results = tuple(x.clone() for x in (output, state, *gradients, *alone) if x is not None)
        known[str(config)] = (recorder.launches, results)
        return results

    return run
