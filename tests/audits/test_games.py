# SPDX-License-Identifier: Apache-2.0
"""Nobody tells one record's part in a step or an analysis better than the noise allows; planted faults are seen."""

import numpy as np
import pytest

import dpquant
from dpquant.audits.games import Worlds, judged, tap_game, world_game
from dpquant.audits.taps import Tapping, tapped
from dpquant.privacy.noise import NoiseSource
from dpquant.privacy.secret import SecretKey
from dpquant.training.private import PrivateTraining
from mechanisms import repeating

ALPHA = 1e-6


def step_game(**changed):
    plan = dpquant.PrivacyPlan(
        noise_multiplier=1.0, delta=1e-5, max_grad_norm=1.0, sample_rate=1.0, expected_batch_size=500.0, steps=6
    )
    return tap_game(tapped(Tapping(plan, 1000, "luq-fp4", seed=2), start=repeating(3, **changed)), alpha=ALPHA)


def half(gaussian, shape, std, **purpose):
    return gaussian(shape, std / 2, **purpose)


def a_thousandth(gaussian, shape, std, **purpose):
    return gaussian(shape, std / 1000, **purpose)


class ClipsAtTwo(PrivateTraining):
    """Contributions of 2 C, which pass for C."""

    def _clipped_sum(self, pieces, key):
        clipped = super()._clipped_sum(pieces, key)
        for grad in clipped.grads.values():
            grad.mul_(2)
        return clipped


def test_a_step_tells_no_more_than_its_noise_allows():
    found = step_game()
    assert found.p_value > ALPHA and found.plays > 2500 and found.power["noise halved"] > 0.99
    assert 0.7 < found.mu_bound < found.mu_claimed == 1.0


@pytest.mark.parametrize("planted", [{"gaussian": half}, {"make_run": ClipsAtTwo}], ids=["noise halved", "2 C"])
def test_a_step_that_tells_more_is_refuted(planted):
    found = step_game(**planted)
    assert found.p_value < ALPHA and found.mu_bound > found.mu_claimed


# The real analysis and the real step, in two worlds that differ by one record. So few plays show large faults alone.
# That honest ones are not refuted: `tests/app/test_audit.py`.

FEW = Worlds(36, noise_multiplier=6.0)


def test_steps_and_analyses_that_tell_more_are_refuted():
    for found in world_game(FEW, alpha=ALPHA, start=repeating(5, gaussian=a_thousandth)):
        assert found.p_value < 1e-4 and found.mu_bound > found.mu_claimed  # three misses of 29 would still do


# The law of an analysis: 20,000 plays at once, noise of the real source, contributions that are as far out as may be.

PLAYS, CLIP, NORMALISER = 20_000, 0.5, 8


def clipped(v):
    return v * np.minimum(1, CLIP / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-300))


def sum_of_clipped(vectors):
    return clipped(vectors).sum(0) / NORMALISER


def realised_mean(vectors):
    return clipped(vectors).mean(0)


def clipped_sum_of_all(vectors):
    return clipped(vectors.sum(0)) / NORMALISER


def analysis_game(release):
    """Against 8 records on one side, one far out on the other."""
    records = np.concatenate([np.full((8, 3), -0.1), [[9.0, 9.0, 9.0]]])
    known = [release(records[:8]), release(records)]
    direction = (known[1] - known[0]) / np.linalg.norm(known[1] - known[0])
    noise = NoiseSource(SecretKey.from_seed(1))
    outputs = []
    for world, mean in enumerate(known):
        drawn = noise.gaussian(
            (PLAYS, 3), CLIP, stream="analysis", step=0, attempt=world, name="impacts"
        )  # sigma = 1, for a sum
        outputs.append((mean + drawn.numpy() / NORMALISER - (known[0] + known[1]) / 2) @ direction)
    return judged("analysis", *outputs, mu=1.0, alpha=ALPHA)


def test_the_sum_of_clipped_impacts_tells_no_more_than_its_noise_allows():
    found = analysis_game(sum_of_clipped)
    assert found.p_value > ALPHA and 0.9 < found.mu_bound < 1.0


@pytest.mark.parametrize("planted", [realised_mean, clipped_sum_of_all])
def test_other_estimators_tell_more_and_are_refuted(planted):
    assert analysis_game(planted).p_value < ALPHA
