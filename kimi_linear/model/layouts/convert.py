"""A checkpoint rewritten in another layout, or mended in its own: one shard in memory at a time, bit for bit.

The new folder is written under a hidden name beside its place, each file whole or not at all, and renamed when it is
complete. An interrupted run leaves the finished shards there, and the same command goes on after them.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from kimi_linear.config import ModelConfig, to_release
from kimi_linear.config import replace as changed
from kimi_linear.config.fla import to_fla
from kimi_linear.config.release import OWN_KEY, VARIANT_TYPE, WITHOUT_MEANING
from kimi_linear.config.transformers import to_transformers
from kimi_linear.model.atomic import explain
from kimi_linear.model.checkpoint import GIB, INDEX_FILE, SINGLE_FILE
from kimi_linear.model.layouts.check import Examination, examine
from kimi_linear.model.layouts.defects import KINDS, Defect
from kimi_linear.model.layouts.files import CONFIG_FILE
from kimi_linear.model.layouts.names import (
    EMBEDDING,
    HEAD,
    Layout,
    LayoutTensor,
    Place,
    is_wide,
    layout_tensors,
    release_shapes,
)  # fmt: skip
from kimi_linear.model.layouts.numbers import is_finite, read_numbers
from kimi_linear.model.safetensors_file import CheckpointError, StoredTensor

PLAN_FILE = "plan.json"
LAYOUT_KEYS = ("architectures", "model_type", "head_dim", "dtype", "torch_dtype")
"""Keys that belong to a layout and are written anew in another."""


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """A conversion that can be carried out: everything that can be refused has been looked at."""

    source: Examination
    to: Layout
    config: ModelConfig
    """The model as it will stand there."""
    values: dict[str, Any]
    """config.json as it will be."""
    tensors: dict[str, LayoutTensor]
    """What will be written, by the new layout's names."""
    places: dict[str, tuple[StoredTensor, Place, LayoutTensor]]
    """Where each tensor of the release is in the source."""
    mended: tuple[Defect, ...]
    """Defects of the source that the result does not have."""
    notes: tuple[str, ...]
    """What the user should know: what is added, and what stays behind."""

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor of the result."""
        wanted = self.tensors[name]
        release = wanted.pieces[0][0] if wanted.pieces else wanted.like
        assert release is not None
        stored = self.places[release][0].dtype
        return torch.float32 if self._widened(release) else stored

    def nbytes(self, name: str) -> int:
        """Size of a tensor of the result."""
        return math.prod(self.tensors[name].shape) * self.dtype(name).itemsize

    @property
    def total(self) -> int:
        """Size of the result's numbers."""
        return sum(map(self.nbytes, self.tensors))

    def _widened(self, release: str) -> bool:
        narrow = any(defect.kind == "narrow-gate" for defect in self.mended)
        return narrow and is_wide(release) and self.places[release][0].dtype.itemsize < 4

    def read(self, release: str) -> Tensor:
        """A tensor of the release from the source, flat."""
        stored, place, whole = self.places[release]
        shape = whole.shape if place.expert is None else whole.shape[1:]
        row = math.prod(shape[1:]) * stored.dtype.itemsize
        start, stop = (0, shape[0]) if place.rows is None else place.rows
        first = 0 if place.expert is None else place.expert * shape[0] * row
        numbers = read_numbers(stored, first + start * row, (stop - start) * row)
        if not is_finite(numbers):
            raise CheckpointError(
                f"{stored.name}: expected finite numbers, got NaN or infinity in {stored.path}; {KINDS['not-finite'].repair}"
            )
        return numbers.float() if self._widened(release) else numbers

    def make(self, name: str) -> Tensor:
        """A tensor of the result, whole."""
        wanted = self.tensors[name]
        if not wanted.pieces:
            return torch.zeros(wanted.shape, dtype=self.dtype(name))
        if len(wanted.pieces) == 1:
            return self.read(wanted.pieces[0][0]).view(wanted.shape)
        made = torch.empty(wanted.shape, dtype=self.dtype(name))
        for release, place in wanted.pieces:
            target = made if place.expert is None else made[place.expert]
            target = target if place.rows is None else target[place.rows[0] : place.rows[1]]
            numbers = self.read(release)
            if numbers.dtype != made.dtype:
                raise CheckpointError(
                    f"{release}: expected {made.dtype}, as the tensors that it is joined with, got {numbers.dtype}"
                )
            target.copy_(numbers.view(target.shape))
        return made


@dataclass(frozen=True, kw_only=True)
class Written:
    """How far a conversion is."""

    nbytes: int
    name: str
    """The tensor just done, or the file that an earlier run had finished."""


def plan_conversion(folder: str | Path, *, to: Layout = "release", repair: bool = False) -> Conversion:
    """Examine ``folder`` and plan its rewriting. Tables are read, no weights.

    Args:
        folder: in any layout that is known.
        to: the layout of the result.
        repair: mend what can be mended; without it a folder with errors is refused.

    Raises:
        FileNotFoundError: no such folder. CheckpointError: defects, or defects that cannot be repaired; the message
            names each. ConfigError: a model that ``to`` cannot express.
    """
    source = examine(folder)
    _refuse(source, repair)
    config = source.config
    assert config is not None
    notes: list[str] = []
    # A head of its own in the file is the model's, whatever the key says: transformers trains it apart from the embedding.
    alone = HEAD in source.tensors or to == "transformers" or (repair and to == "release")
    untie = config.tie_embeddings and alone
    target = changed(config, tie_embeddings=False) if untie else config
    if untie and HEAD not in source.tensors:
        notes.append(f"{HEAD} is written as a second copy of the embedding: this layout's readers tie nothing")
    elif untie:
        notes.append(f"{HEAD} is in the source beside tie_word_embeddings: it is kept, and the key becomes false")
    values = _values(source, target, to, as_is=source.layout == to and not repair and not untie)
    found = layout_tensors(source.layout, release_shapes(config))
    places = {
        release: (source.tensors[name], place, tensor)
        for name, tensor in found.items()
        for release, place in tensor.pieces
        if name in source.tensors
    }
    if HEAD in source.tensors and HEAD not in places:  # beside a tied embedding
        tensor = source.tensors[HEAD]
        places[HEAD] = (tensor, Place(tensor=HEAD), LayoutTensor(shape=tensor.shape, pieces=()))
    if untie:
        places.setdefault(HEAD, places[EMBEDDING])
    tensors = layout_tensors(to, release_shapes(target))
    notes += _added(source, tensors, found)
    if source.files.left:
        notes.append(f"left behind: {', '.join(source.files.left)}")
    return Conversion(
        source=source, to=to, config=target, values=values, tensors=tensors, places=places,
        mended=tuple(d for d in source.defects if d.can_mend) if repair else (), notes=tuple(notes),
    )  # fmt: skip


def write_conversion(
    conversion: Conversion, folder: str | Path, *, max_shard_bytes: int = 5 * GIB
) -> Iterator[Written]:
    """Carry a conversion out, telling how far it is after each tensor.

    Args:
        conversion: from ``plan_conversion``.
        folder: where the result goes: absent or empty.
        max_shard_bytes: size that a weight file stays below, unless one tensor alone is larger.

    Raises:
        FileExistsError: ``folder`` holds something. CheckpointError: the source holds NaN or changed meanwhile.
        BlockingIOError: another conversion is writing there. OSError: the disk is full or the like; what was finished is kept for the next run of the same conversion.
    """
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target}: expected nothing or an empty folder there; choose another name")
    if target.resolve().is_relative_to(conversion.source.folder.resolve()):
        raise ValueError(f"{target}: expected a folder outside the source {conversion.source.folder}")
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes: expected a positive number, got {max_shard_bytes}")
    target.parent.mkdir(parents=True, exist_ok=True)
    work = target.parent / f".{target.name}.partial"
    shards = _shards(conversion, max_shard_bytes)
    try:
        with _locked(work):
            _resume(work, _fingerprint(conversion, shards))
            _room(conversion, work)
            yield from _weights(conversion, shards, work)
            _rest(conversion, shards, work)
            result = examine(work)
            assert not result.errors, f"a conversion wrote a folder with a defect: {result.errors[0]}"
            (work / PLAN_FILE).unlink()
            _flush(work)
            if target.exists():
                target.rmdir()
            os.rename(work, target)
    except CheckpointError:
        # The source itself is at fault: no later run could go on from here.
        shutil.rmtree(work, ignore_errors=True)
        raise
    except OSError as error:
        if isinstance(error, BlockingIOError | FileExistsError):
            raise
        kept = f"; the same command goes on from what is finished, in {work}" if work.exists() else ""
        raise OSError(error.errno, explain(error, target) + kept) from error


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """One conversion at a time into one place: two would write the same unfinished files."""
    path = work.with_suffix(".lock")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BlockingIOError(
                error.errno, f"another conversion is writing {work}; wait for it or choose another name"
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _refuse(source: Examination, repair: bool) -> None:
    stop = [defect for defect in source.errors if not (repair and defect.can_mend)]
    if source.config is None or stop:
        listed = "".join(f"\n  {defect.kind}: {defect}" for defect in stop)
        way = "--repair mends them" if all(d.can_mend for d in stop) and stop else "'kimi-linear check' says what to do"
        raise CheckpointError(f"{source.folder}: expected a sound checkpoint, found {len(stop)} defects; {way}{listed}")


def _values(source: Examination, config: ModelConfig, to: Layout, *, as_is: bool) -> dict[str, Any]:
    """config.json of the result."""
    if as_is:
        return source.values
    dtype = source.values.get("dtype", source.values.get("torch_dtype"))
    assert isinstance(dtype, str)
    kept = {key: value for key, value in source.values.items() if key in WITHOUT_MEANING and key not in LAYOUT_KEYS}
    if to == "fla":
        return {**to_fla(config, dtype=dtype), **kept}
    values = {**to_release(config, dtype=dtype), **kept}
    own = source.layout == "fla" or OWN_KEY in source.values or values["model_type"] == VARIANT_TYPE
    if not own:
        del values[OWN_KEY]
    return to_transformers(values, config) if to == "transformers" else values


def _added(source: Examination, tensors: Mapping[str, LayoutTensor], found: Mapping[str, LayoutTensor]) -> list[str]:
    zeros = [name for name, tensor in tensors.items() if not tensor.pieces]
    gone = [name for name in source.tensors if name in found and not found[name].pieces]
    notes = (
        [f"{len(zeros)} tensors of zeros are added, which this layout has and the source lacks: {zeros[0]}, ..."]
        if zeros
        else []
    )
    if gone and not zeros:
        notes.append(f"{len(gone)} tensors of zeros are left out, which this layout has no name for: {gone[0]}, ...")
    return notes


def _shards(conversion: Conversion, max_bytes: int) -> dict[str, list[str]]:
    """Which tensors go into which file."""
    groups: list[list[str]] = [[]]
    size = 0
    for name in conversion.tensors:
        nbytes = conversion.nbytes(name)
        if groups[-1] and size + nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE_FILE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _fingerprint(conversion: Conversion, shards: Mapping[str, list[str]]) -> str:
    """What must be the same for finished shards to be taken over: the source's files, the plan, the mending."""
    paths = sorted({tensor.path for tensor in conversion.source.files.tensors.values()})
    facts = {
        "files": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths],
        "to": conversion.to,
        "config": conversion.values,
        "mended": [defect.kind for defect in conversion.mended],
        "shards": shards,
    }
    return json.dumps(facts, sort_keys=True)


def _resume(work: Path, fingerprint: str) -> None:
    """An empty working folder, or the one that an interrupted run of the same conversion left."""
    plan = work / PLAN_FILE
    if work.exists() and not (plan.is_file() and plan.read_text(encoding="utf-8") == fingerprint):
        shutil.rmtree(work)
    work.mkdir(exist_ok=True)
    if not plan.exists():
        plan.write_text(fingerprint, encoding="utf-8")


def _room(conversion: Conversion, work: Path) -> None:
    there = sum(path.stat().st_size for path in work.glob("*.safetensors"))
    free, needed = shutil.disk_usage(work).free, conversion.total - there
    if needed > free:
        raise OSError(28, f"No space left on device: {needed:,} bytes are needed and {free:,} are free")


def _weights(conversion: Conversion, shards: Mapping[str, list[str]], work: Path) -> Iterator[Written]:
    done = 0
    for file, names in shards.items():
        if (work / file).exists():
            done += sum(map(conversion.nbytes, names))
            yield Written(nbytes=done, name=file)
            continue
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors[name] = conversion.make(name)
            done += tensors[name].nbytes
            yield Written(nbytes=done, name=name)
        unfinished = work / f"{file}.tmp"
        save_file(tensors, unfinished, metadata={"format": "pt"})
        _sync(unfinished)  # a crash must not leave an empty file under a finished one's name
        os.replace(unfinished, work / file)


def _rest(conversion: Conversion, shards: Mapping[str, list[str]], work: Path) -> None:
    """The index, config.json, and the files that are no weights."""
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        _write_json(work / INDEX_FILE, {"metadata": {"total_size": conversion.total}, "weight_map": weight_map})
    _write_json(work / CONFIG_FILE, conversion.values)
    for path in conversion.source.files.others:
        shutil.copyfile(path, work / path.name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _flush(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
