"""``kimi-linear demo``: the whole way in a few minutes, without a download; ends with a page to look at."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console

from kimi_linear.cli.console import closing, parse, stderr, stdout, table, track
from kimi_linear.studies.demo import DemoConfig, run_demo

Item = TypeVar("Item")


def main(argv: Sequence[str]) -> None:
    """Parse, call, print."""
    config = parse(DemoConfig, "demo", argv, __doc__ or "")
    since = time.monotonic()
    screen = TerminalScreen(stdout(), stderr())
    try:
        run_demo(config, screen)
    finally:
        closing(screen.remarks, {}, since)


class TerminalScreen:
    """Shows the demo on a terminal: results to stdout, progress to stderr."""

    def __init__(self, results: Console, remarks: Console) -> None:
        self.results, self.remarks = results, remarks

    def say(self, text: str) -> None:
        """One line."""
        self.results.print(text, markup=False)

    def write(self, piece: str) -> None:
        """A piece of a text that is being written."""
        sys.stdout.write(piece)
        sys.stdout.flush()

    def track(
        self, items: Iterable[Item], total: int, *, step: Callable[[Item], int], describe: Callable[[Item], str]
    ) -> Iterator[Item]:
        """Pass ``items`` on while showing progress."""
        return track(items, total, self.remarks, step=step, describe=describe)

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that share their columns."""
        if rows:
            self.results.print(table(rows))
