"""The model that a verb means: the one named, the newest below it, or the newest of all."""

import os
from pathlib import Path

import pytest

from kimi_linear.cli.folders import model_folder


def make(folder: Path, age: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").touch()
    (folder / "config.json").touch()
    os.utime(folder / "config.json", (1e9 - age, 1e9 - age))
    return folder


def test_the_newest_is_taken(tmp_path):
    make(tmp_path / "train" / "step-1", 30)
    new = make(tmp_path / "train" / "step-2", 10)
    other = make(tmp_path / "demo" / "hybrid", 5)
    assert model_folder(None, tmp_path) == other
    assert model_folder(tmp_path / "train") == new
    assert model_folder(tmp_path / "train" / "step-1") == tmp_path / "train" / "step-1"


def test_of_equal_age_the_later_step_is_taken(tmp_path):
    make(tmp_path / "step-00001", 0)
    later = make(tmp_path / "step-00002", 0)
    assert model_folder(None, tmp_path) == later


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """Where the package's own model would be; nothing is there yet."""
    monkeypatch.setattr("kimi_linear.folder.SHIPPED_FOLDER", tmp_path / "package" / "nano")
    return tmp_path / "package" / "nano"


def test_the_packages_own_model_is_taken_where_there_is_no_other(tmp_path, shipped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="nano: expected the model that comes with the package"):
        model_folder(Path("nano"))
    make(shipped, 0)
    assert model_folder(None, tmp_path / "runs") == shipped
    mine = make(tmp_path / "runs" / "mine", 30)
    assert model_folder(None, tmp_path / "runs") == mine
    assert model_folder(Path("nano"), tmp_path / "runs") == shipped
    here = make(tmp_path / "nano", 30)
    assert model_folder(Path("nano")).resolve() == here


def test_what_reads_text_passes_over_models_of_ids_alone(tmp_path, shipped):
    make(shipped, 0)
    ids = make(tmp_path / "runs" / "mqar" / "kda-seed0", 5)
    assert model_folder(None, tmp_path / "runs", reads_text=True) == shipped
    assert model_folder(None, tmp_path / "runs") == ids
    assert model_folder(ids, reads_text=True) == ids  # named, so not replaced
    text = make(tmp_path / "runs" / "train", 30)
    (text / "tokenizer.json").touch()
    assert model_folder(None, tmp_path / "runs", reads_text=True) == text


def test_a_folder_that_is_named_and_empty_is_not_replaced_by_the_packages_own(tmp_path, shipped):
    make(shipped, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: expected a model"):
        model_folder(tmp_path / "empty")


@pytest.mark.usefixtures("shipped")
def test_a_folder_without_weights_is_no_model(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "config.json").touch()
    with pytest.raises(FileNotFoundError, match="make one with: kimi-linear train"):
        model_folder(None, tmp_path)


def test_no_such_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: expected a model folder"):
        model_folder(tmp_path / "nowhere", tmp_path)


def test_an_unfinished_save_is_no_model(tmp_path):
    whole = make(tmp_path / "train" / "step-1", 30)
    make(tmp_path / "train" / ".step-2.new-abc", 0)
    assert model_folder(None, tmp_path) == whole


def test_a_name_of_the_hub_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("kimi_linear.model.hub.local_folder", lambda name, files: asked.append(name) or tmp_path)
    assert model_folder(Path("someone/model")) == tmp_path
    (tmp_path / "runs").mkdir()
    with pytest.raises(FileNotFoundError, match="runs/none: expected a model folder"):
        model_folder(Path("runs/none"))
    assert asked == ["someone/model"]
