"""The demo's three trainings: the hybrid, its full-attention twin on the same batches, and the recall task."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from statistics import median
from typing import TYPE_CHECKING, cast

from kimi_linear.config import LinearConfig, MLAConfig, ModelConfig
from kimi_linear.data import MQAR, ByteTokenizer, Corpus, CorpusStream, Tokenizer, stdlib_source, tokenize
from kimi_linear.evals import TaskAccuracy, save_task
from kimi_linear.folder import save
from kimi_linear.model import KimiLinear
from kimi_linear.studies.report.page import count, duration
from kimi_linear.studies.report.results import LABELS, ModelName, Point, Recall, Training
from kimi_linear.training import StepMetrics, TrainConfig, Trainer, build_optimizers, linear_cross_entropy

if TYPE_CHECKING:
    from kimi_linear.studies.demo import DemoConfig, DemoRun

LEARNING_RATE = 1e-2
"""Of Muon and AdamW alike; after 200 thousand bytes it reads 0.5 bits per byte better than AdamW alone at 3e-3."""

VALIDATIONS = 6
"""Validations of each language model's training, the last at its end."""
VALIDATION_BATCHES = 8

FEWEST_STEPS = 8
RESERVE = 0.85
"""Share of the training time that the steps may take; validation, checkpoints and a slower moment need the rest."""

RECALL_STEPS = 5000
"""Most steps of the recall task; it ends by its target or its time."""
RECALL_BATCH = 64
RECALL_LEARNING_RATE = 3e-3
RECALL_EVERY = 25
"""Steps of the recall task between two measurements."""
RECALL_SAMPLES = 256


def twins(config: DemoConfig) -> dict[ModelName, ModelConfig]:
    """The hybrid's configuration and that of its full-attention twin."""
    return {"hybrid": ModelConfig.preset(config.preset), "attention": ModelConfig.preset(f"{config.preset}/mla")}


def train_language_models(run: DemoRun) -> None:
    """Train the hybrid, then its twin, on the same batches in the same order; save both."""
    config, screen = run.config, run.screen
    with run.phase("preparing"):
        tokenizer = ByteTokenizer()
        models: dict[ModelName, KimiLinear] = {
            name: KimiLinear(shape, seed=config.seed).to(run.device) for name, shape in twins(config).items()
        }
        for name, model in models.items():
            # From here on there is a model to load, whenever the run is interrupted.
            save(model, config.folder / name, tokenizer)
        documents = stdlib_source(max_bytes=config.corpus_bytes)
        train, held_out = tokenize(documents, tokenizer).split()
        run.keep(
            corpus=f"the Python standard library's source: {len(documents):,} files, {count(train.num_tokens)} bytes to "
            f"train on and {count(held_out.num_tokens)} held out"
        )
        steps = config.steps or steps_that_fit(config, train, run.device)
    screen.say(f"On {run.results.corpus}.")
    screen.say(f"Both models do {steps:,} steps of {config.batch_size * config.sequence_length:,} bytes.")
    settings = TrainConfig(
        steps=steps,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        packing="rows",
        lr=LEARNING_RATE,
        optimizer="muon",
        schedule="cosine",
        warmup=0.1,
        min_lr=0.05,
        seed=config.seed,
        device=run.device,
        eval_every=max(1, -(-steps // VALIDATIONS)),
        eval_batches=VALIDATION_BATCHES,
        save_every=0,
    )
    for name, model in models.items():
        _train_one(run, name, model, tokenizer, train, held_out, settings)


def _train_one(
    run: DemoRun, name: ModelName, model: KimiLinear, tokenizer: Tokenizer, train: Corpus, held_out: Corpus,
    settings: TrainConfig,
) -> None:  # fmt: skip
    config, screen = run.config, run.screen
    trainer = Trainer(model, tokenizer, train, held_out, settings, config.folder / "training" / name)
    seen: list[StepMetrics] = []
    screen.say(f"\nTraining the {LABELS[name]} model:" if name == "attention" else "\nTraining the hybrid:")

    def words(metrics: StepMetrics) -> str:
        left = f"{duration(metrics.seconds_left)} left"
        return f"loss {metrics.loss:.3f} · {count(metrics.tokens_per_second)} tokens/s · {left}"

    with run.phase(f"training {'the hybrid' if name == 'hybrid' else LABELS[name]}"):
        try:
            with _running(trainer) as steps:
                for metrics in screen.track(steps, settings.steps, step=lambda m: m.step, describe=words):
                    seen.append(metrics)  # noqa: PERF402  (an interrupt leaves those so far)
        finally:
            # The trainer's speed leaves validation and saving out, and so does the time that follows from it.
            seconds = seen[-1].tokens / median(m.tokens_per_second for m in seen) if seen else 0.0
            training = Training(
                model=name,
                label=LABELS[name],
                mixers=model.config.layer_mixers,
                parameters=sum(p.numel() for p in model.parameters()),
                planned_steps=settings.steps,
                seconds=seconds,
                train=tuple(Point(step=m.step, tokens=m.tokens, value=m.loss) for m in seen),
                validation=tuple(
                    Point(step=m.step, tokens=m.tokens, value=m.val_loss) for m in seen if m.val_loss is not None
                ),
            )
            run.keep(trainings=(*run.results.trainings, training))
            # An interrupt inside an update may have moved some parameters and not the rest: as good a model as before.
            save(model, config.folder / name, tokenizer)
    last = run.results.trainings[-1].validation[-1].value
    screen.say(f"Held-out loss {last:.3f} nats per byte.")


def _running(trainer: Trainer) -> closing[Generator[StepMetrics]]:
    """The trainer's steps. However they are left, they are closed at once, and the trainer saves its checkpoint."""
    return closing(cast("Generator[StepMetrics]", trainer.run()))


def steps_that_fit(config: DemoConfig, corpus: Corpus, device: str) -> int:
    """Steps of both models that fit ``config.train_seconds``, from a few steps of models that are thrown away."""
    stream = CorpusStream(
        corpus, batch_size=config.batch_size, sequence_length=config.sequence_length, packing="rows", seed=config.seed
    )
    settings = TrainConfig(optimizer="muon", lr=LEARNING_RATE)
    total = 0.0
    for shape in twins(config).values():
        model = KimiLinear(shape, seed=config.seed).to(device)
        optimizers = build_optimizers(model, settings)
        times = []
        for _ in range(4):
            since = time.perf_counter()
            batch = next(stream).to(device)
            hidden = model.hidden_states(batch.tokens).flatten(0, 1)
            loss = linear_cross_entropy(hidden, model.model.embed_tokens.weight, batch.targets.flatten())
            loss.backward()
            optimizers.step(LEARNING_RATE)
            optimizers.zero_grad()
            loss.item()  # waits for an accelerator
            times.append(time.perf_counter() - since)
        # The first step allocates; of the others the fastest is the one that nothing disturbed.
        total += min(times[1:])
    return max(FEWEST_STEPS, int(RESERVE * config.train_seconds / total))


def train_recall(run: DemoRun) -> None:
    """Train one KDA layer on associative recall until the target or the time is reached."""
    config, screen = run.config, run.screen
    task = MQAR(num_pairs=config.recall_pairs, num_queries=config.recall_pairs, vocab=max(64, 2 * config.recall_pairs))
    with run.phase("associative recall"):
        model = KimiLinear(recall_model(task), seed=config.seed).to(run.device)
        measure = TaskAccuracy(task=task, samples=RECALL_SAMPLES, device=run.device)
        settings = TrainConfig(
            steps=RECALL_STEPS,
            batch_size=RECALL_BATCH,
            sequence_length=task.sequence_length,
            lr=RECALL_LEARNING_RATE,
            warmup=50 / RECALL_STEPS,
            decay=0.0,
            weight_decay=0.0,
            seed=config.seed,
            device=run.device,
            eval_every=0,
            save_every=0,
        )
        trainer = Trainer(model, None, task, None, settings, config.folder / "training" / "recall")
        points = [Point(step=0, tokens=0, value=_recall(measure, model))]
        since = time.perf_counter()
        screen.say(f"\nAssociative recall: {task.num_pairs} keys and values, then {task.num_queries} keys to answer.")

        def measured(steps: Iterator[StepMetrics]) -> Iterator[StepMetrics]:
            for metrics in steps:
                late = time.perf_counter() - since > config.recall_seconds
                if metrics.step % RECALL_EVERY == 0 or late:
                    points.append(Point(step=metrics.step, tokens=metrics.tokens, value=_recall(measure, model)))
                yield metrics
                if late or points[-1].value >= config.recall_target:
                    return

        def words(metrics: StepMetrics) -> str:
            return f"seconds at most · step {metrics.step} · recall {points[-1].value:.1%}"

        def passed(metrics: StepMetrics) -> int:
            return min(int(time.perf_counter() - since), whole)

        whole = max(1, round(config.recall_seconds))
        try:
            with _running(trainer) as steps:
                for _ in screen.track(measured(steps), whole, step=passed, describe=words):
                    pass
        finally:
            run.keep(recall=_recall_results(config, task, model, time.perf_counter() - since, points))
            save(model, config.folder / "recall")
            save_task(task, config.folder / "recall")
    screen.say(
        f"Recall {points[-1].value:.1%} after {points[-1].step} steps; a guess is right {_chance(task):.1%} of the time."
    )


def recall_model(task: MQAR) -> ModelConfig:
    """One KDA layer with one head: a single 64 x 64 memory."""
    return ModelConfig(
        vocab_size=-(-task.vocab_size // 64) * 64,
        hidden_size=64,
        num_layers=1,
        intermediate_size=128,
        linear=LinearConfig(num_heads=1, head_dim=64),
        mla=MLAConfig(num_heads=1, kv_lora_rank=64, qk_nope_head_dim=64, qk_rope_head_dim=16, v_head_dim=64),
        pattern="1:0",
    )


def _recall(measure: TaskAccuracy, model: KimiLinear) -> float:
    return measure(model).metrics["token_accuracy"]


def _chance(task: MQAR) -> float:
    """Recall of a guess among the values."""
    return 1 / (task.vocab - task.vocab // 2)


def _recall_results(config: DemoConfig, task: MQAR, model: KimiLinear, seconds: float, points: list[Point]) -> Recall:
    return Recall(
        pairs=task.num_pairs,
        queries=task.num_queries,
        length=task.sequence_length,
        vocabulary=task.vocab_size,
        mixers=model.config.layer_mixers,
        parameters=sum(p.numel() for p in model.parameters()),
        chance=_chance(task),
        target=config.recall_target,
        seconds=seconds,
        points=tuple(points),
    )
