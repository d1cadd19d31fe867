"""The committed table of launch configurations: kernel, architecture and class of shapes to blocks, warps and stages.

Nothing is tuned when an operation is called. ``benchmarks/ops/tune.py`` times candidates on a GPU and writes
``configs.json``; a kernel's file names its classes of shapes and asks ``config_of`` once per call, from a cache.

    {"short_conv_forward": {"90": {"16 bit": {"constants": {"BT": 64, "BD": 256}, "num_warps": 2, "num_stages": 1}}}}

An architecture that is not in the table takes the newest one below it: sm_86 what was found for sm_80.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("configs.json")
INTERPRETED = (9, 0)
"""Whose entries the interpreter runs, on CPU tensors."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """How one kernel is launched.

    Attributes:
        constants: values of its ``tl.constexpr`` block sizes by name.
        num_warps: warps per program.
        num_stages: depth of Triton's software pipeline.
        maxnreg: registers of a thread at most, where one more program a processor is worth it; the compiler's choice where None.
    """

    constants: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    maxnreg: int | None = None

    def __getitem__(self, name: str) -> int:
        """A block size."""
        return self.constants[name]

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told besides block sizes, as keywords of a launch."""
        given = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return given if self.maxnreg is None else {**given, "maxnreg": self.maxnreg}

    @property
    def launch(self) -> dict[str, Any]:
        """As keywords of a launch: ``kernel[grid](..., **config.launch)``."""
        return {**self.constants, **self.options}

    def to_json(self) -> dict[str, Any]:
        """As the table keeps it."""
        return {"constants": dict(self.constants), **self.options}

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={value}" for name, value in self.constants.items())
        registers = "" if self.maxnreg is None else f" maxnreg={self.maxnreg}"
        return f"{blocks} warps={self.num_warps} stages={self.num_stages}{registers}"


def config_of(kernel: str, x: torch.Tensor, shape_class: str) -> Config:
    """The configuration of ``kernel`` on x's device for ``shape_class``.

    Raises:
        KeyError: the table has no such kernel or class, or no architecture as old as the device.
    """
    return lookup(kernel, device_arch(x.device.index) if x.is_cuda else INTERPRETED, shape_class)


@cache
def device_arch(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


@cache
def lookup(kernel: str, arch: tuple[int, int], shape_class: str) -> Config:
    """The entry for ``kernel``, the newest architecture of the table that is not above ``arch``, and ``shape_class``."""
    by_arch = table()[kernel]
    number = arch[0] * 10 + arch[1]
    known = [known for known in by_arch if known <= number]
    if not known:
        raise KeyError(f"{kernel}: expected sm_{min(by_arch)} or newer, got sm_{number}; use impl='torch'")
    classes = by_arch[max(known)]
    if shape_class not in classes:
        raise KeyError(f"{kernel} on sm_{max(known)}: expected one of {', '.join(classes)}, got {shape_class!r}")
    return classes[shape_class]


@cache
def table() -> dict[str, dict[int, dict[str, Config]]]:
    """The whole table: kernel, architecture as a number such as 90, class of shapes."""
    return {
        kernel: {
            int(arch): {name: Config(**entry) for name, entry in classes.items()} for arch, classes in by_arch.items()
        }
        for kernel, by_arch in json.loads(TABLE.read_text(encoding="utf-8")).items()
    }
