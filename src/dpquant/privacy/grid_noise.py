# SPDX-License-Identifier: Apache-2.0
"""Integer noise from the discrete Gaussian, drawn exactly, for sums of integers that may be released bit by bit.

    P(x) is proportional to exp(-x^2 / (2 s^2)) for every integer x,   s = 2^28

The grid is 2^-28 of the noise's standard deviation wide, so that s is the same whatever the plan. Each proposal x has
a sign, and |x| = x0 + r, where x0 is the beginning of a strip that is a sixteenth of s wide:

    strip      the number j with probability proportional to exp(-j / 16): compare one random real with exp(-j / 16)
    place      r uniform in the strip
    accepted   with probability exp(-E),   E = ((x0 - s)^2 + r (2 x0 + r)) / (2 s^2) = x^2 / (2 s^2) - j / 16 + 1/2
    refused    -0, so that zero is not proposed twice

The product of the probabilities is exp(-1/2) times exp(-x^2 / (2 s^2)), and E is never negative. E is a fraction with
57 binary digits. exp(-E) is the product of three such factors, one for each part of the digits, and a candidate is
accepted if one random real is below each. All comparisons are those of `exact.py`: integers only, without rounding,
whatever the machine. About 0.74 of the candidates are accepted. The time that a draw takes depends on the noise, not on
data.

Why epsilon of the Gaussian mechanism holds (`excess` is the difference, about 10^-17 for each value): let Y be normal
of standard deviation s. Adding the integer round(Y) to a sum S of integers gives round(S + Y), post-processing of the
Gaussian mechanism, so that all accounting of that mechanism holds for it: sampled, in any dimension, composed
adaptively. The law P differs from that of round(Y), Q, by the factor

    Q(x) / P(x) = z integral over |t| < 1/2 of exp(-t^2 / 2 s^2) cosh(x t / s^2),   z = sum of the normal density >= 1

which lies between 1 - 1 / (24 s^2) and z exp(x^2 / (24 s^4)), z - 1 < exp(-4 s^2). Over n values, P exceeds Q by at
most exp(n / (23 s^2)), and Q exceeds P by at most exp((2 n + 2400) / (23 s^2)), unless the sum of Y^2 / s^2 exceeds
2 n + 2400, which has probability below exp(-800) (Laurent and Massart 2000, lemma 1). So (epsilon, delta) of the
Gaussian mechanism gives (epsilon + excess, delta exp(excess) + exp(epsilon + 1 - 800)) for this one.

Sources: Canonne, Kamath and Steinke, arXiv 2004.00010 (the discrete Gaussian and its Renyi divergences, which are at
most those of the Gaussian; exact sampling from Laplace proposals). Karney 2016, arXiv 1303.6257 (strips, exact
comparisons).
"""

import functools
import math
from typing import TYPE_CHECKING

import numpy as np

from dpquant.privacy.exact import Boundaries, below, exp_floor

if TYPE_CHECKING:
    from dpquant.privacy.secret import RandomStream

BITS = 28  # the standard deviation is 2^28 grid steps

_STRIPS = 4  # a strip is 2^-4 of the standard deviation wide
_FAR = 4  # beyond 2^4 standard deviations a candidate is decided by Python's integers
_POINT = 2 * BITS + 1  # binary digits of E
_MIDDLE, _LOW = 54, 43  # E's digits are divided there: 10 before, 11 between, 43 after
_SURE = np.uint64(2**64 - 2 ** (64 - _POINT + _LOW))  # words below accept whatever the low part: exp(-e) > 1 - e
_PIECE = 2**15  # candidates at a time: their words fit into a cache


def grid_of(std: float) -> float:
    """Return the grid on which noise of a standard deviation is integer, in units of the sum; exact."""
    return math.ldexp(std, -BITS)


def excess(num_values: float) -> float:
    """Return how much the law of the integers can add to the epsilon of Gaussian noise, for so many values in all.

    Delta can grow by the factor exp(excess). The file's head has the proof.

    Args:
      num_values: noised values, over all releases.
    """
    return (num_values + 800) / (6 * 4.0**BITS)


def covered(num_values: int | None, releases: int) -> str:
    """Return in words what discrete noise covers and costs, for sums of so many numbers; None if that is not known."""
    cost = f"2^{math.frexp(excess(1))[1]} for each number and release"
    if num_values is not None:
        cost = f"2^{math.frexp(excess(num_values * releases))[1]}"  # the next power of two
    return (
        "Noise: integers from the discrete Gaussian, drawn without rounding, on a grid of 2^-28 of the noise's "
        "standard deviation. Each record's clipped contribution is rounded towards zero onto the grid, and these "
        "integers are added exactly: the bits of what is released carry no more than epsilon says. The law of integers "
        f"instead of reals adds at most {cost} to epsilon. Records pass the model one by one, so that no bit of a "
        "contribution, which is computed in floating point, depends on another record."
    )


def discrete_gaussian(stream: "RandomStream", count: int, bits: int = BITS) -> np.ndarray:
    """Return independent integers from the discrete Gaussian.

    Args:
      stream: the random bits, which no other draw may use.
      count: number of integers.
      bits: the standard deviation is 2^bits, at most 2^28; tests take less.
    Returns: int64 `(count,)`.
    Privacy: reads no data.
    Source: Canonne, Kamath and Steinke, arXiv 2004.00010.
    """
    found, missing = [np.empty(0, np.int64)], count
    while missing > 0:
        some = _accepted(stream, min(missing + missing // 2 + 16, _PIECE), bits)[:missing]
        found.append(some)
        missing -= len(some)
    return np.concatenate(found)


def _accepted(stream: "RandomStream", candidates: int, bits: int) -> np.ndarray:
    """Return those of some candidates that are accepted, in order; each takes five words."""
    words = stream.words(5 * candidates).reshape(candidates, 5)
    strips = min(bits, _STRIPS)
    width = bits - strips  # a strip is 2^width integers wide
    number = _strips(strips).above(words[:, 0], stream).astype(np.uint64)
    negative = (words[:, 1] & np.uint64(1)).astype(bool)
    place = (words[:, 1] >> np.uint64(1)) >> np.uint64(63 - width)
    begin, std = number << np.uint64(width), np.uint64(1 << bits)
    near = number < 1 << (strips + _FAR)
    exponent = (begin - std) ** 2 + place * (2 * begin + place)  # exact modulo 2^64, and below 2^64 where near
    exponent <<= np.uint64(2 * (BITS - bits))
    accepted = near & _accepts(exponent, words[:, 2:], stream)
    for one in np.flatnonzero(~near):
        accepted[one] = _accepts_far(int(begin[one]), int(place[one]), int(words[one, 2]), bits, stream)
    size = (begin + place).astype(np.int64)
    accepted &= ~(negative & (size == 0))
    return np.where(negative, -size, size)[accepted]


def _accepts(exponent: np.ndarray, words: np.ndarray, more: "RandomStream") -> np.ndarray:
    """Return True with probability exp(-exponent / 2^57), from three words `(n, 3)`."""
    high, middle = _factors()
    result = high.below(words[:, 0], exponent >> np.uint64(_MIDDLE), more)
    result &= middle.below(words[:, 1], (exponent >> np.uint64(_LOW)) & np.uint64(2 ** (_MIDDLE - _LOW) - 1), more)
    for one in np.flatnonzero(result & (words[:, 2] >= _SURE)):
        low = int(exponent[one]) % 2**_LOW
        result[one] = below(int(words[one, 2]), functools.partial(exp_floor, low, _POINT), more)
    return result


def _accepts_far(begin: int, place: int, word: int, bits: int, more: "RandomStream") -> bool:
    """Return what `_accepts` returns for one candidate whose exponent has more than 64 digits."""
    exponent = (begin - (1 << bits)) ** 2 + place * (2 * begin + place)
    return below(word, functools.partial(exp_floor, exponent, 2 * bits + 1), more)


@functools.cache
def _strips(strips: int) -> Boundaries:
    """Return the boundaries exp(-j / 2^strips), j = 1, 2, ..., between the numbers of strips."""
    return Boundaries(lambda k, bits: exp_floor(k + 1, strips, bits))


@functools.cache
def _factors() -> tuple[Boundaries, Boundaries]:
    """Return the boundaries exp(-k / 2^3) and exp(-k / 2^14), for the first 10 digits of E and the next 11."""
    high, middle = _POINT - _MIDDLE, _POINT - _LOW
    return (
        Boundaries(lambda k, bits: exp_floor(k, high, bits), last=2 ** (64 - _MIDDLE) - 1),
        Boundaries(lambda k, bits: exp_floor(k, middle, bits), last=2 ** (_MIDDLE - _LOW) - 1),
    )
