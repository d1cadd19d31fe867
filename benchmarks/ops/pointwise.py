"""Short convolution and norms on a GPU: bytes per second, forward and backward, beside torch and fla in the same run.

    python -m benchmarks.ops.pointwise                    every row; fla where it is installed (pip install fla-core)
    python -m benchmarks.ops.pointwise --rows conv --no-fla
    python -m benchmarks.ops.pointwise --device cpu       a row of each kind at toy size: runs anywhere

Each row's output and gradients are first checked against plain torch in fp64 at the timed inputs; a wrong answer gets no
speed. Variants run in turns, the L2 flushed before each call; the table has medians and is written after every row.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._report import Section, needs_gpu, write_page
from kimi_linear.ops import Impl, gated_rms_norm, l2_normalize, rms_norm, short_conv, short_conv_qkv
from kimi_linear.testing.timers import compare
from kimi_linear.testing.tolerances import relative_error, rounding_band

Kind = Literal["conv", "qkv", "l2", "rms", "gated"]
MIXED = (1300, 547, 2048, 963, 271, 3063)
EPS = 1e-5
PASSES = {"conv": (2, 3), "qkv": (2, 3), "l2": (2, 3), "rms": (2, 3), "gated": (3, 5)}
"""Tensors of x's size that forward and backward must move: whatever the algorithm."""
EXACT_ELEMENTS = 1 << 28
"""Above so many numbers the answer is checked on the first tokens: fp64 holds a dozen copies."""
COLUMNS = (
    "row",
    "mode",
    "µs",
    "GB/s",
    "of a copy",
    "torch, µs",
    "torch / ours",
    "fla, µs",
    "fla / ours",
    "worst error",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operation at one shape.

    Attributes:
        kind: which operation.
        shape: of x; for qkv each of the three projections.
        lengths: of packed sequences, where they are packed.
        dtype: of x and its gate; weights are fp32.
        with_fla: whether fla is timed beside: its autotuning takes seconds for every new shape.
    """

    kind: Kind
    shape: tuple[int, ...]
    lengths: tuple[int, ...] = ()
    dtype: torch.dtype = torch.bfloat16
    with_fla: bool = False

    @property
    def name(self) -> str:
        """As the table shows it."""
        packed = f" packed in {len(self.lengths)}" if self.lengths else ""
        return f"{self.kind} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}{packed}"

    def moved(self, backward: bool) -> int:
        """Bytes that must move."""
        size = torch.Size(self.shape).numel() * self.dtype.itemsize * (3 if self.kind == "qkv" else 1)
        return size * (sum(PASSES[self.kind]) if backward else PASSES[self.kind][0])

    def leaves(self, device: str) -> dict[str, Tensor]:
        """Inputs by name, q, k and v as x0, x1, x2."""
        made = {f"x{i}": torch.randn(self.shape, device=device).to(self.dtype) for i in range(self.parts)}
        for i in range(self.parts):
            size = (self.shape[-1], 4) if self.kind in ("conv", "qkv") else (self.shape[-1],)
            made[f"weight{i}"] = torch.randn(size, device=device)
        if self.kind == "gated":
            made["gate"] = torch.randn(self.shape, device=device).to(self.dtype)
        if self.kind == "l2":
            del made["weight0"]
        return {name: x.requires_grad_() for name, x in made.items()}

    @property
    def parts(self) -> int:
        """Inputs of x's kind."""
        return 3 if self.kind == "qkv" else 1

    def cu_seqlens(self, device: str) -> Tensor | None:
        """Offsets of the packed sequences."""
        if not self.lengths:
            return None
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=device)


HEADS = (1, 8192, 32, 128)
ROWS = (
    Row(kind="conv", shape=(1, 8192, 4096), with_fla=True),
    Row(kind="qkv", shape=(1, 8192, 4096), lengths=MIXED),
    Row(kind="gated", shape=HEADS, with_fla=True),
    Row(kind="rms", shape=(1, 8192, 2304), with_fla=True),
    Row(kind="l2", shape=HEADS, with_fla=True),
    Row(kind="conv", shape=(1, 8192, 4096), lengths=MIXED, with_fla=True),
    Row(kind="conv", shape=(1, 8192, 4096), dtype=torch.float32),
    Row(kind="conv", shape=(64, 128, 4096)),
    Row(kind="conv", shape=(1, 65536, 4096)),
    Row(kind="conv", shape=(1, 256, 4096)),
    Row(kind="gated", shape=(1, 65536, 32, 128)),
    Row(kind="gated", shape=(1, 8192, 32, 64)),
    Row(kind="gated", shape=(1, 8192, 16, 256)),
    Row(kind="rms", shape=(1, 8192, 8192)),
    Row(kind="rms", shape=(1, 65536, 2304)),
)
TOY = (
    Row(kind="conv", shape=(1, 60, 64), dtype=torch.float32),
    Row(kind="qkv", shape=(1, 60, 64), lengths=(7, 0, 53), dtype=torch.float32),
    Row(kind="gated", shape=(1, 60, 2, 32), dtype=torch.float32),
    Row(kind="rms", shape=(1, 60, 64), dtype=torch.float32),
    Row(kind="l2", shape=(1, 60, 2, 32), dtype=torch.float32),
)


def ours(row: Row, leaves: Mapping[str, Tensor], cu: Tensor | None, impl: Impl) -> tuple[Tensor, ...]:
    """Outputs of the public operation."""
    x = leaves["x0"]
    if row.kind == "conv":
        return (short_conv(x, leaves["weight0"], cu_seqlens=cu, impl=impl).output,)
    if row.kind == "qkv":
        weights = (leaves["weight0"], leaves["weight1"], leaves["weight2"])
        return short_conv_qkv(x, leaves["x1"], leaves["x2"], weights, cu_seqlens=cu, impl=impl)[:3]
    if row.kind == "l2":
        return (l2_normalize(x, EPS, impl=impl),)
    if row.kind == "rms":
        return (rms_norm(x, leaves["weight0"], EPS, impl=impl),)
    return (gated_rms_norm(x, leaves["gate"], leaves["weight0"], EPS, "swish", impl=impl),)


def torchs(row: Row, leaves: Mapping[str, Tensor]) -> tuple[Tensor, ...] | None:
    """The same by torch's own operators, as a user writes it; None where torch has none for packed sequences."""
    if row.lengths:
        return None
    x, weight = leaves["x0"], leaves.get("weight0")
    if row.kind == "conv":
        assert weight is not None
        padded = F.pad(x.mT, (3, 0))
        return (F.silu(F.conv1d(padded, weight.to(x.dtype)[:, None], groups=x.shape[2])).mT,)
    if row.kind == "l2":
        return (F.normalize(x.float(), dim=-1).to(x.dtype),)
    assert weight is not None
    y = F.rms_norm(x, weight.shape, weight.to(x.dtype), EPS)
    return (y if row.kind == "rms" else y * F.silu(leaves["gate"]),)


def fla(row: Row, leaves: Mapping[str, Tensor], cu: Tensor | None) -> tuple[Tensor, ...]:
    """The same by fla's Triton kernels."""
    x, weight = leaves["x0"], leaves.get("weight0")
    if row.kind == "conv":
        from fla.modules.causal_conv1d import causal_conv1d  # type: ignore[import-not-found]

        return (causal_conv1d(x, weight, activation="silu", cu_seqlens=cu)[0],)
    if row.kind == "l2":
        from fla.modules.norm.l2norm import l2norm  # type: ignore[import-not-found]

        return (l2norm(x, EPS),)
    if row.kind == "rms":
        from fla.modules.norm.layernorm import rms_norm as norm  # type: ignore[import-not-found]

        return (norm(x, weight, None, eps=EPS),)
    from fla.modules.norm.fused_norm_gate import rms_norm_gated  # type: ignore[import-not-found]

    return (rms_norm_gated(x, leaves["gate"], weight, None, activation="swish", eps=EPS),)


def worst_error(row: Row, device: str, impl: Impl) -> float:
    """Largest relative error of an output or gradient against plain torch in fp64.

    Raises:
        AssertionError: it is above what rounding explains.
    """
    shape = row.shape
    if torch.Size(shape).numel() > EXACT_ELEMENTS:
        shape = (shape[0], max(1, EXACT_ELEMENTS // torch.Size((shape[0], *shape[2:])).numel()), *shape[2:])
    row = Row(kind=row.kind, shape=shape, lengths=row.lengths, dtype=row.dtype)
    leaves, cu = row.leaves(device), row.cu_seqlens(device)
    wide = {name: x.detach().double().requires_grad_() for name, x in leaves.items()}
    got, exact = ours(row, leaves, cu, impl), ours(row, wide, cu, "torch")
    sent = [torch.randn_like(y) for y in got]
    gradients = torch.autograd.grad(got, list(leaves.values()), sent)
    expected = torch.autograd.grad(exact, list(wide.values()), [dy.double() for dy in sent])
    errors = {}
    for name, a, e in zip((*leaves, *map(str, range(len(got)))), (*gradients, *got), (*expected, *exact), strict=True):
        # Sums of T terms in fp32 for the weights; one rounding for everything else.
        allowed = 1e-4 if name.startswith("weight") else max(rounding_band(a.dtype), 1e-6)
        errors[name] = relative_error(a, e)
        assert errors[name] <= allowed, f"{row.name}: {name}: relative error {errors[name]:.2g}, allowed {allowed:.2g}"
    return max(errors.values())


def variants(row: Row, leaves: Mapping[str, Tensor], device: str, with_fla: bool) -> dict[str, Callable[[], tuple[Tensor, ...]]]:  # fmt: skip
    """What is timed, by name."""
    cu = row.cu_seqlens(device)
    calls: dict[str, Callable[[], tuple[Tensor, ...]]] = {"ours": lambda: ours(row, leaves, cu, "auto")}
    if not row.lengths and row.kind != "qkv":
        calls["torch"] = lambda: torchs(row, leaves) or ()
    if with_fla and row.with_fla:
        calls["fla"] = lambda: fla(row, leaves, cu)
    return calls


def time_row(row: Row, device: str, with_fla: bool, repeats: int, bandwidth: float) -> list[list[object]]:
    """Two lines of the table: forward, and forward with backward."""
    error, lines = worst_error(row, device, "auto"), []
    leaves = row.leaves(device)
    calls = variants(row, leaves, device, with_fla)
    sent = [torch.randn_like(y) for y in calls["ours"]()]

    def forward(call: Callable[[], tuple[Tensor, ...]]) -> None:
        with torch.no_grad():
            call()

    def both(call: Callable[[], tuple[Tensor, ...]]) -> None:
        torch.autograd.grad(call(), list(leaves.values()), sent)

    for mode, run in (("forward", forward), ("both", both)):
        bound = {name: lambda call=call, run=run: run(call) for name, call in calls.items()}
        times = {n: t.median for n, t in compare(bound, warmup=2, repeats=repeats, device=device).items()}
        rate = row.moved(mode == "both") / times["ours"]
        cells: list[object] = [
            row.name,
            mode,
            f"{times['ours'] * 1e6:.1f}",
            f"{rate / 1e9:,.0f}",
            f"{rate / bandwidth:.0%}",
        ]
        for name in ("torch", "fla"):
            known = name in times
            cells += [
                f"{times[name] * 1e6:.1f}" if known else "–",
                f"{times[name] / times['ours']:.2f}" if known else "–",
            ]
        lines.append([*cells, f"{error:.1e}"])
        print("  ".join(map(str, lines[-1])), flush=True)
    return lines


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and written."""
    source = torch.zeros(1 << (31 if device == "cuda" else 24), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    timing = compare({"copy": lambda: target.copy_(source)}, repeats=10, device=device)["copy"]
    return 2 * source.numel() / timing.median


def main(argv: Sequence[str] | None = None) -> int:
    """Check, time, and write a row after the other; status 1 where an answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", default=default, choices=("cuda", "cpu"), help="cpu runs toy rows and writes no page"
    )
    parser.add_argument("--rows", default="", help="only rows whose name has this in it")
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each variant")
    parser.add_argument("--no-fla", action="store_true", help="leave fla out even where it is installed")
    parser.add_argument("--no-page", action="store_true", help="print only")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda":
        needs_gpu()
    rows = [row for row in (TOY if arguments.device == "cpu" else ROWS) if arguments.rows in row.name]
    if not rows:
        parser.error(f"--rows: no row has {arguments.rows!r} in its name")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(arguments.device)
    with_fla = arguments.device == "cuda" and not arguments.no_fla and importlib.util.find_spec("fla") is not None
    lines: list[list[object]] = []
    wrong = []
    print(f"a copy moves {bandwidth / 1e12:.2f} TB/s\n" + "  ".join(COLUMNS), flush=True)
    for row in rows:
        try:
            lines += time_row(row, arguments.device, with_fla, arguments.repeats, bandwidth)
        except AssertionError as error:
            wrong.append(str(error))
            print(f"wrong: {error}", flush=True)
        gc.collect()
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
        if arguments.device == "cuda" and not arguments.no_page:
            write_page(
                "pointwise",
                title="Short convolution and norms",
                about=f"bf16 inputs unless said, fp32 weights, 4 taps with SiLU, swish gates; both is forward with backward. Medians of "
                f"{arguments.repeats} interleaved calls, L2 flushed. GB/s counts what must move: forward reads x (and the gate) and "
                f"writes y; backward reads x, dy (and the gate) and writes dx (and dgate). A large copy moves {bandwidth / 1e12:.2f} TB/s. "
                "torch is conv1d + silu, rms_norm, normalize. Errors are relative, against fp64."
                + (f" Wrong, and not timed: {'; '.join(wrong)}." if wrong else ""),
                sections=[Section(columns=COLUMNS, rows=lines)],
                device=arguments.device,
                packages=("triton", "fla-core"),
            )  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
