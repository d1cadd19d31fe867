"""Rows scaled to unit length, forward and backward, each one pass over memory.

    r = (sum_d x_d^2 + eps)^-1/2      y = x r      dx = r (dy - u (u . dy)),  u = x r

A program owns BR rows, whole, in registers; r is made again in the backward from the x that it has to read anyway.
Grid (row blocks). x and dy may be strided rows (``rows_of``); y and dx are dense.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.configs import Config, config_of
from kimi_linear.kernels.triton.rows import block_width, row_start, rows_of, width_class


@triton.jit(do_not_specialize=["rows", "count_x", "inner_x"])
def forward_kernel(
    x, y, rows, count_x, outer_x, inner_x, width, eps, BR: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BD)
    live = (row < rows)[:, None] & (column < width)[None, :]
    start_x = row_start(row, count_x, outer_x, inner_x)
    b_x = tl.load(x + start_x[:, None] + column[None, :], live, 0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(b_x * b_x, 1) + eps)
    tl.store(y + row[:, None] * width + column[None, :], (b_x * r[:, None]).to(y.dtype.element_ty), live)


@triton.jit(do_not_specialize=["rows", "count_x", "inner_x", "count_dy", "inner_dy"])
def backward_kernel(
    x, dy, dx, rows, count_x, outer_x, inner_x, count_dy, outer_dy, inner_dy, width, eps,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    column = tl.arange(0, BD)
    live = (row < rows)[:, None] & (column < width)[None, :]
    start_x, start_dy = row_start(row, count_x, outer_x, inner_x), row_start(row, count_dy, outer_dy, inner_dy)
    b_x = tl.load(x + start_x[:, None] + column[None, :], live, 0.0).to(tl.float32)
    b_dy = tl.load(dy + start_dy[:, None] + column[None, :], live, 0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(b_x * b_x, 1) + eps)
    unit = b_x * r[:, None]
    along = tl.sum(unit * b_dy, 1)
    b_dx = (b_dy - unit * along[:, None]) * r[:, None]
    tl.store(dx + row[:, None] * width + column[None, :], b_dx.to(dx.dtype.element_ty), live)


def forward(x: Tensor, eps: float, config: Config | None = None) -> Tensor:
    """``x * rsqrt(sum(x**2, -1) + eps)`` of x [..., D], dense, in x's dtype."""
    width, at = x.shape[-1], rows_of(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = y.numel() // max(1, width)
    config = config or config_of("l2norm_forward", x, width_class(width))
    if rows:
        forward_kernel[(triton.cdiv(rows, config["BR"]),)](
            at.tensor, y, rows, at.count, at.outer, at.inner, width, eps, BD=block_width(width), **config.launch
        )
    return y


def backward(x: Tensor, dy: Tensor, eps: float, config: Config | None = None) -> Tensor:
    """The gradient of x [..., D], dense, in x's dtype."""
    width, at, at_dy = x.shape[-1], rows_of(x), rows_of(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = dx.numel() // max(1, width)
    config = config or config_of("l2norm_backward", x, width_class(width))
    if rows:
        backward_kernel[(triton.cdiv(rows, config["BR"]),)](
            at.tensor, at_dy.tensor, dx, rows, at.count, at.outer, at.inner, at_dy.count, at_dy.outer, at_dy.inner,
            width, eps, BD=block_width(width), **config.launch,
        )  # fmt: skip
    return dx
