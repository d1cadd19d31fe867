"""The inside of a feed-forward layer where a gradient is wanted, forward and backward, each one pass over memory.

    y = g s(g) u      dg = dy u s(g) (1 + g (1 - s(g)))      du = dy g s(g)      s: sigmoid

Only the inputs are kept; in plain torch silu(g) is, too, and the backward is three passes. A program owns BR rows by BD columns, the
same for every shape: there is nothing to tune where no number is used twice. Grid (row blocks, column blocks).
Inputs may be strided rows (``rows_of``), such as the halves of one product; outputs are dense.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.rows import Rows, block_width, row_start, rows_of

NUMBERS, MOST_COLUMNS, WARPS = 2048, 1024, 4
"""Of a program: sixteen numbers a thread, two loads of 16 bytes of each bf16 input."""


@triton.jit(do_not_specialize=["rows", "count_g", "inner_g", "count_u", "inner_u"])
def forward_kernel(
    gate, up, y, rows, count_g, outer_g, inner_g, count_u, outer_u, inner_u, width, BR: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    live = (row < rows)[:, None] & (column < width)[None, :]
    start_g, start_u = row_start(row, count_g, outer_g, inner_g), row_start(row, count_u, outer_u, inner_u)
    g = tl.load(gate + start_g[:, None] + column[None, :], live, 0.0).to(tl.float32)
    u = tl.load(up + start_u[:, None] + column[None, :], live, 0.0).to(tl.float32)
    b_y = g / (1.0 + tl.exp(-g)) * u
    tl.store(y + row[:, None] * width + column[None, :], b_y.to(y.dtype.element_ty), live)


@triton.jit(do_not_specialize=["rows", "count_g", "inner_g", "count_u", "inner_u", "count_dy", "inner_dy"])
def backward_kernel(
    gate, up, dy, dgate, dup, rows, count_g, outer_g, inner_g, count_u, outer_u, inner_u, count_dy, outer_dy, inner_dy,
    width, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BD + tl.arange(0, BD)
    live = (row < rows)[:, None] & (column < width)[None, :]
    start_g, start_u = row_start(row, count_g, outer_g, inner_g), row_start(row, count_u, outer_u, inner_u)
    start_dy = row_start(row, count_dy, outer_dy, inner_dy)
    g = tl.load(gate + start_g[:, None] + column[None, :], live, 0.0).to(tl.float32)
    u = tl.load(up + start_u[:, None] + column[None, :], live, 0.0).to(tl.float32)
    b_dy = tl.load(dy + start_dy[:, None] + column[None, :], live, 0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-g))
    out = row[:, None] * width + column[None, :]
    tl.store(dgate + out, (b_dy * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), live)
    tl.store(dup + out, (b_dy * g * s).to(dup.dtype.element_ty), live)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [..., D], dense, in gate's dtype."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _launch(forward_kernel, (gate, up), (y,))
    return y


def backward(gate: Tensor, up: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(dgate, dup), dense."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty_like(dgate)
    _launch(backward_kernel, (gate, up, dy), (dgate, dup))
    return dgate, dup


def _launch(kernel, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> None:
    width = outputs[0].shape[-1]
    rows = outputs[0].numel() // max(1, width)
    if not rows * width:
        return
    columns = min(block_width(width), MOST_COLUMNS)
    at: list[Rows] = [rows_of(x) for x in inputs]
    kernel[triton.cdiv(rows, NUMBERS // columns), triton.cdiv(width, columns)](
        *(x.tensor for x in at), *outputs, rows, *(n for x in at for n in (x.count, x.outer, x.inner)), width,
        BR=NUMBERS // columns, BD=columns, num_warps=WARPS,
    )  # fmt: skip
