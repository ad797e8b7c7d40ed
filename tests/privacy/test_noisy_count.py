# SPDX-License-Identifier: Apache-2.0
"""Noise of a count has the discrete Laplace law, exactly; samplers of another law are found."""

import functools
import math

import mpmath
import numpy as np
import pytest
from scipy import stats

from dpquant.errors import SettingError
from dpquant.privacy.noisy_count import (
    LARGEST,
    SMALLEST,
    _boundaries,
    check_count_epsilon,
    discrete_laplace,
    noise_bound,
    noisy_count,
)
from dpquant.privacy.secret import SecretKey

ALPHA = 1e-6
KEY = SecretKey(b"a key for tests!")
DRAWS = 20_000
EPSILONS = (0.3, 1.0, 3.0)


@functools.cache
def drawn(epsilon):
    stream = KEY.stream("test", str(epsilon))
    return np.array([discrete_laplace(stream, epsilon) for _ in range(DRAWS)])


def assert_has_law(x, epsilon):
    """A chi-square test; integers that are rare are counted together."""
    factor = (1 - math.exp(-epsilon)) / (1 + math.exp(-epsilon))
    usual = [k for k in range(-60, 61) if factor * math.exp(-epsilon * abs(k)) * len(x) >= 10]
    expected = [factor * math.exp(-epsilon * abs(k)) * len(x) for k in usual]
    observed = [int((x == k).sum()) for k in usual]
    rest = (len(x) - sum(observed), len(x) - sum(expected))
    assert stats.chisquare([*observed, rest[0]], [*expected, rest[1]]).pvalue > ALPHA


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_noise_has_the_discrete_laplace_law(epsilon):
    assert_has_law(drawn(epsilon), epsilon)


PLANTED = {
    "zero twice as often": np.where(np.random.default_rng(1).random(DRAWS) < 0.05, 0, drawn(1.0)),
    "twice the epsilon": drawn(3.0),
    "no negative ones": np.abs(drawn(1.0)),
    "a Laplace, rounded": np.rint(np.random.default_rng(0).laplace(size=DRAWS)).astype(int),
    "none": np.zeros(DRAWS, int),
}


@pytest.mark.parametrize("name", PLANTED)
def test_noise_of_another_law_is_found(name):
    with pytest.raises(AssertionError):
        assert_has_law(PLANTED[name], 1.0)


@pytest.mark.parametrize("epsilon", [0.1, 1 / 3, 7.25])
def test_boundaries_are_the_law_s_to_the_last_bit(epsilon):
    with mpmath.workdps(80):
        exact = [int(mpmath.floor(mpmath.exp(-mpmath.mpf(epsilon) * (k + 1)) * 2**64)) for k in range(20)]
    found = _boundaries(epsilon)._first.tolist()
    assert found[:20] == exact[: len(found)]


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_bound_covers_the_noise_as_often_as_it_says(epsilon):
    covered = [np.mean(np.abs(drawn(epsilon)) <= noise_bound(epsilon, 0.95) - less) for less in (0, 1)]
    assert covered[0] > 0.945 and covered[1] < 0.955
    assert noise_bound(LARGEST, 0.95) == 0


def test_a_count_is_released_with_noise_of_its_key():
    found = {noisy_count(7, 0.5, SecretKey()) for _ in range(40)}
    assert len(found) > 3
    key = SecretKey(b"another test key")
    assert noisy_count(9, 0.5, key) == noisy_count(7, 0.5, key) + 2


@pytest.mark.parametrize("epsilon", [0.0, SMALLEST / 2, 2 * LARGEST, math.nan, math.inf, -1.0])
def test_an_epsilon_out_of_range_is_refused(epsilon):
    with pytest.raises(SettingError, match="Expected test_epsilon"):
        check_count_epsilon("test_epsilon", epsilon)
    check_count_epsilon("test_epsilon", SMALLEST)
    check_count_epsilon("test_epsilon", LARGEST)
