# SPDX-License-Identifier: Apache-2.0
"""The fastest way is chosen once, by its time on this machine, on operands that have nothing of the data; and again."""

import json
import time
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpquant
from dpquant.backends import choose
from dpquant.backends.choose import Choices, decided, fastest
from dpquant.backends.geometry import Geometry
from dpquant.engine import summed, weight_gradients
from dpquant.engine.weight_gradients import Product


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


def test_a_hopeless_way_is_not_tried_again():
    calls: list[str] = []
    fastest(("a test", 2), ways(calls, fast=0.001, hopeless=0.05))
    assert calls.count("hopeless") == 2 and calls.count("fast") == 4


def test_a_disturbance_does_not_decide(monkeypatch):
    assert chosen_on_a_machine_that_is_slow_at_first(monkeypatch) == "better"


def test_that_one_run_decides_would_be_seen(monkeypatch):
    monkeypatch.setattr(choose, "_ROUNDS", 1)
    assert chosen_on_a_machine_that_is_slow_at_first(monkeypatch) == "worse"


def chosen_on_a_machine_that_is_slow_at_first(monkeypatch):
    """It is half as fast for a while, which is when the better way has its first runs."""
    now = [0.0]
    monkeypatch.setattr(choose, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    runs: list[str] = []

    def work(name, seconds):
        runs.append(name)
        now[0] += 2 * seconds if len(runs) <= 4 and name == "better" else seconds

    seconds = choose.timed({"worse": lambda: work("worse", 1.5), "better": lambda: work("better", 1.0)})
    assert runs[4:] == ["worse", "better"] * (choose._ROUNDS - 1)
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
        patch.setattr(choose, "_alone", Choices())
        patch.setattr(choose, "_machines", {})
        patch.setattr(choose, "timed", each_once)
        for name in ("weight_gradient", "add_patch_products"):
            patch.setattr(summed, name, met_by(getattr(summed, name)))
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
    class OnData(summed.WaitingSum):
        def _work_off(self):
            self.real = torch.cat(self._g), torch.cat(self._x)
            super()._work_off()

        def _try(self, way):
            way(*self.real, None)

    monkeypatch.setattr(weight_gradients, "WaitingSum", OnData)
    with pytest.raises(AssertionError):
        assert_timed_work_sees_no_data(monkeypatch)


# Runs repeat.


def anything(answer):
    return True


def answered(choices, question, answer, **keywords):
    with choices.active():
        return decided(question, lambda: answer, valid=anything, **keywords)


def test_a_run_decides_as_the_one_whose_choices_it_is_given(tmp_path):
    first = Choices()
    assert answered(first, ("of runs", 1), 3) == 3
    path = tmp_path / "choices.json"
    path.write_text(first.to_json())
    second = Choices.read(path)
    assert answered(second, ("of runs", 1), 4) == 3 and second.made == first.made
    assert answered(Choices({}), ("of runs", 2), 4) == 4  # what was not decided there is decided here


def test_what_this_machine_remembers_yields_to_what_is_given():
    assert answered(Choices(), ("of runs", 3), 1) == 1
    assert answered(Choices(), ("of runs", 3), 2) == 1
    assert answered(Choices({"('of runs', 3)": 5}), ("of runs", 3), 2) == 5


def test_what_does_not_last_is_not_remembered():
    assert answered(Choices(), ("of runs", 4), 1, lasting=False) == 1
    assert answered(Choices(), ("of runs", 4), 2, lasting=False) == 2


def test_an_answer_that_makes_no_sense_here_is_measured_anew():
    given = Choices({"('a test', 5)": "a way of another version"})
    with given.active():
        assert fastest(("a test", 5), ways([], slow=0.01, fast=0.0)) == "fast"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(choose.CACHE, str(tmp_path / "cache"))
    return lambda: monkeypatch.setattr(choose, "_machines", {})  # as in another process


def test_the_next_process_takes_what_this_one_has_measured(cache, tmp_path):
    assert answered(Choices(), ("kept", 1), 7) == 7
    (file,) = (tmp_path / "cache").iterdir()
    cache()
    assert answered(Choices(), ("kept", 1), 8) == 7
    file.unlink()
    cache()
    assert answered(Choices(), ("kept", 1), 8) == 8


def test_two_processes_keep_what_each_has_measured(cache):
    answered(Choices(), ("kept", 2), 1)
    cache()
    choose._machine()  # read before the other one writes
    other = choose._machines
    cache()
    answered(Choices(), ("kept", 3), 1)
    choose._machines.update(other)
    answered(Choices(), ("kept", 4), 1)
    cache()
    assert [answered(Choices(), ("kept", number), 2) for number in (2, 3, 4)] == [1, 1, 1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "choices": {"(\'kept\', 5)": 1}}', '{"format": 1}'])
def test_a_file_that_is_no_cache_is_read_past(cache, tmp_path, text):
    answered(Choices(), ("kept", 6), 1)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(text)
    cache()
    assert answered(Choices(), ("kept", 5), 2) == 2


def test_a_place_that_cannot_be_written_to_does_not_matter(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(choose.CACHE, str(tmp_path / "file" / "below"))
    assert answered(Choices(), ("kept", 7), 1) == 1


def test_off_keeps_nothing_on_disk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert answered(Choices(), ("kept", 8), 1) == 1
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("text", [None, "{}", "no json", json.dumps({"format": 99, "choices": {}})])
def test_a_file_that_holds_no_choices_is_refused(tmp_path, text):
    path = tmp_path / "choices.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(dpquant.DataError, match=r"choices\.json"):
        Choices.read(path)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def run(choices=None):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    data = [(torch.randn(1, 8, 8), number % 3) for number in range(40)]
    private = dpquant.make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.5), data, loss_fn=loss,
        plan=dpquant.PrivacyPlan(
            noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.4, expected_batch_size=16, steps=3
        ),
        policy=dpquant.AllPolicy(), mechanism_seed=5, choices=choices,
    )  # fmt: skip
    for epoch in private.epochs():
        for batch in epoch:
            private.step(batch)
    return private.choices, torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_a_run_repeats(monkeypatch):
    """On a machine that takes other ways as often as it may."""
    first, parameters = run()
    monkeypatch.setattr(choose, "_machines", {})
    monkeypatch.setattr(choose, "timed", lambda ways: {name: -float(place) for place, name in enumerate(ways)})
    again, same = run(Choices(json.loads(first.to_json())["choices"]))
    assert again.made.items() <= first.made.items() and torch.equal(parameters, same)


def test_the_same_settings_seed_and_choices_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(choose, "timed", lambda ways: {name: float(place) for place, name in enumerate(ways)})
    assert_a_run_repeats(monkeypatch)


def test_choices_that_are_not_taken_would_be_seen(monkeypatch):
    monkeypatch.setattr(choose, "timed", lambda ways: {name: float(place) for place, name in enumerate(ways)})
    honest = Choices.__init__
    monkeypatch.setattr(Choices, "__init__", lambda self, given=None: honest(self))
    with pytest.raises(AssertionError):
        assert_a_run_repeats(monkeypatch)
