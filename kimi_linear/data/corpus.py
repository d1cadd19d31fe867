"""Documents on disk as one run of token ids: files, folders, and the Python standard library that is always there."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kimi_linear.data.tokenizers import Tokenizer

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
"""What a folder is searched for unless told otherwise."""

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Texts and what was not read.

    Attributes:
        names: one per document: its path below the folder, with ``/``.
        texts: one per document.
        left_out: documents that the byte budget had no room for.
        unreadable: names of files that are not UTF-8 text and were skipped.
    """

    names: tuple[str, ...]
    texts: tuple[str, ...]
    left_out: int = 0
    unreadable: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Tokenised documents back to back.

    Attributes:
        tokens: [total] uint16 where the vocabulary allows it, else int32. Each document ends with the tokenizer's
            ``eos_id`` where it has one.
        offsets: [documents + 1] int64, where each document begins, and the end.
        names: one per document.
    """

    tokens: Tensor
    offsets: Tensor
    names: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return self.tokens.numel()

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any token, document boundary or name."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.tokens.numpy(), self.offsets.numpy()):
            digest.update(part.data.cast("B") if part.size else b"")
            digest.update(str(part.dtype).encode())
        digest.update("\0".join(self.names).encode())
        return digest.hexdigest()

    def gather(self, places: Tensor) -> Tensor:
        """int64 tokens at the given places, in their shape."""
        # Through numpy, since torch's own indexing of uint16 is recent.
        return torch.from_numpy(self.tokens.numpy()[places.numpy()].astype(np.int64))

    def document(self, index: int) -> Tensor:
        """[length] int64 tokens of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]].long()

    def split(self, validation: float = 0.05) -> tuple[Corpus, Corpus]:
        """(training, validation) by the hash of each document's name.

        A document keeps its side when others come or go. Where the hash leaves a side empty, as it may with few
        documents, the last ``validation`` share of every document's tokens is held out instead.

        Args:
            validation: share of the documents to hold out, in (0, 1).
        """
        if not 0 < validation < 1:
            raise ValueError(f"validation: expected a share in (0, 1), got {validation}")
        held_out = [_place(name) < validation for name in self.names]
        spans = [(int(a), int(b)) for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]
        if all(held_out) or not any(held_out):
            cuts = [b - round((b - a) * validation) for a, b in spans]
            train = [(a, cut) for (a, _), cut in zip(spans, cuts, strict=True)]
            rest = [(cut, b) for (_, b), cut in zip(spans, cuts, strict=True)]
            return self._select(train, self.names), self._select(rest, self.names)
        sides = []
        for side in (False, True):
            chosen = [i for i, out in enumerate(held_out) if out is side]
            sides.append(self._select([spans[i] for i in chosen], [self.names[i] for i in chosen]))
        return sides[0], sides[1]

    def _select(self, spans: list[tuple[int, int]], names: Sequence[str]) -> Corpus:
        kept = [(span, name) for span, name in zip(spans, names, strict=True) if span[1] > span[0]]
        arrays = [self.tokens[a:b].numpy() for (a, b), _ in kept]
        return _corpus(arrays, [name for _, name in kept], self.tokens.numpy().dtype)


def read_documents(
    path: str | Path,
    *,
    suffixes: Sequence[str] = TEXT_SUFFIXES,
    max_bytes: int | None = None,
    skip_unreadable: bool = False,
) -> Documents:
    """One text file, or every file below a folder with one of ``suffixes``, sorted by name; UTF-8.

    Args:
        path: a file, whatever its suffix, or a folder.
        suffixes: which files of a folder are documents, such as ``(".txt",)``.
        max_bytes: budget. Documents are chosen by the hash of their names until it is used up, and the last one is
            cut; so a budget takes a sample of the folder, not its beginning.
        skip_unreadable: leave out files that are not UTF-8 and report them; else they are an error.

    Raises:
        FileNotFoundError: there is no such path, or no document below it. ValueError: a file is not UTF-8 text.
    """
    path = Path(path)
    if path.is_file():
        return _read(path.parent, [path.name], max_bytes, skip_unreadable)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a text file or a folder of them, got nothing there")
    names = _files(path, tuple(suffixes), skip=set())
    if not names:
        raise FileNotFoundError(
            f"{path}: expected files ending in {', '.join(suffixes)}, got none in the folder; name other suffixes"
        )
    return _read(path, names, max_bytes, skip_unreadable)


def stdlib_source(*, max_bytes: int | None = None) -> Documents:
    """The source of the running Python's standard library: about 12 MB of code on every machine, no download.

    Tests and installed packages are left out. The same Python version gives the same documents.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = _files(root, (".py",), skip=_NOT_LIBRARY)
    if not names:
        raise FileNotFoundError(
            f"{root}: expected the standard library's .py files, got none; is it a zipped or stripped Python? "
            "Name a folder of text instead"
        )
    return _read(root, names, max_bytes, skip_unreadable=True)


def tokenize(documents: Documents, tokenizer: Tokenizer) -> Corpus:
    """Encode every document and end each with ``eos_id`` where the tokenizer has one. Empty documents are kept."""
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    end = [] if tokenizer.eos_id is None else [np.array([tokenizer.eos_id], dtype=dtype)]
    arrays = [np.concatenate([ids.astype(dtype), *end]) for ids in tokenizer.encode_all(documents.texts)]
    return _corpus(arrays, documents.names, dtype)


def _corpus(arrays: Sequence[np.ndarray], names: Sequence[str], dtype: np.dtype) -> Corpus:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    tokens = np.concatenate([np.empty(0, dtype=dtype), *arrays])
    return Corpus(tokens=torch.from_numpy(tokens), offsets=torch.from_numpy(offsets), names=tuple(names))


def _files(root: Path, suffixes: tuple[str, ...], skip: set[str]) -> list[str]:
    """Sorted names below ``root``; hidden folders are not entered."""
    found: list[str] = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip and not name.startswith(".")]
        base = Path(folder).relative_to(root)
        found += [(base / name).as_posix() for name in files if name.endswith(suffixes)]
    return sorted(found)


def _read(root: Path, names: list[str], max_bytes: int | None, skip_unreadable: bool) -> Documents:
    texts: dict[str, str] = {}
    unreadable: list[str] = []
    room = max_bytes
    for name in names if max_bytes is None else sorted(names, key=_place):
        if room is not None and room <= 0:
            break
        blob = (root / name).read_bytes()
        try:
            text = blob.decode("utf-8")
        except UnicodeDecodeError as error:
            if not skip_unreadable:
                raise ValueError(
                    f"{root / name}: expected UTF-8 text, got byte 0x{blob[error.start]:02x} at {error.start}; convert "
                    "the file, choose other suffixes, or skip such files"
                ) from error
            unreadable.append(name)
            continue
        if room is not None:
            if len(blob) > room:
                # A cut inside a character leaves at most three bytes, which go.
                text = blob[:room].decode("utf-8", errors="ignore")
            room -= len(blob)
        texts[name] = text
    kept = sorted(texts)
    return Documents(
        names=tuple(kept),
        texts=tuple(texts[name] for name in kept),
        left_out=len(names) - len(kept) - len(unreadable),
        unreadable=tuple(sorted(unreadable)),
    )


def _place(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") / 2.0**64
