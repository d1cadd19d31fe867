"""The first call of an operation of many kernels: all that it lacks are compiled side by side.

Triton compiles a kernel when it is first launched, so a call that lacks eleven waits for one after the other, and after each for
a C compiler that makes its launcher. Here the first launch whose kernel is not in memory stops for a rehearsal: the operation
runs again from its start, but launches nothing and writes down every kernel that it lacks. These are
compiled in threads, which is done soon after the slowest is, as Triton lets go of Python's lock in all its passes. Then the call
goes on. What only other calls will need, such as longer ones, is compiled while it does.

Nothing is guessed about which kernels there are: a new dtype, head size or kind of gate is noticed by the launch that lacks its
kernel, and a call that lacks none sets one context variable. Nor can a result change: what a rehearsal computes is thrown away,
and what could not be compiled ahead is compiled by its launch, which raises what there is to raise.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import getclosurevars
from typing import Any

import torch
from triton.runtime._async_compile import active_mode
from triton.runtime.cache import triton_key
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

THREADS = "KIMI_LINEAR_COMPILE_THREADS"
"""Environment variable: most kernels that are compiled at a time, as many as there are cores if not set; 1: no rehearsals."""

log = logging.getLogger(__name__)


def call(name: str, kernel: Callable[..., Any], rehearse: Callable[..., object], arguments: tuple[Any, ...]) -> Any:
    """``kernel(*arguments)``, with what it lacks compiled side by side.

    Args:
        name: of the operation, for the log.
        kernel: launches Triton kernels on the current device.
        rehearse: launches the same on the same arguments, and more where more will be needed soon, such as a backward. What
            its kernels should have written is not there, so it must not read numbers, and write none but its own. Of a generator
            the call waits only for what it launches before it first yields; the rest is compiled while the call goes on.
        arguments: as both take them.

    Raises:
        ValueError: ``KIMI_LINEAR_COMPILE_THREADS`` is no number from 1 on; it is read when a kernel is missing.
    """
    if not _READY:
        _get_ready()
    if active_mode.get() is not None:  # somebody compiles in a way of their own
        return kernel(*arguments)
    token = active_mode.set(_Call(name, rehearse, arguments))  # type: ignore[arg-type]
    try:
        return kernel(*arguments)
    finally:
        active_mode.reset(token)


_READY = list[bool]()
"""Not empty once this process has had Triton get ready."""


def _get_ready() -> None:
    """What Triton does once in a process, side by side: a C compiler makes its driver, and a thread hashes its own files."""
    _READY.append(True)
    hashing = threading.Thread(target=triton_key)
    hashing.start()
    driver.active.get_current_device()
    hashing.join()


class _Call:
    """What Triton turns to for a kernel that is not in memory, while one call of an operation runs."""

    __slots__ = ("arguments", "name", "rehearse")

    def __init__(self, name: str, rehearse: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
        self.name, self.rehearse, self.arguments = name, rehearse, arguments

    def submit(self, key: str, compile_kernel: Callable[[], Any], finish: Callable[[Any], None], *_: Any) -> Any:
        found, later = None, _LATER.get(key)
        if later is not None:
            wait([later])  # an earlier call has it compiled; then from disk, as each device wants a kernel of its own
        elif self.rehearse is not None:
            rehearse, self.rehearse = self.rehearse, None  # once in a call
            found = _compile_all(self.name, rehearse, self.arguments).get(key)
        if found is None:
            found = compile_kernel()
            finish(found)
        return found


def _compile_all(name: str, rehearse: Callable[..., object], arguments: tuple[Any, ...]) -> dict[str, Any]:
    """By Triton's keys, the kernels that ``rehearse(*arguments)`` launches and that were not in memory; they are now."""
    threads, start, found = _threads(), time.monotonic(), {}
    if threads == 1 or _is_recorded():
        return found
    rehearsal, needed = _Rehearsal(), 0
    try:
        with rehearsal.nothing_is_launched():
            steps = rehearse(*arguments)
            for _ in steps if isinstance(steps, Generator) else ():
                needed = needed or len(rehearsal.missing)
    except Exception:  # the call itself says what is wrong with its inputs
        log.warning("%s: rehearsal failed; kernels may be compiled one after the other", name, exc_info=True)
    missing, turn = list(rehearsal.missing.items()), threading.Lock()
    needed = needed or len(missing)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="compile")
    started = _compiling(missing[:needed], pool, turn)
    for key, later, future in _compiling(missing[needed:], pool, turn):
        _LATER[key] = future
        future.add_done_callback(partial(_finish, name, key, later, {}))
    for key, wanted, future in started:
        wait([future])
        _finish(name, key, wanted, found, future)
    pool.shutdown(wait=False)
    log.debug("%s: %d kernels compiled or read in %.2f s", name, len(found), time.monotonic() - start)
    return found


_LATER = dict[str, Future[Any]]()
"""By Triton's keys, what earlier calls left to be compiled beside them."""


def wait_for_later() -> None:
    """Until what earlier calls left to be compiled beside them is."""
    while _LATER:
        wait(list(_LATER.values()))
        time.sleep(0.001)  # a future is done before its callback is


def _finish(name: str, key: str, missing: _Missing, found: dict[str, Any], future: Future[Any]) -> None:
    try:
        found[key] = future.result()
        missing.finish(found[key])
    except Exception as error:
        log.warning("%s: %s was not compiled ahead: %s: %s", name, missing.kernel, type(error).__name__, error)
    _LATER.pop(key, None)


def _is_recorded() -> bool:
    """Into a CUDA graph, in which a rehearsal's fills and copies would be left behind."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _threads() -> int:
    given = os.environ.get(THREADS)
    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{THREADS}: expected how many kernels to compile at a time, 1 or more, got {given!r}")
    return int(given)


@dataclass(frozen=True)
class _Missing:
    """A kernel that is not in memory: its name, Triton's source of it, and the two halves of compiling it."""

    kernel: str
    source: Any
    compile_kernel: Callable[[], Any]
    finish: Callable[[Any], None]

    @property
    def size(self) -> int:
        return 0 if self.source is None else len(self.source.fn.src)


class _Rehearsal:
    """What Triton turns to for a kernel that is not in memory, while an operation is rehearsed."""

    _one_at_a_time = threading.Lock()

    def __init__(self) -> None:
        self.kernel, self.missing = "", dict[str, _Missing]()

    def submit(self, key: str, compile_kernel: Callable[[], Any], finish: Callable[[Any], None], *_: Any) -> None:
        """Nothing comes back, so Triton has nothing to launch."""
        if key not in self.missing:
            source = getclosurevars(compile_kernel).nonlocals.get("src")
            self.missing[key] = _Missing(self.kernel, source, compile_kernel, finish)

    @contextmanager
    def nothing_is_launched(self) -> Iterator[None]:
        """By this thread; kernels that are in memory would read what others should have written."""
        with self._one_at_a_time:
            run = JITFunction.run

            def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
                if active_mode.get() is self:
                    self.kernel, warmup = kernel.__name__, True
                return run(kernel, *args, grid=grid, warmup=warmup, **keywords)

            JITFunction.run = compile_only
            before = active_mode.set(self)  # type: ignore[arg-type]
            try:
                yield
            finally:
                active_mode.reset(before)
                JITFunction.run = run


def _compiling(
    missing: list[tuple[str, _Missing]], pool: ThreadPoolExecutor, turn: threading.Lock
) -> list[tuple[str, _Missing, Future[Any]]]:
    """Started, the longest source first, and after them their launchers, which depend on the types of arguments alone.

    Python's part of a compilation, from its source to Triton's first language, is a tenth of the whole and holds Python's lock.
    If eleven threads shared that by turns, all would be late for the rest; so one goes through it at a time.
    """
    ordered = sorted(missing, key=lambda item: -item[1].size)
    sources = [m.source for _, m in ordered if m.source is not None]
    for source in sources:
        source.make_ir = _in_turn(source.make_ir, turn)
    started = [(key, m, pool.submit(m.compile_kernel)) for key, m in ordered]
    launcher = getattr(driver.active, "launcher_cls", None)
    if launcher is not None:
        for source in sources:
            pool.submit(_make_launcher, launcher, source)
    return started


def _make_launcher(launcher: Callable[..., Any], source: Any) -> None:
    """Leaves the C code that hands a kernel its arguments, compiled, in Triton's cache, where the launch finds it."""
    try:
        launcher(source, _Unknown())
    except Exception as error:  # the launch makes it itself, or raises
        log.debug("launcher of %s was not made ahead: %s: %s", source.fn.__name__, type(error).__name__, error)


def _in_turn(function: Callable[..., Any], turn: threading.Lock) -> Callable[..., Any]:
    def run(*args: Any, **keywords: Any) -> Any:
        with turn:
            return function(*args, **keywords)

    return run


class _Unknown:
    """A kernel's metadata before it is compiled."""

    def __getattr__(self, name: str) -> None:
        return None
