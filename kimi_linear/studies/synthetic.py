"""The paper's synthetic tasks at its size: palindrome, recall and stacks by every mixer (arXiv 2510.26692, Figure 4).

A cell is one training: a task at a length, a mixer, a learning rate, a seed. This file says which cells there are, in which
order they are worth running, and what their results mean; ``synthetic_board`` trains them, ``synthetic_figure`` draws.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from kimi_linear.config import LinearConfig, Mixer, MLAConfig, ModelConfig
from kimi_linear.studies.cells import read_cell
from kimi_linear.studies.study import Progress, Report, Study

if TYPE_CHECKING:
    from kimi_linear.data import MQAR, Palindrome, Stack
    from kimi_linear.studies.synthetic_training import LaneConfig

TASKS = ("palindrome", "mqar", "stack")
VOCAB_TILE = 64
"""Rows of embedding and output projection are a multiple of this: products with an odd number of columns run at half speed."""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Flags of ``study synthetic``. What the paper leaves open is explained in docs/cli/study.md."""

    tasks: str = ",".join(TASKS)
    """Tasks."""
    mixers: str = "kda,gdn,mamba2,simple-gla,mla"
    """Mixers to compare; both layers are one. simple-gla, Mamba-2's memory in KDA's surroundings, and mla, which has rotary
    positions, are there for orientation."""
    lengths: str = "256,512,1024,2048"
    """Tokens of a sequence, at most."""
    lrs: str = "5e-4,1e-4,1e-3,5e-5"
    """Learning rates to try, the most promising first; the paper's."""
    seeds: int = 3
    """Trainings at ``curve_length`` with the best learning rate; elsewhere there is one."""
    curve_length: int = 1024
    """Length at which accuracy against steps is compared."""
    sweep: Literal["best", "full"] = "best"
    """Learning rates: "best" begins the first two, goes on to the neighbours of the best one, and trains other lengths with the
    one that was best at ``curve_length``; a cell ends where another rate has won whatever is still to come. Or all of them."""
    steps: int = 20000
    """Most training steps of a cell."""
    until: float = 0.9995
    """Share of sequences all right in a point of the curve that counts as solved: 100.0 % in the paper's digits."""
    patience: int = 4
    """Solved points in a row that end a cell."""
    flat: int = 10000
    """A cell without a sequence right whose loss has not fallen by one per cent in so many steps ends, too."""
    point_every: int = 250
    """Steps per point of the curve; each is the mean over the fresh sequences of these steps."""
    batch_size: int = 32
    """Sequences per step."""
    layers: int = 2
    """Blocks."""
    width: int = 256
    """Width of the residual stream: that of both heads together."""
    heads: int = 2
    """Heads of every mixer."""
    head_dim: int = 128
    """Width of a head, K and V."""
    feed_forward: int = 512
    """Inner width of the feed-forward."""
    conv_size: int = 4
    """Taps of the linear mixers' short convolution, 0 for none; the paper does not say whether its small models have one."""
    init_std: float = 0.02
    """Standard deviation of the first weights."""
    dt_shift: float = -6.0
    """Added to every dt_bias at the start; -6 makes memories live four hundred times as long, so longer than a sequence."""
    decay_rate: float = 1.0
    """Learning rate of A_log and dt_bias, in learning rates of the rest: they are of size 1 to 5, weights of size 0.02."""
    gate_rate: float = 0.1
    """Learning rate of the projections to the forgetting gate, in learning rates of the rest; at 1 KDA recalls less."""
    warmup: int = 200
    """Steps in which the learning rate rises."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate afterwards: constant, or half a cosine to a tenth at ``steps``."""
    weight_decay: float = 0.1
    """Of matrices; norms, A_log and dt_bias have none."""
    grad_clip: float = 1.0
    """Largest norm of the gradient."""
    symbols: int = 64
    """Elements of the stacks."""
    palindrome_symbols: int | None = None
    """Different symbols of the palindrome; as many as a sequence holds where None."""
    palindrome_distinct: bool = True
    """Whether no symbol of a palindrome appears twice, as in the paper's example."""
    mqar_symbols: int | None = None
    """Symbols of the recall task, half of them keys; as many keys as a sequence holds where None."""
    mqar_asked: int = 1
    """How often each key is asked for."""
    mqar_distinct: bool = True
    """Whether no value of the recall task appears twice in a sequence, as in the paper's example."""
    stacks: int = 64
    """Independent stacks."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Arithmetic of the forward and backward pass; weights and optimizer are fp32 either way."""
    lanes: int = 1
    """Cells that share each GPU; at 1,024 tokens one fills an H100. On a CPU there is one at a time."""
    seconds_budget: float | None = None
    """Stop after so many seconds, with a checkpoint of every unfinished cell; the same command goes on from there. 0
    trains nothing and draws what is finished."""
    admit_seconds: float | None = None
    """Begin no cell after so many seconds, so that those begun may end within the budget."""
    checkpoints: Path | None = None
    """Folder of unfinished cells; the folder "training" beside the results where None."""
    device: str = "auto"
    """Such as "cpu" or "cuda:0"; "auto" takes every GPU there is, each for cells of its own, or else the CPU."""

    def __post_init__(self) -> None:
        for name, allowed in (("tasks", TASKS), ("mixers", get_args(Mixer))):
            for value in words(getattr(self, name)):
                if value not in allowed:
                    raise ValueError(f"{name}: expected some of {','.join(allowed)}, got {value!r}")
        for name, kind in (("tasks", str), ("mixers", str), ("lengths", int), ("lrs", float)):
            values = [kind(x) for x in words(getattr(self, name))]
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{name}: expected each one once, got {getattr(self, name)!r}")
        for name in ("seeds", "steps", "patience", "flat", "point_every", "batch_size", "lanes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        LinearConfig(num_heads=self.heads, head_dim=self.head_dim, conv_size=self.conv_size)  # checks these three
        for name in ("decay_rate", "gate_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        for name in ("seconds_budget", "admit_seconds"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name}: expected at least 0 seconds, got {value}")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training."""

    task: str
    length: int
    mixer: Mixer
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.task}-{self.length}-{self.mixer}-lr{self.lr:g}-seed{self.seed}"


Results = Mapping[Cell, Mapping[str, Any]]
"""Finished cells."""


def sweep_cells(config: SyntheticConfig) -> list[Cell]:
    """Every task, length, mixer and learning rate with the first seed."""
    return [
        Cell(task=task, length=int(length), mixer=mixer, lr=float(lr), seed=0)  # type: ignore[arg-type]  # checked above
        for task in words(config.tasks)
        for length in words(config.lengths)
        for mixer in words(config.mixers)
        for lr in words(config.lrs)
    ]


def seed_cells(config: SyntheticConfig, results: Results, *, so_far: bool = False) -> list[Cell]:
    """The further seeds of the curves, each where its sweep over learning rates is finished, or anything of it, ``so_far``.

    Full attention has none.
    """
    found = []
    groups = {(c.task, c.mixer) for c in sweep_cells(config) if c.length == config.curve_length and c.mixer != "mla"}
    for task, mixer in groups:
        if so_far:
            best = best_of(config, _sweep_of(config, task, config.curve_length, mixer), results)
        else:
            best = _best_swept(config, task, config.curve_length, mixer, results)
        if best is not None:
            found += [dataclasses.replace(best, seed=seed) for seed in range(1, config.seeds)]
    return found


def best_of(config: SyntheticConfig, cells: list[Cell], results: Results) -> Cell | None:
    """The finished cell with the largest area under its curve, so the soonest solved, and else the one that learned most."""
    done = [cell for cell in cells if cell in results]
    return max(done, key=lambda cell: (area(config, results[cell]), cell.lr), default=None)


def area(config: SyntheticConfig, result: Mapping[str, Any]) -> float:
    """Mean accuracy by sequence over all steps; a cell that was solved early keeps its last accuracy."""
    total, before = 0.0, 0
    curve = result["curve"]
    for step, share in zip(curve["step"], curve["sequence_accuracy"], strict=True):
        total += share * (step - before)
        before = step
    if result["ended"] == "solved":
        total += curve["sequence_accuracy"][-1] * (config.steps - before)
    return total / config.steps


def most(config: SyntheticConfig, curve: Mapping[str, Any]) -> float:
    """``area`` of a curve if every sequence is right from here on."""
    last = curve["step"][-1] if curve["step"] else 0
    return area(config, {"curve": curve, "ended": "steps"}) + (config.steps - last) / config.steps


def pending(config: SyntheticConfig, results: Results) -> list[Cell]:
    """Cells to train now, the most telling first; others may follow from their results."""
    cells = [cell for cell in sweep_cells(config) if cell not in results and wanted(config, cell, results)]
    cells += [cell for cell in seed_cells(config, results) if cell not in results]
    return sorted(cells, key=lambda cell: _rank(config, cell))


def wanted(config: SyntheticConfig, cell: Cell, results: Results) -> bool | None:
    """Whether a cell of the sweep is to be trained; None while that hangs on others."""
    if config.sweep == "full":
        return True
    if cell.length != config.curve_length and takes_best(config):
        best = _best_swept(config, cell.task, config.curve_length, cell.mixer, results)
        return None if best is None else cell.lr == best.lr
    sweep = _sweep_of(config, cell.task, cell.length, cell.mixer)
    by_rate = sorted(sweep, key=lambda other: other.lr)
    tried, beside = list[Cell](), sweep[:2]
    while beside:
        if cell in beside:
            return True
        tried += beside
        best = best_of(config, tried, results)
        if best is None or not all(other in results for other in tried):
            return None
        at = by_rate.index(best)
        beside = [other for other in by_rate[max(0, at - 1) : at + 2] if other not in tried]
    return False


def takes_best(config: SyntheticConfig) -> bool:
    """Whether the curves' learning rate serves the other lengths."""
    return config.sweep == "best" and str(config.curve_length) in words(config.lengths)


def _best_swept(config: SyntheticConfig, task: str, length: int, mixer: str, results: Results) -> Cell | None:
    """The best cell of a sweep, or None while one is to come."""
    sweep = _sweep_of(config, task, length, mixer)
    over = all(cell in results or wanted(config, cell, results) is False for cell in sweep)
    return best_of(config, sweep, results) if over else None


def _sweep_of(config: SyntheticConfig, task: str, length: int, mixer: str) -> list[Cell]:
    lrs = [float(lr) for lr in words(config.lrs)]
    return [Cell(task=task, length=length, mixer=mixer, lr=lr, seed=0) for lr in lrs]  # type: ignore[arg-type]  # checked


def _rank(config: SyntheticConfig, cell: Cell) -> tuple[Any, ...]:
    """Small is first: delta rules at the length of the curves, the others there, further seeds, other lengths, attention."""
    telling = cell.task != "stack" and cell.mixer in ("kda", "gdn")
    if cell.mixer == "mla":
        stage = 4
    elif cell.length != config.curve_length:
        stage = 3
    elif cell.seed:
        stage = 2
    else:
        stage = 0 if telling else 1
    rate = [float(lr) for lr in words(config.lrs)].index(cell.lr)
    return stage, cell.seed, not telling, -cell.length, rate, TASKS.index(cell.task), cell.mixer


def task_of(config: SyntheticConfig, cell: Cell) -> Palindrome | MQAR | Stack:
    """The task of a cell: the largest that fits its length."""
    from kimi_linear.data import MQAR, Palindrome, Stack

    if cell.task == "palindrome":
        return Palindrome.for_length(cell.length, vocab=config.palindrome_symbols, distinct=config.palindrome_distinct)
    if cell.task == "mqar":
        return MQAR.for_length(
            cell.length, vocab=config.mqar_symbols, asked=config.mqar_asked, distinct=config.mqar_distinct
        )
    return Stack.for_length(cell.length, num_stacks=config.stacks, vocab=config.symbols)


def model_of(config: SyntheticConfig, cell: Cell) -> ModelConfig:
    """The model of a cell: the same shape for every mixer, but for what Mamba-2's heads share as published, and its gate."""
    half = max(2, config.head_dim // 4 * 2)
    linear = LinearConfig(num_heads=config.heads, head_dim=config.head_dim, conv_size=config.conv_size)
    if cell.mixer == "mamba2":
        linear = dataclasses.replace(
            linear, num_heads=1, num_v_heads=config.heads, output_gate="swish", output_gate_rank="full"
        )
    return ModelConfig(
        vocab_size=-(-task_of(config, cell).vocab_size // VOCAB_TILE) * VOCAB_TILE,
        hidden_size=config.width,
        num_layers=config.layers,
        intermediate_size=config.feed_forward,
        mixers=(cell.mixer,) * config.layers,
        linear=linear,
        mla=MLAConfig(
            num_heads=config.heads,
            kv_lora_rank=config.width,
            qk_nope_head_dim=config.head_dim - half if config.head_dim > half else half,
            qk_rope_head_dim=half,
            v_head_dim=config.head_dim,
            position="rope",
        ),
        initializer_range=config.init_std,
    )


def lane_of(config: SyntheticConfig, cell: Cell) -> LaneConfig:
    """How a cell is trained."""
    from kimi_linear.studies.synthetic_training import LaneConfig

    same = ("steps", "flat", "batch_size", "warmup", "schedule", "weight_decay", "grad_clip")
    same += ("dt_shift", "decay_rate", "gate_rate")
    return LaneConfig(
        task=task_of(config, cell),
        model=model_of(config, cell),
        lr=cell.lr,
        seed=cell.seed,
        until=config.until,
        patience=config.patience,
        bf16=config.precision == "bf16",
        point_every=config.point_every,
        **{name: getattr(config, name) for name in same},
    )


def settings_of(lane: LaneConfig) -> dict[str, Any]:
    """All that a cell's result depends on, as JSON."""
    values = {**dataclasses.asdict(lane), "task": {"name": lane.task.name, **dataclasses.asdict(lane.task)}}
    return json.loads(json.dumps(values))


def read_results(config: SyntheticConfig, folder: Path) -> dict[Cell, dict[str, Any]]:
    """The finished cells in a folder.

    Raises:
        ValueError: a cell was made with other settings, or is damaged.
    """
    results: dict[Cell, dict[str, Any]] = {}

    def take(cells: list[Cell]) -> None:
        for cell in cells:
            path = folder / f"{cell.name}.json"
            if path.exists():
                found = read_cell(path, settings_of(lane_of(config, cell)))
                assert found is not None
                results[cell] = found

    take(sweep_cells(config))
    take(seed_cells(config, results, so_far=True))
    return results


def cells_in_all(config: SyntheticConfig) -> int:
    """Cells in all, at most."""
    swept = sweep_cells(config)
    if takes_best(config):
        swept = [c for c in swept if c.length == config.curve_length or c.lr == float(words(config.lrs)[0])]
    curves = {(c.task, c.mixer) for c in swept if c.length == config.curve_length and c.mixer != "mla"}
    return len(swept) + (config.seeds - 1) * len(curves)


def run(config: SyntheticConfig, folder: Path) -> Iterator[Progress]:
    """Train the cells that are not finished, on every GPU there is."""
    from kimi_linear.studies.synthetic_board import train

    return train(config, folder)


def report(config: SyntheticConfig, folder: Path) -> Report:
    """The finished cells as a table, ``figure4.json``, ``figure4.md`` and ``figure4.png``."""
    from kimi_linear.studies.synthetic_figure import write_report

    return write_report(config, folder)


def words(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


STUDY = Study(
    name="synthetic",
    shows="At the paper's size, which mixer solves palindrome, recall and stacks, up to which length, and after how many "
    "steps (arXiv 2510.26692, section 5.1 and Figure 4)?",
    expected="in the paper KDA solves all three up to 1,024 tokens, and sooner than GDN; Mamba-2 fails beyond 512; at 2,048 "
    "only the stacks are solved.",
    price="a GPU: up to 129 trainings of at most 20,000 steps, one after the other. It can be stopped and taken up again at any time.",
    config=SyntheticConfig,
    run=run,
    report=report,
)
