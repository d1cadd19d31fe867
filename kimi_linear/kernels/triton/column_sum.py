"""The second stage of every weight gradient: sums over partial results in a fixed order, so that two runs are bitwise equal.

    target[d, r] = sum_p partial[p, r, d]        the row after the target's, where there is one, goes to last[d]

One program owns a block of columns of one row r and adds up the parts of one group; no atomics. Few parts are one group.
Many, such as the two thousand of a norm's backward, would leave a handful of programs to walk through them, one load's
latency after another: groups of BP are then summed side by side into scratch [groups, R, D], and these in a second launch.
Grid (column blocks, R, groups).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kimi_linear.kernels.triton.configs import Config, config_of

FEW = 4
"""Up to this many times BP parts are summed by one program: a second launch costs as much as that."""


@triton.jit(do_not_specialize=["parts", "group", "own", "step_group", "step_row", "step_column"])
def column_sum_kernel(
    partial, target, last, parts, group, rows, width, own, step_group, step_row, step_column,
    BP: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    r, g = tl.program_id(1), tl.program_id(2)
    column = tl.program_id(0) * BD + tl.arange(0, BD)
    live = column < width
    part = tl.arange(0, BP)
    stop = tl.minimum((g + 1) * group, parts)
    sums = tl.zeros([BP, BD], tl.float32)
    for first in range(g * group, stop, BP):
        at = ((first + part).to(tl.int64) * rows + r)[:, None] * width + column[None, :]
        sums += tl.load(partial + at, ((first + part) < stop)[:, None] & live[None, :], 0.0)
    total = tl.sum(sums, 0)
    if r < own:
        at = column.to(tl.int64) * step_column + r * step_row + g * step_group
        tl.store(target + at, total.to(target.dtype.element_ty), live)
    else:
        tl.store(last + column, total.to(last.dtype.element_ty), live)


def column_sum(partial: Tensor, target: Tensor, last: Tensor | None = None, config: Config | None = None) -> None:
    """Add up ``partial`` [P, R, D] fp32 into ``target`` [D, R], or into [D, R-1] and ``last`` [D]. All dense."""
    parts, rows, width = partial.shape
    config = config or config_of("column_sum", partial, "any")
    blocks = triton.cdiv(width, config["BD"])
    if parts > FEW * config["BP"]:
        groups = triton.cdiv(parts, config["BP"])
        scratch = torch.empty(groups, rows, width, dtype=partial.dtype, device=partial.device)
        column_sum_kernel[blocks, rows, groups](
            partial, scratch, scratch, parts, config["BP"], rows, width, rows, rows * width, width, 1, **config.launch
        )
        partial, parts = scratch, groups
    own = rows - (last is not None)
    column_sum_kernel[blocks, rows, 1](
        partial, target, target if last is None else last, parts, parts, rows, width, own, 0, 1, own, **config.launch
    )
