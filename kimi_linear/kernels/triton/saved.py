"""What a forward in training leaves for its backward: names, shapes and dtypes, which need no triton.

All of it is read again by the backward; to make it anew would take a quarter of the time of both passes. Of eight and a third
[T, HV, K] tensors in the inputs' dtype at K = V = 128, the states at the chunks' starts are two.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kimi_linear.kernels.triton.cuts import choose_cut, may_be_cut, plan

CHUNK = 64
"""C, tokens per chunk, in four tiles of 16."""


class Saved(NamedTuple):
    """From the forward, chunk by chunk; in the inputs' dtype where nothing else is said."""

    late: Tensor
    """[2, chunks, HV, C, K]: read and erase of solve.py."""
    write: Tensor
    """[chunks, HV, C, K]."""
    pairs_q: Tensor
    """[chunks, HV, C, C]."""
    inverse: Tensor
    """[chunks, HV, C, C]: A of solve.py."""
    decay: Tensor
    """[chunks, HV, K] fp32."""
    anchors: Tensor
    """[chunks, HV, 4, K] fp32, as are the totals: of prepare.py."""
    totals: Tensor
    flags: Tensor
    """[chunks, HV, 4] int32."""
    norms: Tensor
    """[chunks, HV, 2, C] fp32."""
    served: Tensor
    """[chunks, HV] int32: of prepare.py."""
    states: Tensor
    """[chunks, HV, V, K]: at the chunks' starts."""
    written: Tensor
    """[chunks, HV, C, V]: u' of scan.py."""
    operators: Tensor
    """[boundaries, HV, K, K] fp32: of segments.py."""
    lost: Tensor
    """[boundaries, HV] int32: of segments.py."""
    forgets: Tensor
    """[chunks, HV] fp32, of prepare.py; without chunks where the heads are too many for a sequence to be cut."""


def count_chunks(batch: int, tokens: int, sequences: int, packed: bool) -> int:
    """Chunks of one call; of packed sequences, at most, since the exact number would make the host wait."""
    return tokens // CHUNK + sequences if packed else batch * -(-tokens // CHUNK)


def shapes_of(
    batch: int,
    tokens: int,
    sequences: int,
    v_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    packed: bool,
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each field of ``Saved``."""
    chunks, wide = count_chunks(batch, tokens, sequences, packed), torch.float32
    boundaries = plan(choose_cut(v_heads, value_dim), sequences, chunks, packed).boundaries
    of_chunks = {
        "write": ((CHUNK, key_dim), dtype),
        "pairs_q": ((CHUNK, CHUNK), dtype),
        "inverse": ((CHUNK, CHUNK), dtype),
        "decay": ((key_dim,), wide),
        "anchors": ((4, key_dim), wide),
        "totals": ((4, key_dim), wide),
        "flags": ((4,), torch.int32),
        "norms": ((2, CHUNK), wide),
        "served": ((), torch.int32),
        "states": ((value_dim, key_dim), dtype),
        "written": ((CHUNK, value_dim), dtype),
    }
    return {
        "late": ((2, chunks, v_heads, CHUNK, key_dim), dtype),
        **{name: ((chunks, v_heads, *shape), kind) for name, (shape, kind) in of_chunks.items()},
        "operators": ((boundaries, v_heads, key_dim, key_dim), wide),
        "lost": ((boundaries, v_heads), torch.int32),
        "forgets": ((chunks if may_be_cut(v_heads, value_dim) else 0, v_heads), wide),
    }
