"""A model as a folder: whole, back again, and clear about what it cannot read."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kimi_linear as kl
from kimi_linear.config import ConfigError, to_release
from kimi_linear.data.tokenizers import ByteTokenizer
from kimi_linear.model import checkpoint

SMALL = kl.ModelConfig.preset("tiny-moe", hidden_size=32, moe={"expert_size": 16})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["kda", "gdn"])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, variant: str) -> None:
    config = kl.ModelConfig.preset("tiny", hidden_size=32, linear_mixer=variant)
    model = kl.KimiLinear(config, seed=0).to(dtype)
    kl.save(model, tmp_path / "m", ByteTokenizer(), max_shard_bytes=100_000)
    loaded, tokenizer = kl.load(tmp_path / "m")
    assert loaded.config == config
    assert (loaded.dtype, loaded.training) == (dtype, False)
    assert tokenizer is not None
    tokens = torch.tensor([tokenizer.encode("def f(x):")])
    with torch.no_grad():
        assert torch.equal(loaded(tokens), model(tokens))
    a, b = model.state_dict(), loaded.state_dict()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    wide, _ = kl.load(tmp_path / "m", dtype=torch.float64)
    assert wide.dtype == torch.float64


def test_a_folder_without_tokenizer_has_none(tmp_path: Path) -> None:
    kl.save(kl.KimiLinear(SMALL, seed=0), tmp_path / "m")
    assert kl.load(tmp_path / "m")[1] is None


def test_a_loaded_model_trains(tmp_path: Path) -> None:
    kl.save(kl.KimiLinear(SMALL, seed=0), tmp_path / "m")
    model, _ = kl.load(tmp_path / "m")
    flagged = {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert {name.rpartition(".")[2] for name in flagged} == {"A_log", "dt_bias", "e_score_correction_bias"}
    model.train()(torch.randint(320, (2, 9))).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with pytest.raises(FileNotFoundError, match=r"found none in .*m; 'kimi-linear train' makes one"):
        kl.load(folder)
    kl.save(kl.KimiLinear(SMALL, seed=0), folder)
    path, good = folder / "config.json", to_release(SMALL, dtype="float32")
    for text, message in (
        ('{"model_type":', "expected JSON"),
        ("[1]", "expected a JSON object, got list"),
        (json.dumps(good | {"dtype": "int8"}), "dtype: expected one of .*, got 'int8'"),
        (json.dumps(good | {"new_trick": True}), "new_trick: unknown key"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            kl.load(folder)
    other = to_release(kl.ModelConfig.preset("tiny-moe", hidden_size=48, moe={"expert_size": 16}))
    path.write_text(json.dumps(other))
    with pytest.raises(checkpoint.CheckpointError, match=r"expected shape \[.*48"):
        kl.load(folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = kl.KimiLinear(kl.ModelConfig.preset("tiny", vocab_size=64), seed=0)
    with pytest.raises(ValueError, match="tokenizer: expected at most the model's 64 tokens, got 257"):
        kl.save(model, tmp_path / "m", ByteTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_last_good_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = kl.KimiLinear(SMALL, seed=0)
    kl.save(model, tmp_path / "m", ByteTokenizer())

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"the earlier .* is untouched"):
        kl.save(kl.KimiLinear(SMALL, seed=1), tmp_path / "m")
    monkeypatch.undo()
    loaded, tokenizer = kl.load(tmp_path / "m")
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert tokenizer is not None
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_saving_without_a_tokenizer_does_not_delete_one(tmp_path: Path) -> None:
    model = kl.KimiLinear(SMALL, seed=0)
    kl.save(model, tmp_path / "m", ByteTokenizer())
    with pytest.raises(FileExistsError, match=r"also holds tokenizer.*that saving would delete"):
        kl.save(model, tmp_path / "m")
    assert kl.load(tmp_path / "m")[1] is not None


def test_the_package_alone_imports_neither_torch_nor_itself() -> None:
    code = "import sys, kimi_linear; print([m for m in sys.modules if m == 'torch' or m.startswith('kimi_linear.')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
