"""What ``benchmarks/ops/tune.py`` tunes: one kernel at one class of shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from kimi_linear.kernels.triton.configs import Config

Run: TypeAlias = Callable[[Config], tuple[Tensor, ...]]
"""Launches the kernel with a configuration and gives its results."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One entry of the table, and how to find it.

    Attributes:
        kernel: its name in the table.
        shape_class: the class of shapes in the table.
        about: the shape that is timed, for the reader.
        moved: bytes that must move, for the printed rate.
        candidates: what is tried, besides the present entry.
        build: makes inputs on a device and gives the function that runs a configuration.
    """

    kernel: str
    shape_class: str
    about: str
    moved: int
    candidates: tuple[Config, ...]
    build: Callable[[str], Run]
