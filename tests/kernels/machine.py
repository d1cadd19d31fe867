"""A GPU that runs nothing, and three kernels of a line each: what is compiled, read from disk and launched is written down."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import triton
import triton.language as tl
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from kimi_linear.kernels.triton import compile_ahead

from .launches import _Driver


@triton.jit
def add(x, SHIFT: tl.constexpr):
    tl.store(x, tl.load(x) + SHIFT)


@triton.jit
def scale(x):
    tl.store(x, tl.load(x) * 2)


@triton.jit
def turn(x):
    tl.store(x, -tl.load(x))


@triton.jit
def broken(x):
    tl.store(x, no_such_name)


class Driver(_Driver):
    """Under a number of its own, so that no other test has left kernels in memory."""

    launcher_cls: Callable[..., Any] | None = None
    _numbers = itertools.count(1000)

    def __init__(self, arch: int) -> None:
        super().__init__(arch)
        self.number = next(self._numbers)

    def get_current_device(self) -> int:
        return self.number


@dataclass
class Machine:
    """What happened: kernels compiled or read from disk, with the thread; kernels launched, in order."""

    compiled: list[tuple[str, str]] = field(default_factory=list)
    read: list[tuple[str, str]] = field(default_factory=list)
    launched: list[str] = field(default_factory=list)
    cubins: dict[str, bytes] = field(default_factory=dict)
    when_compiled: Callable[[str], object] = lambda _: None

    def forget(self, kernels: tuple[Any, ...] = (add, scale, turn, broken)) -> None:
        """As in a new process."""
        for kernel in kernels:
            kernel.device_caches.clear()
        for events in (self.compiled, self.read, self.launched):
            events.clear()


@contextlib.contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Machine]:
    """A GPU that runs nothing, with its empty ``cache`` on disk and two threads to compile in."""
    machine, run = Machine(), JITFunction.run

    def seen(src: Any, cache_hit: bool, **_: Any) -> None:
        events = machine.read if cache_hit else machine.compiled
        events.append((src.fn.__name__, threading.current_thread().name.split("_")[0]))
        if not cache_hit:
            machine.when_compiled(src.fn.__name__)

    def launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **keywords)
        if not warmup:
            machine.launched.append(self.__name__)
            machine.cubins[self.__name__] = kernel.asm["cubin"]
        return kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    monkeypatch.setenv(compile_ahead.THREADS, "2")
    monkeypatch.setattr(driver, "_active", Driver(90))
    monkeypatch.setattr(triton.knobs.compilation, "listener", seen)
    monkeypatch.setattr(JITFunction, "run", launch)
    machine.forget()
    yield machine
    compile_ahead.wait_for_later()
    assert JITFunction.run is launch, "a rehearsal left its own behind"
    machine.forget()
