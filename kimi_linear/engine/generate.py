"""Generation from one prompt: read it in bounded segments, then one token per step, all state carried explicitly."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kimi_linear.data.tokenizers import Tokenizer
from kimi_linear.engine.config import SamplingConfig
from kimi_linear.engine.sampler import make_generator, sample
from kimi_linear.engine.stop import StopMatcher
from kimi_linear.model import KimiLinear, ModelState

SEGMENT = 1024
"""Prompt tokens per forward pass. Activations are bounded by it, however long the prompt is."""

FinishReason = Literal["length", "eos", "stop"]


@dataclass
class GenerationStats:
    """What one generation did; complete once the stream is at its end."""

    prompt_tokens: int
    """Tokens read before the first drawn one."""
    reused_tokens: int = 0
    """Tokens of the context that an earlier turn's state held already, so that they were not read again."""
    generated_tokens: int = 0
    """Tokens drawn, an end-of-document token included."""
    prefill_seconds: float = 0.0
    """From the first step to the first drawn token."""
    decode_seconds: float = 0.0
    """From the first drawn token to the last."""
    state_bytes: int = 0
    """Memory that the model's state holds at the end."""
    finish_reason: FinishReason | None = None
    """Why it ended: max_tokens reached ("length"), an end token came ("eos"), a stop string came ("stop")."""

    @property
    def tokens_per_second(self) -> float:
        """Rate of the steps after the first token; 0 where there was none."""
        steps = self.generated_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds > 0 else 0.0


def generate_tokens(
    model: KimiLinear,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    *,
    eos_id: int | Collection[int] | None = None,
    vocab_size: int | None = None,
    segment: int = SEGMENT,
    state: ModelState | None = None,
) -> Iterator[int]:
    """Ids that continue ``prompt``, one at a time; ``eos_id``, where it comes, is the last.

    The ids do not depend on ``segment``. ``sampling.stop`` is text and is not read here (see ``stream``).

    Args:
        model: any model; it is used as it is, on its own device.
        prompt: at least one id.
        sampling: temperature and so on, and ``max_tokens``.
        eos_id: the id, or ids, that end the generation, if any.
        vocab_size: ids from this one on are never drawn: an embedding may have more rows than the tokenizer has ids.
        segment: prompt tokens per forward pass.
        state: continue from this state (batch size 1), which is updated; a new one where None.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, or a segment below 1.
    """
    prompt = list(prompt)
    if not prompt:
        raise ValueError("prompt: expected at least one token, got none; begin with the end-of-document token")
    if segment < 1:
        raise ValueError(f"segment: expected at least 1 token, got {segment}")
    ends = frozenset(() if eos_id is None else (eos_id,) if isinstance(eos_id, int) else eos_id)
    return _generate(
        model, prompt, sampling, ends, vocab_size, segment, model.make_state(1) if state is None else state
    )


def _generate(
    model: KimiLinear, prompt: list[int], sampling: SamplingConfig, ends: frozenset[int], vocab_size: int | None,
    segment: int, state: ModelState,
) -> Iterator[int]:  # fmt: skip
    if sampling.max_tokens == 0:
        return
    device = model.device
    generator = make_generator(sampling, device)
    ids = torch.tensor([prompt], dtype=torch.int64, device=device)
    for part in ids[:, :-1].split(segment, dim=1):
        if part.shape[1]:
            _read(model, part, state)
    last = ids[:, -1:]
    for step in range(sampling.max_tokens):
        logits = _next_logits(model, last, state)[:, :vocab_size]
        last = sample(logits, sampling, generator)[:, None]
        token = int(last)
        yield token
        if token in ends or step == sampling.max_tokens - 1:
            return


@torch.inference_mode()
def _read(model: KimiLinear, tokens: Tensor, state: ModelState) -> None:
    """Take tokens [1, T] into the state; nobody asks for their logits, so the head is left out."""
    model.hidden_states(tokens, state=state)


@torch.inference_mode()
def _next_logits(model: KimiLinear, tokens: Tensor, state: ModelState) -> Tensor:
    return model(tokens, state=state)[:, -1]


class TextStream(Iterator[str]):
    """Pieces of text as they are generated; ``stats`` tells how it went."""

    def __init__(self, pieces: Iterator[str], stats: GenerationStats) -> None:
        self.stats = stats
        self._pieces = pieces

    def __iter__(self) -> TextStream:
        return self

    def __next__(self) -> str:
        return next(self._pieces)


def stream(
    model: KimiLinear,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> TextStream:
    """Generate text that continues ``prompt``, piece by piece.

    A character is never split, and a stop string never shown in part. The text ends at the tokenizer's ``end_ids`` and at
    the ``eos_token_id`` of the model's configuration. An empty prompt begins a new document.

    Args:
        model: the model, on its own device.
        tokenizer: the one that the model was trained with.
        prompt: text to continue, or ids, such as ``ChatFormat(tokenizer).encode(messages)``; it is not part of the output.
            Text is only text: control tokens spelled out in it are not those tokens (``tokenizer.encode`` has a switch).
        max_tokens: most tokens to generate.
        temperature: divides the logits; 0 is greedy.
        top_k: draw from the k likeliest tokens only.
        top_p: draw from the fewest tokens whose probabilities reach this sum.
        seed: makes the text repeatable.
        stop: strings that end the text; none of them is part of it.

    Returns:
        An iterator of non-empty strings, with ``.stats``.

    Raises:
        ValueError, TypeError: a setting out of range; a tokenizer with more ids than the model; an empty prompt with
            a tokenizer that has no end-of-document token. All before the first piece.
    """
    sampling = SamplingConfig(
        max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        stop=stop if isinstance(stop, str) else tuple(stop),  # type: ignore[arg-type]  # refused with a clear message
    )  # fmt: skip
    check_tokenizer(model, tokenizer)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
    if not ids:
        if tokenizer.eos_id is None:
            raise ValueError("prompt: expected some text, got none, and this tokenizer has no token to begin with")
        ids = [tokenizer.eos_id]
    stats = GenerationStats(prompt_tokens=len(ids))
    return TextStream(_stream(model, tokenizer, ids, sampling, stats), stats)


def check_tokenizer(model: KimiLinear, tokenizer: Tokenizer) -> None:
    """Raises ``ValueError`` for a tokenizer with more ids than the model has."""
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most the model's {model.config.vocab_size} ids, got {tokenizer.vocab_size}; "
            "it belongs to another model"
        )


def draw(
    model: KimiLinear,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: SamplingConfig,
    stats: GenerationStats,
    state: ModelState,
) -> Iterator[int]:
    """``generate_tokens``, without the end token, and with ``stats`` kept up to date; the caller's time is not counted."""
    ends = tokenizer.end_ids
    if model.config.eos_token_id is not None:
        ends = ends | {model.config.eos_token_id}
    tokens = generate_tokens(model, prompt, sampling, eos_id=ends, vocab_size=tokenizer.vocab_size, state=state)
    since = time.perf_counter()
    for token in tokens:
        now = time.perf_counter()
        if stats.generated_tokens == 0:
            stats.prefill_seconds = now - since
        else:
            stats.decode_seconds += now - since
        stats.generated_tokens += 1
        stats.state_bytes = state.nbytes()
        if token in ends:
            stats.finish_reason = "eos"
            return
        yield token
        since = time.perf_counter()
    stats.finish_reason = "length"


def _stream(
    model: KimiLinear, tokenizer: Tokenizer, prompt: list[int], sampling: SamplingConfig, stats: GenerationStats
) -> Iterator[str]:
    decoder, matcher = tokenizer.decoder(), StopMatcher(sampling.stop)
    for token in draw(model, tokenizer, prompt, sampling, stats, model.make_state(1)):
        piece = matcher.push(decoder.push(token))
        if piece:
            yield piece
        if matcher.stopped:
            stats.finish_reason = "stop"
            return
    rest = matcher.push(decoder.finish())
    rest += "" if matcher.stopped else matcher.finish()
    if matcher.stopped:
        stats.finish_reason = "stop"
    if rest:
        yield rest
