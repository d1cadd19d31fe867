"""Files that are a folder's own: a link in a folder from elsewhere may point at anything on the machine."""

from __future__ import annotations

from pathlib import Path

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "merges.txt")
"""Names of the files that loading a model may open."""


def own_file(folder: Path, name: str, *, error: type[ValueError]) -> Path:
    """The path of ``name`` in ``folder``, whether it is there or not.

    The hub's cache is made of links from ``<model>/snapshots/<revision>/`` to ``<model>/blobs/``; those are its own.

    Args:
        folder: of a model.
        name: of a file in it, without a path.
        error: what to raise for a link that leads out of the folder, or nowhere.
    """
    path = folder / name
    if not path.is_symlink():
        return path
    home = folder.resolve()
    allowed = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    goal = path.resolve()
    if not goal.is_file() or not any(goal.is_relative_to(root) for root in allowed):
        raise error(
            f"{name}: expected a file of {folder}, got a link to {goal}; put the file itself there if you trust it"
        )
    return path


def check_links(folder: Path, *, error: type[ValueError]) -> None:
    """Raise ``error`` where a file that loading may open is a link out of ``folder``."""
    for pattern in MODEL_FILES:
        for path in sorted(folder.glob(pattern)):
            own_file(folder, path.name, error=error)
