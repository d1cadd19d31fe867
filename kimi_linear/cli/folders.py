"""Which model a verb means when none is named: the newest one under runs/, else the one that comes with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

RUNS = Path("runs")
"""Where the verbs write, unless told otherwise."""
TOKENIZERS = ("tokenizer.json", "tiktoken.model")
"""One of these beside the weights makes a model that reads text."""


def model_folder(named: Path | None, root: Path = RUNS, *, reads_text: bool = False) -> Path:
    """The model folder to use: ``named``, or the newest below it or below ``root``, or the package's own where none is.

    Where none is named and ``reads_text``, models without a tokenizer are passed over, such as those of ``study mqar``.

    "nano" names the package's own, where no folder is called so. A model folder holds config.json and safetensors; a run's folder holds checkpoints that do. A name of the hub
    (``kimi_linear.model.hub``) is downloaded first.

    Raises:
        FileNotFoundError: there is none; the message says how to make one. Others, for a name of the hub, as
            ``kimi_linear.load``.
    """
    if named is not None:
        if is_model(named):
            return named
        from kimi_linear.folder import is_shipped, shipped_folder  # torch comes along

        if is_shipped(named):
            return shipped_folder()
        if not named.is_dir():
            return existing_folder(named, f"try one of those in {root}/")
    where = root if named is None else named
    found = [path.parent for path in where.rglob("config.json") if is_model(path.parent) and not _hidden(path, where)]
    if named is None and reads_text:
        found = [folder for folder in found if any((folder / name).is_file() for name in TOKENIZERS)]
    if not found and named is None:
        from kimi_linear.folder import shipped_folder

        try:
            return shipped_folder()
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{where}: expected a model (config.json and *.safetensors) in it, found none, and the package holds none "
                "either; make one with: kimi-linear train"
            ) from error
    if not found:
        raise FileNotFoundError(
            f"{where}: expected a model (config.json and *.safetensors) in it, found none; make one with: kimi-linear train"
        )
    # Ties (one coarse clock tick) go to the later name, which for checkpoints is the later step.
    return max(found, key=lambda folder: ((folder / "config.json").stat().st_mtime_ns, folder.name))


def existing_folder(named: Path, way_out: str, files: Sequence[str] | None = None) -> Path:
    """``named`` where it is a folder, else the hub's model of that name, downloaded.

    Args:
        named: a folder, or a name such as "moonshotai/Kimi-Linear-48B-A3B-Instruct", which reads as a path.
        way_out: what to do where it is neither.
        files: patterns of what to download; all that loading may need where None.

    Raises:
        FileNotFoundError: it is neither. Others, for a name of the hub, as ``kimi_linear.load``.
    """
    if named.is_dir():
        return named
    from kimi_linear.model import hub  # torch comes along

    if not hub.is_hub_name(named.as_posix()):
        raise FileNotFoundError(f"{named}: expected a model folder, got nothing there; {way_out}")
    return hub.local_folder(named.as_posix(), files=hub.DOWNLOADED if files is None else files)


def is_model(folder: Path) -> bool:
    """Whether ``folder`` holds a configuration and weights."""
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _hidden(path: Path, below: Path) -> bool:
    """Whether a folder on the way from ``below`` to ``path`` begins with a dot: an unfinished save of a killed run."""
    return any(part.startswith(".") for part in path.relative_to(below).parts)
