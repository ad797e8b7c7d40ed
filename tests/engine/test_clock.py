# SPDX-License-Identifier: Apache-2.0
"""A step's clock counts each layer's own work under its name, and nobody else's."""

import pytest
import torch
from torch import nn

import dpquant
from dpquant.engine import clock, context, group_norm, layers, weight_gradients
from dpquant.training import tuning
from dpquant.training.cost import LayerTimes
from networks import loss


def times_of(model, batch, **given):
    return tuning.layer_times(model, loss, batch, **{"microbatch_size": 8, "expected_batch_size": 32, **given})


class StoppedTime:
    """A clock that only planted work moves on."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(clock, "time", self)

    def perf_counter(self):
        return self.now

    def slow_down(self, owner, name, seconds):
        work = getattr(owner, name)

        def slow(*args, **kwargs):
            self.now += seconds
            return work(*args, **kwargs)

        self._monkeypatch.setattr(owner, name, slow)


@pytest.mark.parametrize(
    ("owner", "name", "full", "quantized"),
    [
        (layers.QuantizableLayer, "quantize", 0, 2),  # activations and gradients
        (context.Pass, "dense_weight", 1, 0),
        (weight_gradients.Product, "squared_norms", 1, 1),
        (weight_gradients.Product, "add_weighted", 1, 1),
        (group_norm.TapedGroupNorm, "forward", 0, 0),
    ],
)
def test_a_layer_answers_for_all_of_its_own_work_and_for_no_other(monkeypatch, owner, name, full, quantized):
    torch.manual_seed(0)
    model = dpquant.prepare(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    )
    batch = torch.randn(3, 2, 8, 8), torch.arange(3)
    monkeypatch.setattr(weight_gradients.Product, "fastest", lambda self: self)  # keeps the operands
    StoppedTime(monkeypatch).slow_down(owner, name, 8.0)
    assert set(times_of(model, batch).values()) == {LayerTimes(full=full, quantized=quantized)}


def test_products_that_nobody_times_would_be_seen(monkeypatch):
    monkeypatch.setattr(layers, "_TimedConvolution", layers._Convolution)
    with pytest.raises(AssertionError):
        test_a_layer_answers_for_all_of_its_own_work_and_for_no_other(
            monkeypatch, layers.QuantizableLayer, "quantize", 0, 2
        )


@pytest.mark.parametrize("expected_batch_size", [8, 32, 80])
def test_weights_are_prepared_in_the_first_microbatch_of_a_step(monkeypatch, expected_batch_size):
    torch.manual_seed(0)
    model = dpquant.prepare(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(144, 5)))
    time = StoppedTime(monkeypatch)
    time.slow_down(layers.QuantizableLayer, "quantize_weight", 8.0)
    time.slow_down(layers.QuantizableLayer, "quantize", 4.0)
    times = times_of(model, (torch.randn(3, 2, 8, 8), torch.arange(3)), expected_batch_size=expected_batch_size)
    # twice a microbatch of eight, and once a step
    assert [t.quantized for t in times.values()] == pytest.approx([1 + 8 / expected_batch_size] * 2)
