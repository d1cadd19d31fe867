"""The study of synthetic tasks: lanes train the same alone, together, interrupted and captured; cells are chosen and kept rightly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kimi_linear.config import Mixer
from kimi_linear.evals import TaskAccuracy
from kimi_linear.studies import synthetic
from kimi_linear.studies.synthetic import Cell, SyntheticConfig
from kimi_linear.studies.synthetic_training import Lane, Point, load_lane, run_lanes, save_lane

SMALL = SyntheticConfig(
    tasks="mqar", mixers="kda,mamba2", lengths="16,32", curve_length=32, lrs="1e-2,1e-3", seeds=2, steps=12, point_every=4,
    batch_size=4, width=16, heads=1, head_dim=16, feed_forward=16, mqar_symbols=32, symbols=8, palindrome_symbols=8, palindrome_distinct=False, stacks=2, warmup=2,
    schedule="constant", precision="fp32", device="cpu",
)  # fmt: skip
CELL = Cell(task="mqar", length=32, mixer="kda", lr=1e-2, seed=0)
CPU = torch.device("cpu")


def train(lanes: list[Lane]) -> list[list[Point]]:
    # run_lanes moves none where all have enough work ahead, too.
    while any(lane.step < lane.config.steps and not lane.curve.ended(lane.config) for lane in lanes):
        run_lanes(lanes)
        for lane in lanes:
            lane.poll()
    for lane in lanes:
        lane.poll(wait=True)
    return [lane.curve.points for lane in lanes]


def lane(cell: Cell = CELL, device: torch.device = CPU, saved=None, stream=None, **changes) -> Lane:
    config = replace(synthetic.lane_of(SMALL, cell), **changes)
    return Lane(config, device, saved, stream=stream)


def test_lanes_do_not_touch_each_other() -> None:
    others = [CELL, replace(CELL, mixer="gdn"), replace(CELL, task="stack", seed=1)]
    together = train([lane(cell) for cell in others])
    alone = [train([lane(cell)])[0] for cell in others]
    assert together == alone
    assert [p.step for p in together[0]] == [4, 8, 12]
    assert together[0] != together[1]


@pytest.mark.parametrize("steps", [0, 3, 10, 12])
def test_a_lane_continues_from_its_checkpoint_bit_for_bit(steps: int, tmp_path) -> None:
    whole = train([lane()])[0]
    first = lane()
    for _ in range(steps):
        first._one_step()
    first.poll(wait=True)
    save_lane(first, {"a": 1}, tmp_path / "lane.pt")
    saved = load_lane(tmp_path / "lane.pt", {"a": 1})
    again = lane(saved=saved)
    assert again.step == steps
    assert train([again])[0] == whole
    with pytest.raises(ValueError, match=r"expected the settings of now, got others for a"):
        load_lane(tmp_path / "lane.pt", {"a": 2})


def test_the_cosine_falls_to_a_tenth_at_the_last_step_and_goes_on_from_a_checkpoint() -> None:
    change = {"schedule": "cosine", "steps": 22, "lr": 1e-2, "decay_rate": 10.0, "gate_rate": 0.1}
    whole, rates = lane(**change), []
    for _ in range(22):
        whole._one_step()
        rates.append((whole._lr.item(), whole._decay_lr.item(), whole._gate_lr.item()))
    for step, rate in ((1, 5e-3), (2, 1e-2), (7, 1e-3 + 9e-3 * (2 + 2**0.5) / 4), (12, 5.5e-3), (22, 1e-3)):
        assert rates[step - 1] == pytest.approx((rate, 10 * rate, 0.1 * rate), rel=1e-6), step
    first = lane(**change)
    for _ in range(13):
        first._one_step()
    first.poll(wait=True)
    again = lane(saved=first.state(), **change)
    for _ in range(9):
        again._one_step()
    for mine, theirs in zip(again._lasting(), whole._lasting(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("rate", "names", "mixer", "count"),
    [
        ("decay_rate", ("A_log", "dt_bias"), "kda", 4),
        ("decay_rate", ("A_log", "dt_bias"), "gdn", 4),
        ("decay_rate", ("A_log", "dt_bias"), "mamba2", 4),
        ("gate_rate", ("f_a_proj.weight", "f_b_proj.weight"), "kda", 4),
        ("gate_rate", ("self_attn.a_proj.weight",), "gdn", 2),
        ("gate_rate", ("self_attn.a_proj.weight",), "mamba2", 2),
        ("gate_rate", ("self_attn.a_proj.weight",), "simple-gla", 2),
    ],
)
def test_decays_and_gates_have_learning_rates_of_their_own(
    rate: str, names: tuple[str, ...], mixer: str, count: int
) -> None:
    """AdamW's first step moves a number without weight decay by the rate, whatever its gradient."""
    cell = replace(CELL, mixer=mixer)
    # Short memories, and weights that let them be heard: else gates have gradients as small as AdamW's epsilon.
    model = replace(synthetic.model_of(SMALL, cell), initializer_range=0.1)
    same = {"warmup": 0, "weight_decay": 0.0, "dt_shift": 0.0, "model": model}
    start = {name: p.detach().clone() for name, p in lane(cell, **same).model.named_parameters()}
    moved = {}
    for factor in (1.0, 10.0):
        trained = lane(cell, **{rate: factor}, **same)
        trained._one_step()
        moved[factor] = {name: p.detach() - start[name] for name, p in trained.model.named_parameters()}
    faster = [name for name in start if name.endswith(names)]
    assert len(faster) == count
    for name in start:
        ratio = 10.0 if name in faster else 1.0
        torch.testing.assert_close(moved[10.0][name], ratio * moved[1.0][name], rtol=1e-3, atol=2e-6)
    assert max(moved[10.0][name].abs().max().item() for name in faster) == pytest.approx(10 * CELL.lr, rel=1e-2)


@pytest.mark.parametrize("task", synthetic.TASKS)
@pytest.mark.parametrize("mixer", ["kda", "gdn", "mamba2", "simple-gla", "mla"])
def test_the_last_block_of_scored_tokens_is_that_of_all(task: str, mixer: str) -> None:
    some = lane(replace(CELL, task=task, mixer=mixer))
    some._draw(0)
    tokens = some._tokens[0]
    whole = some.model.hidden_states(tokens)[:, some.config.task.scored]
    torch.testing.assert_close(some._scored(tokens), whole, rtol=1e-6, atol=1e-6)


def test_sequences_depend_on_task_and_seed_only() -> None:
    kda, other_lr, other_mixer, other_seed = (
        lane(cell) for cell in (CELL, replace(CELL, lr=1e-3), replace(CELL, mixer="gdn"), replace(CELL, seed=1))
    )
    for one in (kda, other_lr, other_mixer, other_seed):
        one._draw(3)
    assert torch.equal(kda._tokens, other_lr._tokens)
    assert torch.equal(kda._tokens, other_mixer._tokens)
    assert not torch.equal(kda._tokens, other_seed._tokens)
    before = kda._tokens.clone()
    kda._draw(4)
    assert not torch.equal(kda._tokens, before)


def test_the_curve_measures_what_an_evaluation_measures() -> None:
    """At a learning rate of nearly nothing the model stays as it is, so its curve is an estimate of its accuracy."""
    trained = lane(lr=2e-2, steps=60, point_every=20, batch_size=32)
    points = train([trained])[0]
    assert points[-1].loss < points[0].loss
    frozen = lane(lr=1e-12, steps=20, point_every=20, batch_size=64, weight_decay=0.0)
    with torch.no_grad():
        for mine, theirs in zip(frozen.model.parameters(), trained.model.parameters(), strict=True):
            mine.copy_(theirs)
    (point,) = train([frozen])[0]
    result = TaskAccuracy(task=frozen.config.task, samples=1280)(frozen.model).metrics
    assert point.token_accuracy == pytest.approx(result["token_accuracy"], abs=0.02)
    assert point.sequence_accuracy == pytest.approx(result["sequence_accuracy"], abs=0.02)


def test_a_training_ends_when_it_has_sat_at_its_aim() -> None:
    config = synthetic.lane_of(SMALL, CELL)
    curve = lane().curve
    for step, share in ((4, 1.0), (8, 0.9), (12, 1.0)):
        assert curve.ended(replace(config, steps=99, patience=2)) is None
        curve.points.append(Point(step=step, loss=1.0, token_accuracy=1.0, sequence_accuracy=share))
    assert curve.ended(replace(config, steps=99, patience=2)) is None
    assert curve.ended(config) == "steps"
    curve.points.append(Point(step=16, loss=1.0, token_accuracy=1.0, sequence_accuracy=0.9996))
    assert curve.ended(replace(config, steps=99, patience=2)) == "solved"
    curve.points.append(Point(step=20, loss=float("nan"), token_accuracy=1.0, sequence_accuracy=1.0))
    assert curve.ended(replace(config, steps=99, patience=2)) == "diverged"


@pytest.mark.parametrize(
    ("losses", "share", "ended"),
    [((5.0, 4.98, 4.97, 4.96), 0.0, "flat"), ((5.0, 4.98, 4.97, 4.94), 0.0, None), ((5.0, 4.98, 4.97, 4.96), 0.001, None), ((5.0, 4.98, 4.97), 0.0, None)],
)  # fmt: skip
def test_a_training_ends_when_nothing_has_come_of_many_steps(
    losses: tuple[float, ...], share: float, ended: str
) -> None:
    config = replace(synthetic.lane_of(SMALL, CELL), steps=99, flat=12)
    curve = lane().curve
    for i, loss in enumerate(losses):
        assert curve.ended(config) is None
        curve.points.append(Point(step=4 * (i + 1), loss=loss, token_accuracy=0.1, sequence_accuracy=share))
    assert curve.ended(config) == ended


@pytest.mark.parametrize("mixer", ["kda", "gdn", "mamba2", "simple-gla", "mla"])
def test_weights_rounded_together_train_as_autocast_rounds_them(mixer: Mixer) -> None:
    config = replace(synthetic.lane_of(SMALL, replace(CELL, mixer=mixer)), bf16=True)
    ours, autocast = Lane(config, CPU), Lane(config, CPU)
    autocast._rounded = []
    seen: list[torch.dtype] = []
    for projection, _, _ in ours._rounded:
        projection.register_forward_pre_hook(lambda module, _: seen.append(module.get_parameter("weight").dtype))
    for one in (ours, autocast):
        for _ in range(5):
            one._one_step()
    assert len(seen) == 5 * len(ours._rounded)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in ours.model.parameters())
    for (name, mine), theirs in zip(ours.model.named_parameters(), autocast.model.parameters(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.gpu
@pytest.mark.unpoisoned
@pytest.mark.parametrize("task", synthetic.TASKS)
def test_a_captured_step_trains_like_an_eager_one(task: str) -> None:
    """Points of a curve, captured, eager, and captured beside others: within what the order of atomic sums may change."""
    device = torch.device("cuda")
    config = replace(SMALL, head_dim=64, width=64, mqar_symbols=None, precision="bf16", device="cuda")
    cells = [
        replace(CELL, task=task, length=200, mixer=mixer) for mixer in ("kda", "gdn", "mamba2", "simple-gla", "mla")
    ]
    lanes = [synthetic.lane_of(config, cell) for cell in cells]
    lanes = [replace(one, steps=30, point_every=10, batch_size=8) for one in lanes]
    eager = [train([Lane(one, device)])[0] for one in lanes]
    captured = train([Lane(one, device, stream=torch.cuda.Stream(device)) for one in lanes])
    for cell, mine, theirs in zip(cells, captured, eager, strict=True):
        assert [p.step for p in mine] == [10, 20, 30]
        for p, q in zip(mine, theirs, strict=True):
            assert p.loss == pytest.approx(q.loss, rel=2e-2), cell.mixer
    # Interrupted within a pool and within a point, it goes on as it would have.
    first = Lane(lanes[0], device, stream=torch.cuda.Stream(device))
    with torch.cuda.stream(first.stream):
        for _ in range(15):
            first._one_step()
    first.poll(wait=True)
    again = Lane(lanes[0], device, first.state(), stream=torch.cuda.Stream(device))
    for p, q in zip(train([again])[0], captured[0], strict=True):
        assert p.loss == pytest.approx(q.loss, rel=2e-2)


@pytest.mark.gpu
@pytest.mark.unpoisoned
def test_another_gpu_trains_the_same() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config = replace(SMALL, head_dim=64, width=64, mqar_symbols=None, precision="bf16", device="cuda")
    one = replace(synthetic.lane_of(config, replace(CELL, length=200)), steps=30, point_every=10, batch_size=8)
    devices = [torch.device("cuda", n) for n in range(2)]
    first, second = train([Lane(one, device, stream=torch.cuda.Stream(device)) for device in devices])
    for p, q in zip(first, second, strict=True):
        assert p.loss == pytest.approx(q.loss, rel=2e-2)


def test_mamba2_has_one_key_head_and_its_own_gate_as_published() -> None:
    two = replace(SMALL, heads=2)
    shapes = {
        mixer: synthetic.model_of(two, replace(CELL, mixer=mixer)).linear for mixer in ("mamba2", "simple-gla", "kda")
    }
    assert shapes["simple-gla"] == shapes["kda"]
    own = {"num_heads": 1, "num_v_heads": 2, "output_gate": "swish", "output_gate_rank": "full"}
    assert shapes["mamba2"] == replace(shapes["kda"], **own)
