"""``kimi-linear chat``: talk to a model, turn by turn; its state stays, so that each turn reads only what is new.

Lines of standard input are messages, answers go to stdout, everything else to stderr: it works in a pipe as on a terminal.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from kimi_linear.cli.console import closing, memory, parse, stderr
from kimi_linear.cli.folders import model_folder
from kimi_linear.engine.config import SamplingConfig

if TYPE_CHECKING:
    from kimi_linear.engine import Answer, Conversation, GenerationStats

PLAIN = '{% for m in messages %}{{ m.content }}{{ "" if m.role == "user" else "\\n\\n" }}{% endfor %}'
"""A chat with a model that only continues text: an answer goes on where the message ends."""
HELP = r"""One line is one message; a line that ends in \ goes on in the next. Ctrl-C stops an answer, Ctrl-D ends the chat.
/new forgets everything that was said, /help shows this, /exit ends the chat; // begins a message with a slash."""


@dataclass(frozen=True, kw_only=True)
class ChatArgs:
    """Flags of ``chat``."""

    model: Path | None = None
    """Folder of a model or of a run, a name of the hub such as "owner/model", or "nano", which comes along; the newest under
    runs/ where None, and nano where there is none."""
    system: str | None = None
    """System prompt: what the model is told before the first message."""
    device: str = "auto"
    """Such as "cpu" or "cuda:0"; "auto" takes a GPU where there is one."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_tokens=1024))
    """How to draw; --max-tokens is for each answer."""


def main(argv: Sequence[str]) -> None:
    """Parse, load, talk until the input ends."""
    args = parse(ChatArgs, "chat", argv, "Talk to a trained model; the answers go to stdout.")
    since = time.monotonic()
    folder = model_folder(args.model, reads_text=True)
    console = stderr()
    console.print(f"{folder}", style="dim")

    from kimi_linear.cli.device import pick_device
    from kimi_linear.engine import Conversation
    from kimi_linear.folder import SHIPPED_FOLDER, load

    model, tokenizer = load(folder, device=pick_device(args.device))
    if tokenizer is None:
        raise ValueError(f"{folder}: expected a tokenizer beside the model, found none; it reads ids, not text")
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    interactive = sys.stdin.isatty()
    plain = folder == SHIPPED_FOLDER
    if plain:
        console.print("this model was never taught to chat: it continues what you write", style="dim")

    def begin() -> Conversation:
        return Conversation(model, tokenizer, messages=system, template=PLAIN if plain else None)

    chat, done = begin(), []
    if interactive:
        console.print(HELP, style="dim")
    try:
        for message in _messages(interactive):
            if message == "/exit":
                break
            if message == "/new":
                chat = begin()
                console.print("a new chat", style="dim")
            elif message.startswith("/") and not message.startswith("//"):
                console.print(HELP if message == "/help" else f"no command {message!r}\n{HELP}")
            else:
                answer = chat.send(
                    message.removeprefix("/") if message.startswith("//") else message, _turn(args, done)
                )
                done.append(answer.stats)
                _show(answer, console, stoppable=interactive)
    finally:
        drawn = sum(stats.generated_tokens for stats in done)
        parts = {
            "turns": f"{len(done)}",
            "read": f"{sum(s.prompt_tokens for s in done)} tokens",
            "drawn": f"{drawn} tokens",
        }
        closing(console, parts, since)


def _turn(args: ChatArgs, done: list[GenerationStats]) -> SamplingConfig:
    """The same seed would draw the same numbers in every turn, so the next turn takes the next seed."""
    how = args.sampling
    return how if how.seed is None else replace(how, seed=how.seed + len(done))


def _messages(interactive: bool) -> Iterator[str]:
    """Messages from standard input; empty lines are none."""
    if interactive:
        import readline  # noqa: F401  (gives ``input`` a history and a line to edit)
    lines: list[str] = []
    while (line := _line("... " if lines else "> ", interactive)) is not None:
        if line.endswith("\\"):
            lines.append(line[:-1])
            continue
        message = "\n".join([*lines, line])
        lines = []
        if message.strip():
            yield message
    if lines:  # the input ended in a line that was to go on
        yield "\n".join(lines)


def _line(prompt: str, interactive: bool) -> str | None:
    """The next line without its end, or None after the last."""
    if not interactive:
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    try:
        return input(prompt)
    except EOFError:
        print(file=sys.stderr)
        return None


def _show(answer: Answer, console: Console, *, stoppable: bool) -> None:
    """Print an answer as it comes, tool calls on lines of their own."""
    from kimi_linear.data import TextDelta

    try:
        with _asked_to_stop(stoppable) as asked:
            for delta in answer:
                if isinstance(delta, TextDelta):
                    print(delta.text, end="", flush=True)
                elif delta.name is not None:
                    print(f"\n[calls {delta.id}] ", end="", flush=True)
                else:
                    print(delta.arguments, end="", flush=True)
                if asked:
                    answer.close()
    finally:
        print(flush=True)
    stats = answer.stats
    console.print(
        f"read {stats.prompt_tokens} tokens, {stats.reused_tokens} known · {stats.generated_tokens} tokens, "
        f"{stats.tokens_per_second:.0f} tokens/s · state {memory(stats.state_bytes)} · {stats.finish_reason or 'stopped'}",
        style="dim",
    )


@contextmanager
def _asked_to_stop(stoppable: bool) -> Iterator[list[int]]:
    """A list that Ctrl-C adds to, so that the model is left between two tokens and not inside a layer.

    A second Ctrl-C, or the first where the answer is not ``stoppable``, interrupts as ever.
    """
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    before = signal.signal(signal.SIGINT, note) if stoppable else None
    try:
        yield asked
    finally:
        if stoppable:
            signal.signal(signal.SIGINT, before)
