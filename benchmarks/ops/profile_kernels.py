"""Where the time goes: every kernel of one forward, and of one forward and backward, of ours and of fla, on a CUDA device.

    python -m benchmarks.ops.profile_kernels                          times from torch.profiler, resources of each kernel
    python -m benchmarks.ops.profile_kernels --ncu --shape 8k-h32     counters as well: traffic, occupancy, stalls

Compilation and autotuning are over before anything is recorded. Bytes are those of the tensors that a Triton kernel is
handed, each counted once: the least that it moves, if it needs all of them. Operations are those of its matrix products as
they are written, on the path of gates within range. Occupancy is what registers and shared memory allow.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks._report import RESULTS, Section, needs_gpu, write_page
from benchmarks.ops._variants import fla, forward, has_fla, ours, training
from benchmarks.ops.shapes import CHUNK, SHAPES, Shape, gates_of
from kimi_linear.testing.timers import L2_BYTES

CALLS = 5
"""Recorded calls; the table has their mean."""
C = CHUNK
PRODUCTS: dict[str, Callable[[int, int], int]] = {
    # Per chunk and value head, from K and V. steep.py has no product; prepare.py has ten of tiles of 16 for q and ten for k.
    "prepare_kernel": lambda K, V: 20 * 2 * 16 * 16 * K,
    "solve_kernel": lambda K, V: 20 * C**3 + 2 * C * C * (K + V),
    "scan_kernel": lambda K, V: 6 * C * K * V + 2 * C * C * V,
    "scan_backward_kernel": lambda K, V: 6 * C * K * V + 2 * C * C * V,
    "value_backward_kernel": lambda K, V: 6 * C * C * V,
    # A sum over a stretch is three products; where tiles have anchors of their own, pairs are up to sixteen for four.
    "anchored_backward_kernel": lambda K, V: 6 * C * K * V + 14 * C * C * K,
    "tile_backward_kernel": lambda K, V: 6 * C * K * V + 38 * C * C * K,
}
"""Multiplications and additions of our kernels' matrix products."""
FLUSH = re.compile(r"FillFunctor<(signed char|int8_t)>")
"""The kernel that zeroes bytes: nothing else here has bytes."""
COLUMNS = (
    "kernel", "launches", "µs", "share", "grid", "warps", "registers", "spilled", "shared, KiB", "occupancy",
    "MB", "GB/s", "TFLOP/s",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a Triton kernel: what it was handed, and what it was compiled to."""

    name: str
    bytes: int
    spills: int


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one multiprocessor has."""

    registers: int = 65536
    warps: int = 64
    blocks: int = 32
    shared: int = 228 * 1024

    @classmethod
    def of(cls, device: int = 0) -> Limits:
        """Those of a CUDA device."""
        p = torch.cuda.get_device_properties(device)
        return cls(
            registers=p.regs_per_multiprocessor,
            warps=p.max_threads_per_multi_processor // p.warp_size,
            shared=p.shared_memory_per_multiprocessor,
        )

    def occupancy(self, registers: int, warps: int, shared: int) -> float:
        """Warps that fit at a time, as a share of the most; from registers a thread, warps and shared bytes a block.

        Registers are given out in eights to each thread; a block costs a kilobyte of shared memory besides its own.
        """
        by_registers = self.registers // (warps * 32 * max(8, -(-registers // 8) * 8))
        by_shared = self.shared // (shared + 1024)
        return min(by_registers, by_shared, self.warps // warps, self.blocks) * warps / self.warps


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """Every launch of a Triton kernel inside, in order."""
    from triton.runtime.jit import JITFunction

    taken: list[Launch] = []
    launch = JITFunction.run

    def recorded(self: object, *arguments: object, **options: object) -> object:
        kernel: Any = launch(self, *arguments, **options)  # type: ignore[arg-type]
        compiled = kernel.result() if hasattr(kernel, "result") else kernel  # compiled in the background, if so set
        handed = {
            (x.untyped_storage().data_ptr(), x.storage_offset()): x.nbytes
            for x in [*arguments, *options.values()]
            if isinstance(x, torch.Tensor)
        }
        if compiled is not None:
            taken.append(Launch(name=compiled.name, bytes=sum(handed.values()), spills=compiled.n_spills))
        return kernel

    JITFunction.run = recorded  # type: ignore[method-assign]
    try:
        yield taken
    finally:
        JITFunction.run = launch


def kernel_events(trace: Mapping) -> list[dict]:
    """The kernels of a Chrome trace of torch.profiler in the order of their start; those that flush the L2 left out."""
    found = [e for e in trace["traceEvents"] if e.get("cat") == "kernel" and not FLUSH.search(e["name"])]
    return sorted(found, key=lambda event: event["ts"])


def record(call: Callable[[], object]) -> tuple[list[dict], list[Launch]]:
    """Events and launches of ``CALLS`` calls, each with a cold L2, after two that are not counted."""
    flush = torch.empty(L2_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    with launches() as taken, profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as p:
        for _ in range(CALLS):
            flush.zero_()
            call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        p.export_chrome_trace(str(path))
        return kernel_events(json.loads(path.read_text(encoding="utf-8"))), taken


def short(name: str) -> str:
    """A kernel's name without the types of a C++ template."""
    return re.sub(r"^void |\(.*|<.*", "", name)[:60]


def table(
    events: Sequence[dict], taken: Sequence[Launch], limits: Limits, shape: Shape, calls: int = CALLS
) -> list[list[object]]:
    """Rows of ``COLUMNS``, slowest kernel first; per call."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for event in events:
        groups[event["name"]].append(event)
    own: dict[str, list[Launch]] = defaultdict(list)
    for launch in taken:
        own[launch.name].append(launch)
    total = sum(event["dur"] for members in groups.values() for event in members)
    chunks = sum(-(-length // C) for length in shape.lengths)
    rows: list[tuple[float, list[object]]] = []
    for name, members in groups.items():
        microseconds = sum(event["dur"] for event in members) / calls
        facts, block = members[0]["args"], members[0]["args"]["block"]
        warps = -(-block[0] * block[1] * block[2] // 32)
        registers, shared = facts["registers per thread"], facts["shared memory"]
        moved = sum(launch.bytes for launch in own[name]) / calls if own[name] else None
        work = PRODUCTS[name](shape.dim, shape.dim) * chunks * shape.values if name in PRODUCTS else None
        row: list[object] = [
            short(name),
            f"{len(members) / calls:g}",
            f"{microseconds:,.1f}",
            f"{microseconds * calls / total:.1%}",
            "x".join(str(n) for n in facts["grid"]),
            str(warps),
            str(registers),
            str(max(launch.spills for launch in own[name])) if own[name] else "–",
            f"{shared / 1024:.1f}",
            f"{limits.occupancy(registers, warps, shared):.0%}",
            f"{moved / 1e6:,.1f}" if moved is not None else "–",
            f"{moved / microseconds / 1e3:,.0f}" if moved is not None else "–",
            f"{work / microseconds / 1e6:.3g}" if work is not None else "–",
        ]
        rows.append((microseconds, row))
    return [row for _, row in sorted(rows, key=lambda r: -r[0])]


def calls_of(shape: Shape, gate: str, which: str, mode: str) -> Callable[[], object]:
    """One call of "ours" or "fla", of a mode, on freshly drawn inputs."""
    torch.manual_seed(0)
    inputs = shape.draw(gates_of([gate])[0], device="cuda")
    variant = ours("auto") if which == "ours" else fla
    if which == "fla" and not has_fla(inputs):
        raise ModuleNotFoundError("fla: expected the package fla-core, found none; pip install fla-core")
    if mode == "forward":
        return forward(variant, inputs)
    return training(variant, inputs.with_grad(clone=False), torch.randn_like(inputs.v))


# Counters.

NCU_SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
NCU_METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy reached %",
    "launch__registers_per_thread": "registers",
    "launch__occupancy_limit_registers": "blocks by registers",
    "launch__occupancy_limit_shared_mem": "blocks by shared",
}
"""What the table shows of what ncu collects, where this version has it."""
STALL = re.compile(r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active)?\.ratio")


def counters(text: str) -> tuple[list[str], list[list[object]]]:
    """Columns and rows of a table from the raw page of ncu's CSV, one row for each launch, with the three worst stalls."""
    lines = text.splitlines()
    begin = next((i for i, line in enumerate(lines) if '"Kernel Name"' in line), None)
    if begin is None:
        raise RuntimeError(f"ncu: expected a table with a column 'Kernel Name', got:\n{text[-1000:]}")
    units, *launched = list(csv.DictReader(lines[begin:]))
    known = {metric: label for metric, label in NCU_METRICS.items() if metric in units}
    columns = ["kernel", *(f"{label} {units[metric]}".strip() for metric, label in known.items()), "warps wait for"]
    rows: list[list[object]] = []
    for launch in launched:
        stalls = [(float(v.replace(",", "")), m.group(1)) for k, v in launch.items() if v and (m := STALL.fullmatch(k))]
        worst = ", ".join(f"{name} {value:.1f}" for value, name in sorted(stalls, reverse=True)[:3])
        rows.append([short(launch["Kernel Name"]), *(launch[metric] for metric in known), worst or "–"])
    return columns, rows


def under_ncu(shape: str, gate: str, mode: str) -> tuple[list[str], list[list[object]]]:
    """``counters`` of one call of ours, in a process under ncu."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        inside = ["--inside", mode, "--shape", shape, "--gate", gate]
        words = ["ncu", "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw"]
        words += [word for section in NCU_SECTIONS for word in ("--section", section)]
        words += ["--metrics", ",".join(list(NCU_METRICS)[:3])]  # no section of these has the traffic of the DRAM
        words += ["--log-file", str(log), sys.executable, "-m", "benchmarks.ops.profile_kernels", *inside]
        done = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
        if done.returncode or not log.is_file():
            raise RuntimeError(f"ncu failed with status {done.returncode}:\n{done.stdout[-500:]}{done.stderr[-1500:]}")
        return counters(log.read_text(encoding="utf-8"))


def one_call(shape: Shape, gate: str, mode: str) -> None:
    """What ncu looks at: one call, with everything compiled before."""
    call = calls_of(shape, gate, "ours", mode)
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def sections(arguments: argparse.Namespace) -> Iterable[Section]:
    """One table for each of ours and fla and each mode, then ncu's."""
    shape, limits = SHAPES[arguments.shape], Limits.of()
    for which in ("ours", "fla"):
        for mode in ("forward", "backward"):
            title = f"{which}, {'forward' if mode == 'forward' else 'forward and backward'}"
            try:
                call = calls_of(shape, arguments.gate, which, mode)
            except ModuleNotFoundError as error:
                yield Section(title=title, columns=["not profiled"], rows=[[str(error)]])
                continue
            events, taken = record(call)
            rows = table(events, taken, limits, shape)
            busy = sum(event["dur"] for event in events) / CALLS
            yield Section(title=title, about=f"{busy:,.0f} µs of kernels a call.", columns=COLUMNS, rows=rows)
            del call
            torch.cuda.empty_cache()
    for mode in ("forward", "backward") if arguments.ncu else ():
        columns, rows = under_ncu(arguments.shape, arguments.gate, mode)
        yield Section(title=f"Counters, ours, {mode}", about="By ncu, caches cold.", columns=columns, rows=rows)


def main() -> None:
    """Profile, and write the page after every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8k-h32", choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--gate", default="init", help="init or fast, say")
    parser.add_argument("--ncu", action="store_true", help="hardware counters too; needs Nsight Compute")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the page")
    parser.add_argument("--inside", choices=["forward", "backward"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    needs_gpu()
    if arguments.ncu and shutil.which("ncu") is None:
        parser.error("--ncu: expected Nsight Compute's ncu on the path, found none; leave the flag out")
    if arguments.inside:
        one_call(SHAPES[arguments.shape], arguments.gate, arguments.inside)
        return
    made: list[Section] = []
    for section in sections(arguments):
        made.append(section)
        print(f"## {section.title}  {section.about}", *(" | ".join(map(str, row)) for row in section.rows), sep="\n")
        write(arguments, made)
    print(f"written to {write(arguments, made)}")


def write(arguments: argparse.Namespace, made: Sequence[Section]) -> Path:
    """The page of what is known."""
    return write_page(
        f"kda_profile_{arguments.shape}_{arguments.gate}",
        title=f"Kernels of chunk_kda at {arguments.shape}, {arguments.gate} gate",
        about=f"Mean of {CALLS} calls, the L2 cold before each. MB: tensors that the kernel is handed, each once. TFLOP/s: its "
        "matrix products. Occupancy: what registers and shared memory allow.",
        sections=made,
        device="cuda",
        packages=("triton", "fla-core"),
        folder=arguments.out,
    )


if __name__ == "__main__":
    main()
