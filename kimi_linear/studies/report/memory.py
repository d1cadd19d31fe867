"""The memory at work: half-lives as a heatmap, strengths and corrections as bars, and the numbers behind a token.

A channel whose log-decay is g loses half of what it holds in ln 2 / -g tokens at that rate.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kimi_linear.studies.report.results import Memory, MemoryHead

HALF_LIFE_RANGE = (1.0, 300.0)
"""Ends of the colour scale, in tokens; beyond them the end's colour stays."""

COLORMAP = "viridis"

CELL = 13
"""Width of one token on the page, in CSS pixels."""

BAR_HEIGHT = 34

WHITESPACE = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True, kw_only=True)
class MemoryPanel:
    """What the page shows of one head: two pictures as text, and the numbers of each token for hovering."""

    layer: int
    head: int
    heatmap: str
    """PNG as a data URI, one pixel per token and channel; the longest-lived channel on top."""
    forgotten_bars: str
    """Share that the token lets go, over all channels."""
    most_forgotten: float
    """What a full bar of it stands for."""
    beta_bars: str
    correction_bars: str
    """The correction before a pale bar that is the value's length."""
    ceiling: float
    """What a full correction bar stands for."""
    half_lives: tuple[tuple[float, float, float], ...]
    """Per token: half-life, in tokens, of the channel at the 10th, 50th and 90th percentile."""
    forgotten: tuple[float, ...]
    beta: tuple[float, ...]
    correction: tuple[float, ...]
    value: tuple[float, ...]


def half_lives(log_decay: Sequence[Sequence[float]]) -> np.ndarray:
    """[T][K] log-decays as half-lives in tokens, infinite where a channel does not decay at all."""
    rate = -np.asarray(log_decay, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.where(rate > 0, math.log(2) / rate, np.inf)


def panel(head: MemoryHead) -> MemoryPanel:
    """The pictures and numbers of ``head``."""
    lives = half_lives(head.log_decay)
    quantiles = np.quantile(np.minimum(lives, 1e6), [0.1, 0.5, 0.9], axis=1)
    ceiling = max(*head.correction, *head.value)
    forgotten = tuple(float(x) for x in 1 - np.exp(np.asarray(head.log_decay)).mean(axis=1))
    return MemoryPanel(
        layer=head.layer,
        head=head.head,
        heatmap=heatmap(lives),
        forgotten_bars=bars(forgotten, ceiling=max(forgotten), color="var(--forgotten)", name="forgotten"),
        most_forgotten=max(forgotten),
        forgotten=forgotten,
        beta_bars=bars(head.beta, ceiling=1.0, color="var(--beta)", name="beta"),
        correction_bars=bars(
            head.correction, ceiling=ceiling, color="var(--correction)", name="correction", behind=head.value
        ),
        ceiling=ceiling,
        half_lives=tuple((float(a), float(b), float(c)) for a, b, c in quantiles.T),
        beta=head.beta,
        correction=head.correction,
        value=head.value,
    )


def heatmap(lives: np.ndarray) -> str:
    """Half-lives [T, K] as a PNG data URI of T x K pixels, channels sorted by their mean decay, log colour scale."""
    import matplotlib
    from PIL import Image  # matplotlib's own writer would first build a cache of the machine's fonts

    low, high = HALF_LIFE_RANGE
    logs = np.log(np.clip(lives, low, high)) / math.log(high / low)
    order = np.argsort(-logs.mean(axis=0), kind="stable")
    buffer = io.BytesIO()
    pixels = matplotlib.colormaps[COLORMAP](logs[:, order].T, bytes=True)[..., :3]
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def color_scale(stops: int = 12) -> str:
    """The heatmap's colours as a CSS gradient, from forgotten at once to long remembered."""
    import matplotlib
    from matplotlib.colors import to_hex

    colors = (to_hex(matplotlib.colormaps[COLORMAP](i / (stops - 1))) for i in range(stops))
    return f"linear-gradient(to right, {', '.join(colors)})"


def bars(
    values: Sequence[float], *, ceiling: float, color: str, name: str, behind: Sequence[float] | None = None
) -> str:
    """One bar per token as SVG, before a wider pale one where ``behind`` is given; ``ceiling`` is a full bar."""
    width = CELL * len(values)
    parts = [f'<svg class="bars" width="{width}" height="{BAR_HEIGHT}" role="img" aria-label="{name} per token">']
    for row, kind, inset in ((behind or (), "pale", 1), (values, "solid", 3 if behind else 1)):
        for i, value in enumerate(row):
            height = round(BAR_HEIGHT * min(value / ceiling, 1.0), 1) if ceiling > 0 else 0
            x, y = i * CELL + inset, BAR_HEIGHT - height
            parts.append(
                f'<rect class="{kind}" x="{x}" y="{y:g}" width="{CELL - 2 * inset}" height="{height}" style="fill:{color}"/>'
            )
    return "".join([*parts, "</svg>"])


def visible(token: str) -> str:
    """A token as the page prints it, whitespace made visible."""
    return "".join(WHITESPACE.get(character, character) for character in token)


def in_words(memory: Memory) -> list[str]:
    """What stands out, in sentences with its numbers."""
    lives = {(h.layer, h.head): half_lives(h.log_decay) for h in memory.heads}
    medians = {key: np.median(values, axis=0) for key, values in lives.items()}
    longest = max(medians, key=lambda key: medians[key].max())
    shortest = min(medians, key=lambda key: medians[key].min())
    late = [
        (size / max(value, 1e-9), token, head)
        for head in memory.heads
        for token, (size, value) in enumerate(zip(head.correction, head.value, strict=True))
        if token >= len(head.value) // 4
    ]
    most, surprise, head = max(late, key=lambda item: item[0])
    least, known, calm = min(late, key=lambda item: item[0])
    return [
        f"The longest memory is a channel of layer {longest[0]}, head {longest[1]}: at the sentence's median rate it "
        f"keeps half of what it holds for {tokens_in_words(medians[longest].max())}; the shortest, in layer "
        f"{shortest[0]}, head {shortest[1]}, for {tokens_in_words(medians[shortest].min())}.",
        f"Once the memory holds something (after the first quarter), it was furthest off at "
        f"“{visible(memory.tokens[surprise])}” (token {surprise}, layer {head.layer}, head {head.head}), where the "
        f"correction is {most:.0%} of the value, and knew most at “{visible(memory.tokens[known])}” (token {known}, "
        f"layer {calm.layer}, head {calm.head}): {least:.0%}.",
    ]


def tokens_in_words(count: float) -> str:
    """A half-life as text with its unit."""
    if count >= 1e5:
        return "more than 100,000 tokens"
    return f"{count:,.0f} tokens" if count >= 10 else f"{count:.1f} tokens"
