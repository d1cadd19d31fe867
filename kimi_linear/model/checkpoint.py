"""Weights on disk: safetensors in shards under the release layout's names, read and written one tensor at a time.

A model holds its experts stacked, a checkpoint one by one. ``release_tensors`` lists the checkpoint's tensors as views
of the model's parameters, so that reading and writing are plain copies.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kimi_linear.model.atomic import replaced_folder
from kimi_linear.model.model import KimiLinear
from kimi_linear.model.moe import Experts

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = ("*.safetensors", INDEX_FILE)
"""Names of the files that hold weights."""
GIB = 1 << 30


class CheckpointError(ValueError):
    """Files that are no checkpoint of this model: what was expected, what is there, and where."""


def release_tensors(model: KimiLinear) -> dict[str, Tensor]:
    """Every tensor of the checkpoint by its name in the release layout, as a view of the model's parameters."""
    tensors: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        parent, _, leaf = name.rpartition(".")
        experts = modules[parent]
        if not isinstance(experts, Experts):
            tensors[name] = parameter.data
            continue
        for e, weight in enumerate(parameter.data):
            if leaf == "down":
                tensors[f"{parent}.{e}.w2.weight"] = weight
            else:
                tensors[f"{parent}.{e}.w1.weight"], tensors[f"{parent}.{e}.w3.weight"] = weight.chunk(2)
    return tensors


def save_weights(model: KimiLinear, folder: str | Path, *, max_shard_bytes: int = 5 * GIB) -> None:
    """Save the weights, and nothing else, as a folder that appears whole or not at all.

    Args:
        model: what to save, in the dtypes it has.
        folder: absent, empty, or an earlier folder of weights, which is replaced.
        max_shard_bytes: size that a file stays below, unless one tensor alone is larger.

    Raises:
        FileExistsError: ``folder`` holds other files too. OSError: the disk is full or the like; an earlier ``folder``
            is then untouched.
    """
    with replaced_folder(folder, outdated=WEIGHT_FILES) as new:
        write_weights(model, new, max_shard_bytes=max_shard_bytes)


def write_weights(model: KimiLinear, folder: Path, *, max_shard_bytes: int = 5 * GIB) -> None:
    """Write the weights into ``folder`` as it is: one file, or several and an index. See ``save_weights``.

    Raises:
        ValueError: weights on the meta device. OSError: a failure to write.
    """
    if model.device.type == "meta":
        raise ValueError("model: expected weights to save, got a model on the meta device; load or initialise it first")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected a positive number, got {max_shard_bytes}")
    shards = _shards(release_tensors(model), max_shard_bytes)
    if len(shards) == 1:
        _write(shards[0], folder / SINGLE_FILE)
        return
    index: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write(shard, folder / name)
        index |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
    (folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")


def load_weights(
    model: KimiLinear,
    folder: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Fill the model's weights from a folder of safetensors, one tensor at a time.

    A model on the meta device is allocated first, so that nothing is held twice. A_log, dt_bias and the router's bias
    are fp32 whatever the file and ``dtype`` say. After an error the weights are partly the old ones.

    Args:
        model: what to fill.
        folder: with ``model.safetensors``, or shards and their index.
        device: where the model goes first; where it is, or the CPU for one on the meta device, if None.
        dtype: what the model is cast to first; unchanged where None.

    Raises:
        FileNotFoundError: no weights there. CheckpointError: a missing, unexpected or misshapen tensor, one that is not
            finite, a file that is truncated or no safetensors, or an index that leaves the folder.
    """
    folder = Path(folder)
    files = _files(folder)
    if dtype is not None:
        model.to(dtype)
    if model.device.type == "meta":
        place = "cpu" if device is None else device
        # As model.to_empty, which would import torch's decompositions for a second.
        model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=place))
    elif device is not None:
        model.to(device)
    missing = release_tensors(model)
    for path, listed in files.items():
        for name, tensor in _read(path, listed, missing):
            target = missing.pop(name)
            target.copy_(tensor)
            if not bool(torch.isfinite(target).all()):
                raise CheckpointError(
                    f"{name}: expected finite numbers in {target.dtype}, got NaN or infinity from {path}; "
                    "the checkpoint is damaged, or its numbers do not fit that dtype"
                )
    if missing:
        raise CheckpointError(
            f"{next(iter(missing))}: missing from {folder} ({len(missing)} tensors are); is config.json of the same model?"
        )


def _shards(tensors: dict[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    # Views of a stacked parameter share its storage; a file holds each on its own.
    copies = {name: tensor.detach().to("cpu").clone() for name, tensor in tensors.items()}
    try:
        save_file(copies, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library wraps the system's error in words; a full disk must be told from other failures.
        full = "os error 28" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, f"{path.name}: {error}") from error


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """The weight files in order, each with the tensors that the index lists in it (None: there is no index)."""
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: expected a folder with weights, got {folder}, which is not there")
    present = {path.name for path in folder.glob("*.safetensors")}
    if not (folder / INDEX_FILE).exists():
        if present == {SINGLE_FILE}:
            return {folder / SINGLE_FILE: None}
        if not present:
            raise FileNotFoundError(f"folder: expected {SINGLE_FILE} or {INDEX_FILE} in {folder}, found neither")
        raise CheckpointError(
            f"{folder}: expected {INDEX_FILE} beside several weight files, or {SINGLE_FILE} alone, got "
            f"{', '.join(sorted(present))}; was the download complete?"
        )
    weight_map = _index(folder / INDEX_FILE)
    names = sorted(set(weight_map.values()))
    for name in names:
        # An index comes from elsewhere: it may name files of this folder and nothing else.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_FILE}: expected names of .safetensors files in its own folder, got {name!r}")
        if name not in present:
            raise FileNotFoundError(f"{name}: listed in {folder / INDEX_FILE} but missing; was the download complete?")
    strangers = sorted(present - set(names))
    if strangers:
        raise CheckpointError(
            f"{strangers[0]}: found in {folder}, but {INDEX_FILE} lists nothing in it; remove it, or repair the index"
        )
    return {folder / name: {key for key, file in weight_map.items() if file == name} for name in names}


def _index(path: Path) -> dict[str, str]:
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: expected JSON, got {error}; the file is damaged") from error
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: expected an object 'weight_map' from tensor names to file names")
    return weight_map


def _read(path: Path, listed: set[str] | None, wanted: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file, each checked against the one it goes into."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            if listed is not None and names != listed:
                raise CheckpointError(
                    f"{path}: expected the tensors that {INDEX_FILE} lists in it, got a difference at "
                    f"{min(names ^ listed)}; index and files are of different checkpoints"
                )
            for name in sorted(names):
                if name not in wanted:
                    raise CheckpointError(
                        f"{name}: not a tensor of this model, found in {path}; is config.json its own?"
                    )
                tensor, target = file.get_tensor(name), wanted[name]
                if tensor.shape != target.shape:
                    raise CheckpointError(
                        f"{name}: expected shape {list(target.shape)}, got {list(tensor.shape)} in {path}; "
                        "is config.json of the same model?"
                    )
                if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
                    raise CheckpointError(
                        f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype} in {path}; "
                        "quantised weights are not read"
                    )
                yield name, tensor
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: expected a whole safetensors file, got one that is truncated, damaged or of another kind ({error})"
        ) from error
