"""How the operations behave inside ``torch.autocast``: products take its dtype, recurrences keep their inputs' precision."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_like_linear(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of an active autocast, fp64 apart, as ``F.linear`` takes them; unchanged outside one."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def outside_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Where a memory is computed: autocast would make 16-bit products of the fp32 sums that carry it."""
    return nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)
