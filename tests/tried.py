# SPDX-License-Identifier: Apache-2.0
"""Pytest plugin: the end of a test run says how much was tried: bad inputs, crash points, planted bugs, draws.

A test counts by the fixture `tried`: `tried("crash points", 72)`. What failed is counted, too.
"""

from collections import Counter
from collections.abc import Callable

import pytest

_NAME = "tried"


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """Count something that this test tries."""

    def count(what: str, number: int = 1) -> None:
        request.node.user_properties.append((_NAME, (what, number)))

    return count


class Counting:
    """Adds up what the tests have counted, also in other processes."""

    def __init__(self):
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":
            for name, value in report.user_properties:
                if name == _NAME:
                    self.counts[value[0]] += value[1]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.counts:
            terminalreporter.write_line(f"tried: {told(self.counts)}")


def told(counts: Counter[str]) -> str:
    """Return the counts in words, by name."""
    return ", ".join(f"{number:,} {what}" for what, number in sorted(counts.items()))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Counting())
