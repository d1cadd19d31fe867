"""The benchmarks of loading and of the released size, at toy size: they run, count right, and refuse wrong answers."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.model import large_checkpoint, load_speed
from kimi_linear.config import ModelConfig
from kimi_linear.engine.footprint import Footprint, footprint
from kimi_linear.model.streaming import WORKERS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.unpoisoned  # speeds are of memory as it comes


def test_the_number_of_experts_follows_from_the_size() -> None:
    config = ModelConfig.preset("kimi-linear-48b-a3b", num_layers=4)
    for gigabytes in (3, 4, 7.5):
        sized = load_speed.sized(config, gigabytes * 1e9)
        assert footprint(sized).weight_bytes == pytest.approx(gigabytes * 1e9, rel=0.01)
        assert sized.moe.expert_size == 1024


def test_load_speed_measures_each_task_and_cleans_up(tmp_path: Path) -> None:
    """The whole benchmark on ten megabytes: cold reads come from storage, warm ones do not, the page holds the verdict."""
    command = [sys.executable, "-m", "benchmarks.model.load_speed", "--preset", "tiny-moe", "--gigabytes", "0.01", "--shard-gigabytes", "0.003",
               "--repeats", "1", "--vocab-size", "320", "--where", str(tmp_path / "disk"), "--results", str(tmp_path / "results")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    if "is it in memory?" in done.stderr:
        pytest.skip(f"needs {tmp_path} on a disk; it is in memory")
    assert done.returncode == 0, done.stderr
    (page,) = (tmp_path / "results").iterdir()
    text = page.read_text()
    assert list((tmp_path / "disk").iterdir()) == []
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    table = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[1:]}
    assert set(table) == {"plain read, 1 reader", f"plain read, {WORKERS} readers", "plain read, 1 reader, each block dropped from the page cache", f"plain read, {WORKERS} readers, each block dropped from the page cache", f"plain read past the page cache, {WORKERS} readers", "kimi_linear.load", "kimi_linear.load, files in the page cache", "safetensors' load_file, copied into the model"}  # fmt: skip
    fetched = {name: int(row["from storage"].rstrip("%")) for name, row in table.items()}
    assert fetched.pop("kimi_linear.load, files in the page cache") < 20
    assert min(fetched.values()) >= 90
    peaks = [float(row["peak host memory, GiB"]) for row in table.values()]
    assert all(0.1 < peak < 2 for peak in peaks)
    assert "allows it" in text
    speeds = {name: float(row["of the disk"].rstrip("%")) for name, row in table.items()}
    assert max(speed for name, speed in speeds.items() if name.startswith("plain read")) == 100


def test_wrong_numbers_get_no_speed(tmp_path: Path) -> None:
    config = load_speed.sized(ModelConfig.preset("tiny-moe"), 3e6)
    load_speed.make(config, tmp_path / "m", 10**9)
    paths = load_speed.shards(tmp_path / "m")
    model = load_speed.memory_map(tmp_path / "m")
    load_speed.check(model, paths, every=1)
    tensors = load_file(paths[0])
    name = list(tensors)[3]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, paths[0])
    with pytest.raises(RuntimeError, match=f"{name}: loaded numbers differ"):
        load_speed.check(model, paths, every=1)


def test_a_large_checkpoint_takes_what_info_says(tmp_path: Path) -> None:
    args = large_checkpoint.Args(
        preset="tiny-moe", device="cpu", tokens=32, decode=3, sequences=3, span=32, results=tmp_path
    )
    page, worst = large_checkpoint.run(args)
    assert worst < 1e-6
    text = page.read_text()
    said = footprint(ModelConfig.preset("tiny-moe"))
    assert f"| {said.token_bytes:,.1f} bytes" in text
    assert "all logits finite" in text


def test_memory_that_was_not_foretold_is_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A convolution window that keeps the whole prompt alive, as a view would, is counted."""
    args = large_checkpoint.Args(
        preset="tiny", device="cpu", tokens=32, decode=2, sequences=2, span=32, results=tmp_path
    )
    original = large_checkpoint.tensors_of
    monkeypatch.setattr(large_checkpoint, "tensors_of", lambda state: [*original(state), torch.zeros(1 << 20)])
    _, worst = large_checkpoint.run(args)
    assert worst > large_checkpoint.TOLERANCE


def test_logits_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = large_checkpoint.Args(
        preset="tiny", device="cpu", tokens=8, decode=2, sequences=2, span=32, results=tmp_path
    )
    monkeypatch.setattr(large_checkpoint, "init_weights", lambda model, std, seed: [p.data.fill_(torch.nan) for p in model.parameters()])  # fmt: skip
    with pytest.raises(RuntimeError, match="expected finite numbers after 8 tokens"):
        large_checkpoint.run(args)


def test_differences_are_shares_of_the_prediction() -> None:
    args = large_checkpoint.Args(sequences=2, span=100)
    said = Footprint(parameters=1, active_parameters=1, weight_bytes=1000, state_bytes=200, token_bytes=10)
    got = large_checkpoint.Measured(weight_bytes=1010, state_bytes=190.0, token_bytes=10.0, together=2448, making=1, first=1, prefill=1, decode=1, peak=None, step=None)  # fmt: skip
    differences = [row[-1] for row in large_checkpoint.compared("x", said, got, args)]
    assert differences == pytest.approx([0.01, -0.05, 0.0, 0.02])
    full = dataclasses.replace(said, state_bytes=0)
    assert large_checkpoint.compared("x", full, got, args)[1][-1] == pytest.approx(0.19)


def test_a_profile_is_counted_by_the_token() -> None:
    def event(name: str, device: torch.autograd.DeviceType, us: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: us))

    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
    events = [event("gemm", cuda, 30.0), event("Memcpy DtoH", cuda, 2.0), event("aten::mm", cpu, 90.0)] * 4
    events += [event("cudaStreamSynchronize", cpu, 50.0)] * 2 + [event("cudaDeviceSynchronize", cpu, 9.0)]
    step = large_checkpoint.counted(events, tokens=4)
    assert (step.launches, step.waits) == (2, 0.5)
    assert step.busy == pytest.approx(32e-6)
    got = large_checkpoint.Measured(weight_bytes=1, state_bytes=1, token_bytes=1, together=1, making=1, first=1, prefill=1, decode=64e-4, peak=None, step=step)  # fmt: skip
    shown = large_checkpoint.speeds(got, large_checkpoint.Args(decode=64))["a decoded token"]
    assert shown == "2 launches, 0.5 waits of the host, device busy 0.0 ms (32%)"


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["large_checkpoint"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        large_checkpoint.main()
    assert stopped.value.code == 0
    assert "needs a CUDA device" in capsys.readouterr().out


@pytest.mark.gpu
def test_memory_is_what_the_allocator_says() -> None:
    before = large_checkpoint.used("cuda", ())
    kept = torch.empty(1000, dtype=torch.uint8, device="cuda")
    after = large_checkpoint.used("cuda", ())
    assert after.asked - before.asked == kept.nbytes == 1000
    assert after.taken - before.taken == 1024


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["hybrid", "mla"])
def test_states_take_what_info_says_on_a_gpu(mixer: str) -> None:
    config = ModelConfig.preset("tiny-moe" if mixer == "hybrid" else "tiny-moe/mla")
    args = large_checkpoint.Args(tokens=256, decode=3, sequences=64, span=256)
    said, got = footprint(config), large_checkpoint.measure(config, args)
    assert got.token_bytes == pytest.approx(said.token_bytes, rel=1e-3)
    assert got.state_bytes == pytest.approx(said.state_bytes, rel=1e-3, abs=16)
    assert got.together >= 64 * said.context_bytes(256)
    assert got.step is not None
    assert got.step.launches > 10
    assert got.step.waits == 0
