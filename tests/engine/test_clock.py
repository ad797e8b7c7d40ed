# SPDX-License-Identifier: Apache-2.0
"""A step's clock counts each layer's own work under its name, and nobody else's."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dpquant
from dpquant.backends.doubles import Wrapped
from dpquant.backends.reference import Reference
from dpquant.engine.clock import Clock
from dpquant.training import tuning
from dpquant.training.cost import LayerTimes
from networks import loss


class Time:
    """Time that only planted work moves on."""

    def __init__(self):
        self.now = 0.0

    def slow(self, work, seconds=8.0):
        def slower(*args, **kwargs):
            self.now += seconds
            return work(*args, **kwargs)

        return slower


class Slow(Wrapped):
    """A backend one part of which takes its time."""

    def __init__(self, time, part):
        super().__init__(Reference())
        self.name = "simulate"
        if part in ("quantize", "pack"):
            setattr(self, part, time.slow(getattr(self.inner, part)))
        self._time, self._part = time, part

    def methods(self, operands):
        grams = [one for one in super().methods(operands) if one.name in ("grams", "outer")]  # keep the operands
        if self._part == "norms":
            return [dataclasses.replace(one, norms=self._time.slow(one.norms)) for one in grams]
        if self._part == "sum":
            return [dataclasses.replace(one, sum=self._slow_sum(one.sum)) for one in grams]
        return grams

    def _slow_sum(self, begin):
        def begun(operands):
            accumulator = begin(operands)
            accumulator.add = self._time.slow(accumulator.add)
            return accumulator

        return begun


class NothingIsTimed(Clock):
    """A clock that forgets the layers' products."""

    @contextlib.contextmanager
    def timing(self, name):
        self.microbatches[-1][name] += 0.0
        yield


def times_of(model, time, *, clock=Clock, expected_batch_size=32):
    instruments = tuning.Instruments(clock=lambda: clock(lambda: time.now))
    batch = torch.randn(3, 2, 8, 8), torch.arange(3)
    return tuning.layer_times(
        model, loss, batch, microbatch_size=8, expected_batch_size=expected_batch_size, by=instruments
    )


def network(backend):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5)
    return dpquant.prepare(nn.Sequential(*layers), backend=backend)


PARTS = {"quantize": (0, 2), "norms": (1, 1), "sum": (1, 1)}  # seconds an example, full and quantized


def assert_a_layer_answers_for(part, clock=Clock):
    full, quantized = PARTS[part]
    time = Time()
    times = times_of(network(Slow(time, part)), time, clock=clock)
    assert set(times.values()) == {LayerTimes(full=full, quantized=quantized)}


@pytest.mark.parametrize("part", PARTS)
def test_a_layer_answers_for_all_of_its_own_work(part):
    assert_a_layer_answers_for(part)


@pytest.mark.parametrize("part", PARTS)
def test_work_that_nobody_times_would_be_seen(part):
    with pytest.raises(AssertionError):
        assert_a_layer_answers_for(part, NothingIsTimed)


def test_a_layer_does_not_answer_for_other_modules():
    time = Time()
    model = network(Reference())
    model[1].register_forward_hook(time.slow(lambda *given: None))
    assert set(times_of(model, time).values()) == {LayerTimes(full=0, quantized=0)}


@pytest.mark.parametrize("expected_batch_size", [8, 32, 80])
def test_weights_are_prepared_in_the_first_microbatch_of_a_step(expected_batch_size):
    time = Time()
    times = times_of(network(Slow(time, "pack")), time, expected_batch_size=expected_batch_size)
    # once a step, for the output and for the input's gradient together
    assert [t.quantized for t in times.values()] == pytest.approx([8 / expected_batch_size] * 3)


class LayingOut(TorchDispatchMode):
    """Slows the copies of weights down that give them another layout."""

    def __init__(self, time):
        super().__init__()
        self._time = time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.clone and args[0].shape[1:] == (2, 3, 3):
            self._time.now += 8
        return func(*args, **(kwargs or {}))


def test_a_weight_in_full_precision_is_laid_out_once_a_step_on_its_layers_account():
    time = Time()
    with LayingOut(time):
        times = times_of(network(Reference()), time)
    assert [t.full for t in times.values()] == [8 / 32, 0, 0]
