"""Writing a folder all at once: a reader finds the old one or the new one, never a half-written one."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced_folder(folder: str | Path, *, outdated: tuple[str, ...] = ()) -> Iterator[Path]:
    """A new folder to write into, which takes the place of ``folder`` when the context ends without an error.

    It is written beside ``folder``, flushed to the disk, and renamed. On an error it is removed and ``folder`` is left
    as it was.

    Args:
        folder: where the new folder goes: absent, empty, or an earlier one of the same kind.
        outdated: patterns of file names, such as "*.safetensors", that may vanish with the earlier folder.

    Raises:
        FileExistsError: ``folder`` holds files that the new one lacks and that would be lost.
        OSError: the disk is full, or another failure to write; the message says what is left.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"folder: expected a folder or nothing, got the file {target}; choose another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{target.name}.new-", dir=target.parent))
    try:
        new.chmod(0o777 & ~_umask())
        yield new
        _refuse_losses(target, new, outdated)
        _flush(new)
        _swap(target, new)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, FileExistsError):
            raise
        raise OSError(error.errno, explain(error, target)) from error
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def explain(error: OSError, target: Path) -> str:
    """What could not be saved, why, what is left, and the way out."""
    reason = error.strerror or str(error)
    left = f"the earlier {target} is untouched" if target.exists() else f"{target} was not made"
    way = (
        "free space on that disk or save elsewhere" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "save elsewhere"
    )
    return f"could not save {target}: {reason}; {left}; {way}"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _refuse_losses(target: Path, new: Path, outdated: tuple[str, ...]) -> None:
    if not target.is_dir():
        return
    written = {entry.name for entry in new.iterdir()}
    for entry in sorted(target.iterdir()):
        if entry.name not in written and not any(entry.match(pattern) for pattern in outdated):
            raise FileExistsError(
                f"folder: expected a new or empty folder, or an earlier model, got {target}, which also holds {entry.name} "
                "that saving would delete; choose another folder or move that away"
            )


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _swap(target: Path, new: Path) -> None:
    if not target.exists():
        os.rename(new, target)
    else:
        # A folder with files cannot be renamed over; between the two renames both are whole, under hidden names.
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
        os.rename(target, old)
        try:
            os.rename(new, target)
        except BaseException:
            os.rename(old, target)
            raise
        shutil.rmtree(old)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
