# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import nn

import dpquant
from dpquant.engine import clock, context, group_norm, layers, weight_gradients
from dpquant.engine.layers import current_precisions
from dpquant.errors import SettingError
from dpquant.training import tuning
from dpquant.training.cost import LayerTimes
from networks import loss


def model_and_batch(rows=3):
    torch.manual_seed(0)
    model = dpquant.prepare(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    )
    return model, (torch.randn(rows, 2, 8, 8), torch.arange(rows) % 5)


def times_of(model, batch, **given):
    return tuning.layer_times(model, loss, batch, **{"microbatch_size": 8, "expected_batch_size": 32, **given})


def test_every_layer_is_measured_and_the_model_is_left_as_it_was():
    model, batch = model_and_batch()
    dpquant.set_policy(model, ["2"])
    before = torch.random.get_rng_state()
    times = times_of(model, batch)
    assert list(times) == ["0", "2", "4"] and all(t.full > 0 and t.quantized > 0 for t in times.values())
    assert tuple(current_precisions(model)) == ("2",) and torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


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
def test_what_the_first_microbatch_prepares_counts_once_a_step(monkeypatch, expected_batch_size):
    model, batch = model_and_batch()
    time = StoppedTime(monkeypatch)
    time.slow_down(layers.QuantizableLayer, "quantize_weight", 8.0)
    time.slow_down(layers.QuantizableLayer, "quantize", 4.0)
    times = times_of(model, batch, expected_batch_size=expected_batch_size)
    # twice a microbatch of eight, and once a step
    assert [t.quantized for t in times.values()] == pytest.approx([1 + 8 / expected_batch_size] * 3)


def test_the_first_microbatch_counted_like_the_others_would_be_seen(monkeypatch):
    monkeypatch.setattr(tuning, "_seconds_per_example", lambda clock, size, _: _as_if_all_were_alike(clock, size))
    with pytest.raises(AssertionError):
        test_what_the_first_microbatch_prepares_counts_once_a_step(monkeypatch, 80)


def _as_if_all_were_alike(clock, size):
    together = {name: sum(one[name] for one in clock.microbatches) for name in clock.microbatches[0]}
    return {name: seconds / len(clock.microbatches) / size for name, seconds in together.items()}


def test_the_median_counts_and_the_first_round_does_not(monkeypatch):
    model, batch = model_and_batch()
    rounds = iter([9.0, 3.0, 4.0, 8.0])
    monkeypatch.setattr(
        tuning, "layer_times_once", lambda *a, **b: {"0": LayerTimes(full=(taken := next(rounds)), quantized=taken / 2)}
    )
    assert times_of(model, batch, rounds=3) == {"0": LayerTimes(full=4.0, quantized=2.0)}


def test_a_layer_that_is_not_called_has_no_time():
    model, batch = model_and_batch()
    model.add_module("5", nn.Identity())
    model[5].spare = dpquant.prepare(nn.Linear(2, 2)).requires_grad_(False)
    assert list(times_of(model, batch)) == ["0", "2", "4"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda size: 1 / size, 256),
        (lambda size: float(size), 32),
        (lambda size: 1.0 if size < 64 else 0.5, 64),
        (lambda size: 0.99 ** (size / 32), 32),  # faster, but not worth its while
    ],
)
def test_microbatches_are_doubled_as_long_as_that_gains(monkeypatch, seconds, expected):
    model, batch = model_and_batch()
    monkeypatch.setattr(tuning, "timed", lambda ways: {name: seconds(int(name)) for name in ways})
    size = tuning.fastest_microbatch_size(model, loss, batch, ["2"], expected_batch_size=1e6, memory=None)
    assert size == expected and tuple(current_precisions(model)) == ()


def test_a_small_batch_does_not_get_a_large_microbatch(monkeypatch):
    model, batch = model_and_batch()
    monkeypatch.setattr(tuning, "timed", lambda ways: {name: 1 / int(name) for name in ways})
    assert tuning.fastest_microbatch_size(model, loss, batch, {}, expected_batch_size=20, memory=None) == 32
    # 1.2 times as fast, but more of it would be filling
    monkeypatch.setattr(tuning, "timed", lambda ways: {name: 1.2 ** -int(name).bit_length() for name in ways})
    assert tuning.fastest_microbatch_size(model, loss, batch, {}, expected_batch_size=40, memory=None) == 32


def test_without_a_budget_memory_is_not_looked_at(monkeypatch):
    model, batch = model_and_batch()
    monkeypatch.setattr(tuning, "timed", lambda ways: {name: 1.0 for name in ways})
    for name in ("reset_peak", "memory_mib"):
        monkeypatch.setattr(tuning, name, lambda: pytest.fail("not every system can tell"))
    assert tuning.fastest_microbatch_size(model, loss, batch, {}, expected_batch_size=1e6, memory=None) == 32
    with pytest.raises(pytest.fail.Exception):
        tuning.fastest_microbatch_size(model, loss, batch, {}, expected_batch_size=1e6, memory=1.0)


class Memory:
    """A process that holds some GiB already, and of which each example of the largest pass takes 10 MB more."""

    def __init__(self, monkeypatch, held=1.0, resets=True):
        self.held = self.peak = held
        resident = self.held if resets else self.held / 2
        monkeypatch.setattr(tuning, "reset_peak", lambda: (resident * 1024, resets))
        monkeypatch.setattr(tuning, "memory_mib", lambda: (0.0, self.peak * 1024))
        monkeypatch.setattr(tuning, "_clipped_sum", lambda model, loss_fn, batch, size: self.take(size))
        monkeypatch.setattr(tuning, "impact_sum", lambda *_, microbatch_size, **__: self.take(microbatch_size))
        monkeypatch.setattr(tuning, "timed", lambda ways: {name: 1 / int(name) for name in ways})

    def take(self, size):
        self.peak = max(self.peak, self.held + size / 100)


def fastest(model, batch, memory):
    return tuning.fastest_microbatch_size(model, loss, batch, {}, expected_batch_size=1e6, memory=memory)


def of_analysis(model, batch, memory):
    return tuning.largest_analysis_size(model, loss, batch, ["2"], score="gradient", memory=memory)


@pytest.mark.parametrize(("ask", "largest"), [(fastest, 256), (of_analysis, tuning.ANALYSIS_MICROBATCH)])
def test_the_memory_budget_bounds_the_microbatch(ask, largest, monkeypatch):
    for memory, expected in ((1.05, 4), (1.09, 8), (1.4, 32), (99.0, largest)):
        process = Memory(monkeypatch)
        assert ask(*model_and_batch(), memory) == expected
        assert process.peak <= memory


def refusal_of(ask, monkeypatch, held, resets=True, **planted):
    Memory(monkeypatch, held, resets)
    for name, value in planted.items():
        monkeypatch.setattr(tuning, name, value)
    with pytest.raises(SettingError) as refusal:
        ask(*model_and_batch(), 1.03)
    return str(refusal.value)


@pytest.mark.parametrize("ask", [fastest, of_analysis])
def test_too_little_memory_is_refused_without_telling_what_is_in_use(ask, monkeypatch):
    """What is in use tells how many private records are in memory."""
    refusals = {refusal_of(ask, monkeypatch, held) for held in (1.0, 7.25)}
    assert (
        len(refusals) == 1 and "memory=1.03. Besides" in str(refusals) and "needs 0.04 GiB with 4 ex" in str(refusals)
    )
    # a refusal that tells all of the peak is seen
    assert refusal_of(ask, monkeypatch, 7.25, reset_peak=lambda: (0.0, True)) not in refusals


@pytest.mark.parametrize("ask", [fastest, of_analysis])
def test_where_a_peak_is_not_counted_anew_it_counts_from_the_last_one_which_is_said(ask, monkeypatch):
    refusal = refusal_of(ask, monkeypatch, 1.0, resets=False)
    assert "goes on counting, it needs 0.04 GiB" in refusal
    # counted from what is resident, the last peak would be taken for the model's need
    assert "needs 0.04" not in refusal_of(ask, monkeypatch, 1.0, resets=False, reset_peak=lambda: (512.0, True))


@pytest.mark.parametrize("score", ["loss", "gradient"])
def test_an_analysis_is_tried_as_it_will_run(score, monkeypatch):
    model, batch = model_and_batch()
    dpquant.set_policy(model, ["2"])
    tried, honest = [], tuning.impact_sum

    def watched(*arguments, **keywords):
        tried.append((len(keywords["record_ids"]), keywords["microbatch_size"], keywords["score"]))
        return honest(*arguments, **keywords)

    monkeypatch.setattr(tuning, "impact_sum", watched)
    before = torch.random.get_rng_state()
    assert tuning.largest_analysis_size(model, loss, batch, ["2"], score=score, memory=99.0) == 64
    assert tried == [(size, size, score) for size in (4, 8, 16, 32, 64)]
    assert tuple(current_precisions(model)) == ("2",) and torch.equal(torch.random.get_rng_state(), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_excluded_layers_are_never_chosen_and_shares_count_them():
    macs = {"a": 8.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0}
    scores = dict.fromkeys("bcde", 0.1)
    for policy in (
        dpquant.RotatePolicy(fraction=0.6),
        dpquant.DPQuantPolicy(fraction=0.6),
        dpquant.PrioritisePolicy(fraction=0.6),
        dpquant.StaticPolicy(fraction=0.6),
    ):
        for epoch in range(5):
            chosen = policy.choose(macs, scores, epoch=epoch, key=1, excluded=("a",))
            assert len(chosen) == 3 and "a" not in chosen
    by_macs = dpquant.RotatePolicy(macs=0.2).choose(macs, None, epoch=0, key=0, excluded=("a",))
    assert len(by_macs) == 3  # 2.4 of 12, one at a time
    assert dpquant.AllPolicy().choose(macs, None, epoch=0, key=0, excluded=("a",)) == tuple("bcde")
