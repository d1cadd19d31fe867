"""Our KDA inside transformers' model: packed documents apart, everything else as it was.

What is packed is compared with transformers' own unpatched model on each document alone.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import kimi_linear as kl
from kimi_linear.integrations import transformers as integration
from kimi_linear.model.layouts.check import examine

from .tiny import LENGTH, from_pretrained, furthest, publisher, saved, tiny_config, tiny_model, tokens

# transformers and torch warn of each other; our own warnings are errors as everywhere.
pytestmark = pytest.mark.filterwarnings("default", "error:::kimi_linear")

LIMIT = 1e-4
"""fp32, logits of size ten."""
LEAK = 0.1
"""What a leak between documents makes at least; it is 2 to 10 here."""
BOUNDS = [0, 3, 30, 31, LENGTH]
"""Documents of 3, 27, 1 and 39 tokens: shorter than the convolution, within a chunk, one token."""

DESCRIPTIONS = {
    "position_ids": ("position_ids",),
    "cu_seq_lens_q": ("cu_seq_lens_q",),
    "seq_idx": ("seq_idx",),
    "all, as TRL passes them": ("position_ids", "cu_seq_lens_q", "seq_idx"),
    "position_ids and a mask of ones": ("position_ids", "attention_mask"),
}


def packing(bounds: list[int], names: tuple[str, ...] = ("position_ids",)) -> dict[str, Tensor]:
    """One packed row, described in some of the ways that are in use."""
    lengths = torch.tensor(bounds).diff()
    every = {
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "cu_seq_lens_q": torch.tensor(bounds, dtype=torch.int32),
        "seq_idx": torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths)[None],
        "attention_mask": torch.ones(1, bounds[-1], dtype=torch.int64),
    }
    return {name: every[name] for name in names}


def alone(model: Any, ids: Tensor, bounds: list[int]) -> Tensor:
    """Logits of each document of a row by itself, joined."""
    parts = [model(ids[:, a:b]).logits for a, b in itertools.pairwise(bounds)]
    return torch.cat(parts, dim=1)


def unpatched(model: Any, ids: Tensor, described: dict[str, Tensor]) -> Tensor | None:
    """What transformers alone makes of a packed row; None where it refuses, as 5.23 does on seq_idx."""
    try:
        return model(ids, **described).logits
    except ValueError as error:
        if "can't keep packed sequences apart" not in str(error):
            raise
        return None


@pytest.fixture
def model(folder: Path) -> Any:
    return from_pretrained(folder)


# Packing.


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("names", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
@torch.no_grad()
def test_packed_documents_stay_apart(folder: Path, names: tuple[str, ...], attention: str) -> None:
    model = from_pretrained(folder, attn_implementation=attention)
    ids = tokens(1)
    expected = alone(model, ids, BOUNDS)
    if (leaking := unpatched(model, ids, packing(BOUNDS, names))) is not None:
        assert furthest(leaking, expected) > LEAK, "transformers was mended: the patch may have become needless"
    integration.patch()
    assert furthest(model(ids, **packing(BOUNDS, names)).logits, expected) < LIMIT


@torch.no_grad()
def test_transformers_leaks_in_kda_alone_too(model: Any) -> None:
    """With position_ids and no cache its full attention is right, so this is the memory and the convolution."""
    ids = tokens(1)
    expected = alone(model, ids, BOUNDS)
    assert furthest(model(ids, **packing(BOUNDS), use_cache=False).logits, expected) > LEAK
    integration.patch()
    assert furthest(model(ids, **packing(BOUNDS), use_cache=False).logits, expected) < LIMIT


@pytest.mark.slow
@pytest.mark.unchecked_shapes  # jaxtyping's checks do not survive being traced
@torch.no_grad()
def test_a_compiled_model_keeps_documents_apart_too(model: Any) -> None:
    """Or breaks the graph where it must look at the numbers; it never looks away."""
    ids = tokens(1)
    expected = alone(model, ids, BOUNDS)
    integration.patch()
    compiled = torch.compile(model, backend="eager")
    assert furthest(compiled(ids, **packing(BOUNDS)).logits, expected) < LIMIT
    torch.compiler.reset()


def test_packed_gradients_are_the_documents_gradients(model: Any) -> None:
    ids = tokens(1)
    labels = ids.clone()
    labels[:, BOUNDS[:-1]] = -100

    def gradients(logits: Tensor) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients(alone(model, ids, BOUNDS))
    integration.patch()
    model.train()
    model.gradient_checkpointing_enable()
    found = gradients(model(ids, **packing(BOUNDS)).logits)
    for name, gradient in expected.items():
        assert furthest(found[name], gradient) < 1e-4 * max(float(gradient.abs().max()), 1.0), name


@torch.no_grad()
def test_several_packed_rows_with_padding(model: Any) -> None:
    """Two rows with different documents; padding on the left of one and on the right of the other."""
    ids = tokens(2, 24)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, :4] = 0
    mask[1, 20:] = 0
    positions = torch.zeros(2, 24, dtype=torch.int64)
    documents = {0: [4, 11, 24], 1: [0, 5, 13, 20]}
    for row, bounds in documents.items():
        for start, stop in itertools.pairwise(bounds):
            positions[row, start:stop] = torch.arange(stop - start)
    expected = {
        (row, start, stop): model(ids[row : row + 1, start:stop]).logits
        for row, bounds in documents.items()
        for start, stop in itertools.pairwise(bounds)
    }
    integration.patch()
    found = model(ids * mask, position_ids=positions, attention_mask=mask).logits
    for (row, start, stop), logits in expected.items():
        assert furthest(found[row : row + 1, start:stop], logits) < LIMIT


def bounds_of(**given: Tensor) -> list[int] | None:
    shape = next(tuple(value.shape) for value in given.values() if value.ndim == 2)
    found = integration.packed_bounds(shape, torch.device("cpu"), **given)
    return None if found is None else found.tolist()


def test_padding_is_not_packing() -> None:
    """generate() numbers a left-padded row 1 1 1 0 1 2 ...: no documents in it."""
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    assert bounds_of(position_ids=positions, attention_mask=mask) is None
    assert bounds_of(position_ids=torch.arange(5, 12)[None]) is None
    assert bounds_of(position_ids=torch.tensor([[0, 1, 2, 0, 1, 0, 1]])) == [0, 3, 5, 7]
    # A mask that covers a cache as well is read at its end.
    after = torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    assert integration.packed_bounds(
        (1, 3), torch.device("cpu"), position_ids=torch.tensor([[0, 0, 1]]), attention_mask=after
    ).tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"cu_seq_lens_q": torch.tensor([0, 4, LENGTH])},
            r"position_ids: expected documents that begin where cu_seq_lens_q",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 60])}, r"cu_seq_lens_q: expected bounds that rise from 0 to B\*T == 70"),
        ({"use_cache": True}, "use_cache: a packed batch leaves nothing"),
    ],
    ids=["contradiction", "too short", "cache"],
)
def test_packing_that_cannot_be_is_refused(model: Any, changes: dict[str, Any], message: str) -> None:
    integration.patch()
    with pytest.raises(ValueError, match=message):
        model(tokens(1), **{**packing(BOUNDS), **changes})


def test_a_document_over_two_rows_is_refused(model: Any) -> None:
    integration.patch()
    with pytest.raises(ValueError, match="a document to begin at each of the 2 rows"):
        model(tokens(2, 8), cu_seq_lens_q=torch.tensor([0, 5, 16]))


# Everything else as it was.


@torch.no_grad()
def test_logits_and_the_cache_are_transformers_own(model: Any) -> None:
    """Read by one and continued by the other, both ways: the cache holds the same numbers in the same places."""
    ids = tokens()
    whole = model(ids).logits
    for first_patched in (True, False):
        cache = None
        for start, stop, patched in [
            (0, 2, first_patched),
            (2, 40, not first_patched),
            (40, 41, first_patched),
            (41, 69, first_patched),
            (69, 70, not first_patched),
        ]:
            integration.patch() if patched else integration.unpatch()
            result = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            assert furthest(result.logits, whole[:, start:stop]) < LIMIT


@pytest.mark.parametrize(
    "options",
    [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=str,
)
def test_generation_is_transformers_own(model: Any, options: dict[str, Any]) -> None:
    """Cached, left-padded, greedy and in beams, whose caches are reordered."""
    ids, mask = tokens(3, 20), torch.ones(3, 20, dtype=torch.int64)
    mask[1, :7] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    expected = model.generate(ids * mask, **settings)
    integration.patch()
    assert torch.equal(model.generate(ids * mask, **settings), expected)
    assert len(set(expected[:, 20:].flatten().tolist())) > 5, "a text that says something"


@torch.no_grad()
def test_offloaded_weights_come_back(folder: Path) -> None:
    """Weights that the layer reads without calling their module live elsewhere between two forwards."""
    from accelerate import cpu_offload

    integration.patch()
    expected = from_pretrained(folder)(tokens()).logits
    model = cpu_offload(from_pretrained(folder), execution_device="cpu")
    assert model.model.layers[0].self_attn.forget_gate.A_log.device.type == "meta"
    assert furthest(model(tokens()).logits, expected) == 0


@torch.no_grad()
def test_explicit_implementations(model: Any) -> None:
    expected = model(tokens()).logits
    for impl in ("reference", "torch"):
        integration.patch(impl=impl)
        assert furthest(model(tokens()).logits, expected) < LIMIT
    with pytest.raises(ValueError, match="impl: expected 'auto' or one of reference, torch, triton, got 'fast'"):
        integration.patch(impl="fast")
    integration.patch(impl="triton")
    with pytest.raises(ValueError, match="'triton' expected CUDA tensors"):
        model(tokens())


def test_patching_twice_is_once_and_undone_at_once() -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.models.kimi_linear import modeling_kimi_linear as native

    def world() -> tuple[Any, ...]:
        classes = (native.KimiLinearDeltaAttention, native.KimiLinearModel, native.KimiLinearPreTrainedModel)
        names = ("__init__", "forward", "save_pretrained", "_keep_in_fp32_modules_strict")
        rules = [str(rule) for rule in get_checkpoint_conversion_mapping("kimi_linear")]
        return [[vars(c).get(n) for n in names] for c in classes], rules

    before = world()
    assert not integration.is_patched()
    integration.patch()
    once = world()
    integration.patch()
    assert integration.is_patched()
    assert world() == once != before
    integration.unpatch()
    assert not integration.is_patched()
    assert world() == before
    integration.unpatch()


def native_config() -> Any:
    """A config made from scratch: transformers' own keys alone."""
    from transformers import KimiLinearConfig

    return KimiLinearConfig(
        vocab_size=257, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
        v_head_dim=16, num_experts=4, num_experts_per_token=2, linear_head_dim=16, linear_num_heads=2,
        initializer_range=0.2, layer_types=["linear_attention"] * 3 + ["full_attention"],
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


@torch.no_grad()
def test_models_from_a_config_and_base_models_are_reached() -> None:
    from transformers import AutoModel, AutoModelForCausalLM, KimiLinearForCausalLM

    config = native_config()
    integration.patch()
    ids = tokens(1)
    for make in (AutoModelForCausalLM.from_config, KimiLinearForCausalLM, AutoModel.from_config):
        made = make(config).eval()
        found = made(ids, **packing(BOUNDS))[0]
        apart = torch.cat([made(ids[:, a:b])[0] for a, b in itertools.pairwise(BOUNDS)], dim=1)
        assert furthest(found, apart) < LIMIT
        assert furthest(found, made(ids)[0]) > LEAK


# The successors' layers.

VARIANTS = {
    "bounded gate": {"gate": "bounded", "gate_lower_bound": -4.0},
    "full-rank output gate": {"output_gate_rank": "full"},
    "both": {"gate": "bounded", "output_gate_rank": "full"},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@torch.no_grad()
def test_successors_are_told_by_their_keys(changes: dict[str, Any], tmp_path: Path) -> None:
    """transformers alone ignores the keys; patched it builds what they say."""
    ours = tiny_model(linear=changes)
    saved(ours, tmp_path / "m")
    integration.patch()
    theirs = from_pretrained(tmp_path / "m")
    for decoder in theirs.model.layers:
        if hasattr(decoder.self_attn, "kv_a_layernorm"):
            decoder.self_attn.kv_a_layernorm.variance_epsilon = 1e-5
    ids = tokens()
    assert furthest(theirs(ids).logits, ours(ids)) < LIMIT
    theirs.save_pretrained(tmp_path / "again")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "again"))
    assert {name: (t.shape, t.dtype) for name, t in before.items()} == {n: (t.shape, t.dtype) for n, t in after.items()}
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_successor_made_before_the_patch_is_refused(tmp_path: Path) -> None:
    theirs = from_pretrained(saved(tiny_model(linear=VARIANTS["bounded gate"]), tmp_path / "m"))
    integration.patch()
    with pytest.raises(
        ValueError, match=r"\(-4.0, False\).*call kimi_linear.integrations.transformers.patch\(\) before"
    ):
        theirs(tokens())


# Loading and saving.


def test_a_16_bit_model_keeps_the_rates_in_fp32(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")["model.layers.0.self_attn.A_log"]
    native = from_pretrained(folder, dtype=torch.bfloat16)
    assert furthest(native.model.layers[0].self_attn.forget_gate.A_log, stored) > 1e-4, "transformers alone rounds them"
    # What that rounding alone costs. In bf16 throughout it is lost among other roundings, which differ from processor to processor.
    whole = from_pretrained(folder)
    with torch.no_grad():
        exact = whole(tokens()).logits
        for wide, narrow in zip(whole.model.layers, native.model.layers, strict=True):
            if hasattr(wide.self_attn, "forget_gate"):
                for name in ("A_log", "dt_bias"):
                    getattr(wide.self_attn.forget_gate, name).copy_(getattr(narrow.self_attn.forget_gate, name))
        assert furthest(whole(tokens()).logits, exact) > 1e-3
    integration.patch()
    model = from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(model.model.layers[0].self_attn.forget_gate.A_log, stored)
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.dtype == torch.float32
    # They are not only kept but used: rounded as above, they give other numbers.
    with torch.no_grad():
        before = model(tokens()).logits
        for layer in model.model.layers:
            if hasattr(layer.self_attn, "forget_gate"):
                rates = layer.self_attn.forget_gate
                rates.A_log.copy_(rates.A_log.bfloat16())
        assert torch.isfinite(before).all()
        assert not torch.equal(model(tokens()).logits, before)


def test_saved_folders_have_the_release_layouts_names(folder: Path, tmp_path: Path) -> None:
    expected = load_file(folder / "model.safetensors")
    from_pretrained(folder).save_pretrained(tmp_path / "native")
    native = load_file(tmp_path / "native/model.safetensors")
    assert "model.layers.0.block_sparse_moe.gate_proj.weight" in native, "transformers names the dense layer right now"
    integration.patch()
    from_pretrained(folder).save_pretrained(tmp_path / "patched")
    # A folder with the wrong name is read too, and mended by saving it.
    from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "mended")
    for name in ("patched", "mended"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@torch.no_grad()
def test_saved_folders_load_here_as_they_are(folder: Path, tmp_path: Path) -> None:
    """A model that transformers loaded, and one that it made from a config, without any release key in it."""
    from transformers import AutoModelForCausalLM

    integration.patch()
    made = AutoModelForCausalLM.from_config(native_config()).eval()
    for name, model in (("loaded", from_pretrained(folder)), ("made", made)):
        model.save_pretrained(tmp_path / name)
        assert examine(tmp_path / name).errors == []
        ours, _ = kl.load(tmp_path / name)
        assert furthest(publisher(ours)(tokens()), model(tokens()).logits) < LIMIT


def test_a_config_made_from_scratch_is_saved_whole(tmp_path: Path) -> None:
    from transformers import KimiLinearConfig

    kinds = ["linear_attention"] * 3 + ["full_attention"] + ["linear_attention"] * 2 + ["full_attention"]
    config = KimiLinearConfig(num_hidden_layers=7, layer_types=kinds, linear_num_heads=3, linear_head_dim=16)
    integration.complete_config(config)
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["linear_attn_config"] == {
        "num_heads": 3, "head_dim": 16, "short_conv_kernel_size": 4,
        "kda_layers": [1, 2, 3, 5, 6], "full_attn_layers": [4, 7],
    }  # fmt: skip
    assert values["mla_use_nope"] is True
    assert values["first_k_dense_replace"] == 1
    again = KimiLinearConfig.from_pretrained(tmp_path)
    assert (again.layer_types, again.mlp_layer_types) == (config.layer_types, config.mlp_layer_types)

    config.layer_types = kinds[::-1]
    with pytest.raises(ValueError, match=r"linear_attn_config.kda_layers: expected \[2, 3, 5, 6, 7\]"):
        integration.complete_config(config)
    config.mlp_layer_types = ["sparse"] + ["dense"] * 6
    with pytest.raises(ValueError, match="mlp_layer_types: expected every 'dense' before"):
        integration.complete_config(config)


def test_the_tiny_config_is_the_default_reading() -> None:
    """The folder that these tests load is plain: nothing in it needs our own loader."""
    from kimi_linear.config import to_release

    assert to_release(tiny_config())["model_type"] == "kimi_linear"
