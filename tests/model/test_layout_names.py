"""The names of the three layouts: against transformers' own state_dict, and against fla's class written out."""

from __future__ import annotations

import pytest

from kimi_linear.config import ModelConfig, replace
from kimi_linear.model.layouts.names import layout_tensors, release_shapes

from .foreign import KDA_ONLY, LAYER_TYPES, SMALL, native


def shapes(layout: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in layout_tensors(layout, release_shapes(config)).items()}


def test_the_release_is_itself() -> None:
    assert shapes("release", SMALL) == release_shapes(SMALL)


def test_transformers_names_and_shapes_are_those_of_its_model() -> None:
    theirs = {name: tuple(tensor.shape) for name, tensor in native(layer_types=LAYER_TYPES).state_dict().items()}
    assert shapes("transformers", SMALL) == theirs


def test_the_released_model_has_a_place_for_every_tensor_of_the_release() -> None:
    config = ModelConfig.preset("kimi-linear-48b-a3b")
    found = layout_tensors("transformers", release_shapes(config))
    assert sum(len(tensor.pieces) for tensor in found.values()) == 20_493
    assert found["model.layers.1.mlp.experts.gate_up_proj"].shape == (256, 2048, 2304)
    assert found["model.layers.1.mlp.experts.down_proj"].shape == (256, 2304, 1024)
    assert found["model.layers.0.self_attn.conv1d.weight"].shape == (12288, 1, 4)


@pytest.mark.parametrize("biased", [False, True])
def test_fla_names_and_shapes_are_those_of_its_model(biased: bool) -> None:
    """Written out from fla 0.6's KDAForCausalLM with hidden_size=16, num_heads=2, head_dim=8, intermediate_size=24."""
    layer = {
        "attn_norm.weight": (16,), "mlp_norm.weight": (16,), "attn.A_log": (2,), "attn.dt_bias": (16,),
        "attn.q_proj.weight": (16, 16), "attn.k_proj.weight": (16, 16), "attn.v_proj.weight": (16, 16),
        "attn.q_conv1d.weight": (16, 1, 4), "attn.k_conv1d.weight": (16, 1, 4), "attn.v_conv1d.weight": (16, 1, 4),
        "attn.f_proj.0.weight": (8, 16), "attn.f_proj.1.weight": (16, 8), "attn.b_proj.weight": (2, 16),
        "attn.g_proj.0.weight": (8, 16), "attn.g_proj.1.weight": (16, 8), "attn.g_proj.1.bias": (16,),
        "attn.o_norm.weight": (8,), "attn.o_proj.weight": (16, 16),
        "mlp.gate_proj.weight": (24, 16), "mlp.up_proj.weight": (24, 16), "mlp.down_proj.weight": (16, 24),
    }  # fmt: skip
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"model.embeddings.weight": (40, 16), "model.norm.weight": (16,), "lm_head.weight": (40, 16)}
    config = replace(KDA_ONLY, tie_embeddings=False, linear={"output_gate_bias": biased})
    assert shapes("fla", config) == expected
    tied = replace(config, tie_embeddings=True)
    assert shapes("fla", tied) == {name: shape for name, shape in expected.items() if name != "lm_head.weight"}
