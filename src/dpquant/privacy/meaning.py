# SPDX-License-Identifier: Apache-2.0
"""What an epsilon means: what an attacker gains, what holds for a person with several records, and at other deltas.

Epsilon at one delta is one point of a curve: the privacy loss distribution gives delta(epsilon) for every epsilon, and
with it the whole trade-off between an attacker's two errors. Everything here is read off that curve, and every number
is rounded to the pessimistic side: an attacker gains at most that much.

The attacker knows every record but one, sees everything that was released, and guesses whether that record was among
the training records. Symbols: a false-positive rate, b true-positive rate. For every epsilon >= 0
    b <= exp(epsilon) a + delta(epsilon)    and    1 - a <= exp(epsilon) (1 - b) + delta(epsilon)
Sources: Kairouz, Oh and Viswanath, arXiv 1311.0776 (the inequalities); Dong, Roth and Su, arXiv 1905.02383 (mu).

This file loads no torch and reads no data.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from dpquant.privacy import accounting
from dpquant.privacy.events import Event, merged

FALSE_POSITIVES = (0.001, 0.01, 0.1)
OTHER_DELTAS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
RECORDS = (1, 2, 5, 10)
_POINTS = 96  # of the curve; every point gives a bound, and more of them a slightly lower one
_GRID = 1e-2  # of the privacy loss, for epsilons up to 8
_PERSON_GRID = 2e-2  # for each record: a person's privacy loss grows with their number
_LARGEST_MU = 200.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
    """What an attacker gains at one false-positive rate.

    Attributes:
      false_positive_rate: share of the people who took no part that he accuses of having done so.
      true_positive_rate: share of those who took part of whom he finds out, at most.
      from_epsilon_alone: the same, if only epsilon and delta were known and not the mechanism.
    """

    false_positive_rate: float
    true_positive_rate: float
    from_epsilon_alone: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meaning:
    """What releases mean for one record.

    Attributes:
      attacks: for false-positive rates of 0.1, 1 and 10 %.
      even_odds: share of right guesses of the best attacker, if one in two took part. A coin has 0.5.
      mu: noise of one Gaussian release that protects no better than all releases together, for every delta of at least
        the claimed one: as if the sum of everything were released once with noise of sensitivity / mu.
    """

    attacks: tuple[Attack, ...]
    even_odds: float
    mu: float

    def at(self, false_positive_rate: float) -> Attack:
        """Return the attack at one of `FALSE_POSITIVES`."""
        return next(one for one in self.attacks if one.false_positive_rate == false_positive_rate)

    def rows(self) -> list[tuple[str, str]]:
        """Return the meaning as rows (name, value) of text."""
        return [
            *(
                (f"members found out, at {one.false_positive_rate:.1%} false accusations", _at_most(one))
                for one in self.attacks
            ),
            ("best guess at even odds", percent_up(self.even_odds)),
            ("mu (Gaussian DP)", f"{_up(self.mu, 2):.2f}"),
        ]

    @property
    def told(self) -> str:
        """The meaning in one sentence."""
        one = self.at(0.01)
        return (
            f"In risk: an attacker who wrongly accuses 1 % of those who took no part finds out at most "
            f"{percent_up(one.true_positive_rate)} of those who did, and guesses right at even odds in at most "
            f"{percent_up(self.even_odds)} of cases; mu = {_up(self.mu, 3):.3f}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Person:
    """Epsilon for a person with up to `records` records, at the run's delta."""

    records: int
    epsilon: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Details:
    """What takes seconds to compute.

    Attributes:
      persons: for 1, 2, 5 and 10 records, and the declared number if it is another.
      epsilons: {delta: epsilon} for one record.
    """

    persons: tuple[Person, ...]
    epsilons: dict[float, float]


def meaning_of(events: Iterable[Event], delta: float) -> Meaning | None:
    """Return what releases mean for one record; None if one has no noise, or nothing was released.

    Args:
      events: everything that was released from one data set.
      delta: of the guarantee that is claimed, in [1e-12, 1).
    Privacy: post-processing.
    """
    return _meaning(_key(events), delta)


def details_of(events: Iterable[Event], delta: float, records_per_person: int | None = None) -> Details | None:
    """Return epsilon for persons and at other deltas; None if a release has no noise, or nothing was released.

    Args:
      events: everything that was released from one data set.
      delta: of the guarantee that is claimed, in [1e-12, 1).
      records_per_person: public number of records that a person has at most; None: not known.
    Privacy: post-processing.
    """
    return _details(_key(events), delta, records_per_person)


def epsilon_of_person(events: Iterable[Event], delta: float, records: int) -> float:
    """Return epsilon for a person with up to `records` records; infinity if a release has no noise.

    Privacy: post-processing.
    """
    return _person(_key(events), delta, records)


def too_large(delta: float, records: int | None) -> str:
    """Return a warning if delta is larger than 1 / records; "" if it is not, or the number is not known.

    Publishing one random record in full has epsilon = 0 and delta = 1 / records, so such a delta promises nothing.
    """
    if records is None or delta * records <= 1:
        return ""
    return (
        f"delta = {delta:g} is larger than 1 / records = {1 / records:.2g}. Such a delta would allow publishing one "
        "record, chosen at random, in full. Choose it far below 1 / records."
    )


def percent_up(share: float) -> str:
    """Return a share of at most 1 in percent with one decimal, rounded up."""
    return f"{min(100.0, _up(100 * share, 1)):.1f} %"


def _at_most(attack: Attack) -> str:
    return f"at most {percent_up(attack.true_positive_rate)}"


def _up(value: float, digits: int) -> float:
    return math.ceil(value * 10**digits) / 10**digits


def _key(events: Iterable[Event]) -> tuple[Event, ...]:
    return tuple(sorted(merged(events), key=lambda e: (e.kind, e.sample_rate, e.noise_multiplier, e.research)))


def _says_nothing(events: Sequence[Event]) -> bool:
    return not any(one.count for one in events) or any(one.count and one.noise_multiplier == 0 for one in events)


@functools.lru_cache(maxsize=64)
def _meaning(events: tuple[Event, ...], delta: float) -> Meaning | None:
    if _says_nothing(events):
        return None
    spent = accounting.epsilon(events, delta)
    if not math.isfinite(spent):
        return None
    grid = _GRID * max(1.0, spent / 8)
    points = np.linspace(0.0, 1.5 * spent + 1, _POINTS)
    curve = np.array(accounting.deltas(events, points.tolist(), grid=grid))
    return Meaning(
        attacks=tuple(
            Attack(
                false_positive_rate=rate,
                true_positive_rate=_true_positives(rate, points, curve),
                from_epsilon_alone=_true_positives(rate, np.array([spent]), np.array([delta])),
            )
            for rate in FALSE_POSITIVES
        ),
        even_odds=(1 + min(1.0, float(curve[0]))) / 2,
        mu=_largest_mu(points, curve, delta),
    )


def _true_positives(rate: float, epsilons: np.ndarray, deltas: np.ndarray) -> float:
    """Return the largest true-positive rate that a curve allows at a false-positive rate."""
    with np.errstate(over="ignore"):
        first = np.exp(epsilons) * rate + deltas
    second = 1 - np.exp(-epsilons) * (1 - rate - deltas)
    return float(min(1.0, first.min(), second.min()))


def _largest_mu(epsilons: np.ndarray, deltas: np.ndarray, delta: float) -> float:
    """Return the least mu whose Gaussian curve lies above all points of a curve with deltas of at least `delta`."""
    mus = [_mu_at(e, d) for e, d in zip(epsilons.tolist(), deltas.tolist(), strict=True) if delta <= d < 1]
    return max(mus, default=_LARGEST_MU)


def _mu_at(epsilon: float, delta: float) -> float:
    """Return the mu of the Gaussian release that is (epsilon, delta)-differentially private."""

    def excess(mu: float) -> float:
        lost = math.exp(epsilon + float(log_ndtr(-epsilon / mu - mu / 2)))  # the factor alone would overflow
        return float(ndtr(-epsilon / mu + mu / 2)) - lost - delta

    if not excess(1e-6) < 0 < excess(_LARGEST_MU):
        return _LARGEST_MU
    return float(cast("float", brentq(excess, 1e-6, _LARGEST_MU)))


@functools.lru_cache(maxsize=64)
def _details(events: tuple[Event, ...], delta: float, records_per_person: int | None) -> Details | None:
    if _says_nothing(events):
        return None
    wanted = {*RECORDS} if records_per_person is None else {*RECORDS, records_per_person}
    deltas = sorted({*OTHER_DELTAS, delta}, reverse=True)
    return Details(
        persons=tuple(Person(records=records, epsilon=_person(events, delta, records)) for records in sorted(wanted)),
        epsilons=dict(zip(deltas, accounting.epsilons(events, deltas), strict=True)),
    )


@functools.lru_cache(maxsize=64)
def _person(events: tuple[Event, ...], delta: float, records: int) -> float:
    if any(one.count and one.noise_multiplier == 0 for one in events):
        return math.inf
    if records == 1:
        return accounting.epsilon(events, delta)
    (spent,) = accounting.epsilons(events, [delta], records=records, grid=_PERSON_GRID * records)
    return spent
