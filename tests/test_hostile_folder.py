"""A model folder from elsewhere: absurd sizes cost nothing, code in it never runs, links lead nowhere."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import kimi_linear as kl
from kimi_linear.config import ConfigError
from kimi_linear.data.tokenizers import ByteTokenizer
from kimi_linear.model.checkpoint import CheckpointError

SMALL = kl.ModelConfig.preset("tiny-moe", hidden_size=32, moe={"expert_size": 16})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "m"
    kl.save(kl.KimiLinear(SMALL, seed=0), folder, ByteTokenizer())
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "m"))


def edit(folder: Path, *, own: bool = False, linear: Any = None, **changes: Any) -> None:
    """Change keys of config.json; our own part, which would contradict them, is left out unless asked for."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    values["linear_attn_config"] |= linear or {}
    if not own:
        del values["kimi_linear_config"]
    path.write_text(json.dumps(values))


@pytest.mark.parametrize("size", [10**6, 10**12, 10**30, -1, "32", True])
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers", "num_experts", "kv_lora_rank"])
def test_an_absurd_size_is_refused_at_once(folder: Path, key: str, size: object) -> None:
    edit(folder, **{key: size})
    before, since = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises((ConfigError, CheckpointError)):
        kl.load(folder)
    assert time.monotonic() - since < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "KiB"


def test_many_layers_of_many_experts_are_refused_before_each_gets_a_name(folder: Path) -> None:
    layers = 60
    edit(folder, num_hidden_layers=layers, num_experts=100, linear={"kda_layers": list(range(1, layers)), "full_attn_layers": [layers]})  # fmt: skip
    with pytest.raises(ConfigError, match=r"num_experts in all layers: expected at most the \d+ tensors"):
        kl.load(folder)


def test_sizes_whose_product_overflows_are_refused(folder: Path) -> None:
    edit(folder, hidden_size=2**30, moe_intermediate_size=2**30, intermediate_size=2**30)
    with pytest.raises(ConfigError, match="expected sizes that a tensor can have"):
        kl.load(folder)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a":' * 100_000, "recursion"),
        ('{"model_type": "kimi_linear", "model_type": "kimi_linear"}', "the key 'model_type' twice"),
        ('{"rms_norm_eps": NaN}', "NaN, which is no JSON number"),
        ('{"rms_norm_eps": 1e999}', "expected"),
        ('{"vocab_size": ' + "9" * 10_000 + "}", "expected JSON"),
        (" " * (17 << 20), "expected at most 16,777,216 bytes of JSON"),
        ("", "expected JSON"),
        ("null", "expected a JSON object, got NoneType"),
    ],
)
def test_a_config_that_is_no_plain_object_is_refused(folder: Path, text: str, reason: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        kl.load(folder)


@pytest.mark.parametrize("lists", [{"kda_layers": "123"}, {"kda_layers": [1, "2"]}, {"full_attn_layers": 4}])
def test_layer_lists_that_are_no_lists_of_numbers_are_refused(folder: Path, lists: dict[str, Any]) -> None:
    edit(folder, linear=lists)
    with pytest.raises(ConfigError, match="expected a list of layer numbers"):
        kl.load(folder)


def test_code_in_the_folder_is_never_run(folder: Path, tmp_path: Path) -> None:
    """The released config.json names remote code; it is read past, and pickles beside safetensors stay closed."""
    mark = tmp_path / "ran"
    code = f"import os\nos.mkdir({str(mark)!r})\nclass KimiLinearConfig: ...\nclass KimiLinearForCausalLM: ...\n"
    for name in ("configuration_kimi", "modeling_kimi", "__init__", "tokenization_kimi"):
        (folder / f"{name}.py").write_text(code)
    (folder / "training_args.bin").write_bytes(b"cos\nmkdir\n(V" + str(mark).encode() + b"\ntR.")
    edit(folder, auto_map={"AutoConfig": "configuration_kimi.KimiLinearConfig",
                           "AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM"})  # fmt: skip
    model, tokenizer = kl.load(folder)
    assert tokenizer is not None
    assert torch.equal(model.model.embed_tokens.weight, kl.KimiLinear(SMALL, seed=0).model.embed_tokens.weight)
    assert not mark.exists()
    assert not {"configuration_kimi", "modeling_kimi", "tokenization_kimi"} & set(sys.modules)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    os.rename(folder / name, tmp_path / "secret")
    os.symlink("../secret", folder / name)
    with pytest.raises(CheckpointError, match=f"{name}: expected a file of .*, got a link to .*secret"):
        kl.load(folder)


def test_weights_wider_than_config_json_says_are_not_rounded_in_silence(folder: Path) -> None:
    edit(folder, own=True, dtype="bfloat16")
    with pytest.raises(CheckpointError, match=r"expected numbers that torch.bfloat16 holds, .* got torch.float32"):
        kl.load(folder)
    assert kl.load(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert kl.load(folder, dtype=torch.float32)[0].dtype == torch.float32
