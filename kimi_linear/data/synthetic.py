"""The paper's three synthetic tasks, made on the fly: palindrome, associative recall and stacks (arXiv 2510.26692, 5.1).

Every task is a frozen dataclass; ``batch(generator, batch_size)`` draws fresh sequences and sets targets at the
scored positions only. The target at a position is what the model has to predict there.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from kimi_linear.data.batch import IGNORE, Batch


class Task(Protocol):
    """What trainers and evaluations need of a synthetic task."""

    @property
    def name(self) -> str:
        """Short name, for tables."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens that appear, marks included."""
        ...

    @property
    def sequence_length(self) -> int:
        """T of its batches."""
        ...

    def batch(self, generator: torch.Generator, batch_size: int) -> Batch:
        """``batch_size`` fresh sequences on the generator's device."""
        ...


@dataclass(frozen=True, kw_only=True)
class Palindrome:
    """Repeat a sequence of random symbols backwards.

    The first symbol of the reversed part is given, not scored, as the paper prints the task::

        input    O G R S U N E <sep> E N U S R G O
        target   - - - - - - -   -   N U S R G O -
    """

    length: int = 127
    """Symbols before the separator."""
    vocab: int = 64
    """Different symbols."""
    distinct: bool = False
    """Whether no symbol appears twice in a sequence, as in the paper's example: then the symbol before the last one read tells what to say."""

    name = "palindrome"

    def __post_init__(self) -> None:
        _at_least(self, length=2, vocab=max(2, self.length * self.distinct))

    @staticmethod
    def for_length(tokens: int, *, vocab: int | None = 64, distinct: bool = False) -> Palindrome:
        """The largest task of at most ``tokens`` tokens; with as many symbols as there are places where None are given."""
        length = (tokens - 1) // 2
        return Palindrome(length=length, vocab=length if vocab is None else vocab, distinct=distinct)

    @property
    def vocab_size(self) -> int:
        """Symbols and <sep>."""
        return self.vocab + 1

    @property
    def sequence_length(self) -> int:
        """2 * length + 1."""
        return 2 * self.length + 1

    @property
    def scored(self) -> slice:
        """The columns with targets."""
        return slice(self.length + 1, 2 * self.length)

    def batch(self, generator: torch.Generator, batch_size: int) -> Batch:
        """``batch_size`` fresh sequences on the generator's device."""
        if self.distinct:
            order = torch.rand(batch_size, self.vocab, generator=generator, device=generator.device).argsort(1)
            symbols = order[:, : self.length]
        else:
            symbols = _randint(self.vocab, (batch_size, self.length), generator)
        separator = torch.full_like(symbols[:, :1], self.vocab)
        tokens = torch.cat([symbols, separator, symbols.flip(1)], 1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, self.length + 1 : -1] = tokens[:, self.length + 2 :]
        return Batch(tokens=tokens, targets=targets)


@dataclass(frozen=True, kw_only=True)
class MQAR:
    """Multi-query associative recall: pairs of key and value, then queries; answer each with its key's value.

    A query is answered at its own position, and the answer is never shown as an input::

        input    A 1 C 3 B 0 M 8 <sep> B M
        target   - - - - - - - -   -   0 8
    """

    num_pairs: int = 64
    """Key-value pairs, all keys different."""
    num_queries: int = 64
    """Keys asked for. None is asked for again before all have been; where there are more queries than pairs, again they are."""
    vocab: int = 512
    """Symbols: keys are the first half, values the second."""
    distinct: bool = False
    """Whether no value appears twice in a sequence, as in the paper's example: then counting values says nothing."""

    name = "mqar"

    def __post_init__(self) -> None:
        _at_least(self, num_pairs=1, num_queries=1, vocab=2)
        if self.num_pairs > self.vocab // 2:
            raise ValueError(
                f"num_pairs: expected at most the {self.vocab // 2} different keys of vocab == {self.vocab}, got "
                f"{self.num_pairs}; raise vocab to {2 * self.num_pairs}"
            )

    def __repr__(self) -> str:
        """Without ``distinct`` where it is False: the study seeds its sequences by this text, and older results keep theirs."""
        shown = [f.name for f in fields(self) if f.name != "distinct" or self.distinct]
        return f"MQAR({', '.join(f'{name}={getattr(self, name)!r}' for name in shown)})"

    @staticmethod
    def for_length(tokens: int, *, vocab: int | None = None, asked: int = 1, distinct: bool = False) -> MQAR:
        """The largest task of at most ``tokens`` tokens in which each key is asked for ``asked`` times.

        Half of ``vocab`` are keys; there are as many as pairs where it is None.
        """
        pairs = (tokens - 1) // (2 + asked)
        return MQAR(
            num_pairs=pairs,
            num_queries=asked * pairs,
            vocab=2 * pairs if vocab is None else vocab,
            distinct=distinct,
        )

    @property
    def vocab_size(self) -> int:
        """Keys, values and <sep>."""
        return self.vocab + 1

    @property
    def sequence_length(self) -> int:
        """2 * num_pairs + 1 + num_queries."""
        return 2 * self.num_pairs + 1 + self.num_queries

    @property
    def scored(self) -> slice:
        """The columns with targets."""
        return slice(2 * self.num_pairs + 1, None)

    def batch(self, generator: torch.Generator, batch_size: int) -> Batch:
        """``batch_size`` fresh sequences on the generator's device."""
        num_keys = self.vocab // 2
        keys = _distinct(num_keys, self.num_pairs, batch_size, generator)
        if self.distinct:
            values = num_keys + _distinct(self.vocab - num_keys, self.num_pairs, batch_size, generator)
        else:
            values = num_keys + _randint(self.vocab - num_keys, keys.shape, generator)
        rounds = [min(self.num_pairs, self.num_queries - i) for i in range(0, self.num_queries, self.num_pairs)]
        asked = torch.cat([_distinct(self.num_pairs, count, batch_size, generator) for count in rounds], 1)
        pairs = torch.stack([keys, values], 2).flatten(1)
        separator = torch.full_like(keys[:, :1], self.vocab)
        tokens = torch.cat([pairs, separator, keys.gather(1, asked)], 1)
        targets = torch.full_like(tokens, IGNORE)
        targets[:, -self.num_queries :] = values.gather(1, asked)
        return Batch(tokens=tokens, targets=targets)


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Many stacks at once: elements are pushed and popped, and the popped element is to be predicted.

    A pop is answered at its stack's number. No stack is popped while it is empty::

        input    <push> 1 G  <push> 0 E  <push> 1 F  <pop> 1 F  <pop> 0 E
        target      -   - -     -   - -     -   - -    -   F -    -   E -
    """

    num_stacks: int = 64
    """Independent stacks."""
    operations: int = 85
    """Pushes and pops together, three tokens each."""
    vocab: int = 64
    """Different elements."""
    pop_probability: float = 0.5
    """Chance that an operation on a stack that holds something is a pop."""

    name = "stack"

    def __post_init__(self) -> None:
        _at_least(self, num_stacks=1, operations=2, vocab=2)
        if not 0 < self.pop_probability <= 1:
            raise ValueError(f"pop_probability: expected a number in (0, 1], got {self.pop_probability}")

    @staticmethod
    def for_length(tokens: int, *, num_stacks: int = 64, vocab: int = 64) -> Stack:
        """The largest task of at most ``tokens`` tokens."""
        return Stack(num_stacks=num_stacks, operations=tokens // 3, vocab=vocab)

    @property
    def vocab_size(self) -> int:
        """Elements, stack numbers, <push> and <pop>."""
        return self.vocab + self.num_stacks + 2

    @property
    def sequence_length(self) -> int:
        """3 * operations."""
        return 3 * self.operations

    @property
    def scored(self) -> slice:
        """The columns that may have targets."""
        return slice(1, None, 3)

    def batch(self, generator: torch.Generator, batch_size: int) -> Batch:
        """``batch_size`` fresh sequences on the generator's device."""
        shape = (self.operations, batch_size)
        stacks = _randint(self.num_stacks, shape, generator)
        elements = _randint(self.vocab, shape, generator)
        wants_pop = torch.rand(shape, generator=generator, device=generator.device) < self.pop_probability
        popped = torch.empty_like(wants_pop)
        # Each push remembers what lay below it, so a stack is the number of its top push; 0 is the floor.
        top = torch.zeros(batch_size, self.num_stacks, dtype=torch.int64, device=generator.device)
        below = torch.zeros(self.operations + 1, batch_size, dtype=torch.int64, device=generator.device)
        held = torch.zeros_like(below)
        for t in range(self.operations):
            stack = stacks[t][:, None]
            above = top.gather(1, stack)[:, 0]
            pop = wants_pop[t] & (above > 0)
            elements[t] = torch.where(pop, held.gather(0, above[None])[0], elements[t])
            held[t + 1], below[t + 1], popped[t] = elements[t], above, pop
            under = below.gather(0, above[None])[0]
            top.scatter_(1, stack, torch.where(pop, under, t + 1)[:, None])
        marks = self.vocab + self.num_stacks + popped.long()
        tokens = torch.stack([marks, self.vocab + stacks, elements], 2).transpose(0, 1).flatten(1)
        answers = torch.where(popped, elements, IGNORE)
        nothing = torch.full_like(answers, IGNORE)
        targets = torch.stack([nothing, answers, nothing], 2).transpose(0, 1).flatten(1)
        return Batch(tokens=tokens, targets=targets)


def _randint(high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(high, shape, generator=generator, device=generator.device)


def _distinct(high: int, count: int, batch_size: int, generator: torch.Generator) -> Tensor:
    """[batch_size, count] numbers below ``high``, different within a row, in random order."""
    draws = torch.rand(batch_size, high, generator=generator, device=generator.device)
    return draws.topk(count, dim=1).indices if count < high // 4 else draws.argsort(1)[:, :count]


def _at_least(task: object, **bounds: int) -> None:
    for field, bound in bounds.items():
        value = getattr(task, field)
        if value < bound:
            raise ValueError(f"{field}: expected at least {bound}, got {value}")
