"""The record of a run: exact lines, cut on resume, and the same numbers in TensorBoard."""

import json
import math
import sys
import warnings

import pytest

from kimi_linear.training import StepMetrics, read_metrics
from kimi_linear.training.metrics import MetricsLog


def metrics(step, val_loss=None):
    return StepMetrics(
        step=step, loss=2.5 / step, lr=1e-3, grad_norm=1.0, tokens_per_second=100.0, tokens=64 * step,
        seconds_left=5.0, val_loss=val_loss,
    )  # fmt: skip


def write(folder, steps, *, step=0, tensorboard=False):
    log = MetricsLog(folder, step=step, tensorboard=tensorboard)
    for i in steps:
        log.write(metrics(i, val_loss=1.5 if i % 2 == 0 else None))
    log.close()


def test_lines_hold_the_numbers(tmp_path):
    write(tmp_path, [1, 2])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [2.5, 1.25]
    assert "val_loss" not in lines[0]
    assert (lines[1]["val_loss"], lines[1]["val_perplexity"]) == (1.5, math.exp(1.5))


def test_a_resumed_run_drops_what_it_does_again(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    write(tmp_path, [3, 4, 5], step=2)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    with warnings.catch_warnings():
        # TensorBoard's own dependencies warn at import.
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        write(tmp_path, [1, 2], tensorboard=True)
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 1.25)]
    assert [(e.step, e.value) for e in events.Scalars("val_loss")] == [(2, 1.5)]


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'kimi-linear\[train\]'"):
        MetricsLog(tmp_path, step=0, tensorboard=True)
