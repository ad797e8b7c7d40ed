# SPDX-License-Identifier: Apache-2.0
"""The page of `dpquant watch` in a browser: live, quiet, accessible in light and dark, of use without JavaScript."""

import contextlib
import dataclasses
import math
import sys
import threading
from pathlib import Path

import pytest
from markupsafe import Markup

sys.path.insert(0, str(Path(__file__).parents[1] / "runs"))
sys.path.insert(0, str(Path(__file__).parent))
from test_alerts import ANALYSED, WELL, epochs
from test_browser import CHROMIUM, sync_api, violations

from dpquant.app.watch import Feed, WatchServer
from dpquant.runs.alerts import alerts
from dpquant.runs.pages.watch import parts
from dpquant.runs.status import Pace, RunStatus

LAYERS = [f"features.{number}" for number in range(8)]


def going(number):
    """A run of ten epochs after so many of them."""
    done = [
        dataclasses.replace(
            one, epsilon=8 * math.sqrt((index + 1) / 10), scores={name: 0.01 * n for n, name in enumerate(LAYERS)},
            layers_quantized=[name for n, name in enumerate(LAYERS) if (n + index) % 3],
        )
        for index, one in enumerate(epochs(*[0.9 - 0.7 * 0.5**k for k in range(number)]))
    ]  # fmt: skip
    return dataclasses.replace(
        WELL, **ANALYSED, per_epoch=done, step=20 * number + 7, layers=LAYERS, gains={"features.1": 0.8},
        epsilon=done[-1].epsilon, curve=[8 * math.sqrt(k / 10) for k in range(1, 11)],
        pace=Pace(silent=1.0, examples_per_second=1234.0, seconds_a_step=0.2, seconds_left=70.0),
    )  # fmt: skip


HOSTILE = "<img src=x onerror=alert(1)>" + "x" * 200
STATES = {
    "going": going(4),
    "waiting": RunStatus(name="fashion", phase="waiting"),
    "stopped": dataclasses.replace(going(6), phase="stopped", records=100_000, unsafe_metrics=True),
    "finished": dataclasses.replace(going(10), phase="finished", pace=None, step=200),
    "hostile": dataclasses.replace(
        going(2), name=HOSTILE, model=HOSTILE, layers=[HOSTILE], trouble=HOSTILE, policy=HOSTILE, format=HOSTILE
    ),
}


@contextlib.contextmanager
def serving(status):
    """A server that shows a state, and its feed."""
    feed = Feed()
    feed.publish(parts(status, alerts(status)), over=status.phase == "finished")
    with WatchServer(0, feed) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield server, feed
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def opened(browser, server, *, scheme="light", scripts=True):
    """The page, what it said on the console or threw, and the addresses that it asked for."""
    context = browser.new_context(
        color_scheme=scheme, viewport={"width": 1000, "height": 1100}, java_script_enabled=scripts
    )
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    try:
        yield page, said, asked
    finally:
        context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", STATES)
def test_a_page_is_quiet_and_accessible_and_asks_its_server_alone(name, scheme, browser):
    with serving(STATES[name]) as (server, _), opened(browser, server, scheme=scheme) as (page, said, asked):
        page.locator("#link", has_text="live" if name != "finished" else "has ended").wait_for()
        assert said == [] and asked == [server.url, f"{server.url}events"]
        page.locator("summary").click()
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_it_follows_the_run_and_leaves_alone_what_has_not_changed(browser):
    with serving(going(2)) as (server, feed), opened(browser, server) as (page, said, asked):
        page.locator("#link", has_text="live").wait_for()
        page.locator("summary").click()
        page.evaluate("document.getElementById('head').firstElementChild.id = 'kept'")
        assert page.title() == "24% cnn on digits" and page.locator("#numbers tbody").nth(1).locator("tr").count() == 2
        status = going(5)
        feed.publish(parts(status, alerts(status)), over=False)
        page.locator(".figure", has_text="107").wait_for()
        assert page.title() == "54% cnn on digits" and page.locator("#numbers tbody").nth(1).locator("tr").count() == 5
        assert page.locator("details[open]").count() == 1 and page.locator("#kept").count() == 1
        status = dataclasses.replace(going(10), phase="finished", pace=None, step=200)
        feed.publish(parts(status, alerts(status)), over=True)
        page.locator("#link", has_text="the run has ended").wait_for()
        assert page.locator(".phase").inner_text() == "finished" and said == [] and len(asked) == 2


def test_it_comes_back_when_the_connection_was_lost(browser):
    with serving(going(2)) as (server, feed), opened(browser, server) as (page, _, asked):
        page.locator("#link", has_text="live").wait_for()
        page.context.set_offline(True)
        page.context.set_offline(False)
        status = going(3)
        feed.publish(parts(status, alerts(status)), over=False)
        page.locator(".figure", has_text="67").wait_for(timeout=20_000)
        assert set(asked) == {server.url, f"{server.url}events"}


def test_without_javascript_it_is_loaded_anew(browser):
    with serving(going(2)) as (server, feed), opened(browser, server, scripts=False) as (page, said, _):
        assert page.locator(".figure", has_text="47").count() == 1 and "without JavaScript" in page.inner_text("footer")
        status = going(3)
        feed.publish(parts(status, alerts(status)), over=False)
        page.locator(".figure", has_text="67").wait_for(timeout=20_000)
        assert said == []


@pytest.mark.parametrize(
    "planted",
    [
        '<img src="https://example.org/x.png" alt="">',
        "<script>document.title = 'taken'</script>",
        "<p onclick='x()' style='color:red'>x</p>",
    ],
    ids=["another address", "a script", "a style"],
)
def test_markup_that_should_not_be_there_does_nothing(planted, browser):
    """If a text of a run became markup, the policy would still stop it, and say so."""
    with serving(going(2)) as (server, feed):
        found = parts(going(2), [])
        feed.publish({**found, "alerts": Markup(planted)}, over=False)
        with opened(browser, server) as (page, said, _):
            failed = []
            page.on("requestfailed", lambda request: failed.append((request.url, request.failure)))
            page.reload()
            page.locator("#link", has_text="live").wait_for()
            assert any("Content Security Policy" in one for one in said) and page.title() == "24% cnn on digits"
            assert ("https://example.org/x.png", "csp") in failed or "example.org" not in planted
