# SPDX-License-Identifier: Apache-2.0
"""A count of records, released with integer noise that is drawn exactly.

    P(x) is proportional to exp(-epsilon |x|) for every integer x      (discrete Laplace, or two-sided geometric)

Adding or removing one record changes the count by at most one, so that the noisy count is epsilon-differentially
private, with delta = 0. A float epsilon is n / 2^s for two integers, and |x| is the number of boundaries
exp(-epsilon j), j = 1, 2, ..., above one random real: the comparisons are those of `exact.py`, by integers and without
rounding. A sign is drawn beside it, and -0 is refused, so that zero is not drawn twice as often as it should be.

Source: Ghosh, Roughgarden and Sundararajan 2009, arXiv 0811.2841 (the law).
"""

import functools
import math

from dpquant.errors import SettingError
from dpquant.privacy.exact import Boundaries, exp_floor
from dpquant.privacy.secret import RandomStream, SecretKey

SMALLEST, LARGEST = 0.01, 100.0  # with less, thousands of boundaries are computed and the noise is in the hundreds


def check_count_epsilon(name: str, epsilon: float) -> None:
    """Check that noise can be drawn for an epsilon, which a setting of this name holds.

    Raises:
      SettingError: it is out of range.
    """
    if not SMALLEST <= epsilon <= LARGEST:
        raise SettingError(
            f"Expected {name} in [{SMALLEST:g}, {LARGEST:g}]; got {name}={epsilon}. Less hides a count in noise, and "
            "more promises nothing. Values from 0.1 to 3 are usual."
        )


def noisy_count(count: int, epsilon: float, key: SecretKey) -> int:
    """Return a count with noise, which may be negative.

    Args:
      count: of records, each of which adds at most one to it.
      epsilon: of the release, within the range of `check_count_epsilon`.
      key: of the release, used for no other.
    Privacy: epsilon-differentially private under adding or removing one record. Charge it before the count is made.
    """
    return count + discrete_laplace(key.stream("count"), epsilon)


def discrete_laplace(stream: RandomStream, epsilon: float) -> int:
    """Return an integer x with probability proportional to exp(-epsilon |x|). Privacy: reads no data."""
    while True:
        words = stream.words(2)
        size, negative = int(_boundaries(epsilon).above(words[:1], stream)[0]), bool(int(words[1]) & 1)
        if size or not negative:
            return -size if negative else size


@functools.lru_cache(maxsize=8)
def _boundaries(epsilon: float) -> Boundaries:
    """Return the boundaries exp(-epsilon j), j = 1, 2, ..."""
    numerator, denominator = epsilon.as_integer_ratio()
    shift = denominator.bit_length() - 1  # the denominator of a float is a power of two
    return Boundaries(lambda k, bits: exp_floor((k + 1) * numerator, shift, bits))


def noise_bound(epsilon: float, share: float) -> int:
    """Return the smallest t such that |x| <= t with at least this probability."""
    # P(|x| > t) = 2 r^(t + 1) / (1 + r), r = exp(-epsilon)
    tail = (1 - share) * (1 + math.exp(-epsilon)) / 2
    return max(0, math.ceil(-math.log(tail) / epsilon - 1 - 1e-9))
