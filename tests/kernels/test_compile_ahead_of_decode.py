"""The first step of a decode has compiled beside it what steps of other batches will need. Without a GPU: compiled, not launched."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")

from kimi_linear.kernels.triton import compile_ahead

from .machine import Machine, watched

pytestmark = pytest.mark.unpoisoned
Step = Callable[..., tuple[object, "weakref.ref[torch.Tensor]"]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    with watched(monkeypatch, tmp_path) as machine:
        yield machine


@pytest.fixture
def decode(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Step:
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


def test_what_is_kept_of_a_step_keeps_no_pool(decode: Step) -> None:
    kept, pool = decode(1, 4, 4)
    compile_ahead.wait_for_later()
    gc.collect()
    assert kept is not None
    assert pool() is None


@pytest.mark.parametrize("v_heads", [4, 8])
@pytest.mark.parametrize(("first", "other"), [(1, 50), (50, 1)])
def test_a_step_has_what_other_batches_need_compiled_too(
    machine: Machine,
    decode: Step,
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


def test_of_a_step_with_a_configuration_of_its_own_nothing_else_is_compiled(machine: Machine, decode: Step) -> None:
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
