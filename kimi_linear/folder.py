"""A model as a folder: config.json, weights and tokenizer in the release layout, saved whole and loaded back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from kimi_linear.config import ConfigError, ModelConfig, from_release, to_release
from kimi_linear.data.tokenizers import Tokenizer, load_tokenizer
from kimi_linear.model import KimiLinear
from kimi_linear.model.atomic import replaced_folder
from kimi_linear.model.checkpoint import GIB, WEIGHT_FILES, load_weights, write_weights

CONFIG_FILE = "config.json"
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
    folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> tuple[KimiLinear, Tokenizer | None]:
    """Load a model and its tokenizer from a folder in the release layout.

    Args:
        folder: with config.json, weights, and perhaps a tokenizer.
        device: where the weights go.
        dtype: of the weights; as stored where None. A_log, dt_bias and the router's bias are fp32 always.

    Returns:
        The model, in eval mode, and its tokenizer, None where the folder has none.

    Raises:
        FileNotFoundError: no folder, config.json or weights. ConfigError, CheckpointError: files that are damaged or of
            another model.
    """
    folder = Path(folder)
    values = read_config(folder)
    config = from_release(values)
    tokenizer = load_tokenizer(folder)
    _check_vocabulary(config, tokenizer)
    with torch.device("meta"):
        model = KimiLinear(config)
    load_weights(model, folder, device=device, dtype=dtype or _stored_dtype(values))
    return model.eval(), tokenizer


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
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: expected JSON, got {error}; the file is damaged") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


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
