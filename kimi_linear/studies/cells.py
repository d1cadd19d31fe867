"""Cells of a study on disk: one JSON file each, written whole, refused where it belongs to other settings."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_cell(path: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """The cell that ``write_cell`` left at ``path``, or None where there is none.

    Raises:
        ValueError: the file is damaged, or was made with other settings.
    """
    if not path.exists():
        return None
    try:
        cell = json.loads(path.read_text(encoding="utf-8"))
        theirs = cell["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a finished cell, got {error!r}; delete the file to run it again") from error
    for name in sorted({*settings, *theirs}):
        if settings.get(name) != theirs.get(name):
            raise ValueError(
                f"{path}: {name}: expected {settings.get(name)!r}, as asked for now, got a cell made with "
                f"{theirs.get(name)!r}; give this run another --folder, or delete that one"
            )
    return cell


def write_cell(path: Path, settings: Mapping[str, Any], values: Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write a finished cell."""
    write_json(path, {"settings": dict(settings), **values}, indent=indent)


def write_json(path: Path, values: Any, *, indent: int | None = 1) -> None:
    """Write JSON so that the file is there whole or not at all; on one line where ``indent`` is None."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.write_text(json.dumps(values, indent=indent) + "\n", encoding="utf-8")
    os.replace(unfinished, path)
