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


def test_generate_says_how_to_make_a_model(capsys):
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
    assert re.search(r"cache per token\s+7.9 KiB\s+30.4 KiB", out)


def test_info_refuses_a_preset_that_does_not_exist(capsys):
    assert main(["info", "--preset", "huge"]) == 1
    assert "got 'huge'" in capsys.readouterr().err
