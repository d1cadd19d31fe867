"""Line charts as inline SVG whose colours are the page's CSS variables, so that light and dark are one drawing.

The viewBox is about as wide as a phone, so that text stays readable there and grows a little on a desktop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 280
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 42


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    label: str
    color: str
    """CSS colour, usually a variable such as ``var(--hybrid)``."""
    points: Sequence[tuple[float, float]]
    markers: bool = False
    """Dot every point, with its numbers as a tooltip."""
    faint: bool = False
    """Thin and pale: the noisy line behind the one that matters."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """How one axis maps and names its values."""

    label: str
    log: bool = False
    ticks: Sequence[float] | None = None
    """Where to write numbers; chosen from round numbers where None."""
    text: Callable[[float], str] = field(default=lambda value: f"{value:g}")
    """A tick's value in words."""
    limits: tuple[float, float] | None = None
    """Ends of the axis; the data's own where None."""


def line_chart(series: Sequence[Series], *, title: str, x: Axis, y: Axis) -> str:
    """An SVG of ``series``. ``title`` is what a screen reader says.

    Raises:
        ValueError: no point at all, or one that a log axis cannot show.
    """
    points = [point for line in series for point in line.points]
    if not points:
        raise ValueError(f"series: expected at least one point for the chart {title!r}, got none")
    x_map = _Scale(x, [p[0] for p in points], LEFT, WIDTH - RIGHT)
    y_map = _Scale(y, [p[1] for p in points], HEIGHT - BOTTOM, TOP)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    parts += _grid(x_map, y_map, x, y)
    parts += [_line(line, x_map, y_map) for line in series]
    for line in series:
        parts += _dots(line, x_map, y_map, x, y) if line.markers or len(line.points) == 1 else []
    return "\n".join([*parts, "</svg>"])


def round_ticks(low: float, high: float, *, log: bool, about: int = 5) -> list[float]:
    """About ``about`` round numbers in [low, high]: steps of 1, 2 or 5 times a power of ten, or such numbers (log)."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for mantissas in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
            ticks = [
                m * 10.0**d for d in decades for m in mantissas if low <= m * 10.0**d * (1 + 1e-9) <= high * (1 + 1e-9)
            ]
            if len(ticks) >= about - 1:
                return ticks
        return ticks
    if high <= low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


class _Scale:
    """Values to pixels along one axis."""

    def __init__(self, axis: Axis, values: Sequence[float], start: float, end: float) -> None:
        low, high = axis.limits or (min(values), max(values))
        if axis.log and low <= 0:
            raise ValueError(f"{axis.label}: a log axis needs positive values, got {low!r}")
        if low == high:
            low, high = (low / 2, high * 2) if axis.log else (low - 0.5, high + 0.5)
        elif axis.limits is None and axis.log:
            room = (high / low) ** 0.05
            low, high = low / room, high * room
        self.ticks = list(axis.ticks) if axis.ticks is not None else round_ticks(low, high, log=axis.log)
        self._of = math.log if axis.log else float
        self._low, self._high = self._of(low), self._of(high)
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (self._of(value) - self._low) / (self._high - self._low)
        return round(self._start + min(max(share, 0.0), 1.0) * (self._end - self._start), 1)


def _grid(x_map: _Scale, y_map: _Scale, x: Axis, y: Axis) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for tick in y_map.ticks:
        at = y_map(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{at + 4}" text-anchor="end">{escape(y.text(tick))}</text>')
    for tick in x_map.ticks:
        at = x_map(tick)
        parts.append(f'<line class="grid" x1="{at}" x2="{at}" y1="{bottom}" y2="{bottom + 4}"/>')
        parts.append(
            f'<text class="tick" x="{at}" y="{bottom + 18}" text-anchor="middle">{escape(x.text(tick))}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x.label)}</text>')
    return parts


def _line(line: Series, x_map: _Scale, y_map: _Scale) -> str:
    path = " ".join(f"{x_map(a)},{y_map(b)}" for a, b in line.points)
    kind = "line faint" if line.faint else "line"
    return f'<polyline class="{kind}" style="stroke:{line.color}" points="{path}"/>'


def _dots(line: Series, x_map: _Scale, y_map: _Scale, x: Axis, y: Axis) -> list[str]:
    return [
        f'<circle class="dot" style="fill:{line.color}" cx="{x_map(a)}" cy="{y_map(b)}" r="3.5">'
        f"<title>{escape(f'{line.label}, {x.label} {x.text(a)}: {y.text(b)}')}</title></circle>"
        for a, b in line.points
    ]
