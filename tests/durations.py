# SPDX-License-Identifier: Apache-2.0
"""Pytest plugin: tests that take long are left out, unless all are asked for.

`tests/long.txt` names them, one id a line. `scripts/test --note-long` runs every test and writes the file anew, so that
nobody decides by feeling; a test that has the marker `always` is never written there. A test that was renamed is run
again until the file is written anew: a line too many leaves nothing out.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

LONG = Path(__file__).with_name("long.txt")
SECONDS = 1.0  # of one test, with its set-up: longer is long


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("durations")
    group.addoption("--all", action="store_true", help="run the tests of tests/long.txt too")
    group.addoption("--note-long", action="store_true", help="run every test and write tests/long.txt anew")


def long_tests() -> frozenset[str]:
    """Return the ids in the file."""
    return frozenset(LONG.read_text().splitlines())


def chosen(ids: list[str], always: set[str], long: frozenset[str]) -> list[str]:
    """Return the ids that are not long, in their order."""
    return [one for one in ids if one not in long or one in always]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("all") or config.getoption("note_long")
    named = any("::" in argument for argument in config.args)  # somebody wants this very test
    if asked or named:
        return
    always = {item.nodeid for item in items if item.get_closest_marker("always")}
    keep = set(chosen([item.nodeid for item in items], always, long_tests()))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in keep])
    items[:] = [item for item in items if item.nodeid in keep]


class Noting:
    """Adds up the time of every test and writes the file at the end, in the process that sees all reports."""

    def __init__(self):
        self._seconds: Counter[str] = Counter()
        self._always: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._seconds[report.nodeid] += report.duration
        if "always" in report.keywords:
            self._always.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        long = sorted(one for one, seconds in self._seconds.items() if seconds > SECONDS and one not in self._always)
        LONG.write_text("".join(f"{one}\n" for one in long))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("note_long") and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Noting())
