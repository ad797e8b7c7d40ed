# SPDX-License-Identifier: Apache-2.0
"""Inclusions are independent Bernoulli(q) over records, steps, attempts and streams. Each law finds its bugs."""

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from dpquant.errors import SettingError
from dpquant.privacy import sampling
from dpquant.privacy.sampling import PoissonSampler
from dpquant.privacy.secret import SecretKey

ALPHA = 1e-6
N, T, Q = 1000, 3000, 0.02
SAMPLER = PoissonSampler(SecretKey(b"a key for tests!"))


def inclusions(stream: str = "train", sample_rate: float = Q, attempt: int = 0) -> np.ndarray:
    """Boolean `(T, N)`."""
    drawn = np.zeros((T, N), dtype=bool)
    for step in range(T):
        drawn[step, SAMPLER.draw(N, sample_rate, stream=stream, step=step, attempt=attempt).numpy()] = True
    return drawn


HONEST = inclusions()


def assert_two_sided(chi_square: float, freedom: int) -> None:
    low, high = stats.chi2.ppf([ALPHA / 2, 1 - ALPHA / 2], freedom)
    assert low < chi_square < high


def assert_standard_normal(z: float) -> None:
    assert abs(z) < stats.norm.isf(ALPHA / 2)


def assert_every_record_has_its_rate(drawn: np.ndarray) -> None:
    """Law a: counts over steps are Binomial(T, q)."""
    assert_two_sided(float(((drawn.sum(0) - T * Q) ** 2).sum() / (T * Q * (1 - Q))), N)
    assert_standard_normal(float((drawn.sum() - T * N * Q) / math.sqrt(T * N * Q * (1 - Q))))


def assert_batch_sizes_vary_as_they_should(drawn: np.ndarray) -> None:
    """Law b: sizes over records are Binomial(N, q)."""
    assert_two_sided(float((T - 1) * drawn.sum(1).var(ddof=1) / (N * Q * (1 - Q))), T - 1)


def assert_independent(left: np.ndarray, right: np.ndarray) -> None:
    """Law c: two masks share q^2 of the places."""
    expected, size = Q * Q, left.size
    assert_standard_normal(
        float(((left & right).sum() - size * expected) / math.sqrt(size * expected * (1 - expected)))
    )


def shuffled() -> np.ndarray:
    """The bug of most loaders: a permutation cut into batches."""
    generator, per_epoch = np.random.default_rng(0), round(1 / Q)
    drawn = np.zeros((T, N), dtype=bool)
    for epoch in range(T // per_epoch):
        order = generator.permutation(N).reshape(per_epoch, -1)
        np.put_along_axis(drawn[epoch * per_epoch : (epoch + 1) * per_epoch], order, True, axis=1)
    return drawn


def truncated() -> np.ndarray:
    """No batch beyond 1.2 times its expectation."""
    drawn = HONEST.copy()
    for row in drawn:
        row[np.flatnonzero(row)[round(1.2 * N * Q) :]] = False
    return drawn


def test_every_record_is_drawn_at_its_rate(tried):
    tried("draws of records and noise", HONEST.size)
    assert_every_record_has_its_rate(HONEST)


def test_batch_sizes_are_binomial():
    assert_batch_sizes_vary_as_they_should(HONEST)


def test_neighbouring_steps_and_records_are_independent():
    assert_independent(HONEST[1:], HONEST[:-1])
    assert_independent(HONEST[:, 1:], HONEST[:, :-1])
    assert_independent(HONEST[:, : N // 2], HONEST[:, N // 2 :])


def test_streams_and_attempts_are_independent():
    assert_independent(HONEST, inclusions(stream="analysis"))
    assert_independent(HONEST, inclusions(attempt=1))


def test_shuffling_would_be_seen_by_all_three_laws():
    drawn = shuffled()
    for assertion in (assert_every_record_has_its_rate, assert_batch_sizes_vary_as_they_should):
        with pytest.raises(AssertionError):
            assertion(drawn)
    with pytest.raises(AssertionError):
        assert_independent(drawn[1:], drawn[:-1])


def test_five_percent_more_records_would_be_seen():
    with pytest.raises(AssertionError):
        assert_every_record_has_its_rate(inclusions(sample_rate=1.05 * Q))


def test_truncated_batches_would_be_seen():
    with pytest.raises(AssertionError):
        assert_batch_sizes_vary_as_they_should(truncated())


def test_equal_masks_in_two_streams_or_shards_would_be_seen():
    with pytest.raises(AssertionError):
        assert_independent(HONEST, inclusions(stream="train"))
    half = HONEST[:, : N // 2]
    with pytest.raises(AssertionError):
        assert_batch_sizes_vary_as_they_should(np.concatenate([half, half], axis=1))


# Gaps


def gaps(sample_rate: float, count: int = 200_000) -> np.ndarray:
    """Records passed over before each one that is drawn, in a data set without end."""
    return sampling._gaps(SecretKey(b"a key for tests!").stream("gaps", sample_rate), count, sample_rate, 2**50)


def assert_geometric(found: np.ndarray, sample_rate: float) -> None:
    """As many gaps in each of some cells as the law has, and no gap says anything about the next."""
    edges = np.unique(np.floor(np.log1p(-np.linspace(0, 1, 200)[:-1]) / math.log1p(-sample_rate)))
    expected = -np.diff((1 - sample_rate) ** edges, append=0.0) * len(found)
    counts = np.bincount(np.searchsorted(edges, found, side="right") - 1, minlength=len(edges))
    assert stats.chisquare(counts[expected > 5], expected[expected > 5], sum_check=False).pvalue > ALPHA
    for far in (math.ceil(4 / sample_rate), math.ceil(8.5 / sample_rate)):  # beyond the last cell
        rest = math.exp(far * math.log1p(-sample_rate))
        assert stats.binomtest(int((found >= far).sum()), len(found), rest).pvalue > ALPHA
    correlation = np.corrcoef(found[1:], found[:-1])[0, 1]
    assert_standard_normal(float(correlation * math.sqrt(len(found))))


RATES = [0.9, 0.5, 1 / 3, 0.02, 1e-3, 1e-5, 1e-12]


@pytest.mark.parametrize("sample_rate", RATES)
def test_gaps_are_geometric_and_independent(sample_rate):
    assert_geometric(gaps(sample_rate), sample_rate)


PLANTED_GAPS = {
    "a gap too long by one": lambda found: found + 1,
    "no zero": lambda found: np.maximum(found, 1),
    "the lowest digit left out": lambda found: found >> 5 << 5,
    "a cut tail": lambda found: np.minimum(found, 127),
    "a tail cut far out": lambda found: np.where(found < 8 / 0.02, found, 0),
    "a digit that repeats another": lambda found: (found >> 6 << 6) | (found >> 1 & 63),
    "a digit that is uniform": lambda found: (found >> 5 << 5) | np.random.default_rng(0).integers(0, 32, len(found)),
}


@pytest.mark.parametrize("planted", PLANTED_GAPS.values(), ids=PLANTED_GAPS)
def test_other_gaps_would_be_seen(planted):
    with pytest.raises(AssertionError):
        assert_geometric(planted(gaps(0.02)), 0.02)


def test_gaps_that_come_in_pairs_would_be_seen():
    with pytest.raises(AssertionError):
        assert_geometric(np.repeat(gaps(0.02)[:100_000], 2), 0.02)


def probability_of(gap: int, sample_rate: float, floor=sampling._floor) -> Fraction:
    """The probability of a gap: the product over its digits of what lies between their boundaries, to 448 bits."""
    product, bits = Fraction(1), 448
    digits = [shift for shift, _ in sampling._digits(sample_rate)]
    for number, shift in enumerate(digits):
        base = None if number == len(digits) - 1 else 1 << (digits[number + 1] - shift)
        digit = gap >> shift if base is None else (gap >> shift) % base
        above = 1 << bits if digit == 0 else floor(sample_rate, shift, base, digit - 1, bits)
        product *= Fraction(above - floor(sample_rate, shift, base, digit, bits), 1 << bits)
    return product


def assert_exact(floor=sampling._floor) -> None:
    for sample_rate in (0.9, 1 / 3, 0.02, 1e-3):
        for gap in (0, 1, 7, 255, 256, 1000):
            exact = Fraction(sample_rate) * (1 - Fraction(sample_rate)) ** gap
            assert abs(probability_of(gap, sample_rate, floor) - exact) < Fraction(1, 2**430)


def test_every_record_has_exactly_its_rate():
    assert_exact()


def test_boundaries_in_float64_would_be_seen():
    def rounded(sample_rate, shift, base, k, bits):
        return int(sampling._floor(sample_rate, shift, base, k, 64) / 2**64 * 2**64) << (bits - 64)

    with pytest.raises(AssertionError):
        assert_exact(rounded)


def test_a_draw_goes_from_hit_to_hit():
    key = SecretKey.from_seed(3)
    steps = sampling._gaps(key.stream("sampling", "train", 7, 2), 500, 0.02, 2**40) + 1
    drawn = PoissonSampler(key).draw(5000, 0.02, stream="train", step=7, attempt=2)
    assert drawn.dtype == torch.int64
    assert drawn.tolist() == [place - 1 for place in np.cumsum(steps).tolist() if place <= 5000]


def test_a_hundred_million_records_cost_what_is_drawn_of_them():
    n, rate, draws = 10**8, 1e-5, 60
    tracemalloc.start()
    drawn = [SAMPLER.draw(n, rate, stream="train", step=step, attempt=9).numpy() for step in range(draws)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20
    assert_standard_normal((sum(map(len, drawn)) - draws * n * rate) / math.sqrt(draws * n * rate * (1 - rate)))
    assert stats.kstest(np.concatenate(drawn) / n, "uniform").pvalue > ALPHA
    assert all((np.diff(one) > 0).all() for one in drawn)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_pieces_do_not_change_a_draw(size, monkeypatch):
    whole = SAMPLER.draw(3000, 0.2, stream="train", step=0, attempt=0)
    monkeypatch.setattr(sampling, "_PIECE", size)
    assert torch.equal(SAMPLER.draw(3000, 0.2, stream="train", step=0, attempt=0), whole)


def test_at_rate_one_everybody_is_drawn_and_an_empty_data_set_gives_an_empty_batch():
    assert SAMPLER.draw(999, 1.0, stream="train", step=0, attempt=0).tolist() == list(range(999))
    assert SAMPLER.draw(0, 0.5, stream="train", step=0, attempt=0).tolist() == []


def test_another_record_in_the_data_set_changes_nobody_elses_inclusion():
    for rate in (0.3, 0.01):
        longer = SAMPLER.draw(2501, rate, stream="train", step=5, attempt=0)
        assert torch.equal(longer[longer < 500], SAMPLER.draw(500, rate, stream="train", step=5, attempt=0))


def test_seeded_draws_repeat_and_are_not_secure_and_others_differ():
    def draw(sampler: PoissonSampler) -> list[int]:
        return sampler.draw(10_000, 0.1, stream="train", step=0, attempt=0).tolist()

    assert draw(PoissonSampler.from_seed(1)) == draw(PoissonSampler.from_seed(1))
    assert draw(PoissonSampler()) != draw(PoissonSampler())
    assert PoissonSampler().secure
    assert not PoissonSampler.from_seed(1).secure


@pytest.mark.parametrize("sample_rate", [0.0, -0.1, 1.1, math.nan, 2.0**-41])
def test_rates_that_are_no_probability_are_refused(sample_rate):
    with pytest.raises(SettingError, match="sample_rate"):
        SAMPLER.draw(10, sample_rate, stream="train", step=0, attempt=0)
    with pytest.raises(SettingError, match="num_records=-1"):
        SAMPLER.draw(-1, 0.5, stream="train", step=0, attempt=0)
