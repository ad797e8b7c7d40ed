# SPDX-License-Identifier: Apache-2.0
"""`format=auto`: what is taken with which units and gains, and that a run keeps to it."""

import pytest
import torch
from torch import nn

import dpquant
from dpquant.backends.choose import Choices, Machine
from dpquant.backends.cpu_int8 import CpuInt8
from dpquant.backends.doubles import Wrapped
from dpquant.backends.reference import Reference
from dpquant.engine.passes import Objective
from dpquant.errors import SettingError
from dpquant.formats import FULL_PRECISION, precision
from dpquant.training.auto_format import Units, taken, units_of
from dpquant.training.execution import ExecutionRequest, choose_execution
from dpquant.training.tuning import Instruments, largest_tried, worth_timing
from networks import loss

CPU = torch.device("cpu")
INT8 = Units(precision=precision("int8"))


class With(Wrapped):
    """A backend whose units are these, and which refuses what is not among them."""

    def __init__(self, *units, device_type="cpu"):
        super().__init__(Reference())
        self.units, self.device_type = units, device_type

    def refusal(self, precision, device):
        return None if precision.name.split("/")[0] in self.units else "there are no such units"


class WithoutVnni(CpuInt8):
    def refusal(self, precision, device):
        return "this processor's int8 convolution saturates"


def backends(*others):
    return {one.name + str(number): one for number, one in enumerate((Reference(), *others))}


@pytest.mark.parametrize(
    ("others", "expected", "missing"),
    [
        ([With("int8")], "int8", ""),
        ([With("nvfp4", "int8")], "nvfp4/nvfp4/int8", ""),
        ([With("nvfp4"), With("int8")], "nvfp4/nvfp4/int8", ""),
        ([WithoutVnni()], "full", "saturates"),
        ([With("int8", device_type="cuda")], "full", "a cpu has no faster units"),
        ([], "full", "a cpu has no faster units"),
    ],
)
def test_the_units_of_the_device_decide_the_format(others, expected, missing):
    found = units_of(CPU, "auto", backends(*others))
    assert found.precision.name == expected and missing in found.missing
    assert found.precision.quantized != bool(found.missing)


def test_a_backend_that_is_asked_for_gives_its_own_units():
    known = {"simulate": Reference(), "int8": With("int8")}
    assert units_of(CPU, "int8", known).precision.name == "int8"
    found = units_of(CPU, "simulate", known)
    assert found.precision == FULL_PRECISION and "simulate" in found.missing


def never(layers):
    raise AssertionError("a step was timed for nothing")


@pytest.mark.parametrize(
    ("units", "gains", "step", "layers", "words"),
    [
        (INT8, {"a": 2.0, "b": 1.2}, lambda layers: 1.5, ("a", "b"), "int8 in 2 of 2 layers, those that gain: a step"),
        (INT8, {"a": 0.5, "b": 1.2}, lambda layers: 1.1, ("b",), "int8 in 1 of 2 layers"),
        (INT8, {"a": 0.5, "b": 1.01}, never, (), "no layer gains by int8 on this machine (at best 1.01 times as fast)"),
        (INT8, {"a": 1.2}, lambda layers: 1.01, (), "only 1.01 times as fast"),
        (INT8, {}, never, (), "no layer gains"),
        (INT8, None, never, (), "the run is over before measuring int8 would pay"),
        (Units(precision=FULL_PRECISION, missing="no VNNI"), {"a": 9.0}, never, (), "full precision: no VNNI"),
    ],
)  # fmt: skip
def test_layers_that_gain_are_taken_if_a_step_gains(units, gains, step, layers, words):
    found = taken(units, ("a", "b"), gains, step)
    assert found.layers == layers and words in found.why


def plan(steps):
    return dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=0.1, expected_batch_size=8, steps=steps
    )


def execution_with(gains, gain_of_step=1.5, steps=100_000):
    """What is chosen where layers have these gains, and a step this one, whatever the machine."""
    torch.manual_seed(0)
    model = dpquant.prepare(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 5)), format="int8")
    instruments = Instruments(timed=lambda works: {name: gain_of_step if name == "full" else 1.0 for name in works})
    known = Choices(machine=Machine(None))
    known.decide = lambda key, measure, **_: gains if key[0] == "gains of layers" else measure()
    with known.active():
        return choose_execution(
            Objective(model, loss),
            (torch.randn(2, 1, 4, 4), torch.arange(2)),
            policy=dpquant.AllPolicy(),
            macs={"1": 128.0, "2": 40.0},
            plan=plan(steps),
            request=ExecutionRequest(chosen=precision("int8"), auto=True, units=INT8, microbatch_size=8),
            by=instruments,
        )


def test_what_does_not_gain_is_excluded_and_the_rest_runs_quantized():
    found = execution_with({"1": 2.0, "2": 0.8})
    assert found.excluded_layers == ("2",) and found.chosen.name == "int8" and found.gains == {"1": 2.0, "2": 0.8}
    assert str(found).startswith("int8 in 1 of 2 layers") and "takes longer" not in str(found)
    for nothing in (execution_with({"1": 0.9, "2": 0.8}), execution_with({"1": 2.0, "2": 2.0}, gain_of_step=1.0)):
        assert nothing.excluded_layers == ("1", "2") and nothing.chosen == FULL_PRECISION and nothing.reason == ""


def test_a_run_too_short_to_win_measurements_back_measures_nothing():
    assert "before measuring int8 would pay" in execution_with({"1": 2.0, "2": 2.0}, steps=10).auto


def test_trials_take_a_small_part_of_a_run():
    assert [largest_tried(examples) for examples in (0, 2_000, 61_000, 1e9)][:3] == [32, 32, 128]
    for examples in (10_000, 100_000, 1e7):
        largest = largest_tried(examples)
        trials = sum(8 * size for size in (64 * 2**n for n in range(40)) if size <= largest)
        assert trials <= 0.05 * examples
    assert worth_timing(100_000, 64) and not worth_timing(10_000, 64)


@pytest.mark.parametrize("changes", [{"policy": dpquant.RotatePolicy(fraction=0.5)}, {"rest": "full/int8/int8"}])
def test_auto_refuses_to_be_overruled(changes):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    records = [(torch.zeros(1, 4, 4), 0)] * 4
    arguments = {"policy": dpquant.AllPolicy(), "format": "auto", "loss_fn": loss, "plan": plan(4), **changes}
    with pytest.raises(SettingError, match="with format='auto'"):
        dpquant.make_private(model, torch.optim.SGD(model.parameters(), lr=0.1), records, **arguments)


@pytest.mark.parametrize("backend", ["auto", "simulate"])
def test_a_run_takes_what_its_execution_says_and_charges_no_analysis(backend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5))
    records = [(torch.randn(1, 4, 4), number % 5) for number in range(40)]
    private = dpquant.make_private(
        model, torch.optim.SGD(model.parameters(), lr=0.1), records, loss_fn=loss, plan=plan(2),
        policy=dpquant.AllPolicy(), format="auto", backend=backend,
    )  # fmt: skip
    for epoch in private.epochs():
        for batch in epoch:
            private.step(batch)
    assert private.execution.auto.startswith("full precision: ")
    assert private.policies() == [()] and [event.kind for event in private.events()] == ["train"]
