"""Which cells of the synthetic study are worth running, what is kept of them, and what the figure says about them."""

from __future__ import annotations

import io
import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from kimi_linear.cli.console import table
from kimi_linear.studies import synthetic, synthetic_board, synthetic_figure
from kimi_linear.studies.cells import write_cell
from kimi_linear.studies.study import Report
from kimi_linear.studies.synthetic import Cell, SyntheticConfig, pending

FULL = SyntheticConfig()
TINY = SyntheticConfig(
    tasks="mqar", mixers="kda", lengths="16,32", curve_length=32, lrs="1e-2,1e-3", seeds=2, steps=24, point_every=5,
    batch_size=2, width=16, heads=1, head_dim=16, feed_forward=16, mqar_symbols=32, precision="fp32", device="cpu",
)  # fmt: skip


def result(*shares: float, ended: str = "steps", every: int = 5000) -> dict:
    steps = [every * (i + 1) for i in range(len(shares))]
    curve = {"step": steps, "loss": list(shares), "token_accuracy": list(shares), "sequence_accuracy": list(shares)}
    return {"ended": ended, "parameters": 1, "hardware": "none", "seconds": 10.0, "curve": curve}


def test_the_most_telling_cells_come_first() -> None:
    cells = pending(FULL, {})
    assert len(cells) == 3 * 5 * 2  # tasks, mixers, and the first two learning rates
    assert len(pending(replace(FULL, sweep="full"), {})) == 3 * 4 * 5 * 4
    first = cells[:8]
    assert {(c.length, c.seed) for c in first} == {(1024, 0)}
    assert {c.mixer for c in first} == {"kda", "gdn"}
    assert {c.task for c in first} == {"palindrome", "mqar"}
    assert [c.lr for c in first] == [5e-4] * 4 + [1e-4] * 4
    assert {c.mixer for c in cells[-6:]} == {"mla"}


def test_other_lengths_take_the_learning_rate_that_was_best_where_curves_are_compared() -> None:
    at = Cell(task="mqar", length=1024, mixer="kda", lr=1e-4, seed=0)
    done = {at: result(0.0, 0.5, 0.9), replace(at, lr=5e-4): result(0.0, 1.0, ended="solved")}
    assert {c.length for c in pending(FULL, done)} == {1024}
    done[replace(at, lr=1e-3)] = result(0.0, 0.5, ended="overtaken")
    others = [c for c in pending(FULL, done) if c.length != 1024]
    assert sorted((c.length, c.lr) for c in others) == [(256, 5e-4), (512, 5e-4), (2048, 5e-4)]
    assert {(c.task, c.mixer) for c in others} == {("mqar", "kda")}


@pytest.mark.parametrize(
    ("large", "small", "next_rates"),
    [((0.0, 1.0), (0.0, 0.9), [1e-3]), ((0.0, 0.9), (0.0, 1.0), [5e-5]), ((0.0, 0.0), (0.0, 0.0), [1e-3])],
)
@pytest.mark.parametrize("length", [256, 1024])
def test_a_sweep_goes_on_to_the_neighbours_of_the_best_learning_rate(
    large, small, next_rates: list[float], length: int
) -> None:
    config = replace(FULL, lengths=f"{length}", tasks="mqar", mixers="kda", seeds=1)
    at = Cell(task="mqar", length=length, mixer="kda", lr=5e-4, seed=0)
    assert [c.lr for c in pending(config, {})] == [5e-4, 1e-4]
    assert [c.lr for c in pending(config, {at: result(*large)})] == [1e-4]
    done = {at: result(*large), replace(at, lr=1e-4): result(*small)}
    assert [c.lr for c in pending(config, done)] == next_rates
    assert len(pending(replace(config, sweep="full"), done)) == 2
    assert pending(config, {**done, replace(at, lr=next_rates[0]): result(1.0, 1.0)}) == []  # the last one on its side


def test_every_gpu_trains_as_many_cells_as_there_are_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream on {device}")
    gpus = [torch.device("cuda", n) for n in range(2)]
    config = replace(FULL, lanes=2)
    assert synthetic_board.devices_of(config) == gpus
    taken = synthetic_board.places_of(config)[::-1]
    assert {device for device, _ in taken[:2]} == set(gpus)  # the first two cells do not share a GPU
    assert all(stream == f"stream on {device}" for device, stream in taken)
    assert synthetic_board.places_of(replace(config, device="cuda:1")) == [(gpus[1], "stream on cuda:1")] * 2
    assert synthetic_board.places_of(replace(config, device="cpu")) == [(torch.device("cpu"), None)]
    done = {Cell(task="mqar", length=1024, mixer="kda", lr=5e-4, seed=0): result(0.5, 1.0)}
    halved, whole = (synthetic_board.estimate(replace(config, device=d), done) for d in ("auto", "cuda:0"))
    seconds = [int(re.findall(r"([\d,]+) s at most", text)[0].replace(",", "")) for text in (halved, whole)]
    assert seconds[1] == pytest.approx(2 * seconds[0], rel=1e-3)


@pytest.mark.parametrize(("others", "devices"), [(torch.device("cpu"), 1), (torch.device("cpu", 1), 2)])
def test_seconds_of_a_cell_are_its_share_of_its_device(
    others: torch.device, devices: int, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(synthetic_board, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    board = synthetic_board.Board(replace(TINY, lengths="32"), tmp_path)
    board.places *= 2
    board.fill()
    assert len(board.lanes) == 2
    assert board.places == []
    first, second = board.lanes.values()
    second.device = others
    list(board.go_on())
    passed = board.counted - board.began
    assert passed > 0
    assert [first.curve.seconds, second.curve.seconds] == [passed * devices / 2] * 2


def test_a_cell_that_goes_on_elsewhere_names_all_it_was_trained_on(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, lengths="32", lrs="1e-2", seeds=1)
    for hardware in ("a GPU", "a GPU", "a CPU"):
        monkeypatch.setattr(synthetic_board, "this_machine", lambda _, name=hardware: SimpleNamespace(hardware=name))
        board = synthetic_board.Board(config, tmp_path)
        board.fill()
        board.leave()
    (checkpoint,) = board.checkpoints.iterdir()
    for _ in synthetic.run(config, tmp_path):
        pass
    (found,) = synthetic.read_results(config, tmp_path).values()
    assert found["hardware"] == "a GPU, then a CPU"
    assert not checkpoint.exists()


def test_seeds_repeat_the_learning_rate_that_was_soonest_right() -> None:
    base = Cell(task="mqar", length=1024, mixer="gdn", lr=5e-4, seed=0)
    # 5e-4 never gets there, 1e-4 is solved at 10,000 and counts as right to the end, 5e-5 at 15,000.
    done = {
        base: result(0.1, 0.5, 0.8, 0.9),
        replace(base, lr=1e-4): result(0.0, 1.0, ended="solved"),
    }
    assert synthetic.seed_cells(FULL, done) == []  # smaller was better, so a smaller one is still to come
    assert {c.lr for c in synthetic.seed_cells(FULL, done, so_far=True)} == {1e-4}
    done[replace(base, lr=5e-5)] = result(0.0, 0.9, 1.0, ended="solved")
    assert sorted(c.seed for c in synthetic.seed_cells(FULL, done)) == [1, 2]
    assert {c.lr for c in synthetic.seed_cells(FULL, done)} == {1e-4}
    assert synthetic.area(FULL, done[replace(base, lr=1e-4)]) == pytest.approx(0.75)
    assert synthetic.area(FULL, done[base]) == pytest.approx(0.575)
    assert synthetic.most(FULL, result(0.1, 0.5)["curve"]) == pytest.approx(0.65)
    assert synthetic.most(FULL, result()["curve"]) == 1


@pytest.mark.parametrize(
    ("rival", "steps"), [((1.0, 1.0), [4, 8]), ((0.0, 1.0), [4, 8, 12, 16, 20]), ((0.0, 0.0), [4, 8, 12, 16, 20, 24])]
)
def test_a_cell_ends_where_another_learning_rate_has_won_whatever_comes(rival, steps: list[int], tmp_path) -> None:
    config = replace(
        TINY, lengths="32", point_every=4
    )  # ten steps are enqueued together, so points come by twos and threes
    one, other = sorted(synthetic.sweep_cells(config), key=lambda cell: cell.lr)
    settings = synthetic.settings_of(synthetic.lane_of(config, other))
    write_cell(tmp_path / f"{other.name}.json", settings, result(*rival, every=12), indent=None)
    list(synthetic.run(config, tmp_path))
    found = synthetic.read_results(config, tmp_path)
    assert found[one]["curve"]["step"] == steps
    assert found[one]["ended"] == ("steps" if len(steps) == 6 else "overtaken")
    assert found[replace(other, seed=1)]["ended"] == "steps"  # a seed has no rival


def test_the_table_and_the_figure_say_what_the_cells_say(tmp_path) -> None:
    base = Cell(task="mqar", length=1024, mixer="gdn", lr=1e-3, seed=0)
    done = {replace(base, lr=lr): result(0.0, 0.2, 0.4, 0.7) for lr in (5e-4, 1e-4, 5e-5)}
    done[base] = result(0.2, 0.5, 0.992, 0.973)
    done[base]["curve"]["token_accuracy"] = [0.9, 0.99, 0.999, 0.998]
    done[replace(base, seed=1)] = result(0.1, 0.995, 1.0, ended="solved")
    done[replace(base, seed=2)] = result(0.0, 0.0, 0.5, 0.9)
    for cell, values in done.items():
        settings = synthetic.settings_of(synthetic.lane_of(FULL, cell))
        write_cell(tmp_path / f"{cell.name}.json", settings, values, indent=None)
    found = synthetic.report(FULL, tmp_path)
    (row,) = found.rows
    assert row["accuracy %"] == 99.2
    assert row["paper %"] == 78.7
    assert (row["lr"], row["lrs"], row["seeds"]) == ("0.001", "4 of 4", 3)
    assert row["each seed %"] == "99.2, 100.0, 90.0"
    assert row["answers %"] == 99.9
    assert row["steps to 99 %"] == "10,000 (10,000 to 15,000), never in 1 of 3"
    assert json.loads((tmp_path / "figure4.json").read_text())["rows"] == [dict(row)]
    assert "| mqar | 1024 | gdn | 99.2 | 78.7 |" in (tmp_path / "figure4.md").read_text()
    assert (tmp_path / "figure4.png").read_bytes().startswith(b"\x89PNG")
    results = synthetic.read_results(FULL, tmp_path)
    there = synthetic_figure.best_and_seeds(FULL, results, "mqar", 1024, "gdn")
    assert [cell.seed for cell in there] == [0, 1, 2]
    assert synthetic_figure.least_to_most([synthetic_figure.peak(results[cell]) for cell in there]) == "90–100"
    assert synthetic_figure.best_and_seeds(FULL, results, "mqar", 1024, "kda") == []
    # With a part of the sweep only, seeds of the best of that part count.
    (tmp_path / f"{replace(base, lr=5e-4).name}.json").unlink()
    assert synthetic.report(FULL, tmp_path).rows[0]["seeds"] == 3
    with pytest.raises(ValueError, match=r"batch_size: expected 8, as asked for now, got a cell made with 32"):
        synthetic.report(replace(FULL, batch_size=8), tmp_path)


def test_a_terminal_of_80_characters_breaks_no_word_of_the_table() -> None:
    values = ("palindrome", 1024, "simple-gla", 99.7, 97.0, "99.7, 100.0, 99.8", 99.9)
    row = dict(zip(synthetic_figure.ON_SCREEN, values, strict=True))
    found = Report(title="", rows=({**row, "lr": "0.0005"},), files=(), columns=synthetic_figure.ON_SCREEN)
    screen = Console(width=80, file=io.StringIO())
    screen.print(table(found.shown()))
    words = screen.file.getvalue().split()
    assert {"palindrome", "1,024", "simple-gla", "99.7", "97", "99.7,", "100.0,", "99.8", "99.9"} <= {*words}
    assert {"accuracy", "paper", "answers", "0.0005"} & {*words} == {"accuracy", "paper", "answers"}


@pytest.mark.parametrize(
    ("shares", "text"), [([0.9971, 0.0031], "0.3–99.7"), ([0.99941, 0.99938], "99.9"), ([1.0], "100"), ([], "-")]
)
def test_a_range_of_seeds_is_one_number_where_they_agree(shares, text) -> None:
    assert synthetic_figure.least_to_most(shares) == text


def test_the_papers_points_are_whole() -> None:
    for peaks, curves in zip(
        synthetic_figure.PAPER_PEAKS.values(), synthetic_figure.PAPER_CURVES.values(), strict=True
    ):
        assert {len(x) for x in peaks.values()} == {len(synthetic_figure.PAPER_LENGTHS)}
        assert {len(x) for x in curves.values()} == {len(synthetic_figure.PAPER_STEPS)}
    # The figure's upper panel shows GDN's last point of the lower one.
    assert synthetic_figure.PAPER_CURVES["palindrome"]["gdn"][-1] == synthetic_figure.paper_peak(
        "palindrome", "gdn", 1024
    )


def test_a_run_in_pieces_ends_as_a_whole_one(tmp_path) -> None:
    """Left after the first point, again with no budget at all, and then to the end."""
    list(synthetic.run(TINY, tmp_path / "whole"))
    progress = synthetic.run(TINY, tmp_path / "parts")
    next(progress)
    next(progress)
    progress.close()  # type: ignore[attr-defined]
    assert len(list((tmp_path / "parts/training").glob("*.pt"))) == 1
    *_, last = synthetic.run(replace(TINY, seconds_budget=0), tmp_path / "parts")
    assert last.text == "0 cells finished, 2 to train"
    list(synthetic.run(TINY, tmp_path / "parts"))
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.json"))
    assert len(names) == 4  # two learning rates where the curves are, one at the other length, and one more seed
    for name in names:
        whole, parts = (json.loads((tmp_path / kind / name).read_text()) for kind in ("whole", "parts"))
        assert whole["curve"] == parts["curve"]
        assert whole["ended"] == parts["ended"] == "steps"
    assert list((tmp_path / "parts/training").glob("*.pt")) == []
    assert pending(TINY, synthetic.read_results(TINY, tmp_path / "parts")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": "mqar,chess"}, "tasks: expected some of palindrome,mqar,stack, got 'chess'"),
        ({"lrs": "1e-3,0.001"}, "lrs: expected each one once"),
        ({"patience": 0}, "patience: expected at least 1, got 0"),
        ({"decay_rate": 0.0}, "decay_rate: expected more than 0, got 0.0"),
        ({"gate_rate": -1.0}, "gate_rate: expected more than 0, got -1.0"),
        ({"conv_size": 1}, "conv_size: expected 0 (none) or 2 to 16 taps, got 1"),
        ({"seconds_budget": -1.0}, "seconds_budget: expected at least 0 seconds"),
    ],
)
def test_bad_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        SyntheticConfig(**change)
