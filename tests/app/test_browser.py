# SPDX-License-Identifier: Apache-2.0
"""The report in a browser, offline: no error, one request, accessible in light and dark, sortable, printed whole."""

import re
import sys
from pathlib import Path

import pytest

CHROMIUM = Path("/usr/bin/chromium")  # Debian's; playwright's own would be downloaded
if not CHROMIUM.exists():
    pytest.skip("needs /usr/bin/chromium", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api")
axe_api = pytest.importorskip("axe_playwright_python.sync_playwright")

sys.path.insert(0, str(Path(__file__).parents[1] / "runs"))
from test_pages import RANKING, evaluation, facts, hostile, large  # noqa: E402

from dpquant.runs.pages.comparison import comparison  # noqa: E402
from dpquant.runs.pages.report import report  # noqa: E402

PAGES = {
    "a run": lambda: report(facts()),
    "a large network": lambda: report(facts(large())),
    "hostile texts": lambda: report(hostile()),
    "an evaluation": lambda: report(facts(evaluation=evaluation(2, ranking=RANKING))),
    "an evaluation of many classes": lambda: report(facts(evaluation=evaluation(47))),
    "a comparison": lambda: comparison([facts(), hostile()], together="epsilon = 12.5 at delta = 1e-05"),
}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser, path, scheme="light"):
    """The page, what it said on the console or threw, and the addresses that it asked for."""
    page = browser.new_context(offline=True, color_scheme=scheme, viewport={"width": 1000, "height": 1300}).new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    return page, said, asked


def violations(page):
    """What axe-core finds. It is run by the test, past the page's own policy."""
    return [(one["id"], one["nodes"][0]["html"][:120]) for one in axe_api.Axe().run(page).response["violations"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_quiet_offline_and_accessible(name, scheme, browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(PAGES[name]())
    page, said, asked = opened(browser, path, scheme)
    assert said == [] and asked == [path.as_uri()]
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_page_that_asks_the_network_or_has_no_contrast_would_be_seen(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        report(facts()).replace(
            "</h1>", '</h1><img src="https://example.org/x.png"><p style="color:#eee">pale words</p>', 1
        )
    )
    page, said, _ = opened(browser, path)
    assert any("Content Security Policy" in one for one in said)
    assert {"color-contrast", "image-alt"} <= {name for name, _ in violations(page)}


def test_a_click_or_enter_sorts_and_the_map_tells_its_cells(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(report(facts()))
    page, *_ = opened(browser, path)
    table = page.locator("table", has=page.locator("th button")).first
    column = [float(text) for text in table.locator("tbody td:nth-child(2)").all_inner_texts()]
    button = table.locator("th button").nth(1)
    button.click()
    assert [float(t) for t in table.locator("tbody td:nth-child(2)").all_inner_texts()] == sorted(column)
    button.focus()
    page.keyboard.press("Enter")
    assert [float(t) for t in table.locator("tbody td:nth-child(2)").all_inner_texts()] == sorted(column)[::-1]
    page.locator("#map").hover(position={"x": 60, "y": 8})
    assert re.match(r"layer 0, epoch [12]: ", page.locator("#told").inner_text())


def test_everything_is_printed_and_the_first_page_has_the_signature(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(report(facts()))
    page, *_ = opened(browser, path)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    assert page.locator("details:not([open])").count() == 0 and page.locator("#statement").is_visible()
    a4 = 297 / 25.4 * 96 - 2 * 15 / 25.4 * 96
    page.set_viewport_size({"width": 672, "height": 1000})
    assert page.locator("#ran").bounding_box()["y"] < a4 and page.locator(".sheet").bounding_box()["height"] <= a4
    assert len(page.pdf(prefer_css_page_size=True)) > 10_000
