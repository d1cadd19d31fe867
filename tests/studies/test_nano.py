"""The nano study, small and for real: clean text, no leak into the held-out part, resumable training, a folder that loads."""

from __future__ import annotations

import io
import json
import lzma
import re
import struct
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import kimi_linear as kl
from kimi_linear.data import load_tokenizer
from kimi_linear.model import KimiLinear
from kimi_linear.studies import nano, nano_data, nano_model, nano_package, nano_text
from kimi_linear.studies.nano import NanoConfig
from kimi_linear.studies.nano_text import Source
from tests.studies.nano_texts import CODE, PROSE


def source(name: str, kind: str, documents: dict[str, str], held_out: tuple[str, ...] = ()) -> Source:
    return Source(
        name=name, kind=kind, licence="public domain", evidence="made for the test", get="", archive="", held_out=held_out,
        read=lambda path: iter(documents.items()),
    )  # fmt: skip


SOURCES = (
    source("books", "prose", PROSE, held_out=("novel-7",)),
    source("library", "code", CODE, held_out=("module_7",)),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    said = list(nano_data.prepare([(s, Path()) for s in SOURCES], folder, vocab_size=640))
    assert said[-1] == f"wrote {folder}"
    return folder


def config_for(data: Path, **changes) -> NanoConfig:
    settings = {
        "data": data, "models": "nano", "tiny": True, "batch_size": 4, "sequence_length": 64, "tokens": 4 * 64 * 6,
        "measurements": 3, "held_out_rows": 16, "lr": "3e-3", "device": "cpu",
    }  # fmt: skip
    return NanoConfig(**{**settings, **changes})


# Text


def test_prose_is_one_line_a_paragraph_and_verse_keeps_its_lines():
    page = "It was a dark night in the old town, and nobody who had ever lived\nin it slept--but   one.\r\n\r\nI.\n\n“Who’s there?”\n"
    assert nano_data.clean_prose(page) == (
        'It was a dark night in the old town, and nobody who had ever lived in it slept—but one.\n\nI.\n\n"Who\'s there?"\n'
    )
    verse = "Tell me where is fancy bred,\nOr in the heart or in the head?\nHow begot, how nourished?\nReply."
    assert nano_data.clean_prose(verse) == verse + "\n"


def test_code_loses_the_licence_on_top_and_nothing_else():
    code = "#!/usr/bin/python\n# Copyright nobody.\n# Licensed to all.\n\nimport os\n\n\n\n\n\nif os:\n\tx = 1  \n"
    assert nano_data.clean_code(code) == "import os\n\n\nif os:\n    x = 1\n"
    assert nano_data.clean_code("# Sort by key.\nx = 1\n") == "# Sort by key.\nx = 1\n"


def test_what_is_no_text_is_left_out():
    assert nano_data.why_not("code", "x = 1\n") == "too short"
    assert nano_data.why_not("code", "word = " + "'long'" * 100) == "long lines"
    assert nano_data.why_not("code", "1234, 5678\n" * 50) == "numbers"
    assert nano_data.why_not("prose", "Слово за слово. " * 50) == "not English"
    assert nano_data.why_not("prose", "One word and another. " * 50) is None


def test_a_document_that_tells_of_a_held_out_one_is_not_trained_on():
    secret, other = (text * 3 for text in (PROSE["novel-1"], PROSE["novel-2"]))
    documents = {"secret": secret, "leak": other[:2000] + secret, "other": other, "copy": other + "The end."}
    made = source("s", "prose", documents, held_out=("secret",))
    tallies: dict[str, nano_data.Tally] = {}
    kept = nano_data.without_copies(nano_data.read_texts([(made, Path())], tallies), tallies)
    assert [text.name for text in kept] == ["secret", "other"]
    assert dict(tallies["s"].dropped) == {"in the held-out part": 1, "said before": 1}
    assert (tallies["s"].read, tallies["s"].documents) == (4, 2)


def test_the_token_files_are_the_text(data):
    about, tokenizer = nano_data.read_about(data), load_tokenizer(data)
    assert tokenizer.vocab_size == about["vocab_size"] == 640
    for split in nano_data.SPLITS:
        tokens = nano_data.read_corpus(data, split).tokens
        said = about["splits"][split]
        assert tokens.dtype == torch.uint16
        assert tokens.numel() == said["tokens"]
        documents = tokenizer.decode(tokens.tolist()).split("[EOS]")[:-1]
        assert len(documents) == said["documents"]
        assert sum(len(text.encode()) for text in documents) == said["bytes"]
    held_out = tokenizer.decode(nano_data.read_corpus(data, "prose").tokens.tolist())
    assert held_out == nano_data.clean_prose(PROSE["novel-7"]) + "[EOS]"
    trained = tokenizer.decode(nano_data.read_corpus(data, "train").tokens.tolist())
    assert nano_data.clean_prose(PROSE["novel-1"]) in trained
    assert nano_data.clean_prose(PROSE["novel-7"]) not in trained
    assert CODE["module_7.py"].strip() not in trained
    # The packed file is what travels, and it unpacks to the same numbers.
    packed = np.frombuffer(lzma.decompress((data / "train.tokens.xz").read_bytes()), dtype="<u2")
    assert packed.size == about["splits"]["train"]["tokens"]


def test_prose_is_read_as_often_as_asked(data):
    said = nano_data.read_about(data)["splits"]["train"]
    once, thrice = (nano_data.read_corpus(data, "train", prose_times=n).tokens for n in (1, 3))
    prose = once[: said["prose_tokens"]]
    assert torch.equal(thrice, torch.cat([prose, prose, once]))
    tokenizer = load_tokenizer(data)
    text = tokenizer.decode(prose.tolist())
    assert text.count("[EOS]") == sum(n != "novel-7" for n in PROSE)
    assert len(text.replace("[EOS]", "").encode()) == said["prose_bytes"]
    assert not any(nano_data.clean_code(c) in text for c in CODE.values())


def test_the_vocabulary_is_worth_its_rows(data):
    """Merged pairs: far fewer tokens than bytes, ranks that the release's reader takes."""
    splits = nano_data.read_about(data)["splits"]
    assert splits["prose"]["bytes"] / splits["prose"]["tokens"] > 1.8


# Sources


def deb(files: dict[str, bytes]) -> bytes:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w:xz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    blob = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", tar.getvalue())):
        blob += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
            + content
            + b"\n" * (len(content) % 2)
        )
    return blob


def test_the_files_of_a_debian_package(tmp_path):
    path = tmp_path / "a.deb"
    path.write_bytes(deb({"./usr/a.txt": b"first", "./usr/b.txt": b"second"}))
    assert dict(nano_text.deb_files(path)) == {"./usr/a.txt": b"first", "./usr/b.txt": b"second"}
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(ValueError, match="expected a Debian package"):
        list(nano_text.deb_files(path))


@pytest.mark.parametrize("version", [2, 3])
def test_the_strings_of_an_r_object(version):
    strings = ["Emma", "", "handsome, clever, and rich—"]
    blob = b"X\n" + struct.pack(">iii", version, 0, 0) + (struct.pack(">i", 5) + b"UTF-8" if version == 3 else b"")
    blob += struct.pack(">ii", 16, len(strings))
    for text in strings:
        blob += struct.pack(">ii", 9, len(text.encode())) + text.encode()
    assert nano_text.r_strings(blob) == strings
    database = b"".join(struct.pack(">i", len(b)) + zlib.compress(b) for b in (blob, b"X\nother object"))
    assert [nano_text.r_strings(b) if len(b) > 30 else None for b in nano_text.lazy_load(database)] == [strings, None]


def test_a_missing_archive_is_named_with_its_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"r-cran-janeaustenr_\*\.deb .* apt-get download r-cran-janeaustenr"):
        nano_text.find_archive(nano_text.PROSE[0], tmp_path)


def test_every_source_is_free_and_something_of_each_kind_is_held_out():
    code = nano_text.code_sources()
    for name, found in [(s.name, s.licence) for s in code[1:]]:
        assert nano_text.FREE.fullmatch(found), (name, found)
    assert sum(bool(s.held_out) for s in code) == 4
    assert all(s.held_out and s.get and s.archive for s in nano_text.PROSE)
    for bad in ("GPL-3.0", "MIT AND GPL-2.0", "LGPL", "none stated", "MPL-2.0"):
        assert not nano_text.FREE.fullmatch(bad)


def test_a_licence_that_is_not_free_is_refused(monkeypatch):
    monkeypatch.setattr(nano_text, "licence_of", lambda distribution: "GPL-3.0-only")
    with pytest.raises(
        ValueError, match=r"sympy .*: expected a permissive licence in its metadata, got 'GPL-3.0-only'"
    ):
        nano_text.code_sources()


# Models


def test_the_twins_are_of_one_size_and_the_nano_fits():
    counts = {}
    for which in ("nano", "twin"):
        with torch.device("meta"):
            model = KimiLinear(nano_model.model_of(which, nano_data.VOCAB, 4865))
        counts[which] = sum(p.numel() for p in model.parameters())
    assert abs(counts["twin"] / counts["nano"] - 1) < 0.01
    assert 2 * counts["nano"] < nano_package.MAX_BYTES
    hybrid, twin = (nano_model.model_of(w, nano_data.VOCAB, None) for w in ("nano", "twin"))
    assert hybrid.layer_mixers == ("kda", "kda", "kda", "mla") * 2
    assert hybrid.mla.position == "nope"
    assert set(twin.layer_mixers) == {"mla"}
    assert twin.mla.position == "rope"
    assert hybrid.linear.head_dim == hybrid.linear.value_dim == 64  # what the Triton kernels take


def test_flops_count_each_weight_and_half_the_pairs():
    config = nano_model.tiny_model_of("twin", 640, None)
    with torch.device("meta"):
        matrices = sum(p.numel() for p in KimiLinear(config).parameters() if p.ndim >= 2)
    per_pair = 4 * 2 * 2 * (config.mla.qk_head_dim + config.mla.v_head_dim)  # layers, heads, multiply and add
    assert nano_model.training_flops(config, 64) == 6 * matrices + 3 * per_pair * 32


# Training


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The nano and its twin, stand-ins of six steps."""
    folder = tmp_path_factory.mktemp("nano")
    list(nano.run(config_for(data, models="nano,twin"), folder))
    return folder


def cell(folder: Path, which: str = "nano") -> dict:
    (path,) = folder.glob(f"{which}-*.json")
    return json.loads(path.read_text())


def test_a_cell_says_what_was_measured(trained, data):
    values = cell(trained)
    assert [point["step"] for point in values["points"]] == [2, 4, 6]
    assert values["points"][-1]["tokens"] == 6 * 256
    assert values["pieces"][0]["steps"] == 6
    model, _ = kl.load(next(trained.glob("nano-*/config.json")).parent)
    assert model.dtype == torch.bfloat16
    again = nano.measure(config_for(data), model, rows=None)
    assert again == values["held_out"]
    # Six steps of training are better than none.
    fresh = KimiLinear(nano.config_of(config_for(data), "nano"), seed=0)
    assert nano.measure(config_for(data), fresh, rows=None)["prose"] > values["held_out_fp32"]["prose"]


def test_bits_per_byte_are_those_of_every_held_out_byte(data):
    """Equal chances for all tokens: log2(vocabulary) bits each, shared out over the bytes of the text."""
    model = KimiLinear(nano.config_of(config_for(data), "nano"), seed=0)
    torch.nn.init.zeros_(model.model.norm.weight)
    splits = nano_data.read_about(data)["splits"]
    for kind, found in nano.measure(config_for(data), model, rows=None).items():
        assert found == pytest.approx(np.log2(640) * splits[kind]["tokens"] / splits[kind]["bytes"], rel=1e-5)


def test_a_run_out_of_time_goes_on_to_the_same_weights(trained, data, tmp_path, monkeypatch):
    settings = config_for(data, seconds_budget=100.0)
    clock = iter([0.0, 1.0, 2.0, 3.0, *[200.0] * 9])
    monkeypatch.setattr(nano.time, "monotonic", lambda: next(clock))
    said = [at.text for at in nano.run(settings, tmp_path)]
    monkeypatch.undo()
    assert said[-1].endswith("out of time; the same command goes on")
    assert not list(tmp_path.glob("nano-*.json"))
    list(nano.run(replace(settings, seconds_budget=0.0), tmp_path))
    values, whole = cell(tmp_path), cell(trained)
    assert [piece["steps"] for piece in values["pieces"]] == [3, 3]
    assert values["held_out"] == whole["held_out"]
    assert values["points"] == whole["points"]
    finished = [at.text for at in nano.run(settings, tmp_path)]
    assert finished == ["nano-adamw-0.003-2e03: finished before"]


def test_a_cell_of_other_settings_is_refused(trained, data):
    with pytest.raises(ValueError, match="batch_size: expected 8, as asked for now, got a cell made with 4"):
        list(nano.run(config_for(data, batch_size=8), trained))


# Packaging


@pytest.fixture(scope="module")
def packaged(trained, data, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("package") / "nano"
    list(nano.run(config_for(data, part="package", package=target), trained))
    return target


def test_what_ships_loads_like_any_release(packaged, trained):
    model, tokenizer = kl.load(packaged)
    assert model.dtype == torch.bfloat16
    assert tokenizer.vocab_size == model.config.vocab_size == 640
    assert model.config.eos_token_id == tokenizer.eos_id
    exact, _ = kl.load(next(trained.glob("nano-*/config.json")).parent)
    weights = exact.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name].to(value.dtype))
    assert "".join(kl.stream(model.float(), tokenizer, "Once upon", max_tokens=5, seed=0))


def test_the_card_has_the_numbers_of_the_results(packaged):
    results, text = json.loads((packaged / "results.json").read_text()), (packaged / "MODEL_CARD.md").read_text()
    for which in ("nano", "twin"):
        held_out = results[which]["held_out"]
        row = rf"\| {which} \| {results[which]['parameters']:,} \| {held_out['prose']:.4f} \| {held_out['code']:.4f} \|"
        assert re.search(row, text)
    changed = json.loads(json.dumps(results))
    changed["twin"]["held_out"]["prose"] = results["nano"]["held_out"]["prose"] - 0.25
    assert "0.2500 bits per byte more on prose" in nano_package.card(changed)
    changed["twin"]["held_out"]["prose"] = results["nano"]["held_out"]["prose"] + 0.25
    assert "0.2500 bits per byte fewer on prose" in nano_package.card(changed)
    assert "| books | public domain | made for the test |" in text


def test_weights_that_are_too_large_do_not_ship(trained, data, tmp_path, monkeypatch):
    monkeypatch.setattr(nano_package, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="weights: expected at most 1,000 bytes"):
        list(nano.run(config_for(data, part="package", package=tmp_path / "nano"), trained))
    assert not list(tmp_path.iterdir())


def test_twins_of_other_settings_do_not_ship(trained, data, tmp_path):
    for path in trained.glob("*-adamw-*.json"):
        values = json.loads(path.read_text())
        values["settings"]["lr"] *= 2 if path.name.startswith("twin") else 1
        (tmp_path / path.name).write_text(json.dumps(values))
    with pytest.raises(ValueError, match="twin: expected the settings of the nano"):
        list(nano.run(config_for(data, part="package", package=tmp_path / "nano"), tmp_path))


def test_nothing_ships_without_a_finished_twin(data, tmp_path, trained):
    for path in trained.glob("nano-*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match="finished cell of the twin"):
        list(nano.run(config_for(data, part="package", package=tmp_path / "nano"), tmp_path))


def test_generate_and_demo_take_what_ships(packaged, tmp_path, monkeypatch, capsys):
    from kimi_linear.cli.main import main
    from kimi_linear.studies.demo import DemoConfig, DemoRun
    from kimi_linear.studies.demo_phases import open_with_shipped_model
    from tests.studies.test_demo import Quiet

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kimi_linear.folder.SHIPPED_FOLDER", packaged)
    assert main(["generate", "Once upon a time", "--max-tokens", "4", "--seed", "0", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time")
    assert main(["generate", "--max-tokens", "4", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time")
    screen = Quiet()
    open_with_shipped_model(DemoRun(DemoConfig(opening_tokens=3), screen, "cpu"))
    assert screen.written[0] == "Once upon a time"
    assert len(screen.written) > 2
