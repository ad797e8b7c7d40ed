# SPDX-License-Identifier: Apache-2.0
"""The fastest way is chosen once, by its time on this machine, on operands that have nothing of the data."""

import time
import types

import pytest
import torch

from dpquant import choice, weight_gradients
from dpquant.choice import choices, fastest
from dpquant.geometry import Geometry
from dpquant.weight_gradients import Product


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


def operands_of_timed_work(monkeypatch, finite):
    """Shapes and sums of what the ways to a summed gradient are timed on, for data with so many finite examples."""
    met, timing = set(), []

    def met_by(work):
        def noted(grad, x, *arguments):
            if timing:
                met.update((tuple(operand.shape), operand.double().sum().item()) for operand in (grad, x))
            return work(grad, x, *arguments)

        return noted

    def each_once(ways):
        timing.append(True)
        for work in ways.values():
            work()
        timing.pop()
        return {name: float(place) for place, name in enumerate(ways)}

    with monkeypatch.context() as patch:
        patch.setattr(choice, "_choices", {})
        patch.setattr(choice, "timed", each_once)
        for name in ("weight_gradient", "add_patch_products"):
            patch.setattr(weight_gradients, name, met_by(getattr(weight_gradients, name)))
        x, g = torch.randn(5, 4, 6, 6), torch.randn(5, 3, 6, 6)
        product = Product.of(
            x, g, Geometry(kernel=(3, 3), padding=(1, 1)), torch.Size((3, 4, 3, 3)), significant_bits=None
        )
        product = product.take(torch.arange(finite))
        product.finished(product.add_weighted(torch.rand(finite), None))
    return met


def assert_timed_work_sees_no_data(monkeypatch):
    first, second = (operands_of_timed_work(monkeypatch, finite) for finite in (5, 3))
    assert first and first == second


def test_timed_work_sees_no_data(monkeypatch):
    assert_timed_work_sees_no_data(monkeypatch)


def test_ways_timed_on_what_is_to_be_added_would_be_seen(monkeypatch):
    class OnData(weight_gradients._Waiting):
        def _work_off(self):
            self.real = torch.cat(self._g), torch.cat(self._x)
            super()._work_off()

        def _try(self, way):
            way(*self.real, None)

    monkeypatch.setattr(weight_gradients, "_Waiting", OnData)
    with pytest.raises(AssertionError):
        assert_timed_work_sees_no_data(monkeypatch)
