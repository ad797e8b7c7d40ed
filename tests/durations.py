# SPDX-License-Identifier: Apache-2.0
"""Pytest plugin: tests that take long are left out, unless all are asked for.

`tests/long.txt` names them, one id a line. `scripts/test --note-long` runs every test and writes the file anew, so that
nobody decides by feeling; a test that has the marker `always` is never written there. A test that was renamed is run
again until the file is written anew: a line too many leaves nothing out.
"""

import os
from collections.abc import Generator
from pathlib import Path

import pytest
from pytest import TestReport

LONG = Path(__file__).with_name("long.txt")
SECONDS = 0.6  # of processor time, with those of a test's own processes and its set-up: longer is long
_BEGAN = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("durations")
    group.addoption("--all", action="store_true", help="run the tests of tests/long.txt too")
    group.addoption("--long", action="store_true", help="run the tests of tests/long.txt only")
    group.addoption("--note-long", action="store_true", help="run every test and write tests/long.txt anew")


def long_tests() -> frozenset[str]:
    """Return the ids in the file."""
    return frozenset(LONG.read_text().splitlines())


def chosen(ids: list[str], always: set[str], long: frozenset[str], *, only_long: bool = False) -> list[str]:
    """Return the ids that are not long, or those that are, in their order."""
    return [one for one in ids if (one in long and one not in always) == only_long]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("all") or config.getoption("note_long")
    named = any("::" in argument for argument in config.args)  # somebody wants this very test
    if asked or named:
        return
    always = {item.nodeid for item in items if item.get_closest_marker("always")}
    keep = set(chosen([item.nodeid for item in items], always, long_tests(), only_long=config.getoption("long")))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in keep])
    items[:] = [item for item in items if item.nodeid in keep]


def _processor_seconds() -> float:
    """Return the processor time of this process and of those that it has waited for; other work makes it no longer."""
    return sum(os.times()[:4])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_BEGAN] = _processor_seconds()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Generator[None, TestReport, TestReport]:
    if call.when == "teardown":
        item.user_properties.append(("processor", _processor_seconds() - item.stash[_BEGAN]))
    return (yield)


class Noting:
    """Writes the file at the end, in the process that sees all reports."""

    def __init__(self):
        self._long: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if dict(report.user_properties).get("processor", 0) > SECONDS and "always" not in report.keywords:
            self._long.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        LONG.write_text("".join(f"{one}\n" for one in sorted(self._long)))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("note_long") and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Noting())
