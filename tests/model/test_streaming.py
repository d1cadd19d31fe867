"""Blocks of files into tensors: the same bits by every way of reading, no more read than wanted, nothing left behind."""

from __future__ import annotations

import json
import mmap
import os
import resource
import struct
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kimi_linear.model import streaming
from kimi_linear.model.host_pages import CachedPages
from kimi_linear.model.safetensors_file import CheckpointError, StoredTensor, read_header
from kimi_linear.model.streaming import stream_into

PAGE = mmap.PAGESIZE
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
WAYS = ["fresh", "no advice", "cached"]


def write(path: Path, tensors: dict[str, Tensor], *, pad: int = 0) -> dict[str, StoredTensor]:
    """A safetensors file whose header ends at any byte, as the format allows, and which the page cache does not hold."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": [*tensor.shape],
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 8 + pad)
    data = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    found = read_header(path)
    if sys.platform == "linux":
        drop(path)
    return found


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def numbers(generator: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Each read that streaming makes: from where, and how many bytes came."""
    seen: list[tuple[int, int]] = []
    preadv = os.preadv

    def counted(descriptor: int, rooms: list[memoryview], at: int) -> int:
        got = preadv(descriptor, rooms, at)
        seen.append((at, got))
        return got

    monkeypatch.setattr(os, "preadv", counted)
    return seen


def take(way: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make streaming read one way."""
    if way == "no advice":  # as on macOS
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    elif way == "cached":
        path.read_bytes()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("block", "pad"), [(24, 0), (PAGE, 1), (PAGE, 2), (3 * PAGE + 1, 3), (8 << 20, 5)])
def test_every_bit_arrives_by_every_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, block: int, pad: int
) -> None:
    """Tensors shorter and longer than a block, numbers across two blocks and at odd bytes, kept and converted."""
    monkeypatch.setattr(streaming, "BLOCK_BYTES", block)
    rng, scale = torch.Generator().manual_seed(0), 1 if block > 24 else 0
    tensors = {
        "short": numbers(rng, 3, dtype=torch.bfloat16),
        "empty": numbers(rng, 0, 5, dtype=torch.float32),
        "long": numbers(rng, 7 + 5000 * scale, 3, dtype=torch.float32),
        "wide": numbers(rng, 7 + 1000 * scale, dtype=torch.float64),
        "half": numbers(rng, 9 + 9000 * scale, dtype=torch.float16),
        "last": numbers(rng, 5, 1, 2, dtype=torch.bfloat16),
    }
    found = write(tmp_path / "f", tensors, pad=pad)
    take(way, tmp_path / "f", monkeypatch)
    for dtype in (None, torch.float64):
        targets = {name: torch.empty(t.shape, dtype=dtype or t.dtype) for name, t in tensors.items()}
        stream_into((found[name], target) for name, target in targets.items())
        for name, target in targets.items():
            assert torch.equal(target, tensors[name].to(target.dtype)), name


@pytest.fixture
def pages(tmp_path: Path) -> dict[str, StoredTensor]:
    """A file of five tensors of 8 pages each, which the page cache can let go of."""
    rng = torch.Generator().manual_seed(1)
    found = write(tmp_path / "f", {str(i): numbers(rng, 8 * PAGE // 4, dtype=torch.float32) for i in range(5)})
    with (tmp_path / "f").open("rb", buffering=0) as file:
        if CachedPages(file).hold(0, 1):
            pytest.skip(f"needs {tmp_path} on a disk; it is in memory")
    return found


def cached_pages(path: Path) -> list[int]:
    with path.open("rb", buffering=0) as file:
        cached = CachedPages(file)
        found = [at // PAGE for at in range(0, path.stat().st_size, PAGE) if cached.hold(at, at + 1)]
        cached.close()
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_no_cache_holds_is_gone_from_it_again(pages, reads, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Each byte once; it does not matter whether a block was asked for before or while another was read."""
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 4 * PAGE)
    monkeypatch.setattr(streaming, "AHEAD", 2)
    stream_into((stored, torch.empty(stored.shape, device=device)) for stored in pages.values())
    assert sum(got for _, got in reads) == sum(stored.nbytes for stored in pages.values())
    assert cached_pages(pages["0"].path) == []


def test_what_the_cache_holds_stays_there(pages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 8 * PAGE)
    with pages["0"].path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
        os.pread(file.fileno(), 16 * PAGE, 0)
    before = cached_pages(pages["0"].path)
    assert before == list(range(16))
    stream_into((stored, torch.empty(stored.shape)) for stored in pages.values())
    assert cached_pages(pages["0"].path) == before


def test_no_more_is_asked_for_than_is_soon_placed(pages, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are asked for in order, at most AHEAD of them before one is placed."""
    monkeypatch.setattr(streaming, "BLOCK_BYTES", PAGE)
    monkeypatch.setattr(streaming, "AHEAD", 3)
    monkeypatch.setattr(streaming, "WORKERS", 1)
    asked: list[int] = []
    most, done, fadvise = [], [], os.posix_fadvise

    def watched(descriptor: int, at: int, length: int, advice: int) -> None:
        (asked if advice == os.POSIX_FADV_WILLNEED else done).append(at)
        most.append(len(asked) - len(done))
        fadvise(descriptor, at, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", watched)
    stream_into((stored, torch.empty(stored.shape)) for stored in pages.values())
    assert asked == sorted(asked)
    assert len(asked) == len(done) > 30
    assert 1 < max(most) <= 3 + 1  # a block is done before its room is given back


def test_only_blocks_with_wanted_tensors_are_read(pages, reads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", PAGE)
    stream_into((pages[name], torch.empty(pages[name].shape)) for name in ("0", "4"))
    first, last = pages["0"], pages["4"]
    wanted = [page for t in (first, last) for page in range(t.start // PAGE, (t.start + t.nbytes - 1) // PAGE + 1)]
    assert sorted(at // PAGE for at, _ in reads) == wanted


def test_a_read_that_comes_back_short_goes_on(pages, reads, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: torch.empty(stored.shape) for name, stored in pages.items()}
    stream_into((pages[name], target) for name, target in expected.items())
    preadv, targets = os.preadv, {name: torch.empty(stored.shape) for name, stored in pages.items()}
    monkeypatch.setattr(os, "preadv", lambda file, rooms, at: preadv(file, [rooms[0][: 3 * PAGE + 512]], at))
    reads.clear()
    stream_into((pages[name], target) for name, target in targets.items())
    assert len(reads) > 10
    assert all(torch.equal(targets[name], expected[name]) for name in pages)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cut", [1, 100, PAGE, 8 * PAGE + 17])
def test_a_file_that_ends_early_is_told_to_the_byte(pages, monkeypatch: pytest.MonkeyPatch, way: str, cut: int) -> None:
    path = pages["0"].path
    os.truncate(path, path.stat().st_size - cut)
    drop(path)
    take(way, path, monkeypatch)
    name, missing = ("4", cut) if cut <= 8 * PAGE else ("3", cut - 8 * PAGE)
    with pytest.raises(CheckpointError, match=rf"^{name}: expected {missing:,} more bytes in .*got its end"):
        stream_into((stored, torch.empty(stored.shape)) for stored in pages.values())


@pytest.mark.parametrize("bad", [False, True])
def test_more_files_than_a_process_may_open(tmp_path: Path, bad: bool) -> None:
    """Each is closed after its last block, and all are after an error."""
    rng = torch.Generator().manual_seed(2)
    found = [write(tmp_path / f"{i:02}", {"x": numbers(rng, 5, dtype=torch.float32)})["x"] for i in range(40)]
    if bad:
        write(tmp_path / "20", {"x": torch.full((5,), torch.nan)})
    targets = [torch.empty(5) for _ in found]
    before = sorted(os.listdir("/dev/fd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, before)) + 30, hard))
    try:
        if bad:
            with pytest.raises(CheckpointError, match=r"x: expected finite numbers in torch.float32.*/20"):
                stream_into(zip(found, targets, strict=True))
        else:
            stream_into(zip(found, targets, strict=True))
            assert all(target.isfinite().all() for target in targets)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(os.listdir("/dev/fd")) == len(before)
