"""Writes a benchmark's result as one Markdown page: what, where, how to repeat it, and the table.

Run the benchmarks from the repository root as modules, such as ``python -m benchmarks.model.train_speed``.
"""

from __future__ import annotations

import datetime
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kimi_linear.studies.report.machine import this_machine

RESULTS = Path(__file__).parent / "results"


def write_report(
    name: str,
    *,
    title: str,
    about: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    device: str = "cpu",
    packages: Sequence[str] = (),
    folder: Path = RESULTS,
) -> Path:
    """Writes ``<name>_<hardware>_<date>.md`` and prints it. A second run on the same day replaces the first.

    Args:
        name: what was measured, the first part of the file's name.
        title: heading of the page.
        about: what was measured and how, in a sentence or two.
        columns: heads of the table.
        rows: its cells; a float is shown with four significant digits.
        device: the device that computed.
        packages: distributions whose versions matter besides torch, such as "transformers".
        folder: where the page goes.

    Returns:
        Path of the page.
    """
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"rows: expected {len(columns)} cells each, got {[len(row) for row in rows]}")
    machine = this_machine(device)
    today = datetime.date.today().isoformat()
    lines = [
        f"# {title}",
        "",
        about,
        "",
        *_table(columns, rows),
        "",
        f"- Hardware: {machine.hardware}, {machine.cores} physical cores, {machine.threads} threads, device {machine.device}",
        f"- System: {machine.system}, Python {machine.python}, torch {machine.torch}, kimi_linear {machine.kimi_linear}"
        + "".join(f", {package} {_version(package)}" for package in packages),
        f"- Date: {today}",
        f"- Command: `{command()}`",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{slug(machine.hardware)}_{today}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), f"\nwritten to {path}")
    return path


def command() -> str:
    """The command line that runs this benchmark again from the repository root."""
    root = Path(__file__).parent.parent
    script = Path(sys.argv[0]).resolve()
    inside = script.relative_to(root) if script.is_relative_to(root) else None
    module = f"-m {'.'.join(inside.with_suffix('').parts)}" if inside else sys.argv[0]
    return " ".join(["python", module, *sys.argv[1:]])


def slug(text: str) -> str:
    """Text as part of a file name: lower case, words joined by hyphens, trade marks left out."""
    text = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", "", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    texts = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *texts]) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in [columns, *texts]
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return lines


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
