"""Timers order what is slower and faster; peak memory counts bytes exactly."""

import time

import pytest
import torch

from kimi_linear.testing import compare, median_time, peak_memory

MIB = 2**20


def test_compare_interleaves_and_orders():
    calls = []

    def variant(name, seconds):
        def call():
            calls.append(name)
            time.sleep(seconds)

        return call

    times = compare({"slow": variant("slow", 0.008), "fast": variant("fast", 0.001)}, warmup=1, repeats=4)
    assert calls == ["slow", "fast"] + 4 * ["slow", "fast"]
    assert [len(t.samples) for t in times.values()] == [4, 4]
    assert times["slow"].median >= 0.008
    assert 0.001 <= times["fast"].median < times["slow"].median


def test_median_ignores_one_slow_call():
    waits = iter([0.1, 0.0, 0.0, 0.0, 0.0])
    assert median_time(lambda: time.sleep(next(waits)), warmup=0, repeats=5) < 0.05


def test_bad_arguments():
    with pytest.raises(ValueError, match="repeats >= 1"):
        median_time(lambda: None, repeats=0)
    with pytest.raises(ValueError, match="graph: expected a CUDA device, got cpu"):
        median_time(lambda: None, graph=True)


def allocate(mib):
    return torch.zeros(mib * MIB, dtype=torch.int8)


def test_peak_memory_is_the_most_held_at_once():
    held = allocate(32)

    def one_after_the_other():
        allocate(4)
        allocate(8)

    def together():
        return allocate(4), allocate(8)

    assert peak_memory(one_after_the_other) == pytest.approx(8 * MIB, abs=4096)
    assert peak_memory(together) == pytest.approx(12 * MIB, abs=4096)
    assert peak_memory(lambda: None) == 0
    assert peak_memory(lambda: held.add_(1)) < 4096


def test_peak_memory_sees_the_backward_pass():
    x = torch.zeros(MIB, requires_grad=True)  # 4 MiB

    def step():
        y = x.exp()  # saved for the backward pass
        (z,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return z

    # y, the ones and the gradient, 4 MiB each.
    assert peak_memory(step) == pytest.approx(12 * MIB, abs=4096)


@pytest.mark.gpu
def test_cuda_time_and_memory():
    x = torch.randn(2048, 2048, device="cuda")
    times = compare({"one": lambda: x @ x, "four": lambda: x @ x @ x @ x @ x}, device="cuda", graph=True, repeats=10)
    assert 2.5 < times["four"].median / times["one"].median < 6
    assert peak_memory(lambda: torch.empty(64 * MIB, dtype=torch.int8, device="cuda"), device="cuda") == 64 * MIB
