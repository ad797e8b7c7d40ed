# SPDX-License-Identifier: Apache-2.0
"""Poisson sampling: each record takes part in a step independently, with the same probability.

    gaps g_0, g_1, ... from the key's stream for (stream, step, attempt);   P(g >= k) = (1 - q)^k
    drawn: g_0,  g_0 + 1 + g_1,  g_0 + 1 + g_1 + 1 + g_2, ...   as far as there are records

The number of records that are passed over before the next one is drawn is geometric, and gaps are independent. So time
and memory grow with the number of records drawn, not with the number that there are.

A gap is drawn digit by digit, lowest first: as P(g >= k) is a power, a gap's digits are independent of each other. For
a digit d of weight w in base b, and for the last one, which has no upper limit,

    P(d >= k) = (r^k - r^b) / (1 - r^b),   r = (1 - q)^w          P(d >= k) = r^k

Each takes one comparison of a random real with these numbers, which is exact (`exact.py`). So every record is drawn
with probability q, the float64 as it is, independently of the others: there is no bias to account for.

The accounting assumes Poisson sampling: inclusions are independent over records and over draws. The size of a batch is
random; a batch is never truncated, filled up, or drawn again because it is empty. A draw has no state: it does not
depend on earlier draws, on threads, or on how a batch is split. A step that is repeated takes another attempt and so
draws other records. The same records with fresh noise would be one release with less noise, not two releases that were
each sampled.

Epsilon is valid only if nobody knows who was drawn, so the key is secret. Nothing here reads a record.

Symbols: q inclusion probability. Source: Abadi et al., arXiv 1607.00133, section 3.1; gaps instead of coins: Vitter
1984, "Faster methods for random sampling".
"""

import functools
import itertools
import math
from decimal import Decimal

import numpy as np
import torch
from torch import Tensor

from dpquant.errors import SettingError
from dpquant.privacy.exact import Boundaries, floor_of
from dpquant.privacy.secret import Keyed, RandomStream

SMALLEST_RATE = 2.0**-40  # below it gaps would not fit into 64 bits

_DIGIT = 8  # binary digits of a digit, at most
_PIECE = 2**15  # gaps at a time: their words fit into a cache


class PoissonSampler(Keyed):
    """Poisson batches as a function of a secret key and of the stream, step and attempt that they are for."""

    def draw(self, num_records: int, sample_rate: float, *, stream: str, step: int, attempt: int) -> Tensor:
        """Return the records of one Poisson batch.

        Args:
          num_records: size of the data set; records 0 .. num_records - 1 may be drawn.
          sample_rate: q, in [2^-40, 1]; the exact probability of every record.
          stream: purpose of the draw, `train` or `analysis` in a run; different streams are independent.
          step: number of the step within the stream.
          attempt: number of the attempt, different each time a batch is drawn for the same step.
        Returns: int64 `(B,)`, ascending; B is random, may be 0, and is private. Equal keys and arguments give equal
          records, and another number of records gives the same ones as far as both go.
        Raises:
          SettingError: num_records or sample_rate out of range.
        Privacy: per example, reads no record.
        """
        if num_records < 0:
            raise SettingError(
                f"Expected num_records >= 0; got num_records={num_records}. Records are counted from 0. "
                "Pass the length of the data set."
            )
        if not SMALLEST_RATE <= sample_rate <= 1:
            raise SettingError(
                f"Expected sample_rate in [2^-40, 1]; got sample_rate={sample_rate}. It is a probability. "
                "Pass the expected batch size divided by a public data set size."
            )
        words = self._key.stream("sampling", stream, step, attempt)
        place, found = -1, []
        while place < num_records:
            expected = (num_records - place) * sample_rate
            count = min(int(expected + 4 * math.sqrt(expected)) + 8, _PIECE)
            places = place + np.cumsum(_gaps(words, count, sample_rate, num_records) + 1)
            found.append(places)
            place = int(places[-1])
        drawn = np.concatenate(found) if found else np.empty(0, np.int64)
        return torch.from_numpy(drawn[: np.searchsorted(drawn, num_records)])


def _gaps(words: RandomStream, count: int, sample_rate: float, limit: int) -> np.ndarray:
    """Return the next gaps, int64 `(count,)`; in place of a longer one, the limit."""
    if sample_rate == 1:
        return np.zeros(count, np.int64)
    digits = _digits(float(sample_rate))
    drawn = words.words(count * len(digits)).reshape(count, len(digits))
    gaps = np.zeros(count, np.int64)
    for number, (shift, boundaries) in enumerate(digits):
        gaps += boundaries.above(drawn[:, number], words) << shift
    return np.minimum(gaps, limit)


@functools.lru_cache(maxsize=64)
def _digits(sample_rate: float) -> list[tuple[int, Boundaries]]:
    """Return the binary weights of a gap's digits, lowest first, with the boundaries that decide on each."""
    width = max(0, math.ceil(-math.log2(sample_rate)))  # the last digit counts gaps of 1 / q to 2 / q
    number = math.ceil(width / _DIGIT)
    ends = [width * digit // max(number, 1) for digit in range(number + 1)]
    limited = [
        (low, Boundaries(functools.partial(_floor, sample_rate, low, 1 << (high - low))))
        for low, high in itertools.pairwise(ends)
    ]
    return [*limited, (width, Boundaries(functools.partial(_floor, sample_rate, width, None)))]


def _floor(sample_rate: float, shift: int, base: int | None, k: int, bits: int) -> int:
    """Return floor(2^bits P(d > k)) for the digit of weight 2^shift in a base; None: without an upper limit."""
    if base is not None and k + 1 >= base:
        return 0

    def probability() -> Decimal:
        ratio = (1 - Decimal(sample_rate)) ** (1 << shift)
        rest = Decimal(0) if base is None else ratio**base
        return (ratio ** (k + 1) - rest) / (1 - rest)

    return floor_of(probability, bits)
