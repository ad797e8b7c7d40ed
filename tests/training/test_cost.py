# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from dpquant.training.cost import (
    PAPER_SHARE,
    PAPER_SPEEDUPS,
    CostModel,
    LayerCost,
    overhead_behind,
    paper_speedup,
    savings,
    warnings,
)

LAYERS = {"a": LayerCost(macs=30.0, full=0.03, quantized=0.01), "b": LayerCost(macs=10.0, full=0.01, quantized=0.02)}
MODEL = CostModel(layers=LAYERS, batch_size=10, full_step=0.5)


def test_a_step_is_the_full_one_less_what_its_layers_save():
    assert MODEL.other == pytest.approx(0.1) and MODEL.overhead == pytest.approx(0.2)
    assert dataclasses.replace(MODEL, full_step=0.3).overhead == 0  # less than the layers took when they were timed
    assert [MODEL.step(names) for names in ((), ("a",), ("b",), ("a", "b"))] == pytest.approx([0.5, 0.3, 0.6, 0.4])
    assert (MODEL.share_of_time("a"), MODEL.share_of_macs(["a"])) == pytest.approx((0.6, 0.75))
    assert [layer.gain for layer in LAYERS.values()] == pytest.approx([3.0, 0.5])


def test_other_hardware_gains_the_same_on_every_layer():
    assert MODEL.with_gain(4).step(("a", "b")) == pytest.approx(0.1 + 0.4 / 4)
    assert MODEL.with_gain(4).step(()) == MODEL.full_step


def test_the_papers_model_by_hand():
    assert paper_speedup(0.9) == pytest.approx(1 / 0.325)
    assert paper_speedup(0.9, overhead=1.0) == 1 and paper_speedup(0.0) == 1
    assert paper_speedup(1.0, analysis=0.25) == pytest.approx(2)


def test_the_papers_range_is_that_of_overheads_from_a_fifth_to_a_third():
    overheads = [overhead_behind(speedup, PAPER_SHARE) for speedup in PAPER_SPEEDUPS]
    assert overheads == pytest.approx([0.365, 0.189], abs=1e-3)
    for speedup, overhead in zip(PAPER_SPEEDUPS, overheads, strict=True):
        assert paper_speedup(PAPER_SHARE, overhead=overhead) == pytest.approx(speedup)


def test_savings_by_hand():
    saved = savings(7200, 3600, runs_per_month=10, cost_per_hour=0.5)
    assert (saved.hours, saved.money) == (10, 5)


GOOD = {"speedup": 2.0, "analysis_share": 0.01, "scores": [0.0, 1.0, 2.0], "score_noise": 0.1}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"analysis_share": 0.04}, "4.0% of epsilon"),
        ({"score_noise": 0.9}, "ranking is noise"),
        ({"scores": [0.0, 1.0, 2.0], "score_noise": 1.1}, "ranking is noise"),
        ({"speedup": 1.01}, "no speed-up"),
    ],
    ids=["budget", "ranking", "only noise", "speed"],
)
def test_each_sign_of_failure_is_told_and_no_other(change, words):
    assert warnings(**GOOD) == []
    (sign,) = warnings(**{**GOOD, **change})
    assert words in sign


def test_without_a_run_or_an_analysis_nothing_is_said_of_the_ranking():
    assert warnings(**{**GOOD, "scores": [], "score_noise": 9.0}) == []
    assert warnings(**{**GOOD, "score_noise": None}) == []
