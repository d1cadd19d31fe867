"""Measured numbers can be traced: pages that the prose names exist, and say on what, when and how they were measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "benchmarks/results").glob("*.md"))
HISTORY = ("docs/LOG.md", "CHANGELOG.md")
"""What was true on a day: scripts that they name may have gone since."""
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
RESULT = re.compile(r"benchmarks/results/([\w.-]+\.(?:md|json))")
MODULE = re.compile(r"-m (benchmarks(?:\.\w+)+)")
NAME = re.compile(r"[a-z0-9_]\w*(?:-\w+)*_[a-z0-9-]+_(\d{4}-\d\d-\d\d)")


def missing_results(text: str, root: Path) -> list[str]:
    """Pages of benchmarks/results that a text names and that are not there."""
    return [name for name in RESULT.findall(text) if not (root / "benchmarks/results" / name).is_file()]


def missing_scripts(text: str, root: Path) -> list[str]:
    """Benchmarks that a text says to run and that are not there."""
    return [name for name in MODULE.findall(text) if not (root / (name.replace(".", "/") + ".py")).is_file()]


def untraceable(name: str, text: str) -> list[str]:
    """What a page of results does not say."""
    named = NAME.fullmatch(name)
    if named is None:
        return [f"{name}: expected <what>_<hardware>_<YYYY-MM-DD>"]
    wanted = {"hardware": r"^- Hardware: \S", "date": rf"^- Date: {named[1]}$", "command": r"^- Command: `python -m \S"}
    found = [what for what, line in wanted.items() if not re.search(line, text, re.MULTILINE)]
    return [f"{name}: no {what}" for what in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_the_results_and_scripts_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert missing_results(text, ROOT) == []
    assert page.relative_to(ROOT).as_posix() in HISTORY or missing_scripts(text, ROOT) == []


@pytest.mark.parametrize("page", RESULTS, ids=lambda p: p.stem)
def test_a_page_of_results_says_on_what_when_and_how(page: Path) -> None:
    assert untraceable(page.stem, page.read_text(encoding="utf-8")) == []


def test_the_checks_can_fail(tmp_path: Path) -> None:
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/here.md").touch()
    (tmp_path / "benchmarks/run.py").touch()
    text = "[a](../benchmarks/results/here.md) and `benchmarks/results/gone.json`; `python -m benchmarks.run --x`\n"
    text += "`python -m benchmarks.ops.gone`"
    assert missing_results(text, tmp_path) == ["gone.json"]
    assert missing_scripts(text, tmp_path) == ["benchmarks.ops.gone"]
    good = "- Hardware: NVIDIA H200, 16 cores\n- Date: 2026-11-23\n- Command: `python -m benchmarks.ops.kda`\n"
    assert untraceable("kda_ops_nvidia-h200_2026-11-23", good) == []
    assert untraceable("kda_ops_nvidia-h200_2026-11-24", good) == ["kda_ops_nvidia-h200_2026-11-24: no date"]
    assert untraceable("kda_2026-11-23", "") == ["kda_2026-11-23: expected <what>_<hardware>_<YYYY-MM-DD>"]
    assert len(untraceable("kda_x_2026-11-23", "")) == 3
