# SPDX-License-Identifier: Apache-2.0
"""The law of a run's noised sums is what its ledger says: tap canaries, and planted faults that they find."""

import pytest

import dpquant
from dpquant.audits.taps import Tapping, moments, tapped
from dpquant.training.private import PrivateTraining
from mechanisms import repeating

ALPHA = 1e-6
STEPS, CANARIES = 6, 1500


def found(format=None, **changed):
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=0.5, sample_rate=0.25, expected_batch_size=100.0, steps=STEPS
    )
    sums = tapped(Tapping(plan, CANARIES, format, seed=1), start=repeating(7, **changed))
    assert sums.values.shape == (STEPS, CANARIES) and 600 < sums.inside.sum() < 900
    return moments(sums, format=format, alpha=ALPHA)


def refuted(result):
    return {
        name
        for name, p in (("noise", result.noise_p), ("mean", result.contribution_p), ("steps", result.steps_p))
        if p < ALPHA
    }


@pytest.mark.parametrize("format", [None, "luq-fp4", "int8"])
def test_sums_have_the_law_that_was_charged(format):
    result = found(format)
    assert not refuted(result) and len(result.p_values()) == 3
    assert abs(result.noise_measured - 1) < 0.1 and abs(result.contribution_measured - 0.25) < 0.1
    assert min(result.power.values()) > 0.99


def half(gaussian, shape, std, **purpose):
    return gaussian(shape, std / 2, **purpose)


def every_step_the_same(gaussian, shape, std, **purpose):
    return gaussian(shape, std, **{**purpose, "step": 0, "attempt": 0})


def twice_as_often(draw, num_records, sample_rate, **purpose):
    return draw(num_records, 2 * sample_rate, **purpose)


def as_less(charge, **event):
    charge(**{**event, "noise_multiplier": 2 * event["noise_multiplier"]})


class NowAndThen:
    """Charges every other step."""

    def __init__(self):
        self.number = 0

    def __call__(self, charge, **event):
        self.number += 1
        if self.number % 2:
            charge(**event)


class ClipsAtThree(PrivateTraining):
    """Contributions of 3 C, which pass for C."""

    def _clipped_sum(self, pieces, key):
        clipped = super()._clipped_sum(pieces, key)
        for grad in clipped.grads.values():
            grad.mul_(3)
        return clipped


@pytest.mark.parametrize(
    ("planted", "sign"),
    [
        ({"gaussian": half}, {"noise": -1}),
        ({"gaussian": every_step_the_same}, {"noise": 1}),
        ({"draw": twice_as_often}, {"mean": 1}),
        ({"charge": as_less}, {"noise": -1}),
        ({"make_run": ClipsAtThree}, {"mean": 1}),
    ],
    ids=["noise halved", "noise reused", "drawn twice as often", "less charged", "clipped at 3 C"],
)
def test_a_fault_is_found(planted, sign):
    result = found(**planted)
    z = {"noise": result.noise_z, "mean": result.contribution_z}
    assert sign.keys() <= refuted(result) and all(z[name] * s > 0 for name, s in sign.items())
    if planted.get("gaussian") is half:  # a quarter of the variance, on about half of the canaries
        assert result.noise_z == pytest.approx(-0.75 * (CANARIES / 4) ** 0.5, rel=0.1)


def test_steps_that_are_not_charged_are_found():
    assert "steps" in refuted(found(charge=NowAndThen()))
