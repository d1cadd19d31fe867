"""Memory by which the programs of one head find each other (``decode.py``): tickets, or words that carry a call's number.

A ticket counts arrivals and is set back to zero by the last, so between calls all are zero. A word is left in one call, with
that call's number, and read in no other; the number itself, one a slot and key head, grows by one with each call. So no launch
has to clear anything.

Two calls that run at the same time, on other streams or in other graphs, must not share them. A slot of a pool is
used by one call at a time, which whoever decodes has to see to anyway; so they belong to a pool, a row of them to a slot,
and are as separate as the states are. They live as long as the memory of the pool does; a graph that was recorded with it
finds them at the same address.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_Key = tuple[int, int, int, torch.dtype]
_TICKETS: dict[_Key, Tensor] = {}
"""By address of a pool's first slot, device, number of tickets, and their type."""


def tickets_of(memory: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[count], zeros at first, for the slots of the pool ``memory`` [slots, HV, V, K]: the same at every call.

    The first call with a pool clears them and waits until that is done, so that any stream may go on. While a graph is
    recorded nobody can wait: a pool first met there gets tickets of that call alone, cleared at each replay.
    """
    key = (memory.data_ptr(), memory.get_device(), count, dtype)
    known = _TICKETS.get(key)
    return _first(memory, key) if known is None else known


def _first(memory: Tensor, key: _Key) -> Tensor:
    tickets = torch.zeros(key[2], dtype=key[3], device=memory.device)
    if memory.is_cuda:
        if torch.cuda.is_current_stream_capturing():
            return tickets
        torch.cuda.current_stream().synchronize()
    weakref.finalize(memory.untyped_storage(), _TICKETS.pop, key, None).atexit = False
    return _TICKETS.setdefault(key, tickets)
