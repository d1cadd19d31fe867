"""The tables of the KDA benchmark, made from its raw records: one for speed per mode, one for errors, one for memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks._report import Section, write_page
from benchmarks.ops import first_call
from benchmarks.ops._check import GRADIENT_BOUND, OUTPUT_BOUND, PARAMETER_BOUND, worst
from benchmarks.ops.shapes import CHUNK

NOISE = 0.03
"""Two implementations within it count as equally fast."""
MODES = {"forward": "Forward", "backward": "Forward and backward"}
SPEED = (
    "shape", "gate", "auto takes", "µs", "GB/s", "of the floor", "TFLOP/s", "spread",
    "torch, µs", "fla, µs", "fla / ours", "SDPA, µs", "SDPA / ours",
)  # fmt: skip


def wrong_choices(records: Sequence[dict]) -> list[str]:
    """Rows in which ``impl="auto"`` took an implementation that another of ours beat by more than the noise."""
    found = []
    for r in records:
        times = r.get("seconds")
        if times and r["fastest"] and times[r["fastest"]] < (1 - NOISE) * times.get(r["auto"], float("inf")):
            found.append(f"{r['shape']} {r['gate']} {r['mode']}: auto took {r['auto']}, {r['fastest']} is faster")
    return found


def line(record: dict) -> str:
    """A record in one line, for whoever watches."""
    if "first_call" in record:
        return "  ".join(map(str, first_call.row_of(record["first_call"], record)))
    head = f"{record['shape']:12} {record['gate']:7} {record['mode']:9}"
    for reason in ("skipped", "wrong"):
        if reason in record:
            return f"{head} {reason}: {record[reason]}"
    errors = ", ".join(f"{name} {max(e.values()):.1e}" for name, e in record["errors"].items())
    times = ", ".join(f"{name} {1e6 * s:,.0f} µs" for name, s in record.get("seconds", {}).items())
    return f"{head} worst error: {errors}; {times or 'not timed at this gate'}"


def speed_row(record: dict, bandwidth: float) -> list[object]:
    """Cells of ``SPEED``."""
    times, notes = record["seconds"], record["notes"]
    best = times.get(record["auto"])
    if best is None:
        return [record["shape"], record["gate"], f"{record['auto']}: {notes[record['auto']]}", *["–"] * 10]
    timed = [name for name in times if name not in ("fla", "sdpa")]
    verdict = ", the fastest" if len(timed) > 1 else ", alone timed"
    if wrong_choices([record]):
        verdict = f", but {record['fastest']} is faster"
    ratio = {name: f"{times[name] / best:.2f}" if name in times else "–" for name in ("fla", "sdpa")}
    return [
        record["shape"],
        record["gate"],
        f"{record['auto']}{verdict}",
        _micro(best),
        f"{record['bytes'] / best / 1e9:,.0f}",
        f"{record['bytes'] / bandwidth / best:.1%}",
        f"{record['flops'] / best / 1e12:.3g}",
        f"{record['spread'][record['auto']]:.1%}",
        *(_micro(times.get("torch")), _micro(times.get("fla")), ratio["fla"]),
        *(_micro(times.get("sdpa")), ratio["sdpa"]),
    ]


def error_row(record: dict) -> list[object]:
    """Cells of the table of errors: worst of our implementations, and fla's."""
    mine = [worst(errors) for name, errors in record["errors"].items() if name != "fla"]
    theirs = worst(record["errors"]["fla"]) if "fla" in record["errors"] else (None, None, None)
    known = [[error for error in kind if error is not None] for kind in zip(*mine, strict=True)]
    ours = [max(kind, default=None) for kind in known]
    cells = [f"{e:.1e}" if e is not None else "–" for e in (*ours, *theirs)]
    return [record["shape"], record["gate"], MODES[record["mode"]].lower(), *cells]


def memory_row(record: dict) -> list[object]:
    """Cells of the table of memory."""
    mine, theirs = record["memory"]["auto"], record["memory"].get("fla", {})
    cells: list[object] = [record["shape"], record["gate"]]
    for kind in ("saved", "peak"):
        ours, other = mine.get(kind), theirs.get(kind)
        share = f"{ours / other:.0%}" if ours is not None and other else "–"
        cells += [f"{ours / 2**20:,.1f}" if ours is not None else "–", f"{other / 2**20:,.1f}" if other else "–", share]
    return cells


def sections(records: Sequence[dict], bandwidth: float) -> list[Section]:
    """Every table of the page."""
    rows = [r for r in records if "errors" in r]
    timed = [r for r in rows if "seconds" in r]
    tuned = max((r["first"]["fla"] for r in rows if "fla" in r["first"]), default=None)
    waiting = (
        ""
        if tuned is None
        else f" fla's first call at a new shape took up to {tuned:.0f} s, which is outside the times."
    )
    tables = [
        Section(
            title=title,
            about=f"Floor: {'1,282' if mode == 'forward' else '3,590'} bytes per token and head where HV = H and K = V = 128, and "
            f"the final state. Operations: the chunk form's with C = {CHUNK}{'' if mode == 'forward' else ', times three'}.{waiting}",
            columns=SPEED,
            rows=[speed_row(r, bandwidth) for r in timed if r["mode"] == mode],
        )
        for mode, title in MODES.items()
    ]
    tables.append(
        Section(
            title="Memory of forward and backward",
            about="MiB on top of the inputs: held between forward and backward besides the output, and most at any time.",
            columns=["shape", "gate", "held", "fla's", "share", "peak", "fla's peak", "share of it"],
            rows=[memory_row(r) for r in timed if "memory" in r],
        )
    )
    tables.append(
        Section(
            title="Errors before timing",
            about="Relative to the fp64 result of two heads (one from 262,144 tokens on), at the timed inputs. Allowed: output "
            f"{OUTPUT_BOUND:g}, gradients {GRADIENT_BOUND:g}, those of A_log and dt_bias {PARAMETER_BOUND:g}. fla is not held to them.",
            columns=[
                "shape",
                "gate",
                "mode",
                "output",
                "gradients",
                "A_log, dt_bias",
                "fla: output",
                "gradients ",
                "A_log, dt_bias ",
            ],
            rows=[error_row(r) for r in rows],
        )
    )
    calls = [r for r in records if "first_call" in r]
    tables.append(
        Section(
            title="First call, cold caches",
            about=f"In a process of its own. Allowed: {first_call.LIMIT:g} s, and {first_call.REPEATED:g} s for a new length.",
            columns=first_call.COLUMNS,
            rows=[first_call.row_of(r["first_call"], r) for r in calls],
        )
    )
    missing = [r for r in records if "skipped" in r or "wrong" in r]
    tables.append(
        Section(
            title="Not timed",
            columns=["shape", "gate", "mode", "why"],
            rows=[
                *([r["shape"], r["gate"], r["mode"], r.get("wrong") or r["skipped"]] for r in missing),
                *([r["shape"], r["gate"], r["mode"], f"{n}: {why}"] for r in rows for n, why in r["notes"].items()),
            ],
        )
    )
    return tables


def write(name: str, records: Sequence[dict], *, bandwidth: float, device: str, folder: Path) -> Path:
    """The page and the JSON file of a run so far."""
    wrong = wrong_choices(records)
    verdict = "In every row `impl=\"auto\"` took the fastest of our implementations that were timed." if not wrong else (
        "`impl=\"auto\"` did not take the fastest: " + "; ".join(wrong) + "."
    )  # fmt: skip
    return write_page(
        name,
        title="Kimi Delta Attention: ours, fla and softmax attention",
        about=f"From raw inputs in bf16, softplus gate and l2 norm inside. Medians of interleaved calls, L2 flushed before each; "
        f"spread is the distance between the quartiles over the median. The floor is at {bandwidth / 1e12:.2f} TB/s, what a copy moves "
        f"here, read and written. SDPA is PyTorch's causal attention of the same tokens and heads. {verdict}",
        sections=sections(records, bandwidth),
        data={"copy_bytes_per_second": bandwidth, "records": list(records)},
        device=device,
        packages=("triton", "fla-core"),
        folder=folder,
    )  # fmt: skip


def _micro(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1e6 * seconds:,.0f}" if seconds >= 1e-4 else f"{1e6 * seconds:.1f}"
