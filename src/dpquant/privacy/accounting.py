# SPDX-License-Identifier: Apache-2.0
"""Privacy accounting: epsilon of given events, and calibration of the noise to a given epsilon.

This is the only file that imports dp_accounting. An event is `count` releases of a Poisson-subsampled Gaussian
mechanism. Neighbouring data sets differ by one record, added or removed. Epsilon does not depend on how releases are
grouped or ordered, so equal releases are merged and counted before they are composed. Composing step by step gives the
same epsilon and takes hundreds of times longer.

Two accountants, both of which give upper bounds:
    pld  privacy loss distributions on a grid of 1e-3, rounded to the pessimistic side: the epsilon that is claimed
    rdp  Renyi differential privacy: a check by independent mathematics, usually a tenth above
Where one release loses far less than the grid's 1e-3, the rounding adds up: at q = 0.02, sigma = 50 and 10,000 steps
`pld` gives 0.18 and `rdp` 0.15. Both are valid. Nothing here reads data or decides what to release.

A coarser grid gives a slightly larger epsilon in a fraction of the time. Calibration starts on a coarse grid; its
result is always evaluated on the grid of 1e-3.

Symbols: q sample rate, sigma noise multiplier (noise over sensitivity). Sources: Abadi et al., arXiv 1607.00133;
Mironov et al., arXiv 1908.10530; Doroshenko et al., arXiv 2207.04380 (connect the dots).
"""

import contextlib
import functools
import importlib.metadata
import itertools
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple, get_args

import dp_accounting
import numpy as np
from dp_accounting import dp_event

from dpquant.errors import SettingError
from dpquant.privacy.events import Event

GRID = 1e-3
SMALLEST_DELTA = (
    1e-12  # below it the mass that the PLD accountant truncates (1e-15 a composition) is no longer negligible
)
SMALLEST_NOISE, _LARGEST_NOISE = 0.1, 2.0**30  # noise multipliers between which calibration searches
_COARSE, _FINE = 1e-2, 1e-5  # relative tolerance: a calibrated epsilon may be this much below its target
_FIRST_GUESS, _USUAL_SLOPE = 1.0, -1.5  # a noise multiplier, and a rough d log epsilon / d log sigma near it
_LARGEST_STEP = math.log(8)  # in log sigma; far from the target the local slope is a poor guide
_SECANTS = 8  # secant steps before the search bisects
_SAME_NOISE = 1e-9  # relative width of the bracket that ends a search where epsilon jumps over its target

_Release = tuple[float, float, int]  # q, sigma, count
_Accountant = Literal["pld", "rdp"]


class _Solution(NamedTuple):
    """A noise multiplier that meets a target, and d log epsilon / d log sigma there."""

    sigma: float
    slope: float


def epsilon(events: Iterable[Event], delta: float, accountant: _Accountant = "pld") -> float:
    """Return the epsilon at which all events together are (epsilon, delta)-differentially private.

    Without events epsilon is 0; with a release without noise it is infinite. Grouping and order make no difference.

    Args:
      events: everything that was released from one data set.
      delta: of the (epsilon, delta) guarantee, in [1e-12, 1).
      accountant: `pld`, whose epsilon is claimed, or `rdp`, a check.
    Returns: an upper bound, >= 0, for data sets that differ by one record, added or removed.
    Raises:
      SettingError: delta out of range, or an unknown accountant.
    Privacy: post-processing.
    """
    if accountant not in get_args(_Accountant):
        raise SettingError(
            f"Expected accountant to be one of {', '.join(get_args(_Accountant))}; got accountant={accountant!r}. "
            "Others are not checked here. Leave it out."
        )
    if not SMALLEST_DELTA <= delta < 1:
        raise SettingError(
            f"Expected delta in [{SMALLEST_DELTA:g}, 1); got delta={delta}. It is delta of the (epsilon, delta) "
            "guarantee. Choose it far below 1 / records."
        )
    return _epsilon(_merged(events), float(delta), accountant, GRID)


def deltas(events: Iterable[Event], epsilons: Iterable[float], *, grid: float = GRID) -> list[float]:
    """Return, for each epsilon, the delta at which all events together are (epsilon, delta)-differentially private.

    Args:
      events: everything that was released from one data set.
      epsilons: each >= 0.
      grid: of the privacy loss; a coarser one takes less time and gives slightly larger deltas.
    Raises:
      SettingError: a release has no noise; delta is 1 for every epsilon.
    Privacy: post-processing.
    """
    releases = _noisy(events)
    if not releases:
        return [0.0 for _ in epsilons]
    composer = dp_accounting.pld.PLDAccountant(value_discretization_interval=grid)
    with _quiet():
        composer.compose(_composed(releases))
        return [float(composer.get_delta(epsilon)) for epsilon in epsilons]


def epsilons(events: Iterable[Event], deltas: Iterable[float], *, records: int = 1, grid: float = GRID) -> list[float]:
    """Return, for each delta, the epsilon at which a person with `records` records is protected.

    Each of a person's records is drawn on its own, so a release holds a binomial number of them, each of which adds at
    most the sensitivity: a mixture of Gaussians. Source: Choquette-Choo et al., arXiv 2401.10294.

    Args:
      events: everything that was released from one data set.
      deltas: each in [1e-12, 1).
      records: of one person at most, >= 1; all of them are added or removed together.
      grid: of the privacy loss; a coarser one takes less time and gives slightly larger epsilons.
    Raises:
      SettingError: a release has no noise; no epsilon is finite.
    Privacy: post-processing.
    """
    releases = _noisy(events)
    if not releases:
        return [0.0 for _ in deltas]
    composer = dp_accounting.pld.PLDAccountant(value_discretization_interval=grid)
    with _quiet():
        composer.compose(_composed(releases) if records == 1 else _of_a_person(releases, records))
        return [max(0.0, float(composer.get_epsilon(delta))) for delta in deltas]


def _noisy(events: Iterable[Event]) -> tuple[_Release, ...]:
    """Return the events merged; raise a SettingError if one has no noise."""
    releases = _merged(events)
    if any(sigma == 0 for _, sigma, _ in releases):
        raise SettingError("Expected events with noise; got one without. It hides nothing. Leave it out.")
    return releases


def analysis_share(events: Iterable[Event], delta: float) -> float:
    """Return the share of epsilon that would be saved without the analyses, in [0, 1]; 0 if nothing was released.

    Args:
      events: everything that was released from one data set.
      delta: of the (epsilon, delta) guarantee, in [1e-12, 1).
    Privacy: post-processing.
    """
    events = tuple(events)
    total = epsilon(events, delta)
    return (total - epsilon((one for one in events if one.kind != "analysis"), delta)) / total if total > 0 else 0.0


def calibrate(target: float, delta: float, *, sample_rate: float, steps: int, fixed: Iterable[Event] = ()) -> float:
    """Return the smallest noise multiplier at which training and the fixed events together meet a target epsilon.

    Args:
      target: epsilon, > 0.
      delta: of the (epsilon, delta) guarantee, in [1e-12, 1).
      sample_rate: of the training steps, in (0, 1].
      steps: number of training steps, >= 1.
      fixed: all other releases from the same data: the analyses.
    Returns: sigma >= 0.1 with target * (1 - 1e-5) <= epsilon(...) <= target by `pld`. At sigma = 0.1 epsilon may be
      less.
    Raises:
      SettingError: the fixed events alone cost the target or more, or leave too little of it.
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
    """Return the accountant's name and version, for statements."""
    return f"dp_accounting {importlib.metadata.version('dp-accounting')}"


def _merged(events: Iterable[Event]) -> tuple[_Release, ...]:
    """Return equal releases counted together, sorted, so that their order does not depend on the history of a run."""
    counts: Counter[tuple[float, float]] = Counter()
    for event in events:
        counts[float(event.sample_rate), float(event.noise_multiplier)] += event.count
    return tuple(sorted((q, sigma, count) for (q, sigma), count in counts.items() if count))


@functools.lru_cache(maxsize=1024)
def _epsilon(releases: tuple[_Release, ...], delta: float, accountant: _Accountant, grid: float) -> float:
    if not releases:
        return 0.0
    if any(sigma == 0 for _, sigma, _ in releases):
        return math.inf
    if accountant == "pld":
        composer = dp_accounting.pld.PLDAccountant(value_discretization_interval=grid)
    else:
        composer = dp_accounting.rdp.RdpAccountant()
    with _quiet():
        return max(0.0, float(composer.compose(_composed(releases)).get_epsilon(delta)))


def _calibrate(target: float, delta: float, sample_rate: float, steps: int, fixed: tuple[Event, ...]) -> float:
    def cost(sigma: float, grid: float) -> float:
        train = Event(kind="train", sample_rate=sample_rate, noise_multiplier=sigma, count=steps)
        return _epsilon(_merged([train, *fixed]), delta, "pld", grid)

    guess = _Solution(_FIRST_GUESS, _USUAL_SLOPE)
    coarse_grid = GRID * max(1.0, target)  # a thousandth of the target
    # where the fixed events cost nearly the whole target, no noise meets it on the coarse grid: keep the first guess
    guess = _least_noise(functools.partial(cost, grid=coarse_grid), target, _COARSE, guess) or guess
    found = _least_noise(functools.partial(cost, grid=GRID), target, _FINE, guess)
    if found is None:
        raise SettingError(
            f"Expected epsilon large enough for {steps} steps; got epsilon={target:g}. No noise_multiplier up to 2^30 "
            "meets it. Raise epsilon, or lower what the analysis costs."
        )
    return found.sigma


def _least_noise(cost: Callable[[float], float], target: float, tolerance: float, guess: _Solution) -> _Solution | None:
    """Return the smallest sigma whose cost is at most the target, by the secant method in log sigma and log epsilon.

    The logarithm of epsilon is nearly linear in the logarithm of sigma, so a few calls of the accountant are enough.

    Args:
      cost: epsilon as a function of sigma, decreasing.
      target: epsilon, > 0.
      tolerance: relative amount by which the cost may be below the target.
      guess: the first sigma, and the slope there.
    Returns: a solution; None where not even the largest sigma meets the target.
    """
    aim = math.log(target * (1 - tolerance / 2))
    low, high = 0.0, math.inf  # bracket: the largest sigma known to cost too much, the smallest known not to
    (sigma, slope), before = guess, None
    for number in itertools.count():
        spent = cost(sigma)
        if spent > target:
            low = sigma
            if sigma == _LARGEST_NOISE:
                return None
        else:
            high = sigma
            if spent >= target * (1 - tolerance) or sigma == SMALLEST_NOISE:
                return _Solution(sigma, slope)
        if high - low <= _SAME_NOISE * high < math.inf:
            return _Solution(high, slope)
        here = math.log(sigma), math.log(spent) if spent > 0 else -math.inf
        if before is not None and -math.inf < (secant := (here[1] - before[1]) / (here[0] - before[0])) < 0:
            slope = secant
        before = here
        step = min(max((aim - here[1]) / slope, -_LARGEST_STEP), _LARGEST_STEP)
        sigma = min(max(sigma * math.exp(step), SMALLEST_NOISE), _LARGEST_NOISE)
        if not low < sigma < high or (number >= _SECANTS and low > 0 and high < math.inf):
            sigma = math.sqrt(low * high)  # bisect: where epsilon jumps, secants approach from one side without end


def _composed(releases: Iterable[_Release]) -> dp_accounting.DpEvent:
    return dp_accounting.ComposedDpEvent(
        [
            dp_accounting.SelfComposedDpEvent(
                dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(sigma)), count
            )
            for q, sigma, count in releases
        ]
    )


def _of_a_person(releases: Iterable[_Release], records: int) -> dp_accounting.DpEvent:
    """Return what releases show of `records` records that come and go together."""
    numbers = range(records + 1)
    events = []
    for q, sigma, count in releases:
        chances = [math.comb(records, k) * q**k * (1 - q) ** (records - k) for k in numbers]
        total = math.fsum(chances)  # of round-off, to which dp_accounting would object
        mixture = dp_event.MixtureOfGaussiansDpEvent(sigma, list(numbers), [one / total for one in chances])
        events.append(dp_accounting.SelfComposedDpEvent(mixture, count))
    return dp_accounting.ComposedDpEvent(events)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress two harmless warnings of dp_accounting within the block.

    An RDP order that does not converge is left out by the accountant, and epsilon remains an upper bound. Beyond
    epsilon = 700 the PLD accountant divides by a mass near exp(-700); if it then returns infinity, that is an upper
    bound too.
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
