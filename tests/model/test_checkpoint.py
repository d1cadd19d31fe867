"""Weights on disk: bit for bit back, under the release's names, and nothing damaged or foreign gets in."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_linear.config import ModelConfig
from kimi_linear.model import KimiLinear, checkpoint
from kimi_linear.model.atomic import replaced_folder
from kimi_linear.model.checkpoint import CheckpointError, load_weights, save_weights

SMALL = ModelConfig.preset(
    "tiny-moe",
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    tie_embeddings=False,
    linear={"num_heads": 2, "head_dim": 8},
    mla={"num_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    moe={"expert_size": 8, "num_experts": 4},
)
SHARDS = 20_000


def same(one: KimiLinear, other: KimiLinear) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def empty(config: ModelConfig = SMALL) -> KimiLinear:
    with torch.device("meta"):
        return KimiLinear(config)


@pytest.fixture
def model() -> KimiLinear:
    return KimiLinear(SMALL, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_shard_bytes", [1 << 30, SHARDS])
def test_round_trip_is_bit_identical(
    model: KimiLinear, tmp_path: Path, dtype: torch.dtype, max_shard_bytes: int
) -> None:
    model.to(dtype)
    save_weights(model, tmp_path / "m", max_shard_bytes=max_shard_bytes)
    files = sorted(p.name for p in (tmp_path / "m").iterdir())
    if max_shard_bytes == SHARDS:
        assert files[-1] == "model.safetensors.index.json"
        assert files[0] == f"model-00001-of-{len(files) - 1:05d}.safetensors"
        sizes = [sum(t.nbytes for t in load_file(tmp_path / "m" / f).values()) for f in files[:-1]]
        assert max(sizes) <= SHARDS
        index = json.loads((tmp_path / "m" / files[-1]).read_text())
        assert index["metadata"]["total_size"] == sum(sizes) == sum(p.nbytes for p in model.parameters())
    else:
        assert files == ["model.safetensors"]
    fresh = empty()
    load_weights(fresh, tmp_path / "m", dtype=dtype)
    assert same(fresh, model)
    assert fresh.blocks[0].self_attn.A_log.dtype == torch.float32
    overwritten = KimiLinear(SMALL, seed=1)
    load_weights(overwritten, tmp_path / "m", dtype=dtype)
    assert same(overwritten, model)


def test_names_are_those_of_the_release(model: KimiLinear, tmp_path: Path) -> None:
    save_weights(model, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    moe = "model.layers.1.block_sparse_moe"
    experts = model.blocks[1].feed_forward.experts
    assert torch.equal(tensors[f"{moe}.experts.2.w1.weight"], experts.gate_up[2, :8])
    assert torch.equal(tensors[f"{moe}.experts.2.w3.weight"], experts.gate_up[2, 8:])
    assert torch.equal(tensors[f"{moe}.experts.2.w2.weight"], experts.down[2])
    assert not any("gate_up" in name for name in tensors)
    others = {name for name, _ in model.named_parameters() if ".experts." not in name}
    assert others == {name for name in tensors if ".experts." not in name}


def test_every_tensor_of_the_released_checkpoint_has_its_place() -> None:
    names = checkpoint.release_tensors(empty(ModelConfig.preset("kimi-linear-48b-a3b")))
    assert len(names) == 20_493


def test_conversion_on_load_keeps_the_wide_parameters(model: KimiLinear, tmp_path: Path) -> None:
    save_weights(model, tmp_path / "m")
    low = empty()
    load_weights(low, tmp_path / "m", dtype=torch.bfloat16)
    assert torch.equal(low.blocks[0].self_attn.dt_bias, model.blocks[0].self_attn.dt_bias)
    assert torch.equal(low.lm_head.weight, model.lm_head.weight.bfloat16())


def edit(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    return damage


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


A_LOG = "model.layers.0.self_attn.A_log"


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (edit(lambda t: t.pop("lm_head.weight")), CheckpointError, "lm_head.weight: missing from"),
        (edit(lambda t: t.update(stray=torch.ones(2))), CheckpointError, "stray: not a tensor of this model"),
        (edit(lambda t: t.update({A_LOG: torch.ones(2)})), CheckpointError, r"expected shape \[1, 1, 2, 1\], got \[2\]"),
        (edit(lambda t: t[A_LOG].fill_(torch.nan)), CheckpointError, f"{A_LOG}: expected finite numbers"),
        (edit(lambda t: t[A_LOG].fill_(torch.inf)), CheckpointError, f"{A_LOG}: expected finite numbers"),
        (edit(lambda t: t.update({A_LOG: t[A_LOG].long()})), CheckpointError, "got torch.int64"),
        (cut, CheckpointError, "model.safetensors: expected a whole safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" * 50), CheckpointError, "of another kind"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), CheckpointError, "expected a whole safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, "found neither"),
        (lambda f: os.rename(f / "model.safetensors", f / "a.safetensors"), CheckpointError, "got a.safetensors"),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(
    model: KimiLinear, tmp_path: Path, damage: Callable[[Path], object], kind: type[Exception], message: str
) -> None:
    save_weights(model, tmp_path / "m")
    damage(tmp_path / "m")
    with pytest.raises(kind, match=message):
        load_weights(empty(), tmp_path / "m")


def test_numbers_that_do_not_fit_the_dtype_are_refused(model: KimiLinear, tmp_path: Path) -> None:
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    save_weights(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"lm_head.weight: expected finite numbers in torch.float16"):
        load_weights(empty(), tmp_path / "m", dtype=torch.float16)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", "..\\x.safetensors"]
)
def test_an_index_cannot_leave_its_folder(model: KimiLinear, tmp_path: Path, name: str) -> None:
    save_weights(model, tmp_path / "m", max_shard_bytes=SHARDS)
    save_weights(model, tmp_path / "other")
    os.rename(tmp_path / "other" / "model.safetensors", tmp_path / "other.safetensors")
    path = tmp_path / "m" / checkpoint.INDEX_FILE
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index.json: expected names of \.safetensors files in its own folder"):
        load_weights(empty(), tmp_path / "m")


def test_index_and_files_must_agree(model: KimiLinear, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_weights(model, folder, max_shard_bytes=SHARDS)
    path = folder / checkpoint.INDEX_FILE
    good = json.loads(path.read_text())
    first = good["weight_map"]["lm_head.weight"]
    cases = [
        ("{", CheckpointError, "expected JSON"),
        ("[]", CheckpointError, "expected a JSON object, got list"),
        ("{}", CheckpointError, "expected an object 'weight_map'"),
        (json.dumps({"weight_map": good["weight_map"] | {"stray": first}}), CheckpointError, "difference at stray"),
        (
            json.dumps({"weight_map": good["weight_map"] | {"a": "b.safetensors"}}),
            FileNotFoundError,
            "b.safetensors: l",
        ),
    ]
    for text, kind, message in cases:
        path.write_text(text)
        with pytest.raises(kind, match=message):
            load_weights(empty(), folder)
    path.write_text(json.dumps(good))
    save_file({"x": torch.ones(1)}, folder / "leftover.safetensors")
    with pytest.raises(CheckpointError, match=r"leftover.safetensors: found in"):
        load_weights(empty(), folder)
    (folder / "leftover.safetensors").unlink()
    (folder / first).unlink()
    with pytest.raises(FileNotFoundError, match="was the download complete"):
        load_weights(empty(), folder)
    with pytest.raises(FileNotFoundError, match="which is not there"):
        load_weights(empty(), tmp_path / "nowhere")


def test_a_model_without_weights_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meta device"):
        save_weights(empty(), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shards_written", [0, 2])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    model: KimiLinear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards_written: int
) -> None:
    save_weights(model, tmp_path / "m")
    calls, write = [], checkpoint.save_file

    def full(*args: object, **kwargs: object) -> None:
        calls.append(args)
        if len(calls) > shards_written:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_file", full)
    other = KimiLinear(SMALL, seed=1)
    with pytest.raises(OSError, match=r"No space left on device; the earlier .*m is untouched; free space") as caught:
        save_weights(other, tmp_path / "m", max_shard_bytes=SHARDS)
    assert caught.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    fresh = empty()
    load_weights(fresh, tmp_path / "m")
    assert same(fresh, model)
    with pytest.raises(OSError, match="new was not made"):
        save_weights(other, tmp_path / "new")


def test_a_real_failure_of_the_system_is_reported_too(model: KimiLinear, tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the write itself fails inside safetensors."""
    save_weights(model, tmp_path / "m")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"could not save .*; the earlier .*m is untouched"):
            save_weights(KimiLinear(SMALL, seed=1), tmp_path / "m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    fresh = empty()
    load_weights(fresh, tmp_path / "m")
    assert same(fresh, model)


def test_a_failed_swap_puts_the_old_folder_back(
    model: KimiLinear, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_weights(model, tmp_path / "m")
    rename = os.rename

    def fails(source: Path, target: Path) -> None:
        if ".new-" in Path(source).name:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="Input/output error; the earlier"):
        save_weights(KimiLinear(SMALL, seed=1), tmp_path / "m")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    fresh = empty()
    load_weights(fresh, tmp_path / "m")
    assert same(fresh, model)


def test_saving_again_replaces_whole_and_deletes_nothing_foreign(model: KimiLinear, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    save_weights(model, folder, max_shard_bytes=SHARDS)
    save_weights(model, folder)
    assert [p.name for p in folder.iterdir()] == ["model.safetensors"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"also holds notes.txt that saving would delete"):
        save_weights(model, folder)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "notes.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    with pytest.raises(FileExistsError, match="expected a folder or nothing, got the file"):
        save_weights(model, folder / "notes.txt")


def test_an_interrupted_save_leaves_no_trace(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()

    def write() -> None:
        with replaced_folder(tmp_path / "m") as new:
            (new / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [p.name for p in tmp_path.rglob("*")] == ["m"]
