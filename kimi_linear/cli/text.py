"""The text that a verb reads: a file, a folder, or the Python standard library's source."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from kimi_linear.data import Corpus, Tokenizer

HELD_OUT = 0.05
"""Share of the documents that is never trained on."""


def read_text(data: Path | None, tokenizer: Tokenizer, console: Console) -> tuple[Corpus, Corpus]:
    """(training, held-out) tokens of ``data``, of the standard library where None; says what was read."""
    from kimi_linear.data import read_documents, stdlib_source, tokenize

    documents = stdlib_source() if data is None else read_documents(data)
    corpus = tokenize(documents, tokenizer)
    train, held_out = corpus.split(HELD_OUT)
    name = "the Python standard library's source" if data is None else str(data)
    console.print(
        f"{name}: {len(documents):,} documents, {train.num_tokens:,} tokens to train on, "
        f"{held_out.num_tokens:,} held out",
        style="dim",
    )
    if documents.unreadable and data is not None:
        console.print(f"skipped, not UTF-8: {', '.join(documents.unreadable)}")
    return train, held_out
