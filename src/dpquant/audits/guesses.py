# SPDX-License-Identifier: Apache-2.0
"""What guessing which canaries a training used says about its epsilon: audits of one training run.

A fair coin decided for each of m canaries whether it took part. After the training an attacker guesses r of the coins;
v of the guesses are right. Two bounds on the chance of that many right guesses:

    (epsilon, delta)   v is at most a Bin(r, e^eps / (1 + e^eps)), but for a term of delta: Steinke, Nasr and Jagielski,
                       "Privacy auditing with one (1) training run", arXiv 2305.08846, Theorem 5.2
    f                  the whole trade-off curve of the claimed mechanism: Mahloujifar, Melis and Chaudhuri, "Auditing
                       f-differential privacy in one run", arXiv 2410.22235

The second is the test of a claim here, with the accountant's curve of what the ledger holds. The first is the lower
bound on epsilon that is printed: it needs no curve. It cannot refute at a level below 2 m delta / r, the second can.

How the second works. Let p_j be the chance of exactly j right guesses, and for a threshold i

    r_i = sum over j >= i of j p_j / m            a random canary is guessed, right, and i in all are right
    h_i = sum over j >= i of (r - j) p_j / m      a random canary is guessed, wrong, and i of the others are right

A canary's coin moves the output's distribution by no more than the curve allows, so h_i >= least(r_(i+1)), where
least(y) is the smallest chance of an event without the canary that has chance y with it. From a supposed tail,
P[j >= v] = alpha, these inequalities give lower bounds on r_i and h_i for i = v - 1, ..., 0. By definition r_0 + h_0
is r / m. If the lower bounds exceed that, the tail is below alpha.

This file loads no torch.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import special, stats

from dpquant.audits.bounds import Floats, gaussian_epsilon, gaussian_mu, largest_refuted, smallest_alpha

Least = Callable[[float], float]
"""y -> the smallest chance of an event in one world that has chance y in the neighbouring world."""

_FRACTIONS = (1, 2, 4, 8, 16, 32)  # of the canaries that are guessed: one over these
_HIGHEST_EPSILON, _HIGHEST_MU = 100.0, 60.0
_TRIALS, _OFTEN = 200, 0.9  # simulated audits; the chance that counts as detection


def gaussian_least(mu: float) -> Least:
    """Return the curve of a Gaussian mechanism."""
    return lambda y: float(special.ndtr(special.ndtri(y) - mu))


def profile_least(epsilons: Floats, deltas: Floats) -> Least:
    """Return the curve of a mechanism that is (epsilon, delta)-differentially private at each of these pairs.

    Source: Dong et al., arXiv 1905.02383, Proposition 2.12, for add and remove at once.
    """
    factors = np.exp(-epsilons)

    def least(y: float) -> float:
        found = np.maximum((y - deltas) * factors, 1 - deltas - (1 - y) / factors).max()
        return float(max(found, 0.0))

    return least


@dataclasses.dataclass(frozen=True)
class Guesses:
    """Guesses of coins.

    Attributes:
      canaries: m, number of coins.
      made: r, number of guesses.
      right: v, number of right guesses.
    """

    canaries: int
    made: int
    right: int


def p_value(guesses: Guesses, epsilon: float, delta: float) -> float:
    """Return the chance, at most, of so many right guesses under (epsilon, delta)-differential privacy.

    Source: Steinke, Nasr and Jagielski, arXiv 2305.08846, Theorem 5.2.
    """
    rate = special.expit(epsilon)
    tail = float(stats.binom.sf(guesses.right - 1, guesses.made, rate))
    if delta == 0 or guesses.right == 0:
        return tail
    i = np.arange(1, guesses.right + 1)
    gains = (stats.binom.sf(guesses.right - i - 1, guesses.made, rate) - tail) / i
    return min(1.0, tail + 2 * guesses.canaries * delta * max(0.0, float(gains.max())))


def refutes(guesses: Guesses, least: Least, alpha: float) -> bool:
    """Return whether so many right guesses have a chance below `alpha` for a mechanism of this curve.

    Source: Mahloujifar, Melis and Chaudhuri, arXiv 2410.22235, with abstentions; see the head of this file.
    """
    m, made = guesses.canaries, guesses.made
    r, h = alpha * guesses.right / m, alpha * (made - guesses.right) / m
    for i in range(guesses.right - 1, -1, -1):
        higher = max(h, least(min(r, 1.0)))
        if higher == h:
            break  # neither changes any more
        r, h = r + i / (made - i) * (higher - h), higher
        if r + h > made / m:
            return True
    return r + h > made / m


def numbers_guessed(canaries: int) -> list[int]:
    """Return the numbers of guesses that are tried: even, all canaries down to a thirty-second of them."""
    return sorted({2 * (canaries // (2 * part)) for part in _FRACTIONS if canaries // (2 * part) > 0}, reverse=True)


def guessed(scores: Floats, inside: np.ndarray) -> list[Guesses]:
    """Guess the coins of the canaries with the highest and lowest scores, in each number that is tried.

    Args:
      scores: `(m,)`, higher where a canary seems to have taken part.
      inside: bool `(m,)`, the coins.
    """
    order = np.argsort(scores, kind="stable")
    found = []
    for made in numbers_guessed(len(scores)):
        lowest, highest = order[: made // 2], order[len(order) - made // 2 :]
        found.append(Guesses(len(scores), made, int((~inside[lowest]).sum() + inside[highest].sum())))
    return found


def epsilon_bound(found: Sequence[Guesses], delta: float, alpha: float) -> float:
    """Return the largest epsilon that the guesses refute at this delta, whatever the curve; 0 if none.

    Args:
      found: guesses in several numbers. The level is divided by how many.
      delta: of the claim.
      alpha: chance, at most, that the bound exceeds epsilon.
    """
    level = alpha / len(found)
    return largest_refuted(
        lambda epsilon: any(p_value(one, epsilon, delta) <= level for one in found), _HIGHEST_EPSILON
    )


def gaussian_bound(found: Sequence[Guesses], delta: float, alpha: float) -> float:
    """Return the epsilon at delta of the largest mu that the guesses refute; 0 if none.

    It bounds epsilon if the mechanism's curve is that of a Gaussian one, as it nearly is for many steps.
    """
    level = alpha / len(found)
    mu = largest_refuted(lambda mu: any(refutes(one, gaussian_least(mu), level) for one in found), _HIGHEST_MU)
    return gaussian_epsilon(mu, delta)


def claim_p_value(found: Sequence[Guesses], least: Least) -> float:
    """Return the p-value of the claimed curve, over guesses in several numbers together (Bonferroni)."""
    lowest = min(smallest_alpha(lambda alpha, one=one: refutes(one, least, alpha)) for one in found)
    return min(1.0, lowest * len(found))


def needed(canaries: int, least: Least, alpha: float) -> dict[int, int]:
    """Return {number of guesses: how many must be right to refute a curve}; numbers that cannot are missing."""
    numbers = numbers_guessed(canaries)
    found = {}
    for made in numbers:
        low, high = made // 2, made + 1  # high: more than there are
        while low < high:
            middle = (low + high) // 2
            refuted = middle <= made and refutes(Guesses(canaries, made, middle), least, alpha / len(numbers))
            low, high = (low, middle) if refuted or middle > made else (middle + 1, high)
        if low <= made:
            found[made] = low
    return found


def ceiling(canaries: int, delta: float, alpha: float) -> float:
    """Return the largest epsilon that can be refuted with so many canaries, every guess being right.

    It is that of a Gaussian curve, at level `alpha`. A claim above it can never be refuted.
    """
    return gaussian_bound([Guesses(canaries, made, made) for made in numbers_guessed(canaries)], delta, alpha)


def power(canaries: int, mu: float, needed: dict[int, int]) -> float:
    """Return the chance that the best attack on a mechanism of this mu has as many right guesses as needed.

    The scores are simulated: normal, higher by mu for canaries that take part. A real attack knows less.

    Args:
      canaries: m.
      mu: of the mechanism as it truly is.
      needed: {number of guesses: how many must be right}, from `needed`.
    """
    random, refuted = np.random.default_rng(0), 0
    for _ in range(_TRIALS if needed else 0):
        inside = random.random(canaries) < 0.5
        found = guessed(random.standard_normal(canaries) + mu * inside, inside)
        refuted += any(one.right >= needed.get(one.made, math.inf) for one in found)
    return refuted / _TRIALS


def detectable(canaries: int, mu: float, delta: float, needed: dict[int, int]) -> float | None:
    """Return the epsilon that a mechanism must truly have for the best attack to refute the claim nine times in ten.

    Args:
      canaries: m.
      mu: as claimed.
      delta: at which epsilon is stated.
      needed: {number of guesses: how many must be right}, from `needed`.
    Returns: epsilon of a Gaussian curve; None if not even an open book is refuted.
    """
    low, high = mu, _HIGHEST_MU
    if power(canaries, high, needed) < _OFTEN:
        return None
    while high - low > 0.02 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if power(canaries, middle, needed) >= _OFTEN else (middle, high)
    return gaussian_epsilon(high, delta)


def mu_of(epsilon: float, delta: float) -> float:
    """Return the mu of the Gaussian mechanism that costs this epsilon; a large one where epsilon is infinite."""
    return gaussian_mu(epsilon, delta) if math.isfinite(epsilon) else _HIGHEST_MU
