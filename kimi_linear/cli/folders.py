"""Which model a verb means when none is named: the newest one under runs/."""

from __future__ import annotations

from pathlib import Path

RUNS = Path("runs")
"""Where the verbs write, unless told otherwise."""


def model_folder(named: Path | None, root: Path = RUNS) -> Path:
    """The model folder to use: ``named``, or the newest below it or below ``root``.

    A model folder holds config.json and safetensors; a run's folder holds checkpoints that do. A name of the hub
    (``kimi_linear.model.hub``) is downloaded first.

    Raises:
        FileNotFoundError: there is none; the message says how to make one. Others, for a name of the hub, as
            ``kimi_linear.load``.
    """
    if named is not None:
        if is_model(named):
            return named
        if not named.is_dir():
            from kimi_linear.model.hub import is_hub_name, local_folder  # torch comes along

            if is_hub_name(str(named)):
                return local_folder(str(named))
            raise FileNotFoundError(f"{named}: expected a model folder, got nothing there; try one of those in {root}/")
    where = root if named is None else named
    found = [path.parent for path in where.rglob("config.json") if is_model(path.parent) and not _hidden(path, where)]
    if not found:
        raise FileNotFoundError(
            f"{where}: expected a model (config.json and *.safetensors) in it, found none; make one with: kimi-linear train"
        )
    # Ties (one coarse clock tick) go to the later name, which for checkpoints is the later step.
    return max(found, key=lambda folder: ((folder / "config.json").stat().st_mtime_ns, folder.name))


def is_model(folder: Path) -> bool:
    """Whether ``folder`` holds a configuration and weights."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _hidden(path: Path, below: Path) -> bool:
    """Whether a folder on the way from ``below`` to ``path`` begins with a dot: an unfinished save of a killed run."""
    return any(part.startswith(".") for part in path.relative_to(below).parts)
