"""What the demo does with trained models: an opening, a continuation, a look into the memory, the cost of a token."""

from __future__ import annotations

import time
from statistics import median
from typing import TYPE_CHECKING

import torch

from kimi_linear.data import Tokenizer
from kimi_linear.engine import stream
from kimi_linear.folder import SHIPPED, load, shipped_folder
from kimi_linear.model import KDAState, KimiLinear, MLAState, ModelState
from kimi_linear.studies.demo_training import twins
from kimi_linear.studies.report.page import context, size_in_words, time_in_words
from kimi_linear.studies.report.results import (
    LABELS,
    DecodePoint,
    Decoding,
    Memory,
    MemoryHead,
    ModelName,
    Sample,
)

if TYPE_CHECKING:
    from kimi_linear.studies.demo import DemoRun

TEMPERATURE, TOP_P = 0.9, 0.95
"""Of the continuation; so small a model repeats itself when it is drawn from more greedily."""

WARM_UP_TOKENS = 2
"""Tokens generated at each context before the clock starts."""
MOST_TIMED_TOKENS = 64


def resolve_device(name: str) -> str:
    """``name``, or the GPU where there is one and else the CPU for "auto".

    Raises:
        ValueError: torch knows no such device, or has none here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device: expected auto, cpu or a device that torch has here, got {name!r}: {error}"
        ) from error
    return name


# The opening

OPENING = "Once upon a time"


def open_with_shipped_model(run: DemoRun) -> None:
    """Stream what the model that comes with the package makes of a beginning: something to read before training starts."""
    config = run.config
    if config.opening_tokens == 0:
        return
    try:
        shipped_folder()
    except FileNotFoundError as error:
        run.screen.say(f"No opening: {error}")
        return
    with run.phase("opening"):
        model, tokenizer = load(SHIPPED, device=run.device)
        assert tokenizer is not None
        run.screen.say(f"kimi-linear-{SHIPPED}, which comes with the package, continues:")
        run.screen.write(OPENING)
        text = stream(
            model, tokenizer, OPENING, max_tokens=config.opening_tokens, temperature=0.8, top_p=TOP_P,
            seed=config.seed,
        )  # fmt: skip
        try:
            for piece in text:
                run.screen.write(piece)
        finally:
            run.screen.write("\n\n")


# The continuation


def continue_prompt(run: DemoRun) -> None:
    """Stream a continuation of the prompt from the hybrid, as it was saved."""
    config = run.config
    model, tokenizer = _saved_hybrid(run)
    run.screen.say("\nThe hybrid continues a prompt:")
    run.screen.write(config.prompt)
    pieces: list[str] = []
    with run.phase("continuation"):
        text = stream(
            model,
            tokenizer,
            config.prompt,
            max_tokens=config.sample_tokens,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            seed=config.seed,
        )
        try:
            for piece in text:
                run.screen.write(piece)
                pieces.append(piece)
        finally:
            run.screen.write("\n\n")
            stats = text.stats
            run.keep(
                sample=Sample(
                    prompt=config.prompt,
                    continuation="".join(pieces),
                    tokens=stats.generated_tokens,
                    seconds=stats.prefill_seconds + stats.decode_seconds,
                )
            )


# The picture of the memory


def picture_memory(run: DemoRun) -> None:
    """Read a line of source code and record what each KDA head forgets, holds and corrects."""
    from kimi_linear.studies.demo import SENTENCE, SENTENCE_SOURCE

    with run.phase("memory at work"):
        model, tokenizer = _saved_hybrid(run)
        run.keep(memory=record_memory(model, tokenizer, SENTENCE, SENTENCE_SOURCE))


@torch.inference_mode()
def record_memory(model: KimiLinear, tokenizer: Tokenizer, sentence: str, source: str) -> Memory:
    """What every head of every KDA layer does at each token of ``sentence``, beginning with an empty memory."""
    ids = tokenizer.encode(sentence)
    with model.record() as trace:
        model.hidden_states(torch.tensor([ids], device=model.device))
    heads = []
    for layer, (seen, *_) in trace.layers.items():
        decays, *rows = (x[0].double().cpu() for x in (seen.log_decay, seen.beta, seen.error, seen.value))
        for head in range(decays.shape[1]):
            beta, error, value = (tuple(_digits(x) for x in row[:, head].tolist()) for row in rows)
            rates = tuple(tuple(_digits(g) for g in row) for row in decays[:, head].tolist())
            heads.append(MemoryHead(layer=layer, head=head, log_decay=rates, beta=beta, correction=error, value=value))
    return Memory(source=source, tokens=tuple(tokenizer.decode([i]) for i in ids), heads=tuple(heads))


def _digits(value: float) -> float:
    """Four significant digits: as many as a picture shows, in a third of the file."""
    return float(f"{value:.4g}")


# The cost of a token


@torch.inference_mode()
def measure_decoding(run: DemoRun) -> None:
    """Time one more token, and count the cache, behind contexts that are filled with noise instead of being read.

    The time depends on shapes and not on what the caches hold. At each length the models take turns.
    """
    config, screen = run.config, run.screen
    models: dict[ModelName, KimiLinear] = {
        name: KimiLinear(shape, seed=config.seed).to(run.device).eval() for name, shape in twins(config).items()
    }
    points: dict[ModelName, list[DecodePoint]] = {name: [] for name in models}
    share = config.decode_seconds / (len(config.contexts) * len(models))
    work: list[tuple[int, ModelName]] = [(length, name) for length in config.contexts for name in models]
    screen.say("Cost of a token behind a growing context:")

    def measured():
        for i, (length, name) in enumerate(work):
            points[name].append(decode_point(models[name], length, share))
            yield i + 1, name, points[name][-1]

    def words(item) -> str:
        _, name, point = item
        cost = f"{time_in_words(point.seconds_per_token)} per token, cache {size_in_words(point.cache_bytes)}"
        return f"{LABELS[name]} at {context(point.context)}: {cost}"

    with run.phase("cost of a token"):
        try:
            for _ in screen.track(measured(), len(work), step=lambda item: item[0], describe=words):
                pass
        finally:
            run.keep(
                decoding=tuple(Decoding(model=n, label=LABELS[n], points=tuple(p)) for n, p in points.items() if p)
            )


def decode_point(model: KimiLinear, length: int, seconds: float) -> DecodePoint:
    """Median time of a token behind ``length`` tokens, timed for about ``seconds``, and the bytes of that context."""
    state = filled_state(model, length)
    size = state.nbytes()
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    for i in range(WARM_UP_TOKENS + MOST_TIMED_TOKENS):
        since = time.perf_counter()
        token = model(token, state=state)[:, -1:].argmax(-1)
        token.item()  # a token is there when its number is: this waits for an accelerator
        if i >= WARM_UP_TOKENS:
            times.append(time.perf_counter() - since)
            if len(times) >= 3 and time.perf_counter() > deadline:
                break
    return DecodePoint(context=length, seconds_per_token=median(times), cache_bytes=size)


def filled_state(model: KimiLinear, length: int) -> ModelState:
    """A state as after ``length`` tokens, of noise, with room for those that will be timed."""
    state = model.make_state(1)
    generator = torch.Generator(device=model.device).manual_seed(length)
    for layer in state.layers:
        if isinstance(layer, MLAState):
            layer.reserve(length + WARM_UP_TOKENS + MOST_TIMED_TOKENS)
            layer.length = length
            layer.latent.normal_(generator=generator)
        else:
            assert isinstance(layer, KDAState)
            layer.recurrent.normal_(generator=generator)
            layer.conv.normal_(generator=generator)
    state.position = length
    return state


def _saved_hybrid(run: DemoRun) -> tuple[KimiLinear, Tokenizer]:
    from kimi_linear.studies.demo import HYBRID

    model, tokenizer = load(run.config.folder / HYBRID, device=run.device)
    assert tokenizer is not None
    return model.eval(), tokenizer
