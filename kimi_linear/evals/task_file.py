"""``task.json`` beside a model: which synthetic task it was trained on, so that it can be measured on it again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from kimi_linear.data import MQAR, Palindrome, Stack, Task

TASK_FILE = "task.json"

_KINDS: dict[str, type[MQAR | Palindrome | Stack]] = {kind.name: kind for kind in (Palindrome, MQAR, Stack)}


def save_task(task: MQAR | Palindrome | Stack, folder: str | Path) -> None:
    """Write ``task`` into a model folder, which exists."""
    values = {"task": task.name, **dataclasses.asdict(task)}
    (Path(folder) / TASK_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_task(folder: str | Path) -> Task | None:
    """The task that a model folder names, or None where it names none.

    Raises:
        ValueError: the file is not JSON, or names a task or a setting that does not exist.
    """
    path = Path(folder) / TASK_FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        name = values.pop("task")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: expected JSON such as {{"task": "mqar", "num_pairs": 8}}, got {error!r}') from error
    if name not in _KINDS:
        raise ValueError(f"{path}: task: expected one of {', '.join(_KINDS)}, got {name!r}")
    known = {field.name for field in dataclasses.fields(_KINDS[name])}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{path}: {unknown[0]}: unknown setting of {name}; expected {', '.join(sorted(known))}")
    return _KINDS[name](**values)
