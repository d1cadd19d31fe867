"""``kimi-linear check``: name what is wrong with a model folder, what breaks where, and how to repair it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro
from rich.console import Console

from kimi_linear.cli.console import closing, memory, parse, seconds, stderr, stdout, track
from kimi_linear.cli.folders import model_folder

if TYPE_CHECKING:
    from kimi_linear.model.layouts.check import Examination
    from kimi_linear.model.layouts.defects import Defect

SHOWN = 3
"""Places of one defect that are named; --json has all."""


@dataclass(frozen=True, kw_only=True)
class CheckArgs:
    """Flags of ``check``."""

    model: tyro.conf.Positional[Path | None] = None
    """Folder of a model, in the release layout, transformers' or fla's, or a name of the hub, such as "owner/model"; the
    newest under runs/ where None."""
    headers_only: bool = False
    """Look at names, shapes and config.json alone: seconds for any size. Without it every number is read once."""
    json: bool = False
    """Print one JSON object instead of text."""


def main(argv: Sequence[str]) -> None:
    """Parse, examine, print. Exits with 1 where there is an error."""
    args = parse(CheckArgs, "check", argv, "Name what is wrong with a model folder, without loading it.")
    since = time.monotonic()
    folder = _folder(args.model)

    from kimi_linear.model.layouts.check import examine

    console = stderr()
    found = examine(folder)
    defects = list(found.defects)
    started = time.monotonic()
    if not args.headers_only and found.files.tensors:
        defects += _scanned(found, console)
    rate = found.nbytes / max(time.monotonic() - started, 1e-9)
    errors = [defect for defect in defects if defect.level == "error"]
    if args.json:
        print(json.dumps(_json(found, defects, scanned=not args.headers_only), indent=2))
    else:
        _print(found, defects, headers_only=args.headers_only)
    closing(console, {} if args.headers_only else {"rate": f"{memory(rate)}/s"}, since)
    if errors:
        raise SystemExit(1)


def _folder(named: Path | None) -> Path:
    """The folder to examine: one that is named may lack what makes it a model, which is then the first defect."""
    if named is not None and named.is_dir() and any((*named.glob("*.safetensors*"), *named.glob("config.json"))):
        return named
    return model_folder(named)


def _scanned(found: Examination, console: Console) -> list[Defect]:
    from kimi_linear.model.layouts.check import scan

    started = time.monotonic()

    def left(done: int) -> str:
        took = time.monotonic() - started
        return f"{memory(done / max(took, 1e-9))}/s · {seconds(took / max(done, 1) * (found.nbytes - done))} left"

    steps = track(
        scan(found), found.nbytes, console, step=lambda step: step.nbytes, describe=lambda step: left(step.nbytes)
    )
    return [step.defect for step in steps if step.defect is not None]


def _json(found: Examination, defects: list[Defect], *, scanned: bool) -> dict[str, Any]:
    return {
        "folder": str(found.folder),
        "layout": found.layout,
        "tensors": len(found.files.tensors),
        "bytes": found.nbytes,
        "numbers_read": scanned,
        "sound": not any(defect.level == "error" for defect in defects),
        "defects": [defect.to_dict() for defect in defects],
    }


def _print(found: Examination, defects: list[Defect], *, headers_only: bool) -> None:
    from kimi_linear.model.layouts.defects import KINDS

    out = stdout()
    out.print(
        f"{found.folder}: {found.layout} layout, {len(found.files.tensors):,} tensors, {memory(found.nbytes)}"
        f"{', numbers not read' if headers_only else ''}"
    )
    for defect in defects:
        kind = KINDS[defect.kind]
        places = ", ".join(defect.places[:SHOWN])
        more = f" and {len(defect.places) - SHOWN:,} more" if len(defect.places) > SHOWN else ""
        out.print()
        out.print(f"{defect.level}: {defect.kind}", style="bold red" if defect.level == "error" else "bold yellow")
        out.print(f"  where   {places}{more}")
        out.print(f"  found   {defect.found}")
        out.print(f"  breaks  {kind.breaks}")
        out.print(f"  repair  {kind.repair if defect.can_mend or not kind.mendable else 'by hand'}")
    errors = [defect for defect in defects if defect.level == "error"]
    out.print()
    if not errors:
        out.print("No errors.")
    elif all(defect.can_mend for defect in errors):
        out.print(f"Errors: {len(errors)}. This mends them: kimi-linear convert --repair {found.folder} NEW_FOLDER")
    else:
        lost = sum(not defect.can_mend for defect in errors)
        out.print(f"Errors: {len(errors)}, and {lost} of them cannot be repaired from what is in the folder.")
