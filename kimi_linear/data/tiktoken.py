"""The release's vocabulary: ``tiktoken.model``, one rank a line, and 256 reserved ids after the ranks.

A reserved id is named by ``added_tokens_decoder`` in tokenizer_config.json, or else ``<|reserved_token_ID|>``. Source: the
released tokenizer's files and the split pattern of its model family.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from kimi_linear.data.text_stream import ByteStream, StreamDecoder
from kimi_linear.data.tokenizer_files import CONFIG_FILE, Companions, digest, split_special, utf8

RANKS_FILE = "tiktoken.model"
RESERVED = 256
"""Ids after the ranks, for control tokens."""

_NOT_HAN = r"&&[^\p{Han}]]"
_UPPER, _LOWER = rf"[\p{{Lu}}\p{{Lt}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}", rf"[\p{{Ll}}\p{{Lm}}\p{{Lo}}\p{{M}}{_NOT_HAN}"
_BEFORE, _CONTRACTION = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
SPLIT_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        f"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTION}",
        f"{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""How text is cut before merging, in tiktoken's regex dialect: Han runs apart, numbers in threes, words with their space."""

# The release cuts long inputs before merging, so equal ids need equal cuts: every 400,000 characters, and every 25,000
# within a run of only spaces or only non-spaces.
_PIECE, _RUN = 400_000, 25_000
_LONG_RUN = re.compile(rf"\S{{{_RUN + 1},}}|\s{{{_RUN + 1},}}")


class TiktokenTokenizer:
    """The vocabulary of the released checkpoints, merged by the tiktoken library.

    Text is only text: a reserved token spelled out in it is encoded as the characters that it is made of, unless
    ``special=True`` asks for it. That holds for all 256, also those that the files do not mark special: the marks of a
    tool call are among them.
    """

    def __init__(
        self, encoding: Any, *, tokens: Iterable[bytes], special: Mapping[str, int], companions: Companions
    ) -> None:
        """Wrap a ``tiktoken.Encoding``; ``load`` makes one from a folder.

        Args:
            encoding: with the ranks.
            tokens: the bytes of each rank, in order.
            special: the reserved tokens by spelling.
            companions: the files it came from, which ``save`` writes back.
        """
        self._encoding, self._companions = encoding, companions
        self._bytes: list[bytes] = list(tokens)
        self.special_tokens = dict(special)
        self._spellings = {token: text for text, token in special.items()}
        self.name = f"tiktoken-{digest(companions.blob(RANKS_FILE))}"
        self.vocab_size = len(self._bytes) + len(special)
        self.eos_id = companions.token_id("eos_token", special, "added_tokens_decoder")
        self.end_ids = companions.end_ids(self.vocab_size) | ({self.eos_id} if self.eos_id is not None else set())
        self.named_tokens = companions.named_tokens
        self.chat_template = companions.chat_template

    @staticmethod
    def load(folder: str | Path) -> TiktokenTokenizer:
        """Read ``tiktoken.model`` and the files beside it.

        Raises:
            ImportError: the tiktoken library is missing. ValueError: a file is broken, or the files contradict each other.
        """
        folder = Path(folder)
        path = folder / RANKS_FILE
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(
                f"{path}: needs the tiktoken library, which is not installed; install it with: pip install tiktoken"
            ) from error
        companions = Companions.read(folder)
        ranks = _ranks(companions.blob(RANKS_FILE), path)
        special = _reserved_tokens(companions, first=len(ranks))
        encoding = tiktoken.Encoding(
            name=path.name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        return TiktokenTokenizer(encoding, tokens=ranks, special=special, companions=companions)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``. With ``special``, spelled-out control tokens become those tokens.

        Raises:
            ValueError: characters that UTF-8 cannot hold (lone surrogates).
        """
        return self.encode_parts(split_special(text, self.special_tokens)) if special else self._encode(text)

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of plain texts and the control ids between them; no text is merged across a control id."""
        return [i for part in parts for i in ([part] if isinstance(part, int) else self._encode(part))]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as an int32 array, encoded in parallel."""
        with ThreadPoolExecutor() as pool:
            return [np.asarray(ids, dtype=np.int32) for ids in pool.map(self._encode, texts)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``: control tokens spelled out; broken UTF-8 and ids that are not in the vocabulary as U+FFFD."""
        decoder = self.decoder()
        return "".join([decoder.push(token) for token in ids]) + decoder.finish()

    def decoder(self) -> StreamDecoder:
        """A fresh streaming decoder."""
        return ByteStream(self._meaning)

    def save(self, folder: str | Path) -> None:
        """Write ``tiktoken.model`` and the files that were beside it, byte for byte."""
        self._companions.save(folder)

    def _encode(self, text: str) -> list[int]:
        utf8(text)  # the library would replace lone surrogates without a word
        return [i for piece in _pieces(text) for i in self._encoding.encode_ordinary(piece)]

    def _meaning(self, token: int) -> bytes | str | None:
        if 0 <= token < len(self._bytes):
            return self._bytes[token]
        return self._spellings.get(token)


def _pieces(text: str) -> list[str]:
    """``text`` cut where the release cuts it."""
    parts = [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]
    pieces: list[str] = []
    for part in parts:
        cuts = [at for run in _LONG_RUN.finditer(part) for at in range(run.start() + _RUN, run.end(), _RUN)]
        pieces += [part[a:b] for a, b in zip([0, *cuts], [*cuts, len(part)], strict=True)]
    return pieces


def _ranks(blob: bytes, path: Path) -> dict[bytes, int]:
    """Token bytes and ranks; the library crashes on what this refuses."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(blob.splitlines(), 1):
        try:
            encoded, rank = line.split()
            token, at = base64.b64decode(encoded, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{path}, line {number}: expected base64 text, a space and a rank, got {line[:60]!r}; restore the file"
            ) from error
        if at != len(ranks) or not token or token in ranks:
            why = "the token came before" if token in ranks else "no token" if not token else f"rank {at}"
            raise ValueError(
                f"{path}, line {number}: expected a new token with rank {len(ranks)}, got {why}; restore the file"
            )
        ranks[token] = at
    missing = [byte for byte in range(256) if bytes((byte,)) not in ranks]
    if missing:
        raise ValueError(
            f"{path}: expected a token for each of the 256 bytes, got none for byte {missing[0]} "
            f"({len(missing)} are missing); the file is cut off or no vocabulary"
        )
    return ranks


def _reserved_tokens(companions: Companions, *, first: int) -> dict[str, int]:
    """Spelling and id of the ``RESERVED`` ids from ``first`` on."""
    where = f"{companions.folder / CONFIG_FILE}: added_tokens_decoder"
    listed = companions.config.get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise ValueError(f"{where}: expected an object of ids and tokens, got {type(listed).__name__}")
    names = {token: f"<|reserved_token_{token}|>" for token in range(first, first + RESERVED)}
    for key, entry in listed.items():
        if not (key.isascii() and key.isdigit() and int(key) in names):
            raise ValueError(
                f"{where}: expected ids in [{first}, {first + RESERVED}), the {RESERVED} after the ranks of "
                f"{RANKS_FILE}, got {key!r}; the two files come from different tokenizers"
            )
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content:
            raise ValueError(f"{where}.{key}: expected an object with the token's text in 'content', got {entry!r}")
        names[int(key)] = content
    special = {name: token for token, name in names.items()}
    if len(special) != RESERVED:
        twice = next(name for token, name in names.items() if special[name] != token)
        raise ValueError(f"{where}: expected a different text for each id, got {twice!r} twice")
    return special
