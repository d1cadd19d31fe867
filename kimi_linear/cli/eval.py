"""``kimi-linear eval``: perplexity by position on held-out text, or accuracy on the task that a model was made for."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console

from kimi_linear.cli.console import closing, count, parse, stderr, stdout, table
from kimi_linear.cli.folders import model_folder

if TYPE_CHECKING:
    from kimi_linear.data import Batch, Task, Tokenizer
    from kimi_linear.evals import Eval


@dataclass(frozen=True, kw_only=True)
class EvalArgs:
    """Flags of ``eval``."""

    model: tyro.conf.Positional[Path | None] = None
    """Folder of a model or of a run, or a name of the hub, such as "owner/model"; the newest under runs/ where None."""
    data: Path | None = None
    """Text file or folder whose held-out part is read; the Python standard library's source where None."""
    length: int = 1024
    """Tokens of context: the longest position that is measured."""
    tokens: int = 65536
    """About how many held-out tokens to read."""
    samples: int = 512
    """Sequences of a task to answer."""
    device: str = "auto"
    """Such as "cpu" or "cuda:0"; "auto" takes a GPU where there is one."""
    json: Path | None = None
    """Also write the result to this file."""


def main(argv: Sequence[str]) -> None:
    """Parse, load, measure, print."""
    args = parse(EvalArgs, "eval", argv, "Measure a model: perplexity by position, or accuracy on its task.")
    since = time.monotonic()
    folder = model_folder(args.model)
    console = stderr()
    console.print(f"{folder}", style="dim")

    from kimi_linear.cli.device import pick_device
    from kimi_linear.evals import load_task
    from kimi_linear.folder import load

    device = pick_device(args.device)
    task = load_task(folder)
    model, tokenizer = load(folder, device=device)
    evaluation = _text(args, tokenizer, device, folder, console) if task is None else _task(args, task, device)
    started = time.monotonic()
    with console.status("measuring"):
        result = evaluation(model)
    took = time.monotonic() - started
    out = stdout()
    out.print(table([{"measure": name, "value": value} for name, value in result.metrics.items()], result.name))
    if result.rows:
        out.print()
        out.print(table(result.rows))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"model": str(folder), **result.to_dict()}, indent=2) + "\n", encoding="utf-8")
    read = result.metrics.get("tokens") or args.samples * (task.sequence_length if task else 0)
    closing(console, {"rate": f"{count(read / took)} tokens/s"}, since)


def _task(args: EvalArgs, task: Task, device: str) -> Eval:
    from kimi_linear.evals import TaskAccuracy

    return TaskAccuracy(task=task, samples=args.samples, device=device)


def _text(args: EvalArgs, tokenizer: Tokenizer | None, device: str, folder: Path, console: Console) -> Eval:
    from kimi_linear.cli.text import read_text
    from kimi_linear.data import in_order
    from kimi_linear.evals import Perplexity

    if tokenizer is None:
        raise ValueError(f"{folder}: expected a tokenizer or a task.json beside the model, found neither")
    for name in ("length", "tokens"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(args, name)}")
    _, held_out = read_text(args.data, tokenizer, console)
    # Logits of one forward pass stay below 2**28 numbers, 1 GiB in fp32, whatever the vocabulary.
    at_once = min(8192, args.tokens, 2**28 // tokenizer.vocab_size)
    rows = max(1, at_once // args.length)
    batches = in_order(
        held_out,
        batch_size=rows,
        sequence_length=args.length,
        max_batches=max(1, args.tokens // (rows * args.length)),
    )
    return Perplexity(batches=lambda: batches, bytes_per_token=_bytes_per_token(tokenizer, batches), device=device)


def _bytes_per_token(tokenizer: Tokenizer, batches: Sequence[Batch]) -> float:
    """Bytes of text by scored tokens. The end of a document is a token of no bytes."""
    from kimi_linear.data import IGNORE, ByteTokenizer

    ids = [token for batch in batches for token in batch.targets[batch.targets != IGNORE].tolist()]
    text = [token for token in ids if token != tokenizer.eos_id]
    # A byte's length needs no decoding, which would make three bytes of each one that a row's edge cut off.
    in_bytes = len(text) if isinstance(tokenizer, ByteTokenizer) else len(tokenizer.decode(text).encode("utf-8"))
    return in_bytes / len(ids)
