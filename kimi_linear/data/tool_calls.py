"""Tool calls in a model's words: the marks of the Kimi K2 family, read while they stream.

    <|tool_calls_section_begin|>
      <|tool_call_begin|> functions.NAME:INDEX <|tool_call_argument_begin|> {JSON} <|tool_call_end|> ...
    <|tool_calls_section_end|>

No text is lost. What is not a call as above comes out as the text that it is, marks spelled out: a mark out of place, words
between calls, a call whose arguments never begin, a call whose id names no function. Left out are only the marks of the
sections, and the white space around calls and ids. A call stays a call without its section, and when its end is missing;
``ToolCall.closed`` says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from kimi_linear.data.tokenizers import Tokenizer

SECTION_BEGIN, SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
CALL_BEGIN, ARGUMENTS_BEGIN, CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
MARKS = (SECTION_BEGIN, SECTION_END, CALL_BEGIN, ARGUMENTS_BEGIN, CALL_END)

_ID = re.compile(r"(?:functions\.)?(?P<name>\S+):(?P<index>\d+)")
_ANY_MARK = re.compile("|".join(re.escape(mark) for mark in MARKS))


@dataclass(frozen=True, kw_only=True)
class TextDelta:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class ToolCallDelta:
    """More of a call. The first delta of a call has its id and name, the later ones more of the arguments.

    Attributes:
        index: which call of this answer, from 0.
        id: as the model wrote it, such as ``functions.search:0``; None after the first delta.
        name: of the function; None after the first delta.
        arguments: more of the JSON text.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


Delta = TextDelta | ToolCallDelta


@dataclass(kw_only=True)
class ToolCall:
    """A call as far as it was written.

    Attributes:
        id: as the model wrote it; the tool's answer repeats it.
        name: of the function.
        arguments: the JSON text, exactly as written; it may be broken.
        closed: whether the mark of its end came.
    """

    id: str
    name: str
    arguments: str = ""
    closed: bool = False

    def parsed(self) -> dict[str, Any]:
        """The arguments.

        Raises:
            ValueError: they are no JSON object.
        """
        try:
            values = json.loads(self.arguments)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{self.id}: expected arguments in JSON, got {self.arguments[:200]!r} ({error}); ask the model again"
            ) from error
        if not isinstance(values, dict):
            raise ValueError(f"{self.id}: expected a JSON object as arguments, got {self.arguments[:200]!r}")
        return values

    def message(self) -> dict[str, Any]:
        """The call as an entry of a message's ``tool_calls``."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCallParser:
    """Splits an answer into text and calls, token by token or piece by piece.

    With a tokenizer whose vocabulary has the marks, ``push`` takes ids, and only the marks' own ids count: the same
    characters written in ordinary tokens are text. Else it takes texts and looks for the spelling, wherever they are cut.

    >>> parser = ToolCallParser()
    >>> parser.push("Let me see.<|tool_call_begin|>functions.look:0<|tool_call_arg")
    [TextDelta(text='Let me see.')]
    >>> parser.push('ument_begin|>{}<|tool_call_end|>')[0].name
    'look'
    >>> parser.finish(), parser.calls[0].parsed()
    ([], {})
    """

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        """Read ids with ``tokenizer``, texts where None."""
        special = {} if tokenizer is None else tokenizer.special_tokens
        self._by_id = {special[mark]: mark for mark in MARKS if mark in special}
        self._decoder = None if tokenizer is None else tokenizer.decoder()
        self._pending = ""  # text that may be the beginning of a mark
        self._held = ""  # white space in a section, or the id of a call that has not begun
        self._place: Literal["text", "section", "id", "arguments"] = "text"
        self._outside: Literal["text", "section"] = "text"
        self._out: list[Delta] = []
        self.text = ""
        self.calls: list[ToolCall] = []

    def push(self, piece: str | int) -> list[Delta]:
        """Read one id or one text; returns what it adds, often nothing or one delta.

        Raises:
            TypeError: an id without a tokenizer, or a text with one.
        """
        if isinstance(piece, str) != (self._decoder is None):
            expected = (
                "a text, as no tokenizer was given" if self._decoder is None else "an id, as a tokenizer was given"
            )
            raise TypeError(f"piece: expected {expected}, got {piece!r}")
        if isinstance(piece, int):
            assert self._decoder is not None
            if (mark := self._by_id.get(piece)) is not None:
                self._read(self._decoder.finish())
                self._mark(mark)
                return self._taken()
            piece = self._decoder.push(piece)
        self._read(piece)
        return self._taken()

    def finish(self) -> list[Delta]:
        """The answer is over: returns what was held back."""
        rest = "" if self._decoder is None else self._decoder.finish()
        self._read(rest)
        self._text(self._pending)
        self._pending = ""
        if self._place == "id":
            self._say(CALL_BEGIN + self._held)
        self._held, self._place = "", "text"
        return self._taken()

    def message(self) -> dict[str, Any]:
        """What was read so far as an assistant's message, for the next turn of the chat."""
        return assistant_message(self.text, self.calls)

    def _taken(self) -> list[Delta]:
        out, self._out = self._out, []
        return out

    def _read(self, text: str) -> None:
        """Text, in which marks are looked for unless they have ids of their own."""
        if self._by_id:
            self._text(text)
            return
        text = self._pending + text
        at = 0
        for found in _ANY_MARK.finditer(text):
            self._text(text[at : found.start()])
            self._mark(found[0])
            at = found.end()
        # A mark has one "<", its first character, so only the last one can begin a mark that is cut off here.
        last = text.rfind("<", at)
        keep = last if last >= 0 and any(mark.startswith(text[last:]) for mark in MARKS) else len(text)
        self._text(text[at:keep])
        self._pending = text[keep:]

    def _text(self, text: str) -> None:
        if not text:
            return
        if self._place == "arguments":
            self._argue(text)
        elif self._place == "id" or (self._place == "section" and not text.strip()):
            self._held += text
        else:
            self._say(self._held + text)
            self._held = ""

    def _mark(self, mark: str) -> None:
        match self._place, mark:
            case "text", "<|tool_calls_section_begin|>":
                self._place = self._outside = "section"
            case "section", "<|tool_calls_section_end|>":
                self._held, self._place, self._outside = "", "text", "text"
            case (("text" | "section"), "<|tool_call_begin|>"):
                self._held, self._place = "", "id"
            case "id", "<|tool_call_argument_begin|>" if self._begin(self._held.strip()):
                self._held, self._place = "", "arguments"
            case "id", "<|tool_call_argument_begin|>":
                self._not_a_call()
                self._say(mark)
            case "id", _:
                self._not_a_call()
                self._mark(mark)
            case "arguments", "<|tool_call_end|>":
                self.calls[-1].closed = True
                self._place = self._outside
            case "arguments", ("<|tool_call_begin|>" | "<|tool_calls_section_end|>"):
                self._place = self._outside
                self._mark(mark)
            case "arguments", _:
                self._argue(mark)
            case _:
                self._say(self._held + mark)
                self._held = ""

    def _not_a_call(self) -> None:
        self._say(CALL_BEGIN + self._held)
        self._held, self._place = "", self._outside

    def _begin(self, written: str) -> bool:
        """Begin the call with this id, if it names a function."""
        found = _ID.fullmatch(written)
        if found is None:
            return False
        self.calls.append(ToolCall(id=written, name=found["name"]))
        self._out.append(ToolCallDelta(index=len(self.calls) - 1, id=written, name=found["name"]))
        return True

    def _argue(self, text: str) -> None:
        self.calls[-1].arguments += text
        self._out.append(ToolCallDelta(index=len(self.calls) - 1, arguments=text))

    def _say(self, text: str) -> None:
        self.text += text
        self._out.append(TextDelta(text=text))


def parse_tool_calls(answer: str | Iterable[int], tokenizer: Tokenizer | None = None) -> tuple[str, list[ToolCall]]:
    """(text, calls) of a whole answer: a text, or ids with the tokenizer that made them."""
    parser = ToolCallParser(tokenizer)
    for piece in [answer] if isinstance(answer, str) else answer:
        parser.push(piece)
    parser.finish()
    return parser.text, parser.calls


def assistant_message(text: str, calls: Iterable[ToolCall]) -> dict[str, Any]:
    """An answer as a message: content unless there are calls alone, ``tool_calls`` where there are any."""
    made = [call.message() for call in calls]
    content = {"content": text} if text or not made else {}
    return {"role": "assistant", **content, **({"tool_calls": made} if made else {})}
