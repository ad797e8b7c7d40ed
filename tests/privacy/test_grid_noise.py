# SPDX-License-Identifier: Apache-2.0
"""Integer noise has the discrete Gaussian's law, whose epsilon is the Gaussian's. Planted samplers are found."""

import functools
import itertools
import math
import re

import mpmath
import numpy as np
import pytest
import torch
from dp_accounting.pld.privacy_loss_mechanism import AdjacencyType, DiscreteGaussianPrivacyLoss, GaussianPrivacyLoss
from scipy import stats

from dpquant.privacy import grid_noise
from dpquant.privacy.grid_noise import BITS, covered, discrete_gaussian, excess, grid_of
from dpquant.privacy.noise import NoiseSource
from dpquant.privacy.secret import SecretKey

ALPHA = 1e-6
KEY = SecretKey(b"a key for tests!")
SMALL = (0, 1, 3, 5)  # binary logarithms of standard deviations: no strips, some, all; and with a place in the strip
DRAWS = 150_000


@functools.cache
def drawn(bits, count=DRAWS):
    return discrete_gaussian(KEY.stream("test", bits), count, bits)


def assert_has_law(x, probabilities) -> None:
    """A chi-square test against {integer: probability}; rare integers are counted together."""
    values, counts = np.unique(x, return_counts=True)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    usual = {value: p for value, p in probabilities.items() if p * len(x) >= 10}
    observed = [found.get(value, 0) for value in usual]
    expected = [p * len(x) for p in usual.values()]
    rest = len(x) - sum(expected)
    assert stats.chisquare([*observed, len(x) - sum(observed)], [*expected, rest]).pvalue > ALPHA


def law(bits):
    """{integer: probability} of the discrete Gaussian."""
    std, reach = 2**bits, 9 * 2**bits
    weights = {x: math.exp(-((x / std) ** 2) / 2) for x in range(-reach, reach + 1)}
    return {x: weight / sum(weights.values()) for x, weight in weights.items()}


@pytest.mark.parametrize("bits", SMALL)
def test_small_deviations_have_the_exact_law(bits):
    assert_has_law(drawn(bits), law(bits))


def assert_is_wide(x) -> None:
    """At the deviation of a run: cells of equal probability, moments, tails, and every low bit as often as not."""
    z = x / 2.0**BITS
    cells = stats.norm.ppf(np.linspace(0, 1, 501)[1:-1])
    assert stats.chisquare(np.bincount(np.searchsorted(cells, z), minlength=500)).pvalue > ALPHA
    bound = stats.norm.isf(ALPHA / 2)
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean() - mean) * math.sqrt(len(z) / variance) < bound
    for side, far in itertools.product((1, -1), (2.0, 3.0, 4.0)):
        assert stats.binomtest(int((side * z > far).sum()), len(z), stats.norm.sf(far)).pvalue > ALPHA
    bits = (np.abs(x)[:, None] >> np.arange(24)) & 1
    assert np.abs(bits.mean(0) - 0.5).max() * 2 * math.sqrt(len(x)) < stats.norm.isf(ALPHA / 48)


def test_the_deviation_of_a_run_has_its_law():
    assert_is_wide(drawn(BITS))


def rounded_normal(bits):
    return np.rint(np.random.default_rng(0).standard_normal(DRAWS) * 2**bits).astype(int)


PLANTED = {
    "a normal, rounded": rounded_normal(0),
    "zero twice as often": np.where(np.random.default_rng(1).random(DRAWS) < 0.02, 0, drawn(0)),
    "no negative ones": np.abs(drawn(0)),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_another_law_would_be_seen(planted):
    with pytest.raises(AssertionError):
        assert_has_law(planted, law(0))


def test_proposals_that_are_all_accepted_would_be_seen(monkeypatch):
    monkeypatch.setattr(grid_noise, "_accepts", lambda exponent, words, more: np.ones(len(exponent), bool))
    with pytest.raises(AssertionError):
        assert_has_law(discrete_gaussian(KEY.stream("test"), DRAWS, 3), law(3))


@pytest.mark.parametrize(
    "planted", [lambda x: x * 1.01, lambda x: x >> 6 << 6, lambda x: np.clip(x, -2.9 * 2**BITS, 2.9 * 2**BITS)]
)
def test_wider_coarser_and_cut_noise_would_be_seen(planted):
    with pytest.raises(AssertionError):
        assert_is_wide(planted(drawn(BITS)).astype(np.int64))


def test_each_part_of_an_exponent_has_its_factor():
    """exp(-E) is the product of the three probabilities with which the parts accept."""
    generator = np.random.default_rng(0)
    for exponent in generator.integers(0, 2**60, 20).tolist():
        high, middle = exponent >> 54, exponent >> 43 & 2047
        factors = grid_noise._factors()
        product = mpmath.mpf(1)
        for boundaries, number in zip(factors, (high, middle), strict=True):
            product *= mpmath.mpf(boundaries._floor(number, 128)) / 2**128
        product *= mpmath.exp(-mpmath.mpf(exponent % 2**43) / 2**57)
        assert mpmath.almosteq(product, mpmath.exp(-mpmath.mpf(exponent) / 2**57), 1e-15)
    assert int(grid_noise._SURE) / 2**64 <= math.exp(-((2**43 - 1) / 2**57))


class Recorded:
    """A stream whose words are given."""

    def __init__(self, words):
        self._words = np.array(words, np.uint64)

    def words(self, count):
        taken, self._words = self._words[:count], self._words[count:]
        return taken


def candidate(number, place, *accepting, negative=False):
    """The words of one candidate in strip `number`, at the deviation of a run."""
    strip = 2**64 * (math.exp(-number / 16) + math.exp(-(number + 1) / 16)) / 2
    return [int(strip), (place << 40) | int(negative), *accepting]


@pytest.mark.parametrize("number", [0, 15, 16, 200, 300])
def test_a_candidate_becomes_what_its_words_say(number):
    place = 12345
    found = grid_noise._accepted(Recorded(candidate(number, place, 1, 1, 1, negative=True)), 1, BITS)
    assert found.tolist() == ([-(number * 2**24 + place)] if number < 100 else [])  # exp(-66) is below every word


def test_the_last_digits_of_an_exponent_decide_too():
    """A third word above exp(-low), low the last 43 digits of E, refuses: 2^48 + 2^42.5 are the digits of this E."""
    for word, kept in ((2**63, 1), (2**64 - 1, 0)):
        assert len(grid_noise._accepted(Recorded(candidate(15, 12345, 1, 1, word)), 1, BITS)) == kept


def test_far_candidates_are_decided_like_near_ones():
    """Sixteen deviations out Python's integers decide; both ways agree where both can."""
    generator = np.random.default_rng(0)
    for number in (0, 20, 60, 100, 140):
        place = int(generator.integers(0, 2**24))
        begin = number << 24
        exponent = (begin - 2**BITS) ** 2 + place * (2 * begin + place)
        exact = math.exp(-exponent / 2**57)
        for word in (int(exact * 2**64 * 0.999), min(int(exact * 2**64 * 1.001), 2**64 - 1)):
            far = grid_noise._accepts_far(begin, place, word, BITS, KEY.stream("more"))
            assert far == (word < exact * 2**64)
    assert grid_noise._accepts_far(300 << 24, 0, 0, BITS, Recorded([0, 0, 0, 0])) is True


def test_a_negative_zero_is_refused():
    for negative in (False, True):
        found = grid_noise._accepted(Recorded(candidate(0, 0, 0, 0, 0, negative=negative)), 1, BITS)
        assert found.tolist() == ([] if negative else [0])


def test_draws_do_not_depend_on_how_many_are_made_at_once(monkeypatch):
    whole = discrete_gaussian(KEY.stream("pieces"), 500)
    monkeypatch.setattr(grid_noise, "_PIECE", 7)
    assert np.array_equal(discrete_gaussian(KEY.stream("pieces"), 300), whole[:300])


def purpose(**changes):
    return {"stream": "train", "step": 0, "attempt": 0, "name": "weight", **changes}


def test_tensors_have_their_shape_repeat_and_share_no_noise():
    source = NoiseSource.from_seed(3)
    first = source.discrete((3, 4, 50), **purpose())
    assert first.dtype == torch.int64 and first.shape == (3, 4, 50)
    assert source.discrete((), **purpose()).shape == () and source.discrete((0, 2), **purpose()).shape == (0, 2)
    assert torch.equal(first, NoiseSource.from_seed(3).discrete((600,), **purpose()).view(3, 4, 50))
    others = [{"stream": "analysis"}, {"step": 1}, {"attempt": 1}, {"name": "bias"}]
    draws = [first, NoiseSource.from_seed(4).discrete((3, 4, 50), **purpose())]
    draws += [source.discrete((3, 4, 50), **purpose(**other)) for other in others]
    together = np.corrcoef(np.stack([draw.flatten().double().numpy() for draw in draws]))
    assert np.abs(together[np.triu_indices(len(draws), 1)]).max() < 5.5 / math.sqrt(600)
    assert len({int(draw[0, 0, 0]) for draw in draws}) == len(draws)


# What the proof at the head of the file says, in numbers


@pytest.mark.parametrize("bits", [1, 3, 6])
def test_the_law_lies_between_the_bounds_of_the_proof(bits):
    std = mpmath.mpf(2**bits)
    z = 1 + 2 * mpmath.exp(-2 * (mpmath.pi * std) ** 2)
    assert z - 1 < mpmath.exp(-4 * std**2)
    for x in range(0, 12 * 2**bits, max(2**bits // 4, 1)):
        density = mpmath.exp(-((x / std) ** 2) / 2) / (std * mpmath.sqrt(2 * mpmath.pi))
        with mpmath.workdps(40):
            cell = mpmath.quad(lambda t, x=x: mpmath.exp(-(((x + t) / std) ** 2) / 2), [-0.5, 0.5])
        ratio = z * cell / (std * mpmath.sqrt(2 * mpmath.pi)) / density
        assert 1 - 1 / (24 * std**2) <= ratio <= z * mpmath.exp(x**2 / (24 * std**4))


def test_the_excess_is_at_least_what_the_proof_adds_up():
    for n in (1, 1000, 10**12):
        assert excess(n) >= (n + 2 * n + 2400) / (23 * 4.0**BITS)
    assert excess(10**11) < 1e-6


@pytest.mark.parametrize("adjacency", [AdjacencyType.ADD, AdjacencyType.REMOVE])
@pytest.mark.parametrize(("std", "sensitivity", "rate"), [(10, 10, 0.1), (40, 20, 0.02), (400, 400, 0.1)])
def test_the_privacy_loss_of_a_sampled_release_is_the_gaussians(std, sensitivity, rate, adjacency):
    """By dp_accounting's own discrete Gaussian; what is left falls with the square of the deviation."""
    facts = {"sensitivity": sensitivity, "sampling_prob": rate, "adjacency_type": adjacency}
    continuous, discrete = GaussianPrivacyLoss(std, **facts), DiscreteGaussianPrivacyLoss(std, **facts)
    for epsilon in (0.0, 0.01, 0.05, 0.1):
        delta = continuous.get_delta_for_epsilon(epsilon)
        assert discrete.get_delta_for_epsilon(epsilon) == pytest.approx(delta, rel=1 / std**2)


def assert_says_no_less(said) -> None:
    for num_values, releases in ((1, 1), (26_010, 240), (11_000_000, 10_000)):
        power = int(re.search(r"at most 2\^(-\d+) to epsilon", said(num_values, releases))[1])
        assert excess(num_values * releases) <= 2.0**power < 4 * excess(num_values * releases)
    each = int(re.search(r"at most 2\^(-\d+) for each number and release", said(None, 5))[1])
    assert all(excess(n) <= n * 2.0**each for n in (1, 10, 10**9))


def test_what_the_statement_says_of_the_cost_is_no_less():
    assert_says_no_less(covered)
    with pytest.raises(AssertionError):
        assert_says_no_less(lambda num_values, releases: covered(num_values, 1))


def test_the_grid_is_an_exact_part_of_the_deviation():
    for std in (1.0, 0.37, 1e-9, 12345.678):
        assert grid_of(std) * 2**BITS == std
