"""The report in a real browser: nothing is fetched, nothing overflows, every figure is drawn, at two widths."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import sync_playwright
from sweeps import ENDS, change, write_sweep

from upcycle.dashboard.config import ReportConfig
from upcycle.dashboard.page import write_report

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
WIDTHS = (1280, 400)  # pixels
# Boxes of one figure's texts that lie over each other; a pixel is forgiven to rounding.
OVERLAPS = """plot => {
  const boxes = [...plot.querySelectorAll(".infolayer text, .xtick text, .ytick text")]
    .filter(text => text.textContent.trim()).map(text => [text.textContent, text.getBoundingClientRect()]);
  const before = (a, b) => a.right <= b.left + 1 || a.bottom <= b.top + 1;
  const apart = (a, b) => before(a, b) || before(b, a);
  return boxes.flatMap(([one, a], i) =>
    boxes.slice(i + 1).filter(([_, b]) => !apart(a, b)).map(([other]) => [one, other]));
}"""
FITS = "document.documentElement.scrollWidth <= innerWidth"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a sweep in which a run failed and one never began."""
    place = write_sweep(tmp_path_factory.mktemp("sweep") / "runs")
    change(place / "copies-1-2", status="failed", error="the loss is not finite\n" + "long" * 200)
    shutil.rmtree(place / "copies-2-2")
    options: dict[str, Any] = {"name": None, "arms": None, "baseline": None, "metric": None, "allow": []}
    return write_report(ReportConfig(runs=str(place), output=str(place.parent / "report.html"), **options))


@pytest.fixture(scope="module", params=[(width, scheme) for width in WIDTHS for scheme in ("light", "dark")], ids=str)
def page(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Page]:
    """The report as it is shown; what the browser complains of or asks for is an error."""
    width, scheme = request.param
    opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda asked: said.append(asked.url))
    opened.goto(report.as_uri())
    yield opened
    opened.close()
    assert said == [report.as_uri()]


def test_nothing_overflows(page: Page) -> None:
    assert page.evaluate(FITS)
    outside = page.evaluate(
        "[...document.querySelectorAll('main > *, .card, .js-plotly-plot')]"
        ".filter(each => each.getBoundingClientRect().right > innerWidth).map(each => each.className)"
    )
    assert outside == []


def test_a_table_that_did_not_scroll_would_overflow(page: Page) -> None:
    """The mutant of the test above."""
    tables = "document.querySelectorAll('.scroll').forEach(each => each.style.{})"
    page.evaluate(tables.format("cssText = 'overflow: visible; width: 2000px'"))
    assert not page.evaluate(FITS)
    page.evaluate(tables.format("cssText = ''"))
    assert page.evaluate(FITS)


def test_every_figure_is_drawn_and_its_words_stand_apart(page: Page) -> None:
    plots = page.query_selector_all(".js-plotly-plot")
    assert len(plots) == page.locator("h3").count() + 1
    for plot in plots:
        drawn = plot.query_selector_all(".scatterlayer .trace path, .heatmaplayer image")
        assert drawn, plot.get_attribute("id")
        box, card = (
            plot.bounding_box(),
            plot.evaluate_handle("plot => plot.closest('.card')").as_element().bounding_box(),
        )
        assert box["width"] > 200
        assert box["x"] + box["width"] <= card["x"] + card["width"]
        assert plot.evaluate(OVERLAPS) == []


def test_words_can_be_read(page: Page) -> None:
    """In light and dark: contrast of 4.5, the WCAG's AA."""
    colours = page.evaluate(
        """[["h1", "color"], [".caption", "color"], [".xtick text", "fill"]].map(([what, property]) => [
          getComputedStyle(document.querySelector(what))[property], getComputedStyle(document.body).backgroundColor
        ])"""
    )
    for ink, paper in colours:
        lighter, darker = sorted(map(luminance, (ink, paper)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) >= 4.5, (ink, paper)


def luminance(colour: str) -> float:
    """Of CSS's rgb(…), as WCAG 2 defines it."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_an_arm_can_be_hidden(page: Page) -> None:
    shown = "[...document.querySelectorAll('.scatterlayer .trace')].length"
    before = page.evaluate(shown)
    page.locator(".legend input").nth(list(ENDS).index("init=copy")).uncheck()
    page.wait_for_function(f"{shown} < {before}")
    page.locator(".legend input").nth(list(ENDS).index("init=copy")).check()
    page.wait_for_function(f"{shown} === {before}")


def test_a_screenshot_is_not_blank(page: Page, tmp_path: Path) -> None:
    """The whole page; a blank one of this size takes a few kB."""
    assert len(page.screenshot(path=tmp_path / "report.png", full_page=True)) > 100_000
