# SPDX-License-Identifier: Apache-2.0
"""Epsilon agrees with a closed form, a second implementation and itself; calibration stays on the safe side."""

import dataclasses
import functools
import itertools
import math
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant
from scipy import optimize, stats

from dpquant.errors import SettingError
from dpquant.privacy.accounting import GRID, SMALLEST_NOISE, _least_noise, _Solution, calibrate, epsilon, version
from dpquant.privacy.events import Event

DELTA = 1e-5
CELLS = [
    (0.01, 0.8, 100, 1e-5),
    (0.01, 2.0, 2000, 1e-6),
    (0.1, 1.0, 50, 1e-5),
    (0.1, 3.0, 500, 1e-5),
    (0.5, 2.0, 20, 1e-5),
    (0.02, 0.6, 300, 1e-5),
    (0.001, 0.7, 5000, 1e-5),
    (0.05, 1.2, 100, 1e-7),
]


def event(sample_rate: float, noise_multiplier: float, count: int, kind="train") -> Event:
    return Event(kind=kind, sample_rate=sample_rate, noise_multiplier=noise_multiplier, count=count)


def analytic_epsilon(mu: float, delta: float) -> float:
    """Of a Gaussian mechanism with sensitivity over standard deviation mu: Balle and Wang 2018, theorem 8."""

    def excess(eps: float) -> float:
        inside = stats.norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * stats.norm.cdf(-mu / 2 - eps / mu)
        return float(inside - delta)

    return float(optimize.brentq(excess, 0, 100)) if excess(0) > 0 else 0.0


def assert_meets_the_closed_form(measure) -> None:
    """Without subsampling, `count` releases are one Gaussian mechanism with mu = sqrt(count) / sigma."""
    for sigma, count in itertools.product((0.9, 2.0, 10.0), (1, 10)):
        exact = analytic_epsilon(math.sqrt(count) / sigma, DELTA)
        assert exact - 1e-6 <= measure([event(1.0, sigma, count)], DELTA) <= exact + count * GRID


def test_without_subsampling_epsilon_is_the_analytic_gaussians():
    assert_meets_the_closed_form(epsilon)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_one_percent_less_or_more_noise_than_stated_would_be_seen(factor):
    def planted(events, delta):
        return epsilon([dataclasses.replace(e, noise_multiplier=e.noise_multiplier * factor) for e in events], delta)

    with pytest.raises(AssertionError):
        assert_meets_the_closed_form(planted)


@functools.cache
def others_bounds(cell) -> tuple[float, float, float]:
    """Lower bound, estimate and upper bound of epsilon."""
    sample_rate, sigma, count, delta = cell
    mechanism = PoissonSubsampledGaussianMechanism(sampling_probability=sample_rate, noise_multiplier=sigma)
    other = PRVAccountant(prvs=mechanism, max_self_compositions=count, eps_error=0.05, delta_error=delta / 1000)
    return other.compute_epsilon(delta, [count])


def assert_within_the_bounds_of_another_implementation(measure, cell) -> None:
    """Gopi et al. 2021 give a lower and an upper bound by other mathematics (arXiv 2106.02848)."""
    sample_rate, sigma, count, delta = cell
    low, estimate, high = others_bounds(cell)
    measured = measure([event(sample_rate, sigma, count)], delta)
    assert low <= measured <= high
    assert measured == pytest.approx(estimate, abs=5e-3)


@pytest.mark.parametrize("cell", CELLS)
def test_epsilon_lies_within_the_bounds_of_another_implementation(cell):
    assert_within_the_bounds_of_another_implementation(epsilon, cell)


@pytest.mark.parametrize("cell", CELLS)
def test_five_percent_too_few_steps_would_be_seen(cell):
    def planted(events, delta):
        return epsilon([dataclasses.replace(e, count=round(0.95 * e.count)) for e in events], delta)

    with pytest.raises(AssertionError):
        assert_within_the_bounds_of_another_implementation(planted, cell)


@pytest.mark.parametrize("cell", CELLS)
def test_renyi_accounting_is_looser_and_says_nothing_while_at_it(cell, caplog):
    sample_rate, sigma, count, delta = cell
    events = [event(sample_rate, sigma, count)]
    assert epsilon(events, delta) <= epsilon(events, delta, "rdp") + 1e-2
    assert epsilon([event(0.02, 0.3, 100)], delta, "rdp") > 0
    assert not caplog.records


@settings(derandomize=True, deadline=None, max_examples=8)
@given(st.floats(0.001, 0.5), st.floats(0.6, 10), st.integers(1, 1000))
def test_more_of_anything_costs_more(sample_rate, sigma, count):
    base = epsilon([event(sample_rate, sigma, count)], DELTA)
    tolerance = count * 1e-5  # the grid rounds every release up on its own
    assert epsilon([event(sample_rate, sigma * 1.2, count)], DELTA) <= base + tolerance
    assert epsilon([event(sample_rate * 1.2, sigma, count)], DELTA) >= base - tolerance
    assert epsilon([event(sample_rate, sigma, count + 10)], DELTA) >= base - tolerance
    assert base >= 0


def assert_grouping_makes_no_difference(measure) -> None:
    train, analysis = event(0.02, 1.0, 300), event(0.01, 2.0, 6, "analysis")
    expected = epsilon([train, analysis], DELTA)
    for parts in ((1, 299), (100, 100, 100), (299, 0, 1)):
        regrouped = [dataclasses.replace(train, count=part) for part in parts]
        assert measure([regrouped[0], analysis, *regrouped[1:]], DELTA) == expected


def test_epsilon_does_not_depend_on_grouping_order_or_kind():
    assert_grouping_makes_no_difference(epsilon)
    assert epsilon([event(0.02, 1.0, 9, "analysis")], DELTA) == epsilon([event(0.02, 1.0, 9)], DELTA)


def test_forgetting_a_group_would_be_seen():
    with pytest.raises(AssertionError):
        assert_grouping_makes_no_difference(lambda events, delta: epsilon(events[:-1], delta))


def test_nothing_costs_nothing_and_no_noise_costs_everything():
    assert epsilon([], DELTA) == 0
    assert epsilon([event(0.02, 1.0, 0), event(0.02, 0.0, 0)], DELTA) == 0
    assert epsilon([event(0.02, 1.0, 10), event(0.02, 0.0, 1)], DELTA) == math.inf
    assert epsilon([event(0.05, 1e6, 100)], DELTA) == pytest.approx(0, abs=1e-3)
    assert isinstance(epsilon([event(0.05, 1e6, 100)], DELTA), float)


def test_asking_twice_gives_the_same_answer():
    assert epsilon([event(0.02, 1.1, 77)], DELTA) == epsilon([event(0.02, 1.1, 77)], DELTA)


def assert_calibration_is_safe_and_tight(solve, target, fixed) -> None:
    sigma = solve(target, DELTA, sample_rate=0.02, steps=500, fixed=fixed)
    spent = epsilon([event(0.02, sigma, 500), *fixed], DELTA)
    assert target * (1 - 1e-5) <= spent <= target


@pytest.mark.parametrize("target", [0.05, 1.0, 8.0, 40.0])
@pytest.mark.parametrize("fixed", [[], [event(0.01, 5.0, 3, "analysis")]], ids=["alone", "analysis"])
def test_calibration_meets_its_target_from_below(target, fixed):
    assert_calibration_is_safe_and_tight(calibrate, target, fixed)


@pytest.mark.parametrize("factor", [0.99999, 1.00002])
def test_a_little_too_much_or_too_little_noise_would_be_seen(factor):
    with pytest.raises(AssertionError):
        assert_calibration_is_safe_and_tight(lambda *a, **k: factor * calibrate(*a, **k), 4.0, [])


def test_calibration_goes_no_lower_than_the_least_noise_that_may_be_given():
    assert calibrate(500.0, DELTA, sample_rate=1e-6, steps=1) == SMALLEST_NOISE
    assert epsilon([event(1e-6, SMALLEST_NOISE, 1)], DELTA) <= 500


@pytest.mark.parametrize(
    ("cost", "optimum"),
    [
        (lambda sigma: 8 / sigma, 4.0),
        (lambda sigma: 2 * math.exp(4 - sigma), 4.0),
        (lambda sigma: 1.9 if sigma >= 4 else 500.0, 4.0),  # jumps over the target
        (lambda sigma: 0.0 if sigma >= 4 else math.inf, 4.0),
        (lambda sigma: 8e6 / sigma, 4e6),
        (lambda sigma: 1e-9 / sigma, SMALLEST_NOISE),
    ],
)
def test_the_least_noise_is_found_with_few_calls_whatever_epsilon_looks_like(cost, optimum):
    asked = []
    found = _least_noise(lambda sigma: asked.append(sigma) or cost(sigma), 2.0, 1e-5, _Solution(1.0, -1.5))
    assert optimum * (1 - 1e-12) <= found.sigma <= optimum * (1 + 1e-5) and cost(found.sigma) <= 2.0
    assert found.sigma in asked and len(asked) < 60


def test_no_noise_is_found_where_none_is_enough():
    assert _least_noise(lambda sigma: 2.0 + 1 / sigma, 2.0, 1e-5, _Solution(1.0, -1.5)) is None


def test_calibration_that_forgets_the_analysis_would_be_seen():
    analysis = [event(0.02, 0.8, 10, "analysis")]
    with pytest.raises(AssertionError):
        assert_calibration_is_safe_and_tight(lambda *a, **k: calibrate(*a, **{**k, "fixed": ()}), 4.0, analysis)


def test_an_analysis_that_costs_the_target_alone_is_refused_with_its_price():
    analysis = [event(0.05, 1.0, 10, "analysis")]
    price = epsilon(analysis, DELTA)
    with pytest.raises(SettingError, match=rf"epsilon > {price:.4g}.*analysis alone"):
        calibrate(price, DELTA, sample_rate=0.02, steps=100, fixed=analysis)
    alone = calibrate(price + 0.01, DELTA, sample_rate=0.02, steps=100)
    assert calibrate(price + 0.01, DELTA, sample_rate=0.02, steps=100, fixed=analysis) > 2 * alone


def test_an_epsilon_that_no_noise_meets_is_refused():
    with pytest.raises(SettingError, match="epsilon=1e-06"):
        calibrate(1e-6, 1e-12, sample_rate=1.0, steps=100)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "test"),
        ("sample_rate", 0.0),
        ("sample_rate", 1.01),
        ("sample_rate", math.nan),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", math.inf),
        ("count", -1),
        ("count", 1.0),
    ],
)
def test_events_that_cannot_have_happened_are_refused(name, value):
    with pytest.raises(SettingError, match=f"Expected {name} "):
        dataclasses.replace(event(0.1, 1.0, 1), **{name: value})


def test_delta_and_accountant_are_checked():
    for delta in (0.0, 1.0, math.nan, 1e-16):
        with pytest.raises(SettingError, match=r"delta of the \(epsilon, delta\) guarantee.*far below 1 / records"):
            epsilon([], delta)
    with pytest.raises(SettingError, match="pld, rdp"):
        epsilon([], DELTA, cast(Any, "gdp"))


def test_the_accountant_has_a_name_and_a_version():
    assert version().startswith("dp_accounting 0.6")
