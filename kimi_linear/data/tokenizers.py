"""Text to token ids and back: bytes (needs nothing), the release's ranks, or any ``tokenizer.json``.

A tokenizer saves itself into a model folder in files that transformers and vLLM read, and is found there again. In all
of them text is only text: a control token spelled out in it stays the characters that it is made of, unless asked for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kimi_linear.data.text_stream import UNKNOWN, ByteStream, FallbackStream, StreamDecoder, WindowStream
from kimi_linear.data.tiktoken import RANKS_FILE, TiktokenTokenizer
from kimi_linear.data.tokenizer_files import (
    CONFIG_FILE,
    TEMPLATE_FILE,
    Companions,
    digest,
    split_special,
    utf8,
    write_json,
)

END_OF_TEXT = "<|endoftext|>"
"""How the byte tokenizer spells the end of a document."""

_MODEL_FILE = "tokenizer.json"
_MARKER = "kimi_linear_tokenizer"


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

    @property
    def end_ids(self) -> frozenset[int]:
        """Ids after which a generation is over: ``eos_id``, and those of the folder's generation_config.json."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, int]:
        """Control tokens by spelling: those that text alone never becomes."""
        ...

    @property
    def named_tokens(self) -> Mapping[str, str]:
        """Spellings of the tokens with a role, such as ``bos_token``; chat templates ask for them."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The jinja text that turns messages into text, or None where the folder has none."""
        ...

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``; no token is added at either end. With ``special``, spelled-out control tokens become those."""
        ...

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of plain texts and the control ids between them."""
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

    Text is only text: the characters ``<|endoftext|>`` in it encode to their 13 bytes, not to id 256.

    >>> ByteTokenizer().encode("né")
    [110, 195, 169]
    """

    name = "bytes"
    vocab_size = 257
    eos_id: int | None = 256
    end_ids = frozenset({256})
    special_tokens: Mapping[str, int] = {END_OF_TEXT: 256}
    named_tokens: Mapping[str, str] = {"eos_token": END_OF_TEXT}

    def __init__(self, *, chat_template: str | None = None) -> None:
        """``chat_template`` is the jinja text of a model that chats in bytes."""
        self.chat_template = chat_template

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Bytes of ``text``. Raises ``ValueError`` for text that UTF-8 cannot hold (lone surrogates)."""
        return self.encode_parts(split_special(text, self.special_tokens)) if special else list(utf8(text))

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Bytes of the texts, and the ids between them."""
        return [i for part in parts for i in ([part] if isinstance(part, int) else utf8(part))]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Bytes of each text as an int32 array."""
        return [np.frombuffer(utf8(text), dtype=np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``: 256 as ``<|endoftext|>``; broken UTF-8 and ids that are not in the vocabulary as U+FFFD."""
        decoder = self.decoder()
        return "".join([decoder.push(token) for token in ids]) + decoder.finish()

    def decoder(self) -> StreamDecoder:
        """A fresh streaming decoder."""
        return ByteStream(_byte_meaning)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` (a byte-level BPE without merges), ``tokenizer_config.json``, and the chat template."""
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
        write_json(Path(folder) / _MODEL_FILE, model)
        write_json(Path(folder) / CONFIG_FILE, config)
        if self.chat_template is not None:
            (Path(folder) / TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8", newline="")


def _byte_meaning(token: int) -> bytes | str | None:
    if 0 <= token < 256:
        return bytes((token,))
    return END_OF_TEXT if token == ByteTokenizer.eos_id else None


class HFTokenizer:
    """A ``tokenizer.json``, read by the tokenizers library (``pip install 'kimi-linear[hf]'``).

    Text is only text: tokens marked special that are spelled out in it are encoded as the characters that they are made
    of, unless ``special=True`` asks for them. Other added tokens are words like any other.
    """

    def __init__(self, tokenizer: Any, companions: Companions) -> None:
        """Wrap a ``tokenizers.Tokenizer``. ``companions`` are the files it came from, which ``save`` writes back."""
        self._tokenizer = tokenizer
        self._companions = companions
        # Whether spelled-out special tokens count is a switch on the library's object; threads must not share it.
        self._switch = threading.Lock()
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self.name = f"hf-{digest(companions.blob(_MODEL_FILE))}"
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        self.eos_id = companions.token_id("eos_token", vocabulary, _MODEL_FILE)
        self.end_ids = companions.end_ids(self.vocab_size) | ({self.eos_id} if self.eos_id is not None else set())
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        falls_back = b"ByteFallback" in tokenizer.decoder.__getstate__() if tokenizer.decoder is not None else False
        spelled = {f"<0x{byte:02X}>": bytes((byte,)) for byte in range(256)} if falls_back else {}
        self._bytes = {vocabulary[name]: byte for name, byte in spelled.items() if name in vocabulary}
        self.named_tokens = companions.named_tokens
        self.chat_template = companions.chat_template

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
        companions = Companions.read(folder)
        blob = companions.blob(_MODEL_FILE)
        try:
            backend = Backend.from_str(blob.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for a file it cannot parse
            raise ValueError(
                f"{folder / _MODEL_FILE}: expected a tokenizer.json of the tokenizers library, got a file that it "
                f"cannot read ({error}); download the file again"
            ) from error
        return HFTokenizer(backend, companions)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of ``text``, without tokens added at either end. With ``special``, spelled-out control tokens become those.

        Raises:
            ValueError: characters that UTF-8 cannot hold (lone surrogates).
        """
        utf8(text)
        with self._switch:
            self._tokenizer.encode_special_tokens = not special
            return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Ids of plain texts and the control ids between them."""
        parts = list(parts)
        spelled = "".join([part if isinstance(part, str) else self._tokenizer.id_to_token(part) for part in parts])
        # As one text wherever that says the same: some vocabularies put a space in front of the first word of a text.
        if split_special(spelled, self.special_tokens) == parts:
            return self.encode(spelled, special=True)
        return [i for part in parts for i in ([part] if isinstance(part, int) else self.encode(part))]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as an int32 array, encoded in parallel."""
        for text in texts:
            utf8(text)
        with self._switch:
            self._tokenizer.encode_special_tokens = True
            encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, special tokens spelled out; an id that is not in the vocabulary becomes U+FFFD."""
        if self._bytes:
            decoder = self.decoder()
            return "".join([decoder.push(token) for token in ids]) + decoder.finish()
        # The library drops unknown ids without a word, so the text is decoded in the runs between them.
        pieces: list[str] = []
        run: list[int] = []
        for token in ids:
            if self._meaning(token) is not None:
                run.append(token)
            else:
                pieces += [self._decode_run(run), UNKNOWN]
                run = []
        return "".join([*pieces, self._decode_run(run)])

    def decoder(self) -> StreamDecoder:
        """A fresh streaming decoder."""
        return FallbackStream(self._decode_run, self._meaning) if self._bytes else WindowStream(self.decode)

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and the files that were beside it, byte for byte."""
        self._companions.save(folder)

    def _meaning(self, token: int) -> bytes | str | None:
        known = token >= 0 and self._tokenizer.id_to_token(token) is not None
        return self._bytes.get(token, "") if known else None

    def _decode_run(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False) if ids else ""


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer saved in a model folder, or None where the folder has none.

    A ``tokenizer.json`` is taken before ``tiktoken.model`` where a folder has both.

    Raises:
        ValueError: a tokenizer file is broken, or of a kind that cannot be read. ImportError: a library is missing.
    """
    folder = Path(folder)
    companions = Companions.read(folder)
    kind = companions.config.get(_MARKER)
    if kind == ByteTokenizer.name:
        return ByteTokenizer(chat_template=companions.chat_template)
    if kind is not None:
        raise ValueError(
            f"{folder / CONFIG_FILE}: {_MARKER}: expected {ByteTokenizer.name!r}, got {kind!r}; is it a newer version's?"
        )
    if _MODEL_FILE in companions.blobs:
        return HFTokenizer.load(folder)
    if RANKS_FILE in companions.blobs:
        return TiktokenTokenizer.load(folder)
    return None


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE files write for each byte: itself where printable, else from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
