"""KDA on a GPU, forward from raw inputs: gate and l2norm inside the timed region, at two gates.

Every shape is first checked at every gate against the fp64 kernel; a wrong answer gets no speed. All variants of a row run
in turns in one process. Run from the repository root: ``python -m benchmarks.ops.kda_cuda``. fla is timed where it is
installed (``pip install fla-core``).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks._report import write_report
from kimi_linear.ops import BoundedGate, SoftplusGate, chunk_kda
from kimi_linear.testing.factories import GATE_KINDS, GateKind, KDAInputs, kda_inputs
from kimi_linear.testing.timers import compare
from kimi_linear.testing.tolerances import relative_error

DIM = 128
FLOOR_BYTES = 2 * 5 * DIM + 2
"""Per token and head: q, k, v, raw gate and output in bf16, and beta: what must move whatever the algorithm."""
BOUND = 5e-3
DRAWN = 8192
TIMED_GATES: tuple[GateKind, ...] = ("init", "fast")


@dataclass(frozen=True)
class Shape:
    """One packed batch: heads and the lengths of its sequences."""

    name: str
    heads: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return sum(self.lengths)

    def inputs(self, gate: GateKind, tokens: int | None = None) -> KDAInputs:
        """Raw bf16 inputs on the GPU; ``tokens`` makes one short sequence instead, for checks."""
        lengths = list(self.lengths) if len(self.lengths) > 1 and tokens is None else None
        tokens = tokens or self.tokens
        # Inputs are drawn on the CPU: a long sequence repeats its first 8192 tokens, or drawing would take minutes.
        drawn = tokens if lengths else min(tokens, DRAWN)
        inputs = kda_inputs(
            1, drawn, self.heads, key_dim=DIM, gate=gate, raw=True, normalized=False, lengths=lengths,
            dtype=torch.bfloat16, device="cuda",
        )  # fmt: skip
        assert isinstance(inputs.gate, SoftplusGate | BoundedGate)
        assert tokens % drawn == 0
        times = (1, tokens // drawn, 1, 1)
        longer = {name: getattr(inputs, name).repeat(times) for name in ("q", "k", "v")}
        raw = dataclasses.replace(inputs.gate, x=inputs.gate.x.repeat(times))
        return dataclasses.replace(inputs, **longer, gate=raw, beta=inputs.beta.repeat(times[:3]))


MIXED = (1300, 547, 2048, 963, 271, 3063)
SHAPES = (
    Shape("T=8192 H=32", 32, (8192,)),
    Shape("T=65536 H=16", 16, (65536,)),
    Shape("T=65536 H=32", 32, (65536,)),
    Shape("T=65536 H=4", 4, (65536,)),
    Shape("packed H=32", 32, MIXED),
    Shape("packed H=96", 96, MIXED),
    Shape("64 x 128 tokens H=32", 32, (128,) * 64),
)
WITH_TORCH = ("T=8192 H=32", "packed H=32")
"""Shapes at which plain torch is timed too: it takes a second at the long ones."""


def ours(inputs: KDAInputs, impl: str) -> Callable[[], object]:
    return lambda: chunk_kda(
        *inputs.positional(), normalize_qk=True, cu_seqlens=inputs.cu_seqlens, impl=impl  # type: ignore[arg-type]
    )  # fmt: skip


def fla(inputs: KDAInputs) -> Callable[[], object]:
    from fla.ops.kda import chunk_kda as attend  # type: ignore[import-not-found]

    gate = inputs.gate
    assert isinstance(gate, SoftplusGate)
    return lambda: attend(
        inputs.q, inputs.k, inputs.v, gate.x, inputs.beta, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
        A_log=gate.A_log, dt_bias=gate.dt_bias.flatten(), output_final_state=True, cu_seqlens=inputs.cu_seqlens,
    )  # fmt: skip


def check() -> str:
    """The worst relative error by gate, after holding it to the bound."""
    cells = []
    for gate in GATE_KINDS:
        inputs = SHAPES[0].inputs(gate, tokens=1000)
        exact = chunk_kda(*inputs.to(torch.float64).positional(), normalize_qk=True, impl="torch")
        got = chunk_kda(*inputs.positional(), normalize_qk=True, impl="triton")
        worst = max(relative_error(a, e) for a, e in zip(got, exact, strict=True))
        assert worst < BOUND, f"{gate}: relative error {worst:.2g}, allowed {BOUND}"
        cells.append(f"{gate} {worst:.1e}")
    return ", ".join(cells)


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.empty(1 << 31, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return (
        2 * source.numel() / compare({"copy": lambda: target.copy_(source)}, repeats=10, device="cuda")["copy"].median
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each variant")
    arguments = parser.parse_args()
    errors, bandwidth, rows = check(), copy_bandwidth(), []
    has_fla = importlib.util.find_spec("fla") is not None
    for shape in SHAPES:
        for gate in TIMED_GATES:
            inputs = shape.inputs(gate)
            variants = {"triton": ours(inputs, "triton")}
            if shape.name in WITH_TORCH:
                variants["torch"] = ours(inputs, "torch")
            if has_fla:
                variants["fla"] = fla(inputs)
            times = compare(variants, warmup=2, repeats=arguments.repeats, device="cuda")
            floor = shape.tokens * shape.heads * FLOOR_BYTES / bandwidth
            mine = times["triton"].median
            cells = [times[name].median * 1e3 if name in times else "–" for name in ("torch", "fla")]
            ratio = times["fla"].median / mine if has_fla else "–"
            rows.append([shape.name, gate, mine * 1e3, floor * 1e3, f"{floor / mine:.0%}", *cells, ratio])
            print(rows[-1], flush=True)
            del inputs, variants
            torch.cuda.empty_cache()
    write_report(
        "kda_forward",
        title="KDA forward on a GPU",
        about=f"From raw inputs, bf16, K = V = {DIM}, softplus gate and l2norm inside; medians of {arguments.repeats} interleaved "
        f"calls, L2 flushed, no gradient. Floor: {FLOOR_BYTES} bytes per token and head at the {bandwidth / 1e12:.2f} TB/s that a "
        f"copy moves here. Relative errors against fp64 by gate, before timing (bound {BOUND}): {errors}. "
        "`impl=\"auto\"` takes triton for each of these rows.",
        columns=["shape", "gate", "triton, ms", "floor, ms", "of the floor", "torch, ms", "fla, ms", "fla / triton"],
        rows=rows,
        device="cuda",
        packages=("triton", "fla-core"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
