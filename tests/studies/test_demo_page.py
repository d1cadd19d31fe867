"""The page of a real, short demo in a real browser: what it shows is what was measured."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator

import pytest

from kimi_linear.studies.demo import PAGE, RESULTS, DemoConfig, run_demo

pytestmark = [pytest.mark.browser, pytest.mark.unpoisoned]

FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


class Silent:
    def say(self, text): ...

    def write(self, piece): ...

    def table(self, rows): ...

    def track(self, items, total, *, step, describe) -> Iterator:
        return iter(items)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "demo"
    config = DemoConfig(
        folder=folder, steps=4, batch_size=2, sequence_length=64, corpus_bytes=300_000, sample_tokens=16,
        decode_seconds=0.2, longest_context=4096, recall_seconds=1.0, recall_pairs=2, threads=1, device="cpu",
    )  # fmt: skip
    run_demo(config, Silent())
    return folder


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    executable = next(path for name in NAMES if (path := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(params=[(1280, "light"), (400, "dark")], ids=["desk", "phone"])
def page(request, browser, folder):
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.troubles = []
    page.on("console", lambda message: page.troubles.append(message.text))
    page.on("pageerror", lambda error: page.troubles.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else page.troubles.append(r.url))
    page.goto((folder / PAGE).as_uri())
    yield page
    context.close()
    assert page.troubles == []


def values(folder):
    return json.loads((folder / RESULTS).read_text(encoding="utf-8"))


def test_the_headline_says_what_the_file_says(page, folder):
    results = values(folder)
    shown = {b.get_attribute("data-fact"): b.inner_text() for b in page.query_selector_all("h1 b")}
    trainings = {t["model"]: t for t in results["trainings"]}
    for model, training in trainings.items():
        assert shown[f"{model}.bits_per_byte"] == f"{training['validation'][-1]['value'] / math.log(2):.2f}"
    hybrid, attention = (
        next(d for d in results["decoding"] if d["model"] == m)["points"][-1] for m in ("hybrid", "attention")
    )
    assert shown["decoding.context"] == "4K" == f"{hybrid['context'] // 1024}K"
    assert shown["decoding.cache_ratio"] == f"{attention['cache_bytes'] / hybrid['cache_bytes']:.1f}× smaller"
    ratio = attention["seconds_per_token"] / hybrid["seconds_per_token"]
    assert shown["decoding.speed_ratio"].startswith(f"{max(ratio, 1 / ratio):.1f}×")
    assert float(shown["recall"].rstrip("%")) == pytest.approx(
        100 * results["recall"]["points"][-1]["value"], abs=0.051
    )


def test_every_figure_can_be_seen(page):
    for name in ("loss", "recall", "time", "cache"):
        box = page.locator(f"#figure-{name} svg").bounding_box()
        assert box["width"] > 250
        assert box["height"] > 150
        # A line that is there, and not a speck.
        line = page.locator(f"#figure-{name} polyline").last.bounding_box()
        assert line["width"] > 100 or name == "recall"
    maps = page.locator(".panel:visible .heatmap")
    assert maps.count() == 3
    for i in range(3):
        assert maps.nth(i).bounding_box()["height"] > 100
        assert maps.nth(i).evaluate("image => image.naturalHeight") == 64
    assert page.locator(".panel:visible .bars").count() == 9


def test_pointing_at_a_token_shows_its_numbers(page, folder):
    memory = values(folder)["memory"]
    for index in (5, 12, 2):
        page.locator(f'.token[data-token="{index}"]').scroll_into_view_if_needed()
        page.locator(f'.token[data-token="{index}"]').hover()
        assert page.locator("#readout .what").inner_text() == memory["tokens"][index]
        for head in (h for h in memory["heads"] if h["head"] == 0):
            row = page.locator(f'#readout tr[data-layer="{head["layer"]}"]')
            kept = sum(math.exp(g) for g in head["log_decay"][index]) / len(head["log_decay"][index])
            assert float(row.locator(".forgotten").inner_text().rstrip(" %")) == pytest.approx(
                100 * (1 - kept), abs=0.06
            )
            assert row.locator(".beta").inner_text() == f"{head['beta'][index]:.3f}"
            assert float(row.locator(".correction").inner_text()) == pytest.approx(head["correction"][index], rel=6e-3)
            percent = 100 * head["correction"][index] / head["value"][index]
            assert float(row.locator(".share").inner_text().rstrip(" %")) == pytest.approx(percent, abs=0.51)


def test_the_other_head_is_shown_when_asked_for(page, folder):
    memory = values(folder)["memory"]
    page.locator('.heads button[data-head="1"]').click()
    assert page.locator(".panel:visible").count() == 3
    assert page.locator('.panel:visible[data-head="1"]').count() == 3
    page.locator('.token[data-token="3"]').hover()
    head = next(h for h in memory["heads"] if (h["layer"], h["head"]) == (2, 1))
    assert page.locator('#readout tr[data-layer="2"] .beta').inner_text() == f"{head['beta'][3]:.3f}"


def test_the_keyboard_moves_along_the_tokens(page, folder):
    tokens = values(folder)["memory"]["tokens"]
    page.locator('.token[data-token="4"]').hover()
    page.mouse.move(0, 0)
    page.locator(".scroller").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#readout .what").inner_text() == tokens[5]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#readout .where").inner_text().startswith("token 3 of")


def test_the_page_never_scrolls_sideways(page):
    for state in ("as it opens", "with every table open"):
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert overflow == 0, state
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
