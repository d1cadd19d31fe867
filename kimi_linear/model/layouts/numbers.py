"""The numbers of a stored tensor, read in pieces, so that no more than a piece or one tensor is in memory."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from kimi_linear.model.safetensors_file import CheckpointError, StoredTensor

PIECE_BYTES = 8 << 20
"""One read of the scan: large enough for a disk's full speed, small enough to stay in the cache while it is looked at."""


def read_numbers(stored: StoredTensor, start: int, nbytes: int, into: Tensor | None = None) -> Tensor:
    """Some numbers of a stored tensor, flat, in the dtype of the file.

    Args:
        stored: which tensor.
        start: first byte, counted from the tensor's own beginning.
        nbytes: how many.
        into: a flat CPU tensor of that size and dtype to fill; a new one where None.

    Raises:
        CheckpointError: the file ended early.
    """
    assert start + nbytes <= stored.nbytes
    numbers = torch.empty(nbytes // stored.dtype.itemsize, dtype=stored.dtype) if into is None else into
    room = memoryview(numbers.view(torch.uint8).numpy())  # type: ignore[arg-type]
    descriptor = os.open(stored.path, os.O_RDONLY)
    try:
        at = stored.start + start
        while room:
            got = os.preadv(descriptor, [room], at)
            if got == 0:
                raise CheckpointError(f"{stored.name}: {stored.path} ended early; it changed while it was read")
            room, at = room[got:], at + got
    finally:
        os.close(descriptor)
    return numbers


def is_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite. Integers always are; types of one byte have no such test and pass."""
    if not numbers.dtype.is_floating_point or numbers.dtype.itemsize < 2 or not numbers.numel():
        return True
    low, high = numbers.aminmax()  # NaN where any number is
    return bool(low.isfinite() & high.isfinite())
