"""A model and text so small that training them takes a second; also run as a script, to be killed."""

import sys
import time
from pathlib import Path

import torch

from kimi_linear.config import ModelConfig
from kimi_linear.data import ByteTokenizer, Corpus, Documents, tokenize
from kimi_linear.model import KimiLinear
from kimi_linear.training import TrainConfig, Trainer

LETTERS = b"abcdefghijklmnop"


def tiny_model(preset: str = "tiny", **changes) -> KimiLinear:
    """One KDA layer and one full-attention layer of width 32."""
    linear, mla = {"num_heads": 1, "head_dim": 16}, {"num_heads": 1, "qk_nope_head_dim": 16, "v_head_dim": 16}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "vocab_size": 257, "pattern": "1:1"}
    return KimiLinear(ModelConfig.preset(preset, linear=linear, mla=mla, **{**sizes, **changes}), seed=0)


def tiny_corpus(documents: int = 30, length: int = 150) -> Corpus:
    """Uniform letters, of which each fixes the next one but for a coin: 4 bits alone, 1 bit after the letter before."""
    generator = torch.Generator().manual_seed(0)
    follow = torch.randperm(16, generator=generator)
    texts = []
    for _ in range(documents):
        letter = torch.randint(16, (), generator=generator)
        text = []
        for coin in torch.randint(2, (length,), generator=generator):
            text.append(LETTERS[letter])
            letter = follow[(letter + coin) % 16]
        texts.append(bytes(text).decode())
    return tokenize(Documents(names=tuple(f"d{i}" for i in range(documents)), texts=tuple(texts)), ByteTokenizer())


def config(**changes) -> TrainConfig:
    """A short run on the CPU."""
    values = {"steps": 10, "batch_size": 2, "sequence_length": 32, "device": "cpu", "eval_every": 0, "save_every": 0}
    return TrainConfig(**{**values, **changes})


def main(folder: Path) -> None:
    """Train with checkpoints at 3, 6 and 9, saying each step; after step 8, wait to be killed."""
    torch.set_num_threads(1)
    trainer = Trainer(tiny_model(), ByteTokenizer(), tiny_corpus(), None, config(save_every=3), folder)
    for metrics in trainer.run():
        print(metrics.step, metrics.loss.hex(), flush=True)
        if metrics.step == 8:
            time.sleep(300)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
