"""The table of launch configurations: complete, written as the tuner writes it, and asked by one rule."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from kimi_linear.kernels.triton import configs
from kimi_linear.kernels.triton.configs import TABLE, Config, config_of, lookup, table

CLASSES = {"16 bit, W <= 4", "16 bit, W <= 8", "32 bit, W <= 4", "32 bit, W <= 8"}
WIDTHS = {"D <= 64", "D <= 128", "D <= 256", "D <= 1024", "D <= 4096", "D <= 8192"}
EXPECTED = {
    "short_conv_forward": (CLASSES, {"BT", "BD", "U"}),
    "short_conv_backward": (CLASSES, {"BT", "BD", "U"}),
    "l2norm_forward": (WIDTHS, {"BR"}),
    "l2norm_backward": (WIDTHS, {"BR"}),
    "gated_rmsnorm_forward": (WIDTHS, {"BR"}),
    "gated_rmsnorm_backward": (WIDTHS, {"BR", "PROGRAMS"}),
    "column_sum": ({"any"}, {"BP", "BD"}),
}


def test_every_kernel_has_three_architectures_and_every_entry_is_sound() -> None:
    for kernel, by_arch in table().items():
        assert {80, 90, 100} <= set(by_arch), kernel
        names = [set(classes) for classes in by_arch.values()]
        assert all(known == names[0] for known in names), f"{kernel}: an architecture lacks a class"
        for config in (entry for classes in by_arch.values() for entry in classes.values()):
            assert config.num_warps in (1, 2, 4, 8, 16, 32), kernel
            assert config.num_stages >= 1, kernel


@pytest.mark.parametrize("kernel", EXPECTED)
def test_the_pointwise_kernels_have_all_their_classes(kernel: str) -> None:
    classes, constants = EXPECTED[kernel]
    for arch, entries in table()[kernel].items():
        assert set(entries) == classes, arch
        assert all(set(entry.constants) == constants for entry in entries.values()), arch


def test_the_window_of_a_tile_lies_in_the_tile_before() -> None:
    """A tile reads W-1 tokens of its predecessor: one tile, so BT >= W - 1."""
    for kernel in ("short_conv_forward", "short_conv_backward"):
        assert all(entry["BT"] >= 7 for entries in table()[kernel].values() for entry in entries.values())


def test_the_newest_architecture_below_is_taken() -> None:
    assert lookup("column_sum", (8, 6), "any") is table()["column_sum"][80]["any"]
    assert lookup("column_sum", (9, 0), "any") is table()["column_sum"][90]["any"]
    assert lookup("column_sum", (12, 0), "any") is table()["column_sum"][100]["any"]
    assert config_of("column_sum", torch.zeros(1), "any") is table()["column_sum"][90]["any"]


def test_what_the_table_lacks_is_an_error() -> None:
    with pytest.raises(KeyError, match="column_sum: expected sm_80 or newer, got sm_75; use impl='torch'"):
        lookup("column_sum", (7, 5), "any")
    with pytest.raises(KeyError, match="column_sum on sm_90: expected one of any, got 'wide'"):
        lookup("column_sum", (9, 0), "wide")


def test_a_launch_takes_all_of_an_entry() -> None:
    config = Config(constants={"BT": 64}, num_warps=2, num_stages=3)
    assert config["BT"] == 64
    assert config.launch == {"BT": 64, "num_warps": 2, "num_stages": 3}
    assert Config(**config.to_json()) == config
    assert str(config) == "BT=64 warps=2 stages=3"
    narrow = Config(num_warps=4, maxnreg=168)
    assert narrow.options == {"num_warps": 4, "num_stages": 1, "maxnreg": 168}
    assert Config(**narrow.to_json()) == narrow
    assert str(narrow) == " warps=4 stages=1 maxnreg=168"


def test_the_tuner_writes_the_chosen_entry_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune = pytest.importorskip("benchmarks.ops.tune", reason="benchmarks are not installed with the package")
    copy = tmp_path / "configs.json"
    copy.write_text(TABLE.read_text())
    monkeypatch.setattr(tune, "TABLE", copy)
    before = json.loads(copy.read_text())
    assert tune.text_of(before) == copy.read_text()  # the committed file is what the tuner would write
    chosen = Config(constants={"BP": 7, "BD": 9}, num_warps=1)
    tune.write({("column_sum", "any"): chosen}, (9, 0))
    tune.write({("column_sum", "any"): chosen}, (12, 0))
    after = json.loads(copy.read_text())
    assert after["column_sum"]["90"]["any"] == after["column_sum"]["120"]["any"] == chosen.to_json()
    assert after["column_sum"]["100"] == before["column_sum"]["100"]
    assert {k: v for k, v in after.items() if k != "column_sum"} == {
        k: v for k, v in before.items() if k != "column_sum"
    }


def test_the_tuner_keeps_candidates_that_agree_with_the_present_entry_and_times_each_once() -> None:
    tune = pytest.importorskip("benchmarks.ops.tune", reason="benchmarks are not installed with the package")
    present, wrong, broken = (Config(constants={"B": size}) for size in (16, 32, 64))
    same = Config(constants={"B": 16}, num_warps=2)
    calls = []

    def run(config: Config) -> tuple[torch.Tensor]:
        calls.append(str(config))
        if config == broken:
            raise RuntimeError("out of shared memory")
        return (torch.full((8,), 2.0 if config == wrong else 1.0),)

    problem = tune.Problem(
        kernel="k", shape_class="any", about="", moved=8, candidates=(same, present, wrong, broken),
        build=lambda device: run,
    )  # fmt: skip
    good, bad = tune.usable(problem, present, "cpu")
    assert list(good) == [str(present), str(same)]
    assert [line.split(":")[0] for line in bad] == [str(wrong), str(broken)]
    assert sorted(calls) == sorted([str(present), *(str(c) for c in (present, same, wrong, broken))])


def test_no_kernel_is_tuned_when_it_is_called() -> None:
    folder = Path(configs.__file__).parent
    assert [
        file.name for file in folder.glob("*.py") if re.search(r"triton\.(autotune|heuristics)", file.read_text())
    ] == []
