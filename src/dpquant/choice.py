# SPDX-License-Identifier: Apache-2.0
"""Chooses the fastest of several ways to compute the same thing, by trying each once on this machine.

A choice is made once a process for every question (an operation and the shapes that it meets) and then kept, so that a
run computes the same sums at every step. Ways are tried on made-up operands: nothing here sees data.
"""

import time
from collections.abc import Callable, Hashable, Mapping

_ROUNDS = 3
_HOPELESS = 3  # times slower than the best so far: not run again

_choices: dict[Hashable, dict[str, float]] = {}


def fastest(question: Hashable, ways: Mapping[str, Callable[[], object]]) -> str:
    """The name of the way that took the least time.

    Args:
      question: what is asked, shapes included.
      ways: {name: does the work once}; at least one.
    """
    if question not in _choices:
        _choices[question] = timed(ways) if len(ways) > 1 else dict.fromkeys(ways, 0.0)
    return min(ways, key=_choices[question].__getitem__)


def timed(ways: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """{name: seconds that the way took, at best}.

    All are run in turn, several times: what disturbs a machine for a while shall not decide.
    """
    seconds: dict[str, float] = {}
    for name, work in ways.items():
        work()  # fills caches, asks the questions that it has itself
        seconds[name] = _seconds(work)
    for _ in range(_ROUNDS - 1):
        hopeful = [name for name in ways if seconds[name] <= _HOPELESS * min(seconds.values())]
        for name in hopeful:
            seconds[name] = min(seconds[name], _seconds(ways[name]))
    return seconds


def choices() -> dict[Hashable, dict[str, float]]:
    """{question: {way: seconds}} of everything that was chosen in this process."""
    return dict(_choices)


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
