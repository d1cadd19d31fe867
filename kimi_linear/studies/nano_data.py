"""From the texts to token files: clean, drop what was said before, keep the held-out part apart, train a vocabulary.

    folder/  train.tokens.xz  prose.tokens  code.tokens     uint16 ids, little-endian, documents back to back
             tiktoken.model and the files beside it         the vocabulary, in the release's layout
             data.json                                      sources, licences, counts

A machine that only trains needs this folder and nothing else: no tokenizer library, no archive.
"""

from __future__ import annotations

import base64
import json
import lzma
import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kimi_linear.studies.cells import write_json
from kimi_linear.studies.nano_text import Kind, Source

if TYPE_CHECKING:
    from kimi_linear.data import Corpus

VOCAB = 5120
"""All ids, the 256 reserved ones included: 16 % of the model's parameters, and 3.5 bytes of text a token instead of 1."""
RESERVED = 256
DATA_FILE, TRAIN_FILE = "data.json", "train.tokens"
KINDS: tuple[Kind, ...] = ("prose", "code")
SPLITS: tuple[str, ...] = ("train", *KINDS)

MAX_BYTES, MAX_LINE, MIN_BYTES = 400_000, 160, 200
"""Code with more bytes, longer lines on the average, or fewer bytes is data, generated, or nothing."""
SHINGLE, SAMPLE = 12, 16
"""Runs of so many words are compared; one in so many of them."""
SEEN, LEAKED = 0.5, 0.05
"""Share of known runs from which a document is a copy, and from which a training document tells of a held-out one."""


@dataclass(frozen=True, kw_only=True)
class Text:
    """One cleaned document."""

    source: str
    name: str
    kind: Kind
    held_out: bool
    text: str


@dataclass(kw_only=True)
class Tally:
    """What became of a source; bytes are of the cleaned text."""

    read: int = 0
    documents: int = 0
    train_bytes: int = 0
    held_out_bytes: int = 0
    dropped: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def clean_prose(text: str) -> str:
    """Paragraphs of one line each, verse and speeches as they were broken, plain quotation marks, one kind of dash."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")
    for old, new in (("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'"), ("\u00a0", " "), ("\t", " ")):
        text = text.replace(old, new)
    text = re.sub(r" *--+ *", "—", text)
    paragraphs = [[" ".join(line.split()) for line in p.split("\n")] for p in re.split(r"\n\s*\n", text)]
    kept = [[line for line in p if line] for p in paragraphs]
    return "\n\n".join(("\n" if _is_verse(p) else " ").join(p) for p in kept if p) + "\n"


def _is_verse(lines: list[str]) -> bool:
    """Most lines but the last far from a printed page's width: verse, lists, the names of speakers."""
    return len(lines) < 2 or sorted(map(len, lines[:-1]))[len(lines[:-1]) // 2] < 58


def clean_code(text: str) -> str:
    """Without the licence on top, which every file of a project repeats, tabs and trailing spaces."""
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n").replace("\f", "")
    lines = [line.expandtabs(4).rstrip() for line in text.split("\n")]
    top = next((i for i, line in enumerate(lines) if line and not line.startswith("#")), len(lines))
    head = "\n".join(lines[:top]).lower()
    body = lines[top:] if any(word in head for word in ("copyright", "licen", "coding", "author", "#!")) else lines
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(body)).strip("\n") + "\n"


def why_not(kind: Kind, text: str) -> str | None:
    """What is wrong with a cleaned document, in a word; None where nothing is."""
    if len(text) < MIN_BYTES:
        return "too short"
    if kind == "code":
        if len(text) > MAX_BYTES:
            return "too long"
        if len(text) > MAX_LINE * (text.count("\n") + 1):
            return "long lines"
    sample = text[:100_000]
    if sum(c.isdigit() for c in sample) > 0.2 * len(sample):
        return "numbers"
    return "not English" if sum(ord(c) > 0x2FF and c not in "—…–•" for c in sample) > 0.02 * len(sample) else None


def read_texts(sources: Iterable[tuple[Source, Path]], tallies: dict[str, Tally]) -> Iterator[Text]:
    """Every document that is worth reading, cleaned; ``tallies`` by source are filled."""
    for source, archive in sources:
        tally = tallies.setdefault(source.name, Tally())
        for name, raw in source.read(archive):
            text = clean_prose(raw) if source.kind == "prose" else clean_code(raw)
            tally.read += 1
            reason = why_not(source.kind, text)
            if reason is not None:
                tally.dropped[reason] += 1
            else:
                yield Text(
                    source=source.name, name=name, kind=source.kind, held_out=source.is_held_out(name), text=text
                )


def shingles(text: str) -> set[int]:
    """Hashes of one in ``SAMPLE`` of the runs of ``SHINGLE`` words, the same ones wherever they stand."""
    words = re.findall(r"\w+", text.lower())
    chosen = (i for i, word in enumerate(words) if zlib.crc32(word.encode() * 2) % SAMPLE == 0)
    return {hash_words(words[i : i + SHINGLE]) for i in chosen if i + SHINGLE <= len(words)}


def hash_words(words: list[str]) -> int:
    """64 bits of a run of words; the same on every machine."""
    joined = " ".join(words).encode()
    return zlib.crc32(joined) << 32 | zlib.adler32(joined)


def without_copies(texts: Iterable[Text], tallies: dict[str, Tally]) -> list[Text]:
    """Drop training documents that tell of held-out ones, then what was said before. Held-out documents come first."""
    kept: list[Text] = []
    secret: set[int] = set()
    seen: set[int] = set()
    for text in sorted(texts, key=lambda t: not t.held_out):
        tally, runs = tallies[text.source], shingles(text.text)
        size = len(runs) or 1
        if not text.held_out and len(runs & secret) / size > LEAKED:
            tally.dropped["in the held-out part"] += 1
        elif len(runs & seen) / size > SEEN:
            tally.dropped["said before"] += 1
        else:
            (secret if text.held_out else seen).update(runs)
            seen |= runs
            kept.append(text)
            tally.documents += 1
            count = len(text.text.encode())
            if text.held_out:
                tally.held_out_bytes += count
            else:
                tally.train_bytes += count
    return kept


def train_vocabulary(texts: Iterable[str], folder: Path, vocab_size: int = VOCAB) -> None:
    """Merge byte pairs of ``texts`` and write the ranks in the release's layout, with its split pattern and reserved ids."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    from kimi_linear.data.tiktoken import RANKS_FILE, SPLIT_PATTERN
    from kimi_linear.data.tokenizer_files import CONFIG_FILE

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    first = vocab_size - RESERVED
    trainer = trainers.BpeTrainer(vocab_size=first, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    byte_of = {c: i for i, c in _byte_characters().items()}
    merged = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    tokens = [bytes(byte_of[c] for c in token) for token, _ in merged if len(token) > 1]
    ranks = [*(bytes((i,)) for i in range(256)), *tokens][:first]
    if len(ranks) < first:
        raise ValueError(f"texts: expected enough for {first} tokens, got {len(ranks)}; ask for a smaller vocabulary")
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RANKS_FILE).write_text("".join(lines), encoding="ascii")
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False) | {"special": True}
    named = {0: "[BOS]", 1: "[EOS]", RESERVED - 1: "[PAD]"}
    config = {
        "added_tokens_decoder": {str(first + at): {"content": name, **flags} for at, name in named.items()},
        "bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]",
        "clean_up_tokenization_spaces": False, "tokenizer_class": "TikTokenTokenizer",
    }  # fmt: skip
    write_json(folder / CONFIG_FILE, config)


def _byte_characters() -> dict[int, str]:
    from kimi_linear.data.tokenizers import _byte_characters as characters

    return dict(enumerate(characters()))


def prepare(sources: Iterable[tuple[Source, Path]], folder: Path, *, vocab_size: int = VOCAB) -> Iterator[str]:
    """Write the data folder; yields what is being done.

    Args:
        sources: each with its archive (any path where it has none).
        folder: absent, or one made before, which is replaced.
        vocab_size: ids, the 256 reserved ones included.
    """
    from kimi_linear.data import Documents, load_tokenizer, tokenize

    sources = list(sources)
    tallies: dict[str, Tally] = {}
    yield f"reading and cleaning {len(sources)} sources"
    texts = list(read_texts(sources, tallies))
    yield f"looking for copies in {len(texts):,} documents"
    kept = without_copies(texts, tallies)
    train = [t for t in kept if not t.held_out]
    yield f"training {vocab_size:,} tokens on {len(train):,} documents"
    folder.mkdir(parents=True, exist_ok=True)
    # Prose is the smaller part: all of it, and as much code again, so that words are no worse off than identifiers.
    train_vocabulary(vocabulary_texts(train), folder, vocab_size)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    counts: dict[str, dict[str, int]] = {}
    for split in SPLITS:
        chosen = [t for t in kept if (t.held_out and t.kind == split) or (not t.held_out and split == "train")]
        yield f"tokenising {split}: {len(chosen):,} documents"
        documents = Documents(names=tuple(f"{t.source}/{t.name}" for t in chosen), texts=tuple(t.text for t in chosen))
        tokens = tokenize(documents, tokenizer).tokens.numpy().astype("<u2")
        _write(folder / f"{split}.tokens", tokens.tobytes(), compress=split == "train")
        size = sum(len(t.text.encode()) for t in chosen)
        counts[split] = {"documents": len(chosen), "bytes": size, "tokens": len(tokens)}
        if split == "train":
            counts[split] |= _prose_part(chosen, tokens, tokenizer.eos_id)
    listed = [_listed(source, tallies[source.name]) for source, _ in sources]
    about = {"vocab_size": vocab_size, "eos_id": tokenizer.eos_id, "splits": counts, "sources": listed}
    write_json(folder / DATA_FILE, about)
    yield f"wrote {folder}"


def vocabulary_texts(train: list[Text]) -> list[str]:
    """All prose and about as many bytes of code, evenly taken, in pieces that the library can share out."""
    prose = [t.text for t in train if t.kind == "prose"]
    code = [t.text for t in train if t.kind == "code"]
    every = max(1, round(sum(map(len, code)) / max(1, sum(map(len, prose)))))
    return [*prose, *code[::every]]


def _prose_part(train: list[Text], tokens: np.ndarray, eos_id: int | None) -> dict[str, int]:
    """How much of the training text is prose. The sources of prose come first, so it is one piece at the beginning."""
    prose = [t for t in train if t.kind == "prose"]
    assert train[: len(prose)] == prose
    ends = np.flatnonzero(tokens == eos_id)[: len(prose)] + 1
    return {"prose_bytes": sum(len(t.text.encode()) for t in prose), "prose_tokens": int(ends[-1]) if len(ends) else 0}


def _listed(source: Source, tally: Tally) -> dict[str, Any]:
    values = {name: getattr(source, name) for name in ("name", "kind", "licence", "evidence", "get")}
    return {**values, "held_out": list(source.held_out), **vars(tally), "dropped": dict(tally.dropped)}


def _write(path: Path, blob: bytes, *, compress: bool) -> None:
    if compress:
        path.with_name(path.name + ".xz").write_bytes(lzma.compress(blob, preset=6))
    else:
        path.write_bytes(blob)


def read_about(folder: Path) -> dict[str, Any]:
    """data.json of a folder that ``prepare`` wrote.

    Raises:
        FileNotFoundError: there is none.
    """
    path = folder / DATA_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder}: expected {DATA_FILE} and token files, found none; make them with: kimi-linear study nano --part "
            "prepare, on a machine with the sources"
        )
    return json.loads(path.read_text(encoding="utf-8"))


def read_corpus(folder: Path, split: str, *, prose_times: int = 1) -> Corpus:
    """The tokens of "train", "prose" or "code". Held-out text is memory-mapped; training text is unpacked in memory.

    ``prose_times`` puts the prose of the training text so many times beside the code, so that a pass reads it as often.
    """
    import torch

    from kimi_linear.data import Corpus

    path = folder / f"{split}.tokens"
    if split == "train":
        blob = bytearray(lzma.decompress(path.with_name(path.name + ".xz").read_bytes()))
        array = np.frombuffer(blob, dtype="<u2")
        if prose_times > 1:
            prose = array[: read_about(folder)["splits"]["train"]["prose_tokens"]]
            array = np.concatenate([*[prose] * (prose_times - 1), array])
    else:
        # Copy on write: torch wants memory that it may write to, and the file stays as it is.
        array = np.memmap(path, dtype="<u2", mode="c")
    tokens = torch.from_numpy(array)
    return Corpus(tokens=tokens, offsets=torch.tensor([0, tokens.numel()]), names=(split,))
