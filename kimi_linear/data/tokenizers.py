"""Text to token ids and back: bytes (needs nothing), or any ``tokenizer.json`` through the tokenizers library.

A tokenizer saves itself into a model folder in files that transformers and vLLM read, and is found there again.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

END_OF_TEXT = "<|endoftext|>"
"""How the byte tokenizer spells the end of a document."""

UNKNOWN = "\N{REPLACEMENT CHARACTER}"
"""What an id or byte sequence that means nothing decodes to."""

_CONFIG_FILE = "tokenizer_config.json"
_MODEL_FILE = "tokenizer.json"
_COMPANIONS = (_CONFIG_FILE, "special_tokens_map.json", "chat_template.jinja")
_MARKER = "kimi_linear_tokenizer"
# An incomplete UTF-8 character is at most three bytes, and some decoders write one U+FFFD for each of them.
_MAX_PENDING = 3


class StreamDecoder(Protocol):
    """Turns ids into text one at a time. The pieces joined are ``decode`` of all the ids."""

    def push(self, token: int) -> str:
        """Text that ``token`` completes; empty while a character is incomplete."""
        ...

    def finish(self) -> str:
        """Text held back: U+FFFD for a character that was never completed, else empty."""
        ...


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of the package needs of a tokenizer."""

    @property
    def name(self) -> str:
        """Identifies the vocabulary in fingerprints and logs."""
        ...

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def eos_id(self) -> int | None:
        """Id that ends a document, or None where the vocabulary has none."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``; no token is added at either end."""
        ...

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as an int32 array, the fast way."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``; an id without a meaning becomes U+FFFD."""
        ...

    def decoder(self) -> StreamDecoder:
        """A fresh streaming decoder that never splits a character."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into ``folder``, which exists."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of UTF-8 text; 256 ends a document.

    Text is only text: the characters ``<|endoftext|>`` in it encode to their 13 bytes, never to id 256.

    >>> ByteTokenizer().encode("né")
    [110, 195, 169]
    """

    name = "bytes"
    vocab_size = 257
    eos_id: int | None = 256

    def encode(self, text: str) -> list[int]:
        """Bytes of ``text``. Raises ``ValueError`` for text that UTF-8 cannot hold (lone surrogates)."""
        return list(_utf8(text))

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Bytes of each text as an int32 array."""
        return [np.frombuffer(_utf8(text), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``: 256 as ``<|endoftext|>``; broken UTF-8 and ids that are not in the vocabulary as U+FFFD."""
        decoder = self.decoder()
        return "".join([decoder.push(token) for token in ids]) + decoder.finish()

    def decoder(self) -> StreamDecoder:
        """A fresh streaming decoder."""
        return _ByteStream()

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` (a byte-level BPE without merges) and ``tokenizer_config.json``."""
        vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
        special = {"id": 256, "content": END_OF_TEXT, "special": True} | dict.fromkeys(
            ("single_word", "lstrip", "rstrip", "normalized"), False
        )
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        model = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [special],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        }
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, _MARKER: self.name}
        _write_json(Path(folder) / _MODEL_FILE, model)
        _write_json(Path(folder) / _CONFIG_FILE, config)


class _ByteStream:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        if 0 <= token < 256:
            return self._utf8.decode(bytes((token,)))
        return self.finish() + (END_OF_TEXT if token == ByteTokenizer.eos_id else UNKNOWN)

    def finish(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class HFTokenizer:
    """A ``tokenizer.json``, read by the tokenizers library (``pip install 'kimi-linear[hf]'``).

    Special tokens spelled out in a text are encoded as those tokens, which chat templates rely on.
    """

    def __init__(self, tokenizer: Any, *, name: str, eos_id: int | None, companions: dict[str, bytes] | None = None):
        """Wrap a ``tokenizers.Tokenizer``. ``companions`` are files that ``save`` writes beside tokenizer.json."""
        self._tokenizer = tokenizer
        self._companions = dict(companions or {})
        self.name = name
        self.eos_id = eos_id
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @staticmethod
    def load(folder: str | Path) -> HFTokenizer:
        """Read ``tokenizer.json`` and its companions from a folder.

        Raises:
            ImportError: the tokenizers library is missing. ValueError: a file is broken or names an unknown token.
        """
        folder = Path(folder)
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as error:
            raise ImportError(
                f"{folder / _MODEL_FILE}: needs the tokenizers library, which is not installed; "
                "install the extra with: pip install 'kimi-linear[hf]'"
            ) from error
        blob = _read(folder / _MODEL_FILE)
        try:
            backend = Backend.from_str(blob.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for a file it cannot parse
            raise ValueError(
                f"{folder / _MODEL_FILE}: expected a tokenizer.json of the tokenizers library, got a file that it "
                f"cannot read ({error}); download the file again"
            ) from error
        companions = {name: _read(folder / name) for name in _COMPANIONS if (folder / name).exists()}
        eos = _special_token(companions.get(_CONFIG_FILE), "eos_token", folder / _CONFIG_FILE)
        eos_id = None if eos is None else backend.token_to_id(eos)
        if eos is not None and eos_id is None:
            raise ValueError(
                f"{folder / _CONFIG_FILE}: eos_token: expected a token of {_MODEL_FILE}, got {eos!r}; the two files "
                "come from different tokenizers"
            )
        return HFTokenizer(backend, name=f"hf-{_digest(blob)}", eos_id=eos_id, companions=companions)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without tokens added at either end."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as an int32 array, encoded in parallel."""
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, special tokens spelled out; an id that is not in the vocabulary becomes U+FFFD."""
        # The library drops unknown ids without a word, so the text is decoded in the runs between them.
        pieces: list[str] = []
        run: list[int] = []
        for token in ids:
            if token >= 0 and self._tokenizer.id_to_token(token) is not None:
                run.append(token)
            else:
                pieces += [self._decode_run(run), UNKNOWN]
                run = []
        return "".join([*pieces, self._decode_run(run)])

    def decoder(self) -> StreamDecoder:
        """A fresh streaming decoder."""
        return _WindowStream(self)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and the companion files that were loaded with it, unchanged."""
        (Path(folder) / _MODEL_FILE).write_text(self._tokenizer.to_str(), encoding="utf-8")
        for name, blob in self._companions.items():
            (Path(folder) / name).write_bytes(blob)

    def _decode_run(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""


class _WindowStream:
    """Decodes a short window of ids again at every step, since the text of an id depends on the ids before it."""

    def __init__(self, tokenizer: HFTokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._emitted = 0  # characters of the window's text that were handed out

    def push(self, token: int) -> str:
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        held = min(len(text) - len(text.rstrip(UNKNOWN)), _MAX_PENDING)
        piece = text[self._emitted : len(text) - held]
        self._emitted = max(self._emitted, len(text) - held)
        # Long enough a window to fix how its last ids read: cut it where nothing is pending.
        if held == 0 and len(self._window) >= 16:
            self._window = self._window[-8:]
            self._emitted = len(self._tokenizer.decode(self._window))
        return piece

    def finish(self) -> str:
        piece = self._tokenizer.decode(self._window)[self._emitted :]
        self._window, self._emitted = [], 0
        return piece


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer saved in a model folder, or None where the folder has none.

    Raises:
        ValueError: a tokenizer file is broken, or of a kind that cannot be read. ImportError: a library is missing.
    """
    folder = Path(folder)
    config = folder / _CONFIG_FILE
    kind = _special_token(_read(config), _MARKER, config) if config.exists() else None
    if kind == ByteTokenizer.name:
        return ByteTokenizer()
    if kind is not None:
        raise ValueError(
            f"{config}: {_MARKER}: expected {ByteTokenizer.name!r}, got {kind!r}; is it a newer version's?"
        )
    if (folder / _MODEL_FILE).exists():
        return HFTokenizer.load(folder)
    if (folder / "tiktoken.model").exists():
        raise ValueError(
            f"{folder / 'tiktoken.model'}: expected {_MODEL_FILE}, got a tiktoken vocabulary, which is not read yet; "
            f"put a {_MODEL_FILE} made from it (transformers converts it) into the folder"
        )
    return None


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text: expected characters that UTF-8 can hold, got {text[error.start]!r} at position {error.start}; "
            "read the text with errors='replace'"
        ) from error


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE files write for each byte: itself where printable, else from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def _special_token(blob: bytes | None, key: str, path: Path) -> str | None:
    if blob is None:
        return None
    try:
        values = json.loads(blob)
    except ValueError as error:
        raise ValueError(
            f"{path}: expected JSON, got a file that does not parse ({error}); restore the file"
        ) from error
    token = values.get(key) if isinstance(values, dict) else None
    return token.get("content") if isinstance(token, dict) else token


def _read(path: Path) -> bytes:
    return path.read_bytes()


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _digest(blob: bytes) -> str:
    import hashlib

    return hashlib.sha256(blob).hexdigest()[:12]
