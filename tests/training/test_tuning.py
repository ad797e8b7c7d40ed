# SPDX-License-Identifier: Apache-2.0
import dataclasses
import itertools

import pytest
import torch
from torch import nn

import dpquant
from dpquant.engine.layers import current_precisions
from dpquant.engine.passes import Objective
from dpquant.errors import SettingError
from dpquant.formats import precision
from dpquant.training import tuning
from dpquant.training.cost import LayerTimes
from dpquant.training.filling import fitted
from dpquant.training.impact import impact_sum
from dpquant.training.tuning import Instruments
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


class Step:
    """A clock that was read in a step: seconds by layer for each microbatch."""

    def __init__(self, *microbatches):
        self.microbatches = [{"0": seconds} for seconds in microbatches]


def assert_what_the_first_microbatch_prepares_counts_once_a_step(per_example):
    """The first of eight examples takes 32 s more than each of the others, which take 16."""
    for expected_batch_size, seconds in ((8, 48), (32, 48 + 3 * 16), (80, 48 + 9 * 16)):
        took = per_example(Step(48.0, 16.0, 16.0), 8, expected_batch_size)
        assert took == {"0": pytest.approx(seconds / expected_batch_size)}


def test_what_the_first_microbatch_prepares_counts_once_a_step():
    assert_what_the_first_microbatch_prepares_counts_once_a_step(tuning._seconds_per_example)


def test_the_first_microbatch_counted_like_the_others_would_be_seen():
    def as_if_all_were_alike(clock, size, expected_batch_size):
        return {"0": sum(one["0"] for one in clock.microbatches) / len(clock.microbatches) / size}

    with pytest.raises(AssertionError):
        assert_what_the_first_microbatch_prepares_counts_once_a_step(as_if_all_were_alike)


def test_the_median_counts_and_the_first_round_does_not():
    rounds = [{"0": LayerTimes(full=seconds, quantized=seconds / 2)} for seconds in (9.0, 3.0, 4.0, 8.0)]
    assert tuning.median_times(rounds) == {"0": LayerTimes(full=4.0, quantized=2.0)}


def test_a_layer_that_is_not_called_has_no_time():
    model, batch = model_and_batch()
    model.add_module("5", nn.Identity())
    model[5].spare = dpquant.prepare(nn.Linear(2, 2)).requires_grad_(False)
    assert list(times_of(model, batch)) == ["0", "2", "4"]


def timed(seconds):
    """Instruments by which a step in microbatches of some size takes `seconds(size)`."""
    return Instruments(timed=lambda ways: {name: seconds(int(name)) for name in ways})


def size_by(instruments, expected_batch_size=1e6, memory=None, groups=1):
    model, batch = model_and_batch()
    size = tuning.fastest_microbatch_size(
        Objective(model, loss), batch, {}, expected_batch_size=expected_batch_size, memory=memory, groups=groups,
        by=instruments,
    )  # fmt: skip
    assert tuple(current_precisions(model)) == ()
    return size


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda size: 1 / size, 2**20),  # the whole batch
        (lambda size: float(size), 16),
        (lambda size: 1.0 if size < 32 else 0.5, 32),
        (lambda size: 1.04 ** -size.bit_length(), 16),  # faster, but not worth twice the memory
        (lambda size: 1.06 ** -size.bit_length(), 256),  # and here much more would be needed
        (lambda size: 1.15 ** -size.bit_length() if size <= 2048 else 9.0, 2048),
    ],
)
def test_microbatches_are_doubled_as_long_as_that_gains(seconds, expected):
    assert size_by(timed(seconds)) == expected


@pytest.mark.parametrize("expected_batch_size", [20, 4096])
def test_a_batch_is_the_largest_microbatch(expected_batch_size):
    found = size_by(timed(lambda size: 1 / size), expected_batch_size)
    assert found == fitted(max(32, expected_batch_size), expected_batch_size)


@pytest.mark.parametrize(("memory", "expected"), [(10.0, fitted(4096, 4096)), (2.02, 4096)])
def test_a_size_is_not_fitted_beyond_the_memory(memory, expected):
    peaks = itertools.chain([1.0] * 10, itertools.repeat(2.0))  # GiB; sizes of 4 to 2048, and 4096
    by = dataclasses.replace(
        timed(lambda size: 1 / size), reset_peak=lambda: (0.0, True), memory_mib=lambda: (0.0, 1024 * next(peaks))
    )
    assert size_by(by, 4096, memory=memory) == expected


def test_a_microbatch_that_the_batch_would_have_to_fill_up_has_to_gain_more():
    # 1.2 times as fast, but more of it would be filling
    assert size_by(timed(lambda size: 1.2 ** -size.bit_length()), 40) == 16
    assert size_by(timed(lambda size: 1.2 ** -size.bit_length()), 1e6) > 32


def test_records_in_groups_take_smaller_microbatches():
    """Each group fills up one of its own, and how its share of a batch varies is private: nothing is fitted to it."""
    faster = timed(lambda size: 1.15 ** -size.bit_length())
    assert [size_by(faster, 512, groups=groups) for groups in (1, 2, 4, 8)] == [fitted(512, 512), 64, 32, 16]


def test_a_short_run_compares_nothing_and_takes_a_usual_size():
    def refuse(ways):
        pytest.fail("a run so short cannot win the time back")

    model, batch = model_and_batch()
    size = tuning.fastest_microbatch_size(
        Objective(model, loss), batch, {}, expected_batch_size=100, memory=None, largest=tuning.largest_tried(100),
        by=Instruments(timed=refuse),
    )  # fmt: skip
    assert size == fitted(32, 100)


def test_sizes_are_timed_on_the_same_examples_in_the_precisions_of_an_epoch():
    model, batch = model_and_batch()
    steps = []

    def watched(model, loss_fn, examples, *, microbatch_size, **_):
        steps.append((len(examples[1]), microbatch_size, tuple(current_precisions(model))))

    def each_once(ways):
        for work in ways.values():
            work()
        return {name: 1 / int(name) for name in ways}

    by = Instruments(clipped_sum=watched, timed=each_once)
    precisions = {"2": precision("luq-fp4")}
    assert (
        tuning.fastest_microbatch_size(
            Objective(model, loss), batch, precisions, expected_batch_size=100, memory=None, by=by
        )
        == 128
    )
    expected = [(2 * size, one, ("2",)) for size in (16, 32, 64) for one in (size, 2 * size)]
    assert steps == expected


def test_without_a_budget_memory_is_not_looked_at():
    def refuse():
        pytest.fail("not every system can tell")

    by = dataclasses.replace(timed(lambda size: 1.0), reset_peak=refuse, memory_mib=refuse)
    assert size_by(by) == 16
    with pytest.raises(pytest.fail.Exception):
        size_by(by, memory=1.0)


class Memory:
    """A process that holds some GiB already, and of which each example of the largest pass takes 10 MB more."""

    def __init__(self, held=1.0, resets=True):
        self.held = self.peak = held
        self.by = Instruments(
            timed=lambda ways: {name: 1 / int(name) for name in ways},
            memory_mib=lambda: (0.0, self.peak * 1024),
            reset_peak=lambda: ((self.held if resets else self.held / 2) * 1024, resets),
            clipped_sum=self.take,
            impact_sum=lambda objective, pieces, **_: self.take(microbatch_size=len(pieces[0].record_ids)),
        )

    def take(self, *_, microbatch_size, **__):
        self.peak = max(self.peak, self.held + microbatch_size / 100)


def fastest(by, memory):
    return size_by(by, 512, memory)


def of_analysis(by, memory):
    return tuning.largest_analysis_size(*model_and_batch_for(loss), ["2"], score="gradient", memory=memory, by=by)


def model_and_batch_for(loss_fn):
    model, batch = model_and_batch()
    return model, loss_fn, batch


@pytest.mark.parametrize(("ask", "largest"), [(fastest, fitted(512, 512)), (of_analysis, tuning.ANALYSIS_MICROBATCH)])
def test_the_memory_budget_bounds_the_microbatch(ask, largest):
    for memory, expected in ((1.05, 4), (1.09, 8), (1.4, 32), (99.0, largest)):
        process = Memory()
        assert ask(process.by, memory) == expected
        assert process.peak <= memory


def refusal_of(ask, process, **planted):
    with pytest.raises(SettingError) as refusal:
        ask(dataclasses.replace(process.by, **planted), 1.03)
    return str(refusal.value)


@pytest.mark.parametrize("ask", [fastest, of_analysis])
def test_too_little_memory_is_refused_without_telling_what_is_in_use(ask):
    """What is in use tells how many private records are in memory."""
    refusals = {refusal_of(ask, Memory(held)) for held in (1.0, 7.25)}
    assert (
        len(refusals) == 1 and "memory=1.03. Besides" in str(refusals) and "needs 0.04 GiB with 4 ex" in str(refusals)
    )
    # a refusal that tells all of the peak is seen
    assert refusal_of(ask, Memory(7.25), reset_peak=lambda: (0.0, True)) not in refusals


@pytest.mark.parametrize("ask", [fastest, of_analysis])
def test_where_a_peak_is_not_counted_anew_it_counts_from_the_last_one_which_is_said(ask):
    refusal = refusal_of(ask, Memory(resets=False))
    assert "goes on counting, it needs 0.04 GiB" in refusal
    # counted from what is resident, the last peak would be taken for the model's need
    assert "needs 0.04" not in refusal_of(ask, Memory(resets=False), reset_peak=lambda: (512.0, True))


@pytest.mark.parametrize("score", ["loss", "gradient"])
def test_an_analysis_is_tried_as_it_will_run(score):
    model, batch = model_and_batch()
    dpquant.set_policy(model, ["2"])
    tried = []

    def watched(objective, pieces, **keywords):
        tried.append(([piece.num_examples for piece in pieces], keywords["score"]))
        return impact_sum(objective, pieces, **keywords)

    before = torch.random.get_rng_state()
    by = Instruments(impact_sum=watched)
    assert tuning.largest_analysis_size(model, loss, batch, ["2"], score=score, memory=99.0, by=by) == 64
    assert tried == [([size], score) for size in (4, 8, 16, 32, 64)]
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
