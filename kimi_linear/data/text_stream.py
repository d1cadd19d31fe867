"""Ids back to text one at a time, without ever splitting a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable
from typing import Protocol

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What an id or byte sequence that means nothing decodes to."""

# Ids that a window holds before it is cut, and those that stay: enough to fix how the next id reads.
_WINDOW, _KEPT = 16, 8


class StreamDecoder(Protocol):
    """Turns ids into text one at a time. The pieces joined are ``decode`` of all the ids."""

    def push(self, token: int) -> str:
        """Text that ``token`` completes; empty while a character is incomplete."""
        ...

    def finish(self) -> str:
        """Text held back: U+FFFD for a character that was never completed, else empty."""
        ...


class ByteStream:
    """For vocabularies whose ids are bytes: an id is some bytes of UTF-8, or a word that stands for itself, or nothing."""

    def __init__(self, meaning: Callable[[int], bytes | str | None]) -> None:
        """``meaning`` of an id: its bytes, a control token's spelling, or None where it is not in the vocabulary."""
        self._meaning = meaning
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that ``token`` completes; a control token or an unknown id ends a character that was begun."""
        meaning = self._meaning(token)
        if isinstance(meaning, bytes):
            return self._utf8.decode(meaning)
        return self.finish() + (UNKNOWN if meaning is None else meaning)

    def finish(self) -> str:
        """U+FFFD for a character that was never completed."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class WindowStream:
    """For vocabularies known by their ``decode`` alone: decodes a short window of ids again at every step.

    The text of an id may depend on the ids before it, so the window keeps some that were already shown.
    """

    def __init__(self, decode: Callable[[Iterable[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that were handed out

    def push(self, token: int) -> str:
        """Text that ``token`` completes."""
        self._window.append(token)
        text = self._decode(self._window)
        held = int(text.endswith(UNKNOWN))  # a character that was begun is one U+FFFD, whatever bytes it has so far
        piece = text[self._emitted : len(text) - held]
        self._emitted = max(self._emitted, len(text) - held)
        if held == 0 and len(self._window) >= _WINDOW:  # cut where nothing is pending
            self._window = self._window[-_KEPT:]
            self._emitted = len(self._decode(self._window))
        return piece

    def finish(self) -> str:
        """What was held back."""
        piece = self._decode(self._window)[self._emitted :]
        self._window, self._emitted = [], 0
        return piece


class FallbackStream:
    """For vocabularies of words, in which ids that stand for single bytes spell what is no word.

    Their ``decode`` takes a run of bytes as a whole: one that is broken anywhere is U+FFFD everywhere. Here the bytes are
    read one by one, and ``decode`` is asked only what a word adds to the ids before it.
    """

    def __init__(self, decode: Callable[[list[int]], str], meaning: Callable[[int], bytes | str | None]) -> None:
        """``decode`` of some ids; ``meaning`` of an id: its byte, None where it is not in the vocabulary, "" for a word."""
        self._decode, self._meaning = decode, meaning
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._before: list[int] = []

    def push(self, token: int) -> str:
        """Text that ``token`` completes; a word or an unknown id ends a character that was begun."""
        meaning = self._meaning(token)
        if meaning is None:
            return self.finish() + UNKNOWN
        known = self._before
        self._before = [*known[-_KEPT:], token]
        if isinstance(meaning, bytes):
            return self._utf8.decode(meaning)
        return self.finish() + self._decode([*known, token])[len(self._decode(known)) :]

    def finish(self) -> str:
        """U+FFFD for a character that was never completed."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
