"""The conditions that conftest.py promises hold: poisoned memory, checked shapes, seeds, one thread."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from kimi_linear.ops import chunk_kda, l2_normalize


def inputs() -> tuple[torch.Tensor, ...]:
    q, k, v = torch.randn(3, 1, 4, 2, 3).unbind()
    return q, k, v, -torch.rand(1, 4, 2, 3), torch.rand(1, 4, 2)


def test_uninitialised_memory_is_nan() -> None:
    assert torch.empty(1000).isnan().all()
    assert torch.empty_like(torch.ones(1000, dtype=torch.bfloat16)).isnan().all()
    assert torch.ones(8).new_empty(8).isnan().all()


@pytest.mark.unpoisoned
def test_a_test_can_do_without_poison() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_shapes_of_public_signatures_are_checked() -> None:
    q, k, v, g, beta = inputs()
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'k'"):
        chunk_kda(q, k[:, :2], v, g, beta, impl="reference")
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'x'"):
        l2_normalize(torch.ones(3, dtype=torch.int64))


@pytest.mark.unchecked_shapes
def test_bad_input_can_reach_our_own_validation() -> None:
    q, k, v, g, beta = inputs()
    with pytest.raises(ValueError, match=r"^k: expected shape \[1, 4, 2, 3\] .*got \[1, 2, 2, 3\]"):
        chunk_kda(q, k[:, :2], v, g, beta, impl="reference")


@pytest.mark.parametrize("run", [1, 2])
def test_every_test_draws_the_same_numbers(run: int) -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3), expected)


def test_one_thread() -> None:
    assert torch.get_num_threads() == 1
