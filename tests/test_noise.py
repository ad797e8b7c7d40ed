# SPDX-License-Identifier: Apache-2.0
"""Noise has the stated scale and shape, and no two draws have anything in common. Planted bugs are found."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dpquant.errors import SettingError
from dpquant.keys import SecretKey
from dpquant.noise import NoiseSource

ALPHA = 1e-6
NUM_DRAWS = 2_000_000
STD = 0.37
SOURCE = NoiseSource(SecretKey(b"a key for tests!"))
PURPOSES = list(itertools.product(("train", "analysis"), (0, 1), (0, 1), ("weight", "bias")))


def draw(stream: str, step: int, attempt: int, name: str, size: int = 2000) -> Tensor:
    return SOURCE.gaussian((size,), STD, stream=stream, step=step, attempt=attempt, name=name)


def assert_normal_of(std: float, noise: Tensor) -> None:
    """Variance within its chi-square interval, mean within its normal one, shape by Kolmogorov and Smirnov."""
    z = noise.double().numpy().ravel() / std
    bound = stats.norm.isf(ALPHA / 2)
    assert abs((z.var() - 1) * math.sqrt(z.size / 2)) < bound
    assert abs(z.mean()) * math.sqrt(z.size) < bound
    assert stats.kstest(z[:200_000], "norm").pvalue > ALPHA


def assert_unrelated(draws: list[Tensor]) -> None:
    """No two draws begin alike or are correlated (Bonferroni over all pairs)."""
    stacked = np.stack([noise.double().numpy() for noise in draws])
    correlations = np.corrcoef(stacked)[np.triu_indices(len(draws), 1)]
    assert np.abs(correlations).max() < stats.norm.isf(ALPHA / 2 / correlations.size) / math.sqrt(stacked.shape[1])
    assert len({tuple(row[:8]) for row in stacked}) == len(draws)


HONEST = draw("train", 0, 0, "weight", NUM_DRAWS)


def test_noise_is_normal_with_the_stated_standard_deviation():
    assert_normal_of(STD, HONEST)


@pytest.mark.parametrize("factor", [0.995, 1.01, 2.0])
def test_a_wrong_scale_would_be_seen(factor):
    with pytest.raises(AssertionError):
        assert_normal_of(STD, factor * HONEST)


def test_another_shape_of_the_same_scale_would_be_seen():
    uniform = torch.rand(NUM_DRAWS, generator=torch.Generator().manual_seed(0)).sub(0.5).mul(math.sqrt(12) * STD)
    with pytest.raises(AssertionError):
        assert_normal_of(STD, uniform)


def test_a_shifted_mean_would_be_seen():
    with pytest.raises(AssertionError):
        assert_normal_of(STD, HONEST + 0.01 * STD)


def test_streams_steps_attempts_and_parameters_share_no_noise():
    assert_unrelated([draw(*purpose) for purpose in PURPOSES])


@pytest.mark.parametrize("forgotten", [0, 1, 2, 3])
def test_forgetting_any_part_of_the_purpose_would_be_seen(forgotten):
    kept = [
        purpose[:forgotten] + PURPOSES[0][forgotten : forgotten + 1] + purpose[forgotten + 1 :] for purpose in PURPOSES
    ]
    with pytest.raises(AssertionError):
        assert_unrelated([draw(*purpose) for purpose in kept])


def test_correlated_noise_would_be_seen():
    draws = [draw(*purpose) for purpose in PURPOSES]
    draws[3] = (draws[3] + draws[7]) / math.sqrt(2)
    with pytest.raises(AssertionError):
        assert_unrelated(draws)


def test_noise_is_numpys_normals_on_the_keys_stream():
    key = SecretKey.from_seed(5)
    bits = key.stream("noise", "train", 2, 1, "fc.weight")
    expected = (0.3 * np.random.Generator(bits).standard_normal((3, 4))).astype(np.float32)
    noise = NoiseSource(key).gaussian((3, 4), 0.3, stream="train", step=2, attempt=1, name="fc.weight")
    assert noise.dtype == torch.float32
    assert np.array_equal(noise.numpy(), expected)


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3, 4), torch.Size([7, 1])])
def test_noise_has_the_shape_that_was_asked_for(shape):
    noise = SOURCE.gaussian(shape, 1.0, stream="train", step=0, attempt=0, name="x")
    assert noise.shape == torch.Size(shape)
    assert noise.isfinite().all()


@pytest.mark.parametrize("std", [2.0**-100, 1e-20, 1e6, 2.0**100])
def test_noise_neither_vanishes_nor_overflows(std):
    noise = SOURCE.gaussian((1000,), std, stream="train", step=0, attempt=0, name="x")
    assert noise.isfinite().all()
    assert noise.double().std().item() == pytest.approx(std, rel=0.2)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, 1e-40, 1e38])
def test_scales_that_float32_cannot_hold_are_refused(std):
    with pytest.raises(SettingError, match="std="):
        SOURCE.gaussian((1,), std, stream="train", step=0, attempt=0, name="x")


def test_the_global_seed_has_no_say():
    torch.manual_seed(0)
    first = NoiseSource().gaussian((8,), 1.0, stream="train", step=0, attempt=0, name="x")
    torch.manual_seed(0)
    assert not torch.equal(first, NoiseSource().gaussian((8,), 1.0, stream="train", step=0, attempt=0, name="x"))


def test_seeded_noise_repeats_and_is_not_secure():
    first, second = (
        NoiseSource.from_seed(1).gaussian((8,), 1.0, stream="train", step=0, attempt=0, name="x") for _ in range(2)
    )
    assert torch.equal(first, second)
    assert NoiseSource().secure
    assert not NoiseSource.from_seed(1).secure
