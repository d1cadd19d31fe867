"""What a safetensors file says it holds, believed only as far as it agrees with the file itself.

The format (https://github.com/huggingface/safetensors): eight bytes with the header's length, little-endian; a JSON
header with each tensor's dtype, shape and offsets; then the tensors' bytes, without gap or overlap, to the end. Where a
tensor lies in the file is what streaming needs and what the library keeps to itself, so the header is read here.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kimi_linear.config.json_file import parse_json_object

MAX_HEADER_BYTES = 16 << 20
"""Well over 100,000 tensors in one file; the released checkpoint's 20,493 would take 3 MiB."""
MAX_DIMS = 8
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""How the format names dtypes. Others are quantised ones."""


class CheckpointError(ValueError):
    """Files that are no checkpoint of this model: what was expected, what is there, and where."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """One tensor in a file: everything but its numbers."""

    path: Path
    """The file."""
    name: str
    """The tensor's name."""
    dtype: torch.dtype
    """As stored."""
    shape: tuple[int, ...]
    """As stored."""
    start: int
    """Where its bytes begin, counted from the beginning of the file."""
    nbytes: int
    """How many they are: those of ``shape`` in ``dtype``."""


def read_header(path: str | Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, in the order of their bytes. No tensor is read.

    Raises:
        CheckpointError: the file is no safetensors file, is cut short, or its header contradicts itself or the file.
    """
    path = Path(path)
    try:
        size, header = _read_header_bytes(path)
        values = parse_json_object(header, "the header", error=CheckpointError, what="the file is damaged")
        return _tensors(path, values, start=8 + len(header), end=size)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: expected a whole safetensors file, got one that is truncated, damaged or of another kind ({error})"
        ) from error


def _read_header_bytes(path: Path) -> tuple[int, bytes]:
    # Not blocking: a pipe under a weight file's name would otherwise be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("it is no regular file")
        size = status.st_size
        length = int.from_bytes(file.read(8), "little") if size >= 8 else None
        if length is None:
            raise CheckpointError(f"{size} bytes are too few for any")
        if length > size - 8:
            raise CheckpointError(f"its header claims {length:,} bytes, and {size - 8:,} follow")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"its header claims {length:,} bytes, at most {MAX_HEADER_BYTES:,} are read")
        return size, file.read(length)


def _tensors(path: Path, values: dict[str, Any], *, start: int, end: int) -> dict[str, StoredTensor]:
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("__metadata__ is no object of strings")
    found = [_tensor(path, name, entry, start) for name, entry in values.items()]
    found.sort(key=lambda tensor: (tensor.start, tensor.nbytes))
    at = start
    for tensor in found:
        if tensor.start != at:
            problem = "overlaps the tensor before it" if tensor.start < at else "follows a gap"
            raise CheckpointError(f"{tensor.name} {problem}: it begins at byte {tensor.start:,}, {at:,} was next")
        at += tensor.nbytes
    if at != end:
        raise CheckpointError(f"its tensors end at byte {at:,}, and the file at {end:,}")
    return {tensor.name: tensor for tensor in found}


def _tensor(path: Path, name: str, entry: object, start: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{name} has no dtype, shape and data_offsets, or more than those")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{name} is stored as {entry['dtype']!r}, which is not read")
    shape, offsets, dtype = _numbers(entry["shape"]), _numbers(entry["data_offsets"]), DTYPES[entry["dtype"]]
    if shape is None or len(shape) > MAX_DIMS:
        raise CheckpointError(f"{name} has no shape of at most {MAX_DIMS} sizes")
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{name} has no two offsets in order")
    nbytes = offsets[1] - offsets[0]
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise CheckpointError(f"{name} has {nbytes:,} bytes, {list(shape)} in {entry['dtype']} does not")
    return StoredTensor(path=path, name=name, dtype=dtype, shape=shape, start=start + offsets[0], nbytes=nbytes)


def _numbers(value: object) -> tuple[int, ...] | None:
    """A list of sizes, or None for anything else; the bound keeps products of nonsense small."""
    if isinstance(value, list) and all(type(number) is int and 0 <= number < 1 << 63 for number in value):
        return tuple(value)
    return None
