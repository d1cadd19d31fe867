"""The sampler draws from the distribution that its settings describe, and refuses settings that describe none."""

import math

import pytest
import torch

from kimi_linear.engine import SamplingConfig, make_generator, probabilities, sample


def logits_of(*p: float) -> torch.Tensor:
    return torch.tensor([p]).log()


def test_temperature_divides_the_logits():
    p = probabilities(torch.tensor([[0.0, math.log(2.0)]]), SamplingConfig(temperature=0.5))
    torch.testing.assert_close(p, torch.tensor([[1 / 5, 4 / 5]]))


def test_temperature_near_zero_does_not_overflow():
    p = probabilities(torch.tensor([[300.0, -300.0, 299.0]]), SamplingConfig(temperature=1e-30))
    assert p.tolist() == [[1.0, 0.0, 0.0]]


def test_greedy_takes_the_likeliest_and_the_lower_id_of_equals():
    logits = torch.tensor([[1.0, 3.0, 3.0], [0.5, -1.0, 0.0]])
    assert sample(logits, SamplingConfig(temperature=0)).tolist() == [1, 0]


def test_top_k_keeps_exactly_k_even_among_equals():
    p = probabilities(torch.zeros(1, 5), SamplingConfig(temperature=1, top_k=2))
    assert p.tolist() == [[0.5, 0.5, 0, 0, 0]]


def test_top_k_beyond_the_vocabulary_keeps_all():
    p = probabilities(logits_of(0.5, 0.3, 0.2), SamplingConfig(temperature=1, top_k=100))
    torch.testing.assert_close(p, torch.tensor([[0.5, 0.3, 0.2]]))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.01, [1, 0, 0, 0]),
        (0.45, [1, 0, 0, 0]),
        (0.55, [5 / 8, 3 / 8, 0, 0]),
        (0.81, [5 / 9.5, 3 / 9.5, 1.5 / 9.5, 0]),
    ],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p, kept):
    # Shuffled, so that the order of the ids is not the order of the probabilities.
    order = [2, 0, 3, 1]
    shuffled = logits_of(0.5, 0.3, 0.15, 0.05)[:, order]
    p = probabilities(shuffled, SamplingConfig(temperature=1, top_p=top_p))
    torch.testing.assert_close(p, torch.tensor([kept], dtype=torch.float32)[:, order])


def test_top_p_counts_what_top_k_left():
    # Of 0.4, 0.3, 0.3 top-k 2 leaves 4/7 and 3/7; the first alone reaches 0.5.
    p = probabilities(logits_of(0.4, 0.3, 0.3), SamplingConfig(temperature=1, top_k=2, top_p=0.5))
    assert p.tolist() == [[1, 0, 0]]


def test_draws_follow_the_distribution():
    config = SamplingConfig(temperature=1, top_k=3, seed=1)
    logits = logits_of(0.4, 0.1, 0.3, 0.2).expand(20_000, 4)
    counts = torch.bincount(sample(logits, config, make_generator(config)), minlength=4) / 20_000
    expected = torch.tensor([4 / 9, 0, 3 / 9, 2 / 9])
    assert counts[1] == 0
    # Five standard deviations of a proportion at n = 20,000.
    assert (counts - expected).abs().max() < 5 * math.sqrt(0.25 / 20_000)


def test_the_seed_decides():
    logits = torch.randn(1, 50)

    def draw(seed: int | None) -> list[int]:
        config = SamplingConfig(temperature=1, seed=seed)
        generator = make_generator(config)
        return [int(sample(logits, config, generator)) for _ in range(20)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


@pytest.mark.parametrize("bad", [[[math.nan, 0.0]], [[-math.inf, -math.inf]], [[0.0, 1.0], [math.inf, 0.0]]])
def test_broken_logits_are_refused(bad):
    with pytest.raises(ValueError, match="logits: expected a finite maximum"):
        sample(torch.tensor(bad), SamplingConfig())


def test_masked_logits_are_never_drawn():
    config = SamplingConfig(temperature=5, seed=0)
    logits = torch.tensor([[0.0, -math.inf, 0.0]]).expand(1000, 3)
    assert set(sample(logits, config, make_generator(config)).tolist()) == {0, 2}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("top_k", 0), ("top_k", -1),
        ("top_p", 0.0), ("top_p", 1.5), ("top_p", math.nan), ("max_tokens", -1), ("seed", -1), ("stop", ("a", "")),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        SamplingConfig(**{field: value})


def test_a_bare_string_is_no_list_of_stop_strings():
    with pytest.raises(TypeError, match="stop: expected a tuple"):
        SamplingConfig(stop="end")  # type: ignore[arg-type]
