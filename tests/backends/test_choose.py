# SPDX-License-Identifier: Apache-2.0
"""The fastest way is chosen once, by its time on this machine, on operands that have nothing of the data; and again."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dpquant
from dpquant import native
from dpquant.backends import choose
from dpquant.backends.choose import Choices, Machine, decided, fastest, timed
from dpquant.backends.doubles import Wrapped
from dpquant.backends.gemm_sum import GemmSum
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Operands, shape_of
from dpquant.backends.qtensor import code_values
from dpquant.backends.reference import Reference
from dpquant.engine.weight_gradients import LazyWeightGradient
from dpquant.engine.weight_layout import WeightLayout


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
    clock, calls = [0.0], []

    def work(name, seconds):
        calls.append(name)
        clock[0] += seconds

    timed({"fast": lambda: work("fast", 1.0), "hopeless": lambda: work("hopeless", 50.0)}, clock=lambda: clock[0])
    assert calls.count("hopeless") == 2 and calls.count("fast") == 4


SLOWER = [2, 20]  # times: shared processors, and a time slice that another process took


@pytest.mark.parametrize("slower", SLOWER)
def test_a_disturbance_does_not_decide(slower):
    assert chosen_on_a_machine_that_is_slow_at_first(slower, rounds=3) == "better"


@pytest.mark.parametrize("slower", SLOWER)
def test_that_one_run_decides_would_be_seen(slower):
    assert chosen_on_a_machine_that_is_slow_at_first(slower, rounds=1) == "worse"


def chosen_on_a_machine_that_is_slow_at_first(slower, rounds):
    """It is slower for a while, which is when the better way has its first runs."""
    now = [0.0]
    runs: list[str] = []

    def work(name, seconds):
        runs.append(name)
        now[0] += slower * seconds if len(runs) <= 4 and name == "better" else seconds

    ways = {"worse": lambda: work("worse", 1.5), "better": lambda: work("better", 1.0)}
    seconds = choose.timed(ways, rounds=rounds, clock=lambda: now[0])
    assert runs[4:] == ["worse", "better"] * (rounds - 1)
    return min(seconds, key=seconds.__getitem__)


def test_by_default_there_are_several_rounds():
    runs: list[str] = []
    choose.timed({"only": lambda: runs.append("only")})
    assert len(runs) == 4  # the first is not timed


def test_the_only_way_is_not_tried_at_all():
    calls: list[str] = []
    assert fastest(("a test", 3), ways(calls, only=0.0)) == "only" and not calls


def test_a_first_run_that_fills_caches_does_not_count():
    first = iter([0.05])

    def warm_up():
        time.sleep(next(first, 0.0))

    assert fastest(("a test", 4), {"warms up": warm_up, "steady": lambda: time.sleep(0.01)}) == "warms up"


class Timing:
    """Runs every way once, and takes the first; `running` while it does."""

    def __init__(self):
        self.running = False

    def __call__(self, ways):
        self.running = True
        for work in ways.values():
            work()
        self.running = False
        return {name: float(place) for place, name in enumerate(ways)}


def noting(timing, met):
    """A sum that notes the shapes and sums of the operands that it is timed on."""

    class Noting(GemmSum):
        def _add_convolution(self, g, x, total):
            self._note(g, x)
            return super()._add_convolution(g, x, total)

        def _add_patches(self, g, x, total):
            self._note(g, x)
            return super()._add_patches(g, x, total)

        def _note(self, *operands):
            if timing.running:
                met.update((tuple(operand.shape), operand.double().sum().item()) for operand in operands)

    return Noting


def on_data(timing, met):
    """The same, timed on what is to be added."""

    class OnData(noting(timing, met)):
        def _flush(self):
            self._real = torch.cat(self._g), torch.cat(self._x)
            super()._flush()

        def _try(self, way):
            way(*self._real, None)

    return OnData


def operands_of_timed_sums(sums, finite):
    """What the ways to a summed gradient are timed on, for data with so many finite examples."""
    met, timing = set(), Timing()
    operands = Operands(
        x=torch.randn(5, 4, 6, 6), g=torch.randn(5, 3, 6, 6), geometry=Geometry(kernel=(3, 3), padding=(1, 1))
    )
    with Choices(timed=timing, machine=Machine(None)).active():
        total = sums(timing, met)(operands)
        total.add(operands.take(torch.arange(finite)), torch.rand(finite))
        total.value()
    return met


def assert_timed_sums_see_no_data(sums):
    first, second = (operands_of_timed_sums(sums, finite) for finite in (5, 3))
    assert first and first == second


def test_timed_sums_see_no_data():
    assert_timed_sums_see_no_data(noting)


def test_ways_timed_on_what_is_to_be_added_would_be_seen():
    with pytest.raises(AssertionError):
        assert_timed_sums_see_no_data(on_data)


class Watched(Wrapped):
    """Notes the shapes and sums of the operands whose norms are asked for while methods are timed."""

    def __init__(self, inner, timing):
        super().__init__(inner)
        self.met, self._timing = set(), timing

    def methods(self, operands):
        def noted(norms):
            def note(operands):
                if self._timing.running:
                    of = operands.x, operands.g
                    self.met |= {(shape_of(one), code_values(one).double().sum().item()) for one in of}
                return norms(operands)

            return note

        return [dataclasses.replace(one, norms=noted(one.norms)) for one in self.inner.methods(operands)]


class TriedOnData(LazyWeightGradient):
    def _try(self, method):
        self.by(method)


def assert_timed_methods_see_no_data(kind):
    met = []
    for _ in range(2):
        timing = Timing()
        watched = Watched(Reference(), timing)
        x, g = torch.randn(5, 4, 6, 6), torch.randn(5, 3, 6, 6)
        geometry, layout = Geometry(kernel=(3, 3), padding=(1, 1)), WeightLayout(torch.Size((3, 4, 3, 3)))
        with Choices(timed=timing, machine=Machine(None)).active():
            kind.of(x, g, geometry, layout, backend=watched, significant_bits=0).evaluated()
        met.append(watched.met)
    assert met[0] and met[0] == met[1]


def test_timed_methods_see_no_data():
    assert_timed_methods_see_no_data(LazyWeightGradient)


def test_methods_timed_on_data_would_be_seen():
    with pytest.raises(AssertionError):
        assert_timed_methods_see_no_data(TriedOnData)


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


def in_a_process(path, question, answer):
    """What a process of its own answers, whose machine keeps its decisions in a file."""
    return answered(Choices(machine=Machine(path)), question, answer)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "choices.json"


def test_the_next_process_takes_what_this_one_has_measured(path):
    assert in_a_process(path, ("kept", 1), 7) == 7
    assert in_a_process(path, ("kept", 1), 8) == 7
    (file,) = path.parent.iterdir()
    file.unlink()
    assert in_a_process(path, ("kept", 1), 8) == 8


def test_two_processes_keep_what_each_has_measured(path):
    in_a_process(path, ("kept", 2), 1)
    first = Machine(path)  # read before the other one writes
    in_a_process(path, ("kept", 3), 1)
    answered(Choices(machine=first), ("kept", 4), 1)
    assert [in_a_process(path, ("kept", number), 2) for number in (2, 3, 4)] == [1, 1, 1]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99, "choices": {"(\'kept\', 5)": 1}}', '{"format": 1}'])
def test_a_file_that_is_no_cache_is_read_past(path, text):
    path.parent.mkdir()
    path.write_text(text)
    assert in_a_process(path, ("kept", 5), 2) == 2


def test_a_place_that_cannot_be_written_to_does_not_matter(tmp_path):
    (tmp_path / "file").write_text("")
    assert in_a_process(tmp_path / "file" / "below" / "choices.json", ("kept", 7), 1) == 1


def test_other_kernels_have_decisions_of_their_own(tmp_path):
    here = choose.file_in(str(tmp_path))
    assert here == choose.file_in(str(tmp_path), build=native.build)
    assert here != choose.file_in(str(tmp_path), build=lambda: "of another version")


def test_the_environment_says_where_decisions_are_kept(tmp_path):
    """In processes of their own: the user's directory, another one, and nowhere."""
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "user")}
    for place, folder in (("", "user/dpquant"), (str(tmp_path / "mine"), "mine"), ("off", None)):
        environment = {**os.environ, **home, choose.CACHE: place}
        subprocess.run([sys.executable, "-c", DECIDES], env=environment, cwd=tmp_path, check=True)
        kept = {str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob("choices-*")}
        assert kept == ({folder} if folder else set())
        if folder:
            shutil.rmtree(tmp_path / folder)


DECIDES = """
from dpquant.backends.choose import Choices, decided
with Choices().active():
    decided("kept", lambda: 1, valid=lambda answer: True)
"""


@pytest.mark.parametrize("text", [None, "{}", "no json", json.dumps({"format": 99, "choices": {}})])
def test_a_file_that_holds_no_choices_is_refused(tmp_path, text):
    path = tmp_path / "choices.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(dpquant.DataError, match=r"choices\.json"):
        Choices.read(path)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def run(choices):
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


def first_ways(ways):
    return {name: float(place) for place, name in enumerate(ways)}


def last_ways(ways):
    return {name: -float(place) for place, name in enumerate(ways)}


def assert_a_run_repeats(kind=Choices):
    """On a machine that takes other ways as often as it may."""
    first, parameters = run(kind(timed=first_ways, machine=Machine(None)))
    given = json.loads(first.to_json())["choices"]
    again, same = run(kind(given, timed=last_ways, machine=Machine(None)))
    assert again.made.items() <= first.made.items() and torch.equal(parameters, same)


def test_the_same_settings_seed_and_choices_give_the_same_bits():
    assert_a_run_repeats()


def test_choices_that_are_not_taken_would_be_seen():
    class Deaf(Choices):
        def __init__(self, given=None, **more):
            super().__init__(**more)

    with pytest.raises(AssertionError):
        assert_a_run_repeats(Deaf)
