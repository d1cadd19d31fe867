"""``check`` and ``convert`` from the command line: exit codes, JSON for machines, and text that says what to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kimi_linear as kl
from kimi_linear.cli.main import main
from kimi_linear.model.checkpoint import save_weights

CONFIG = kl.ModelConfig.preset("tiny-moe", vocab_size=40, hidden_size=32, tie_embeddings=False, moe={"expert_size": 8})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    kl.save(kl.KimiLinear(CONFIG, seed=0), tmp_path / "m")
    return tmp_path / "m"


def without(folder: Path, *keys: str) -> None:
    values = json.loads((folder / "config.json").read_text())
    for key in ("kimi_linear_config", *keys):
        del values[key]
    (folder / "config.json").write_text(json.dumps(values))


def test_a_sound_folder(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "release layout" in out
    assert out.rstrip().endswith("No errors.")
    assert "rate" in err
    assert main(["check", str(folder), "--headers-only"]) == 0
    assert "numbers not read" in capsys.readouterr().out


def test_defects_are_text_with_a_repair_and_an_exit_code(folder: Path, capsys: pytest.CaptureFixture) -> None:
    without(folder, "mla_use_nope")
    assert main(["check", str(folder), "--headers-only"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "error: no-mla-use-nope where mla_use_nope found expected the key, found none breaks vLLM reads",
        f"Errors: 1. This mends them: kimi-linear convert --repair {folder} NEW_FOLDER",
    ):
        assert part in out


def test_json_for_machines(folder: Path, capsys: pytest.CaptureFixture) -> None:
    model = kl.KimiLinear(CONFIG, seed=0)
    with torch.no_grad():
        model.model.norm.weight[2] = torch.inf
    save_weights(model, folder.parent / "weights")
    (folder.parent / "weights" / "model.safetensors").rename(folder / "model.safetensors")
    assert main(["check", str(folder), "--json", "--headers-only"]) == 0
    quick = json.loads(capsys.readouterr().out)
    assert (quick["sound"], quick["numbers_read"], quick["defects"]) == (True, False, [])
    assert main(["check", str(folder), "--json"]) == 1
    full = json.loads(capsys.readouterr().out)
    assert (full["sound"], full["numbers_read"], full["layout"]) == (False, True, "release")
    (defect,) = full["defects"]
    assert (defect["kind"], defect["level"], defect["places"]) == ("not-finite", "error", ["model.norm.weight"])
    assert defect["mendable"] is False
    assert full["bytes"] == sum(p.nbytes for p in model.parameters())


def test_a_folder_without_its_config_is_examined_all_the_same(folder: Path, capsys: pytest.CaptureFixture) -> None:
    (folder / "config.json").unlink()
    assert main(["check", str(folder), "--headers-only"]) == 1
    assert "config-missing" in capsys.readouterr().out
    assert main(["check", str(folder.parent / "gone")]) == 1
    assert "gone: expected a model folder" in capsys.readouterr().err


def test_convert_there_and_back(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    assert main(["convert", str(folder), str(there), "--to", "transformers"]) == 0
    out = capsys.readouterr().out
    assert "release layout, to" in out
    assert "transformers layout" in out
    assert f"wrote {there}" in out
    assert main(["convert", str(there), str(back), "--shard-gib", "0.0001"]) == 0
    assert len(list(back.glob("*.safetensors"))) > 1
    a, b = kl.load(folder)[0].state_dict(), kl.load(back)[0].state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_convert_refuses_and_repairs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    without(folder, "mla_use_nope", "linear_attn_config")
    assert main(["convert", str(folder), str(tmp_path / "r")]) == 1
    err = capsys.readouterr().err
    assert "found 2 defects; --repair mends them" in err
    assert main(["convert", "--repair", str(folder), str(tmp_path / "r")]) == 0
    assert "mending no-mla-use-nope: mla_use_nope: expected the key" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "r"), "--headers-only"]) == 0
    assert main(["convert", str(tmp_path / "r"), str(tmp_path / "f"), "--to", "fla"]) == 1
    assert "mixers: for fla's layout expected KDA in every layer" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()
