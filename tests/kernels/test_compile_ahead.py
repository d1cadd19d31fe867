"""A first call hands all kernels that it lacks to threads, and changes nothing else. Without a GPU: compiled, not launched."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")

from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from kimi_linear.kernels.triton import compile_ahead  # noqa: E402
from kimi_linear.ops import library  # noqa: E402

from .machine import Machine, add, broken, scale, turn, watched  # noqa: E402

pytestmark = pytest.mark.unpoisoned


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    with watched(monkeypatch, tmp_path) as machine:
        yield machine


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
