"""Our model against transformers' native one, on the same weights: logits, cached decoding, padding, every gradient.

The two share no code. Both readings of the released model that are in use are checked: which bias goes into the mixture
weights, and which epsilon into the latent's norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kimi_linear.model import KimiLinear

from .tiny import from_pretrained, furthest, publisher, reread, tiny_config, tiny_model, tokens

# transformers and torch warn of each other; our own warnings are errors as everywhere.
pytestmark = pytest.mark.filterwarnings("default", "error:::kimi_linear")

LIMIT = 1e-4
"""fp32, logits of size ten."""


@pytest.fixture(scope="module")
def ours() -> KimiLinear:
    return publisher(tiny_model())


@pytest.fixture
def theirs(folder: Path) -> Any:
    return from_pretrained(folder)


def test_the_weights_matter(ours: KimiLinear) -> None:
    """A logit of ten and an epsilon that shows: agreement below says something."""
    with torch.no_grad():
        logits = ours(tokens())
        assert 3 < logits.abs().max() < 100
        assert furthest(logits, KimiLinear(tiny_config(), seed=3)(tokens())) > 1


@torch.no_grad()
def test_prefill(ours: KimiLinear, theirs: Any) -> None:
    assert furthest(ours(tokens()), theirs(tokens()).logits) < LIMIT


@torch.no_grad()
def test_prefill_after_transformers_saved_it(ours: KimiLinear, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert furthest(ours(tokens()), again(tokens()).logits) < LIMIT


@torch.no_grad()
def test_cached_decoding(ours: KimiLinear, theirs: Any) -> None:
    """A prompt, a second piece of several tokens, then one by one: each against the other and against the whole."""
    ids = tokens()
    whole = ours(ids)
    state, cache = ours.make_state(2), None
    for start, stop in [(0, 40), (40, 57), *((i, i + 1) for i in range(57, 70))]:
        piece = ids[:, start:stop]
        mine = ours(piece, state=state)
        result = theirs(piece, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        assert furthest(mine, result.logits) < LIMIT
        assert furthest(mine, whole[:, start:stop]) < LIMIT
    for i, layer in enumerate(state.layers[:3]):
        # Theirs is key-major.
        assert furthest(layer.recurrent, cache.layers[i].recurrent_states[0].transpose(-1, -2)) < LIMIT


@torch.no_grad()
def test_left_padded_batch(ours: KimiLinear, theirs: Any) -> None:
    """Each row of a padded batch is what our model says of the row alone."""
    ids, mask = tokens(3), torch.ones(3, 70, dtype=torch.int64)
    for row, padding in enumerate((0, 5, 33)):
        mask[row, :padding] = 0
    result = theirs(ids * mask, attention_mask=mask, use_cache=True)
    step = tokens(3, 1)
    mask_after = torch.cat([mask, torch.ones(3, 1, dtype=torch.int64)], dim=1)
    after = theirs(step, attention_mask=mask_after, past_key_values=result.past_key_values).logits
    for row, padding in enumerate((0, 5, 33)):
        state = ours.make_state(1)
        alone = ours(ids[row : row + 1, padding:], state=state)
        assert furthest(alone, result.logits[row : row + 1, padding:]) < LIMIT
        assert furthest(ours(step[row : row + 1], state=state), after[row : row + 1]) < LIMIT


def in_our_names(theirs: Any) -> dict[str, torch.Tensor]:
    """Gradient of each of transformers' parameters, by our name for it."""
    gradients = {}
    for name, parameter in theirs.named_parameters():
        layer = name.split(".")[2] if name.startswith("model.layers") else "0"
        ours = name.replace("forget_gate.", "")
        ours = ours.replace("mlp.", "block_sparse_moe." if layer != "0" else "mlp.")
        for part in ("gate_up", "down"):
            ours = ours.replace(f".experts.{part}_proj", f".experts.{part}")
        if "conv1d" in ours:
            for part, gradient in zip("qkv", parameter.grad.chunk(3), strict=True):
                gradients[ours.replace("conv1d", f"{part}_conv1d")] = gradient
        else:
            gradients[ours] = parameter.grad
    return gradients


def test_gradients_of_every_parameter(ours: KimiLinear, theirs: Any) -> None:
    ids = tokens()
    for model in (ours, theirs):
        logits = model(ids)
        logits = logits if model is ours else logits.logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = in_our_names(theirs)
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    ours.zero_grad(set_to_none=True)
    assert set(found) == set(expected)
    for name, gradient in found.items():
        size = float(expected[name].abs().max())
        assert size > 1e-7, name
        assert furthest(gradient, expected[name]) < LIMIT * max(size, 1e-3), name


# The readings.


@torch.no_grad()
def test_the_default_epsilon_is_the_other_reading(theirs: Any) -> None:
    """vLLM and MLX give the latent's norm the model's own 1e-5, transformers and the publisher 1e-6."""
    default = tiny_model()
    ids = tokens()
    assert furthest(default(ids), theirs(ids).logits) > 100 * LIMIT
    for decoder in theirs.model.layers:
        if hasattr(decoder.self_attn, "kv_a_layernorm"):
            decoder.self_attn.kv_a_layernorm.variance_epsilon = 1e-5
    assert furthest(default(ids), theirs(ids).logits) < LIMIT


def aliased_router(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mixture weights that include the correction bias, as happens where it is added in place to a view of the scores."""
    logits = F.linear(hidden_states.view(-1, self.hidden_dim).float(), self.weight.float())
    biased = logits.sigmoid() + self.e_score_correction_bias
    # Both groups may be chosen from, so the groups decide nothing.
    weights, chosen = biased.topk(self.top_k, dim=-1)
    weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.routed_scaling_factor
    return logits, weights, chosen


@torch.no_grad()
def test_the_bias_in_the_weights_is_a_switch(ours: KimiLinear, theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearTopkRouter

    biased = reread(ours, moe={"bias_in_weights": True})
    ids = tokens()
    assert furthest(biased(ids), theirs(ids).logits) > 100 * LIMIT
    monkeypatch.setattr(KimiLinearTopkRouter, "forward", aliased_router)
    assert furthest(biased(ids), theirs(ids).logits) < LIMIT
