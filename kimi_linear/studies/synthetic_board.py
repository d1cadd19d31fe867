"""Training the cells of the synthetic study: which are begun, when each is over, what is kept, how long the rest may take."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from kimi_linear.studies.cells import write_cell
from kimi_linear.studies.report.machine import this_machine
from kimi_linear.studies.study import Progress
from kimi_linear.studies.synthetic import (
    Cell,
    Results,
    SyntheticConfig,
    area,
    cells_in_all,
    lane_of,
    most,
    pending,
    read_results,
    settings_of,
    sweep_cells,
    takes_best,
    wanted,
    words,
)
from kimi_linear.studies.synthetic_training import Lane, load_lane, run_lanes, save_lane


class Board:
    """The cells of a run: finished, in training, and still to begin."""

    def __init__(self, config: SyntheticConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.results = read_results(config, folder)
        self.checkpoints = config.checkpoints or folder / "training"
        self.lanes: dict[Cell, Lane] = {}
        # Made once and handed on: libraries keep a workspace for every stream that they have ever seen.
        self.places = places_of(config)
        self.began = self.counted = time.monotonic()
        self.trained = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def over(self) -> bool:
        budget = self.config.seconds_budget
        return budget is not None and self.seconds >= budget

    def steps(self) -> int:
        """Steps done; those that a finished or unwanted cell did not need count as done."""
        sweep = [
            c for c in sweep_cells(self.config) if c.length == self.config.curve_length or not takes_best(self.config)
        ]
        unwanted = sum(c not in self.results and wanted(self.config, c, self.results) is False for c in sweep)
        return (len(self.results) + unwanted) * self.config.steps + sum(lane.step for lane in self.lanes.values())

    def waiting(self) -> list[Cell]:
        return [cell for cell in pending(self.config, self.results) if cell not in self.lanes]

    def fill(self) -> None:
        """Begin cells, or go on with them, until all lanes are busy."""
        late = self.config.admit_seconds is not None and self.seconds >= self.config.admit_seconds
        for cell in [] if late or not self.places else self.waiting()[: len(self.places)]:
            if self.over():
                break
            lane = lane_of(self.config, cell)
            saved = load_lane(self._checkpoint(cell), settings_of(lane))
            device, stream = self.places.pop()
            self.lanes[cell] = Lane(lane, device, saved, stream=stream)
            names = self.lanes[cell].curve.hardware
            if (name := this_machine(str(device)).hardware) not in names[-1:]:
                names.append(name)

    def go_on(self) -> Iterator[tuple[Cell, str]]:
        """Train a little; what was measured meanwhile, in words."""
        before = sum(lane.step for lane in self.lanes.values())
        run_lanes(list(self.lanes.values()))
        found = {cell: lane.poll() for cell, lane in self.lanes.items()}
        self.trained += sum(lane.step for lane in self.lanes.values()) - before
        since, self.counted = self.counted, time.monotonic()
        sharing = Counter(lane.device for lane in self.lanes.values())
        for lane in self.lanes.values():
            lane.curve.seconds += (self.counted - since) / sharing[lane.device]
        for cell, points in found.items():
            for point in points:
                yield cell, f"{cell.name} · step {point.step:,} · {100 * point.sequence_accuracy:.1f} %"
            if points and (ended := self._ended(cell, self.lanes[cell])):
                self.lanes[cell].poll(wait=True)  # lets go of the device before the memory does
                self._finish(cell, self.lanes.pop(cell), ended)

    def leave(self) -> None:
        """Write what is finished, and a checkpoint of what is not."""
        for cell, lane in list(self.lanes.items()):
            lane.poll(wait=True)
            if ended := self._ended(cell, lane):
                self._finish(cell, self.lanes.pop(cell), ended)
            else:
                save_lane(lane, settings_of(lane.config), self._checkpoint(cell))

    def _ended(self, cell: Cell, lane: Lane) -> str | None:
        """Why a cell is over, "overtaken" where another learning rate's curve has an area it can't reach; None while it is not."""
        ended = lane.curve.ended(lane.config)
        if ended is None and self.config.sweep != "full":
            rivals = [self.results.get(dataclasses.replace(cell, lr=float(lr))) for lr in words(self.config.lrs)]
            points = lane.curve.points
            curve = {"step": [p.step for p in points], "sequence_accuracy": [p.sequence_accuracy for p in points]}
            reach = most(self.config, curve)
            ended = "overtaken" if any(area(self.config, r) > reach for r in rivals if r is not None) else None
        return ended

    def _finish(self, cell: Cell, lane: Lane, ended: str) -> None:
        points = lane.curve.points
        digits = {"loss": 6, "token_accuracy": 6, "sequence_accuracy": 6}
        curve: dict[str, list[float]] = {"step": [p.step for p in points]}
        for name, kept in digits.items():
            curve[name] = [round(getattr(p, name), kept) for p in points]
        values = {
            "ended": ended,
            "parameters": sum(p.numel() for p in lane.model.parameters()),
            "hardware": ", then ".join(lane.curve.hardware),
            "seconds": round(lane.curve.seconds, 1),
            "curve": curve,
        }
        write_cell(self.folder / f"{cell.name}.json", settings_of(lane.config), values, indent=None)
        self.results[cell] = values
        self.places.append((lane.device, lane.stream))
        self._checkpoint(cell).unlink(missing_ok=True)

    def _checkpoint(self, cell: Cell) -> Path:
        return self.checkpoints / f"{cell.name}.pt"


def train(config: SyntheticConfig, folder: Path) -> Iterator[Progress]:
    """Train the cells that are not finished, many at once."""
    board = Board(config, folder)
    total = cells_in_all(config) * config.steps
    yield Progress(step=board.steps(), total=total, text=estimate(config, board.results))
    try:
        while not board.over():
            board.fill()
            if not board.lanes:
                break
            for _, text in board.go_on():
                left, rate = len(board.waiting()), board.trained / max(1e-9, board.seconds)
                note = f"{text} · {rate:,.0f} steps/s · {len(board.lanes)} at once, {left} to begin"
                yield Progress(step=board.steps(), total=total, text=note)
    finally:
        board.leave()
    yield Progress(step=board.steps(), total=total, text=estimate(config, board.results))


def estimate(config: SyntheticConfig, results: Results) -> str:
    """What is left, in cells and seconds at most, judged by the cells that are finished."""
    left = pending(config, results)
    words = f"{len(results)} cells finished, {len(left)} to train"
    spent = sum(r["seconds"] for r in results.values())
    read = sum(r["curve"]["step"][-1] * cell.length for cell, r in results.items())
    if not left or not read or not spent:
        return words
    seconds = spent / read * sum(cell.length * config.steps for cell in left) / len(devices_of(config))
    return f"{words}, {seconds:,.0f} s at most at the speed of the finished ones"


Place = tuple[torch.device, torch.cuda.Stream | None]
"""Where a cell is trained; on a CPU without a stream."""


def devices_of(config: SyntheticConfig) -> list[torch.device]:
    """Where cells are trained: every GPU that torch sees, or the CPU, unless one is named."""
    if config.device != "auto":
        return [torch.device(config.device)]
    return [torch.device("cuda", n) for n in range(torch.cuda.device_count())] or [torch.device("cpu")]


def places_of(config: SyntheticConfig) -> list[Place]:
    """As many as cells are trained at once: ``lanes`` on every GPU, one on a CPU."""
    devices = devices_of(config)
    if devices[0].type != "cuda":
        return [(device, None) for device in devices]
    return [(device, torch.cuda.Stream(device)) for _ in range(config.lanes) for device in devices]
