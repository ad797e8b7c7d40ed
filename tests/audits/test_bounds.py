# SPDX-License-Identifier: Apache-2.0
"""The statistics of an audit against closed forms."""

import math

import numpy as np
import pytest
from scipy import stats

from dpquant.audits.bounds import (
    binomial_upper,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    largest_refuted,
    mu_lower_bound,
    normal_p_value,
    normal_power,
    smallest_alpha,
    variance_p_value,
    variance_power,
    variance_z,
)
from dpquant.privacy.accounting import epsilon
from dpquant.privacy.events import Event


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (9, 10), (120, 2000)])
def test_at_the_upper_limit_so_few_successes_have_chance_alpha(successes, trials):
    rate = binomial_upper(successes, trials, 1e-3)
    assert stats.binom.cdf(successes, trials, rate) == pytest.approx(1e-3, rel=1e-6)


def test_limits_without_successes_and_without_failures():
    assert binomial_upper(0, 50, 0.05) == pytest.approx(1 - 0.05 ** (1 / 50))
    assert binomial_upper([0, 50], 50, 0.05)[1] == 1.0


def test_mu_of_known_errors():
    # both limits by Clopper and Pearson: 100 of 1000 at 97.5 % is at most 0.1203
    quantile = stats.norm.ppf(stats.beta.ppf(0.975, 101, 900))
    assert mu_lower_bound(100, 100, 1000, 0.05) == pytest.approx(-2 * quantile)
    assert mu_lower_bound(1000, 0, 1000, 0.05) == -math.inf


def test_mu_is_not_overstated():
    false_alarms, misses = np.random.default_rng(0).binomial(500, stats.norm.cdf(-0.5), (2, 20_000))
    over = (mu_lower_bound(false_alarms, misses, 500, 0.05) > 1.0).mean()
    assert over < 0.05 < (mu_lower_bound(false_alarms, misses, 500, 0.05) > 0.8).mean()


@pytest.mark.parametrize(("sigma", "delta"), [(0.5, 1e-5), (1.0, 1e-5), (4.0, 1e-3)])
def test_a_gaussian_mechanism_costs_what_the_accountant_says(sigma, delta):
    charged = epsilon([Event(kind="train", sample_rate=1.0, noise_multiplier=sigma)], delta)
    assert gaussian_epsilon(1 / sigma, delta) == pytest.approx(charged, abs=2e-3)
    assert gaussian_mu(gaussian_epsilon(1 / sigma, delta), delta) == pytest.approx(1 / sigma, rel=1e-6)


def test_at_epsilon_zero_delta_is_the_total_variation():
    assert gaussian_delta(0.0, 1.0) == pytest.approx(2 * stats.norm.cdf(0.5) - 1)
    assert gaussian_epsilon(1e-9, 1e-5) == 0.0


def test_variances_and_means():
    values = np.random.default_rng(1).standard_normal(2000)
    assert variance_p_value(values, 1.0) > 1e-3 and abs(variance_z(values, 1.0)) < 3
    assert variance_p_value(values / 2, 1.0) < 1e-12 and variance_z(values / 2, 1.0) < -17
    assert normal_p_value(1.959964) == pytest.approx(0.05, rel=1e-5)


def test_powers_are_the_level_without_a_fault_and_grow_with_it():
    assert variance_power(1000, 1.0, 1e-3) == pytest.approx(1e-3)
    assert variance_power(1000, 0.25, 1e-6) > 0.999 > 0.5 > variance_power(1000, 0.95, 1e-6)
    assert normal_power(0.0, 1e-3) == pytest.approx(1e-3)
    assert normal_power(4.8916, 1e-6) == pytest.approx(0.5, abs=1e-3)


def test_the_search_for_a_p_value_finds_it():
    assert smallest_alpha(lambda alpha: alpha >= 3e-7) == pytest.approx(3e-7, rel=0.02)
    assert smallest_alpha(lambda alpha: False) == 1.0
    assert smallest_alpha(lambda alpha: True) == pytest.approx(1e-100)
    assert largest_refuted(lambda value: value < 2.5, 100.0) == pytest.approx(2.5)
