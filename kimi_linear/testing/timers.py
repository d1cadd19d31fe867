"""Time and peak memory of a function, on a CPU and on CUDA, measured so that the numbers can be compared.

Variants are interleaved, since clocks drift by a fifth during a run; medians, since the scheduler only ever adds.
Events around a kernel below 100 us measure the host, so on CUDA a graph of the call can be replayed instead.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

L2_BYTES = 256 * 2**20
"""More than the L2 of any GPU there is, so that zeroing this much flushes it."""
FLUSHES = 16
"""Zeroing it this often keeps a GPU busy for a millisecond or more, in which the host gets ahead: a launch path shorter than
that does not count as time of the kernels. Eight kernels take a slow host 0.7 ms to launch, Python's caches being cold."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of the repeats of one variant."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median: how far to trust it. 0 for fewer than two samples."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4)
        return (high - low) / self.median


def compare(
    variants: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 3,
    repeats: int = 20,
    device: torch.device | str = "cpu",
    graph: bool = False,
) -> dict[str, Timing]:
    """Time several functions in turns: one call of each, then again, ``repeats`` times.

    Args:
        variants: name to function without arguments.
        warmup: calls of each before the first that counts.
        repeats: timed calls of each.
        device: where they run; on CUDA the L2 is flushed before every call and events take the time.
        graph: capture each function in a CUDA graph after the warm-up and time its replays.

    Returns:
        The timing of each variant, in the order given.

    Raises:
        ValueError: ``repeats`` is below 1, nothing to time, or ``graph`` off CUDA.
    """
    device = torch.device(device)
    if repeats < 1 or not variants:
        raise ValueError(f"compare: expected repeats >= 1 and a variant, got {repeats} and {len(variants)} variants")
    if graph and device.type != "cuda":
        raise ValueError(f"graph: expected a CUDA device, got {device}; leave graph=False")
    calls: dict[str, Callable[[], object]] = {}
    for name, call in variants.items():
        for _ in range(warmup):
            call()
        calls[name] = _captured(call) if graph else call
    clock = _cuda_clock(device) if device.type == "cuda" else _cpu_clock
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            samples[name].append(clock(call))
    return {name: Timing(samples=tuple(taken)) for name, taken in samples.items()}


def median_time(
    fn: Callable[[], object],
    *,
    warmup: int = 3,
    repeats: int = 20,
    device: torch.device | str = "cpu",
    graph: bool = False,
) -> float:
    """Median seconds of one call of ``fn``; arguments as ``compare``."""
    return compare({"fn": fn}, warmup=warmup, repeats=repeats, device=device, graph=graph)["fn"].median


def peak_memory(fn: Callable[[], object], *, device: torch.device | str = "cpu") -> int:
    """Most bytes that one call of ``fn`` held at a time on top of what was held before it.

    Exact: every allocation of torch's allocator counts, those inside an operation and in the backward pass too. What
    ``fn`` returns counts. Call ``fn`` once before, where its first call makes caches.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        fn()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    if not changes:
        return 0
    first = min(changes, key=lambda e: e["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]
    return max(0, max(e["args"]["Total Allocated"] for e in changes) - before)


def _cpu_clock(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cuda_clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device=device)

    def clock(call: Callable[[], object]) -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(FLUSHES):
            flush.zero_()
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(stop) * 1e-3

    return clock


def _captured(call: Callable[[], object]) -> Callable[[], object]:
    torch.cuda.synchronize()
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        call()
    return recording.replay
