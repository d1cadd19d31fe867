"""How fast a checkpoint loads, against what its disk can do, and how much memory that takes.

    python -m benchmarks.model.load_speed            (from the repository root; 4 GB on the disk, removed at the end)

Makes a random checkpoint in the release layout: several shards, every expert on its own. Then, in turns, each in a fresh
process and with the files dropped from the page cache (fsync, then POSIX_FADV_DONTNEED; the kernel's count of bytes
fetched from storage, /proc/self/io, shows that it worked): reads the files and throws the bytes away, through the page cache,
through it but letting go of each block once read, and past it (O_DIRECT), with one reader and with as many as loading
uses; loads the model; loads it through safetensors' memory map. The disk's speed is the fastest of the plain reads. Linux only.
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch
import tyro

from benchmarks._report import RESULTS, write_report
from kimi_linear.config import ModelConfig, replace
from kimi_linear.engine.footprint import footprint
from kimi_linear.folder import load, save
from kimi_linear.model import KimiLinear
from kimi_linear.model.checkpoint import release_tensors
from kimi_linear.model.parameters import allocate, init_weights
from kimi_linear.model.streaming import BLOCK_BYTES, WORKERS

GB, GIB = 10**9, 1 << 30
ROOT = Path(__file__).parents[2]
Task = Literal[
    "read once", "read in parallel", "read and drop once", "read and drop", "read direct", "load", "load warm", "memory map"
]  # fmt: skip
TASKS: tuple[Task, ...] = get_args(Task)
READS: tuple[Task, ...] = ("read once", "read in parallel", "read and drop once", "read and drop", "read direct")


@dataclass(frozen=True, kw_only=True)
class Args:
    """Flags."""

    preset: str = "kimi-linear-48b-a3b"
    """Every width is this preset's; layers and experts are fewer."""
    layers: int = 4
    """Layers."""
    vocab_size: int = 32768
    """Rows of the embedding."""
    gigabytes: float = 4.0
    """Size of the checkpoint; the number of experts follows from it."""
    shard_gigabytes: float = 1.0
    """Size that a weight file stays below."""
    repeats: int = 5
    """Rounds; the table shows medians."""
    device: str = "cpu"
    """Where the weights go."""
    where: Path = Path("runs")
    """Folder on the disk to measure."""
    results: Path = RESULTS
    """Folder for the page."""
    task: Task | None = None
    """One measurement of the folder ``where``, printed as JSON: what the benchmark starts for itself."""


def sized(config: ModelConfig, nbytes: float) -> ModelConfig:
    """``config`` with as many experts as make its weights ``nbytes`` large in bf16."""
    assert config.moe is not None
    few, more = (replace(config, moe={"num_experts": config.moe.experts_per_token + n}) for n in (0, 1))
    base, with_one = footprint(few).weight_bytes, footprint(more).weight_bytes
    return replace(
        config, moe={"num_experts": config.moe.experts_per_token + max(0, round((nbytes - base) / (with_one - base)))}
    )


def make(config: ModelConfig, folder: Path, shard_bytes: int) -> None:
    """A random bf16 checkpoint of ``config``, never held in fp32."""
    with torch.device("meta"):
        model = KimiLinear(config).to(torch.bfloat16)
    allocate(model, "cpu")
    init_weights(model, config.initializer_range, seed=0)
    save(model, folder, max_shard_bytes=shard_bytes)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def drop_cache(paths: list[Path]) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_files(paths: list[Path], readers: int, flags: int = 0, *, drop: bool = False) -> None:
    """Read every byte into buffers that are used again and again; the files stay open meanwhile.

    ``drop``: have the page cache let go of each block, so that its memory is used again too.
    """
    buffers = [mmap.mmap(-1, BLOCK_BYTES) for _ in range(readers)]  # begin with a page, as O_DIRECT asks
    opened = {path: os.open(path, os.O_RDONLY | flags) for path in paths}

    def read(path: Path, start: int) -> None:
        buffer = buffers.pop()
        got = os.preadv(opened[path], [buffer], start)
        if got != min(BLOCK_BYTES, path.stat().st_size - start):
            raise RuntimeError(f"{path}: a read of {got} bytes at {start} came back short")
        if drop:
            os.posix_fadvise(opened[path], start, BLOCK_BYTES, os.POSIX_FADV_DONTNEED)
        buffers.append(buffer)

    blocks = [(path, start) for path in paths for start in range(0, path.stat().st_size, BLOCK_BYTES)]
    try:
        with ThreadPoolExecutor(readers) as pool:
            list(pool.map(read, *zip(*blocks, strict=True)))
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def memory_map(folder: Path) -> KimiLinear:
    """The same model filled from safetensors' own reader, one tensor after the other."""
    from safetensors.torch import load_file

    from kimi_linear.config import from_release
    from kimi_linear.folder import read_config

    with torch.device("meta"):
        model = KimiLinear(from_release(read_config(folder))).to(torch.bfloat16)
    allocate(model, "cpu")
    targets = release_tensors(model)
    for path in shards(folder):
        for name, tensor in load_file(path).items():
            targets[name].copy_(tensor)
    return model


def status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def fetched() -> int:
    """Bytes that this process had the storage deliver."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


def measure(task: Task, folder: Path, device: str) -> dict[str, Any]:
    """Do one task once, in this process, and say what it took."""
    paths = shards(folder)
    if task == "load warm":
        read_files(paths, 1)  # into the page cache, where loading leaves nothing new
    else:
        drop_cache(paths)
    calls: dict[Task, Callable[[], Any]] = {
        "read once": lambda: read_files(paths, 1),
        "read in parallel": lambda: read_files(paths, WORKERS),
        "read and drop once": lambda: read_files(paths, 1, drop=True),
        "read and drop": lambda: read_files(paths, WORKERS, drop=True),
        "read direct": lambda: read_files(paths, WORKERS, os.O_DIRECT),
        "load": lambda: load(folder, device=device)[0],
        "load warm": lambda: load(folder, device=device)[0],
        "memory map": lambda: memory_map(folder),
    }
    rss, before, since = status("VmRSS"), fetched(), time.perf_counter()
    result = calls[task]()
    if device != "cpu" and isinstance(result, KimiLinear):
        torch.cuda.synchronize(device)
    seconds, got, peak = time.perf_counter() - since, fetched() - before, status("VmHWM")
    size = sum(path.stat().st_size for path in paths)
    if task != "load warm" and got < 0.9 * size:
        raise RuntimeError(
            f"{folder}: expected {size:,} bytes from storage, got {got:,}; is it in memory? Choose another"
        )
    found = {"seconds": seconds, "fetched": got, "peak": peak, "before": rss}
    if isinstance(result, KimiLinear):
        found["model"] = sum(p.nbytes for p in result.parameters())
        check(result, paths)
    return found


def check(model: KimiLinear, paths: list[Path], every: int = 7) -> None:
    """Compare each seventh tensor with what safetensors' own reader gives; refuses to go on at a difference."""
    from safetensors import safe_open

    tensors = release_tensors(model)
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys())[::every]:
                if not torch.equal(tensors[name].cpu(), file.get_tensor(name).to(tensors[name].dtype)):
                    raise RuntimeError(f"{name}: loaded numbers differ from {path}; a wrong model's speed says nothing")


def in_a_process(task: Task, folder: Path, device: str) -> dict[str, Any]:
    """``measure`` in a fresh process, so that its peak memory is its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.model.load_speed",
        "--task",
        task,
        "--where",
        str(folder),
        "--device",
        device,
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{task}: the process ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def report(runs: dict[Task, list[dict[str, Any]]], paths: list[Path], args: Args, config: ModelConfig) -> Path:
    """The page: medians of each task, against the disk and against the allowed memory."""
    size, largest = sum(p.stat().st_size for p in paths), max(p.stat().st_size for p in paths)
    speed = {task: size / median(run["seconds"] for run in found) / GB for task, found in runs.items()}
    disk = max(speed[task] for task in READS)
    names: dict[Task, str] = {
        "read once": "plain read, 1 reader",
        "read in parallel": f"plain read, {WORKERS} readers",
        "read and drop once": "plain read, 1 reader, each block dropped from the page cache",
        "read and drop": f"plain read, {WORKERS} readers, each block dropped from the page cache",
        "read direct": f"plain read past the page cache, {WORKERS} readers",
        "load": "kimi_linear.load",
        "load warm": "kimi_linear.load, files in the page cache",
        "memory map": "safetensors' load_file, copied into the model",
    }
    rows = []
    for task, found in runs.items():
        times = [size / run["seconds"] / GB for run in found]
        cold = min(run["fetched"] for run in found) / size
        rows.append(
            [names[task], f"{speed[task]:.2f}", f"{min(times):.2f} to {max(times):.2f}", f"{speed[task] / disk:.0%}",
             f"{cold:.0%}", f"{max(run['peak'] for run in found) / GIB:.2f}"]
        )  # fmt: skip
    model = runs["load"][0]["model"]
    on_host = args.device == "cpu"
    allowed = (model if on_host else 0) + largest + (GIB // 2 if on_host else 2 * GIB)
    peak = max(run["peak"] for run in runs["load"])
    limit = (
        f"model {model / GIB:.2f} + largest shard {largest / GIB:.2f} + 0.5 GiB"
        if on_host
        else f"largest shard {largest / GIB:.2f} + 2 GiB"
    )
    return write_report(
        "load_speed",
        title=f"Loading a checkpoint of {size / GB:.2f} GB to {args.device}",
        about=(
            f"{len(paths)} shards, {config.num_layers} layers with {config.moe.num_experts if config.moe else 0} experts each, bf16, release layout. "
            f"Medians of {len(runs['load'])} rounds in turns, each task in a fresh process; before all but the warm one the files were dropped from the page cache, before that one read into it, "
            "and the column 'from storage' is the least that the kernel says it fetched (what lies in a cache below the kernel, it cannot "
            f"tell). Percentages are of the fastest plain read, {disk:.2f} GB/s. Peak host memory is VmHWM of the whole process, "
            f"torch's own {min(run['before'] for run in runs['load']) / GIB:.2f} GiB included; loading took {peak / GIB:.2f} GiB, and "
            f"{limit} = {allowed / GIB:.2f} GiB {'allows it' if peak <= allowed else 'DOES NOT ALLOW IT'}. "
            "Each seventh loaded tensor was compared with safetensors' own reader. "
            f"Processes that wanted a core meanwhile, these included: {os.getloadavg()[1]:.1f} (5 minutes' mean of Linux's load)."
        ),
        columns=["what", "GB/s", "slowest to fastest", "of the disk", "from storage", "peak host memory, GiB"],
        rows=rows,
        device=args.device,
        packages=["safetensors"],
        folder=args.results,
    )  # fmt: skip


def main() -> None:
    """Make, measure in turns, write the page, clean up."""
    args = tyro.cli(Args)
    if args.task is not None:
        print(json.dumps(measure(args.task, args.where, args.device)))
        return
    config = sized(
        ModelConfig.preset(
            args.preset,
            num_layers=args.layers,
            vocab_size=args.vocab_size,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        ),
        args.gigabytes * GB,
    )
    args.where.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="load-speed-", dir=args.where))
    try:
        make(config, folder, int(args.shard_gigabytes * GB))
        paths = shards(folder)
        print(f"made {sum(p.stat().st_size for p in paths) / GB:.2f} GB in {len(paths)} shards", file=sys.stderr)
        runs: dict[Task, list[dict[str, Any]]] = {
            task: [] for task in TASKS if task != "memory map" or args.device == "cpu"
        }
        for round_ in range(args.repeats):
            for task in runs:
                runs[task].append(in_a_process(task, folder, args.device))
                print(f"round {round_ + 1}: {task} {runs[task][-1]['seconds']:.2f} s", file=sys.stderr)
            report(runs, paths, args, config)  # after every round: one that is cut off leaves those before
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
