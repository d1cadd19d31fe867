"""Tensors from files straight into their places: read in pieces, several at once, each where it belongs.

Plain reads instead of a memory map: a map's pages count as memory of the process until they are dropped, and are faulted
in one after the other. On a CPU a piece is read into the parameter itself; for another device or dtype it passes through
one buffer for each reader, pinned where the device is a GPU.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor

from kimi_linear.model.safetensors_file import CheckpointError, StoredTensor

PIECE_BYTES = 8 << 20
"""One read. Large enough for a disk's full speed, small enough to check its numbers while they are in the cache."""
READERS = 3
"""Reads under way at once: some place their pieces while another waits for the disk. With four a disk was slower than
with one, its reads no longer in order (docs/LOG.md)."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Piece(NamedTuple):
    stored: StoredTensor
    offset: int
    """In bytes from the tensor's beginning."""
    target: Tensor
    """Flat, contiguous: the numbers that this read brings."""

    @property
    def nbytes(self) -> int:
        return self.target.numel() * self.stored.dtype.itemsize


def stream_into(pairs: Iterable[tuple[StoredTensor, Tensor]]) -> None:
    """Fill each tensor with the stored one beside it, converted to its dtype.

    Args:
        pairs: a stored tensor, and a contiguous tensor of its shape, on any device but meta.

    Raises:
        CheckpointError: a number that is not finite in the tensor's dtype, or a file that ended early.
    """
    ordered = sorted(pairs, key=lambda pair: (pair[0].path, pair[0].start))
    pieces = [piece for stored, target in ordered for piece in _pieces(stored, target)]
    own = threading.local()

    def read(piece: _Piece) -> None:
        target, descriptor = piece.target, opened[piece.stored.path].fileno()
        if target.device.type == "cpu" and target.dtype == piece.stored.dtype:
            _read_into(descriptor, piece, target)
            _check_finite(piece)
            return
        if not hasattr(own, "buffer"):
            own.buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=target.is_cuda)
        staged = own.buffer[: piece.nbytes].view(piece.stored.dtype)
        _read_into(descriptor, piece, staged)
        target.copy_(staged)
        _check_finite(piece)

    with ExitStack() as files:
        # Open to the end: the kernel reads ahead by what it has seen of a descriptor, and of a new one it has seen nothing.
        opened = {path: files.enter_context(path.open("rb", buffering=0)) for path in {s.path for s, _ in ordered}}
        with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as pool:
            try:
                for _ in pool.map(read, pieces):
                    pass
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _pieces(stored: StoredTensor, target: Tensor) -> list[_Piece]:
    assert target.shape == stored.shape
    size = stored.dtype.itemsize
    parts = target.view(-1).split(PIECE_BYTES // size)
    return [_Piece(stored, i * PIECE_BYTES, part) for i, part in enumerate(parts) if part.numel()]


def _read_into(descriptor: int, piece: _Piece, tensor: Tensor) -> None:
    """Fill a flat CPU tensor of the stored dtype."""
    stored, at = piece.stored, piece.stored.start + piece.offset
    room = tensor.view(torch.uint8).numpy().data
    while room:
        got = os.preadv(descriptor, [room], at)
        if got == 0:
            raise CheckpointError(
                f"{stored.name}: expected {len(room):,} more bytes in {stored.path}, got its end; "
                "the file changed while it was read"
            )
        room, at = room[got:], at + got


def _check_finite(piece: _Piece) -> None:
    if not _finite(piece.target):
        raise CheckpointError(
            f"{piece.stored.name}: expected finite numbers in {piece.target.dtype}, got NaN or infinity from "
            f"{piece.stored.path}; the checkpoint is damaged, or its numbers do not fit that dtype"
        )


def _finite(flat: Tensor) -> bool:
    """Whether a tensor that is not empty holds finite numbers only; one pass, without a mask of its size."""
    if flat.device.type != "cpu":
        low, high = flat.aminmax()  # NaN where any number is
        return bool(low.isfinite() & high.isfinite())
    # As integers, positive floats grow with their value, and infinity and NaN stand above all others; so do negative
    # ones as unsigned integers. By numpy, as torch would start a team of threads in every reader.
    integers = _INTEGERS[flat.dtype.itemsize]
    infinity = int(torch.tensor(torch.inf, dtype=flat.dtype).view(integers))
    bits = flat.view(integers).numpy()
    unsigned = bits.view(f"u{bits.itemsize}")
    return int(bits.max()) < infinity and int(unsigned.max()) < infinity + (1 << 8 * bits.itemsize - 1)
