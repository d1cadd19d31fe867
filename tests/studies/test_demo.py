"""The demo, run small and for real: its numbers, its models, its interruption."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kimi_linear as kl
from kimi_linear.config import ModelConfig
from kimi_linear.data import ByteTokenizer
from kimi_linear.model import KimiLinear
from kimi_linear.studies.demo import PAGE, RESULTS, SENTENCE, DemoConfig, run_demo, set_aside
from kimi_linear.studies.demo_phases import decode_point, filled_state, record_memory
from kimi_linear.studies.report.results import DemoResults, read_results

SMALL = {
    "opening_tokens": 0,
    "steps": 4, "batch_size": 2, "sequence_length": 64, "corpus_bytes": 300_000, "sample_tokens": 12, "decode_seconds": 0.2,
    "longest_context": 2048, "recall_seconds": 1.0, "recall_pairs": 2, "threads": 1, "device": "cpu",
}  # fmt: skip


class Quiet:
    """Shows nothing and remembers it all; raises Ctrl-C at the ``interrupt``-th item that it tracks."""

    def __init__(self, interrupt: int | None = None) -> None:
        self.interrupt = interrupt
        self.lines: list[str] = []
        self.written: list[str] = []
        self.rows: list[dict] = []
        self.seen = 0

    def say(self, text: str) -> None:
        self.lines.append(text)

    def write(self, piece: str) -> None:
        self.written.append(piece)

    def track(self, items, total, *, step, describe) -> Iterator:
        for item in items:
            assert 0 <= step(item) <= total
            self.lines.append(describe(item))
            if self.seen == self.interrupt:
                raise KeyboardInterrupt
            self.seen += 1
            yield item

    def table(self, rows) -> None:
        self.rows += rows


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> tuple[DemoResults, Path, Quiet]:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    screen = Quiet()
    return run_demo(DemoConfig(folder=folder, **SMALL), screen), folder, screen


def test_generate_would_take_the_hybrid(demo):
    from kimi_linear.cli.folders import model_folder

    _, folder, _ = demo
    assert model_folder(folder.parent) == folder / "hybrid"


def test_both_models_saw_the_same_tokens(demo):
    results, _, _ = demo
    hybrid, attention = results.training("hybrid"), results.training("attention")
    assert hybrid.mixers == ("kda", "kda", "kda", "mla")
    assert attention.mixers == ("mla",) * 4
    for training in (hybrid, attention):
        assert training.finished
        assert [p.step for p in training.train] == [1, 2, 3, 4]
        assert [p.tokens for p in training.train] == [128, 256, 384, 512]
        assert training.validation[-1].step == 4
        # An untrained model over 320 ids is at about ln 320; four steps only begin to move it.
        assert 0.6 * math.log(320) < training.validation[-1].value < math.log(320)
        assert training.parameters == sum(
            p.numel() for p in KimiLinear(ModelConfig.preset("tiny" if training is hybrid else "tiny/mla")).parameters()
        )


def test_the_saved_models_are_the_trained_ones(demo):
    _results, folder, _ = demo
    text = torch.tensor([ByteTokenizer().encode(SENTENCE)])
    for name in ("hybrid", "attention"):
        model, tokenizer = kl.load(folder / name)
        assert tokenizer.vocab_size == 257
        untrained = KimiLinear(model.config, seed=0)
        losses = [torch.nn.functional.cross_entropy(m(text)[0, :-1], text[0, 1:]).item() for m in (untrained, model)]
        assert losses[1] < losses[0] - 0.1


def test_the_continuation_is_what_was_streamed(demo):
    results, folder, screen = demo
    assert results.sample.tokens <= 12
    assert screen.written[0] == results.sample.prompt
    assert "".join(screen.written).strip("\n") == (results.sample.prompt + results.sample.continuation).strip("\n")
    model, tokenizer = kl.load(folder / "hybrid")
    again = kl.stream(model, tokenizer, results.sample.prompt, max_tokens=12, temperature=0.9, top_p=0.95, seed=0)
    assert "".join(again) == results.sample.continuation


def test_cache_bytes_follow_the_formula(demo):
    results, _, _ = demo
    # One latent of 64 + 32 numbers per token and attention layer; per KDA layer two 64 x 64 memories and a window of
    # three inputs of 3 * 128 channels; four bytes each.
    for name, attention_layers, kda_layers in (("hybrid", 1, 3), ("attention", 4, 0)):
        points = results.decoding_of(name).points
        assert [p.context for p in points] == [1024, 2048]
        for point in points:
            state = kda_layers * (2 * 64 * 64 + 3 * 3 * 128)
            assert point.cache_bytes == 4 * (attention_layers * 96 * point.context + state)
            assert 1e-5 < point.seconds_per_token < 5


def test_the_cost_of_a_token_is_the_median_after_warm_up(monkeypatch):
    model = KimiLinear(ModelConfig.preset("tiny"), seed=0).eval()
    now = 0.0
    costs = iter([100.0, 50.0, 3.0, 1.0, 8.0, 2.0, 2.5, 99.0])

    def forward_takes_its_time(*_):
        nonlocal now
        now += next(costs)

    model.register_forward_hook(forward_takes_its_time)
    monkeypatch.setattr("kimi_linear.studies.demo_phases.time.perf_counter", lambda: now)
    with torch.inference_mode():
        point = decode_point(model, 1024, 166.0)  # 3 + 1 + 8 + 2 + 2.5 after the warm-up pass it
    assert point.seconds_per_token == 2.5
    assert point.context == 1024


def test_a_filled_state_continues_where_it_says():
    model = KimiLinear(ModelConfig.preset("tiny"), seed=0).eval()
    state = filled_state(model, 100)
    with torch.inference_mode():
        logits = model(torch.zeros(1, 1, dtype=torch.int64), state=state)
    assert state.position == 101
    assert state.layers[3].length == 101
    assert logits.isfinite().all()


def test_the_recall_task_was_measured_against_chance(demo):
    results, _, _ = demo
    recall = results.recall
    assert recall.points[0].step == 0
    assert recall.points[0].value < 0.2
    assert recall.chance == 1 / 32
    assert recall.length == 2 * 2 + 1 + 2
    assert all(0 <= p.value <= 1 for p in recall.points)


def test_the_memory_begins_empty(demo):
    results, folder, _ = demo
    memory = results.memory
    assert "".join(memory.tokens) == SENTENCE
    assert [(h.layer, h.head) for h in memory.heads] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    for head in memory.heads:
        assert head.correction[0] == head.value[0]  # an empty memory answers nothing
        assert head.correction[1:] != head.value[1:]
        assert all(0 < b < 1 for b in head.beta)
        assert all(g <= 0 for row in head.log_decay for g in row)
    model, tokenizer = kl.load(folder / "hybrid")
    # Causal: what the memory did at the beginning does not depend on what came later.
    short = record_memory(model, tokenizer, SENTENCE[:9], "").heads[5]
    assert short.correction == pytest.approx(memory.heads[5].correction[:9], rel=2e-3)
    assert short.log_decay[8] == pytest.approx(memory.heads[5].log_decay[8], rel=2e-3)


def test_what_is_written_is_what_was_measured(demo):
    results, folder, screen = demo
    assert results.missing == ()
    assert read_results(folder / RESULTS) == results
    page = (folder / PAGE).read_text(encoding="utf-8")
    bits = results.training("hybrid").validation[-1].value / math.log(2)
    assert f'data-fact="hybrid.bits_per_byte">{bits:.2f}</b>' in page
    assert "interrupted" not in page
    table = {row[""]: row for row in screen.rows}
    assert table["bits per byte, held out"]["hybrid"] == f"{bits:.3f}"
    assert table["cache at 2K of context"]["full attention"] == "3 MiB"
    assert set(results.seconds) == {
        "preparing", "training the hybrid", "training full attention", "continuation", "memory at work",
        "cost of a token", "associative recall",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("at", "missing", "trained"),
    [
        (2, "the two language models", {"hybrid": 2}),
        (5, "the two language models", {"hybrid": 4, "attention": 1}),
        (10, "the cost of a token", {"hybrid": 4, "attention": 4}),
    ],
)
def test_ctrl_c_leaves_a_model_and_a_page(tmp_path, at, missing, trained):
    folder = tmp_path / "demo"
    with pytest.raises(KeyboardInterrupt):
        run_demo(DemoConfig(folder=folder, **SMALL), Quiet(interrupt=at))
    results = read_results(folder / RESULTS)
    assert results.missing[0] == missing
    assert {t.model: t.train[-1].step for t in results.trainings} == trained
    model, _ = kl.load(folder / "hybrid")
    assert model(torch.tensor([[1, 2, 3]])).isfinite().all()
    assert f"Missing: {missing}" in (folder / PAGE).read_text(encoding="utf-8")
    if at == 10:
        assert results.decoding_of("hybrid").points
        assert results.recall is None


def test_a_new_run_sets_the_last_one_aside(tmp_path):
    for mark in ("first", "second"):
        set_aside(tmp_path)
        (tmp_path / "hybrid").mkdir()
        (tmp_path / RESULTS).write_text(mark)
    assert (tmp_path / RESULTS).read_text() == "second"
    assert (tmp_path / "previous" / RESULTS).read_text() == "first"
    set_aside(tmp_path)
    assert (tmp_path / "previous" / RESULTS).read_text() == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["previous"]
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex"):
        set_aside(tmp_path)
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        set_aside(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_seconds": 0.0}, "train_seconds: expected a time above 0"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"longest_context": 512}, "longest_context: expected at least 1024"),
        ({"recall_target": 1.5}, "recall_target: expected a share"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        DemoConfig(**values)


def test_the_command_gives_the_configuration_back():
    import tyro

    config = DemoConfig(folder=Path("a b"), steps=7, decode_seconds=2.5, prompt="x = ")
    words = config.command
    assert words == "kimi-linear demo --folder 'a b' --steps 7 --prompt 'x = ' --decode-seconds 2.5"
    import shlex

    assert tyro.cli(DemoConfig, args=shlex.split(words)[2:]) == config
    assert DemoConfig().command == "kimi-linear demo"
    assert DemoConfig().contexts == (1024, 2048, 4096, 8192, 16384, 32768, 65536)


def test_a_signal_ends_the_command_with_its_report(tmp_path):
    folder = tmp_path / "demo"
    flags = ["--folder", str(folder), "--device", "cpu", "--threads", "1", "--steps", "100000", "--batch-size", "1"]
    flags += ["--sequence-length", "32", "--corpus-bytes", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "kimi_linear.cli.main", "demo", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    metrics = folder / "training" / "hybrid" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    results = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
    assert results["trainings"][0]["train"]
    assert str(folder / PAGE) in output
    kl.load(folder / "hybrid")
