"""Figure 4 of the paper drawn again: our curves, the paper's points as hollow markers, and a table under both.

The paper's numbers were read off its figure (arXiv 2510.26692, Figure 4); they are per cent.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kimi_linear.studies.cells import write_json
from kimi_linear.studies.study import Report
from kimi_linear.studies.synthetic import (
    TASKS,
    Cell,
    Results,
    SyntheticConfig,
    best_of,
    read_results,
    seed_cells,
    sweep_cells,
)

PAPER_LENGTHS = (256, 512, 1024, 2048)
PAPER_PEAKS: dict[str, dict[str, tuple[float, ...]]] = {
    "palindrome": {"kda": (100, 100, 100, 42.2), "gdn": (100, 100, 97.0, 37.1), "mamba2": (100, 0, 0, 0)},
    "mqar": {"kda": (100, 100, 100, 47.6), "gdn": (100, 100, 78.7, 29.1), "mamba2": (97.6, 0, 0, 0)},
    "stack": {"kda": (100, 100, 100, 100), "gdn": (100, 100, 100, 100), "mamba2": (100, 100, 0, 0)},
}
"""Best accuracy by length."""
PAPER_STEPS = tuple(range(2000, 20001, 2000))
PAPER_CURVES: dict[str, dict[str, tuple[float, ...]]] = {
    "palindrome": {
        "kda": (18.2, 94.2, 98.9, 98.8, 99.6, 100, 100, 100, 100, 100),
        "gdn": (0, 0, 0, 30.0, 61.9, 76.9, 82.8, 98.7, 99.4, 97.0),
        "mamba2": (0,) * 10,
    },
    "mqar": {
        "kda": (93.4, 97.6, 99.1, 99.7, 100, 100, 100, 100, 100, 100),
        "gdn": (0, 0, 0, 0, 0, 3.5, 12.9, 22.6, 41.7, 78.7),
        "mamba2": (0,) * 10,
    },
    "stack": {
        "kda": (58.9, 98.2, 99.4, 99.4, 99.6, 100, 100, 100, 100, 100),
        "gdn": (0, 63.3, 94.4, 99.2, 100, 100, 100, 100, 100, 100),
        "mamba2": (0,) * 10,
    },
}
"""Accuracy at 1,024 tokens after each of ``PAPER_STEPS``."""
COLORS = {"kda": "#d1495b", "gdn": "#2e6f95", "mamba2": "#6a994e", "simple-gla": "#d9a441", "mla": "#8d8d8d"}
MARKERS = {"kda": "o", "gdn": "s", "mamba2": "^", "simple-gla": "v", "mla": "D"}
NAMES = {"kda": "KDA", "gdn": "GDN", "mamba2": "Mamba-2", "simple-gla": "simple GLA", "mla": "attention with RoPE"}
TITLES = {"palindrome": "Palindrome", "mqar": "MQAR", "stack": "Stack"}
ON_SCREEN = ("task", "tokens", "mixer", "accuracy %", "paper %", "each seed %", "answers %")
"""Columns of the table in a terminal."""
NEARLY = 0.99
"""Share of sequences all right whose first point is reported as "steps to 99 %"."""


def write_report(config: SyntheticConfig, folder: Path) -> Report:
    """The finished cells of a folder as a table, ``figure4.json``, ``figure4.md`` and ``figure4.png``."""
    results = read_results(config, folder)
    rows = tuple(table_rows(config, results))
    title = f"Best accuracy by sequence over learning rates, at most {config.steps:,} steps of {config.batch_size} sequences"
    if not rows:
        return Report(title=title, rows=(), files=())
    summary, page, figure = (folder / f"figure4.{kind}" for kind in ("json", "md", "png"))
    hardware = sorted({str(result["hardware"]) for result in results.values()})
    write_json(summary, {"study": "synthetic", "hardware": hardware, "cells": len(results), "rows": rows})
    page.write_text(_markdown(title, rows), encoding="utf-8")
    draw(config, results, figure)
    return Report(title=title, rows=rows, files=(summary, page, figure), columns=ON_SCREEN)


def table_rows(config: SyntheticConfig, results: Results) -> list[dict[str, Any]]:
    """One row per task, length and mixer of which a cell is finished."""
    rows = []
    for task, length, mixer in dict.fromkeys((c.task, c.length, c.mixer) for c in sweep_cells(config)):
        sweep = [c for c in sweep_cells(config) if (c.task, c.length, c.mixer) == (task, length, mixer)]
        alike = best_and_seeds(config, results, task, length, mixer)
        if not alike:
            continue
        done = [cell for cell in sweep if cell in results]
        rows.append(
            {
                "task": task,
                "tokens": length,
                "mixer": mixer,
                "accuracy %": per_cent(max(peak(results[cell]) for cell in done)),
                "paper %": paper_peak(task, mixer, length),
                "lr": f"{alike[0].lr:g}",
                "lrs": f"{len(done)} of {len(sweep)}",
                "steps to 99 %": spread([steps_to(results[cell], NEARLY) for cell in alike]),
                "seeds": len(alike),
                "each seed %": ", ".join(str(per_cent(peak(results[cell]))) for cell in alike),
                "answers %": per_cent(max(peak(results[cell], "token_accuracy") for cell in done)),
            }
        )
    return rows


def seeds_of(config: SyntheticConfig, results: Results, best: Cell) -> list[Cell]:
    """The finished further seeds of a cell."""
    same = (best.task, best.length, best.mixer, best.lr)
    found = [c for c in seed_cells(config, results, so_far=True) if (c.task, c.length, c.mixer, c.lr) == same]
    return [cell for cell in found if cell in results]


def best_and_seeds(config: SyntheticConfig, results: Results, task: str, length: int, mixer: str) -> list[Cell]:
    """The best finished cell of a sweep and its further seeds; empty where none is finished."""
    wanted = (task, length, mixer)
    best = best_of(config, [c for c in sweep_cells(config) if (c.task, c.length, c.mixer) == wanted], results)
    return [] if best is None else [best, *seeds_of(config, results, best)]


def per_cent(share: float) -> float:
    """In the paper's digits."""
    return round(100 * share, 1)


def peak(result: Mapping[str, Any], measure: str = "sequence_accuracy") -> float:
    """Best accuracy of any point, by sequence or, as "token_accuracy", by answer."""
    return max(result["curve"][measure])


def paper_peak(task: str, mixer: str, length: int) -> float | None:
    """What the paper's figure shows, per cent; None where it shows nothing."""
    if mixer not in PAPER_PEAKS[task] or length not in PAPER_LENGTHS:
        return None
    return PAPER_PEAKS[task][mixer][PAPER_LENGTHS.index(length)]


def steps_to(result: Mapping[str, Any], share: float) -> int | None:
    """Step of the first point with at least this accuracy by sequence; None where there is none."""
    curve = result["curve"]
    pairs = zip(curve["step"], curve["sequence_accuracy"], strict=True)
    return next((step for step, accuracy in pairs if accuracy >= share), None)


def spread(steps: list[int | None]) -> str:
    """Median and range of the trainings; those that never got there are counted, not dropped."""
    reached = sorted(step for step in steps if step is not None)
    if not reached:
        return "never"
    text = f"{statistics.median_low(reached):,}"
    if len(reached) > 1:
        text += f" ({reached[0]:,} to {reached[-1]:,})"
    return text if len(reached) == len(steps) else f"{text}, never in {len(steps) - len(reached)} of {len(steps)}"


def least_to_most(shares: list[float]) -> str:
    """Per cent of the seed that has least and of the one that has most."""
    ends = [per_cent(share) for share in (min(shares), max(shares))] if shares else []
    return "–".join(f"{end:g}" for end in dict.fromkeys(ends)) or "-"


def draw(config: SyntheticConfig, results: Results, path: Path) -> None:
    """Accuracy by length above, accuracy by step below, a table at the bottom; a column for each task."""
    from matplotlib.figure import Figure  # without pyplot there is no global state and no window
    from matplotlib.lines import Line2D

    tasks = [task for task in TASKS if any(cell.task == task for cell in results)]
    mixers = [mixer for mixer in reversed(COLORS) if any(cell.mixer == mixer for cell in results)]  # KDA on top
    figure = Figure(figsize=(4.3 * max(2, len(tasks)), 8.6 + 0.22 * len(mixers)), layout="constrained")
    grid = figure.add_gridspec(3, len(tasks), height_ratios=(1, 1, 0.12 + 0.1 * len(mixers)))
    for column, task in enumerate(tasks):
        above, below, under = (figure.add_subplot(grid[row, column]) for row in range(3))
        for mixer in mixers:
            _draw_lengths(above, config, results, task, mixer)
            _draw_steps(below, config, results, task, mixer)
        above.set(title=TITLES[task], xlabel="tokens", xscale="log", ylim=(-4, 104))
        lengths = sorted({cell.length for cell in results} | set(PAPER_LENGTHS))
        above.set_xticks(lengths, [str(length) for length in lengths], minor=False)
        above.minorticks_off()
        below.set(xlabel=f"steps, at {config.curve_length:,} tokens", xlim=(0, config.steps * 1.02), ylim=(-4, 104))
        below.xaxis.set_major_formatter("{x:,.0f}")
        for axis in (above, below):
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axis.set_ylabel("sequences all right, %")
        _draw_table(under, config, results, task, mixers[::-1])
    handles = [
        Line2D([], [], color=COLORS[mixer], marker=MARKERS[mixer], markersize=5, label=NAMES[mixer])
        for mixer in reversed(mixers)
    ]
    handles.append(
        Line2D([], [], color="0.3", marker="o", fillstyle="none", linestyle="none", label="hollow: the paper's points")
    )
    if any(cell.seed for cell in results):
        handles.append(Line2D([], [], color="0.3", linewidth=1, label="thin: further seeds"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=150)


def _draw_lengths(axis: Any, config: SyntheticConfig, results: Results, task: str, mixer: str) -> None:
    cells = [cell for cell in sweep_cells(config) if (cell.task, cell.mixer) == (task, mixer) and cell in results]
    lengths = sorted({cell.length for cell in cells})
    best = [100 * max(peak(results[cell]) for cell in cells if cell.length == length) for length in lengths]
    axis.plot(lengths, best, color=COLORS[mixer], marker=MARKERS[mixer], markersize=4.5, linewidth=1.6)
    for length in lengths:
        seeds = [100 * peak(results[c]) for c in best_and_seeds(config, results, task, length, mixer)]
        axis.vlines(length, min(seeds), max(seeds), color=COLORS[mixer], linewidth=1)
    if mixer in PAPER_PEAKS[task]:
        axis.plot(PAPER_LENGTHS, PAPER_PEAKS[task][mixer], **_hollow(mixer))


def _draw_steps(axis: Any, config: SyntheticConfig, results: Results, task: str, mixer: str) -> None:
    for nth, cell in enumerate(best_and_seeds(config, results, task, config.curve_length, mixer)):
        curve = results[cell]["curve"]
        steps, shares = [0, *curve["step"]], [0.0, *(100 * x for x in curve["sequence_accuracy"])]
        axis.plot(steps, shares, color=COLORS[mixer], linewidth=0.9 if nth else 1.6, alpha=0.9)
        if results[cell]["ended"] == "solved":  # it was stopped here, at 100 %
            axis.plot(steps[-1], shares[-1], color=COLORS[mixer], marker="|", markersize=9)
    if mixer in PAPER_CURVES[task] and config.curve_length == 1024:
        axis.plot(PAPER_STEPS, PAPER_CURVES[task][mixer], **_hollow(mixer))


def _hollow(mixer: str) -> dict[str, Any]:
    return {
        "color": COLORS[mixer],
        "marker": MARKERS[mixer],
        "fillstyle": "none",
        "markersize": 7,
        "linestyle": "none",
        "alpha": 0.8,
        "clip_on": False,
    }


def _draw_table(axis: Any, config: SyntheticConfig, results: Results, task: str, mixers: list[str]) -> None:
    """Ours, from the least of the seeds to the largest, and in brackets the paper's."""
    axis.axis("off")
    lengths = sorted({cell.length for cell in results if cell.task == task})
    cells = []
    for mixer in mixers:
        line = [NAMES[mixer].split(" with")[0]]
        for length in lengths:
            cells_there = best_and_seeds(config, results, task, length, mixer)
            paper = paper_peak(task, mixer, length)
            text = least_to_most([peak(results[cell]) for cell in cells_there])
            line.append(text if paper is None else f"{text} ({paper:g})")
        cells.append(line)
    heads = ["ours (paper)", *(f"{length:,}" for length in lengths)]
    letters = [max(len(line[column]) for line in [heads, *cells]) + 1 for column in range(len(heads))]
    table = axis.table(
        cellText=cells,
        colLabels=heads,
        colWidths=[n / sum(letters) for n in letters],
        loc="center",
        cellLoc="center",
        edges="horizontal",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    table.scale(1, 1.25)


def _markdown(title: str, rows: tuple[Mapping[str, Any], ...]) -> str:
    """The table as a page."""
    heads = list(rows[0])
    lines = [f"# {title}", "", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join("" if row[h] is None else str(row[h]) for h in heads) + " |" for row in rows]
    return "\n".join(lines) + "\n"
