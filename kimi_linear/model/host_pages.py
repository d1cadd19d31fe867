"""Pages of memory and of files: given before memory is filled, and asked after before a file is read.

Fresh memory has no pages: the first write to each 4 KiB stops for the kernel to find and clear one. For a checkpoint those
stops cost more than copying does; asking for all pages of a range at once saves a third of them (docs/LOG.md). Huge pages
would be fewer, and lost where a hypervisor has to find them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress
from functools import cache
from io import FileIO

import numpy as np
from torch import Tensor

_MADV_POPULATE_WRITE = 23
"""Linux 5.14; Python's mmap module does not name it."""


def fault_in(tensor: Tensor) -> None:
    """Give a contiguous CPU tensor all its pages, keeping what it holds; does nothing where the system has no such hint."""
    if sys.platform != "linux":
        return
    # The whole pages inside it. A hint refused costs time only, so it is not an error.
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        _libc().madvise(start, end - start, _MADV_POPULATE_WRITE)


def advise(file: FileIO, start: int, end: int, advice: str) -> None:
    """``posix_fadvise`` by its name, to the end of the page that ``end`` lies in; does nothing where there is no such thing."""
    end = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # a hint refused costs time only
            os.posix_fadvise(file.fileno(), start, end - start, getattr(os, advice))


class CachedPages:
    """Which pages of an open file Linux holds in its page cache.

    The file is mapped to be asked about and never read through the map, so that none of it counts as memory of the
    process. Linux tells only those who own the file or may write to it, and answers others that all is there; for them,
    and on other systems, nothing is.
    """

    def __init__(self, file: FileIO) -> None:
        self._map = None
        status = os.fstat(file.fileno())
        told = sys.platform == "linux" and (status.st_uid == os.geteuid() or os.access(file.name, os.W_OK))
        if told and status.st_size:
            with suppress(OSError):  # a file system without maps: nothing is known of its files
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def hold(self, start: int, end: int) -> bool:
        """Whether all pages of the bytes from ``start`` to ``end`` are in the cache now."""
        if self._map is None:
            return False
        start, end = start // mmap.PAGESIZE * mmap.PAGESIZE, min(end, len(self._map))
        if end <= start:
            return False
        bytes_ = np.frombuffer(self._map, dtype=np.uint8)
        pages = np.zeros(-(-(end - start) // mmap.PAGESIZE), dtype=np.uint8)
        refused = _libc().mincore(bytes_.ctypes.data + start, end - start, pages.ctypes.data)
        return refused == 0 and bool((pages & 1).all())

    def close(self) -> None:
        """Unmap the file."""
        if self._map is not None:
            self._map.close()


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
    return libc
