# SPDX-License-Identifier: Apache-2.0
"""Random reals are compared with irrational numbers as if all digits of both were there."""

import itertools
from decimal import Decimal

import mpmath
import numpy as np
import pytest

from dpquant.privacy.exact import Boundaries, below, exp_floor, floor_of

NUMBERS = [(1, 3), (5, 5), (1, 17), (2047, 14), (2**43 - 1, 57), (3 * 2**57 + 1, 57), (200, 0)]


class Words:
    """A stream of words that are known beforehand."""

    def __init__(self, *words):
        self.left = list(words)

    def words(self, count):
        taken, self.left = self.left[:count], self.left[count:]
        assert len(taken) == count
        return np.array(taken, np.uint64)


def digits_of(numerator, shift, count):
    """The first 64-bit digits of exp(-numerator / 2^shift), by another library."""
    with mpmath.workprec(64 * count + 400):
        whole = int(mpmath.floor(mpmath.exp(-mpmath.mpf(numerator) / 2**shift) * 2 ** (64 * count)))
    return [whole >> (64 * (count - place - 1)) & (2**64 - 1) for place in range(count)]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("bits", [64, 128, 320])
def test_digits_of_an_exponential_are_right(number, bits):
    expected = digits_of(*number, bits // 64)
    assert exp_floor(*number, bits) == sum(digit << (bits - 64 * (k + 1)) for k, digit in enumerate(expected))


def test_numbers_that_end_are_taken_as_they_are():
    assert floor_of(lambda: Decimal("0.375"), 64) == 3 * 2**61
    assert floor_of(lambda: Decimal(1) / 3 * 3, 64) == 2**64  # what only rounding makes less than an integer
    assert floor_of(lambda: (Decimal(1) / 3 * 3) ** 1000, 64) == 2**64  # by more than one unit in the last place
    assert exp_floor(0, 5, 128) == 2**128


def assert_compares(decides) -> None:
    """Below and above a boundary, at its first, second and third digit; `decides(words)` is whether V is below."""
    for number in NUMBERS[:-1]:
        digits = digits_of(*number, 3)
        for place, step in itertools.product(range(3), (-1, 1)):
            words = [*digits[:place], digits[place] + step, 0, 2**64 - 1]
            assert decides(number, words) == (step < 0), (number, place, step)


def through(function):
    return lambda number, words: function(number, words[0], Words(*words[1:]))


def one_below(number, word, more):
    return below(word, lambda bits: exp_floor(*number, bits), more)


def stored(number):
    return Boundaries(lambda k, bits: exp_floor(*number, bits) if k < 1 else 0, last=1)


def many_below(number, word, more):
    return bool(stored(number).below(np.array([word], np.uint64), np.array([0]), more)[0])


def many_above(number, word, more):
    return int(stored(number).above(np.array([word], np.uint64), more)[0]) == 1


@pytest.mark.parametrize("function", [one_below, many_below, many_above])
def test_a_tie_is_settled_by_further_digits(function):
    assert_compares(through(function))


@pytest.mark.parametrize("answer", [True, False])
def test_settling_ties_by_decree_would_be_seen(answer):
    def at_once(number, word, more):
        first = exp_floor(*number, 64)
        return answer if word == first else word < first

    with pytest.raises(AssertionError):
        assert_compares(through(at_once))


def test_everything_is_below_one_and_nothing_below_zero():
    words = np.array([0, 1, 2**64 - 1], np.uint64)
    one = Boundaries(lambda k, bits: (1 << bits) if k == 0 else 0, last=1)
    numbers = np.zeros(3, int)
    assert one.below(words, numbers, Words()).all()
    assert not one.below(words, numbers + 1, Words(5)).any()  # 0 is a tie, which the next word settles
    assert one.above(words, Words(5, 5)).tolist() == [1, 1, 1]


def test_counts_are_those_of_the_boundaries_above():
    powers = Boundaries(lambda k, bits: (1 << bits) >> (k + 1))  # 1/2, 1/4, ...: every word that is a power is a tie
    words = [2**64 - 1, 2**63 + 1, 2**63, 2**63 - 1, 2**61 + 9, 2**61, 1]
    assert powers.above(np.array(words, np.uint64), Words(7, 7, 7)).tolist() == [0, 0, 0, 1, 2, 2, 63]
    # the first word is 0: further digits tell which of the boundaries below 2^-64 lie above
    assert powers.above(np.zeros(1, np.uint64), Words(2**63 + 1)).tolist() == [64]
    assert powers.above(np.zeros(1, np.uint64), Words(0, 3)).tolist() == [128 + 62]
