"""The tolerance rule passes what is as good as an independent reference, and fails what is not, saying where."""

import pytest
import torch

from kimi_linear.testing import assert_close, assert_close_to_reference, relative_error, rounding_band


def exact(shape=(8, 16)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def off_by(values, relative):
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return values + noise * (relative * values.norm() / noise.norm())


def test_relative_error_is_that_of_the_norms():
    assert relative_error(off_by(exact(), 1e-3), exact()) == pytest.approx(1e-3)
    zero = torch.zeros(3, dtype=torch.float64)
    assert relative_error(zero, zero) == 0
    assert relative_error(zero + 1, zero) == float("inf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_the_exact_result_always_passes(dtype):
    values = exact((64, 64))
    error = assert_close_to_reference(values.to(dtype), values, values, "rounded")
    assert 0.2 * rounding_band(dtype) < error < rounding_band(dtype)


def test_twice_the_references_error_is_the_limit():
    reference = off_by(exact(), 1e-3)
    assert_close_to_reference(off_by(exact(), 1.99e-3), exact(), reference, "good")
    with pytest.raises(AssertionError, match=r"relative error 0\.00201, allowed 0\.002"):
        assert_close_to_reference(off_by(exact(), 2.01e-3), exact(), reference, "bad")


def test_report_names_the_worst_element():
    wrong = exact()
    wrong[3, 5] = 99
    wrong[0, 0] += 50
    with pytest.raises(AssertionError) as error:
        assert_close(wrong, exact(), "state")
    text = str(error.value)
    assert text.startswith("state: relative error")
    assert f"worst element [3, 5] of [8, 16]: expected {exact()[3, 5].item():.6g}, got 99" in text
    assert "off: 2 of 128 elements (1.6%)" in text


def test_one_nan_fails_and_is_counted():
    wrong = exact()
    wrong[2, 1] = torch.nan
    with pytest.raises(AssertionError, match=r"worst element \[2, 1\](.|\n)*1 NaN, 0 infinite"):
        assert_close_to_reference(wrong, exact(), off_by(exact(), 0.5), "o")


def test_a_reference_that_cannot_judge_is_refused():
    with pytest.raises(ValueError, match="low_precision_reference is not finite"):
        assert_close_to_reference(exact(), exact(), exact() * torch.nan, "o")
    with pytest.raises(ValueError, match=r"expected torch\.float64, got torch\.float32"):
        assert_close_to_reference(exact(), exact().float(), exact(), "o")
    with pytest.raises(ValueError, match="has shape"):
        assert_close_to_reference(exact()[:1], exact(), exact(), "o")
