"""Pages of memory, given beforehand: what it held stays. Pages of files: told apart by whether the cache holds them."""

from __future__ import annotations

import mmap
import os
import resource
import sys
from pathlib import Path

import pytest
import torch

from kimi_linear.model.host_pages import CachedPages, fault_in

SIZE = 64 << 20
PAGE = mmap.PAGESIZE
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")


def faults_of_filling(tensor: torch.Tensor) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensor.fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@on_linux
@pytest.mark.unpoisoned
def test_faulting_in_leaves_no_page_for_the_writer() -> None:
    bare, ready = (torch.empty(SIZE, dtype=torch.uint8) for _ in range(2))
    fault_in(ready)
    without, with_hint = faults_of_filling(bare), faults_of_filling(ready)
    if without < 100:
        pytest.skip("this system gives fresh memory its pages unasked")
    assert with_hint < without / 100


@pytest.mark.parametrize("span", [(0, 0), (3, 5), (1, 4095), (100, 3 << 20)])
def test_what_memory_holds_stays(span: tuple[int, int]) -> None:
    memory = torch.arange(4 << 20, dtype=torch.uint8)
    expected = memory.clone()
    fault_in(memory[span[0] : span[1]])
    assert torch.equal(memory, expected)


@pytest.fixture
def dropped(tmp_path: Path) -> Path:
    """Eight pages and a half on a disk, none of them in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(PAGE * 8 + PAGE // 2))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    with path.open("rb", buffering=0) as file:
        if CachedPages(file).hold(0, PAGE * 9):
            pytest.skip(f"needs {tmp_path} on a disk; it is in memory")
    return path


@on_linux
def test_pages_are_in_the_cache_once_they_were_read(dropped: Path) -> None:
    with dropped.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        cached = CachedPages(file)
        assert not cached.hold(0, 1)
        os.pread(file.fileno(), PAGE, 3 * PAGE)
        assert cached.hold(3 * PAGE, 4 * PAGE)
        assert cached.hold(3 * PAGE + 7, 3 * PAGE + 9)
        assert not cached.hold(3 * PAGE, 4 * PAGE + 1)
        assert not cached.hold(3 * PAGE - 1, 4 * PAGE)
        os.pread(file.fileno(), 9 * PAGE, 0)
        assert cached.hold(0, 8 * PAGE + PAGE // 2)
        cached.close()


@on_linux
def test_of_files_of_others_nothing_is_known(dropped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux would answer that they are all there."""
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(dropped).st_uid + 1)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with dropped.open("rb", buffering=0) as file:
        os.pread(file.fileno(), 9 * PAGE, 0)
        cached = CachedPages(file)
        assert not cached.hold(0, PAGE)
        cached.close()


@on_linux
def test_an_empty_file_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with (tmp_path / "empty").open("rb", buffering=0) as file:
        assert not CachedPages(file).hold(0, 1)
