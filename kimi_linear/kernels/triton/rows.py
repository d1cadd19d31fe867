"""What the row norms share: where a row of a strided tensor begins, and how many programs walk over the rows.

A tensor [..., D] is rows of D dense numbers. Its rows may lie at two strides, ``outer`` and ``inner`` (tokens and heads of
a slice of a fused projection): row r begins at (r // count) * outer + (r % count) * inner. Anything wilder is copied.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Rows(NamedTuple):
    """A tensor as rows.

    Attributes:
        tensor: the tensor itself, or a dense copy.
        count: rows at the inner stride before the outer one steps.
        outer, inner: strides in numbers.
    """

    tensor: Tensor
    count: int
    outer: int
    inner: int


def rows_of(x: Tensor) -> Rows:
    """``x`` [..., D] as rows, without a copy where its leading dims fold into two strides."""
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        x = x.contiguous()
    folded: list[list[int]] = []  # [length, stride], innermost last
    for length, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if length == 1:
            continue
        if folded and folded[-1][1] == length * stride:
            folded[-1] = [folded[-1][0] * length, stride]
        else:
            folded.append([length, stride])
    if len(folded) > 2:
        x = x.contiguous()
        folded = [[x.numel() // max(1, x.shape[-1]), x.shape[-1]]]
    if not folded:
        return Rows(x, 1, 0, 0)
    if len(folded) == 1:
        return Rows(x, 1, folded[0][1], 0)
    return Rows(x, folded[1][0], folded[0][1], folded[1][1])


@triton.jit
def row_start(row, count, outer, inner):
    """Offset of rows [BR] int64, the first element of each."""
    return (row // count).to(tl.int64) * outer + (row % count).to(tl.int64) * inner


def block_width(width: int) -> int:
    """D up to the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def width_class(width: int) -> str:
    """Rows of a head, of a small model, of a large one: how many rows fit a program follows from it."""
    for limit in (64, 128, 256, 1024, 4096, MAX_WIDTH):
        if width <= limit:
            return f"D <= {limit}"
    raise ValueError(f"D: expected at most {MAX_WIDTH}, got {width}; use impl='torch'")


MAX_WIDTH = 8192
"""A row lives in one program's registers."""
