"""The examples run, at toy size, and do what they say."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

import kimi_linear as kl
from kimi_linear.data import ByteTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kda_by_hand(capsys):
    example("kda_by_hand").main()  # asserts that the numbers agree
    assert capsys.readouterr().out.count("largest difference") == 3


def test_train_tiny_learns_and_resumes(tmp_path, capsys):
    module = example("train_tiny")
    # Uniform guesses cost ln 320 = 5.77 nats; five steps must do much better.
    assert module.main(str(tmp_path), steps=5, batch_size=3, max_bytes=50_000) < 5.0
    assert "1,0" in capsys.readouterr().out.splitlines()[0]
    model, tokenizer = kl.load(tmp_path / "step-00000005")
    assert isinstance(tokenizer, ByteTokenizer)
    assert model.config == kl.ModelConfig.preset("tiny")


def test_generate_branches_from_one_state(tmp_path, capsys):
    model = kl.KimiLinear(kl.ModelConfig.preset("tiny", num_layers=2, pattern="1:1", initializer_range=0.2), seed=0)
    kl.save(model, tmp_path / "m", ByteTokenizer())
    texts = example("generate").main(str(tmp_path / "m"), "def f", branches=3, max_tokens=10)
    assert len(set(texts)) == 3
    # Reading the prompt once and copying the state draws what a fresh start with the same seed draws.
    assert texts[0] == "".join(kl.stream(model, ByteTokenizer(), "def f", max_tokens=10, seed=0))
    assert capsys.readouterr().out.endswith(f"{texts[0]}\n")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_every_example_is_tested(path):
    assert f'example("{path.stem}")' in Path(__file__).read_text(encoding="utf-8")
