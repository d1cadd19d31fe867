"""Messages to ids: a chat template, rendered in a sandbox, in which no message can write a control token.

A template is text from a model's folder. It is rendered by jinja's immutable sandbox: it sees messages, tools and the
spelling of a few tokens, and reaches no file, module or attribute that is private. What a message contributes stays text
even where it spells ``<|im_end|>``; only what the template itself writes becomes a control token.
"""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from kimi_linear.data.messages import KNOWN_KEYS, plain, plain_messages, plain_tools
from kimi_linear.data.tokenizer_files import spelled_by, split_special
from kimi_linear.data.tokenizers import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template

Parts = tuple[str | int, ...]
"""Plain texts and the control ids between them; no two texts touch, none is empty."""

ROLE_TOKENS = ("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|im_end|>")
"""What the built-in template needs of a vocabulary."""
MAX_RENDERED = 1 << 28
"""Characters that a template may write: far more than any context holds, far fewer than a machine's memory."""


class ChatFormat:
    """How one model is talked to: the template of its folder, or the release's format where the folder has none."""

    def __init__(self, tokenizer: Tokenizer, template: str | None = None) -> None:
        """Take ``template``, else the tokenizer's, else the built-in one.

        Raises:
            ValueError: a template that jinja cannot read; none at all, for a vocabulary without the release's role tokens.
        """
        self.tokenizer = tokenizer
        self._own = template if template is not None else tokenizer.chat_template
        if self._own is None and (missing := [t for t in ROLE_TOKENS if t not in tokenizer.special_tokens]):
            raise ValueError(
                f"chat: expected a model with a chat template, or a vocabulary with {missing[0]}, got neither "
                f"(tokenizer {tokenizer.name}); add a chat_template.jinja to its folder, or continue plain text with: "
                "kimi-linear generate"
            )
        self._template = _compiled(built_in_template() if self._own is None else self._own)
        self._guard = _Guard(tokenizer.special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> Parts:
        """The messages as plain texts and control ids.

        Args:
            messages: what was said (``messages.plain_messages`` says in which form).
            tools: declarations of what the model may call, as in OpenAI's API.
            add_generation_prompt: end with what opens the assistant's next message.
            variables: more values that the folder's template reads, such as ``{"enable_thinking": False}``.

        Raises:
            ValueError, TypeError: messages of another form; a key or variable that the built-in template would drop; a
                template that fails, refuses the messages, or writes without end.
        """
        said, extra = plain_messages(messages), plain(dict(variables or {}), "variables")
        declared = plain_tools(tools) if tools else None
        if self._own is None:
            _nothing_dropped(said, extra)
        foreign = {**extra, "messages": said, "tools": declared}
        mark = _unused_number(foreign)
        values = {
            **self.tokenizer.named_tokens,
            **self._guard.marked(foreign, mark),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        # A control token never reaches over a mark, so each stretch between marks is searched for itself.
        stretches = _rendered(self._template, values).split(mark)
        return joined(part for stretch in stretches for part in split_special(stretch, self.tokenizer.special_tokens))

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of ``render`` with the same arguments."""
        parts = self.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, variables=variables)
        return self.tokenizer.encode_parts(parts)

    def spelled(self, parts: Iterable[str | int]) -> str:
        """Parts as one text, control tokens spelled out: for eyes and logs."""
        names = {token: name for name, token in self.tokenizer.special_tokens.items()}
        return "".join(part if isinstance(part, str) else names[part] for part in parts)

    def parts_of(self, ids: Iterable[int]) -> Parts:
        """Ids that were drawn, as ``render`` would have given them."""
        control = frozenset(self.tokenizer.special_tokens.values())
        parts: list[str | int] = []
        run: list[int] = []
        for token in ids:
            if token in control:
                parts += [self.tokenizer.decode(run), token]
                run = []
            else:
                run.append(token)
        return joined([*parts, self.tokenizer.decode(run)])


def built_in_template() -> str:
    """The jinja text of the release's chat format."""
    return files("kimi_linear.data").joinpath("chat_template.jinja").read_text(encoding="utf-8")


def joined(parts: Iterable[str | int]) -> Parts:
    """``parts`` with neighbouring texts made one and empty ones left out."""
    done: list[str | int] = []
    for part in parts:
        if isinstance(part, str) and done and isinstance(done[-1], str):
            done[-1] += part
        elif part != "":
            done.append(part)
    return tuple(done)


def remainder(parts: Parts, read: Parts) -> Parts | None:
    """What comes after ``read`` in ``parts``, or None where ``parts`` does not begin with it."""
    if not read:
        return parts
    *whole, last = read
    at = len(whole)
    if list(parts[:at]) != whole or len(parts) <= at:
        return None
    if parts[at] == last:
        return parts[at + 1 :]
    here = parts[at]
    if isinstance(last, str) and isinstance(here, str) and here.startswith(last):
        return (here[len(last) :], *parts[at + 1 :])
    return None


def _nothing_dropped(messages: list[dict[str, Any]], variables: dict[str, Any]) -> None:
    for i, message in enumerate(messages):
        if unknown := sorted(set(message) - set(KNOWN_KEYS)):
            raise ValueError(
                f"messages[{i}].{unknown[0]}: expected one of {', '.join(KNOWN_KEYS)}: the built-in chat template knows no "
                "other; leave it out, or give the folder a chat_template.jinja that reads it"
            )
    if variables:
        raise ValueError(
            f"variables: the built-in chat template reads none, got {', '.join(sorted(variables))}; leave them out, or give "
            "the folder a chat_template.jinja that reads them"
        )


class _Guard:
    """Keeps what a message contributes from becoming a control token.

    A template joins texts, so a mark is put into the messages before rendering and taken out after it. It is digits alone,
    so that it survives tojson, trim and upper, and drawn so that it is in no message.
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        tokens = list(tokens)
        self._anywhere = re.compile(f"(?={spelled_by(tokens)})")  # overlapping spellings too
        self._beginnings = {token[:n] for token in tokens for n in range(1, len(token))}
        self._ends = {token[-n:] for token in tokens for n in range(1, len(token))}
        self._longest = max(map(len, tokens), default=0)

    def marked(self, value: Any, mark: str) -> Any:
        """``value`` with ``mark`` inside every spelling of a token, and where a text may be half of one."""
        if isinstance(value, str):
            cuts = [0, *sorted(self._cuts(value)), len(value)]
            return mark.join([value[a:b] for a, b in itertools.pairwise(cuts)])
        if isinstance(value, dict):
            return {self.marked(key, mark): self.marked(item, mark) for key, item in value.items()}
        return [self.marked(item, mark) for item in value] if isinstance(value, list) else value

    def _cuts(self, text: str) -> set[int]:
        halves = range(1, min(self._longest, len(text) + 1))
        return {
            *(found.start() + 1 for found in self._anywhere.finditer(text)),
            *(len(text) - n + 1 for n in halves if text[-n:] in self._beginnings),
            *(n - 1 for n in halves if text[:n] in self._ends),
        }


def _unused_number(values: Any) -> str:
    """24 digits that are nowhere in ``values``."""
    everything = json.dumps(values)
    while (number := str(10**23 + secrets.randbelow(9 * 10**23))) in everything:
        pass
    return number


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks the assistant's words for training; rendering passes it by."""

        tags = {"generation"}  # noqa: RUF012  (as the base class has it)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    # What templates of the Hugging Face world are written for.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise ValueError(f"chat template, line {line}: expected jinja, got {error}; restore the template") from error


def _rendered(template: Template, values: Mapping[str, Any]) -> str:
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate(values):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_RENDERED:
                raise ValueError(f"it wrote more than {MAX_RENDERED:,} characters")
    except Exception as error:  # the template is foreign text, and whatever it does wrong is one error to the caller
        raise ValueError(
            f"chat template: {str(error) or type(error).__name__}; change the messages, or the template of the folder"
        ) from error
    return "".join(pieces)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Unlike jinja's own: no HTML escapes, since this is no web page.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> str:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)
