"""``kimi-linear train``: train a preset on text, from the newest checkpoint of its folder where there is one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import closing as closing_at_end
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_linear.cli.console import closing, count, parse, seconds, stderr, stdout, table, track
from kimi_linear.cli.folders import RUNS
from kimi_linear.training.config import TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from kimi_linear.data import Tokenizer
    from kimi_linear.training import StepMetrics, Trainer


@dataclass(frozen=True, kw_only=True)
class TrainArgs:
    """Flags of ``train``."""

    preset: str = "tiny"
    """Which model; ``kimi-linear info --preset list`` names them. A baseline is "tiny/mla", "tiny/gdn", ..."""
    data: Path | None = None
    """Text file or folder; the Python standard library's source where None."""
    tokenizer: Path | None = None
    """Folder with a tokenizer.json or tiktoken.model; bytes where None."""
    folder: Path = RUNS / "train"
    """Where checkpoints and metrics go. A run that is there already is resumed."""
    training: TrainConfig = field(default_factory=TrainConfig)
    """How to train."""


def main(argv: Sequence[str]) -> None:
    """Parse, build, train while showing progress, print."""
    args = parse(TrainArgs, "train", argv, "Train a model on text; run the same command again to resume.")
    since = time.monotonic()
    console = stderr()
    trainer = _trainer(args, console)
    total = trainer.config.steps
    if trainer.step:
        console.print(f"resuming {args.folder} at step {trainer.step:,}")
    if trainer.step >= total:
        console.print(f"{args.folder}: all {total:,} steps are done; ask for more with --steps", style="dim")
    last: dict[str, StepMetrics] = {}
    began = trainer.step
    try:
        # Closed whatever happens: the trainer then saves a checkpoint.
        with closing_at_end(trainer.run()) as steps:  # type: ignore[type-var]  # it is a generator
            for _ in track(_keep(steps, last), total, console, step=lambda m: m.step, describe=_describe):
                pass
    finally:
        _summary(args, trainer, last, since, trainer.step - began)


def _trainer(args: TrainArgs, console: Console) -> Trainer:
    from kimi_linear.cli.device import pick_device
    from kimi_linear.cli.text import read_text
    from kimi_linear.config import preset, replace
    from kimi_linear.data import ByteTokenizer, load_tokenizer
    from kimi_linear.model import KimiLinear
    from kimi_linear.training import Trainer

    tokenizer: Tokenizer | None = ByteTokenizer() if args.tokenizer is None else load_tokenizer(args.tokenizer)
    if tokenizer is None:
        raise FileNotFoundError(
            f"{args.tokenizer}: expected a folder with tokenizer.json or tiktoken.model, found none in it"
        )
    config = preset(args.preset)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most the {config.vocab_size} tokens of preset {args.preset}, got "
            f"{tokenizer.vocab_size}; choose a larger preset, or leave --tokenizer out for bytes"
        )
    if config.eos_token_id is None and tokenizer.eos_id is not None:
        config = replace(config, eos_token_id=tokenizer.eos_id)
    device = pick_device(args.training.device)
    train, held_out = read_text(args.data, tokenizer, console)
    model = KimiLinear(config, seed=args.training.seed)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"{args.preset}: {count(parameters)} parameters, on {device}, into {args.folder}", style="dim")
    return Trainer(model, tokenizer, train, held_out, args.training, args.folder)


def _keep(steps: Iterable[StepMetrics], last: dict[str, StepMetrics]) -> Iterable[StepMetrics]:
    for at in steps:
        last["step"] = at
        if at.val_loss is not None:
            last["validation"] = at
        yield at


def _describe(at: StepMetrics) -> str:
    validation = "" if at.val_loss is None else f" · held out {at.val_loss:.3f}"
    rate = count(at.tokens_per_second)
    return f"loss {at.loss:.3f}{validation} · {rate} tokens/s · {seconds(at.seconds_left)} left"


def _summary(args: TrainArgs, trainer: Trainer, last: dict[str, StepMetrics], since: float, steps: int) -> None:
    rows = [
        {
            "measured": name,
            "step": at.step,
            "loss": at.loss if name == "step" else at.val_loss,
            "perplexity": None if name == "step" else at.val_perplexity,
        }
        for name, at in last.items()
    ]
    console = stderr()
    if rows:
        names = {"step": "last batch", "validation": "held out"}
        stdout().print(table([{**row, "measured": names[str(row["measured"])]} for row in rows]))
        console.print(f"continue a prompt with: kimi-linear generate --model {args.folder}", style="dim")
    rate = last["step"].tokens_per_second if "step" in last else 0.0
    closing(console, {"steps": f"{steps:,}", "rate": f"{count(rate)} tokens/s"}, since)
