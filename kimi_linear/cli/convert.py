"""``kimi-linear convert``: rewrite a model folder in another layout, or repaired in its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from kimi_linear.cli.console import closing, memory, parse, seconds, stderr, stdout, track
from kimi_linear.cli.folders import existing_folder


@dataclass(frozen=True, kw_only=True)
class ConvertArgs:
    """Flags of ``convert``."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
    """Folder of a model, in the release layout, transformers' or fla's; or a name of the hub, such as "owner/model"."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Where the result goes: a name that is free, or an empty folder."""
    to: Literal["release", "transformers", "fla"] = "release"
    """Layout of the result: the release's (vLLM, SGLang, transformers and kimi_linear read it), that of transformers' own
    state_dict, or that of fla's KDAForCausalLM."""
    repair: bool = False
    """Mend what 'kimi-linear check' calls repairable; without it a folder with errors is refused."""
    shard_gib: float = 5.0
    """Size in GiB that a weight file stays below; about as much memory is used."""


def main(argv: Sequence[str]) -> None:
    """Parse, plan, write, say what was done."""
    args = parse(ConvertArgs, "convert", argv, "Rewrite a model folder in another layout, or repaired.")
    since = time.monotonic()
    console, out = stderr(), stdout()

    from kimi_linear.model.layouts.convert import plan_conversion, write_conversion

    folder = existing_folder(args.source, "name the folder that holds its config.json")
    plan = plan_conversion(folder, to=args.to, repair=args.repair)
    out.print(f"{args.source}: {plan.source.layout} layout, to {args.target}: {args.to} layout, {memory(plan.total)}")
    for defect in plan.mended:
        out.print(f"mending {defect.kind}: {defect}")
    for note in plan.notes:
        out.print(f"note: {note}")
    started = time.monotonic()

    def left(done: int) -> str:
        took = time.monotonic() - started
        return f"{memory(done / max(took, 1e-9))}/s · {seconds(took / max(done, 1) * (plan.total - done))} left"

    steps = write_conversion(plan, args.target, max_shard_bytes=int(args.shard_gib * 2**30))
    for _ in track(steps, plan.total, console, step=lambda step: step.nbytes, describe=lambda step: left(step.nbytes)):
        pass
    out.print(f"wrote {args.target}: {len(plan.tensors):,} tensors")
    rate = plan.total / max(time.monotonic() - started, 1e-9)
    closing(console, {"rate": f"{memory(rate)}/s"}, since)
