"""Writes a benchmark's result as one Markdown page: what, where, how to repeat it, and the tables.

Run the benchmarks from the repository root as modules, such as ``python -m benchmarks.model.train_speed``. A long one
calls ``write_page`` after every row, so that a run which is cut short leaves what it had.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kimi_linear.studies.report.machine import this_machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Section:
    """One table of a page, with a heading and words above it; either may be empty."""

    title: str = ""
    about: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[object]] = ()


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
    table = Section(columns=columns, rows=rows)
    path = write_page(name, title=title, about=about, sections=[table], device=device, packages=packages, folder=folder)
    print(path.read_text(encoding="utf-8"), f"\nwritten to {path}")
    return path


def write_page(
    name: str,
    *,
    title: str,
    about: str,
    sections: Sequence[Section],
    data: object = None,
    device: str = "cpu",
    packages: Sequence[str] = (),
    folder: Path = RESULTS,
) -> Path:
    """Writes a page of several tables, and the raw numbers beside it; to be called again as they come.

    Args:
        sections: the tables in order; one without rows is left out.
        data: what ``<name>_<hardware>_<date>.json`` holds under "results", beside the machine, versions, date and command;
            no such file where None.
        name, title, about, device, packages, folder: as ``write_report``.

    Returns:
        Path of the page. A reader never sees half a file: each is replaced as a whole.
    """
    for section in sections:
        if any(len(row) != len(section.columns) for row in section.rows):
            raise ValueError(f"rows: expected {len(section.columns)} cells each, got {[len(r) for r in section.rows]}")
    machine, today = this_machine(device), datetime.date.today().isoformat()
    versions = {package: _version(package) for package in packages}
    lines = [f"# {title}", "", about, ""]
    for section in sections:
        if section.rows:
            heading = [f"## {section.title}", ""] if section.title else []
            words = [section.about, ""] if section.about else []
            lines += [*heading, *words, *_table(section.columns, section.rows), ""]
    lines += [
        f"- Hardware: {machine.hardware}, {machine.cores} physical cores, {machine.threads} threads, device {machine.device}",
        f"- System: {machine.system}, Python {machine.python}, torch {machine.torch}, kimi_linear {machine.kimi_linear}"
        + "".join(f", {package} {number}" for package, number in versions.items()),
        f"- Date: {today}",
        f"- Command: `{command()}`",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{slug(machine.hardware)}_{today}.md"
    _replace(path, "\n".join(lines) + "\n")
    if data is not None:
        facts = {"machine": dataclasses.asdict(machine), "versions": versions, "date": today, "command": command()}
        _replace(path.with_suffix(".json"), json.dumps(facts | {"results": data}, indent=1) + "\n")
    return path


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def needs_gpu() -> None:
    """Ends the program, with status 0 and a word about it, where there is no CUDA device: there is nothing to measure."""
    import torch

    if not torch.cuda.is_available():
        print(f"{command()}: needs a CUDA device, torch sees none; nothing measured")
        raise SystemExit(0)


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
