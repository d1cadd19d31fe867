"""Compiles what a launch would compile, for any architecture and without a GPU, and counts spills and shared memory.

Inside ``compiled_for(90)`` every ``kernel[grid](...)`` of the real launch code, on CPU tensors, goes through Triton's own
specialisation (types, alignment, constants) and compiler down to a cubin, and stops there: nothing runs, so outputs hold
whatever memory held. The list that it gives has one ``Launch`` per call.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Shared memory that one program may use, by architecture."""


@dataclass(frozen=True)
class Launch:
    """One compiled kernel.

    Attributes:
        kernel: name of the Triton function.
        variant: identity of the compiled code; two launches share it exactly where nothing had to be recompiled.
        ptx: its PTX.
        shared: bytes of shared memory per program.
        registers, stack: registers per thread; bytes of stack per thread, which is where spilled registers go.
    """

    kernel: str
    variant: str
    ptx: str
    shared: int
    registers: int
    stack: int


class _Driver:
    """What Triton asks of a driver up to the launch."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # the key of Triton's cache: each architecture keeps its own kernels

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiled_for(arch: int) -> Iterator[list[Launch]]:
    """Launches inside compile for sm_``arch``, with its table of configurations, and are recorded instead of run."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from kimi_linear.kernels.triton import configs

    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **keywords)
        registers, stack = resources(kernel.asm["cubin"])
        launches.append(Launch(self.__name__, kernel.hash, kernel.asm["ptx"], kernel.metadata.shared, registers, stack))

    with ExitStack() as stack:
        stack.enter_context(patch.object(driver, "_active", _Driver(arch)))
        stack.enter_context(patch.object(JITFunction, "run", record))
        stack.enter_context(patch.object(configs, "INTERPRETED", (arch // 10, arch % 10)))
        yield launches


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) per thread."""
    import triton

    tool = next((Path(triton.__file__).parent / "backends/nvidia/bin").glob("cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return max(int(n) for n in re.findall(r"REG:(\d+)", usage)), max(int(n) for n in re.findall(r"STACK:(\d+)", usage))
