# SPDX-License-Identifier: Apache-2.0
"""Comparison of uniform random reals with irrational numbers, by integers: without rounding and without bias.

A uniform real V in [0, 1) is a sequence of random 64-bit words, its digits. The first word decides on which side of a
boundary c it lies, unless it equals the first 64 bits of c; then further digits of both are compared until they differ:

    V < c   <=>   floor(2^b V) < floor(2^b c) for the first b at which the two differ,   b = 64, 128, ...

A tie of the first word happens once in 2^64 comparisons. It is what keeps the rest from being an approximation.
Boundaries are evaluated by the decimal module, whose results are the same on every machine, with an error that is added
and subtracted before digits are taken.
"""

from collections.abc import Callable
from decimal import MAX_EMAX, MIN_EMIN, ROUND_FLOOR, Decimal, localcontext
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from dpquant.privacy.secret import RandomStream

WORD = 64  # bits
_LOST = 40  # decimal digits that a boundary's formula may lose
_MANY = 400  # decimal digits after which a number that still looks like an integer is taken for one

Floor = Callable[[int, int], int]


class Boundaries:
    """Boundaries c_0 >= c_1 >= ... in [0, 1], with which random reals are compared."""

    def __init__(self, floor: Floor, *, last: int | None = None):
        """Store the first 64 bits of every boundary.

        Args:
          floor: `(k, bits) -> floor(2^bits c_k)`, for every k >= 0 and every multiple of 64 bits.
          last: number of the last boundary that is stored; None: the first one below 2^-64.
        """
        self._floor, stored = floor, []
        while not stored or (stored[-1] > 0 if last is None else len(stored) <= last):
            stored.append(min(floor(len(stored), WORD), 2**WORD - 1))  # 1 is stored as 2^64 - 1: a tie, that 1 wins
        self._first = np.array(stored, np.uint64)
        self._rising = self._first[::-1].copy()

    def below(self, words: np.ndarray, numbers: np.ndarray, more: "RandomStream") -> np.ndarray:
        """Return whether each V is below the boundary of a number.

        Args:
          words: the first word of each V, uint64 `(n,)`.
          numbers: of the boundaries, `(n,)`.
          more: supplies further words.
        Returns: bool `(n,)`.
        Privacy: reads no data.
        """
        first = self._first[numbers]
        result = words < first
        for place in np.flatnonzero(words == first):
            number = int(numbers[place])
            result[place] = below(int(words[place]), lambda bits, number=number: self._floor(number, bits), more)
        return result

    def above(self, words: np.ndarray, more: "RandomStream") -> np.ndarray:
        """Return how many boundaries lie above each V, int64 `(n,)`; arguments as for `below`."""
        counts = len(self._rising) - np.searchsorted(self._rising, words, side="right")
        undecided = self._first[np.minimum(counts, len(self._first) - 1)] == words
        for place in np.flatnonzero(undecided):
            counts[place] = self._settled(int(words[place]), int(counts[place]), more)
        return counts

    def _settled(self, word: int, count: int, more: "RandomStream") -> int:
        """Return how many boundaries lie above V, which are at least `count`."""
        bits = WORD
        while True:
            word, bits = (word << WORD) | int(more.words(1)[0]), bits + WORD
            while word < (boundary := self._floor(count, bits)):
                count += 1
            if word > boundary:
                return count


def below(word: int, floor: Callable[[int], int], more: "RandomStream") -> bool:
    """Return whether the random real whose first word is given is below c, where `floor(bits)` is floor(2^bits c)."""
    bits = WORD
    while word == (boundary := floor(bits)) or boundary == 1 << bits:
        if boundary == 1 << bits:
            return True
        word, bits = (word << WORD) | int(more.words(1)[0]), bits + WORD
    return word < boundary


def floor_of(value: Callable[[], Decimal], bits: int) -> int:
    """Return floor(2^bits c).

    Args:
      value: evaluates c in [0, 1] in the current decimal context, with an error below 10^(40 - precision).
      bits: number of binary digits.
    Returns: the floor. A c for which 2^bits c is not an integer, but is one to 300 decimal places, counts as that one.
    """
    for digits in (_LOST + 20 + bits // 3, _LOST + _MANY + bits // 3):
        with localcontext(prec=digits, Emin=MIN_EMIN, Emax=MAX_EMAX):
            scaled, error = value() * 2**bits, Decimal(2) ** bits * Decimal(10) ** (_LOST - digits)
            low, high = (
                int(max(x, Decimal(0)).to_integral_value(ROUND_FLOOR)) for x in (scaled - error, scaled + error)
            )
            if low == high:
                return low
    return high


def exp_floor(numerator: int, shift: int, bits: int) -> int:
    """Return floor(2^bits exp(-numerator / 2^shift)), for a numerator >= 0."""
    if numerator == 0:
        return 1 << bits
    return floor_of(lambda: (Decimal(-numerator) / 2**shift).exp(), bits)
