# SPDX-License-Identifier: Apache-2.0
"""Guesses of coins: published numbers, curves, and attacks on mechanisms whose curve is known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dpquant.audits.bounds import gaussian_delta, gaussian_mu
from dpquant.audits.guesses import (
    Guesses,
    ceiling,
    claim_p_value,
    detectable,
    epsilon_bound,
    gaussian_bound,
    gaussian_least,
    guessed,
    mu_of,
    needed,
    numbers_guessed,
    p_value,
    power,
    profile_least,
    refutes,
)
from dpquant.privacy.accounting import deltas
from dpquant.privacy.events import Event


@pytest.mark.parametrize(
    ("canaries", "made", "right", "bound"),
    [(100, 100, 100, 3.49), (500, 500, 500, 5.10), (1000, 1000, 1000, 5.78), (5000, 5000, 5000, 7.28),
     (1000, 100, 95, 2.17)],
)  # fmt: skip
def test_bounds_are_the_published_ones(canaries, made, right, bound):
    assert epsilon_bound([Guesses(canaries, made, right)], 1e-5, 0.05) == pytest.approx(bound, abs=6e-3)


def test_without_delta_the_p_value_is_a_binomial_tail():
    assert p_value(Guesses(50, 20, 15), math.log(3), 0.0) == pytest.approx(stats.binom.sf(14, 20, 0.75))
    assert p_value(Guesses(50, 20, 0), 1.0, 1e-5) == 1.0


def test_delta_makes_a_p_value_larger_by_what_the_theorem_says():
    tail = [stats.binom.sf(k - 1, 10, 0.5) for k in range(11)]
    wanted = tail[9] + 2 * 40 * 1e-3 * max((tail[9 - i] - tail[9]) / i for i in range(1, 10))
    assert p_value(Guesses(40, 10, 9), 0.0, 1e-3) == pytest.approx(wanted)


def test_of_a_single_guess_the_curve_decides():
    """Right with chance y, wrong with chance least(y) or more: refuted where they exceed 1."""
    least = gaussian_least(1.0)
    most = stats.norm.cdf(0.5)  # the best that a guess can be
    assert refutes(Guesses(1, 1, 1), least, most + 1e-6) and not refutes(Guesses(1, 1, 1), least, most - 1e-6)


def test_independent_guesses_as_good_as_the_curve_allows_are_not_refuted_too_often():
    """The exact tail of the best guesses at mu lies below the bound, for every number of right guesses."""
    for mu, made in itertools.product((0.3, 1.0, 2.0), (5, 40)):
        rate = stats.norm.cdf(mu / 2)
        for right in range(made + 1):
            tail = stats.binom.sf(right - 1, made, rate)
            assert not refutes(Guesses(made, made, right), gaussian_least(mu), tail * (1 - 1e-9))


def test_the_profile_of_a_gaussian_mechanism_is_its_curve():
    epsilons = np.linspace(0, 15, 2000)
    profile, curve = profile_least(epsilons, gaussian_delta(epsilons, 1.0)), gaussian_least(1.0)
    for y in (0.0, 1e-6, 1e-3, 0.1, 0.5, 0.9, 0.999, 1.0):
        assert profile(y) <= curve(y) * (1 + 1e-9) + 1e-12  # a profile allows no more than the curve
        assert profile(y) == pytest.approx(curve(y), rel=1e-2, abs=1e-9)


def test_the_accountants_profile_is_that_of_what_was_charged():
    epsilons = np.linspace(0, 15, 40)
    charged = deltas([Event(kind="train", sample_rate=1.0, noise_multiplier=1.0)], epsilons)
    assert charged == pytest.approx(gaussian_delta(epsilons, 1.0), abs=1e-3)


def test_extreme_scores_are_guessed():
    scores = np.arange(100.0)
    inside = scores >= 50
    assert numbers_guessed(100) == [100, 50, 24, 12, 6, 2]
    assert all(one.right == one.made for one in guessed(scores, inside))
    assert all(one.right == 0 for one in guessed(-scores, inside))
    mistaken = inside.copy()
    mistaken[[0, 99]] = [True, False]
    assert [one.made - one.right for one in guessed(scores, mistaken)] == [2] * 6


def test_what_is_needed_refutes_and_one_less_does_not():
    least = gaussian_least(gaussian_mu(1.0, 1e-5))
    for made, right in needed(400, least, 1e-3).items():
        level = 1e-3 / len(numbers_guessed(400))
        assert refutes(Guesses(400, made, right), least, level)
        assert not refutes(Guesses(400, made, right - 1), least, level)


def best_attack(canaries, mu, seed):
    random = np.random.default_rng(seed)
    inside = random.random(canaries) < 0.5
    return guessed(random.standard_normal(canaries) + mu * inside, inside)


def test_an_honest_mechanism_is_not_refuted_and_one_without_noise_is():
    claimed = gaussian_mu(2.0, 1e-5)
    honest, open_book = best_attack(1000, claimed, 0), best_attack(1000, 20.0, 0)
    assert epsilon_bound(honest, 1e-5, 1e-6) < 2 < epsilon_bound(open_book, 1e-5, 0.05)
    assert gaussian_bound(honest, 1e-5, 1e-6) < 2 < gaussian_bound(open_book, 1e-5, 1e-6)
    assert claim_p_value(honest, gaussian_least(claimed)) > 1e-6 > claim_p_value(open_book, gaussian_least(claimed))


def test_a_claim_above_the_ceiling_cannot_be_refuted():
    highest = ceiling(200, 1e-5, 1e-4)
    assert needed(200, gaussian_least(gaussian_mu(highest * 0.99, 1e-5)), 1e-4)
    assert not needed(200, gaussian_least(gaussian_mu(highest * 1.01, 1e-5)), 1e-4)


def test_power_is_none_at_the_claim_and_full_without_noise():
    claimed = gaussian_mu(1.0, 1e-5)
    wanted = needed(500, gaussian_least(claimed), 1e-4)
    assert power(500, claimed, wanted) == 0.0 and power(500, mu_of(math.inf, 1e-5), wanted) == 1.0
    found = detectable(500, claimed, 1e-5, wanted)
    assert found is not None and 2 < found < 40
    assert (
        power(500, gaussian_mu(1.1 * found, 1e-5), wanted) >= 0.9 > power(500, gaussian_mu(0.8 * found, 1e-5), wanted)
    )
    assert detectable(500, claimed, 1e-5, {}) is None
