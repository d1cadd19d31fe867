"""The second stage of every weight gradient: sums over partial results in a fixed order, so that two runs are bitwise equal.

    target[d, r] = sum_p partial[p, r, d]        the row after the target's, where there is one, goes to last[d]

One program owns a block of columns of one row r and adds up all parts; no atomics. Grid (column blocks, R). The parts are
few, since a program of the first stage has summed over many tokens already.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.configs import Config, config_of


@triton.jit(do_not_specialize=["parts"])
def column_sum_kernel(
    partial, target, last, parts, rows, width, R: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    r = tl.program_id(1)
    column = tl.program_id(0) * BD + tl.arange(0, BD)
    live = column < width
    part = tl.arange(0, BP)
    sums = tl.zeros([BP, BD], tl.float32)
    for first in range(0, parts, BP):
        at = ((first + part).to(tl.int64) * rows + r)[:, None] * width + column[None, :]
        sums += tl.load(partial + at, ((first + part) < parts)[:, None] & live[None, :], 0.0)
    total = tl.sum(sums, 0)
    if r < R:
        tl.store(target + column.to(tl.int64) * R + r, total.to(target.dtype.element_ty), live)
    else:
        tl.store(last + column, total.to(last.dtype.element_ty), live)


def column_sum(partial: Tensor, target: Tensor, last: Tensor | None = None, config: Config | None = None) -> None:
    """Add up ``partial`` [P, R, D] fp32 into ``target`` [D, R], or into [D, R-1] and ``last`` [D]. All dense."""
    parts, rows, width = partial.shape
    config = config or config_of("column_sum", partial, "any")
    grid = (triton.cdiv(width, config["BD"]), rows)
    own = rows - (last is not None)
    column_sum_kernel[grid](
        partial, target, target if last is None else last, parts, rows, width, R=own, **config.launch
    )
