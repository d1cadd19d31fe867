"""The KDA benchmark: it counts right, judges before it times, and keeps what it has at every row."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.ops import _check, _pages, kda
from benchmarks.ops._variants import forward, ours, softmax_attention, training
from benchmarks.ops.shapes import SHAPES, Shape, shapes_of

ROOT = Path(__file__).parents[2]
TOY = SHAPES["toy-packed"]


def test_the_floor_of_one_token_and_head_is_1282_bytes_and_3590_with_a_backward() -> None:
    one, two = (Shape(name="x", heads=1, lengths=(tokens,)) for tokens in (1, 2))
    assert two.bytes_of("forward") - one.bytes_of("forward") == 1282
    assert two.bytes_of("backward") - one.bytes_of("backward") == 3590
    assert one.bytes_of("forward") - 1282 == 128 * 128 * 4  # the final state
    shared = Shape(name="x", heads=1, v_heads=2, lengths=(1,))
    assert shared.bytes_of("forward") == 2 * (2 * 128 + 2 * (3 * 128 + 1)) + 2 * 128 * 128 * 4
    assert one.flops_of("forward") == pytest.approx(183e3, rel=1e-3)


def test_names_and_groups_of_shapes() -> None:
    assert [s.name for s in shapes_of(["8k-h4", "toy", "8k-h4"])] == ["8k-h4", "toy-whole", "toy-packed", "toy-gva"]
    with pytest.raises(ValueError, match=r"shapes: expected names of 8k-h32.*got '9k'"):
        shapes_of(["9k"])


@pytest.mark.parametrize("name", ["toy-packed", "toy-gva"])
def test_the_judge_knows_right_from_wrong_in_every_result(name: str) -> None:
    inputs = SHAPES[name].draw("init", device="cpu")
    weight = torch.randn_like(inputs.v)
    judge = _check.exact(inputs, weight)
    found = _check.errors(ours("torch"), inputs, weight, judge)
    assert set(found) == {
        "output",
        *(f"d {x}" for x in ("q", "k", "v", "beta", "gate.x", "gate.A_log", "gate.dt_bias")),
    }
    assert min(found.values()) > 0
    assert max(error for result, error in found.items() if result not in _check.PARAMETERS) < 1e-2
    _check.demand(found, "torch")

    def forgets_more(i):
        return ours("torch")(replace(i, gate=replace(i.gate, A_log=i.gate.A_log + 0.1)))

    with pytest.raises(_check.WrongAnswer, match=r"it: .*output 0\.\d+ \(at most 0\.005\).*d q .*d gate\.x "):
        _check.demand(_check.errors(forgets_more, inputs, weight, judge), "it")
    with pytest.raises(_check.WrongAnswer, match="output nan"):
        _check.demand({"output": float("nan")}, "it")


def test_a_wrong_answer_gets_no_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = kda.Run(device="cpu", out=tmp_path, ends=time.monotonic() + 60, bandwidth=1e9)
    monkeypatch.setattr(kda, "timed_variants", lambda *_: ({"torch": lambda i: 1.1 * ours("torch")(i)}, {}))
    monkeypatch.setattr(kda, "interleaved", lambda *_: pytest.fail("a wrong answer was timed"))
    assert not kda.step(run, TOY, "init", "forward")
    (page,) = tmp_path.glob("*.md")
    assert "## Not timed" in page.read_text()
    assert "output 0.1 (at most 0.005)" in page.read_text()
    assert "## Forward" not in page.read_text()
    monkeypatch.setattr(kda, "measure", lambda *_: 1 / 0)
    assert not kda.step(run, TOY, "fast", "forward")
    assert "ZeroDivisionError" in page.read_text()
    run.ends = 0.0
    assert kda.step(run, TOY, "init", "forward")
    assert "the budget was used up" in page.read_text()


def test_a_baseline_is_timed_beside_ours_and_may_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = kda.Run(device="cpu", out=tmp_path, ends=time.monotonic() + 600, bandwidth=1e9)
    monkeypatch.setattr(kda, "has_fla", lambda _: True)
    monkeypatch.setattr(kda, "fla", ours("torch"))
    assert kda.step(run, TOY, "init", "backward")
    (record,) = run.records
    assert record["errors"]["fla"] == record["errors"]["torch"]
    assert set(record["seconds"]) == {"torch", "fla", "sdpa"}
    cells = dict(zip(_pages.SPEED, _pages.speed_row(record, run.bandwidth), strict=True))
    assert float(cells["fla / ours"]) == pytest.approx(record["seconds"]["fla"] / record["seconds"]["torch"], abs=0.01)
    assert float(cells["of the floor"].rstrip("%")) == pytest.approx(
        100 * TOY.bytes_of("backward") / 1e9 / record["seconds"]["torch"], abs=0.1
    )
    ours_peak, share = record["memory"]["auto"]["peak"], _pages.memory_row(record)[-1]
    assert share == f"{ours_peak / record['memory']['fla']['peak']:.0%}"

    monkeypatch.setattr(kda, "fla", lambda _: 1 / 0)
    assert kda.step(run, TOY, "init", "forward")
    assert set(run.records[1]["seconds"]) == {"torch", "sdpa"}
    (page,) = tmp_path.glob("*.md")
    assert "fla: ZeroDivisionError: division by zero" in page.read_text()


def test_a_choice_that_is_not_the_fastest_is_told() -> None:
    record = {"shape": "x", "gate": "init", "mode": "forward", "auto": "torch", "fastest": "triton"}
    assert _pages.wrong_choices([record | {"seconds": {"torch": 1.0, "triton": 0.98}}]) == []
    assert len(_pages.wrong_choices([record | {"seconds": {"torch": 1.0, "triton": 0.9}}])) == 1


def test_softmax_attention_never_crosses_sequences() -> None:
    inputs = TOY.draw("init", device="cpu")
    first, last = (softmax_attention(TOY.lengths)(inputs)[:, at] for at in (slice(0, 40), slice(41, None)))
    alone = softmax_attention((23,))(
        replace(inputs, q=inputs.q[:, 41:], k=inputs.k[:, 41:], v=inputs.v[:, 41:], cu_seqlens=None)
    )
    torch.testing.assert_close(last, alone, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(first[:, 0], inputs.v[:, 0], rtol=1e-2, atol=1e-2)


def test_training_and_forward_compute_what_they_say() -> None:
    inputs = TOY.draw("init", device="cpu").with_grad(clone=False)
    weight = torch.randn_like(inputs.v)
    assert not forward(ours("torch"), inputs)().requires_grad
    gradients = training(ours("torch"), inputs, weight, ("v",))()
    expected = torch.autograd.grad(ours("torch")(inputs), inputs.v, weight)
    torch.testing.assert_close(gradients, expected)


def test_the_command_checks_times_and_writes(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--shapes", "toy-packed", "--gates", "init", "stress", "--out", str(tmp_path)]
    command = [sys.executable, "-m", "benchmarks.ops.kda", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (page,), (numbers,) = tmp_path.glob("kda_ops_*.md"), tmp_path.glob("kda_ops_*.json")
    kept = json.loads(numbers.read_text())
    assert kept["command"].startswith("python -m benchmarks.ops.kda --device cpu")
    records = {(r["gate"], r["mode"]): r for r in kept["results"]["records"]}
    assert set(records) == {(gate, mode) for gate in ("init", "stress") for mode in ("forward", "backward")}
    for (gate, mode), record in records.items():
        assert 0 < record["errors"]["torch"]["output"] < _check.OUTPUT_BOUND
        assert ("d q" in record["errors"]["torch"]) == (mode == "backward")
        assert ("seconds" in record) == (gate == "init")
        assert record["auto"] == "torch"
    times = records["init", "backward"]["seconds"]
    assert set(times) == {"torch", "sdpa"}
    assert f"| {1e6 * times['torch']:,.0f} " in page.read_text()
    assert "took the fastest of our implementations" in page.read_text()
    assert records["init", "backward"]["memory"]["auto"]["peak"] > 0
