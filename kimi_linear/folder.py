"""A model as a folder: config.json, weights and tokenizer in the release layout, saved whole and loaded back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kimi_linear.config import ConfigError, ModelConfig, from_release, to_release
from kimi_linear.config.json_file import read_json_object
from kimi_linear.config.own_file import check_links
from kimi_linear.data.tokenizers import Tokenizer, load_tokenizer
from kimi_linear.model import KimiLinear
from kimi_linear.model.atomic import replaced_folder
from kimi_linear.model.checkpoint import GIB, WEIGHT_FILES, fill, stored_tensors, write_weights
from kimi_linear.model.hub import local_folder
from kimi_linear.model.safetensors_file import CheckpointError, StoredTensor

CONFIG_FILE = "config.json"
SHIPPED, SHIPPED_FOLDER = "nano", Path(__file__).parent / "nano"
"""The model that comes with the package: its name for ``load`` and --model, and where it lies."""
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""How config.json names the dtype of the weights."""


def save(
    model: KimiLinear, folder: str | Path, tokenizer: Tokenizer | None = None, *, max_shard_bytes: int = 5 * GIB
) -> None:
    """Save a model that ``load`` and other readers of the release layout take.

    The folder appears whole or not at all; an earlier model there is replaced only once the new one is on the disk.

    Args:
        model: what to save, in the dtypes it has.
        folder: absent, empty, or an earlier model.
        tokenizer: saved with it, unless None.
        max_shard_bytes: size that a weight file stays below.

    Raises:
        ValueError: the tokenizer has more tokens than the model. FileExistsError: ``folder`` holds files that saving
            would delete. OSError: the disk is full or the like; an earlier model is then untouched.
    """
    _check_vocabulary(model.config, tokenizer)
    with replaced_folder(folder, outdated=WEIGHT_FILES) as new:
        dtype = next(name for name, value in DTYPES.items() if value == model.dtype)
        text = json.dumps(to_release(model.config, dtype=dtype), indent=2)
        (new / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        write_weights(model, new, max_shard_bytes=max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(new)


def load(
    folder: str | Path,
    *,
    revision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> tuple[KimiLinear, Tokenizer | None]:
    """Load a model and its tokenizer from a folder in the release layout, or by its name on the Hugging Face Hub.

    The weights stream from the files to their places on ``device``; the host never holds more than a few MiB of them
    besides. No code that comes with a model is run, and no pickle is opened.

    Args:
        folder: with config.json, weights, and perhaps a tokenizer; or text such as
            "moonshotai/Kimi-Linear-48B-A3B-Instruct", which is downloaded (``pip install 'kimi-linear[hf]'``); or the
            text "nano", where no such folder is here, for the model that comes with the package.
        revision: a branch, tag or commit, for a name of the hub.
        device: where the weights go.
        dtype: of the weights; as config.json says where None. A_log, dt_bias and the router's bias are fp32 always.

    Returns:
        The model, in eval mode, and its tokenizer, None where the folder has none.

    Raises:
        FileNotFoundError: no folder, config.json or weights. ConfigError, CheckpointError: files that are damaged,
            hostile or of another model. ImportError, PermissionError, ConnectionError: the hub (see
            ``kimi_linear.model.hub``).
    """
    folder = shipped_folder() if is_shipped(folder) else local_folder(folder, revision)
    check_links(folder, error=CheckpointError)
    values = read_config(folder)
    config = from_release(values)
    stored = stored_tensors(folder)
    model = _skeleton(config, stored)
    tokenizer = load_tokenizer(folder)
    _check_vocabulary(config, tokenizer)
    if dtype is None:
        # Cast before, not in fill: config.json's word alone is no leave to round.
        model.to(_stored_dtype(values))
    fill(model, stored, device=device, dtype=dtype)
    return model.eval(), tokenizer


def is_shipped(name: str | Path) -> bool:
    """Whether ``name`` means the model that comes with the package: its name, where no folder of that name is here."""
    return str(name) == SHIPPED and not Path(name).exists()


def shipped_folder() -> Path:
    """The folder of the model that comes with the package.

    Raises:
        FileNotFoundError: this copy of the package has none.
    """
    if not (SHIPPED_FOLDER / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{SHIPPED}: expected the model that comes with the package in {SHIPPED_FOLDER}, found none; install the whole "
            "package, or name another model"
        )
    return SHIPPED_FOLDER


def read_config(folder: str | Path) -> dict[str, Any]:
    """The values of ``folder``'s config.json.

    Raises:
        FileNotFoundError: there is none. ConfigError: it is no JSON object.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"folder: expected a model folder with {CONFIG_FILE}, found none in {folder}; "
            "'kimi-linear train' makes one, and so does kimi_linear.save"
        )
    return read_json_object(path, error=ConfigError)


def _skeleton(config: ModelConfig, stored: dict[str, StoredTensor]) -> KimiLinear:
    """The model on the meta device, where widths cost nothing, once the layers and experts are known to be few."""
    moe = config.moe
    experts = 0 if moe is None else max(config.num_layers - moe.first_dense_layers, 0) * moe.num_experts
    for name, value in (("num_hidden_layers", config.num_layers), ("num_experts in all layers", experts)):
        if value > len(stored):
            raise ConfigError(
                f"{name}: expected at most the {len(stored)} tensors that the weight files hold, got {value}; "
                f"is {CONFIG_FILE} of the same model?"
            )
    try:
        with torch.device("meta"):
            return KimiLinear(config)
    except RuntimeError as error:
        raise ConfigError(f"{CONFIG_FILE}: expected sizes that a tensor can have ({error})") from error


def _stored_dtype(values: dict[str, Any]) -> torch.dtype:
    name = values.get("dtype", values.get("torch_dtype"))
    if name not in DTYPES:
        raise ConfigError(
            f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}; or load with dtype=torch.bfloat16"
        )
    return DTYPES[name]


def _check_vocabulary(config: ModelConfig, tokenizer: Tokenizer | None) -> None:
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer: expected at most the model's {config.vocab_size} tokens, got {tokenizer.vocab_size}; "
            "it belongs to another model"
        )
