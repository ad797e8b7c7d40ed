# SPDX-License-Identifier: Apache-2.0
"""Inclusions are independent Bernoulli(q) over records, steps, attempts and streams. Each law finds its bugs."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from dpquant.errors import SettingError
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


def test_every_record_is_drawn_at_its_rate():
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


@pytest.mark.parametrize("sample_rate", [0.02, 1 / 3, 0.5, 1 - 2**-53, 2**-64, 1.0])
def test_a_draw_is_a_comparison_of_64_bits_with_an_exact_threshold(sample_rate):
    key = SecretKey.from_seed(3)
    words = key.stream("sampling", "train", 7, 2).words(5000).tolist()
    expected = [i for i, word in enumerate(words) if word < math.floor(sample_rate * 2**64)]
    drawn = PoissonSampler(key).draw(5000, sample_rate, stream="train", step=7, attempt=2)
    assert drawn.dtype == torch.int64
    assert drawn.tolist() == expected


def test_at_rate_one_everybody_is_drawn_and_an_empty_data_set_gives_an_empty_batch():
    assert SAMPLER.draw(999, 1.0, stream="train", step=0, attempt=0).tolist() == list(range(999))
    assert SAMPLER.draw(0, 0.5, stream="train", step=0, attempt=0).tolist() == []


def test_another_record_in_the_data_set_changes_nobody_elses_inclusion():
    longer = SAMPLER.draw(501, 0.3, stream="train", step=5, attempt=0)
    assert torch.equal(longer[longer < 500], SAMPLER.draw(500, 0.3, stream="train", step=5, attempt=0))


def test_seeded_draws_repeat_and_are_not_secure_and_others_differ():
    def draw(sampler: PoissonSampler) -> list[int]:
        return sampler.draw(10_000, 0.1, stream="train", step=0, attempt=0).tolist()

    assert draw(PoissonSampler.from_seed(1)) == draw(PoissonSampler.from_seed(1))
    assert draw(PoissonSampler()) != draw(PoissonSampler())
    assert PoissonSampler().secure
    assert not PoissonSampler.from_seed(1).secure


@pytest.mark.parametrize("sample_rate", [0.0, -0.1, 1.1, math.nan])
def test_rates_that_are_no_probability_are_refused(sample_rate):
    with pytest.raises(SettingError, match="sample_rate"):
        SAMPLER.draw(10, sample_rate, stream="train", step=0, attempt=0)
    with pytest.raises(SettingError, match="num_records=-1"):
        SAMPLER.draw(-1, 0.5, stream="train", step=0, attempt=0)
