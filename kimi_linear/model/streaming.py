"""Tensors from files straight into their places: read in blocks, several at once, through a page cache that stays small.

The kernel is asked for blocks ahead of those that are read, and told to let go of each that has arrived. Left alone it would
keep them all: as much fresh memory again as the model's, which can cost more than the disk. Blocks that lay in the cache before
stay there. Numbers of the wanted dtype go into a CPU tensor without a copy between; others through a buffer that is used again
and again.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kimi_linear.model.host_pages import CachedPages, advise, fault_in
from kimi_linear.model.safetensors_file import CheckpointError, StoredTensor

BLOCK_BYTES = 8 << 20
"""One step of reading ahead. Large enough for a disk's full speed."""
AHEAD = 16
"""Blocks that are asked for and not yet placed."""
WORKERS = 4
"""Threads that each place a block: some wait for the disk while others copy."""
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
    own, room, failed = threading.local(), threading.Semaphore(AHEAD), threading.Event()

    def work(file: _File, block: list[_Piece], fresh: bool) -> None:
        try:
            if not hasattr(own, "buffer"):
                own.buffer = torch.empty(BLOCK_BYTES + 8, dtype=torch.uint8, pin_memory=pinned)
            for piece in block:
                _place(piece, file, own.buffer)
            file.done(block, fresh)
        except BaseException:
            failed.set()
            raise
        finally:
            room.release()

    with ExitStack() as stack, ThreadPoolExecutor(WORKERS, thread_name_prefix="weights") as pool:
        for file in files.values():
            stack.callback(file.close)
        tasks: list[Future[None]] = []
        for (path, _), block in blocks.items():
            room.acquire()
            if failed.is_set():
                break
            tasks.append(pool.submit(work, files[path], block, files[path].ask(block)))
        for task in tasks:
            task.result()


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
        self._opened: FileIO | None = None

    def ask(self, block: list[_Piece]) -> bool:
        """Have the block's pages read; whether any is new in the cache."""
        if self._opened is None:
            # Open to the end: the kernel reads ahead by what it has seen of a descriptor.
            self._opened = self.path.open("rb", buffering=0)
        start, end = block[0].start, block[-1].end
        with closing(CachedPages(self._opened)) as cached:  # not for longer: a map holds a descriptor of its own
            if cached.hold(start, end):
                return False
        advise(self._opened, start, end, "POSIX_FADV_WILLNEED")
        return True

    def read(self, piece: _Piece, room: memoryview) -> None:
        """The bytes of a piece."""
        assert self._opened is not None
        at = piece.start
        while at < piece.end:
            got = os.preadv(self._opened.fileno(), [room[at - piece.start :]], at)
            if got == 0:
                raise CheckpointError(
                    f"{piece.stored.name}: expected {piece.end - at:,} more bytes in {self.path}, got its end; the file "
                    "changed while it was read"
                )
            at += got

    def done(self, block: list[_Piece], fresh: bool) -> None:
        """Let go of a block's pages where they are new, and of the file after its last block."""
        assert self._opened is not None
        if fresh:
            start, end = block[0].start, block[-1].end
            advise(self._opened, start // mmap.PAGESIZE * mmap.PAGESIZE, end, "POSIX_FADV_DONTNEED")
        with self._lock:
            self.blocks_left -= 1
            if self.blocks_left == 0:
                self.close()

    def close(self) -> None:
        """Close what is open; does nothing the second time."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def _place(piece: _Piece, file: _File, buffer: Tensor) -> None:
    """Bring the numbers of a piece to the tensor, and look at each."""
    target, dtype = piece.target, piece.stored.dtype
    if target.device.type == "cpu":
        fault_in(target)
    if target.device.type == "cpu" and target.dtype == dtype:
        file.read(piece, target.view(torch.uint8).numpy().data)
    else:
        source = buffer[: piece.end - piece.start]
        file.read(piece, source.numpy().data)
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
