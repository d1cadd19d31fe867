"""First calls are measured in a process of their own, with an empty cache; what is too slow fails."""

from __future__ import annotations

import time

import pytest

from benchmarks.ops import first_call


def test_a_fresh_process_has_an_empty_cache_and_reports_seconds() -> None:
    found = first_call.measure("l2_normalize", "cpu")
    assert 0 < found["first"] < 60
    assert 0 < found["right after"] < 60
    assert found["later"] < 60


def test_first_and_other_lengths_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: set[int] = set()

    def operation(tokens: int, device: str):
        def call() -> None:
            kernel = 0 if tokens == first_call.LENGTHS[0] else tokens // 1000  # another one from 2000 tokens on
            time.sleep(0.0 if kernel in compiled else 0.05)
            compiled.add(kernel)

        return call

    monkeypatch.setattr(first_call, "OPERATIONS", {"x": operation})
    found = first_call.measure_here("x", "cpu")
    assert found["first"] >= 0.05
    assert found["right after"] >= 0.05  # a kernel for each length
    assert found["later"] >= 0.04
    compiled.update(range(10))
    found = first_call.measure_here("x", "cpu")
    assert found["right after"] < 0.05
    assert found["later"] < 0.04


def test_what_is_too_slow_fails() -> None:
    good = {"first": 4.9, "right after": 4.8, "later": 0.2}
    assert first_call.row_of("x", good) == ["x", "4.90", "4.80", "0.200", "ok"]
    assert first_call.row_of("x", good | {"first": 5.1})[-1] == "first over 5 s"
    assert first_call.row_of("x", good | {"right after": 5.1})[-1] == "right after over 5 s"
    assert "compiled again?" in str(first_call.row_of("x", good | {"later": 0.3})[-1])
    assert len(first_call.COLUMNS) == len(first_call.row_of("x", good))


def test_a_broken_operation_is_told_with_its_last_words() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)first call of l2_normalize failed:.*no-such-device"):
        first_call.measure("l2_normalize", "no-such-device")
