"""The files that lie beside a vocabulary: read once, understood where we need to, written back byte for byte."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from kimi_linear.config.json_file import parse_json_object
from kimi_linear.config.own_file import own_file

CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
COMPANIONS = (
    CONFIG_FILE, TEMPLATE_FILE, GENERATION_FILE, "special_tokens_map.json", "added_tokens.json",
    "tokenizer.json", "tiktoken.model", "tokenizer.model", "vocab.json", "merges.txt",
)  # fmt: skip
"""What a vocabulary's folder may hold: how it is used, and the same vocabulary in the forms that other readers take."""

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The roles that tokenizer_config.json gives to tokens."""


@dataclass(frozen=True, kw_only=True)
class Companions:
    """The companion files of a vocabulary.

    Attributes:
        folder: where they were read, for messages.
        blobs: file name and content.
    """

    folder: Path
    blobs: Mapping[str, bytes]

    @staticmethod
    def read(folder: str | Path) -> Companions:
        """Read those of ``COMPANIONS`` that ``folder`` has, and the tokenizer's code where tokenizer_config.json names some.

        The code is only carried along, since readers such as vLLM want it beside the vocabulary. It is never run here.

        Raises:
            ValueError: a file that is a link out of the folder: saving would copy whatever it leads to.
        """
        folder = Path(folder)
        found = Companions(folder=folder, blobs=_present(folder, COMPANIONS))
        return Companions(folder=folder, blobs={**found.blobs, **_present(folder, found._code_files())})

    def blob(self, name: str) -> bytes:
        """The content of one of them.

        Raises:
            FileNotFoundError: the folder has none of that name.
        """
        if name not in self.blobs:
            raise FileNotFoundError(f"{self.folder}: expected a folder with {name}, found none in it")
        return self.blobs[name]

    def save(self, folder: str | Path) -> None:
        """Write the files into ``folder``, unchanged."""
        for name, blob in self.blobs.items():
            (Path(folder) / name).write_bytes(blob)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The values of tokenizer_config.json; empty where there is none."""
        return self._json(CONFIG_FILE)

    def token(self, key: str) -> str | None:
        """Spelling of a token that tokenizer_config.json names, such as ``eos_token``; None where it does not."""
        value = self.config.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{self.folder / CONFIG_FILE}: {key}: expected a token's text, got {value!r}")
        return value

    def token_id(self, key: str, ids: Mapping[str, int], vocabulary: str) -> int | None:
        """Id of that token in ``ids``; ``vocabulary`` names the file that they come from.

        Raises:
            ValueError: the vocabulary has no such token.
        """
        token = self.token(key)
        if token is not None and token not in ids:
            raise ValueError(
                f"{self.folder / CONFIG_FILE}: {key}: expected a token of {vocabulary}, got {token!r}; the two files "
                "come from different tokenizers"
            )
        return None if token is None else ids[token]

    @cached_property
    def named_tokens(self) -> dict[str, str]:
        """The tokens that tokenizer_config.json gives a role: ``bos_token`` and so on. Chat templates ask for them."""
        named = {key: self.token(key) for key in NAMED_TOKENS}
        return {key: token for key, token in named.items() if token is not None}

    def end_ids(self, vocab_size: int) -> frozenset[int]:
        """Ids that end a generation, as generation_config.json says: its ``eos_token_id``, a number or several.

        Raises:
            ValueError: something that is no id below ``vocab_size``.
        """
        value = self._json(GENERATION_FILE).get("eos_token_id")
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token in ids:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise ValueError(
                    f"{self.folder / GENERATION_FILE}: eos_token_id: expected ids in [0, {vocab_size}), got {token!r}; "
                    "the file belongs to another vocabulary"
                )
        return frozenset(ids)

    @cached_property
    def chat_template(self) -> str | None:
        """The jinja text of the folder's chat template: chat_template.jinja, else tokenizer_config.json's; or None.

        Raises:
            ValueError: a template that is no text, or several of which none is called "default".
        """
        if TEMPLATE_FILE in self.blobs:
            return _text(self.blobs[TEMPLATE_FILE], self.folder / TEMPLATE_FILE)
        value = self.config.get("chat_template")
        if isinstance(value, list):  # an older form: several templates with names
            named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
            value = named.get("default", value)
        if value is not None and not isinstance(value, str):
            raise ValueError(
                f"{self.folder / CONFIG_FILE}: chat_template: expected jinja text, or several with one named "
                f"'default', got {type(value).__name__}; put the template into {TEMPLATE_FILE}"
            )
        return value

    def _code_files(self) -> list[str]:
        named = self.config.get("auto_map")
        named = named.get("AutoTokenizer") if isinstance(named, dict) else None
        classes = [name for name in (named if isinstance(named, list) else [named]) if isinstance(name, str)]
        # Plain module names only: neither another repository ("org/name--module.Class") nor a path.
        modules = dict.fromkeys(name.partition(".")[0] for name in classes)
        return [f"{module}.py" for module in modules if re.fullmatch(r"[A-Za-z_]\w*", module, re.ASCII)]

    def _json(self, name: str) -> dict[str, Any]:
        if name not in self.blobs:
            return {}
        source = self.folder / name
        return parse_json_object(self.blobs[name], source, error=ValueError, what="restore the file")


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as readable JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def digest(blob: bytes) -> str:
    """A short name for a file's content."""
    return hashlib.sha256(blob).hexdigest()[:12]


def utf8(text: str) -> bytes:
    """``text`` in UTF-8.

    Raises:
        ValueError: a lone surrogate, which libraries would replace without a word.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: expected characters that UTF-8 can hold, got {text[error.start]!r} at position {error.start}; "
            "read the text with errors='replace'"
        ) from error


def split_special(text: str, special: Mapping[str, int]) -> list[str | int]:
    """``text`` cut at every spelling of a special token: plain runs, and the ids between them. Longer spellings win."""
    parts: list[str | int] = []
    for i, piece in enumerate(_any_of(tuple(special)).split(text)):
        if piece:
            parts.append(special[piece] if i % 2 else piece)
    return parts


def spelled_by(names: Iterable[str]) -> str:
    """A regex, without groups, that matches any of ``names``, the longest where several match; nothing for no names.

    Names that begin alike are tried together, so that a "<" in a text costs one step and not one for each of 256 names.
    """
    by_start: dict[str, list[str]] = {}
    for name in sorted(names, key=len, reverse=True):
        by_start.setdefault(name[:2], []).append(re.escape(name[2:]))
    starts = sorted(by_start, key=len, reverse=True)
    return "|".join(f"{re.escape(start)}(?:{'|'.join(by_start[start])})" for start in starts) or "(?!)"


@lru_cache(maxsize=16)
def _any_of(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"({spelled_by(names)})")


def _present(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    paths = ((name, own_file(folder, name, error=ValueError)) for name in names)
    return {name: path.read_bytes() for name, path in paths if path.is_file()}


def _text(blob: bytes, path: Path) -> str:
    try:
        return blob.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}; the file is damaged") from error
