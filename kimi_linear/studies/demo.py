"""``kimi-linear demo``: train a hybrid and full attention on the same text, compare what they learn and what they cost.

This file is the order of events, and what happens when they are interrupted; the events are in ``demo_training`` and ``demo_phases``. A run
never continues an earlier one, because its times would be of two different moments: what an earlier run left is set
aside in ``previous/``.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kimi_linear.studies.report.results import DemoResults, write_results, write_text

Item = TypeVar("Item")

SENTENCE = "def median(data):\n    data = sorted(data)\n    n = len(data)\n    if n == 0:\n"
SENTENCE_SOURCE = "statistics.median, its docstring left out"

HYBRID, ATTENTION, RECALL, TRAINING = "hybrid", "attention", "recall", "training"
"""Folders of the trained models, each of which ``kimi_linear.load`` reads, and of their trainings."""

RESULTS, PAGE, PREVIOUS = "results.json", "report.html", "previous"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What the demo trains and measures. The times are for the whole phase and add up to the run's."""

    folder: Path = Path("runs/demo")
    """Where models, results.json and report.html go. What an earlier run left there moves to its folder previous/."""
    preset: str = "tiny"
    """The hybrid; its twin has full attention with RoPE in every layer."""
    train_seconds: float = 80.0
    """Time to train both language models in; it sets the steps, which are the same for both."""
    steps: int | None = None
    """Optimizer steps of each language model, whatever time they take; as many as fit where None."""
    batch_size: int = 8
    """Sequences per step."""
    sequence_length: int = 256
    """Tokens per sequence."""
    corpus_bytes: int | None = None
    """Read only so much of the standard library's source; all of it where None."""
    opening_tokens: int = 120
    """Length of what the model that comes with the package says first; 0 to leave it out."""
    prompt: str = "def "
    """Text that the hybrid continues."""
    sample_tokens: int = 240
    """Length of the continuation."""
    decode_seconds: float = 14.0
    """Time to measure the cost of a token in."""
    longest_context: int = 65536
    """Contexts are doubled from 1024 up to this."""
    recall_seconds: float = 35.0
    """Most time to train the recall task in; it ends earlier where the target is reached."""
    recall_target: float = 0.99
    """Share of right answers that ends the recall task."""
    recall_pairs: int = 16
    """Keys and values to remember in the recall task."""
    seed: int = 0
    """Seed of weights, order of the data, and continuation."""
    device: str = "auto"
    """Device; a GPU where there is one, else the CPU, where "auto"."""
    threads: int | None = None
    """CPU threads; the physical cores where None."""

    def __post_init__(self) -> None:
        for name in ("train_seconds", "decode_seconds", "recall_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a time above 0 seconds, got {getattr(self, name)}")
        for name in (
            "steps",
            "batch_size",
            "sequence_length",
            "corpus_bytes",
            "sample_tokens",
            "recall_pairs",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.opening_tokens < 0:
            raise ValueError(f"opening_tokens: expected at least 0, got {self.opening_tokens}")
        if self.longest_context < 1024:
            raise ValueError(f"longest_context: expected at least 1024 tokens, got {self.longest_context}")
        if not 0 < self.recall_target <= 1:
            raise ValueError(f"recall_target: expected a share in (0, 1], got {self.recall_target}")

    @property
    def contexts(self) -> tuple[int, ...]:
        """1024, 2048, ... up to ``longest_context``."""
        return tuple(1024 * 2**i for i in range((self.longest_context // 1024).bit_length()))

    @property
    def command(self) -> str:
        """The command line that runs this configuration."""
        words = ["kimi-linear", "demo"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words += [f"--{field.name.replace('_', '-')}", str(value)]
        return shlex.join(words)


class Screen(Protocol):
    """Where the demo shows what it does; the command line and the tests have one each."""

    def say(self, text: str) -> None:
        """One line."""
        ...

    def write(self, piece: str) -> None:
        """A piece of a text that is being written."""
        ...

    def track(
        self, items: Iterable[Item], total: int, *, step: Callable[[Item], int], describe: Callable[[Item], str]
    ) -> Iterator[Item]:
        """Pass ``items`` on and show how far they are: ``step(item)`` of ``total``, and ``describe(item)``."""
        ...

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows that share their columns."""
        ...


class DemoRun:
    """One run under way: its results so far, always ready to be written."""

    def __init__(self, config: DemoConfig, screen: Screen, device: str) -> None:
        from kimi_linear.studies.report.machine import this_machine

        self.config, self.screen, self.device = config, screen, device
        self.results = DemoResults(
            command=config.command,
            started=datetime.datetime.now().isoformat(timespec="seconds"),
            machine=this_machine(device),
            corpus="",
            seconds={},
        )

    def keep(self, **parts: Any) -> None:
        """Put ``parts`` into the results."""
        self.results = dataclasses.replace(self.results, **parts)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards ``name``, also where it is interrupted."""
        since = time.perf_counter()
        try:
            yield
        finally:
            spent = self.results.seconds.get(name, 0.0) + time.perf_counter() - since
            self.keep(seconds={**self.results.seconds, name: spent})

    def write(self) -> Path:
        """Write results.json and report.html; returns the page's path."""
        from kimi_linear.studies.report.page import render

        write_results(self.results, self.config.folder / RESULTS)
        page = self.config.folder / PAGE
        write_text(page, render(self.results))
        return page


def run_demo(config: DemoConfig, screen: Screen) -> DemoResults:
    """Run the whole demo, and write ``results.json`` and ``report.html`` into ``config.folder``.

    However it ends, by Ctrl-C too, the hybrid's folder can be loaded and the report shows what there is.

    Args:
        config: what to do, where, and how long.
        screen: where to show it.

    Returns:
        Everything that was measured.

    Raises:
        KeyboardInterrupt: after the report was written. ValueError: no such preset or device.
    """
    import torch

    from kimi_linear.studies import demo_phases as phases
    from kimi_linear.studies import demo_training as training
    from kimi_linear.studies.report.machine import physical_cores

    device = phases.resolve_device(config.device)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(config.threads or physical_cores())
    set_aside(config.folder)
    run = DemoRun(config, screen, device)
    if config.steps is None:
        total = config.train_seconds + config.decode_seconds + config.recall_seconds
        screen.say(f"About {total / 60:.1f} minutes. Ctrl-C at any time leaves a model and a report.")
    steps: list[tuple[str, Callable[[DemoRun], None]]] = [
        ("the opening", phases.open_with_shipped_model),
        ("the two language models", training.train_language_models),
        ("the continuation", phases.continue_prompt),
        ("the picture of the memory", phases.picture_memory),
        ("the cost of a token", phases.measure_decoding),
        ("associative recall", training.train_recall),
    ]
    try:
        for i, (_, step) in enumerate(steps):
            run.keep(missing=tuple(name for name, _ in steps[i:]))
            step(run)
        run.keep(missing=())
    finally:
        torch.set_num_threads(threads_before)
        if run.results.missing:
            screen.say(f"Stopped before {' and '.join(run.results.missing[:1])} was complete.")
        page = run.write()
        if (config.folder / HYBRID / "config.json").exists():
            # `kimi-linear generate` takes the newest model: that is to be the hybrid, not the task model trained last.
            os.utime(config.folder / HYBRID / "config.json")
        screen.table(summary(run.results))
        screen.say(f"Report: {page}")
    return run.results


def set_aside(folder: Path) -> None:
    """Move what an earlier demo left in ``folder`` into ``folder/previous``, replacing what was there.

    Raises:
        ValueError: the folder holds other things, which are not the demo's to move.
    """
    ours = (HYBRID, ATTENTION, RECALL, TRAINING, RESULTS, PAGE)
    if not folder.exists():
        folder.mkdir(parents=True)
        return
    if not folder.is_dir():
        raise ValueError(f"folder: expected a folder, got the file {folder}; choose another --folder")
    partial = {f"{name}.partial" for name in (RESULTS, PAGE)}
    foreign = sorted(p.name for p in folder.iterdir() if p.name not in {*ours, PREVIOUS, *partial})
    if foreign:
        raise ValueError(
            f"folder: expected an empty folder or an earlier demo's, got {folder} with {foreign[0]!r}; choose another --folder"
        )
    left = [folder / name for name in ours if (folder / name).exists()]
    if not left:
        return
    previous = folder / PREVIOUS
    if previous.exists():
        shutil.rmtree(previous)
    previous.mkdir()
    for path in left:
        os.replace(path, previous / path.name)


def summary(results: DemoResults) -> list[dict[str, Any]]:
    """The last table: a row for each thing measured, a column for each model."""
    from kimi_linear.studies.report import page

    hybrid, attention = results.training("hybrid"), results.training("attention")
    rows: list[dict[str, Any]] = []

    def row(what: str, ours: Any, theirs: Any, text: Callable[[Any], str]) -> None:
        cells = {"hybrid": ours, "full attention": theirs}
        if any(value is not None for value in cells.values()):
            rows.append({"": what, **{k: "–" if v is None else text(v) for k, v in cells.items()}})

    facts = {fact.name: fact.value for fact in page.facts(results)}
    row("parameters", hybrid and hybrid.parameters, attention and attention.parameters, "{:,}".format)
    row(
        "training, tokens/s",
        hybrid and hybrid.tokens_per_second,
        attention and attention.tokens_per_second,
        "{:,.0f}".format,
    )
    row(
        "bits per byte, held out",
        facts.get("hybrid.bits_per_byte"),
        facts.get("attention.bits_per_byte"),
        "{:.3f}".format,
    )
    if "decoding.context" in facts:
        at = f"at {page.context(facts['decoding.context'])} of context"
        row(f"time per token {at}", facts["decoding.hybrid_time"], facts["decoding.attention_time"], page.time_in_words)
        row(f"cache {at}", facts["decoding.hybrid_cache"], facts["decoding.attention_cache"], page.size_in_words)
    row("associative recall (one task model)", facts.get("recall"), None, "{:.1%}".format)
    return rows
