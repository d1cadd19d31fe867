"""Root-mean-square norm of rows, with or without an output gate, forward and backward, each one pass over memory.

    r = (mean_d x_d^2 + eps)^-1/2      n = x r w      y = n a(g)      a: sigmoid, swish (g sigmoid(g)), or 1
    dg = dy n a'(g)      dn = dy a(g)      dw = sum_rows dn x r      dx = r (m - u mean(u m)),  u = x r, m = dn w

A program owns whole rows in registers; r is made again in the backward from the x that it has to read anyway, and nothing
but the inputs is saved. Backward programs walk over blocks of BR rows and keep dw in registers: ``partial`` [programs, D]
fp32 is summed in a fixed order by ``column_sum``. The gate is 0 none, 1 sigmoid, 2 swish.
Grid (row blocks), backward (programs). Inputs may be strided rows (``rows_of``); outputs are dense. y and dy may be of another dtype than x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.column_sum import column_sum
from kimi_linear.kernels.triton.configs import Config, config_of
from kimi_linear.kernels.triton.rows import block_width, row_start, rows_of, width_class

GATES = {"none": 0, "sigmoid": 1, "swish": 2}


@triton.jit(do_not_specialize=["rows", "count_x", "inner_x", "count_g", "inner_g"])
def forward_kernel(
    x, gate, weight, y, rows, count_x, outer_x, inner_x, count_g, outer_g, inner_g, width, eps,
    GATE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BD)
    live = (row < rows)[:, None] & (column < width)[None, :]
    start_x = row_start(row, count_x, outer_x, inner_x)
    b_x = tl.load(x + start_x[:, None] + column[None, :], live, 0.0).to(tl.float32)
    w = tl.load(weight + column, column < width, 0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(b_x * b_x, 1) / width + eps)
    b_y = b_x * r[:, None] * w[None, :]
    if GATE != 0:
        start_g = row_start(row, count_g, outer_g, inner_g)
        g = tl.load(gate + start_g[:, None] + column[None, :], live, 0.0).to(tl.float32)
        a = 1.0 / (1.0 + tl.exp(-g))
        if GATE == 2:
            a = a * g
        b_y = b_y * a
    tl.store(y + row[:, None] * width + column[None, :], b_y.to(y.dtype.element_ty), live)


@triton.jit(do_not_specialize=["rows", "programs", "count_x", "inner_x", "count_g", "inner_g", "count_dy", "inner_dy"])
def backward_kernel(
    x, gate, weight, dy, dx, dgate, partial, rows, programs, count_x, outer_x, inner_x, count_g, outer_g, inner_g,
    count_dy, outer_dy, inner_dy, width, eps,
    GATE: tl.constexpr, NEED_WEIGHT: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    column = tl.arange(0, BD)
    w = tl.load(weight + column, column < width, 0.0).to(tl.float32)
    dw = tl.zeros([BR, BD], tl.float32)
    for block in range(pid, tl.cdiv(rows, BR), programs):
        row = (tl.full([], 0, tl.int64) + block) * BR + tl.arange(0, BR)
        live = (row < rows)[:, None] & (column < width)[None, :]
        start_x, start_dy = row_start(row, count_x, outer_x, inner_x), row_start(row, count_dy, outer_dy, inner_dy)
        out = row[:, None] * width + column[None, :]
        b_x = tl.load(x + start_x[:, None] + column[None, :], live, 0.0).to(tl.float32)
        dn = tl.load(dy + start_dy[:, None] + column[None, :], live, 0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(b_x * b_x, 1) / width + eps)
        unit = b_x * r[:, None]
        if GATE != 0:
            start_g = row_start(row, count_g, outer_g, inner_g)
            g = tl.load(gate + start_g[:, None] + column[None, :], live, 0.0).to(tl.float32)
            s = 1.0 / (1.0 + tl.exp(-g))
            if GATE == 1:
                a, slope = s, s * (1.0 - s)
            else:
                a, slope = g * s, s * (1.0 + g * (1.0 - s))
            dg = dn * unit * w[None, :] * slope
            tl.store(dgate + out, dg.to(dgate.dtype.element_ty), live)
            dn = dn * a
        if NEED_WEIGHT:
            dw += dn * unit
        m = dn * w[None, :]
        along = tl.sum(unit * m, 1) / width
        tl.store(dx + out, ((m - unit * along[:, None]) * r[:, None]).to(dx.dtype.element_ty), live)
    if NEED_WEIGHT:
        tl.store(partial + pid.to(tl.int64) * width + column, tl.sum(dw, 0), column < width)


def forward(
    x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, activation: str, config: Config | None = None,
    *, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """``x * rsqrt(mean(x**2, -1) + eps) * weight * activation(gate)`` of x [..., D], dense, in ``dtype`` or x's."""
    width, at = x.shape[-1], rows_of(x)
    at_g = at if gate is None else rows_of(gate)
    y = torch.empty(x.shape, dtype=x.dtype if dtype is None else dtype, device=x.device)
    rows = y.numel() // max(1, width)
    config = config or config_of("gated_rmsnorm_forward", x, width_class(width))
    if rows:
        forward_kernel[(triton.cdiv(rows, config["BR"]),)](
            at.tensor, at_g.tensor, weight.contiguous(), y, rows, at.count, at.outer, at.inner,
            at_g.count, at_g.outer, at_g.inner, width, eps, GATE=GATES[activation], BD=block_width(width), **config.launch,
        )  # fmt: skip
    return y


def backward(
    x: Tensor, gate: Tensor | None, weight: Tensor, dy: Tensor, eps: float, activation: str, need_weight: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dgate, dweight), dense, in the inputs' dtypes, whatever dy's; dgate is empty without a gate, dweight where not needed."""
    width, at, at_dy = x.shape[-1], rows_of(x), rows_of(dy)
    at_g = at if gate is None else rows_of(gate)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dgate = x.new_empty(0) if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    dweight = torch.empty(width if need_weight else 0, dtype=weight.dtype, device=x.device)
    rows = dx.numel() // max(1, width)
    config = config or config_of("gated_rmsnorm_backward", x, width_class(width))
    blocks, constants = triton.cdiv(rows, config["BR"]), dict(config.launch)
    programs = min(blocks, constants.pop("PROGRAMS"))
    partial = torch.empty(programs, 1, width if need_weight else 0, dtype=torch.float32, device=x.device)
    if programs:
        backward_kernel[(programs,)](
            at.tensor, at_g.tensor, weight.contiguous(), at_dy.tensor, dx, dgate, partial, rows, programs,
            at.count, at.outer, at.inner, at_g.count, at_g.outer, at_g.inner, at_dy.count, at_dy.outer, at_dy.inner,
            width, eps, GATE=GATES[activation], NEED_WEIGHT=need_weight, BD=block_width(width), **constants,
        )  # fmt: skip
    if need_weight:
        column_sum(partial, dweight)
    return dx, dgate, dweight
