"""``kimi-linear generate``: one prompt, one text, from the newest model or the one that is named."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from kimi_linear.cli.console import closing, memory, parse, stderr
from kimi_linear.cli.folders import model_folder
from kimi_linear.engine.config import SamplingConfig

BEGINNING, STORY, GREETING = "def ", "Once upon a time", "Hello"
"""What is continued where no prompt is given, by a model of one's own and by the one that comes along; and what is said to a
model with a chat template."""


@dataclass(frozen=True, kw_only=True)
class GenerateArgs:
    """Flags of ``generate``."""

    prompt: tyro.conf.Positional[str | None] = None
    """Text to continue, or a message to a model with a chat template; "-" reads it from standard input."""
    raw: bool = False
    """Continue the prompt as plain text, also where the model has a chat template."""
    model: Path | None = None
    """Folder of a model or of a run, a name of the hub such as "owner/model", or "nano", which comes along; the newest under
    runs/ where None, and nano where there is none."""
    device: str = "auto"
    """Such as "cpu" or "cuda:0"; "auto" takes a GPU where there is one."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=256, top_p=0.95))
    """How to draw."""


def main(argv: Sequence[str]) -> None:
    """Parse, load, stream."""
    args = parse(GenerateArgs, "generate", argv, "Continue a prompt with a trained model; the text goes to stdout.")
    since = time.monotonic()
    folder = model_folder(args.model, reads_text=True)
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    console = stderr()
    console.print(f"{folder}", style="dim")

    from kimi_linear.cli.device import pick_device
    from kimi_linear.data import ChatFormat
    from kimi_linear.engine import stream
    from kimi_linear.folder import SHIPPED_FOLDER, load

    model, tokenizer = load(folder, device=pick_device(args.device))
    if tokenizer is None:
        raise ValueError(f"{folder}: expected a tokenizer beside the model, found none; it reads ids, not text")
    how = args.sampling
    chat = tokenizer.chat_template is not None and not args.raw
    # The small vocabulary has "def name" as "def" and " name": after "def " comes what nobody writes.
    beginning = STORY if folder == SHIPPED_FOLDER else BEGINNING
    text = prompt if prompt is not None else GREETING if chat else beginning
    if chat:
        console.print("the prompt is a message in the model's chat template; --raw continues it as text", style="dim")
    given = ChatFormat(tokenizer).encode([{"role": "user", "content": text}]) if chat else text
    pieces = stream(
        model, tokenizer, given, max_tokens=how.max_tokens, temperature=how.temperature, top_k=how.top_k,
        top_p=how.top_p, seed=how.seed, stop=how.stop,
    )  # fmt: skip
    if not chat:  # an answer does not go on where the question ends
        print(text, end="", flush=True)
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
        stats = pieces.stats
        parts = {
            "prompt": f"{stats.prompt_tokens} tokens in {stats.prefill_seconds:.2f} s",
            "generated": f"{stats.generated_tokens} tokens, {stats.tokens_per_second:.0f} tokens/s",
            "state": memory(stats.state_bytes),
            "ended": stats.finish_reason or "interrupted",
        }
        closing(console, parts, since)
