"""``kimi-linear study``: the list of studies, or one of them, resumed where it stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

from kimi_linear.cli.console import closing, parse, stderr, stdout, table, track
from kimi_linear.cli.folders import RUNS
from kimi_linear.studies.registry import STUDIES
from kimi_linear.studies.study import Study


def main(argv: Sequence[str]) -> None:
    """Parse, run, print."""
    if not argv or argv[0] in ("-h", "--help"):
        _list()
        return
    name, flags = argv[0], argv[1:]
    if name not in STUDIES:
        print(f"kimi-linear study: unknown study {name!r}; expected one of {', '.join(STUDIES)}", file=sys.stderr)
        raise SystemExit(2)
    _run(STUDIES[name], flags)


def _list() -> None:
    out = stdout()
    out.print("usage: kimi-linear study NAME [flags]\n")
    for study in STUDIES.values():
        out.print(f"{study.name}: {study.shows}")
        out.print(f"  expected: {study.expected}\n  price: {study.price}")


def _run(study: Study[Any], flags: Sequence[str]) -> None:
    config, folder = _parse(study, flags)
    since = time.monotonic()
    console = stderr()
    console.print(f"{folder}: finished cells are kept; run the same command again to continue", style="dim")
    console.print(f"expected: {study.expected}", style="dim")
    last = 0
    try:
        progress = study.run(config, folder)
        first = next(progress, None)
        if first is not None:
            for at in track(
                _chain(first, progress), first.total, console, step=lambda p: p.step, describe=lambda p: p.text
            ):
                last = at.step
    finally:
        # Ctrl-C too leaves a table of what is finished.
        found = study.report(config, folder)
        if found.rows:
            stdout().print(table(found.shown(), found.title))
        for path in found.files:
            console.print(f"wrote {path}", style="dim")
        closing(console, {"steps": f"{last:,}"}, since)


def _chain(first: Any, rest: Any) -> Any:
    yield first
    yield from rest


def _parse(study: Study[Any], flags: Sequence[str]) -> tuple[Any, Path]:
    """The study's flags, and --folder, which all studies share."""
    from typing import Annotated

    import tyro

    folder = Annotated[Path, tyro.conf.arg(help="Where cells, table and figure go.")]
    both = make_dataclass(
        "StudyArgs", [("study", study.config, study.config()), ("folder", folder, RUNS / study.name)], frozen=True
    )
    args = parse(both, f"study {study.name}", flags, f"{study.shows} Expected: {study.expected} Price: {study.price}")
    return args.study, args.folder
