"""Text from a model: sampling, stop strings, and generation with explicit state."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kimi_linear.engine.config import SamplingConfig
    from kimi_linear.engine.conversation import Answer, Conversation
    from kimi_linear.engine.generate import GenerationStats, TextStream, generate_tokens, stream
    from kimi_linear.engine.sampler import make_generator, probabilities, sample

_HOMES = {
    "SamplingConfig": "config",
    "Answer": "conversation",
    "Conversation": "conversation",
    "GenerationStats": "generate",
    "TextStream": "generate",
    "generate_tokens": "generate",
    "stream": "generate",
    "make_generator": "sampler",
    "probabilities": "sampler",
    "sample": "sampler",
}

__all__ = [
    "Answer",
    "Conversation",
    "GenerationStats",
    "SamplingConfig",
    "TextStream",
    "generate_tokens",
    "make_generator",
    "probabilities",
    "sample",
    "stream",
]


def __getattr__(name: str) -> object:
    # Lazily, so that a command line that only wants SamplingConfig does not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
