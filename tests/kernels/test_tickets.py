"""Tickets of a decoding step belong to a pool: the same at every call, no other pool's, and gone with it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton; pip install -c constraints.txt triton")

from kimi_linear.kernels.triton import tickets
from kimi_linear.kernels.triton.tickets import tickets_of


def test_a_pool_has_the_same_tickets_at_every_call() -> None:
    memory = torch.zeros(5, 4, 8, 8)
    got = tickets_of(memory, 10, torch.int32)
    assert got.tolist() == [0] * 10
    assert got.dtype == torch.int32
    assert tickets_of(memory.view(5, 4, 8, 8), 10, torch.int32) is got  # a layer makes such a view at every step


def test_pools_share_no_ticket_even_in_one_buffer() -> None:
    """Layers' memories may lie side by side; calls on them may run at the same time."""
    layers = torch.zeros(5, 3, 4, 8, 8)
    got = [tickets_of(layers[:, i], 20, torch.int32) for i in range(3)]
    assert len({x.data_ptr() for x in got}) == 3


def test_tickets_go_when_the_memory_goes() -> None:
    memory = torch.zeros(5, 4, 8, 8)
    part, before = memory[2:], len(tickets._TICKETS)
    tickets_of(part, 12, torch.int32)
    assert len(tickets._TICKETS) == before + 1
    del part
    assert len(tickets._TICKETS) == before + 1  # the memory is there, and with it a graph that was recorded may be
    del memory
    assert len(tickets._TICKETS) == before
