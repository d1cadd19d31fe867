"""Each verb at work on a small model, from its flags to what it prints."""

import json
import re
from pathlib import Path

import pytest
import torch

from kimi_linear.cli.main import main
from kimi_linear.config import ModelConfig
from kimi_linear.data import MQAR, ByteTokenizer
from kimi_linear.engine import stream
from kimi_linear.evals import save_task
from kimi_linear.folder import load, save
from kimi_linear.model import KimiLinear


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def model(tmp_path) -> Path:
    config = ModelConfig.preset("tiny", num_layers=2, pattern="1:1", initializer_range=0.2)
    save(KimiLinear(config, seed=0), tmp_path / "runs" / "m", ByteTokenizer())
    return tmp_path / "runs" / "m"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i} times {i} is {i * i}\n" for i in range(400)))
    return path


def number(text: str, name: str) -> float:
    found = re.search(rf"{re.escape(name)}\s+([\d.,]+)", text)
    assert found, text
    return float(found[1].replace(",", ""))


def test_generate_prints_the_prompt_and_what_the_model_says(model, capsys):
    assert main(["generate", "--temperature", "0", "--max-tokens", "20", "ab"]) == 0
    out, err = capsys.readouterr()
    loaded, tokenizer = load(model)
    assert tokenizer is not None
    assert out == "ab" + "".join(stream(loaded, tokenizer, "ab", temperature=0, max_tokens=20)) + "\n"
    assert "runs/m" in err
    assert "generated 20 tokens" in err
    assert "peak memory" in err


def test_generate_repeats_itself_with_a_seed(model, capsys):
    def run(*flags: str) -> str:
        assert main(["generate", "--max-tokens", "20", *flags, "x"]) == 0
        return capsys.readouterr().out

    assert run("--seed", "1") == run("--seed", "1")
    assert run("--seed", "1") != run("--seed", "2")


def test_generate_takes_stop_strings_one_by_one(model, capsys):
    greedy = ["generate", "--temperature", "0", "--max-tokens", "20", "--model", str(model)]
    assert main([*greedy, "ab"]) == 0
    whole = capsys.readouterr().out[2:-1]
    assert main([*greedy, "--stop", "\x00never", "--stop", whole[3:5], "ab"]) == 0
    assert capsys.readouterr().out[2:-1] == whole[: whole.index(whole[3:5])]


def test_generate_says_how_to_make_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("kimi_linear.folder.SHIPPED_FOLDER", tmp_path / "none")
    assert main(["generate"]) == 1
    assert "make one with: kimi-linear train" in capsys.readouterr().err


def test_generate_refuses_a_setting_out_of_range(model, capsys):
    assert main(["generate", "--top-p", "1.5"]) != 0
    assert "top_p: expected a number in (0, 1]" in "".join(capsys.readouterr())


def test_eval_measures_text(model, text, capsys):
    flags = ["--data", str(text), "--length", "64", "--tokens", "256", "--json", "out/result.json"]
    assert main(["eval", str(model), *flags]) == 0
    out = capsys.readouterr().out
    result = json.loads(Path("out/result.json").read_text())
    assert number(out, "loss") == pytest.approx(result["metrics"]["loss"], rel=1e-3)
    assert result["metrics"]["bits_per_byte"] == pytest.approx(result["metrics"]["loss"] / 0.6931, rel=0.02)
    assert [row["position"] for row in result["rows"]] == ["1", "2", "3-4", "5-8", "9-16", "17-32", "33-64"]
    assert sum(row["tokens"] for row in result["rows"]) == result["metrics"]["tokens"]


def test_eval_measures_the_task_that_a_model_was_made_for(tmp_path, capsys):
    task = MQAR(num_pairs=2, num_queries=2, vocab=8)
    config = ModelConfig.preset("tiny", num_layers=1, pattern="1:0", vocab_size=task.vocab_size)
    model = KimiLinear(config, seed=0)
    with torch.no_grad():  # says 4, a value, always
        model.model.norm.weight.zero_()
    save(model, tmp_path / "runs" / "m")
    save_task(task, tmp_path / "runs" / "m")
    assert main(["eval", "--samples", "600"]) == 0
    out = capsys.readouterr().out
    assert "mqar" in out
    # All logits are equal, so the answer is token 0: a key, never a value.
    assert number(out, "token_accuracy") == 0
    assert number(out, "sequences") == 600


def test_eval_wants_a_tokenizer_or_a_task(tmp_path, capsys):
    save(KimiLinear(ModelConfig.preset("tiny", num_layers=1)), tmp_path / "runs" / "m")
    assert main(["eval"]) == 1
    assert "expected a tokenizer or a task.json" in capsys.readouterr().err


def test_info_names_versions_and_choices(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert re.search(r"chunk_kda\s+torch", out)


def test_info_shows_what_the_released_model_costs(capsys):
    assert main(["info", "--preset", "kimi-linear-48b-a3b"]) == 0
    out = capsys.readouterr().out
    assert "49,122,681,728" in out
    assert re.search(r"weights\s+91.5 GiB\s+\d+.\d GiB", out)
    assert re.search(r"cache per token\s+7.9 KiB\s+30.4 KiB", out)


def test_info_shows_what_a_folder_costs_from_its_config_alone(model, capsys):
    (model / "model.safetensors").write_bytes(b"not read")
    assert main(["info", "--model", str(model)]) == 0
    out = capsys.readouterr().out
    config = ModelConfig.preset("tiny", num_layers=2, pattern="1:1", initializer_range=0.2)
    assert f"{sum(p.numel() for p in KimiLinear(config).parameters()):,}" in out
    assert main(["info", "--model", str(model), "--preset", "tiny"]) == 1
    assert "preset: expected no preset beside --model, got 'tiny'" in capsys.readouterr().err
    assert main(["info", "--model", "runs/nothing"]) == 1
    assert "runs/nothing: expected a model folder, got nothing there; or name a preset" in capsys.readouterr().err


def test_info_refuses_a_preset_that_does_not_exist(capsys):
    assert main(["info", "--preset", "huge"]) == 1
    assert "got 'huge'" in capsys.readouterr().err


TINY_RUN = ["--batch-size", "2", "--sequence-length", "32", "--eval-every", "2", "--eval-batches", "99"]


def test_train_resumes_and_is_used_by_generate_and_eval(text, capsys):
    train = ["train", "--data", str(text), *TINY_RUN]
    assert main([*train, "--steps", "2"]) == 0
    assert "resuming" not in capsys.readouterr().err
    assert main([*train, "--steps", "4"]) == 0
    out, err = capsys.readouterr()
    assert "resuming runs/train at step 2" in err
    lines = [json.loads(line) for line in Path("runs/train/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert re.search(rf"held out\s+4\s+{lines[-1]['val_loss']:.4g}", out)
    assert main([*train, "--steps", "4"]) == 0
    assert "all 4 steps are done" in capsys.readouterr().err

    assert main(["generate", "--max-tokens", "3", "12 times"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("12 times")
    assert "runs/train/step-00000004" in err
    assert main(["eval", "--data", str(text), "--length", "32", "--tokens", "99999"]) == 0
    # The same documents are held out, so the last validation is measured again.
    assert number(capsys.readouterr().out, "loss") == pytest.approx(lines[-1]["val_loss"], rel=1e-3)


def test_train_refuses_what_would_be_another_run(text, capsys):
    train = ["train", "--data", str(text), *TINY_RUN, "--steps", "1"]
    assert main(train) == 0
    assert main([*train, "--lr", "0.1"]) == 1
    assert "lr: expected 0.002 as in the run that is resumed, got 0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preset", "huge"], "preset: expected one of"),
        (["--data", "nowhere"], "nowhere: expected a text file or a folder"),
        (["--tokenizer", "."], "expected a folder with tokenizer.json"),
        (["--device", "cuda:9"], "device: expected one of cpu"),
    ],
)
def test_train_refuses_bad_input_in_one_line(flags, message, capsys):
    assert main(["train", *flags]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_ctrl_c_in_a_training_leaves_a_model(text, capsys, monkeypatch):
    from kimi_linear.cli import train as verb

    keep = verb._keep

    def interrupted(steps, last):
        for at in keep(steps, last):
            yield at
            if at.step == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(verb, "_keep", interrupted)
    assert main(["train", "--data", str(text), *TINY_RUN, "--steps", "9", "--eval-every", "0"]) == 130
    out, err = capsys.readouterr()
    assert "Interrupted" in err
    assert re.search(r"last batch\s+2", out)
    assert main(["generate", "--max-tokens", "1"]) == 0
    assert "runs/train/step-00000002" in capsys.readouterr().err


def test_study_lists_itself(capsys):
    assert main(["study"]) == 0
    out = capsys.readouterr().out
    assert "mqar: " in out
    assert "expected: " in out
    assert main(["study", "chess"]) == 2
    assert "unknown study 'chess'; expected one of mqar" in capsys.readouterr().err


def test_study_runs_and_does_not_run_twice(capsys):
    flags = ["--mixer", "kda,mla", "--steps", "2", "--eval-every", "1", "--pairs", "2", "--vocab", "8"]
    flags += ["--layers", "1", "--hidden-size", "16", "--head-dim", "16", "--samples", "8", "--batch-size", "4"]
    assert main(["study", "mqar", *flags]) == 0
    out = capsys.readouterr().out
    assert re.search(r"kda\s+0", out)
    assert re.search(r"mla\s+0", out)
    assert main(["study", "mqar", *flags]) == 0
    again = capsys.readouterr()
    assert again.out == out
    assert "mla seed 0: finished before" in again.err
    assert main(["study", "mqar", *flags, "--lr", "1"]) == 1
    assert "lr: expected 1.0, as asked for now, got a cell made with 0.001" in capsys.readouterr().err
    # A task model is measured on its task.
    assert main(["eval", "runs/mqar/kda-seed0", "--samples", "16"]) == 0
    assert "sequence_accuracy" in capsys.readouterr().out
