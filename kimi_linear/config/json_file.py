"""JSON objects from files that come from elsewhere: bounded in size and depth, no key twice, no NaN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

MAX_JSON_BYTES = 16 << 20
"""The index of 20,000 tensors has 2 MiB. A file of nothing but brackets takes some twenty times its size once parsed."""


def read_json_object(path: Path, *, error: type[ValueError], what: str = "the file is damaged") -> dict[str, Any]:
    """The JSON object in ``path``.

    Args:
        path: of a file.
        error: what to raise for a file that is no such object.
        what: the likely cause, for the message.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise error(f"{path}: expected at most {MAX_JSON_BYTES:,} bytes of JSON, got {size:,}; {what}")
    return parse_json_object(path.read_bytes(), path, error=error, what=what)


def parse_json_object(blob: bytes, source: object, *, error: type[ValueError], what: str) -> dict[str, Any]:
    """The same from memory; ``source`` names it in messages."""
    try:
        # Out of range integers, a wrong encoding and bad syntax are all ValueErrors; nesting without end recurses.
        values = json.loads(blob.decode("utf-8"), object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
    except (ValueError, RecursionError) as cause:
        raise error(f"{source}: expected JSON, got {cause}; {what}") from cause
    if not isinstance(values, dict):
        raise error(f"{source}: expected a JSON object, got {type(values).__name__}; {what}")
    return values


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} twice")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name}, which is no JSON number")
