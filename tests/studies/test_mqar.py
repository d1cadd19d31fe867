"""The recall study compares like with like, can be killed anywhere, and says what it measured."""

import json

import pytest
import torch

from kimi_linear.evals import TaskAccuracy, load_task
from kimi_linear.folder import load
from kimi_linear.model import KimiLinear
from kimi_linear.studies import mqar
from kimi_linear.studies.mqar import MQARConfig

SMALL = MQARConfig(
    mixer="kda,mla", pairs=2, vocab=8, layers=1, hidden_size=16, head_dim=16, steps=6, eval_every=2, samples=16,
    batch_size=4, device="cpu",
)  # fmt: skip


def small(**changes) -> MQARConfig:
    from dataclasses import replace

    return replace(SMALL, **changes)


def finish(config, folder) -> dict:
    list(mqar.run(config, folder))
    return {name: json.loads((folder / f"{name}-seed0.json").read_text()) for name in config.mixers}


@pytest.mark.parametrize("mixer", ["kda", "gdn", "mamba2", "simple-gla", "mla"])
def test_every_mixer_gets_the_same_shape(mixer):
    config = mqar.model_of(MQARConfig(), mixer)
    assert config.layer_mixers == (mixer, mixer)
    assert config.mla.position == "rope"
    parameters = sum(p.numel() for p in KimiLinear(config).parameters())
    kda = sum(p.numel() for p in KimiLinear(mqar.model_of(MQARConfig(), "kda")).parameters())
    assert 0.75 < parameters / kda < 1.25


def test_a_run_leaves_cells_models_and_a_report(tmp_path):
    cells = finish(SMALL, tmp_path)
    for mixer, cell in cells.items():
        assert [point["step"] for point in cell["curve"]] == [2, 4, 6]
        # The model that was kept is the one whose last accuracy is reported.
        folder = tmp_path / f"{mixer}-seed0"
        model, _ = load(folder)
        assert load_task(folder) == mqar.task_of(SMALL)
        again = TaskAccuracy(task=mqar.task_of(SMALL), samples=16)(model).metrics
        assert again["token_accuracy"] == cell["curve"][-1]["token_accuracy"]
        assert cell["parameters"] == sum(p.numel() for p in model.parameters())
    found = mqar.report(SMALL, tmp_path)
    assert [row["mixer"] for row in found.rows] == ["kda", "mla"]
    assert found.rows[0]["token accuracy"] == pytest.approx(cells["kda"]["curve"][-1]["token_accuracy"], abs=1e-4)
    assert all(path.stat().st_size > 0 for path in found.files)
    assert json.loads((tmp_path / "results.json").read_text())["rows"] == [dict(row) for row in found.rows]
    assert (tmp_path / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "training").exists()


def test_a_run_that_is_left_anywhere_ends_as_one_that_was_not(tmp_path):
    whole = finish(SMALL, tmp_path / "whole")
    # Left after step 3 of the first cell, and again in the second.
    for stop in (3, 8):
        progress = mqar.run(SMALL, tmp_path / "parts")
        for at in progress:
            if at.step == stop:
                break
        progress.close()  # type: ignore[attr-defined]
    parts = finish(SMALL, tmp_path / "parts")
    for mixer in SMALL.mixers:
        assert parts[mixer]["curve"] == whole[mixer]["curve"]


def test_finished_cells_are_not_run_again(tmp_path, monkeypatch):
    finish(small(mixer="kda"), tmp_path)
    monkeypatch.setattr(mqar, "_train", lambda *args: pytest.fail("trained again"))
    assert [p.text for p in mqar.run(small(mixer="kda"), tmp_path)] == ["kda seed 0: finished before"]


def test_a_cell_stops_once_it_recalls_enough(tmp_path):
    cells = finish(small(mixer="kda", until=0.0), tmp_path)
    assert [point["step"] for point in cells["kda"]["curve"]] == [2]


def test_nothing_finished_is_an_empty_table(tmp_path):
    assert mqar.report(SMALL, tmp_path).rows == ()


def test_kda_learns_to_recall(tmp_path):
    config = small(
        mixer="kda", layers=1, hidden_size=32, steps=100, eval_every=25, batch_size=32, samples=128, until=0.95, lr=1e-2
    )
    torch.manual_seed(0)
    cell = finish(config, tmp_path)["kda"]
    # A guess among the values is right once in four.
    assert cell["curve"][-1]["token_accuracy"] >= 0.95


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixer": "kda,lstm"}, "mixer: expected some of kda,gdn,mamba2,simple-gla,mla, got 'lstm'"),
        ({"mixer": "kda,kda"}, "mixer: expected each one once"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        MQARConfig(**change)
