"""Batches: what one training step reads, cut from a corpus or made by a task, in an order that resumes exactly.

Two ways to cut a corpus:

- ``"packed"``: one row of documents back to back with ``cu_seqlens``; no document sees another.
- ``"rows"``: B rows of T tokens cut out of the run of all documents, which see each other across their boundary.
  Every row has the same length, which is the fastest form for a small model on a CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from kimi_linear.data.batch import IGNORE, Batch
from kimi_linear.data.corpus import Corpus
from kimi_linear.data.synthetic import Task

Packing: TypeAlias = Literal["packed", "rows"]
"""Documents back to back with ``cu_seqlens``, or rows of equal length cut from the stream."""


class BatchStream(Protocol):
    """An endless stream of batches whose place can be saved and taken up again."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors that say where the stream stands."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where ``state`` was taken. Raises ``ValueError`` where it belongs to other data."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a stream stands: which epoch, which of its units comes next, how much of that unit was used."""

    epoch: int = 0
    unit: int = 0
    offset: int = 0


class CorpusStream:
    """Batches of a corpus, shuffled anew in every epoch; within one epoch each token is read exactly once.

    What is shuffled are units of at most ``sequence_length`` tokens: pieces of documents (packed) or rows. So one
    batch holds text from many documents, however long each of them is.
    """

    def __init__(
        self, corpus: Corpus, *, batch_size: int, sequence_length: int, packing: Packing = "packed", seed: int = 0
    ) -> None:
        """Args:
            corpus: the tokens.
            batch_size: B rows; a packed batch has ``batch_size * sequence_length`` tokens in its one row.
            sequence_length: T of a row; the longest sequence of a packed batch.
            packing: how the corpus is cut.
            seed: of the order; the same seed gives the same batches on every machine.

        Raises:
            ValueError: a size below one, an unknown packing, or an empty corpus.
        """  # fmt: skip
        if batch_size < 1 or sequence_length < 1:
            raise ValueError(
                f"batch_size, sequence_length: expected at least 1, got {batch_size} and {sequence_length}"
            )
        if packing not in ("packed", "rows"):
            raise ValueError(f"packing: expected 'packed' or 'rows', got {packing!r}")
        if corpus.num_tokens == 0:
            raise ValueError("corpus: expected at least one token, got none; is the folder or its suffix right?")
        self.corpus, self.batch_size, self.sequence_length = corpus, batch_size, sequence_length
        self.packing: Packing = packing
        self.seed = seed
        self._place = _Place()
        self._epoch_units: tuple[int, Tensor] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self.packing == "rows":
            units = [self._take(self.sequence_length) for _ in range(self.batch_size)]
            return rows_batch(self.corpus, units, self.sequence_length)
        wanted = self.batch_size * self.sequence_length
        pieces: list[tuple[int, int]] = []
        while wanted:
            pieces.append(self._take(wanted))
            wanted -= pieces[-1][1] - pieces[-1][0]
        return packed_batch(self.corpus, pieces)

    @property
    def epoch(self) -> float:
        """Epochs read so far, with the fraction of the one under way."""
        return self._place.epoch + self._place.unit / len(self._units(self._place.epoch))

    def state_dict(self) -> dict[str, Any]:
        """The place in the stream and the identity of what is streamed."""
        place = {"epoch": self._place.epoch, "unit": self._place.unit, "offset": self._place.offset}
        return {"place": place, **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place of ``state``.

        Raises:
            ValueError: the state is of another corpus, cut or seed.
        """
        for name, ours in self._identity().items():
            if state.get(name) != ours:
                raise ValueError(
                    f"{name}: expected the data of the saved run ({state.get(name)!r}), got {ours!r}; resume with the "
                    "same data, tokenizer, batch_size, sequence_length, packing and seed, or start in a new folder"
                )
        self._place = _Place(**state["place"])

    def _identity(self) -> dict[str, Any]:
        names = ("packing", "batch_size", "sequence_length", "seed")
        return {"fingerprint": self.corpus.fingerprint, **{name: getattr(self, name) for name in names}}

    def _take(self, limit: int) -> tuple[int, int]:
        """The next run of at most ``limit`` corpus tokens, as (start, stop)."""
        units = self._units(self._place.epoch)
        epoch, unit = self._place.epoch, self._place.unit
        start, stop = units[unit].tolist()
        start += self._place.offset
        if stop - start > limit:
            self._place = _Place(epoch=epoch, unit=unit, offset=self._place.offset + limit)
            return start, start + limit
        last = unit + 1 == len(units)
        self._place = _Place(epoch=epoch + last, unit=0 if last else unit + 1)
        return start, stop

    def _units(self, epoch: int) -> Tensor:
        """[units, 2] starts and stops of the epoch, in its order."""
        if self._epoch_units is None or self._epoch_units[0] != epoch:
            generator = torch.Generator().manual_seed(_epoch_seed(self.seed, epoch))
            if self.packing == "rows":
                # Cutting from another first place in every epoch moves the rows' edges through the text.
                shift = int(torch.randint(self.sequence_length, (), generator=generator))
                units = row_units(self.corpus, self.sequence_length, shift)
            else:
                units = piece_units(self.corpus, self.sequence_length)
            order = torch.randperm(len(units), generator=generator)
            self._epoch_units = (epoch, units[order])
        return self._epoch_units[1]


class TaskStream:
    """Fresh batches of a synthetic task, without end; nothing is ever seen twice but by chance."""

    def __init__(self, task: Task, *, batch_size: int, seed: int = 0) -> None:
        """``task`` makes batches of ``batch_size`` sequences from a generator seeded with ``seed``."""
        self.task, self.batch_size = task, batch_size
        self._generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.task.batch(self._generator, self.batch_size)

    def state_dict(self) -> dict[str, Any]:
        """The generator's state and the task's parameters."""
        return {"generator": self._generator.get_state(), "task": repr(self.task), "batch_size": self.batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the place of ``state``. Raises ``ValueError`` where it is of another task or batch size."""
        for name, ours in (("task", repr(self.task)), ("batch_size", self.batch_size)):
            if state.get(name) != ours:
                raise ValueError(
                    f"{name}: expected that of the saved run ({state.get(name)!r}), got {ours!r}; resume with the same "
                    "task and batch size, or start in a new folder"
                )
        self._generator.set_state(state["generator"])


def in_order(
    corpus: Corpus, *, batch_size: int, sequence_length: int, packing: Packing = "rows", max_batches: int | None = None
) -> list[Batch]:
    """One pass over a corpus from its beginning, for validation: at most ``max_batches``, the last may be smaller.

    Where ``max_batches`` is too few for the whole corpus, the batches are spread evenly over it, so that a short
    validation is not one of the first documents only.
    """
    cut = row_units(corpus, sequence_length, 0) if packing == "rows" else piece_units(corpus, sequence_length)
    groups = cut.split(batch_size)
    if max_batches is not None and len(groups) > max_batches:
        chosen = torch.linspace(0, len(groups) - 1, max_batches).round().long().unique().tolist()
        groups = [groups[i] for i in chosen]
    batches = []
    for group in groups:
        units = [(start, stop) for start, stop in group.tolist()]
        batches.append(rows_batch(corpus, units, sequence_length) if packing == "rows" else packed_batch(corpus, units))
    return batches


def row_units(corpus: Corpus, length: int, shift: int) -> Tensor:
    """[rows, 2]: the run of all documents cut every ``length`` tokens, first after ``shift`` (0 for ``length``)."""
    starts = torch.arange(shift - length if shift else 0, corpus.num_tokens, length)
    return torch.stack([starts.clamp(min=0), (starts + length).clamp(max=corpus.num_tokens)], 1)


def piece_units(corpus: Corpus, length: int) -> Tensor:
    """[pieces, 2]: every document cut every ``length`` tokens from its own beginning."""
    begins, ends = corpus.offsets[:-1], corpus.offsets[1:]
    counts = (ends - begins + length - 1) // length
    document = torch.repeat_interleave(torch.arange(len(counts)), counts)
    piece = torch.arange(len(document)) - (counts.cumsum(0) - counts)[document]
    starts = begins[document] + piece * length
    return torch.stack([starts, torch.minimum(starts + length, ends[document])], 1)


def rows_batch(corpus: Corpus, units: list[tuple[int, int]], length: int) -> Batch:
    """Rows of ``length`` tokens; a shorter unit is filled up with its last token, which has no target there."""
    starts = torch.tensor([start for start, _ in units])[:, None]
    stops = torch.tensor([stop for _, stop in units])[:, None]
    places = starts + torch.arange(length)
    tokens = corpus.gather(torch.minimum(places, stops - 1))
    # The last token of the corpus has none after it.
    nexts = corpus.gather((places + 1).clamp(max=corpus.num_tokens - 1))
    has_target = (places < stops) & (places + 1 < corpus.num_tokens)
    return Batch(tokens=tokens, targets=torch.where(has_target, nexts, IGNORE))


def packed_batch(corpus: Corpus, pieces: list[tuple[int, int]]) -> Batch:
    """The pieces back to back in one row. The last token of a document has no target."""
    bounds = torch.tensor(pieces)
    lengths = bounds[:, 1] - bounds[:, 0]
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    within = torch.arange(int(cu_seqlens[-1])) - torch.repeat_interleave(cu_seqlens[:-1], lengths)
    places = torch.repeat_interleave(bounds[:, 0], lengths) + within
    ends = corpus.offsets[torch.searchsorted(corpus.offsets, places, right=True)]
    nexts = corpus.gather((places + 1).clamp(max=corpus.num_tokens - 1))
    targets = torch.where(places + 1 < ends, nexts, IGNORE)
    return Batch(tokens=corpus.gather(places)[None], targets=targets[None], cu_seqlens=cu_seqlens.int())


def _epoch_seed(seed: int, epoch: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little")
