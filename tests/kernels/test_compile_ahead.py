"""A first call hands all kernels that it lacks to threads, and changes nothing else. Without a GPU: compiled, not launched."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")

import triton.language as tl  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from kimi_linear.kernels.triton import compile_ahead  # noqa: E402
from kimi_linear.ops import library  # noqa: E402

from .launches import _Driver  # noqa: E402

pytestmark = pytest.mark.unpoisoned


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


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """A GPU that runs nothing, with an empty cache on disk and two threads to compile in."""
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

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(compile_ahead.THREADS, "2")
    monkeypatch.setattr(driver, "_active", Driver(90))
    monkeypatch.setattr(triton.knobs.compilation, "listener", seen)
    monkeypatch.setattr(JITFunction, "run", launch)
    machine.forget()
    yield machine
    compile_ahead.wait_for_later()
    assert JITFunction.run is launch, "a rehearsal left its own behind"
    machine.forget()


def forward(x: torch.Tensor) -> str:
    add[(1,)](x, 1)
    scale[(1,)](x)
    add[(1,)](x, 1)
    return "result"


def training(x: torch.Tensor) -> str:
    forward(x)
    turn[(1,)](x)
    return "thrown away"


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


X = torch.zeros(16)


def test_the_first_launch_has_every_kernel_compiled_and_later_ones_none(machine: Machine) -> None:
    assert compile_ahead.call("op", forward, training, (X,)) == "result"
    assert sorted(machine.compiled) == [("add", "compile"), ("scale", "compile"), ("turn", "compile")]
    assert machine.launched == ["add", "scale", "add"]  # none of them in the rehearsal
    compile_ahead.call("op", training, pytest.fail, (X,))
    assert len(machine.compiled) == 3
    assert machine.read == []


def test_a_kind_that_is_new_is_noticed(machine: Machine) -> None:
    compile_ahead.call("op", forward, forward, (X,))
    compile_ahead.call("op", forward, forward, (X.half(),))
    assert len(machine.compiled) == 4
    assert {thread for _, thread in machine.compiled} == {"compile"}


def test_side_by_side_and_the_same_code(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    both = threading.Barrier(2)
    machine.when_compiled = lambda _: both.wait(20)  # one after the other would not get past this
    compile_ahead.call("op", forward, forward, (X,))
    assert warnings(caplog) == []
    together = dict(machine.cubins)
    machine.forget()
    machine.when_compiled = lambda _: None
    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")
    forward(X)
    assert machine.compiled == [("add", "MainThread"), ("scale", "MainThread")]
    assert machine.cubins == together


def test_pythons_part_is_done_by_one_thread_at_a_time(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, make_ir = [], [], ASTSource.make_ir

    def watched(self: ASTSource, *arguments: Any) -> Any:
        inside.append(self)
        most.append(len(inside))
        time.sleep(0.05)
        inside.remove(self)
        return make_ir(self, *arguments)

    monkeypatch.setattr(ASTSource, "make_ir", watched)
    compile_ahead.call("op", training, training, (X,))
    assert most == [1, 1, 1]


def test_the_longest_source_goes_first(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_ahead, "ThreadPoolExecutor", lambda n, **names: ThreadPoolExecutor(1, **names))

    def backwards(x: torch.Tensor) -> None:
        turn[(1,)](x)
        forward(x)

    compile_ahead.call("op", forward, backwards, (X,))
    assert [name for name, _ in machine.compiled] == ["add", "scale", "turn"]
    assert len(add.src) > len(scale.src) > len(turn.src)


def test_launchers_are_made_in_threads_too_or_else_by_their_launch(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    made: list[tuple[str, str]] = []

    def launcher(source: Any, metadata: Any) -> None:
        assert metadata.whatever_is_asked is None
        made.append((source.fn.__name__, threading.current_thread().name.split("_")[0]))
        if source.fn.__name__ == "scale":
            raise OSError("no C compiler")

    driver.active.launcher_cls = launcher
    with caplog.at_level(logging.DEBUG):
        assert compile_ahead.call("op", forward, forward, (X,)) == "result"
    assert sorted(made) == [("add", "compile"), ("scale", "compile")]
    told = [r.getMessage() for r in caplog.records if "launcher" in r.getMessage()]
    assert told == ["launcher of scale was not made ahead: OSError: no C compiler"]


def test_kernels_in_memory_are_not_launched_in_a_rehearsal(machine: Machine) -> None:
    add[(1,)](X, 1)
    machine.launched.clear()
    compile_ahead.call("op", lambda x: scale[(1,)](x), training, (X,))
    assert machine.launched == ["scale"]
    assert sorted(machine.compiled) == [("add", "MainThread"), ("scale", "compile"), ("turn", "compile")]


def test_what_other_threads_launch_meanwhile_is_launched(machine: Machine) -> None:
    turn[(1,)](X)
    machine.launched.clear()

    def rehearse(x: torch.Tensor) -> None:
        forward(x)
        other = threading.Thread(target=lambda: turn[(1,)](x))
        other.start()
        other.join()

    compile_ahead.call("op", forward, rehearse, (X,))
    assert machine.launched == ["turn", "add", "scale", "add"]


def test_what_lies_on_disk_is_read(machine: Machine) -> None:
    compile_ahead.call("op", forward, training, (X,))
    machine.forget()
    compile_ahead.call("op", forward, training, (X,))
    assert machine.compiled == []
    assert sorted(machine.read) == [("add", "compile"), ("scale", "compile"), ("turn", "compile")]


def test_a_kernel_that_does_not_compile_says_so_where_it_is_launched(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    def faulty(x: torch.Tensor) -> None:
        add[(1,)](x, 1)
        broken[(1,)](x)

    with pytest.raises(triton.CompilationError, match="no_such_name"):
        compile_ahead.call("op", faulty, faulty, (X,))
    assert machine.launched == ["add"]
    assert len(warnings(caplog)) == 1
    assert "op: broken was not compiled ahead: CompilationError" in caplog.text


def test_a_rehearsal_that_fails_is_told_and_costs_nothing_else(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(x: torch.Tensor) -> None:
        add[(1,)](x, 1)
        raise RuntimeError("no memory for the backward")

    assert compile_ahead.call("op", forward, fails, (X,)) == "result"
    assert machine.compiled == [("add", "compile"), ("scale", "MainThread")]
    assert machine.launched == ["add", "scale", "add"]
    assert len(warnings(caplog)) == 1
    assert "no memory for the backward" in caplog.text


def test_the_switch(machine: Machine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(compile_ahead.THREADS, "1")
    with caplog.at_level(logging.DEBUG):
        assert compile_ahead.call("op", forward, pytest.fail, (X,)) == "result"
    assert machine.compiled == [("add", "MainThread"), ("scale", "MainThread")]
    assert caplog.records == []
    for wrong in ("0", "no", "-1", ""):
        machine.forget()
        monkeypatch.setenv(compile_ahead.THREADS, wrong)
        with pytest.raises(ValueError, match=r"KIMI_LINEAR_COMPILE_THREADS: expected .* 1 or more"):
            compile_ahead.call("op", forward, forward, (X,))


def test_nothing_is_rehearsed_into_a_cuda_graph(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert compile_ahead.call("op", forward, pytest.fail, (X,)) == "result"
    assert machine.compiled == [("add", "MainThread"), ("scale", "MainThread")]


def test_a_mode_that_somebody_else_has_set_is_left_alone(machine: Machine) -> None:
    with ThreadPoolExecutor(1, "theirs") as pool, triton.AsyncCompileMode(pool):
        compile_ahead.call("op", lambda x: add.warmup(x, 1, grid=(1,)), pytest.fail, (X,))
    assert machine.compiled == [("add", "theirs")]


def add_and_later_scale(x: torch.Tensor) -> Iterator[None]:
    add[(1,)](x, 1)
    yield
    scale[(1,)](x)
    yield


def test_a_call_does_not_wait_for_what_is_rehearsed_after_a_yield(machine: Machine) -> None:
    gate = threading.Event()

    def slow(kernel: str) -> None:
        if kernel == "scale":
            assert gate.wait(60)

    machine.when_compiled = slow
    compile_ahead.call("op", lambda x: add[(1,)](x, 1), add_and_later_scale, (X,))
    gate.set()
    compile_ahead.wait_for_later()
    assert sorted(machine.compiled) == [("add", "compile"), ("scale", "compile")]
    compile_ahead.call("op", lambda x: scale[(1,)](x), pytest.fail, (X,))
    assert len(machine.compiled) == 2


def test_a_call_waits_for_what_an_earlier_one_left_to_be_compiled(machine: Machine) -> None:
    begun, gate = threading.Event(), threading.Event()

    def slow(kernel: str) -> None:
        if kernel == "scale":
            begun.set()
            assert gate.wait(60)

    machine.when_compiled = slow
    compile_ahead.call("op", lambda x: add[(1,)](x, 1), add_and_later_scale, (X,))
    assert begun.wait(60)
    threading.Timer(0.2, gate.set).start()
    compile_ahead.call("op", lambda x: scale[(1,)](x), pytest.fail, (X,))
    assert sorted(machine.compiled) == [("add", "compile"), ("scale", "compile")]
    assert machine.launched == ["add", "scale"]


def test_a_rehearsal_takes_little_memory_whatever_the_call_takes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first call of a million tokens would not find room for another of them."""
    from kimi_linear.kernels.triton import chunk_kda
    from kimi_linear.ops import chunk_kda_operator as operator

    seen: list[int] = []
    prepare = chunk_kda._prepare
    monkeypatch.setattr(
        chunk_kda,
        "_prepare",
        lambda problem, *rest, **more: (seen.append(problem.q.shape[1]), prepare(problem, *rest, **more))[1],
    )
    wide = torch.zeros(2, 5000, 3, 1, 32, dtype=torch.bfloat16)  # rows with a stride of their own
    rows = (*wide.unbind(2), torch.zeros(2, 5000, 1, 32, dtype=torch.bfloat16), torch.zeros(2, 5000, 1))
    inputs = (*rows, None, None, None, None, None, 1.0, True)
    compile_ahead.call("op", operator._train, operator._rehearse_training, inputs)
    compile_ahead.wait_for_later()
    assert seen == [5000, 2048, 64]
    assert {thread for _, thread in machine.compiled} == {"compile"}


def test_what_a_forward_leaves_is_what_the_operator_returns() -> None:
    """torch does not compare an operator's results with its schema: too many end in a crash."""
    from kimi_linear.kernels.triton.saved import Saved
    from kimi_linear.ops import chunk_kda_operator as operator

    assert len(Saved._fields) == operator._SAVED


def test_training_has_its_backward_compiled_too(machine: Machine) -> None:
    """The operations' own functions, all kernels of which are found in threads during the forward's first launch."""
    from kimi_linear.ops import chunk_kda_operator as operator

    rows = (torch.zeros(1, 100, 64, 32, dtype=torch.bfloat16) for _ in range(4))  # so many heads need no segments
    inputs = (*rows, torch.zeros(1, 100, 64), torch.zeros(64), torch.zeros(64, 32), None, None, None, 1.0, True)
    output, _, *saved = compile_ahead.call("train", operator._train, operator._rehearse_training, inputs)
    assert {thread for _, thread in machine.compiled} == {"compile"}
    before = len(machine.compiled)
    gradients = (*inputs, saved, output, torch.zeros_like(output), None)
    compile_ahead.call("backward", operator._backward, pytest.fail, gradients)
    assert len(machine.compiled) == before
    assert len(machine.launched) == len(set(machine.launched)) == before


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("first", "other"), [(100, 2300), (2300, 100)])
def test_lengths_that_need_other_kernels_have_them_compiled_too(
    machine: Machine, first: int, other: int, packed: bool
) -> None:
    """A sequence of one head is cut into segments from 2,048 tokens on."""
    from kimi_linear.ops import chunk_kda_operator as operator

    def inputs(tokens: int) -> tuple[Any, ...]:
        rows = (torch.zeros(1, tokens, 1, 32, dtype=torch.bfloat16) for _ in range(4))
        lengths = torch.tensor([0, tokens]) if packed else None
        return (*rows, torch.zeros(1, tokens, 1), None, None, None, lengths, None, 1.0, True)

    compile_ahead.call("op", operator._forward, operator._rehearse, inputs(first))
    compile_ahead.wait_for_later()
    before = len(machine.compiled)
    assert {name for name, _ in machine.compiled} >= {"build_kernel", "combine_kernel", "scan_kernel", "solve_kernel"}
    compile_ahead.call("op", operator._forward, pytest.fail, inputs(other))
    assert len(machine.compiled) == before


@pytest.fixture
def decode(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[object, weakref.ref[torch.Tensor]]]:
    """A step for a number of sequences, as it goes to the GPU: what is kept of it, and its pool."""
    from kimi_linear.kernels.triton import decode
    from kimi_linear.testing.decode import decode_inputs

    def launcher(kernel: Any, *_: Any) -> Callable[[list[int]], None]:
        return lambda addresses: machine.launched.append(kernel.metadata.name)

    machine.forget((decode.decode_kernel, decode.head_kernel))
    monkeypatch.setattr(decode, "launcher", launcher)

    def step(
        batch: int, heads: int, v_heads: int, tokens: int = 1, **given: Any
    ) -> tuple[object, weakref.ref[torch.Tensor]]:
        i = decode_inputs(batch, tokens, heads, v_heads=v_heads, key_dim=128, dtype=torch.bfloat16)
        assert i.taps is not None
        tensors = (
            i.q, i.k, i.v, i.gate.x, i.beta, i.norm.gate, i.gate.A_log, i.gate.dt_bias, i.taps.q, i.taps.k, i.taps.v,
            i.norm.weight, i.pool.memory, i.pool.window, torch.arange(batch, dtype=torch.int32), None,
        )  # fmt: skip
        run = decode.prepare(tensors, lower_bound=None, eps=1e-5, activation="sigmoid", **given)
        run(tensors, torch.empty_like(i.v))
        return run, weakref.ref(i.pool.memory)

    return step


def test_what_is_kept_of_a_step_keeps_no_pool(decode: Callable[..., tuple[object, weakref.ref[torch.Tensor]]]) -> None:
    kept, pool = decode(1, 4, 4)
    compile_ahead.wait_for_later()
    gc.collect()
    assert kept is not None
    assert pool() is None


@pytest.mark.parametrize("v_heads", [4, 8])
@pytest.mark.parametrize(("first", "other"), [(1, 50), (50, 1)])
def test_a_step_has_what_other_batches_need_compiled_too(
    machine: Machine,
    decode: Callable[..., tuple[object, weakref.ref[torch.Tensor]]],
    first: int,
    other: int,
    v_heads: int,
) -> None:
    decode(first, 4, v_heads)
    compile_ahead.wait_for_later()
    before = list(machine.compiled)
    assert len(before) == 2
    assert {thread for _, thread in before} == {"compile"}
    for batch in (other, first, 2, 16, 17, 33, 34):
        decode(batch, 4, v_heads)
    assert machine.compiled == before
    assert machine.read == []
    assert len(machine.launched) == 8


def test_of_a_step_with_a_configuration_of_its_own_nothing_else_is_compiled(
    machine: Machine, decode: Callable[..., tuple[object, weakref.ref[torch.Tensor]]]
) -> None:
    from kimi_linear.kernels.triton.configs import Config

    decode(1, 4, 4, config=Config(constants={"BV": 16, "PDL": 1}, num_warps=1))
    compile_ahead.wait_for_later()
    assert [name for name, _ in machine.compiled] == ["decode_kernel"]


@pytest.mark.unchecked_shapes  # a tensor on a GPU that is not there
@pytest.mark.parametrize(("heads", "v_heads"), [(1, 1), (4, 4), (2, 4), (32, 32), (12, 48), (96, 96), (140, 140)])
@pytest.mark.parametrize("key_dim", [32, 128, 256])
@pytest.mark.parametrize(("tokens", "kept"), [(1, False), (1, True), (4, True)])
def test_a_few_batches_need_all_kernels_of_any(
    monkeypatch: pytest.MonkeyPatch, heads: int, v_heads: int, key_dim: int, tokens: int, kept: bool
) -> None:
    from kimi_linear.kernels.triton import configs, decode

    monkeypatch.setattr(configs, "device_arch", lambda index: (9, 0))
    monkeypatch.setattr(decode, "processors", lambda index: 132)
    gpu = SimpleNamespace(index=0)
    q: Any = SimpleNamespace(shape=(1, tokens, heads, key_dim), is_cuda=True, device=gpu)
    v: Any = SimpleNamespace(shape=(1, tokens, v_heads, key_dim), is_cuda=True, device=gpu)

    def kinds(batches: Iterable[int]) -> set[tuple[str, int]]:
        configs = ((batch, decode.config_for(q, v, batch)) for batch in batches)
        return {(str(config), decode.ending_of(q, v, config, kept, batch)) for batch, config in configs}

    assert kinds(decode.batches_of(v)) == kinds((*range(1, 3000), decode.MANY))


def test_triton_gets_ready_once(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(compile_ahead, "_READY", [])
    monkeypatch.setattr(compile_ahead, "triton_key", lambda: asked.append(threading.current_thread().name))
    for _ in range(2):
        compile_ahead.call("op", forward, forward, (X,))
    assert len(asked) == 1
    assert asked != ["MainThread"]


@pytest.mark.unchecked_shapes  # a tensor on a GPU that is not there
def test_an_operation_with_a_rehearsal_is_called_this_way_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(compile_ahead, "call", lambda *arguments: calls.append(arguments))
    x = SimpleNamespace(is_cuda=True, device="cuda:0")
    library._on_device("op", forward, training)(x, 3)
    assert calls == [("op", forward, training, (x, 3))]
    assert library._on_device("op", lambda x, n: n, None)(x, 3) == 3
