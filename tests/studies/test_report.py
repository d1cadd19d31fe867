"""The report: data that survives the file, pictures whose pixels are the numbers, a page that leaves nothing out."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from kimi_linear.studies.report import machine
from kimi_linear.studies.report.charts import Axis, Series, line_chart, round_ticks
from kimi_linear.studies.report.memory import bars, half_lives, heatmap, panel
from kimi_linear.studies.report.page import charts, count, duration, facts, render, size_in_words, tables
from kimi_linear.studies.report.results import DemoResults, read_results, write_results

sys.path.insert(0, str(Path(__file__).parent))
from sample_results import SENTENCE, sample_results


@pytest.fixture(scope="module")
def results() -> DemoResults:
    return sample_results()


def empty(results: DemoResults) -> DemoResults:
    return dataclasses.replace(
        results, trainings=(), sample=None, decoding=(), recall=None, memory=None, seconds={}, missing=("everything",)
    )


# The file


def test_results_come_back_equal(results, tmp_path):
    for stage, wanted in {"whole": results, "empty": empty(results)}.items():
        write_results(wanted, tmp_path / f"{stage}.json")
        assert read_results(tmp_path / f"{stage}.json") == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty.json", "whole.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(schema=0), "expected schema 1, got 0"),
        (lambda v: v.update(colour="red"), "expected the keys"),
        (lambda v: v["machine"].pop("cores"), "machine: expected the keys"),
        (lambda v: v["trainings"][0].update(parameters="many"), "trainings[0]: parameters: expected"),
        (lambda v: v["decoding"][1].update(model="rnn"), "decoding[1]: model: expected"),
        (lambda v: v["recall"].update(points=None), "recall: points: expected"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(results, tmp_path, change, message):
    path = tmp_path / "results.json"
    write_results(results, path)
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_results(path)
    path.write_text(path.read_text(encoding="utf-8")[:-50], encoding="utf-8")
    with pytest.raises(ValueError, match="does not parse"):
        read_results(path)


def test_a_number_that_json_cannot_hold_is_refused_and_the_old_file_stays(results, tmp_path):
    path = tmp_path / "results.json"
    write_results(results, path)
    broken = dataclasses.replace(results, seconds={"training": math.nan})
    with pytest.raises(ValueError):
        write_results(broken, path)
    assert read_results(path) == results


# The pictures


def test_ticks_are_round_and_inside():
    assert round_ticks(0, 368_640, log=False) == [0, 100_000, 200_000, 300_000]
    assert round_ticks(0, 1, log=False) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert round_ticks(-0.3, 0.3, log=False) == pytest.approx([-0.2, 0, 0.2])
    assert round_ticks(1, 10_000, log=True) == [1, 10, 100, 1000, 10_000]
    assert round_ticks(2.1, 8.9, log=True) == [3, 4, 5, 6, 8]
    assert round_ticks(5, 5, log=False) == [5]


def drawn(svg: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline[^>]* points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def test_a_log_axis_draws_equal_ratios_at_equal_distances():
    points = [(1024 * 2**i, 3.0 * 4**i) for i in range(5)]
    svg = line_chart(
        [Series(label="a", color="red", points=points)],
        title="t", x=Axis(label="x", log=True), y=Axis(label="y", log=True),
    )  # fmt: skip
    (line,) = drawn(svg)
    steps = np.diff(np.array(line), axis=0)
    np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), atol=0.11)
    assert steps[0][0] > 50  # to the right
    assert steps[0][1] < -30  # and up


def test_a_linear_axis_draws_values_in_proportion():
    points = [(0.0, 0.0), (1.0, 0.25), (4.0, 1.0)]
    svg = line_chart([Series(label="a", color="red", points=points)], title="t", x=Axis(label="x"), y=Axis(label="y"))
    (line,) = drawn(svg)
    (x0, y0), (x1, y1), (x2, y2) = line
    assert (x1 - x0) / (x2 - x0) == pytest.approx(0.25, abs=1e-3)
    assert (y1 - y0) / (y2 - y0) == pytest.approx(0.25, abs=1e-3)


def test_charts_that_cannot_be_drawn_say_why():
    axis = Axis(label="loss", log=True)
    with pytest.raises(ValueError, match="at least one point"):
        line_chart([], title="t", x=axis, y=axis)
    zero = Series(label="a", color="red", points=[(0.0, 1.0)])
    with pytest.raises(ValueError, match="loss: a log axis needs positive values, got 0"):
        line_chart([zero], title="t", x=axis, y=axis)


def test_the_charts_show_every_measured_point(results):
    svgs = charts(results)
    assert set(svgs) == {"loss", "time", "cache", "recall"}
    titles = re.findall(r"<title>(.*?)</title>", svgs["time"])
    assert "hybrid, tokens of context 64K: 5.62144" in titles
    assert len(titles) == 14
    assert len(drawn(svgs["loss"])) == 4
    for line in drawn(svgs["time"]):
        heights = [y for _, y in line]
        assert heights == sorted(heights, reverse=True)


def test_half_life_is_ln2_over_the_rate():
    lives = half_lives([[-math.log(2), -math.log(2) / 8, 0.0]])
    np.testing.assert_allclose(lives[0][:2], [1.0, 8.0], rtol=1e-15)
    assert lives[0][2] == math.inf


def test_the_heatmap_has_a_pixel_per_token_and_channel_sorted_by_half_life():
    import matplotlib
    from matplotlib.image import imread

    lives = np.array([[1.0, 1e6, 300**0.5], [1.0, 300.0, 300**0.5]])
    uri = heatmap(lives)
    pixels = imread(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))), format="png")
    assert pixels.shape[:2] == (3, 2)
    scale = matplotlib.colormaps["viridis"]
    for row, share in enumerate([1.0, 0.5, 0.0]):
        np.testing.assert_allclose(pixels[row, 0, :3], scale(share)[:3], atol=1 / 128)


def test_bars_are_as_high_as_their_values():
    svg = bars([0.0, 0.5, 1.0, 2.0], ceiling=1.0, color="red", name="beta")
    assert [float(h) for h in re.findall(r'<rect[^>]* height="([^"]*)"', svg)] == [0, 17, 34, 34]
    svg = bars([1.0], ceiling=4.0, color="red", name="correction", behind=[2.0])
    assert re.findall(r'<rect class="([^"]*)"[^>]* height="([^"]*)"', svg) == [("pale", "17.0"), ("solid", "8.5")]


def test_the_panel_holds_each_tokens_numbers(results):
    head = results.memory.heads[3]
    shown = panel(head)
    assert shown.beta == head.beta
    assert shown.forgotten[5] == pytest.approx(1 - sum(math.exp(g) for g in head.log_decay[5]) / 64, rel=1e-12)
    assert shown.most_forgotten == max(shown.forgotten)
    assert shown.ceiling == max(*head.correction, *head.value)
    np.testing.assert_allclose(shown.half_lives[5][1], np.median(np.log(2) / -np.array(head.log_decay[5])), rtol=1e-12)


# The page


def test_the_facts_are_those_of_the_results(results):
    found = {fact.name: fact for fact in facts(results)}
    assert found["hybrid.bits_per_byte"].value == results.training("hybrid").validation[-1].value / math.log(2)
    assert found["decoding.context"].text == "64K"
    assert found["decoding.speed_ratio"].value == pytest.approx((2.5e-3 + 2.5e-7 * 65536) / (3e-3 + 4e-8 * 65536))
    assert found["decoding.speed_ratio"].text == "3.4× faster"
    assert found["decoding.cache_ratio"].value == 1536 * 65536 / (270_000 + 384 * 65536)
    assert found["recall"].text == "99.1%"
    assert facts(empty(results)) == []


def test_a_hybrid_that_lost_is_said_to_have_lost(results):
    swapped = tuple(
        dataclasses.replace(d, points=o.points)
        for d, o in zip(results.decoding, reversed(results.decoding), strict=True)
    )
    found = {fact.name: fact.text for fact in facts(dataclasses.replace(results, decoding=swapped))}
    assert found["decoding.speed_ratio"] == "3.4× slower"
    assert found["decoding.cache_ratio"] == "4.0× larger"


def test_the_page_holds_every_part_and_needs_no_network(results):
    page = render(results)
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert "http://" not in page
    assert "https://" not in page
    for fact in facts(results):
        if fact.name in re.findall(r'data-fact="([^"]*)"', page):
            assert f'data-fact="{fact.name}">{html.escape(fact.text)}</b>' in page
    assert "self, &lt;name&gt;" in page
    assert "<name>" not in page
    assert page.count('class="token"') == len(SENTENCE)
    assert page.count('class="heatmap"') == 6
    hover = json.loads(re.search(r'id="hover">(.*?)</script>', page, re.DOTALL)[1])
    assert hover["panels"][2]["beta"] == list(results.memory.heads[2].beta)


def test_an_interrupted_run_shows_what_there_is_and_names_what_is_missing(results):
    part = dataclasses.replace(results, decoding=(), recall=None, memory=None, missing=("cost of a token", "recall"))
    page = render(part)
    assert "Missing: cost of a token; recall." in page
    assert 'id="figure-loss"' in page
    assert 'id="figure-time"' not in page
    assert 'id="memory"' not in page
    assert "<script" not in page
    nothing = render(empty(results))
    assert "Nothing was measured yet." in nothing
    assert "Test CPU" in nothing


def test_the_tables_hold_the_numbers(results):
    found = {table.title: table for table in tables(results)}
    decoding = found["Cost of a generated token against context"]
    assert list(decoding.rows[-1]) == ["65,536", "5.621", "18.884", "25,435,824", "100,663,296"]
    assert found["Training"].rows[0][2:5] == ["1,068,000", "90 of 90", "368,640"]
    assert found["Time taken"].rows[-1] == ["in all", "126.0 s"]
    assert all(len(row) == len(table.columns) for table in found.values() for row in table.rows)


def test_numbers_in_words():
    assert [count(n) for n in (950, 8100, 1_068_000, 49_122_681_728)] == ["950", "8.1K", "1.07M", "49.1B"]
    assert [size_in_words(n) for n in (512, 393_216, 100_663_296)] == ["512 B", "384 KiB", "96 MiB"]
    assert [duration(s) for s in (3.21, 71.6, 145.2)] == ["3.2 s", "72 s", "2 min 25 s"]


# The machine


CPUINFO = "\n\n".join(
    f"processor\t: {i}\nmodel name\t: Test  CPU 9000\nphysical id\t: 0\ncore id\t\t: {i // 2}" for i in range(8)
)


def test_hyperthreads_share_a_core_and_quotas_count(tmp_path, monkeypatch):
    cpuinfo, quota = tmp_path / "cpuinfo", tmp_path / "cpu.max"
    cpuinfo.write_text(CPUINFO)
    monkeypatch.setattr(machine, "CPUINFO", cpuinfo)
    monkeypatch.setattr(machine, "CGROUP_QUOTA", quota)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.physical_cores() == 4
    assert machine.cpu_name() == "Test CPU 9000"
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert machine.physical_cores() == 2
    quota.write_text("max 100000\n")
    assert machine.physical_cores() == 2
    quota.write_text("100000 100000\n")
    assert machine.physical_cores() == 1
    cpuinfo.unlink()
    quota.unlink()
    assert machine.physical_cores() == 3
