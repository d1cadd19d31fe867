"""Train, run and understand Kimi Linear models.

Every name below is imported when it is first used, so that ``import kimi_linear`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kimi_linear.config import ModelConfig
    from kimi_linear.engine import stream
    from kimi_linear.folder import load, save
    from kimi_linear.model import KimiLinear
    from kimi_linear.ops import BoundedGate, SoftplusGate, chunk_kda, recurrent_kda

__version__ = "0.1.0"

__all__ = [
    "BoundedGate",
    "KimiLinear",
    "ModelConfig",
    "SoftplusGate",
    "__version__",
    "chunk_kda",
    "load",
    "recurrent_kda",
    "save",
    "stream",
]

_HOMES = {
    "BoundedGate": "kimi_linear.ops",
    "KimiLinear": "kimi_linear.model",
    "ModelConfig": "kimi_linear.config",
    "SoftplusGate": "kimi_linear.ops",
    "chunk_kda": "kimi_linear.ops",
    "load": "kimi_linear.folder",
    "recurrent_kda": "kimi_linear.ops",
    "save": "kimi_linear.folder",
    "stream": "kimi_linear.engine",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'kimi_linear' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
