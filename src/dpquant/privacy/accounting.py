# SPDX-License-Identifier: Apache-2.0
"""Events in, epsilon out; and back: the noise that meets an epsilon. The only file that knows dp_accounting.

An event is `count` releases of a Poisson-subsampled Gaussian mechanism. Adjacency: one record is added or removed.
Epsilon depends on what was released and not on how it was grouped or ordered, so equal releases are merged and counted
before they are composed (composing step by step is hundreds of times slower, and no different).

Two accountants, both of them upper bounds:
    pld  privacy loss distributions on a grid of 1e-3, rounded to the pessimistic side: what we claim
    rdp  Renyi differential privacy: a check by other mathematics, usually a tenth above
Where a release loses far less than the grid's 1e-3, rounding adds up: at q = 0.02, sigma = 50 and 10,000 steps `pld`
says 0.18 and `rdp` 0.15. Both are true. Nothing here reads data or decides what to release.

Symbols: q sample rate, sigma noise multiplier (noise over sensitivity). Sources: Abadi et al., arXiv 1607.00133;
Mironov et al., arXiv 1908.10530; Doroshenko et al., arXiv 2207.04380 (connect the dots).
"""

import contextlib
import functools
import importlib.metadata
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

import dp_accounting
import numpy as np

from dpquant.errors import SettingError
from dpquant.privacy.events import Event

GRID = 1e-3
SMALLEST_DELTA = (
    1e-12  # below it the mass that the PLD accountant cuts off (1e-15 a composition) is no longer negligible
)

_Release = tuple[float, float, int]  # q, sigma, count

_ACCOUNTANTS = {
    "pld": functools.partial(dp_accounting.pld.PLDAccountant, value_discretization_interval=GRID),
    "rdp": dp_accounting.rdp.RdpAccountant,
}


def epsilon(events: Iterable[Event], delta: float, accountant: Literal["pld", "rdp"] = "pld") -> float:
    """The epsilon at which all events together are (epsilon, delta)-differentially private.

    No event costs 0; a release without noise costs infinity. Grouping and order make no difference.

    Args:
      events: everything that was released from one data set.
      delta: in [1e-12, 1).
      accountant: `pld` (what is claimed) or `rdp` (a check).
    Returns: an upper bound, >= 0; add or remove one record.
    Raises:
      SettingError: delta out of range, or an unknown accountant.
    Privacy: post-processing.
    """
    if accountant not in _ACCOUNTANTS:
        raise SettingError(
            f"Expected accountant to be one of {', '.join(_ACCOUNTANTS)}; got accountant={accountant!r}. "
            "Others are not checked here. Leave it out."
        )
    if not SMALLEST_DELTA <= delta < 1:
        raise SettingError(
            f"Expected delta in [{SMALLEST_DELTA:g}, 1); got delta={delta}. It is delta of the (epsilon, delta) "
            "guarantee. Choose it far below 1 / records."
        )
    return _epsilon(_merged(events), float(delta), accountant)


def calibrate(target: float, delta: float, *, sample_rate: float, steps: int, fixed: Iterable[Event] = ()) -> float:
    """The smallest noise multiplier at which training and the fixed events together meet a target epsilon.

    Args:
      target: epsilon, > 0.
      delta: in [1e-12, 1).
      sample_rate: of the training steps, in (0, 1].
      steps: how many, >= 1.
      fixed: what else is released from the same data: the analyses.
    Returns: sigma within 1e-6 of the optimum by `pld`, on the safe side: epsilon(...) <= target.
    Raises:
      SettingError: the fixed events alone cost the target, or leave too little of it.
    Privacy: post-processing.
    """
    fixed = tuple(fixed)
    cost = epsilon(fixed, delta)
    if cost >= target:
        raise SettingError(
            f"Expected epsilon > {cost:.4g}, which the analysis alone costs; got epsilon={target:g}. No training noise "
            "can make up for it. Raise epsilon or the analysis' noise_multiplier, or lower its count or sample_rate."
        )
    return _calibrate(float(target), float(delta), float(sample_rate), int(steps), fixed)


def version() -> str:
    """The accountant's name and version, for statements."""
    return f"dp_accounting {importlib.metadata.version('dp-accounting')}"


def _merged(events: Iterable[Event]) -> tuple[_Release, ...]:
    """Equal releases counted together, in an order that does not depend on history."""
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        counts[float(event.sample_rate), float(event.noise_multiplier)] += event.count
    return tuple(sorted((q, sigma, count) for (q, sigma), count in counts.items() if count))


@functools.lru_cache(maxsize=1024)
def _epsilon(releases: tuple[_Release, ...], delta: float, accountant: str) -> float:
    if not releases:
        return 0.0
    if any(sigma == 0 for _, sigma, _ in releases):
        return math.inf
    with _quiet():
        return max(0.0, float(_ACCOUNTANTS[accountant]().compose(_composed(releases)).get_epsilon(delta)))


@functools.lru_cache(maxsize=256)
def _calibrate(target: float, delta: float, sample_rate: float, steps: int, fixed: tuple[Event, ...]) -> float:
    def composed(sigma: float) -> dp_accounting.DpEvent:
        train = Event(kind="train", sample_rate=sample_rate, noise_multiplier=sigma, count=steps)
        return _composed(_merged([train, *fixed]))

    try:
        with _quiet():
            # The default bracket begins at sigma = 0, where epsilon is infinite at no cost: nothing else is as fast.
            sigma = dp_accounting.calibrate_dp_mechanism(_ACCOUNTANTS["pld"], composed, target, delta)
    except dp_accounting.mechanism_calibration.NoBracketIntervalFoundError as error:
        raise SettingError(
            f"Expected epsilon large enough for {steps} steps; got epsilon={target:g}. No noise_multiplier up to 2^30 "
            "meets it. Raise epsilon, or lower what the analysis costs."
        ) from error
    return float(sigma)


def _composed(releases: Iterable[_Release]) -> dp_accounting.DpEvent:
    return dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), count
            )
            for q, sigma, count in releases
        ]
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without two words about what does no harm.

    An RDP order that does not converge is left out, and epsilon stays an upper bound. Beyond epsilon = 700 the PLD
    accountant divides by a mass near exp(-700), and the infinity that it may then return is one too.
    """

    def keep(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("_compute_log_a_frac failed to converge")

    logger = logging.getLogger("absl")
    logger.addFilter(keep)
    try:
        with np.errstate(over="ignore"):
            yield
    finally:
        logger.removeFilter(keep)
