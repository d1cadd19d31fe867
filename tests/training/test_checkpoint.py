"""Checkpoints: whole models that load by themselves, and that survive full disks and damage."""

import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

import kimi_linear as kl
from kimi_linear.data import ByteTokenizer
from kimi_linear.model.checkpoint import CheckpointError
from kimi_linear.training import Trainer, latest, load_checkpoint, save_checkpoint, step_folders

from .tiny_run import config, tiny_corpus, tiny_model


def trained(folder, **changes):
    trainer = Trainer(tiny_model(), ByteTokenizer(), tiny_corpus(), None, config(**changes), folder)
    for _ in trainer.run():
        pass
    return trainer


def names(folder):
    return [path.name for path in step_folders(folder)]


def test_a_checkpoint_is_a_model_that_loads(tmp_path):
    trainer = trained(tmp_path, steps=2)
    model, tokenizer = kl.load(latest(tmp_path))
    tokens = torch.tensor([tokenizer.encode("abcabc")])
    with torch.no_grad():
        assert torch.equal(model(tokens), trainer.model.eval()(tokens))


def test_the_newest_are_kept(tmp_path):
    trained(tmp_path, steps=7, save_every=2, keep=2)
    assert names(tmp_path) == ["step-00000006", "step-00000007"]
    trained(tmp_path / "all", steps=5, save_every=2, keep=0)
    assert names(tmp_path / "all") == ["step-00000002", "step-00000004", "step-00000005"]
    assert latest(tmp_path / "nowhere") is None


class FileSizeLimit:
    """No file may grow past ``bytes``: what a full disk does, without filling one."""

    def __init__(self, bytes):
        self.bytes = bytes

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("full", ["while writing weights", "while writing the optimizer"])
def test_a_failed_write_leaves_the_last_good_checkpoint(tmp_path, full):
    trainer = trained(tmp_path, steps=3)
    weights = (latest(tmp_path) / "model.safetensors").stat().st_size
    state = (latest(tmp_path) / "training.pt").stat().st_size
    assert weights * 3 // 2 < state
    before = {path.name: path.read_bytes() for path in latest(tmp_path).iterdir()}
    trainer.step = 4
    with (
        FileSizeLimit(weights // 2 if full == "while writing weights" else weights * 3 // 2),
        pytest.raises(
            OSError, match=r"could not save .*step-00000004: .*; the last good checkpoint is .*step-00000003"
        ),
    ):
        trainer.save()
    assert names(tmp_path) == ["step-00000003"]
    assert {path.name: path.read_bytes() for path in latest(tmp_path).iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    trainer.save()
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_full_disk_ends_the_run_once_and_resumes(tmp_path):
    trained(tmp_path, steps=3)
    trainer = Trainer(tiny_model(), ByteTokenizer(), tiny_corpus(), None, config(steps=6, save_every=2), tmp_path)
    with FileSizeLimit(50_000), pytest.raises(OSError, match="free space there, then resume"):
        for _ in trainer.run():
            pass
    assert (trainer.step, names(tmp_path)) == (4, ["step-00000003"])
    assert trained(tmp_path, steps=6).step == 6


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("file", ["model.safetensors", "training.pt", "config.json"])
@pytest.mark.parametrize("damage", [truncate, Path.unlink])
def test_a_damaged_newest_is_refused_with_the_way_out(tmp_path, file, damage):
    trained(tmp_path, steps=4, save_every=2)
    damage(latest(tmp_path) / file)
    message = (
        r"step-00000004: expected a whole checkpoint of this model, got: .*; delete it to resume from .*step-00000002"
    )
    with pytest.raises(CheckpointError, match=message):
        trained(tmp_path, steps=6)
    shutil.rmtree(latest(tmp_path))
    assert trained(tmp_path, steps=6).step == 6


def test_another_model_is_refused(tmp_path):
    trained(tmp_path, steps=1)
    with pytest.raises(CheckpointError, match=re.escape("config.json is of another model")):
        load_checkpoint(latest(tmp_path), tiny_model(intermediate_size=64))


def test_foreign_pickles_are_not_run(tmp_path):
    saved = save_checkpoint(tmp_path, 1, tiny_model(), None, {}, keep=1)
    torch.save({"step": Path("x")}, saved / "training.pt")
    with pytest.raises(CheckpointError, match="delete it to start again"):
        load_checkpoint(saved, tiny_model())


def test_leftovers_of_a_killed_save_are_removed(tmp_path):
    leftover = tmp_path / ".step-00000002.new-abc"
    leftover.mkdir()
    (leftover / "config.json").write_text("{}")
    trained(tmp_path, steps=1)
    assert not leftover.exists()
