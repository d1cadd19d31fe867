"""Our own models under lm-eval (EleutherAI's harness, >= 0.4.9): its tasks, our forward pass and sampler.

Requests are packed, not padded: many short questions go through the model as one row of documents that never see each
other, and only the places that are scored meet the output projection.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_linear.data.chat import ChatFormat, built_in_template
from kimi_linear.data.tokenizers import Tokenizer
from kimi_linear.engine import stream
from kimi_linear.model import KimiLinear

SCORED_AT_ONCE = 1024
"""Places whose logits are held at the same time: a vocabulary of 163,840 takes 0.6 GiB for them in fp32."""


class Score(NamedTuple):
    """What a continuation got."""

    logprob: float
    """Sum of its tokens' log-probabilities, nats."""
    greedy: bool
    """Whether each of its tokens was the likeliest."""


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """The arguments of ``lm``."""

    model: KimiLinear
    tokenizer: Tokenizer
    batch_tokens: int
    window: int | None
    max_new_tokens: int
    prefix_id: int


def lm(
    model: KimiLinear,
    tokenizer: Tokenizer,
    *,
    batch_tokens: int = 8192,
    window: int | None = None,
    max_new_tokens: int = 256,
    prefix_id: int | None = None,
) -> Any:
    """A model as lm-eval takes it: ``lm_eval.simple_evaluate(model=lm(model, tokenizer), tasks=[...])``.

    Nothing is truncated: these models have no longest context.

    Args:
        model: the model, on its own device.
        tokenizer: the one that it was trained with.
        batch_tokens: tokens in one forward pass; a longer request goes alone.
        window: tokens that ``loglikelihood_rolling`` reads at once; a longer document is read in pieces, as lm-eval's
            other models do. The whole document where None.
        max_new_tokens: tokens to generate where a task does not say.
        prefix_id: the token that stands before a text without context; the model's bos or the tokenizer's
            end-of-document token where None.

    Returns:
        An ``lm_eval.api.model.TemplateLM``: ``loglikelihood``, ``loglikelihood_rolling``, ``generate_until``.

    Raises:
        ImportError: lm-eval is not installed. ValueError: a number below 1, a tokenizer of another model, or no token
            to begin with.
    """
    for name, value in (("batch_tokens", batch_tokens), ("window", window), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most the model's {model.config.vocab_size} ids, got {tokenizer.vocab_size}; "
            "it belongs to another model"
        )
    for candidate in (model.config.bos_token_id, tokenizer.eos_id):
        prefix_id = candidate if prefix_id is None else prefix_id
    if prefix_id is None:
        raise ValueError("prefix_id: expected a token to begin with, and neither config nor tokenizer has one; pass it")
    return _lm_class()(
        _Setup(
            model=model, tokenizer=tokenizer, batch_tokens=batch_tokens, window=window, max_new_tokens=max_new_tokens,
            prefix_id=prefix_id,
        )
    )  # fmt: skip


@torch.inference_mode()
def score(
    model: KimiLinear, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_tokens: int = 8192
) -> list[Score]:
    """Log-probability of each continuation after its context, many in one packed forward pass.

    Args:
        model: the model, on its own device.
        pairs: (context, continuation) as token ids; a context has at least one.
        batch_tokens: tokens in one forward pass; a longer pair goes alone.

    Returns:
        A ``Score`` for each pair, in order.

    Raises:
        ValueError: an empty context.
    """
    for i, (context, _) in enumerate(pairs):
        if not context:
            raise ValueError(
                f"pairs[{i}]: expected a context of at least one token, got none; begin with the bos token"
            )
    scores = [Score(0.0, True)] * len(pairs)
    for rows in _batches(pairs, batch_tokens):
        tokens, targets, bounds, places = [], [], [0], []
        for row in rows:
            context, continuation = pairs[row]
            # The last token predicts nothing that is asked for.
            read = [*context, *continuation][:-1]
            places.append(range(bounds[-1] + len(context) - 1, bounds[-1] + len(read)))
            tokens += read
            targets += continuation
            bounds.append(bounds[-1] + len(read))
        found = _at_places(model, tokens, bounds, [place for part in places for place in part], targets)
        start = 0
        for row, part in zip(rows, places, strict=True):
            logprobs, greedy = (values[start : start + len(part)] for values in found)
            scores[row] = Score(float(logprobs.sum()), bool(greedy.all()))
            start += len(part)
    return scores


def _batches(pairs: Sequence[tuple[Sequence[int], Sequence[int]]], most: int) -> Iterator[list[int]]:
    """Rows with something to score, longest first, so that memory runs out at once or never."""
    size = {i: len(context) + len(continuation) - 1 for i, (context, continuation) in enumerate(pairs) if continuation}
    batch: list[int] = []
    for row in sorted(size, key=lambda i: -size[i]):
        if batch and sum(size[i] for i in batch) + size[row] > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _at_places(
    model: KimiLinear, tokens: list[int], bounds: list[int], places: list[int], targets: list[int]
) -> tuple[Tensor, Tensor]:
    """Log-probability of the target at each place, fp64, and whether it was the likeliest."""
    device = model.device
    hidden = model.hidden_states(
        torch.tensor([tokens], device=device), cu_seqlens=torch.tensor(bounds, device=device, dtype=torch.int32)
    )
    hidden = hidden[0, torch.tensor(places, device=device)]
    wanted = torch.tensor(targets, device=device)
    logprobs, greedy = [], []
    for part, target in zip(hidden.split(SCORED_AT_ONCE), wanted.split(SCORED_AT_ONCE), strict=True):
        logits = model.logits_of(part).float()
        logprobs.append(-F.cross_entropy(logits, target, reduction="none"))
        greedy.append(logits.argmax(dim=-1) == target)
    return torch.cat(logprobs).double().cpu(), torch.cat(greedy).cpu()


def _whole(
    model: KimiLinear, documents: list[list[int]], prefix_id: int, window: int | None, batch_tokens: int
) -> list[float]:
    """Log-probability of each document after ``prefix_id``, read in windows as lm-eval cuts them: every token once."""
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    owner: list[int] = []
    pairs: list[tuple[list[int], list[int]]] = []
    for i, ids in enumerate(documents):
        most = max(1, len(ids)) if window is None else window
        windows = get_rolling_token_windows(ids, prefix_id, max_seq_len=most, context_len=1)
        pieces = [make_disjoint_window(piece) for piece in windows]
        owner += [i] * len(pieces)
        pairs += pieces
    totals = [0.0] * len(documents)
    for i, found in zip(owner, score(model, pairs, batch_tokens=batch_tokens), strict=True):
        totals[i] += found.logprob
    return totals


@functools.cache
def _lm_class() -> type:
    """The class, made when lm-eval is first asked for: it inherits from one of lm-eval's."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.models.utils import normalize_gen_kwargs
    except ImportError as error:
        raise ImportError(
            f"lm_eval: expected 0.4.9 or later, got: {error}; install it with pip install 'kimi-linear[eval]'"
        ) from error

    class KimiLinearLM(TemplateLM):
        """A ``KimiLinear`` model and its tokenizer; see ``kimi_linear.integrations.lm_eval.lm``."""

        def __init__(self, setup: _Setup) -> None:
            super().__init__()
            self.setup, self.model, self.text = setup, setup.model, setup.tokenizer
            self._device = setup.model.device
            self._chats = False

        @property
        def eot_token_id(self) -> int:
            """Ends a document; what lm-eval puts before a text without context."""
            return self.setup.prefix_id

        @property
        def tokenizer_name(self) -> str:
            """Identifies the vocabulary in lm-eval's caches."""
            return self.text.name

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            """Ids of a text; our tokenizers add nothing at either end. Once lm-eval has asked for the chat template, all
            its texts come from there, and control tokens that they spell are those tokens."""
            return self.text.encode(string, special=self._chats)

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            """The text of a chat in the model's own format, up to where the assistant answers."""
            if not add_generation_prompt:
                raise ValueError(
                    "chat template: expected a chat that the assistant answers, got the beginning of its answer too "
                    "(gen_prefix); take it out of the task"
                )
            self._chats = True
            chat = ChatFormat(self.text)
            return chat.spelled(chat.render(chat_history))

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            """The template's text, by which lm-eval tells one run from another; None where none is applied."""
            if not chat_template:
                return None
            return built_in_template() if self.text.chat_template is None else self.text.chat_template

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            pairs = [(context, continuation) for _, context, continuation in requests]
            scores = score(self.model, pairs, batch_tokens=self.setup.batch_tokens)
            found = [(one.logprob, one.greedy) for one in scores]
            for (asked, _, _), answer in zip(requests, found, strict=True):
                self.cache_hook.add_partial("loglikelihood", asked, answer)
            return found

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Log-probability of each whole text after the prefix token."""
            documents = [self.tok_encode(request.args[0]) for request in requests]
            setup = self.setup
            totals = _whole(self.model, documents, setup.prefix_id, setup.window, setup.batch_tokens)
            for request, total in zip(requests, totals, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Text that continues each prompt, to a stop string, the end of the document or the longest length."""
            texts = []
            for request in requests:
                prompt, asked = request.args
                options = _sampling(normalize_gen_kwargs(asked, self.setup.max_new_tokens))
                texts.append("".join(stream(self.model, self.text, self.tok_encode(prompt), **options)))
                self.cache_hook.add_partial("generate_until", (prompt, asked), texts[-1])
            return texts

    return KimiLinearLM


def _sampling(asked: Mapping[str, Any]) -> dict[str, Any]:
    """``stream``'s arguments for a task's generation settings, which lm-eval has brought into one form."""
    asked = dict(asked)
    until = asked.pop("until", None) or []
    temperature = float(asked.pop("temperature", 0.0))
    options: dict[str, Any] = {
        "max_tokens": int(asked.pop("max_gen_toks")),
        "stop": tuple([until] if isinstance(until, str) else until),
        "temperature": temperature if asked.pop("do_sample", False) else 0.0,
    }
    options |= {name: asked.pop(name) for name in ("top_k", "top_p", "seed") if name in asked}
    if asked:
        raise ValueError(
            f"generation_kwargs: expected until, max_gen_toks, do_sample, temperature, top_k, top_p and seed, got also "
            f"{', '.join(sorted(asked))}; take them out of the task, or run it on transformers through HFLM"
        )
    return options
