"""Tolerances that are derived, not chosen, and a report of what was off.

The rule, everywhere the same: the error against fp64 is at most twice the error of an independent low-precision
reference at the same inputs, plus the band that rounding the result to its dtype costs. Both errors are measured on
the machine that runs the test, so nobody has to guess a number and no environment loosens one.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 2.0
"""How many times the low-precision reference's own error is allowed."""


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """``||actual - exact|| / ||exact||`` in fp64; 0 where both are zero, inf where only ``exact`` is.

    A NaN or an infinity in ``actual`` gives NaN or inf.
    """
    wide = exact.detach().to(torch.float64)
    difference = (actual.detach().to(wide.device, torch.float64) - wide).norm().item()
    size = wide.norm().item()
    if size == 0:
        return 0.0 if difference == 0 else difference * float("inf")
    return difference / size


def rounding_band(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to nearest in ``dtype``: half of its epsilon."""
    return torch.finfo(dtype).eps / 2


def assert_close_to_reference(
    actual: Tensor, exact_fp64: Tensor, low_precision_reference: Tensor, name: str, *, factor: float = FACTOR
) -> float:
    """Check ``actual`` against the exact result, as strictly as an independent implementation allows.

    Args:
        actual: what is tested, any floating dtype.
        exact_fp64: the same result computed in fp64 from the same, already rounded, inputs.
        low_precision_reference: the same result from an independent implementation in the precision of ``actual``.
        name: what the tensor is, for the report.
        factor: allowed multiple of the reference's error.

    Returns:
        The relative error of ``actual``.

    Raises:
        AssertionError: the error is above the bound, with a report of the worst element.
        ValueError: shapes differ, ``exact_fp64`` is not fp64, or a reference is not finite.
    """
    for label, tensor in (("exact_fp64", exact_fp64), ("low_precision_reference", low_precision_reference)):
        if tensor.shape != actual.shape:
            raise ValueError(f"{name}: {label} has shape {list(tensor.shape)}, actual has {list(actual.shape)}")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name}: {label} is not finite, so it cannot judge; choose inputs that it can compute")
    if exact_fp64.dtype != torch.float64:
        raise ValueError(f"{name}: exact_fp64: expected torch.float64, got {exact_fp64.dtype}")
    error = relative_error(actual, exact_fp64)
    reference = relative_error(low_precision_reference, exact_fp64)
    bound = factor * reference + rounding_band(actual.dtype)
    if not error <= bound:  # written so that NaN fails
        head = f"{name}: relative error {error:.3g}, allowed {bound:.3g} ({factor:g} x {reference:.3g} + rounding)"
        raise AssertionError(f"{head}\n{worst_element_report(actual, exact_fp64, bound)}")
    return error


def assert_close(actual: Tensor, exact: Tensor, name: str, *, tolerance: float = 1e-12) -> float:
    """Check that two computations of one value agree to ``tolerance`` in relative error: identities in fp64.

    Raises:
        AssertionError: they do not, or a shape differs, with a report of the worst element.
    """
    assert actual.shape == exact.shape, f"{name}: expected shape {list(exact.shape)}, got {list(actual.shape)}"
    error = relative_error(actual, exact)
    if not error <= tolerance:
        head = f"{name}: relative error {error:.3g}, allowed {tolerance:.3g}"
        raise AssertionError(f"{head}\n{worst_element_report(actual, exact, tolerance)}")
    return error


def worst_element_report(actual: Tensor, expected: Tensor, bound: float) -> str:
    """Where ``actual`` [...] differs most from ``expected``, how many elements are off, and how many are not finite.

    An element is off where it differs by more than ``bound`` times the root mean square of ``expected``.
    """
    got, want = actual.detach().double().cpu(), expected.detach().double().cpu()
    difference = (got - want).abs()
    wrong = ~got.isfinite() & want.isfinite()
    off = wrong | (difference > bound * want.square().mean().sqrt())
    place = int(difference.masked_fill(~difference.isfinite(), torch.inf).argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), got.shape)]
    return (
        f"  worst element {index} of {list(got.shape)}: expected {want.flatten()[place].item():.6g}, "
        f"got {got.flatten()[place].item():.6g}\n"
        f"  off: {int(off.sum())} of {got.numel()} elements ({off.double().mean().item():.1%})\n"
        f"  not finite: {int(got.isnan().sum())} NaN, {int(got.isinf().sum())} infinite"
    )
