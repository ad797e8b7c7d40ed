# SPDX-License-Identifier: Apache-2.0
"""Statistics of an audit: what outputs of a mechanism say against the noise and sensitivity that are claimed for it.

Every test has a p-value: the chance, at most, that a mechanism as claimed gives outputs as extreme as these. A small
one refutes the claim; a large one proves nothing. This file loads no torch.

Symbols: T steps, q sample rate, sigma noise multiplier, C sensitivity of a step's sum, m canaries; mu = C / noise of a
Gaussian mechanism (Dong et al., arXiv 1905.02383), K plays.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

Floats = NDArray[np.float64]

_LEAST_ALPHA = 1e-100  # a smaller p-value is given as this


def binomial_upper(successes: ArrayLike, trials: int, alpha: float) -> Floats:
    """Return the upper Clopper-Pearson limit: the true rate exceeds it with probability at most `alpha`.

    Args:
      successes: of `trials` independent trials; any shape.
      trials: number of trials.
      alpha: in (0, 1).
    Source: Clopper and Pearson 1934.
    """
    successes = np.asarray(successes, dtype=np.float64)
    failures = np.maximum(trials - successes, 0.5)  # where none failed, the limit below is not used
    return np.where(successes < trials, special.betainccinv(successes + 1, failures, alpha), 1.0)


def mu_lower_bound(false_alarms: ArrayLike, misses: ArrayLike, plays: int, alpha: float) -> Floats:
    """Return a lower bound on the mu of a mechanism whose outputs were told apart with so few errors.

    Args:
      false_alarms: plays without the record that were taken for plays with it; any shape.
      misses: plays with the record that were taken for plays without it.
      plays: K, of each kind, with a rule that was fixed before.
      alpha: chance, at most, that the bound exceeds mu.
    Returns: float64; negative where there were more errors than by guessing.
    Privacy: post-processing.
    Source: Nasr et al., arXiv 2302.07956, section 4 (auditing Gaussian differential privacy).
    """
    rates = [binomial_upper(errors, plays, alpha / 2) for errors in (false_alarms, misses)]
    return -special.ndtri(rates[0]) - special.ndtri(rates[1])


def gaussian_delta(epsilon: ArrayLike, mu: float) -> Floats:
    """Return the delta at which a mechanism with this mu > 0 is (epsilon, delta)-differentially private.

    Source: Balle and Wang, arXiv 1805.06530, Theorem 8.
    """
    epsilon = np.asarray(epsilon, dtype=np.float64)
    first = special.log_ndtr(-epsilon / mu + mu / 2)
    second = epsilon + special.log_ndtr(-epsilon / mu - mu / 2)
    return np.exp(first) * -np.expm1(np.minimum(second - first, 0.0))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the largest mu at which a Gaussian mechanism is (epsilon, delta)-differentially private."""
    return _largest(lambda mu: bool(gaussian_delta(epsilon, mu) <= delta), 1e-6, 1e4)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon >= 0 at which a mechanism with this mu is (epsilon, delta)-differentially private."""
    if mu <= 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    return _largest(lambda epsilon: bool(gaussian_delta(epsilon, mu) > delta), 0.0, mu * (mu + 100))


def variance_p_value(values: Floats, variance: float) -> float:
    """Return the two-sided p-value of "independent, of mean 0 and this variance, normal". Source: chi-squared test."""
    statistic = float(np.square(values).sum()) / variance
    tails = float(stats.chi2.cdf(statistic, len(values))), float(stats.chi2.sf(statistic, len(values)))
    return min(1.0, 2 * min(tails))


def variance_z(values: Floats, variance: float) -> float:
    """Return by how many standard errors the mean square of the values exceeds a variance."""
    return float(np.square(values).mean() / variance - 1) * math.sqrt(len(values) / 2)


def variance_power(count: int, ratio: float, alpha: float) -> float:
    """Return the chance of p < alpha in the variance test, if the variance is `ratio` times what is claimed."""
    low, high = stats.chi2.ppf([alpha / 2, 1 - alpha / 2], count)
    return float(stats.chi2.cdf(low / ratio, count) + stats.chi2.sf(high / ratio, count))


def normal_p_value(z: float) -> float:
    """Return the two-sided p-value of a standard normal."""
    return float(2 * stats.norm.sf(abs(z)))


def normal_power(shift: float, alpha: float) -> float:
    """Return the chance of p < alpha for a normal of variance 1 whose mean is `shift`."""
    z = stats.norm.isf(alpha / 2)
    return float(stats.norm.sf(z - shift) + stats.norm.cdf(-z - shift))


def smallest_alpha(refutes: Callable[[float], bool]) -> float:
    """Return the p-value of a test: the smallest level in [1e-100, 1] at which it refutes, to a hundredth; 1 if none.

    Args:
      refutes: level -> whether the test refutes at it; once it does, at every larger level too.
    """
    if not refutes(1 - 1e-9):
        return 1.0
    low, high = math.log(_LEAST_ALPHA), 0.0
    if refutes(_LEAST_ALPHA):
        return _LEAST_ALPHA
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if refutes(math.exp(middle)) else (middle, high)
    return math.exp(high)


def _largest(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return the largest argument in [low, high] up to which `holds` is true, by bisection; low if it is nowhere."""
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def largest_refuted(refutes: Callable[[float], bool], high: float) -> float:
    """Return the largest value in [0, high] that a test refutes, to a relative 1e-15; 0 if it refutes none.

    Args:
      refutes: value -> whether it is refuted; if a value is, so is every smaller one.
      high: where the search ends.
    """
    return _largest(refutes, 0.0, high)
