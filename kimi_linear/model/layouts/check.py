"""A model folder examined without loading it: every defect by name, found in the files' tables and then in their numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kimi_linear.config import ConfigError, ModelConfig, from_release
from kimi_linear.config.fla import from_fla
from kimi_linear.config.json_file import read_json_object
from kimi_linear.config.own_file import own_file
from kimi_linear.config.release import MODEL_TYPE, VARIANT_TYPE
from kimi_linear.model.layouts.defects import Defect
from kimi_linear.model.layouts.files import CONFIG_FILE, ModelFiles, read_files
from kimi_linear.model.layouts.names import (
    EMBEDDING,
    FLA_BIAS,
    HEAD,
    Layout,
    LayoutTensor,
    is_wide,
    layout_tensors,
    release_shapes,
    tell_layout,
)  # fmt: skip
from kimi_linear.model.layouts.numbers import PIECE_BYTES, is_finite, read_numbers
from kimi_linear.model.layouts.settle import LAYER, mend_config
from kimi_linear.model.safetensors_file import CheckpointError, StoredTensor

PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DataParallel put before every name."""
MAX_TENSORS = 1_000_000
"""The released model has 20,493."""
LEFTOVERS = ("rotary_emb.inv_freq", "num_batches_tracked")
"""Buffers that say nothing about this model."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What a folder is, and what is wrong with it."""

    folder: Path
    layout: Layout
    values: dict[str, Any]
    """config.json, mended as far as the weights settle it."""
    config: ModelConfig | None
    """The model, or None where config.json cannot be mended."""
    tensors: dict[str, StoredTensor]
    """Where each tensor of the layout is, by the layout's own name; misnamed ones are found."""
    files: ModelFiles
    defects: tuple[Defect, ...]

    @property
    def errors(self) -> list[Defect]:
        """The defects that are errors."""
        return [defect for defect in self.defects if defect.level == "error"]

    @property
    def nbytes(self) -> int:
        """Size of all numbers."""
        return sum(tensor.nbytes for tensor in self.files.tensors.values())


@dataclass(frozen=True, kw_only=True)
class Scanned:
    """How far the scan of the numbers is."""

    nbytes: int
    """Bytes read so far."""
    name: str
    """The tensor just read."""
    defect: Defect | None = None
    """What is wrong with it."""


def examine(folder: str | Path) -> Examination:
    """Everything that the tables of the files, their names and config.json tell. No weights are read.

    Args:
        folder: in the release layout, transformers' or fla's.

    Raises:
        FileNotFoundError: ``folder`` is no folder.
    """
    folder = Path(folder)
    files = read_files(folder)
    defects = list(files.defects)
    named = _unwrapped(files.tensors, defects)
    values = _config_values(folder, defects)
    layout = tell_layout(named, values.get("model_type"))
    values, config = _model(values, named, layout, defects)
    tensors: dict[str, StoredTensor] = {}
    if config is not None:
        expected = layout_tensors(layout, release_shapes(config))
        broken = any(defect.kind in ("truncated", "damaged-file", "shard-missing", "no-weights") for defect in defects)
        tensors = _match(expected, named, config, layout, defects, broken=broken)
        _dtypes(tensors, values, defects)
    return Examination(
        folder=folder, layout=layout, values=values, config=config, tensors=tensors, files=files, defects=tuple(defects)
    )


def scan(examination: Examination) -> Iterator[Scanned]:
    """Read every number once, in pieces, and tell the tensors that hold NaN or infinity."""
    done = 0
    for tensor in sorted(examination.files.tensors.values(), key=lambda t: (t.path, t.start)):
        bad = False
        for at in range(0, tensor.nbytes, PIECE_BYTES):
            size = min(PIECE_BYTES, tensor.nbytes - at)
            bad = bad or not is_finite(read_numbers(tensor, at, size))
            done += size
            yield Scanned(nbytes=done, name=tensor.name)
        if bad:
            found = f"expected finite numbers, got NaN or infinity in {tensor.path.name}"
            yield Scanned(
                nbytes=done, name=tensor.name, defect=Defect(kind="not-finite", places=(tensor.name,), found=found)
            )


def _config_values(folder: Path, defects: list[Defect]) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        defects.append(Defect(kind="config-missing", places=(CONFIG_FILE,), found="expected the file, found none"))
        return {}
    try:
        return read_json_object(own_file(folder, CONFIG_FILE, error=CheckpointError), error=ConfigError)
    except (ConfigError, CheckpointError) as error:
        defects.append(Defect(kind="config-unreadable", places=(CONFIG_FILE,), found=str(error)))
        return {}


def _unwrapped(tensors: Mapping[str, StoredTensor], defects: list[Defect]) -> dict[str, StoredTensor]:
    for prefix in PREFIXES:
        if tensors and all(name.startswith(prefix) for name in tensors):
            found = f"expected {min(tensors).removeprefix(prefix)}, got it behind {prefix!r}"
            defects.append(Defect(kind="prefixed-names", places=tuple(tensors), found=found))
            return _unwrapped({name.removeprefix(prefix): t for name, t in tensors.items()}, [])
    return dict(tensors)


def _model(
    values: dict[str, Any], tensors: Mapping[str, StoredTensor], layout: Layout, defects: list[Defect]
) -> tuple[dict[str, Any], ModelConfig | None]:
    """The mended config.json, and the model that it describes."""
    if not values:
        return values, None
    found: list[Defect] = []
    mended = values
    try:
        if layout == "fla":
            return values, _of_a_size(from_fla(values, output_gate_bias=_has_bias(tensors)))
        if values.get("model_type") == MODEL_TYPE:
            mended, found = mend_config(values, tensors, layout)
        elif values.get("model_type") == VARIANT_TYPE:
            return values, _of_a_size(from_release(values))
        defects += found
        # Our own configuration repeats the other keys; where those were mended it is out of date.
        plain = {key: value for key, value in mended.items() if key != "kimi_linear_config"} if found else mended
        return plain, _of_a_size(from_release(plain))
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        # Values of any type may stand in a file from elsewhere.
        kind = "unknown-key" if "unknown key" in str(error) else "config-unreadable"
        defects.append(Defect(kind=kind, places=(str(error).partition(":")[0] or CONFIG_FILE,), found=str(error)))
        return mended, None


def _of_a_size(config: ModelConfig) -> ModelConfig:
    """``config``, unless listing its tensors alone would fill the memory."""
    tensors = config.num_layers * (20 + 3 * (config.moe.num_experts if config.moe else 0))
    if tensors > MAX_TENSORS:
        raise ConfigError(f"num_experts: expected a model of at most {MAX_TENSORS:,} tensors, got about {tensors:,}")
    return config


def _has_bias(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether any output gate's bias in fla's layout is other than zero."""
    biases = (tensor for name, tensor in tensors.items() if name.endswith(FLA_BIAS))
    return any(bool(read_numbers(tensor, 0, tensor.nbytes).any()) for tensor in biases)


def _match(
    expected: Mapping[str, LayoutTensor],
    tensors: Mapping[str, StoredTensor],
    config: ModelConfig,
    layout: Layout,
    defects: list[Defect],
    *,
    broken: bool,
) -> dict[str, StoredTensor]:
    """Each expected tensor and where it is; what is missing, misnamed, misshapen or too much."""
    matched: dict[str, StoredTensor] = {}
    misnamed: list[str] = []
    missing: list[str] = []
    extra = dict(tensors)
    for name, wanted in expected.items():
        alias = _misnamed(name)
        if name in extra:
            matched[name] = extra.pop(name)
        elif layout == "release" and alias in extra:
            matched[name] = extra.pop(alias)
            misnamed.append(alias)
        elif wanted.pieces:
            missing.append(name)
    if config.tie_embeddings and HEAD in extra:
        matched[HEAD] = extra.pop(HEAD)  # told of as "tied"
    if misnamed:
        found = f"expected {misnamed[0].replace('block_sparse_moe', 'mlp')}, got it under this name"
        defects.append(Defect(kind="dense-misnamed", places=tuple(misnamed), found=found))
    if missing and not broken:
        # Where a file is damaged, that is the defect, and not each of its tensors.
        found = f"expected it with shape {list(expected[missing[0]].shape)}, found it in no file"
        defects.append(Defect(kind="missing", places=tuple(missing), found=found))
    leftovers = [name for name in extra if name.endswith(LEFTOVERS)]
    strangers = [name for name in extra if not name.endswith(LEFTOVERS)]
    for kind, names in (("leftover-tensor", leftovers), ("unknown-tensor", strangers)):
        if names:
            first = extra[names[0]]
            found = f"expected no such tensor, found {list(first.shape)} in {first.path.name}{_hint(names[0], config)}"
            defects.append(Defect(kind=kind, places=tuple(names), found=found))
    _shapes(expected, matched, defects)
    return matched


def _misnamed(name: str) -> str:
    """What transformers calls a dense layer's tensor when it saves under the release's names."""
    return name.replace(".mlp.", ".block_sparse_moe.")


def _hint(name: str, config: ModelConfig) -> str:
    match = LAYER.search(name)
    beyond = match is not None and int(match[1]) >= config.num_layers
    return f"; config.json has {config.num_layers} layers" if beyond else ""


def _shapes(expected: Mapping[str, LayoutTensor], tensors: Mapping[str, StoredTensor], defects: list[Defect]) -> None:
    flat: list[str] = []
    wrong: list[str] = []
    for name, tensor in tensors.items():
        shape = expected[name].shape if name in expected else expected[EMBEDDING].shape
        if tensor.shape != shape:
            same = [n for n in tensor.shape if n != 1] == [n for n in shape if n != 1]
            (flat if same and math.prod(shape) == math.prod(tensor.shape) else wrong).append(name)
    for kind, names in (("flattened", flat), ("wrong-shape", wrong)):
        if names:
            wanted = expected.get(names[0], expected.get(EMBEDDING))
            assert wanted is not None
            found = (
                f"expected {list(wanted.shape)}, got {list(tensors[names[0]].shape)} in {tensors[names[0]].path.name}"
            )
            defects.append(Defect(kind=kind, places=tuple(names), found=found))


def _dtypes(tensors: Mapping[str, StoredTensor], values: dict[str, Any], defects: list[Defect]) -> None:
    """Dtypes of the tensors; ``values`` gets the one that they have."""
    found: dict[str, list[str]] = defaultdict(list)
    sizes: dict[torch.dtype, int] = defaultdict(int)
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            found["quantised"].append(name)
        elif is_wide(name) and tensor.dtype.itemsize < 4:
            found["narrow-gate"].append(name)
        elif not is_wide(name):
            sizes[tensor.dtype] += tensor.nbytes
    for kind, names in found.items():
        wanted = "float32" if kind == "narrow-gate" else "float64, float32, bfloat16 or float16"
        text = f"expected {wanted}, got {str(tensors[names[0]].dtype).removeprefix('torch.')}"
        defects.append(Defect(kind=kind, places=tuple(names), found=text))
    if not sizes:
        return
    most = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
    key = "torch_dtype" if "dtype" not in values and "torch_dtype" in values else "dtype"
    if values.get(key) != most:
        text = f"expected {most!r}, as the weights are, got {values.get(key)!r}"
        defects.append(Defect(kind="dtype-wrong", places=(key,), found=text))
        values[key] = most
