# SPDX-License-Identifier: Apache-2.0
import time
import types

from dpquant import choice
from dpquant.choice import choices, fastest


def ways(calls, **seconds):
    def work(name):
        calls.append(name)
        time.sleep(seconds[name])

    return {name: lambda name=name: work(name) for name in seconds}


def test_the_fastest_way_is_taken_and_asked_for_once():
    calls: list[str] = []
    options = ways(calls, slow=0.02, fast=0.001)
    assert fastest(("a test", 1), options) == "fast"
    asked = len(calls)
    assert fastest(("a test", 1), options) == "fast" and len(calls) == asked
    assert set(choices()[("a test", 1)]) == {"slow", "fast"}


def test_a_hopeless_way_is_not_tried_again():
    calls: list[str] = []
    fastest(("a test", 2), ways(calls, fast=0.001, hopeless=0.05))
    assert calls.count("hopeless") == 2 and calls.count("fast") == 4


def test_a_disturbance_does_not_decide(monkeypatch):
    assert chosen_on_a_machine_that_is_slow_at_first(monkeypatch) == "better"


def test_that_one_run_decides_would_be_seen(monkeypatch):
    monkeypatch.setattr(choice, "_ROUNDS", 1)
    assert chosen_on_a_machine_that_is_slow_at_first(monkeypatch) == "worse"


def chosen_on_a_machine_that_is_slow_at_first(monkeypatch):
    """It is half as fast for a while, which is when the better way has its first runs."""
    now = [0.0]
    monkeypatch.setattr(choice, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    runs: list[str] = []

    def work(name, seconds):
        runs.append(name)
        now[0] += 2 * seconds if len(runs) <= 4 and name == "better" else seconds

    seconds = choice.timed({"worse": lambda: work("worse", 1.5), "better": lambda: work("better", 1.0)})
    assert runs[4:] == ["worse", "better"] * (choice._ROUNDS - 1)
    return min(seconds, key=seconds.__getitem__)


def test_the_only_way_is_not_tried_at_all():
    calls: list[str] = []
    assert fastest(("a test", 3), ways(calls, only=0.0)) == "only" and not calls


def test_a_first_run_that_fills_caches_does_not_count():
    first = iter([0.05])

    def warm_up():
        time.sleep(next(first, 0.0))

    assert fastest(("a test", 4), {"warms up": warm_up, "steady": lambda: time.sleep(0.01)}) == "warms up"
