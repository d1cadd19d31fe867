"""The profiler's tables: traces and counters are read as they are written, and numbers follow from them."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.ops import profile_kernels as profiled
from benchmarks.ops.profile_kernels import Launch, Limits
from benchmarks.ops.shapes import Shape

KERNELS = Path(__file__).parents[2] / "kimi_linear/kernels/triton"


def event(name: str, start: float, microseconds: float) -> dict:
    facts = {"grid": [128, 32, 1], "block": [128, 1, 1], "registers per thread": 168, "shared memory": 49152}
    return {"cat": "kernel", "name": name, "ts": start, "dur": microseconds, "args": facts}


def test_the_table_has_microseconds_rates_and_resources_per_call() -> None:
    fill = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<signed char>, x>(int)"
    trace = {"traceEvents": [event("scan_kernel", 5, 300), {"cat": "cpu_op", "name": "x"}, event(fill, 1, 9999)]}
    trace["traceEvents"] += [event("scan_kernel", 2, 100), event("void other<int>(int)", 3, 400)]
    events = profiled.kernel_events(trace)
    assert [e["ts"] for e in events] == [2, 3, 5]
    taken = [Launch(name="scan_kernel", bytes=80_000_000, spills=spills) for spills in (0, 12)]
    shape = Shape(name="x", heads=2, lengths=(65, 64), dim=128)  # three chunks of two heads
    rows = profiled.table(events, taken, Limits(), shape, calls=2)
    by_name = {row[0]: dict(zip(profiled.COLUMNS, row, strict=True)) for row in rows}
    scan, other = by_name["scan_kernel"], by_name["other"]
    assert (scan["launches"], scan["µs"], scan["share"], scan["spilled"]) == ("1", "200.0", "50.0%", "12")
    assert (scan["MB"], scan["GB/s"]) == ("80.0", "400")
    products = (6 * 64 * 128 * 128 + 2 * 64 * 64 * 128) * 6
    assert scan["TFLOP/s"] == f"{products / 200e-6 / 1e12:.3g}"
    assert (other["MB"], other["TFLOP/s"], other["spilled"]) == ("–", "–", "–")
    assert other["occupancy"] == "19%"  # 168 registers allow three blocks of four warps in 64


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "expected"),
    [(255, 8, 0, 8 / 64), (128, 4, 0, 16 / 64), (32, 4, 100 * 1024, 8 / 64), (16, 1, 0, 32 / 64), (64, 8, 0, 32 / 64)],
)
def test_occupancy_is_that_of_the_scarcest_resource(registers: int, warps: int, shared: int, expected: float) -> None:
    assert Limits().occupancy(registers, warps, shared) == expected


def test_launches_count_each_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    compiled = SimpleNamespace(name="some_kernel", n_spills=4)
    monkeypatch.setattr(JITFunction, "run", lambda self, *arguments, **options: compiled)
    x, y = torch.zeros(100), torch.zeros(10, dtype=torch.int64)
    before = JITFunction.run
    with profiled.launches() as taken:
        assert JITFunction.run(None, x, x, 3, None, grid=(1,), warmup=False, other=y) is compiled
    assert taken == [Launch(name="some_kernel", bytes=480, spills=4)]
    assert JITFunction.run is before


def test_counters_of_ncu_become_a_table() -> None:
    stall = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    names = [
        "Kernel Name",
        "gpu__time_duration.sum",
        "dram__bytes_read.sum",
        *map(stall.format, ("barrier", "wait", "math")),
    ]
    lines = [
        names,
        ["", "us", "Mbyte", "inst", "inst", "inst"],
        ["scan_kernel", "12.5", "1,024.0", "0.5", "1.25", "3.0"],
    ]
    text = "==PROF== connected\n" + "\n".join(",".join(f'"{cell}"' for cell in line) for line in lines)
    columns, rows = profiled.counters(text)
    assert columns == ["kernel", "time us", "read Mbyte", "warps wait for"]
    assert rows == [["scan_kernel", "12.5", "1,024.0", "math 3.0, wait 1.2, barrier 0.5"]]
    with pytest.raises(RuntimeError, match="ncu: expected a table"):
        profiled.counters("==ERROR== no permission")


def test_products_are_of_kernels_that_exist() -> None:
    found = set(re.findall(r"^def (\w+)", "\n".join(p.read_text() for p in KERNELS.glob("*.py")), re.MULTILINE))
    assert set(profiled.PRODUCTS) <= found
