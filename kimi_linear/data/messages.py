"""What a chat is made of, checked and made plain: messages and tools as JSON values, in the form that templates expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KNOWN_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id")
"""Keys of a message that every chat format knows. A folder's own template may know more; the built-in one does not."""

_SHOWN = 60  # characters of a value that a message shows


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as a template reads them: new dicts of plain JSON values, content as one text.

    A message is ``{"role": ..., "content": ...}``. The content is a text, a list of ``{"type": "text", "text": ...}``, or
    absent beside ``tool_calls``, which look as in OpenAI's API; a call without an ``id`` is given the release's,
    ``functions.NAME:INDEX``, with the running number of the call in the chat. A message of role ``tool`` has the
    ``tool_call_id`` that it answers. Other keys are passed on; one that is None counts as absent.

    Raises:
        ValueError, TypeError: something else; the message names the place.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise TypeError(f"messages: expected a list of messages, got {_show(messages)}")
    if not messages:
        raise ValueError('messages: expected at least one, got none; such as {"role": "user", "content": "Hello"}')
    calls = 0
    done = []
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise TypeError(f"{where}: expected an object with a role and content, got {_show(message)}")
        values = {k: v for k, v in plain(message, where).items() if v is not None or k == "content"}
        _text(values, "role", where)
        if "name" in values:
            _text(values, "name", where)
        if values["role"] == "tool":
            _text(values, "tool_call_id", where)
        if "tool_calls" in values:
            if values["role"] != "assistant":
                raise ValueError(
                    f"{where}.tool_calls: expected only in an assistant's message, got role {values['role']!r}"
                )
            values["tool_calls"] = _tool_calls(values["tool_calls"], f"{where}.tool_calls", calls)
            calls += len(values["tool_calls"])
        content = _content(values.get("content"), f"{where}.content", optional=bool(values.get("tool_calls")))
        values |= {"content": content} if "content" in values else {}
        done.append(values)
    return done


def plain_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tool declarations as new plain JSON values; what is in them is between the caller and the model.

    Raises:
        TypeError: no list of objects, or something in it that is no JSON value.
    """
    if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
        raise TypeError(f"tools: expected a list of declarations, got {_show(tools)}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise TypeError(
                f'tools[{i}]: expected an object such as {{"type": "function", "function": {{...}}}}, got {_show(tool)}'
            )
    return plain(tools, "tools")


def plain(value: Any, where: str) -> Any:
    """A copy of ``value`` made of dicts, lists, texts, numbers, booleans and None alone.

    A template must not get hold of an object with methods of its own.

    Raises:
        TypeError: anything else in it.
    """
    if value is None or type(value) in (str, bool, int, float):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if type(key) is not str:
                raise TypeError(f"{where}: expected texts as keys, got {_show(key)}")
        return {key: plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where}: expected a JSON value, got {_show(value)}; convert it first")


def _content(value: Any, where: str, *, optional: bool) -> str | None:
    if isinstance(value, str) or (value is None and optional):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a text or a list of text parts, got {_show(value)}")
    for i, part in enumerate(value):
        text = isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        if not text or set(part) != {"type", "text"}:
            raise ValueError(
                f'{where}[{i}]: expected {{"type": "text", "text": ...}}, the model reads text alone, got {_show(part)}'
            )
    return "".join(part["text"] for part in value)


def _tool_calls(value: Any, where: str, first: int) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list of calls, got {_show(value)}")
    calls = []
    for i, call in enumerate(value):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise ValueError(f'{where}[{i}]: expected {{"id": ..., "function": {{...}}}}, got {_show(call)}')
        _text(function, "name", f"{where}[{i}].function")
        if not isinstance(function.get("arguments"), str | dict):
            raise ValueError(
                f"{where}[{i}].function.arguments: expected JSON as a text or an object, "
                f"got {_show(function.get('arguments'))}"
            )
        call.setdefault("type", "function")
        call.setdefault("id", f"functions.{function['name']}:{first + i}")
        _text(call, "id", f"{where}[{i}]")
        if call["type"] != "function":
            raise ValueError(f"{where}[{i}].type: expected 'function', got {_show(call['type'])}")
        calls.append(call)
    return calls


def _text(values: dict[str, Any], key: str, where: str) -> None:
    if not isinstance(values.get(key), str) or not values[key]:
        raise ValueError(f"{where}.{key}: expected a text, got {_show(values.get(key))}")


def _show(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
