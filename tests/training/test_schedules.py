"""Schedules and configuration: exact values, and refusals that say what to do."""

import dataclasses
import math

import pytest

from kimi_linear.training import TrainConfig, cosine, lr_factor, wsd
from kimi_linear.training.config import check_same


def test_wsd_rises_stays_and_falls_to_the_floor():
    factors = [wsd(i, steps=10, warmup=2, decay=4, floor=0.2) for i in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], abs=1e-15)
    assert factors[-1] == 0.2
    assert [wsd(i, steps=3, warmup=0, decay=0, floor=0.0) for i in range(3)] == [1.0, 1.0, 1.0]


def test_cosine_rises_and_falls_by_half_a_cosine():
    factors = [cosine(i, steps=6, warmup=2, floor=0.1) for i in range(6)]
    root = math.sqrt(0.5)
    assert factors == pytest.approx([0.5, 1, 0.55 + 0.45 * root, 0.55, 0.55 - 0.45 * root, 0.1], abs=1e-15)


def test_configured_shares_become_steps():
    config = TrainConfig(steps=100, warmup=0.1, decay=0.2, min_lr=0.0)
    assert [lr_factor(i, config) for i in (0, 9, 50, 79, 80, 99)] == pytest.approx([0.1, 1, 1, 1, 0.95, 0.0])
    config = dataclasses.replace(config, schedule="cosine")
    assert [lr_factor(i, config) for i in (4, 9, 54, 99)] == pytest.approx([0.5, 1, 0.5, 0.0])
    # Runs too short for a whole step of warm-up or decay stay at the peak.
    assert lr_factor(0, TrainConfig(steps=1)) == 1.0


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps: expected at least 1, got 0"),
        ("lr", 0.0, "lr: expected a positive number, got 0.0"),
        ("betas", (0.9, 1.0), r"betas: expected numbers in \[0, 1\), got \(0.9, 1.0\)"),
        ("min_lr", 1.5, r"min_lr: expected a share in \[0, 1\], got 1.5"),
        ("decay", 0.99, r"warmup \+ decay: expected at most 1, got 1.01"),
        ("optimizer", "sgd", "optimizer: expected one of adamw, muon, got 'sgd'"),
        ("packing", "pack", "packing: expected one of packed, rows, got 'pack'"),
    ],
)
def test_bad_values_are_named(field, value, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{field: value})


def test_a_resumed_run_may_change_only_what_does_not_change_the_past():
    saved = dataclasses.asdict(TrainConfig(lr=1e-3))
    check_same(saved, TrainConfig(lr=1e-3, steps=5000, save_every=7, device="cpu"))
    with pytest.raises(ValueError, match=r"lr: expected 0\.001 as in the run that is resumed, got 0\.002"):
        check_same(saved, TrainConfig(lr=2e-3))
