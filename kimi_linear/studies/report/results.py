"""What the demo measures, as data: frozen dataclasses that are written to and read from one JSON file.

A part that was not reached is None (or empty) and its name is in ``DemoResults.missing``; the page shows what there is.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kimi_linear.studies.report.machine import Machine

SCHEMA = 1
"""Version of the JSON layout; a file of another version is refused."""

ModelName = Literal["hybrid", "attention"]

LABELS: dict[ModelName, str] = {"hybrid": "hybrid", "attention": "full attention"}
"""What tables and pages call the models."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measurement on a training curve."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens trained on so far."""
    value: float
    """Loss in nats per token, or recall in [0, 1]."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """One language model's training."""

    model: ModelName
    label: str
    """What the page calls it."""
    mixers: tuple[str, ...]
    """Mixer of each layer, first to last."""
    parameters: int
    planned_steps: int
    """Steps that were to be done; fewer points where the training was interrupted."""
    seconds: float
    """Time spent in training, validation left out."""
    train: tuple[Point, ...]
    validation: tuple[Point, ...]

    @property
    def finished(self) -> bool:
        """Whether every planned step was done."""
        return bool(self.train) and self.train[-1].step >= self.planned_steps

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on, by the time it took."""
        return self.train[-1].tokens / self.seconds if self.train and self.seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A continuation written by the hybrid."""

    prompt: str
    continuation: str
    tokens: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class DecodePoint:
    """Cost of one more token behind a context of a given length."""

    context: int
    """Tokens in the cache before."""
    seconds_per_token: float
    """Median over the tokens timed."""
    cache_bytes: int
    """Bytes that hold the context: recurrent states, convolution windows and latents in use."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """One model's cost per token as the context grows."""

    model: ModelName
    label: str
    points: tuple[DecodePoint, ...]


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Training on multi-query associative recall (MQAR; arXiv 2510.26692, section 5.1)."""

    pairs: int
    """Key-value pairs to remember."""
    queries: int
    """Keys asked for afterwards."""
    length: int
    """Tokens of one sequence."""
    vocabulary: int
    mixers: tuple[str, ...]
    parameters: int
    chance: float
    """Recall of a guess among the values."""
    target: float
    """Recall at which the training stops."""
    seconds: float
    points: tuple[Point, ...]
    """Share of queries answered right, on sequences never seen, against step."""


@dataclass(frozen=True, kw_only=True)
class MemoryHead:
    """The memory of one head at work on the sentence. T tokens, K channels."""

    layer: int
    """Layer, from 0."""
    head: int
    log_decay: tuple[tuple[float, ...], ...]
    """[T][K] natural-log decay of each channel at each token, <= 0."""
    beta: tuple[float, ...]
    """[T] strength of the write."""
    correction: tuple[float, ...]
    """[T] length of v - S̃ᵀk: how far the decayed memory's answer was from the value to be stored."""
    value: tuple[float, ...]
    """[T] length of v, which the correction has where the memory answers nothing."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The memory at work on a real sentence, one token at a time."""

    source: str
    """Where the sentence comes from."""
    tokens: tuple[str, ...]
    """[T] the sentence, token by token."""
    heads: tuple[MemoryHead, ...]


@dataclass(frozen=True, kw_only=True)
class DemoResults:
    """Everything that one run of the demo found."""

    schema: int = SCHEMA
    command: str
    """The command line that makes this again."""
    started: str
    """Local time, ISO 8601."""
    machine: Machine
    corpus: str
    """What the language models were trained on, in words."""
    seconds: dict[str, float]
    """Wall-clock time of each phase done, by its name, in order."""
    trainings: tuple[Training, ...] = ()
    sample: Sample | None = None
    decoding: tuple[Decoding, ...] = ()
    recall: Recall | None = None
    memory: Memory | None = None
    missing: tuple[str, ...] = ()
    """Parts that were not reached, in words, because the run was interrupted."""

    @property
    def total_seconds(self) -> float:
        """Wall-clock time of all phases."""
        return sum(self.seconds.values())

    def training(self, model: ModelName) -> Training | None:
        """The training of ``model``, None where it was not reached."""
        return next((t for t in self.trainings if t.model == model), None)

    def decoding_of(self, model: ModelName) -> Decoding | None:
        """The decoding costs of ``model``, None where they were not reached."""
        return next((d for d in self.decoding if d.model == model), None)


def write_results(results: DemoResults, path: Path) -> None:
    """Writes ``results`` as JSON, whole or not at all."""
    write_text(path, json.dumps(dataclasses.asdict(results), ensure_ascii=False, allow_nan=False))


def read_results(path: Path) -> DemoResults:
    """The results that ``write_results`` wrote.

    Raises:
        ValueError: the file is no JSON, of another schema, or its keys or types are not those of ``DemoResults``.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected the demo's results as JSON, got a file that does not parse: {error}"
        ) from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {schema!r}; run `kimi-linear demo` again")
    return _build(DemoResults, values, str(path))


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` through a temporary sibling, so that an interrupted write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _build(kind: Any, value: Any, where: str) -> Any:
    """``value`` (plain JSON) as ``kind``: a dataclass, tuple[X, ...], dict, X | None or a plain type."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        names = {f.name for f in dataclasses.fields(kind)}
        if not isinstance(value, dict) or set(value) != names:
            raise ValueError(
                f"{where}: expected the keys {sorted(names)}, got {value if not isinstance(value, dict) else sorted(value)}"
            )
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hints[name], value[name], f"{where}: {name}") for name in names})  # type: ignore[operator]
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(args[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_build(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _build(args[1], item, f"{where}[{key}]") for key, item in value.items()}
    if origin is Literal and value in args:
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise ValueError(f"{where}: expected {kind}, got {value!r}")
