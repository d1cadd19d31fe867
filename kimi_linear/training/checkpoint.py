"""Checkpoints of a run: one folder per saved step, each a whole model that loads by itself, plus what resuming needs.

    run/step-00000500/   config.json, *.safetensors, tokenizer files     what kimi_linear.load reads
                         training.pt                                     optimizer, data, random numbers

A folder gets its name only when all of it is on the disk, so every ``step-*`` folder is complete.
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from kimi_linear.config import ConfigError, from_release
from kimi_linear.data import Tokenizer
from kimi_linear.folder import read_config, save
from kimi_linear.model import KimiLinear
from kimi_linear.model.atomic import replaced_folder
from kimi_linear.model.checkpoint import CheckpointError, load_weights

STATE_FILE = "training.pt"
_NAME = re.compile(r"step-(\d+)")


def step_folders(folder: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest step first."""
    folder = Path(folder)
    found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)] if folder.is_dir() else []
    return sorted(found, key=_step)


def latest(folder: str | Path) -> Path | None:
    """The newest checkpoint of a run, or None where there is none. ``kimi_linear.load`` reads it."""
    found = step_folders(folder)
    return found[-1] if found else None


def save_checkpoint(
    folder: str | Path, step: int, model: KimiLinear, tokenizer: Tokenizer | None, state: dict[str, Any], *, keep: int
) -> Path:
    """Write the checkpoint of ``step``, then remove all but the newest ``keep`` (0 removes none).

    Args:
        folder: of the run.
        step: steps done.
        model: saved in the release layout.
        tokenizer: saved with it, unless None.
        state: of the training; tensors and plain values only.

    Raises:
        OSError: the disk is full or the like. Earlier checkpoints are then untouched.
    """
    folder = Path(folder)
    target = folder / f"step-{step:08d}"
    try:
        with replaced_folder(target, outdated=("*",)) as new:
            save(model, new, tokenizer)
            _write_state(state, new / STATE_FILE)
    except OSError as error:
        before = latest(folder)
        kept = "there is no earlier checkpoint" if before is None else f"the last good checkpoint is {before}"
        reason = _first_cause(error)
        raise OSError(
            reason.errno, f"could not save {target}: {reason.strerror or reason}; {kept}; free space there, then resume"
        ) from error
    if keep:
        for old in step_folders(folder)[:-keep]:
            shutil.rmtree(old)
    return target


def load_checkpoint(checkpoint: Path, model: KimiLinear) -> dict[str, Any]:
    """Fill ``model`` with a checkpoint's weights and return the training state.

    Raises:
        CheckpointError: a file is missing, truncated, damaged, or of another model; the message names the checkpoint
            before it, from which the run can go on.
    """
    try:
        if from_release(read_config(checkpoint)) != model.config:
            raise CheckpointError("its config.json is of another model than the one to be trained")
        state = torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
        load_weights(model, checkpoint)
    except (CheckpointError, ConfigError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        earlier = [path for path in step_folders(checkpoint.parent) if _step(path) < _step(checkpoint)]
        way = f"delete it to resume from {earlier[-1]}" if earlier else "delete it to start again"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{checkpoint}: expected a whole checkpoint of this model, got: {reason}; {way}"
        ) from error
    return state


def remove_unfinished(folder: str | Path) -> None:
    """Remove what a process that was killed while saving has left."""
    for path in Path(folder).glob(".*step-*.new-*"):
        shutil.rmtree(path, ignore_errors=True)


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _write_state(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:
        # torch reports a failed write in words only; where there is no room left, say so.
        full = shutil.disk_usage(path.parent).free < 1 << 20
        number = errno.ENOSPC if full else errno.EIO
        raise OSError(number, f"{os.strerror(number)} ({str(error).splitlines()[0]})") from error


def _first_cause(error: OSError) -> OSError:
    """The failure itself, out of the folders' messages around it."""
    while isinstance(error.__cause__, OSError):
        error = error.__cause__
    return error
