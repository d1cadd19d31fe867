"""Stop strings in streamed text: what may still become one is held back, so that none is ever shown in part."""

from __future__ import annotations


class StopMatcher:
    """Cuts streamed text before the first stop string, wherever the pieces are split."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.stop = stop
        self.stopped = False
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is now certain to come before any stop string. Sets ``stopped`` when one is complete."""
        assert not self.stopped, "push after a stop string"
        text = self._held + piece
        # The stop string that is complete first wins, and of those the one that began first: so it does not matter
        # how the text was split.
        found = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self.stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``, short of all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
