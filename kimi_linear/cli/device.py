"""The device that "auto" means."""

from __future__ import annotations


def pick_device(name: str) -> str:
    """``name``, or for "auto" a GPU where torch sees one and else the CPU.

    Raises:
        ValueError: no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        seen = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ValueError(f"device: expected one of {', '.join(seen)}, got {name!r}") from error
    return name
