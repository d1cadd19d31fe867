"""What a measurement was made on: hardware, threads and versions, so that a number is never without its machine."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine and the software that a report's numbers come from."""

    hardware: str
    """Name of the GPU, or of the CPU where there is none in use."""
    cores: int
    """Physical CPU cores that the process may use."""
    threads: int
    """Threads that torch computes with."""
    device: str
    """Device that the models ran on, as torch names it."""
    system: str
    """Operating system and architecture."""
    python: str
    """Version of Python."""
    torch: str
    """Version of torch."""
    kimi_linear: str
    """Version of this package."""


def this_machine(device: str = "cpu") -> Machine:
    """The machine that this process runs on, with ``device`` ("cpu", "cuda", "cuda:1") as the one in use."""
    import torch

    import kimi_linear

    on_gpu = torch.device(device).type == "cuda"
    return Machine(
        hardware=torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        cores=physical_cores(),
        threads=torch.get_num_threads(),
        device=device,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=str(torch.__version__),
        kimi_linear=kimi_linear.__version__,
    )


def cpu_name() -> str:
    """Model name of the CPU, its architecture where the system does not tell."""
    for block in _cpuinfo():
        if "model name" in block:
            return " ".join(block["model name"].split())
    return platform.processor() or platform.machine()


def physical_cores() -> int:
    """Physical cores that this process may use: hyperthreads share one, affinity and container quotas count."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    seen = {
        (block.get("physical id", "0"), block.get("core id", block["processor"]))
        for block in _cpuinfo()
        if block["processor"].isdigit() and int(block["processor"]) in allowed
    }
    cores = len(seen) or len(allowed)
    if CGROUP_QUOTA.is_file():
        quota, _, period = CGROUP_QUOTA.read_text().partition(" ")
        if quota.isdigit():
            cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def _cpuinfo() -> list[dict[str, str]]:
    """One dict per logical CPU as Linux lists them; empty elsewhere."""
    if not CPUINFO.is_file():
        return []
    blocks = []
    for text in CPUINFO.read_text().split("\n\n"):
        pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
        block = {key.strip(): value.strip() for key, _, value in pairs}
        if "processor" in block:
            blocks.append(block)
    return blocks
