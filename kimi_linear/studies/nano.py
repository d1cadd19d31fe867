"""kimi-linear-nano: the small hybrid that ships with the package, and its full-attention twin on the same tokens.

Three parts: ``prepare`` makes the token files, ``train`` trains in pieces of any length and picks the best learning
rate where several are given, ``package`` writes the folder that ships.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from kimi_linear.studies.cells import read_cell, write_cell, write_json
from kimi_linear.studies.nano_data import KINDS, read_about, read_corpus
from kimi_linear.studies.nano_model import Which, model_of, tiny_model_of, training_flops
from kimi_linear.studies.study import Progress, Report, Study

if TYPE_CHECKING:
    from kimi_linear.config import ModelConfig
    from kimi_linear.model import KimiLinear
    from kimi_linear.training import StepMetrics, TrainConfig, Trainer


@dataclass(frozen=True, kw_only=True)
class NanoConfig:
    """Flags of ``study nano``."""

    part: Literal["prepare", "train", "package"] = "train"
    """"prepare" makes the token files from the sources; "train" trains; "package" writes the finished nano to --package."""
    data: Path = Path("runs/nano-data")
    """Folder of the token files."""
    sources: Path = Path("runs/nano-sources")
    """Folder of the archives that "prepare" reads; what is missing there is named with the command that fetches it."""
    package: Path = Path("kimi_linear/nano")
    """Where "package" writes."""
    models: str = "nano,twin"
    """What to train, in this order."""
    lr: str = "3e-3"
    """Peak learning rates; each is a cell of its own, so that several make a sweep."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """As in ``kimi-linear train``."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices."""
    tokens: float = 1.8e8
    """Tokens that each cell reads, the same ones in the same order; a short number with several --lr is a sweep."""
    prose_times: int = 2
    """How often a pass through the text reads the prose, the smaller part."""
    batch_size: int = 128
    """Rows per step."""
    sequence_length: int = 1024
    """Tokens per row."""
    measurements: int = 20
    """How often the held-out text is measured, evenly over the run."""
    held_out_rows: int = 256
    """Rows of each held-out text that a measurement on the way reads; the last one reads all."""
    seconds_budget: float = 0.0
    """Stop, with a checkpoint, after so many seconds of the whole command; the same command goes on. 0 for no limit."""
    compile: bool = False
    """Compile the blocks: fewer and larger kernels on a GPU, after a minute or two of compiling."""
    tiny: bool = False
    """A model of 1 M parameters in place of both, to try the way on a CPU."""
    seed: int = 0
    """Of the weights and the order of the rows."""
    device: str = "auto"
    """Such as "cpu" or "cuda:0"; "auto" takes a GPU where there is one."""

    def __post_init__(self) -> None:
        for name in self.models.split(","):
            if name not in ("nano", "twin"):
                raise ValueError(f"models: expected some of nano,twin, got {name!r}")
        for name in ("tokens", "prose_times", "batch_size", "sequence_length", "measurements", "held_out_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.seconds_budget < 0:
            raise ValueError(f"seconds_budget: expected at least 0, got {self.seconds_budget}")
        if not all(rate > 0 for rate in self.rates):
            raise ValueError(f"lr: expected positive numbers such as 2e-3,4e-3, got {self.lr!r}")

    @property
    def rates(self) -> tuple[float, ...]:
        """The numbers in ``lr``."""
        return tuple(float(rate) for rate in self.lr.split(","))

    @property
    def cells(self) -> tuple[tuple[Which, float], ...]:
        """Every (model, learning rate)."""
        return tuple((cast("Which", model), rate) for model in self.models.split(",") for rate in self.rates)

    @property
    def steps(self) -> int:
        """Steps of a cell."""
        return max(1, round(self.tokens / (self.batch_size * self.sequence_length)))

    def settings(self, which: Which, rate: float) -> dict[str, Any]:
        """What makes a cell the same cell."""
        names = ("optimizer", "weight_decay", "tokens", "prose_times", "batch_size", "sequence_length", "tiny", "seed")
        return {"model": which, "lr": rate, **{name: getattr(self, name) for name in names}}

    def cell_name(self, which: Which, rate: float) -> str:
        """Of the cell's file and folder; runs of other length or optimizer stand beside each other."""
        return f"{which}-{self.optimizer}-{rate:g}-{self.tokens:.0e}".replace("+", "")


def config_of(config: NanoConfig, which: Which) -> ModelConfig:
    """The model of a cell, for the vocabulary of the data folder."""
    about = read_about(config.data)
    make = tiny_model_of if config.tiny else model_of
    return make(which, about["vocab_size"], about["eos_id"])


def run(config: NanoConfig, folder: Path) -> Iterator[Progress]:
    """Do the part that is asked for."""
    if config.part == "prepare":
        yield from _prepare(config)
    elif config.part == "package":
        from kimi_linear.studies.nano_package import package

        yield Progress(step=0, total=1, text="writing weights, tokenizer and card")
        package(config, folder)
        yield Progress(step=1, total=1, text=f"wrote {config.package}")
    else:
        yield from _train_all(config, folder)


def _prepare(config: NanoConfig) -> Iterator[Progress]:
    from kimi_linear.studies.nano_data import prepare
    from kimi_linear.studies.nano_text import PROSE, code_sources, find_archive

    sources = [(source, find_archive(source, config.sources)) for source in PROSE]
    sources += [(source, config.sources) for source in code_sources()]
    for step, text in enumerate(prepare(sources, config.data)):
        yield Progress(step=step + 1, total=7, text=text)


def _train_all(config: NanoConfig, folder: Path) -> Iterator[Progress]:
    deadline = time.monotonic() + config.seconds_budget if config.seconds_budget else None
    total = config.steps * len(config.cells)
    for done, (which, rate) in enumerate(config.cells):
        name, before = config.cell_name(which, rate), done * config.steps
        if read_cell(folder / f"{name}.json", config.settings(which, rate)) is not None:
            yield Progress(step=before + config.steps, total=total, text=f"{name}: finished before")
            continue
        for step, text in _train(config, which, rate, folder, deadline):
            yield Progress(step=before + step, total=total, text=f"{name}: {text}")
        if deadline is not None and time.monotonic() >= deadline:
            yield Progress(step=before, total=total, text=f"{name}: out of time; the same command goes on")
            return


def _train(
    config: NanoConfig, which: Which, rate: float, folder: Path, deadline: float | None
) -> Iterator[tuple[int, str]]:
    """Train one cell until it is done or the time is up; a checkpoint is left either way."""
    from kimi_linear.model import KimiLinear
    from kimi_linear.training import Trainer

    name = config.cell_name(which, rate)
    workplace = folder / "training" / name
    shape = config_of(config, which)
    model = KimiLinear(shape, seed=config.seed)
    corpus = read_corpus(config.data, "train", prose_times=config.prose_times)
    trainer = Trainer(model, None, corpus, None, _training(config, rate), workplace)
    if config.compile:
        for block in model.blocks:
            block.compile()
    flops = training_flops(shape, config.sequence_length)
    # A resumed run measures again: it may be another machine.
    ceiling = matmul_ceiling(trainer.device)
    record = Record.read(workplace / "record.json", trainer.step, machine(trainer.device))
    yield trainer.step, f"bf16 matmul ceiling {ceiling / 1e12:,.1f} TFLOP/s, {flops / 1e6:,.1f} MFLOP a token"
    every = max(1, config.steps // config.measurements)
    steps = cast("Generator[StepMetrics]", trainer.run())
    try:
        while trainer.step < config.steps and (deadline is None or time.monotonic() < deadline):
            began = time.perf_counter()
            at = next(steps)
            share = at.tokens_per_second * flops / ceiling
            record.time(at, share, time.perf_counter() - began)
            if at.step % every == 0 and at.step < config.steps:
                record.add(at, measure(config, model, rows=config.held_out_rows))
            latest = f" · {_spoken(record.points[-1])}" if record.points else ""
            yield (
                at.step,
                f"loss {at.loss:.3f}{latest} · {at.tokens_per_second:,.0f} tokens/s, {share:.1%} of the ceiling",
            )
    finally:
        steps.close()
        record.write()
    if trainer.step == config.steps:
        last = _finish(config, which, rate, folder, trainer, record)
        yield trainer.step, f"{_spoken(last)} bits per byte, all held-out text"


def _training(config: NanoConfig, rate: float) -> TrainConfig:
    from kimi_linear.training import TrainConfig

    return TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        sequence_length=config.sequence_length,
        packing="rows",
        lr=rate,
        optimizer=config.optimizer,
        weight_decay=config.weight_decay,
        schedule="wsd",
        # A short run of a sweep warms up as long as a whole one: with few steps high rates look worse than they are.
        warmup=min(0.2, max(0.02, 100 / config.steps)),
        decay=0.5,
        min_lr=0.0,
        precision="bf16" if _on_gpu(config.device) else "fp32",
        eval_every=0,
        # A process that is killed loses a tenth of the run at most.
        save_every=max(1, config.steps // 10),
        keep=1,
        log_every=10,
        seed=config.seed,
        device=config.device,
    )


def _on_gpu(device: str) -> bool:
    import torch

    return torch.cuda.is_available() if device == "auto" else device.startswith("cuda")


def measure(config: NanoConfig, model: KimiLinear, *, rows: int | None) -> dict[str, float]:
    """Bits per byte of the held-out prose and code, each cut into rows of the training's length.

    ``rows`` of them spread over the text, or all where None. A row's first token sees nothing before it, so the number
    is a little above what a longer context would give.
    """
    import torch

    from kimi_linear.data import in_order
    from kimi_linear.evals import Perplexity

    about, found = read_about(config.data)["splits"], {}
    size = min(config.batch_size, 16)
    training = model.training
    model.eval()
    for kind in KINDS:
        batches = in_order(
            read_corpus(config.data, kind),
            batch_size=size,
            sequence_length=config.sequence_length,
            max_batches=None if rows is None else max(1, rows // size),
        )
        each = about[kind]["bytes"] / about[kind]["tokens"]
        # Compiled blocks would be compiled again for these shapes.
        with (
            torch.compiler.set_stance("force_eager"),
            torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"),
        ):
            result = Perplexity(batches=lambda b=batches: b, bytes_per_token=each, device=model.device)(model)
        found[kind] = result.metrics["bits_per_byte"]
    model.train(training)
    return found


def _spoken(point: dict[str, float]) -> str:
    return ", ".join(f"{kind} {point[kind]:.3f}" for kind in KINDS)


def matmul_ceiling(device: Any, size: int = 8192) -> float:
    """FLOP/s of the device's own largest product, bf16 on a GPU and fp32 on a CPU: the share of it says how busy it is."""
    import torch

    gpu = device.type == "cuda"
    size, dtype, times = (size, torch.bfloat16, 30) if gpu else (1024, torch.float32, 3)
    a = torch.randn(size, size, device=device).to(dtype)
    seconds = math.inf
    for _ in range(2):  # the first round warms up
        began = time.perf_counter()
        for _ in range(times):
            torch.mm(a, a)
        if gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return 2.0 * size**3 * times / seconds


def machine(device: Any) -> str:
    """The processor that trains, by its name."""
    import torch

    from kimi_linear.studies.report.machine import cpu_name

    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


@dataclass
class Record:
    """What a cell has measured so far, on disk at every checkpoint."""

    path: Path
    points: list[dict[str, float]]
    pieces: list[dict[str, Any]]
    """One per process: its machine, seconds, steps, and the speed of its last steps."""

    @staticmethod
    def read(path: Path, step: int, machine: str) -> Record:
        """The record up to ``step``, where the training stands, with a new piece begun."""
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() and step else {"points": [], "pieces": []}
        points = [point for point in saved["points"] if point["step"] <= step]
        piece = {
            "machine": machine,
            "from_step": step,
            "steps": 0,
            "seconds": 0.0,
            "tokens_per_second": 0.0,
            "share": 0.0,
        }
        return Record(path, points, [*saved["pieces"], piece])

    def time(self, at: StepMetrics, share: float, seconds: float) -> None:
        """Count a step of so many seconds, saving included and measuring not; the speed is that of the last steps."""
        piece = self.pieces[-1]
        piece["steps"] += 1
        piece["seconds"] += seconds
        piece["tokens_per_second"], piece["share"] = at.tokens_per_second, share

    def add(self, at: StepMetrics, found: dict[str, float]) -> None:
        """Note a measurement of the held-out text."""
        self.points.append({"step": at.step, "tokens": at.tokens, "loss": at.loss, **found})
        self.write()

    def write(self) -> None:
        """To the disk."""
        write_json(self.path, {"points": self.points, "pieces": self.pieces})


def _finish(
    config: NanoConfig, which: Which, rate: float, folder: Path, trainer: Trainer, record: Record
) -> dict[str, float]:
    """Write the model in bf16, as it would ship, and last the cell. Returns its bits per byte of all held-out text."""
    import torch

    from kimi_linear.folder import load, save

    on_the_way = measure(config, trainer.model, rows=config.held_out_rows)
    record.points.append({"step": trainer.step, "tokens": trainer.tokens, **on_the_way})
    name = config.cell_name(which, rate)
    shutil.rmtree(folder / name, ignore_errors=True)
    exact = measure(config, trainer.model, rows=None)
    save(trainer.model.to(torch.bfloat16), folder / name)
    released, _ = load(folder / name, device=trainer.device)
    last = measure(config, released, rows=None)
    values = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "held_out": last,
        "held_out_fp32": exact,
        "points": record.points,
        "pieces": record.pieces,
        "data": read_about(config.data)["splits"],
    }
    write_cell(folder / f"{name}.json", config.settings(which, rate), values)
    shutil.rmtree(folder / "training" / name)
    return last


def report(config: NanoConfig, folder: Path) -> Report:
    """The finished cells as a table, ``results.json`` and ``loss.png``."""
    title = "kimi-linear-nano and its full-attention twin: bits per byte of held-out text"
    if config.part != "train":
        return Report(title=title, rows=(), files=())
    cells = {
        config.cell_name(*cell): read_cell(folder / f"{config.cell_name(*cell)}.json", config.settings(*cell))
        for cell in config.cells
    }
    finished = {name: values for name, values in cells.items() if values is not None}
    rows = tuple(
        {
            "cell": name,
            "parameters": values["parameters"],
            "tokens": int(values["points"][-1]["tokens"]),
            **{f"{kind}, bits/byte": round(values["held_out"][kind], 4) for kind in KINDS},
            "minutes": round(sum(piece["seconds"] for piece in values["pieces"]) / 60, 1),
            "tokens/s": round(values["pieces"][-1]["tokens_per_second"]),
            "of the ceiling": round(values["pieces"][-1]["share"], 3),
        }
        for name, values in finished.items()
    )
    if not rows:
        return Report(title=title, rows=(), files=())
    results, figure = folder / "results.json", folder / "loss.png"
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars_of(config).items()}
    write_json(results, {"study": "nano", "settings": settings, "rows": rows})
    draw(finished, figure)
    return Report(title=title, rows=rows, files=(results, figure))


def vars_of(config: NanoConfig) -> dict[str, Any]:
    """The flags as plain values."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def draw(cells: dict[str, dict[str, Any]], path: Path) -> None:
    """Held-out bits per byte against tokens, prose and code apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axis, kind in zip(figure.subplots(1, 2), KINDS, strict=True):
        for name, values in cells.items():
            axis.plot([p["tokens"] / 1e6 for p in values["points"]], [p[kind] for p in values["points"]], label=name)
        axis.set(title=f"held-out {kind}", xlabel="million tokens read", ylabel="bits per byte")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


STUDY = Study(
    name="nano",
    shows="What do 8 M parameters learn from 130 MB of free prose and Python: a 3:1 hybrid, and full attention with RoPE?",
    expected="with 180 M tokens, one seed: 1.427 bits per byte of prose for the hybrid and 1.429 for full attention; 0.929 and 0.904 of code.",
    price="3 minutes of one H100 for each model",
    config=NanoConfig,
    run=run,
    report=report,
)
