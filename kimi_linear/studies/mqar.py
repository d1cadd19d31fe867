"""Associative recall: which mixer learns to look a value up by its key, and in how many steps (the paper's MQAR).

Every mixer is trained on the same fresh sequences from the same seed, and measured on the same held-out ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from kimi_linear.config import LinearConfig, Mixer, MLAConfig, ModelConfig
from kimi_linear.studies.cells import read_cell
from kimi_linear.studies.study import Progress, Report

if TYPE_CHECKING:
    from kimi_linear.data import MQAR


@dataclass(frozen=True, kw_only=True)
class MQARConfig:
    """Flags of ``study mqar``."""

    mixer: str = "kda,gdn,mamba2,mla"
    """Mixers to compare; every layer is one. mla has rotary positions: without any it would be no fair baseline."""
    seeds: int = 1
    """Trainings per mixer."""
    pairs: int = 8
    """Key-value pairs to remember; every key is asked for once. The sequence has 3 * pairs + 1 tokens."""
    vocab: int = 64
    """Symbols, half of them keys."""
    layers: int = 2
    """Blocks."""
    hidden_size: int = 64
    """Width of the residual stream."""
    heads: int = 2
    """Heads of every mixer."""
    head_dim: int = 32
    """Width of a head, K and V."""
    steps: int = 300
    """Training steps per cell."""
    batch_size: int = 64
    """Sequences per step."""
    lr: float = 3e-3
    """Highest learning rate; the paper tries 5e-5 to 1e-3."""
    eval_every: int = 25
    """Steps between two measurements."""
    samples: int = 512
    """Held-out sequences."""
    device: str = "auto"
    """Such as "cpu" or "cuda:0"; "auto" takes a GPU where there is one."""

    def __post_init__(self) -> None:
        for mixer in self.mixers:
            if mixer not in get_args(Mixer):
                raise ValueError(f"mixer: expected some of {','.join(get_args(Mixer))}, got {mixer!r}")
        if len(set(self.mixers)) != len(self.mixers):
            raise ValueError(f"mixer: expected each one once, got {self.mixer!r}")
        for name in ("seeds", "steps", "batch_size", "eval_every", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """The names in ``mixer``."""
        return tuple(name.strip() for name in self.mixer.split(","))  # type: ignore[return-value]  # checked above

    @property
    def cells(self) -> tuple[tuple[Mixer, int], ...]:
        """Every (mixer, seed)."""
        return tuple((mixer, seed) for seed in range(self.seeds) for mixer in self.mixers)

    def settings(self) -> dict[str, Any]:
        """What two cells must share to be compared."""
        values = dataclasses.asdict(self)
        return {name: value for name, value in values.items() if name not in ("mixer", "seeds", "device")}


def task_of(config: MQARConfig) -> MQAR:
    """The task that every mixer learns."""
    from kimi_linear.data import MQAR

    return MQAR(num_pairs=config.pairs, num_queries=config.pairs, vocab=config.vocab)


def model_of(config: MQARConfig, mixer: Mixer) -> ModelConfig:
    """The model of one cell: the same shape for every mixer."""
    return ModelConfig(
        vocab_size=task_of(config).vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.layers,
        intermediate_size=2 * config.hidden_size,
        mixers=(mixer,) * config.layers,
        linear=LinearConfig(num_heads=config.heads, head_dim=config.head_dim),
        mla=MLAConfig(
            num_heads=config.heads,
            kv_lora_rank=config.hidden_size,
            qk_nope_head_dim=config.head_dim,
            qk_rope_head_dim=max(16, config.head_dim // 2),
            v_head_dim=config.head_dim,
            position="rope",
        ),
    )


def run(config: MQARConfig, folder: Path) -> Iterator[Progress]:
    """Train the cells that are not finished yet."""
    settings, total = config.settings(), config.steps * len(config.cells)
    for done, (mixer, seed) in enumerate(config.cells):
        before = done * config.steps
        if read_cell(_cell_file(folder, mixer, seed), settings) is not None:
            yield Progress(step=before + config.steps, total=total, text=f"{mixer} seed {seed}: finished before")
            continue
        for step, text in _train(config, mixer, seed, folder):
            yield Progress(step=before + step, total=total, text=f"{mixer} seed {seed}: {text}")


def report(config: MQARConfig, folder: Path) -> Report:
    """The finished cells as a table, ``results.json`` and ``accuracy.png``."""
    import json

    cells = {cell: read_cell(_cell_file(folder, *cell), config.settings()) for cell in config.cells}
    finished = {cell: values for cell, values in cells.items() if values is not None}
    rows = tuple(
        {
            "mixer": mixer,
            "seed": seed,
            "parameters": values["parameters"],
            "token accuracy": round(values["curve"][-1]["token_accuracy"], 4),
            "sequence accuracy": round(values["curve"][-1]["sequence_accuracy"], 4),
            "steps to 99 %": next((p["step"] for p in values["curve"] if p["token_accuracy"] >= 0.99), None),
            "seconds": round(values["seconds"], 1),
        }
        for (mixer, seed), values in finished.items()
    )
    task = task_of(config)
    title = f"MQAR: {config.pairs} pairs, {task.sequence_length} tokens, {config.layers} layers of width {config.hidden_size}"
    if not finished:
        return Report(title=title, rows=(), files=())
    results = folder / "results.json"
    results.write_text(
        json.dumps({"study": "mqar", "settings": config.settings(), "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    figure = folder / "accuracy.png"
    _draw(finished, title, figure)
    return Report(title=title, rows=rows, files=(results, figure))


def _cell_file(folder: Path, mixer: str, seed: int) -> Path:
    return folder / f"{mixer}-seed{seed}.json"
