"""Tensors from files straight into their places: read in blocks, several at once, past the page cache.

Every block of a file goes through a buffer that is used again and again, by reads that bypass the page cache (O_DIRECT).
A plain read would first fill the cache, which is fresh memory as the model's is, and can cost more than the disk; a memory
map would do so a page at a time, and its pages count as memory of the process. The cache is used for blocks that lie in it,
and where the system or the file system knows no other way: other systems than Linux, and file systems that refuse.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from io import FileIO
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from kimi_linear.model.host_pages import CachedPages, fault_in
from kimi_linear.model.safetensors_file import CheckpointError, StoredTensor

BLOCK_BYTES = 8 << 20
"""One read. Large enough for a disk's full speed, small enough to be placed while it is in the processor's cache."""
WORKERS = 4
"""Threads that each read a block and then place it: some wait for the disk while others copy."""
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Piece(NamedTuple):
    """What one block holds of one tensor: whole numbers only."""

    stored: StoredTensor
    start: int
    """In bytes from the beginning of the file."""
    target: Tensor
    """Flat, contiguous: the numbers that the block brings."""

    @property
    def end(self) -> int:
        return self.start + self.target.numel() * self.stored.dtype.itemsize


def stream_into(pairs: Iterable[tuple[StoredTensor, Tensor]]) -> None:
    """Fill each tensor with the stored one beside it, converted to its dtype.

    Args:
        pairs: a stored tensor, and a contiguous tensor of its shape, on any device but meta.

    Raises:
        CheckpointError: a number that is not finite in the tensor's dtype, or a file that ended early.
    """
    ordered = sorted(pairs, key=lambda pair: (pair[0].path, pair[0].start))
    blocks: dict[tuple[Path, int], list[_Piece]] = {}
    for stored, target in ordered:
        for piece in _pieces(stored, target):
            blocks.setdefault((stored.path, piece.start // BLOCK_BYTES), []).append(piece)
    files = {path: _File(path) for path, _ in blocks}
    for path, _ in blocks:
        files[path].blocks_left += 1
    pinned = any(target.is_cuda for _, target in ordered)
    own = threading.local()

    def work(block: list[_Piece]) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = _aligned_buffer(pinned=pinned)
        with files[block[0].stored.path] as file:
            raw = file.read(own.buffer, block)
        for piece in block:
            _place(piece, raw[piece.start - block[0].start :])

    with ExitStack() as stack, ThreadPoolExecutor(WORKERS, thread_name_prefix="weights") as pool:
        for file in files.values():
            stack.callback(file.close)
        try:
            for _ in pool.map(work, blocks.values()):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _pieces(stored: StoredTensor, target: Tensor) -> Iterator[_Piece]:
    """Cut a tensor where blocks of the file begin; a number across two blocks goes with the first."""
    assert target.shape == stored.shape
    flat, size, at = target.view(-1), stored.dtype.itemsize, 0
    while at < flat.numel():
        start = stored.start + at * size
        next_block = (start // BLOCK_BYTES + 1) * BLOCK_BYTES
        end = min(flat.numel(), -(-(next_block - stored.start) // size))
        yield _Piece(stored, start, flat[at:end])
        at = end


class _File:
    """A file while its blocks are read: opened for the first of them, closed after the last."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocks_left = 0
        self._lock = threading.Lock()
        self._opened: ExitStack | None = None

    def __enter__(self) -> _File:
        with self._lock:
            if self._opened is None:
                with ExitStack() as stack:
                    # Open to the end: the kernel reads ahead by what it has seen of a descriptor.
                    self._plain = stack.enter_context(self.path.open("rb", buffering=0))
                    self._cached = stack.enter_context(closing(CachedPages(self._plain)))
                    self._direct = _open_direct(self.path)
                    if self._direct is not None:
                        stack.enter_context(self._direct)
                    self._opened = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self.blocks_left -= 1
            if self.blocks_left == 0:
                self.close()

    def close(self) -> None:
        """Close what is open; does nothing the second time."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def read(self, buffer: Tensor, block: list[_Piece]) -> Tensor:
        """A part of the buffer with the bytes of these pieces, which follow one another in the file."""
        direct = self._direct
        if direct is not None and not self._cached.hold(block[0].start, block[-1].end):
            try:
                return _read(direct.fileno(), buffer, block, unit=mmap.PAGESIZE)
            except OSError:
                # Some file systems refuse only here. What else may be wrong, the plain read says.
                self._direct = None
        return _read(self._plain.fileno(), buffer, block, unit=1)


def _open_direct(path: Path) -> FileIO | None:
    """A file whose reads bypass the page cache, where the system and the file system have such a thing."""
    flag = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        return FileIO(os.open(path, os.O_RDONLY | flag))
    except OSError:
        return None


def _read(descriptor: int, buffer: Tensor, block: list[_Piece], *, unit: int) -> Tensor:
    """Read whole units of the file, into an address that is a multiple of them."""
    start, end = block[0].start, block[-1].end
    first, last = start // unit * unit, -(-end // unit) * unit
    assert buffer.data_ptr() % unit == 0
    assert last - first <= len(buffer)
    room = buffer[: last - first].numpy().data
    at = first
    while at < end:
        got = os.preadv(descriptor, [room[at - first :]], at)
        if got < unit and at + got < end:
            _ended(block, at + got)
        # Less than a unit at the end of what came is read again: the next read must begin with a whole one.
        at = at + got if at + got >= end else at + got // unit * unit
    return buffer[start - first : end - first]


def _ended(block: list[_Piece], end: int) -> NoReturn:
    piece = next(piece for piece in block if piece.end > end)
    raise CheckpointError(
        f"{piece.stored.name}: expected {piece.end - max(piece.start, end):,} more bytes in {piece.stored.path}, "
        "got its end; the file changed while it was read"
    )


def _aligned_buffer(*, pinned: bool) -> Tensor:
    """Room for a block and the whole pages around it, beginning with a page as direct reads ask."""
    page = mmap.PAGESIZE
    raw = torch.empty(BLOCK_BYTES + 4 * page, dtype=torch.uint8, pin_memory=pinned)
    return raw[-raw.data_ptr() % page :]


def _place(piece: _Piece, raw: Tensor) -> None:
    """Bring the numbers of a piece from the bytes that were read to the tensor, and look at each."""
    target, dtype = piece.target, piece.stored.dtype
    source = raw[: piece.end - piece.start]
    if target.device.type == "cpu":
        fault_in(target)
    if target.device.type == "cpu" and target.dtype == dtype:
        # By numpy, as torch would start a team of threads in every worker.
        np.copyto(target.view(torch.uint8).numpy(), source.numpy())
    else:
        # A file may begin its numbers at any byte, a tensor may not.
        source = source if source.data_ptr() % dtype.itemsize == 0 else source.clone()
        target.copy_(source.view(dtype))
    if not _finite(target):
        raise CheckpointError(
            f"{piece.stored.name}: expected finite numbers in {target.dtype}, got NaN or infinity from "
            f"{piece.stored.path}; the checkpoint is damaged, or its numbers do not fit that dtype"
        )


def _finite(flat: Tensor) -> bool:
    """Whether a tensor that is not empty holds finite numbers only; one pass, without a mask of its size."""
    if flat.device.type != "cpu":
        low, high = flat.aminmax()  # NaN where any number is
        return bool(low.isfinite() & high.isfinite())
    # As integers, positive floats grow with their value, and infinity and NaN stand above all others; so do negative
    # ones as unsigned integers. By numpy, as torch would start a team of threads in every worker.
    integers = _INTEGERS[flat.dtype.itemsize]
    infinity = int(torch.tensor(torch.inf, dtype=flat.dtype).view(integers))
    bits = flat.view(integers).numpy()
    unsigned = bits.view(f"u{bits.itemsize}")
    return int(bits.max()) < infinity and int(unsigned.max()) < infinity + (1 << 8 * bits.itemsize - 1)
