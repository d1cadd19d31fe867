"""Made-up results of a whole demo, for tests of the report: every part is there, and no number is a measured one."""

from __future__ import annotations

import math
import random

from kimi_linear.studies.report.machine import Machine
from kimi_linear.studies.report.results import (
    DecodePoint,
    Decoding,
    DemoResults,
    Memory,
    MemoryHead,
    Point,
    Recall,
    Sample,
    Training,
)  # fmt: skip

SENTENCE = "def median(data):\n    data = sorted(data)\n    n = len(data)\n    if n == 0:\n"


def sample_results() -> DemoResults:
    """A finished demo."""
    return DemoResults(
        command="kimi-linear demo",
        started="2026-01-02T03:04:05",
        machine=Machine(
            hardware="Test CPU", cores=2, threads=2, device="cpu", system="Linux x86_64",
            python="3.11.0", torch="2.9.0", kimi_linear="0.1.0",
        ),
        corpus="12.0 MB of the standard library",
        seconds={"training": 80.0, "continuation": 3.0, "decoding": 12.0, "recall": 30.0, "memory": 1.0},
        trainings=(training("hybrid", 5.8, 1.62, 8000.0), training("attention", 5.8, 1.71, 14000.0)),
        sample=Sample(prompt="def ", continuation="main(self, <name>):\n    return self.name\n", tokens=40, seconds=0.5),
        decoding=(decoding("hybrid", 3e-3, 4e-8, 270_000, 384), decoding("attention", 2.5e-3, 2.5e-7, 0, 1536)),
        recall=recall(),
        memory=memory(),
    )  # fmt: skip


def training(model, first, last, speed):
    noise = random.Random(0)

    def curve(step):
        return last + (first - last) * math.exp(-step / 14)

    return Training(
        model=model, label="hybrid" if model == "hybrid" else "full attention", parameters=1_068_000,
        mixers=("kda", "kda", "kda", "mla") if model == "hybrid" else ("mla",) * 4,
        planned_steps=90, seconds=90 * 4096 / speed,
        train=tuple(Point(step=s, tokens=s * 4096, value=curve(s) + noise.gauss(0, 0.05)) for s in range(1, 91)),
        validation=tuple(Point(step=s, tokens=s * 4096, value=curve(s) + 0.05) for s in range(0, 91, 15)),
    )  # fmt: skip


def decoding(model, base, slope, fixed, per_token):
    return Decoding(
        model=model, label="hybrid" if model == "hybrid" else "full attention",
        points=tuple(
            DecodePoint(context=c, seconds_per_token=base + slope * c, cache_bytes=fixed + per_token * c)
            for c in (1024 * 2**i for i in range(7))
        ),
    )  # fmt: skip


def recall():
    return Recall(
        pairs=8, queries=8, length=33, vocabulary=64, mixers=("kda",), parameters=100_000, chance=1 / 32, target=0.99,
        seconds=30.0,
        points=tuple(
            Point(step=s, tokens=s * 2000, value=1 / 32 + 0.96 / (1 + math.exp((300 - s) / 40))) for s in range(0, 601, 50)
        ),
    )  # fmt: skip


def memory():
    noise = random.Random(1)
    heads = []
    for layer in range(3):
        for head in range(2):
            rates = [10 ** noise.uniform(-3.5, 0.3) for _ in range(64)]
            decays, betas, corrections = [], [], []
            for i, character in enumerate(SENTENCE):
                word = character.isalpha()
                decays.append(tuple(-r * (0.5 if word else 2.5) * math.exp(noise.gauss(0, 0.3)) for r in rates))
                betas.append(min(1.0, max(0.0, noise.gauss(0.7 if word else 0.35, 0.1))))
                corrections.append(max(0.0, noise.gauss(1.4 if i < 14 else 0.7, 0.3)))
            values = [max(1.0, noise.gauss(1.4, 0.1)) for _ in SENTENCE]
            heads.append(
                MemoryHead(
                    layer=layer,
                    head=head,
                    log_decay=tuple(decays),
                    beta=tuple(betas),
                    correction=tuple(corrections),
                    value=tuple(values),
                )
            )
    return Memory(source="statistics.median", tokens=tuple(SENTENCE), heads=tuple(heads))
