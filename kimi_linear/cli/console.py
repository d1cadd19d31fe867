"""How the verbs speak: flags, progress, tables and the closing line. Results go to stdout, remarks to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

Args = TypeVar("Args")
Item = TypeVar("Item")

PLAIN_INTERVAL = 5.0
"""Seconds between progress lines where there is no terminal to draw a bar on."""


def parse(kind: type[Args], verb: str, argv: Sequence[str], description: str) -> Args:
    """Flags from the dataclass ``kind``; its fields' docstrings are the help. Exits on --help and on unknown flags."""
    import tyro

    config = (tyro.conf.OmitArgPrefixes, tyro.conf.UseAppendAction, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(kind, prog=f"kimi-linear {verb}", description=description, args=argv, config=config)


class _Pipe(Console):
    def on_broken_pipe(self) -> None:
        # rich would exit with 1 when the reader of a pipe has gone; for us that is no error (see cli/main.py).
        raise BrokenPipeError


def stdout() -> Console:
    """Where results go."""
    return _Pipe(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())


def stderr() -> Console:
    """Where remarks and progress go."""
    return _Pipe(stderr=True, highlight=False, markup=False)


def track(
    items: Iterable[Item],
    total: int,
    console: Console,
    *,
    step: Callable[[Item], int],
    describe: Callable[[Item], str],
) -> Iterator[Item]:
    """Pass ``items`` on while showing progress: a bar on a terminal, a line every few seconds elsewhere.

    Args:
        items: what is worked through.
        total: the step at which it ends.
        console: where to show it.
        step: how far an item is.
        describe: an item in words, such as "loss 2.31 · 8.1k tokens/s · 40 s left".
    """
    if not console.is_terminal:
        yield from _plain(items, total, console, step, describe)
        return
    columns = (
        TextColumn("{task.completed:,}/{task.total:,}"),
        BarColumn(bar_width=30),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=total)
        for item in items:
            bar.update(task, completed=step(item), description=describe(item))
            yield item


def _plain(
    items: Iterable[Item], total: int, console: Console, step: Callable[[Item], int], describe: Callable[[Item], str]
) -> Iterator[Item]:
    shown_at = 0.0
    last: Item | None = None
    for item in items:
        last, now = item, time.monotonic()
        if now - shown_at >= PLAIN_INTERVAL:
            console.print(f"{step(item):,}/{total:,}  {describe(item)}")
            shown_at, last = now, None
        yield item
    if last is not None:
        console.print(f"{step(last):,}/{total:,}  {describe(last)}")


def table(rows: Iterable[Mapping[str, Any]], title: str | None = None) -> Table:
    """A table of rows that share their columns; numbers are right-aligned."""
    rows = list(rows)
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for name in rows[0] if rows else ():
        number = all(str(cell(row[name]))[:1] in "0123456789-" for row in rows)
        shown.add_column(name.replace("_", " "), justify="right" if number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(cell, row.values()))
    return shown


def cell(value: Any) -> str:
    """A value as a table shows it: counts with commas, measures with four digits, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def closing(console: Console, parts: Mapping[str, str], since: float) -> None:
    """The last line of every verb: its rates, the time since ``since`` (``time.monotonic``), the peak memory."""
    shown = {**parts, "time": seconds(time.monotonic() - since), "peak memory": memory(peak_memory())}
    console.print(" · ".join(f"{name} {value}" for name, value in shown.items()), style="dim")


def seconds(value: float) -> str:
    """A duration: 3.2 s, 2 min 05 s, 1 h 20 min."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def memory(count: float) -> str:
    """A number of bytes: 512 B, 1.5 KiB, 2.0 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def count(value: float) -> str:
    """A number in short: 950, 8.1k, 1.2M, 49.1B."""
    for unit in ("", "k", "M", "B"):
        if abs(value) < 1000:
            return f"{value:.0f}" if unit == "" else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.1f}T"


def peak_memory() -> int:
    """Most bytes used so far: of the GPU where torch has used one, else of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated() > 0:
        return torch.cuda.max_memory_allocated()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
