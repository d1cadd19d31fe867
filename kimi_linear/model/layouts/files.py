"""The files of a model folder: which hold weights, what their tables say, and whether the index agrees with them."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from kimi_linear.config.json_file import read_json_object
from kimi_linear.config.own_file import own_file
from kimi_linear.model.checkpoint import INDEX_FILE, PICKLES, SINGLE_FILE
from kimi_linear.model.layouts.defects import Defect
from kimi_linear.model.safetensors_file import MAX_HEADER_BYTES, CheckpointError, StoredTensor, read_header

CONFIG_FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """What a folder holds."""

    tensors: dict[str, StoredTensor]
    """Every tensor that a readable file has, by the name in the file."""
    others: tuple[Path, ...]
    """Files that belong to the model and are no weights: tokenizer, templates, code, licence."""
    left: tuple[str, ...]
    """What a conversion leaves behind: folders, hidden files, pickles."""
    defects: tuple[Defect, ...]
    """What is wrong with the files."""


def read_files(folder: Path) -> ModelFiles:
    """Look into every weight file's table, and nothing else.

    Raises:
        FileNotFoundError: ``folder`` is no folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"folder: expected a model folder, got {folder}, which is not there")
    defects: list[Defect] = []
    headers: dict[str, dict[str, StoredTensor]] = {}
    broken: set[str] = set()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            headers[path.name] = read_header(own_file(folder, path.name, error=CheckpointError))
        except (CheckpointError, OSError) as error:
            broken.add(path.name)
            defects.append(_broken(path, error))
    listed = _index(folder, defects)
    if not headers and not broken:
        defects.append(
            Defect(kind="no-weights", places=("*.safetensors",), found="expected weights, found no such file")
        )
    elif (
        listed is None and {*headers, *broken} != {SINGLE_FILE} and not any(d.kind == "index-damaged" for d in defects)
    ):
        found = f"expected an index beside {', '.join(sorted({*headers, *broken}))}"
        defects.append(Defect(kind="index-missing", places=(INDEX_FILE,), found=found))
    tensors = _join(headers, listed or {}, defects)
    if listed is not None:
        _compare(headers, broken, listed, tensors, defects)
    others, left = _others(folder, defects)
    return ModelFiles(tensors=tensors, others=others, left=left, defects=tuple(defects))


def _broken(path: Path, error: Exception) -> Defect:
    if path.is_symlink():
        return Defect(kind="outside", places=(path.name,), found=str(error))
    lost = _cut_short(path)
    return Defect(kind="damaged-file" if lost is None else "truncated", places=(path.name,), found=lost or str(error))


def _cut_short(path: Path) -> str | None:
    """What is lost of a file that ends early, or None where that is not what ails it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES:
            return None if size else "expected a safetensors file, got no bytes"
        header = file.read(length)
    if len(header) < length:
        return f"expected a table of {length:,} bytes, got {len(header):,}" if header[:1] == b"{" else None
    try:
        ends = {name: entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"}
        lost = sorted(name for name, end in ends.items() if end > size - 8 - length)
        whole = 8 + length + max(ends.values(), default=0)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return None
    return (
        f"expected {whole:,} bytes, got {size:,}; {len(lost)} tensors are lost, {lost[0]} among them" if lost else None
    )


def _index(folder: Path, defects: list[Defect]) -> dict[str, str] | None:
    path = folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        weight_map = read_json_object(own_file(folder, INDEX_FILE, error=CheckpointError), error=CheckpointError).get(
            "weight_map"
        )
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(f"{path}: expected an object 'weight_map' from tensor names to file names")
    except (CheckpointError, OSError) as error:
        defects.append(Defect(kind="index-damaged", places=(INDEX_FILE,), found=str(error)))
        return None
    outside = sorted(
        {f for f in weight_map.values() if Path(f).name != f or "\\" in f or not f.endswith(".safetensors")}
    )
    if outside:
        found = f"expected names of .safetensors files of this folder, got {outside[0]!r}"
        defects.append(Defect(kind="outside", places=(INDEX_FILE,), found=found))
        return None
    return weight_map


def _join(
    headers: dict[str, dict[str, StoredTensor]], listed: dict[str, str], defects: list[Defect]
) -> dict[str, StoredTensor]:
    """One table of all files; the index decides where two have the same tensor."""
    homes: dict[str, list[StoredTensor]] = defaultdict(list)
    for header in headers.values():
        for name, tensor in header.items():
            homes[name].append(tensor)
    twice = {name: found for name, found in homes.items() if len(found) > 1}
    if twice:
        name, found = next(iter(twice.items()))
        settled = all(any(t.path.name == listed.get(n) for t in f) for n, f in twice.items())
        where = " and ".join(tensor.path.name for tensor in found)
        text = (
            f"expected in one file, found in {where}; the index {'names one of them' if settled else 'does not decide'}"
        )
        defects.append(Defect(kind="duplicate", places=tuple(twice), found=text, mendable=settled))
    return {
        name: next((t for t in found if t.path.name == listed.get(name)), found[0]) for name, found in homes.items()
    }


def _compare(
    headers: dict[str, dict[str, StoredTensor]],
    broken: set[str],
    listed: dict[str, str],
    tensors: dict[str, StoredTensor],
    defects: list[Defect],
) -> None:
    """The index against the files. What a broken file holds is unknown, so nothing is said of it."""
    gone: dict[str, list[str]] = defaultdict(list)
    wrong: dict[str, str] = {}
    for name, file in listed.items():
        if file in broken or (name in tensors and tensors[name].path.name == file):
            continue
        if name not in tensors and file not in headers:
            gone[file].append(name)
        else:
            wrong[name] = f"listed in {file}, is {'in ' + tensors[name].path.name if name in tensors else 'in none'}"
    wrong |= {name: "in no list of the index" for name in tensors if name not in listed}
    for file, names in sorted(gone.items()):
        found = f"expected the file with {len(names)} tensors, {names[0]} among them; it is not in the folder"
        defects.append(Defect(kind="shard-missing", places=(file,), found=found))
    if wrong:
        name, found = next(iter(wrong.items()))
        defects.append(Defect(kind="index-wrong", places=tuple(wrong), found=found))


def _others(folder: Path, defects: list[Defect]) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    others: list[Path] = []
    left: list[str] = []
    pickles: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors" or path.name in (INDEX_FILE, CONFIG_FILE):
            continue
        if path.suffix in PICKLES:
            pickles.append(path.name)
        elif path.is_dir() or path.name.startswith("."):
            left.append(path.name)
        else:
            try:
                others.append(own_file(folder, path.name, error=CheckpointError))
            except CheckpointError as error:
                defects.append(Defect(kind="outside", places=(path.name,), found=str(error)))
    if pickles:
        defects.append(Defect(kind="pickles", places=tuple(pickles), found="a pickle, which is never opened"))
    return tuple(others), (*left, *pickles)
