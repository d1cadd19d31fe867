"""Files from elsewhere that lie, lead astray or want to run something: refused with a reason, and nothing is changed."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from kimi_linear.config import ModelConfig
from kimi_linear.model import KimiLinear, checkpoint, streaming
from kimi_linear.model.checkpoint import CheckpointError, load_weights, save_weights, stored_tensors
from kimi_linear.model.safetensors_file import MAX_HEADER_BYTES, read_header

SMALL = ModelConfig.preset(
    "tiny-moe", vocab_size=40, hidden_size=16, intermediate_size=24, num_layers=2, pattern="1:1",
    linear={"num_heads": 2, "head_dim": 8},
    mla={"num_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
    moe={"expert_size": 8, "num_experts": 4},
)  # fmt: skip
SHARDS = 5_000
EMBEDDING = "model.embed_tokens.weight"


def empty() -> KimiLinear:
    with torch.device("meta"):
        return KimiLinear(SMALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_weights(KimiLinear(SMALL, seed=0), tmp_path / "m")
    return tmp_path / "m"


def file_of(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


EIGHT = b"\0" * 8


@pytest.mark.parametrize(
    ("blob", "reason"),
    [
        (b"", "0 bytes are too few"),
        (b"\1\0\0", "3 bytes are too few"),
        (file_of({}, length=1 << 62), "its header claims 4,611,686,018,427,387,904 bytes, and 2 follow"),
        (file_of(b"{}" + b" " * 10, length=100), "claims 100 bytes, and 12 follow"),
        (file_of(b"[" * 200_000), "expected JSON, got maximum recursion depth|expected JSON, got .*recursion"),
        (file_of(b'{"a":' * 200_000), "recursion"),
        (file_of(b"[" + b"[]," * 1000 + b"[]]"), "expected a JSON object, got list"),
        (file_of(b'{"a":' + b"9" * 10_000 + b"}"), "expected JSON"),
        (file_of(b"\xff\xfe{}"), "expected JSON, got 'utf-8' codec"),
        (file_of(b'{"a":1,"a":2}'), "the key 'a' twice"),
        (file_of(b'{"a":NaN}'), "NaN, which is no JSON number"),
        (file_of({"__metadata__": {"x": 1}}), "__metadata__ is no object of strings"),
        (file_of({"a": 3}), "a has no dtype, shape and data_offsets"),
        (file_of({"a": entry() | {"more": 1}}, EIGHT), "a has no dtype, shape and data_offsets, or more"),
        (file_of({"a": entry(dtype="F4")}, EIGHT), "a is stored as 'F4', which is not read"),
        (file_of({"a": entry(dtype=["F32"])}, EIGHT), r"a is stored as \['F32'\]"),
        (file_of({"a": entry(shape=[-2])}, EIGHT), "a has no shape"),
        (file_of({"a": entry(shape=[True, 2])}, EIGHT), "a has no shape"),
        (file_of({"a": entry(shape=[2.0])}, EIGHT), "a has no shape"),
        (file_of({"a": entry(shape="2")}, EIGHT), "a has no shape"),
        (file_of({"a": entry(shape=[1] * 9)}, EIGHT), "a has no shape of at most 8"),
        (file_of({"a": entry(shape=[1 << 62, 1 << 62, 0, 1 << 70])}, EIGHT), "a has no shape"),
        (file_of({"a": entry(shape=[10**12, 10**12])}, EIGHT), r"a has 8 bytes, \[1000000000000, 1000000000000\]"),
        (file_of({"a": entry(shape=[3])}, EIGHT), r"a has 8 bytes, \[3\] in F32 does not"),
        (file_of({"a": entry(offsets=[8, 0])}, EIGHT), "a has no two offsets in order"),
        (file_of({"a": entry(offsets=[-8, 0])}, EIGHT), "a has no two offsets"),
        (file_of({"a": entry(offsets=[0, 8, 8])}, EIGHT), "a has no two offsets"),
        (file_of({"a": entry(), "b": entry()}, EIGHT), "b overlaps the tensor before it"),
        (file_of({"a": entry(), "b": entry(offsets=[4, 12])}, EIGHT * 2), "b overlaps the tensor before it"),
        (file_of({"a": entry(offsets=[8, 16])}, EIGHT * 2), "a follows a gap"),
        (file_of({"a": entry()}, EIGHT[1:]), "its tensors end at byte .*, and the file at"),
        (file_of({"a": entry()}, EIGHT * 2), "its tensors end at byte"),
        (file_of({"a": entry(offsets=[1 << 50, (1 << 50) + 8])}, EIGHT), "a follows a gap"),
    ],
)  # fmt: skip
def test_a_lying_header_is_refused(folder: Path, blob: bytes, reason: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(blob)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: expected a whole safetensors file") as caught:
        load_weights(empty(), folder)
    assert caught.match(reason)


def test_a_header_beyond_reason_is_not_even_read(tmp_path: Path) -> None:
    """Gigabytes of header in a sparse file: refused by its length alone."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 4 << 30))
    os.truncate(path, 5 << 30)
    with pytest.raises(CheckpointError, match=f"claims 4,294,967,296 bytes, at most {MAX_HEADER_BYTES:,} are read"):
        read_header(path)


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="it is no regular file"):
        load_weights(empty(), folder)


DTYPES = ["F64", "F32", "BF16", "F16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
WIDTHS = dict(zip(DTYPES, (8, 4, 2, 2, 8, 4, 2, 1, 1, 1), strict=True))


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """True files and files with one thing wrong: an offset, a shape, a dtype, the length, a byte."""
    header: dict[str, dict] = {}
    at = 0
    for i in range(draw(st.integers(0, 4))):
        dtype, shape = draw(st.sampled_from(DTYPES)), draw(st.lists(st.integers(0, 3), max_size=3))
        size = WIDTHS[dtype]
        for n in shape:
            size *= n
        header[f"t{i}"] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    damage = draw(st.sampled_from(["none", "offset", "shape", "dtype", "drop", "length", "cut", "byte"]))
    if header and damage in ("offset", "shape", "dtype", "drop"):
        name = draw(st.sampled_from(sorted(header)))
        if damage == "offset":
            header[name]["data_offsets"][draw(st.integers(0, 1))] += draw(st.integers(-9, 9))
        elif damage == "shape":
            header[name]["shape"] = draw(st.lists(st.integers(-1, 1 << 65), max_size=3))
        elif damage == "dtype":
            header[name]["dtype"] = draw(st.sampled_from([*DTYPES, "X", ""]))
        else:
            del header[name]
    text = json.dumps(header).encode()
    blob = bytearray(struct.pack("<Q", len(text)) + text + bytes(at))
    if damage == "length":
        blob[:8] = struct.pack("<Q", max(0, len(text) + draw(st.integers(-3, 3))))
    elif damage == "cut":
        del blob[draw(st.integers(0, len(blob) - 1)) :]
    elif damage == "byte":
        blob[draw(st.integers(0, len(blob) - 1))] = draw(st.integers(0, 255))
    return bytes(blob)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(blob=files())
def test_no_more_is_believed_than_the_library_believes(tmp_path: Path, blob: bytes) -> None:
    """What read_header takes, safetensors takes with the same names, shapes and bytes; anything else is a CheckpointError."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob)
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(ours)
        for name, stored in ours.items():
            tensor = file.get_tensor(name)
            assert (tuple(tensor.shape), tensor.dtype) == (stored.shape, stored.dtype)
            assert (
                tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
                == blob[stored.start :][: stored.nbytes]
            )


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(blob=files())
def test_no_less_is_believed_either(tmp_path: Path, blob: bytes) -> None:
    """A file that the library reads is read here."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(blob)
    try:
        with safe_open(path, framework="pt") as file:
            theirs = set(file.keys())
    except SafetensorError:
        return
    assert set(read_header(path)) == theirs


def in_shards(model: KimiLinear, folder: Path) -> dict[str, str]:
    save_weights(model, folder, max_shard_bytes=SHARDS)
    return json.loads((folder / checkpoint.INDEX_FILE).read_text())["weight_map"]


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    weight_map = in_shards(KimiLinear(SMALL, seed=0), tmp_path / "m")
    first = weight_map[EMBEDDING]
    last = max(set(weight_map.values()))
    assert first != last
    rewrite(tmp_path / "m" / last, lambda t: t.update({EMBEDDING: torch.zeros(40, 16)}))
    with pytest.raises(CheckpointError, match=f"{EMBEDDING}: expected in one file, found in {first} and in .*{last}"):
        load_weights(empty(), tmp_path / "m")


def test_a_tensor_that_the_index_names_twice_is_refused(tmp_path: Path) -> None:
    in_shards(KimiLinear(SMALL, seed=0), tmp_path / "m")
    path = tmp_path / "m" / checkpoint.INDEX_FILE
    path.write_text(path.read_text().replace('"weight_map": {', f'"weight_map": {{"{EMBEDDING}": "a.safetensors",'))
    with pytest.raises(CheckpointError, match=f"the key '{EMBEDDING}' twice"):
        load_weights(empty(), tmp_path / "m")


@pytest.mark.parametrize("name", ["model.safetensors", checkpoint.INDEX_FILE])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    if name == "model.safetensors":
        save_weights(KimiLinear(SMALL, seed=0), tmp_path / "m")
    else:
        in_shards(KimiLinear(SMALL, seed=0), tmp_path / "m")
    os.rename(tmp_path / "m" / name, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", tmp_path / "m" / name)
    with pytest.raises(CheckpointError, match=rf"{name}: expected a file of .*m, got a link to .*elsewhere"):
        load_weights(empty(), tmp_path / "m")
    (tmp_path / "m" / name).unlink()
    os.symlink("gone", tmp_path / "m" / name)
    with pytest.raises((CheckpointError, FileNotFoundError)):
        load_weights(empty(), tmp_path / "m")


def test_links_inside_the_folder_and_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    model = KimiLinear(SMALL, seed=0)
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    save_weights(model, tmp_path / "m")
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    os.rename(tmp_path / "m" / "model.safetensors", blobs / "cafe")
    os.symlink("../../blobs/cafe", snapshot / "model.safetensors")
    loaded = empty()
    load_weights(loaded, snapshot)
    assert torch.equal(loaded.lm_head.weight if loaded.lm_head else loaded.model.embed_tokens.weight,
                       model.lm_head.weight if model.lm_head else model.model.embed_tokens.weight)  # fmt: skip
    (snapshot / "model.safetensors").unlink()
    os.symlink("../../secrets", snapshot / "model.safetensors")
    (tmp_path / "models--a--b" / "secrets").write_bytes((blobs / "cafe").read_bytes())
    with pytest.raises(CheckpointError, match=r"got a link to .*secrets"):
        load_weights(empty(), snapshot)


class Bomb:
    """A pickle of it makes a file when it is opened."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "weights.ckpt", "model.pkl"])
def test_pickles_are_never_opened(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(Bomb(tmp_path / "ran"), folder / name)
    with pytest.raises(FileNotFoundError, match=f"found {name}; a pickle can run code when it is opened"):
        load_weights(empty(), folder)
    assert not (tmp_path / "ran").exists()
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "ran").exists(), "the bomb is real"


def test_a_pickle_under_the_name_of_safetensors_is_not_opened(folder: Path, tmp_path: Path) -> None:
    torch.save(Bomb(tmp_path / "ran"), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="of another kind"):
        load_weights(empty(), folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.bool, torch.int64])
def test_other_kinds_of_numbers_are_refused(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder / "model.safetensors", lambda t: t.update({EMBEDDING: t[EMBEDDING].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{EMBEDDING}: expected float64, .* got {dtype}"):
        load_weights(empty(), folder)


def test_numbers_are_rounded_only_where_asked(folder: Path) -> None:
    model = empty().to(torch.bfloat16)
    with pytest.raises(
        CheckpointError, match=r"expected numbers that torch.bfloat16 holds.* got torch.float32 .*load with dtype"
    ):
        load_weights(model, folder)
    assert model.device.type == "meta"
    load_weights(model, folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    exact = empty()
    load_weights(exact, folder)
    assert torch.equal(model.model.embed_tokens.weight, exact.model.embed_tokens.weight.bfloat16())


def test_a_model_is_untouched_until_every_header_is_right(folder: Path) -> None:
    model = KimiLinear(SMALL, seed=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    last = list(load_file(folder / "model.safetensors"))[-1]
    rewrite(folder / "model.safetensors", lambda t: t.pop(last))
    with pytest.raises(CheckpointError, match=f"{last}: missing from"):
        load_weights(model, folder, dtype=torch.float64)
    assert all(torch.equal(p, before[name]) and p.dtype == before[name].dtype for name, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype, bad: float) -> None:
    limits = torch.finfo(dtype)
    flat = torch.tensor([0.0, -0.0, limits.max, limits.min, limits.tiny, -1.0], dtype=dtype).repeat(11)
    assert streaming._finite(flat)
    for i in range(len(flat)):
        spoiled = flat.clone()
        spoiled[i] = bad
        assert not streaming._finite(spoiled)
    negative_nan = flat.clone()
    negative_nan[7] = torch.copysign(torch.tensor(torch.nan), torch.tensor(-1.0)).to(dtype)
    assert not streaming._finite(negative_nan)
    assert streaming._finite(-flat.abs())


def test_tensors_longer_than_a_piece_arrive_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 24 bytes, into the same dtype and through the buffer into another; the last piece is a short one."""
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 24)
    tensors = load_file(folder / "model.safetensors")
    for dtype in (torch.float32, torch.float64):
        model = empty()
        load_weights(model, folder, dtype=dtype)
        loaded = checkpoint.release_tensors(model)
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[name], tensors[name].to(loaded[name].dtype)) for name in tensors)


def test_a_file_cut_while_it_is_read_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "model.safetensors"
    found = stored_tensors(folder)
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="got its end; the file changed while it was read"):
        checkpoint.fill(empty(), found)
