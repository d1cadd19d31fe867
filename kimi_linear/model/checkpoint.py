"""Weights on disk: safetensors in shards under the release layout's names, streamed in and written shard by shard.

A model holds its experts stacked, a checkpoint one by one. ``release_tensors`` lists the checkpoint's tensors as views
of the model's parameters, so that reading and writing are plain copies.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kimi_linear.config.json_file import read_json_object
from kimi_linear.config.own_file import own_file
from kimi_linear.model.atomic import replaced_folder
from kimi_linear.model.model import KimiLinear
from kimi_linear.model.moe import Experts
from kimi_linear.model.parameters import allocate
from kimi_linear.model.safetensors_file import CheckpointError, StoredTensor, read_header
from kimi_linear.model.streaming import stream_into

__all__ = [
    "CheckpointError",
    "fill",
    "load_weights",
    "release_tensors",
    "save_weights",
    "stored_tensors",
    "write_weights",
]

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = ("*.safetensors", INDEX_FILE)
"""Names of the files that hold weights."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
GIB = 1 << 30


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
    """Fill the model's weights from a folder of safetensors, streamed into place.

    Every file's header is checked before anything is allocated or changed. A model on the meta device is then
    allocated, so that nothing is held twice. A_log, dt_bias and the router's bias are fp32 whatever the file and
    ``dtype`` say. After an error in the numbers themselves the weights are partly the old ones.

    Args:
        model: what to fill.
        folder: with ``model.safetensors``, or shards and their index.
        device: where the model goes first; where it is, or the CPU for one on the meta device, if None.
        dtype: what the model is cast to first. Where None it stays as it is, and numbers stored wider than it holds
            them are refused.

    Raises:
        FileNotFoundError: no weights there. CheckpointError: a missing, unexpected or misshapen tensor, one that is not
            finite, a file that is truncated, no safetensors or outside the folder, or an index that leaves it.
    """
    fill(model, stored_tensors(folder), device=device, dtype=dtype)


def stored_tensors(folder: str | Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its name: where it lies, its shape and dtype. Only headers are read.

    Raises:
        FileNotFoundError: no weights there. CheckpointError: a file that is damaged or outside the folder, an index
            that disagrees with the files, or a tensor in two of them.
    """
    found: dict[str, StoredTensor] = {}
    for path, listed in _files(Path(folder)).items():
        header = read_header(path)
        twice = sorted(header.keys() & found.keys())
        if twice:
            other = found[twice[0]].path.name
            raise CheckpointError(
                f"{twice[0]}: expected in one file, found in {other} and in {path}; remove one of them"
            )
        if listed is not None and header.keys() != listed:
            raise CheckpointError(
                f"{path}: expected the tensors that {INDEX_FILE} lists in it, got a difference at "
                f"{min(header.keys() ^ listed)}; index and files are of different checkpoints"
            )
        found |= header
    return found


def fill(
    model: KimiLinear,
    stored: dict[str, StoredTensor],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """``load_weights`` from tensors that ``stored_tensors`` found."""
    _check_stored(stored, release_tensors(model), any_dtype=dtype is not None)
    if dtype is not None:
        model.to(dtype)
    if model.device.type == "meta":
        allocate(model, "cpu" if device is None else device)
    elif device is not None:
        model.to(device)
    stream_into((stored[name], target) for name, target in release_tensors(model).items())


def _check_stored(stored: dict[str, StoredTensor], wanted: dict[str, Tensor], *, any_dtype: bool) -> None:
    """Refuse tensors that are not those of the model, before a number is read."""
    for name, tensor in stored.items():
        if name not in wanted:
            raise CheckpointError(
                f"{name}: not a tensor of this model, found in {tensor.path}; is config.json its own? "
                f"'kimi-linear check {tensor.path.parent}' names every defect and says which can be repaired"
            )
        target = wanted[name]
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{name}: expected shape {list(target.shape)}, got {list(tensor.shape)} in {tensor.path}; "
                "is config.json of the same model?"
            )
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise CheckpointError(
                f"{name}: expected float64, float32, bfloat16 or float16, got {tensor.dtype} in {tensor.path}; "
                "quantised weights are not read"
            )
        if not any_dtype and torch.promote_types(tensor.dtype, target.dtype) != target.dtype:
            raise CheckpointError(
                f"{name}: expected numbers that {target.dtype} holds, as the model asks for, got {tensor.dtype} in "
                f"{tensor.path}; load with dtype={target.dtype} to round them, or with dtype={tensor.dtype}"
            )
    missing = wanted.keys() - stored.keys()
    if missing:
        where = next(iter(stored.values())).path.parent if stored else "files without tensors"
        raise CheckpointError(
            f"{min(missing)}: missing from {where} ({len(missing)} tensors are); is config.json of the same model? "
            f"'kimi-linear check {where}' names every defect and says which can be repaired"
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
            return {own_file(folder, SINGLE_FILE, error=CheckpointError): None}
        if not present:
            raise FileNotFoundError(f"folder: expected {SINGLE_FILE} or {INDEX_FILE} in {folder}, {_instead(folder)}")
        raise CheckpointError(
            f"{folder}: expected {INDEX_FILE} beside several weight files, or {SINGLE_FILE} alone, got "
            f"{', '.join(sorted(present))}; was the download complete?"
        )
    weight_map = _index(own_file(folder, INDEX_FILE, error=CheckpointError))
    listed: dict[str, set[str]] = {}
    for key, file in weight_map.items():
        listed.setdefault(file, set()).add(key)
    for name in sorted(listed):
        # An index comes from elsewhere: it may name files of this folder and nothing else.
        if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_FILE}: expected names of .safetensors files in its own folder, got {name!r}")
        if name not in present:
            raise FileNotFoundError(f"{name}: listed in {folder / INDEX_FILE} but missing; was the download complete?")
    strangers = sorted(present - listed.keys())
    if strangers:
        raise CheckpointError(
            f"{strangers[0]}: found in {folder}, but {INDEX_FILE} lists nothing in it; remove it, or repair the index"
        )
    return {own_file(folder, name, error=CheckpointError): listed[name] for name in sorted(listed)}


def _instead(folder: Path) -> str:
    """What a folder without safetensors holds, in words."""
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        return "found neither"
    return (
        f"found {pickles[0]}; a pickle can run code when it is opened, so none ever is: ask for safetensors, or convert "
        "it where you trust it"
    )


def _index(path: Path) -> dict[str, str]:
    values = read_json_object(path, error=CheckpointError)
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{path}: expected an object 'weight_map' from tensor names to file names")
    return weight_map
