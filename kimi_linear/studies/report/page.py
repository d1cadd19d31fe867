"""One self-contained HTML page from the demo's results: no network, no outside scripts, light and dark, desk and phone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from kimi_linear.studies.report import memory as memory_pictures
from kimi_linear.studies.report.charts import Axis, Series, line_chart
from kimi_linear.studies.report.results import Decoding, DemoResults, Point, Training

HYBRID, ATTENTION, RECALL = "var(--hybrid)", "var(--attention)", "var(--recall)"
COLORS = {"hybrid": HYBRID, "attention": ATTENTION}


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A measured number as the page's first lines show it."""

    name: str
    """What a test looks it up by."""
    value: float
    text: str
    """The number in words, with its unit."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the page's last part."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    open: bool = True


def render(results: DemoResults) -> str:
    """The page as HTML."""
    import jinja2
    from markupsafe import Markup

    folder = resources.files("kimi_linear.studies.report")
    read = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    panels = [memory_pictures.panel(head) for head in results.memory.heads] if results.memory else []
    return environment.from_string(read["html"]).render(
        results=results,
        facts={fact.name: fact for fact in facts(results)},
        charts={name: Markup(svg) for name, svg in charts(results).items()},
        tables=tables(results),
        panels=panels,
        heads=sorted({panel.head for panel in panels}),
        layers=sorted({panel.layer for panel in panels}),
        tokens=[memory_pictures.visible(token) for token in results.memory.tokens] if results.memory else [],
        told=memory_pictures.in_words(results.memory) if results.memory else [],
        color_scale=Markup(memory_pictures.color_scale()) if panels else "",
        half_life_range=memory_pictures.HALF_LIFE_RANGE,
        cell=memory_pictures.CELL,
        hover=Markup(_hover(results, panels)),
        css=Markup(read["css"]),
        js=Markup(read["js"]),
        duration=duration,
        Markup=Markup,
    )


def facts(results: DemoResults) -> list[Fact]:
    """The numbers of the headline: those that were measured, no others."""
    found = []
    for training in results.trainings:
        found.append(
            Fact(name=f"{training.model}.parameters", value=training.parameters, text=count(training.parameters))
        )
        if training.validation:
            bits = training.validation[-1].value / math.log(2)
            found.append(Fact(name=f"{training.model}.bits_per_byte", value=bits, text=f"{bits:.2f}"))
    pair = results.decoding_of("hybrid"), results.decoding_of("attention")
    if pair[0] and pair[1]:
        common = _by_context(pair[0]).keys() & _by_context(pair[1]).keys()
        if common:
            longest = max(common)
            hybrid, attention = (_by_context(d)[longest] for d in pair if d)
            time = attention.seconds_per_token / hybrid.seconds_per_token
            size = attention.cache_bytes / hybrid.cache_bytes
            found += [
                Fact(name="decoding.context", value=longest, text=context(longest)),
                Fact(name="decoding.speed_ratio", value=time, text=_ratio(time, "faster", "slower")),
                Fact(name="decoding.cache_ratio", value=size, text=_ratio(size, "smaller", "larger")),
                Fact(name="decoding.hybrid_cache", value=hybrid.cache_bytes, text=size_in_words(hybrid.cache_bytes)),
                Fact(name="decoding.attention_cache", value=attention.cache_bytes, text=size_in_words(attention.cache_bytes)),
                Fact(name="decoding.hybrid_time", value=hybrid.seconds_per_token, text=time_in_words(hybrid.seconds_per_token)),
                Fact(name="decoding.attention_time", value=attention.seconds_per_token, text=time_in_words(attention.seconds_per_token)),
            ]  # fmt: skip
    if results.recall and results.recall.points:
        best = results.recall.points[-1].value
        found.append(Fact(name="recall", value=best, text=f"{best:.1%}".replace(".0%", "%")))
    return found


def charts(results: DemoResults) -> dict[str, str]:
    """SVG of each figure that there is something for: loss, time, cache, recall."""
    found = {}
    lines = [line for training in results.trainings for line in _loss_lines(training)]
    if any(line.points for line in lines):
        found["loss"] = line_chart(
            [line for line in lines if line.points],
            title="Loss against training tokens, hybrid and full attention",
            x=Axis(label="training tokens", text=count, limits=(0, max(p[0] for line in lines for p in line.points))),
            y=Axis(label="bits per byte", log=True),
        )
    decoding = [d for d in results.decoding if d.points]
    if decoding:
        contexts = sorted({p.context for d in decoding for p in d.points})
        x = Axis(label="tokens of context", log=True, ticks=contexts[:: 1 if len(contexts) < 8 else 2], text=context)
        times = [_curve(d, lambda p: p.seconds_per_token * 1e3) for d in decoding]
        sizes = [_curve(d, lambda p: p.cache_bytes / 2**20) for d in decoding]
        found["time"] = line_chart(
            times, title="Milliseconds per generated token against context", x=x, y=Axis(label="ms per token", log=True)
        )
        found["cache"] = line_chart(
            sizes, title="Cache size against context", x=x,
            y=Axis(label="MiB of cache", log=True, text=lambda mib: size_in_words(mib * 2**20)),
        )  # fmt: skip
    if results.recall and results.recall.points:
        found["recall"] = line_chart(
            [Series(label="recall", color=RECALL, points=_xy(results.recall.points), markers=True)],
            title="Associative recall against training step",
            x=Axis(label="training step"),
            y=Axis(label="recall", ticks=(0, 0.25, 0.5, 0.75, 1.0), limits=(0, 1), text=lambda share: f"{share:.0%}"),
        )
    return found


def tables(results: DemoResults) -> list[Table]:
    """Every number of the figures, and the time that each phase took."""
    found = []
    if results.trainings:
        found.append(_training_table(results.trainings))
    if results.decoding:
        found.append(_decoding_table(results))
    if results.recall and results.recall.points:
        rows = [[f"{p.step}", f"{p.tokens:,}", f"{p.value:.2%}"] for p in results.recall.points]
        columns = ["step", "tokens", "recall"]
        found.append(Table(title="Associative recall against step", columns=columns, rows=rows, open=False))
    curves = [t for t in results.trainings if t.validation]
    if curves:
        steps = sorted({p.step for t in curves for p in t.validation})
        values = [{p.step: f"{p.value:.4f}" for p in t.validation} for t in curves]
        rows = [[f"{step}", *(column.get(step, "–") for column in values)] for step in steps]
        columns = ["step", *(f"{t.label}, nats per byte" for t in curves)]
        found.append(Table(title="Validation loss against step", columns=columns, rows=rows, open=False))
    rows = [[name, f"{seconds:.1f} s"] for name, seconds in results.seconds.items()]
    rows.append(["in all", f"{results.total_seconds:.1f} s"])
    found.append(Table(title="Time taken", columns=["phase", "time"], rows=rows, open=False))
    return found


def count(number: float) -> str:
    """1,068,000 as 1.07M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def context(tokens: float) -> str:
    """65536 as 64K."""
    return f"{tokens / 1024:g}K" if tokens >= 1024 else f"{tokens:g}"


def size_in_words(size: float) -> str:
    """Bytes in the binary unit that fits."""
    for power, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= power:
            return f"{size / power:.3g} {unit}"
    return f"{size:.0f} B"


def time_in_words(seconds: float) -> str:
    """A short time in milliseconds or microseconds."""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def duration(seconds: float) -> str:
    """A longer time: 73 s, 2 min 25 s."""
    whole = round(seconds)
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s" if whole < 100 else f"{whole // 60} min {whole % 60} s"


def _ratio(ratio: float, more: str, less: str) -> str:
    return f"{ratio:.1f}× {more}" if ratio >= 1 else f"{1 / ratio:.1f}× {less}"


def _xy(points: Sequence[Point]) -> list[tuple[float, float]]:
    return [(p.step, p.value) for p in points]


def _loss_lines(training: Training) -> list[Series]:
    """The noisy training loss, pale, and the validation loss; in bits per byte, as the tokens are bytes."""
    color = COLORS[training.model]
    scaled = {
        kind: [(p.tokens, p.value / math.log(2)) for p in points]
        for kind, points in (("train", training.train), ("validation", training.validation))
    }
    return [
        Series(label=f"{training.label}, training", color=color, points=scaled["train"], faint=True),
        Series(label=f"{training.label}, validation", color=color, points=scaled["validation"], markers=True),
    ]


def _curve(decoding: Decoding, value: Any) -> Series:
    points = [(p.context, value(p)) for p in decoding.points]
    return Series(label=decoding.label, color=COLORS[decoding.model], points=points, markers=True)


def _by_context(decoding: Decoding) -> dict[int, Any]:
    return {p.context: p for p in decoding.points}


def _training_table(trainings: Sequence[Training]) -> Table:
    rows = []
    for t in trainings:
        last = t.validation[-1].value if t.validation else None
        rows.append(
            [
                t.label,
                " ".join(t.mixers),
                f"{t.parameters:,}",
                f"{t.train[-1].step if t.train else 0} of {t.planned_steps}",
                f"{t.train[-1].tokens if t.train else 0:,}",
                duration(t.seconds),
                f"{t.tokens_per_second:,.0f}",
                f"{t.train[-1].value:.3f}" if t.train else "–",
                "–" if last is None else f"{last:.3f}",
                "–" if last is None else f"{last / math.log(2):.3f}",
            ]
        )
    columns = ["model", "layers", "parameters", "steps", "tokens", "time", "tokens/s", "training loss, nats"]
    return Table(title="Training", columns=[*columns, "validation loss, nats", "validation, bits per byte"], rows=rows)


def _decoding_table(results: DemoResults) -> Table:
    curves = [(d.label, _by_context(d)) for d in results.decoding]
    rows = []
    for length in sorted({c for _, points in curves for c in points}):
        points = [curve.get(length) for _, curve in curves]
        row = [f"{length:,}", *("–" if p is None else f"{p.seconds_per_token * 1e3:.3f}" for p in points)]
        rows.append([*row, *("–" if p is None else f"{p.cache_bytes:,}" for p in points)])
    columns = ["context", *(f"{label}, ms per token" for label, _ in curves)]
    columns += [f"{label}, bytes of cache" for label, _ in curves]
    return Table(title="Cost of a generated token against context", columns=columns, rows=rows)


def _hover(results: DemoResults, panels: Sequence[memory_pictures.MemoryPanel]) -> str:
    """The numbers that the page shows for the token under the pointer, as JSON safe inside a script element."""
    tokens = results.memory.tokens if results.memory else ()
    values = {
        "tokens": [memory_pictures.visible(token) for token in tokens],
        "panels": [
            {
                "layer": p.layer,
                "head": p.head,
                "forgotten": [float(f"{x:.4g}") for x in p.forgotten],
                "beta": p.beta,
                "correction": p.correction,
                "value": p.value,
                "lives": [[float(f"{x:.3g}") for x in row] for row in p.half_lives],
            }
            for p in panels
        ],
    }
    return json.dumps(values).replace("<", "\\u003c")
