"""What a study is: a question with an expected answer, a price, and a ``run`` that can be stopped and taken up again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

Config = TypeVar("Config")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a study stands."""

    step: int
    """Steps done over all cells."""
    total: int
    """Steps of all cells."""
    text: str
    """What is being done, and the latest numbers."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a study found."""

    title: str
    rows: tuple[Mapping[str, Any], ...]
    """The table; all rows have the same columns."""
    files: tuple[Path, ...]
    """What was written: the numbers as JSON, a figure."""
    columns: tuple[str, ...] | None = None
    """Those that a terminal of 80 characters has room for; all where None. The files hold them all."""

    def shown(self) -> list[Mapping[str, Any]]:
        """The rows with these columns alone."""
        return [row if self.columns is None else {name: row[name] for name in self.columns} for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class Study(Generic[Config]):
    """One table or figure, as a command.

    ``run`` works through cells, such as one mixer and seed. A finished cell is a JSON file in the folder and is never
    run again; one that was interrupted continues from its last checkpoint.
    """

    name: str
    """The word after ``kimi-linear study``."""
    shows: str
    """The question, with its source."""
    expected: str
    """The answer that was found before, with its numbers."""
    price: str
    """Hardware and time at the default size."""
    config: type[Config]
    """Its flags: a frozen dataclass with defaults."""
    run: Callable[[Config, Path], Iterator[Progress]]
    """Do the work that is left."""
    report: Callable[[Config, Path], Report]
    """Read the finished cells; writes the figure."""
