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
from dpquant.privacy import noise as noise_module
from dpquant.privacy.noise import (
    ATANH,
    COS,
    SIN,
    NoiseSource,
    cell_midpoints,
    fill_in_numpy,
    log_of,
    normals,
    sine_and_cosine,
)
from dpquant.privacy.secret import SecretKey

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


def test_noise_is_normal_with_the_stated_standard_deviation(tried):
    tried("draws of records and noise", NUM_DRAWS)
    assert_normal_of(STD, HONEST)


@pytest.mark.parametrize("factor", [0.995, 1.01, 2.0])
def test_a_wrong_scale_would_be_seen(factor):
    with pytest.raises(AssertionError):
        assert_normal_of(STD, factor * HONEST)


def test_a_quarter_of_the_circle_would_be_seen():
    words = words_of(NUM_DRAWS) & np.uint64(2**64 - 4)
    with pytest.raises(AssertionError):
        assert_normal_of(1.0, torch.from_numpy(normals(words)))


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


# The normals that a stream's words stand for


def words_of(size: int, *purpose: str) -> np.ndarray:
    return SecretKey(b"a key for tests!").stream("words", *purpose).words(size).copy()


def box_muller(words: np.ndarray) -> np.ndarray:
    """The module's formula by numpy's log, sine and cosine, the angle put together from all its bits."""
    a, b = words[0::2], words[1::2]
    u, v = ((word >> 12) * 2.0**-52 + 2.0**-53 for word in (a, b))
    turned = np.where(b & 1, 0.5 - (v - 0.5) * 0.5, (v - 0.5) * 0.5)  # in units of pi: exchange is reflection
    angle = math.pi * np.where(b & 2, turned + 1.0, turned)
    radius = np.sqrt(-2.0 * np.log(u))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def test_noise_is_box_mullers_normals_on_the_keys_stream():
    key = SecretKey.from_seed(5)
    words = key.stream("noise", "train", 2, 1, "fc.weight").words(12)
    noise = NoiseSource(key).gaussian((3, 4), 0.3, stream="train", step=2, attempt=1, name="fc.weight")
    assert noise.dtype == torch.float32
    np.testing.assert_allclose(noise.numpy().ravel(), 0.3 * box_muller(words), rtol=1e-6)


def test_normals_are_box_mullers():
    words = words_of(1_000_000)
    np.testing.assert_allclose(normals(words), box_muller(words), rtol=1e-13, atol=4e-15)


@pytest.mark.parametrize("bit", [0, 1, 12, 63])
def test_normals_that_leave_out_a_bit_of_the_angle_would_be_seen(bit):
    words = words_of(1000)
    broken = words.copy()
    broken[1::2] &= np.uint64(2**64 - 1 - 2**bit)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(normals(broken), box_muller(words), rtol=1e-13, atol=4e-15 if bit != 12 else 0)


def assert_accurate(log, sine, cosine) -> None:
    """Errors below 1e-15 of the value: everywhere, near 1, and at every power of two."""
    powers = 2.0 ** -np.arange(1, 54)
    near = powers[:-1, None] * (1 + 2.0**-52 * np.arange(-3, 4))
    u = np.concatenate([cell_midpoints(words_of(500_000)), powers, 1 - powers, near.ravel(), math.sqrt(0.5) * powers])
    wide = np.longdouble  # more digits than float64 on x86, the same elsewhere: the bound holds for both
    assert np.abs(log(u) / np.log(u.astype(wide)) - 1).max() < 1e-15
    x = np.concatenate([(u - 0.5) * (math.pi / 2), [-math.pi / 4, math.pi / 4]])
    assert np.abs(sine(x[x != 0]) / np.sin(x[x != 0].astype(wide)) - 1).max() < 1e-15
    assert np.abs(cosine(x) / np.cos(x.astype(wide)) - 1).max() < 1e-15


def assert_series_are_accurate(logarithm=(), **series) -> None:
    assert_accurate(
        lambda u: log_of(u, *logarithm),
        lambda x: sine_and_cosine(x, **series)[0],
        lambda x: sine_and_cosine(x, **series)[1],
    )


def test_the_written_out_functions_are_accurate():
    assert_series_are_accurate()


@pytest.mark.parametrize(
    "short", [{"logarithm": [ATANH[:-2]]}, {"sin": SIN[:-2]}, {"cos": COS[:-2]}], ids=lambda short: next(iter(short))
)
def test_a_series_that_is_a_term_too_short_would_be_seen(short):
    with pytest.raises(AssertionError):
        assert_series_are_accurate(**short)


def test_the_lowest_and_highest_words_give_the_stated_extremes():
    lowest, highest = np.zeros(4, np.uint64), np.full(4, 2**64 - 1, np.uint64)
    assert cell_midpoints(np.array([int(math.sqrt(0.5) * 2**52) << 12], np.uint64)) == math.sqrt(0.5)
    assert cell_midpoints(lowest[:1]) == 2.0**-53 and cell_midpoints(highest[:1]) == 1 - 2.0**-53
    z = normals(np.stack([lowest, highest], axis=1).ravel())  # the longest radius, and the shortest
    assert np.hypot(*z.reshape(-1, 2)[0]) == pytest.approx(math.sqrt(106 * math.log(2)), rel=1e-15)
    z = normals(np.stack([highest, lowest], axis=1).ravel())
    assert np.hypot(*z.reshape(-1, 2)[0]) == pytest.approx(2.0**-26, rel=1e-15)


def test_the_missing_tail_is_as_small_as_stated():
    assert 2 * stats.norm.sf(math.sqrt(106 * math.log(2))) == pytest.approx(1.0e-17, rel=0.03)


def assert_tails_of(std: float, noise: Tensor) -> None:
    """As many values beyond 2, 3, 4 and 4.5 standard deviations, on each side, as the normal law has."""
    for side, bound in itertools.product((1, -1), (2.0, 3.0, 4.0, 4.5)):
        beyond = int((side * noise.double() > bound * std).sum())
        assert stats.binomtest(beyond, noise.numel(), stats.norm.sf(bound)).pvalue > ALPHA


def test_tails_are_as_heavy_as_the_normal_laws():
    assert_tails_of(STD, HONEST)


def test_a_cut_tail_would_be_seen():
    with pytest.raises(AssertionError):
        assert_tails_of(STD, HONEST.clamp(-3.9 * STD, 3.9 * STD))


def assert_pairs_independent(z: np.ndarray) -> None:
    """No value of a pair, nor its square, says anything of the other, and no pair of the next."""
    for values in (z, z * z, np.abs(z) > 2):
        for lag in (1, 2, 3):
            for offset in (0, 1):
                first, second = values[offset:-lag:2], values[offset + lag :: 2][: len(values[offset:-lag:2])]
                correlation = np.corrcoef(first, second)[0, 1]
                assert abs(correlation) * math.sqrt(len(first)) < stats.norm.isf(ALPHA / 2)


def test_the_two_values_of_a_pair_are_independent():
    assert_pairs_independent(HONEST.double().numpy() / STD)


def test_an_angle_that_shares_its_word_with_the_radius_would_be_seen():
    words = words_of(200_000)
    words = np.stack([words[::2], words[::2]], axis=1).ravel()
    with pytest.raises(AssertionError):
        assert_pairs_independent(normals(words))


# The native kernel


def assert_native_equals_numpy(size: int, std: float, threads: int = 1, *, native_std: float | None = None) -> None:
    words = words_of(size + size % 2, str(size))
    root = int(math.sqrt(0.5) * 2**52) << 12  # u = sqrt(1/2), where the logarithm's reduction changes over
    extremes = np.resize(np.array([0, 2**64 - 1, 2**63, 2**63 - 1, root, root - 1, 4095], np.uint64), 14)[: words.size]
    words[: extremes.size] = extremes
    expected = (std * normals(words))[:size].astype(np.float32)
    filled = np.full(size, np.nan, np.float32)
    noise_module._native.fill_noise(words, filled, std=native_std or std, threads=threads)
    assert np.array_equal(filled.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("std", [1.0, 0.37, 2.0**-100, 2.0**100, 1e6 / 3])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 15, 16, 17, 8191, 8192, 8193, 300_001])
def test_the_native_kernel_gives_the_same_bits(size, std):
    assert_native_equals_numpy(size, std, threads=1)
    assert_native_equals_numpy(size, std, threads=3)


def test_a_kernel_that_differs_in_the_last_bits_would_be_seen():
    with pytest.raises(AssertionError):
        assert_native_equals_numpy(300_001, 0.37, native_std=0.37 * (1 + 1e-9))


class WithoutTheKernel(NoiseSource):
    _fill = staticmethod(fill_in_numpy)


@pytest.mark.parametrize("size", [1, 65_535, 65_536, 65_537, 200_003])
def test_without_the_kernel_and_on_other_threads_the_noise_is_the_same(size):
    first, threads = draw("train", 0, 0, "weight", size), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(draw("train", 0, 0, "weight", size), first)
    finally:
        torch.set_num_threads(threads)
    in_numpy = WithoutTheKernel(SecretKey(b"a key for tests!"))
    assert torch.equal(in_numpy.gaussian((size,), STD, stream="train", step=0, attempt=0, name="weight"), first)


@pytest.mark.parametrize("num_words", [4, 6])
def test_words_that_do_not_fit_the_noise_are_refused(num_words):
    with pytest.raises(ValueError, match="sizes of words and noise"):
        noise_module._native.fill_noise(words_of(num_words), np.empty(7, np.float32), std=1.0, threads=1)


# What may be asked for


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


PARTS = [slice(0, 0), slice(0, 1), slice(1, 2), slice(3, 200_001), slice(131_071, 131_074), slice(199_999, 200_001)]
PURPOSE = {"stream": "train", "step": 3, "attempt": 1, "name": "w"}


def assert_parts_are_cut_from_the_whole(draw):
    whole = draw(None)
    for part in PARTS:
        assert torch.equal(draw(part), whole.flatten()[part]), part


def test_a_part_of_the_noise_has_the_bits_that_it_has_in_the_whole():
    """Processes draw a slice each: whatever their number, the noise is that of one. Odd places share two words."""
    noise = NoiseSource(SecretKey(bytes(16)))
    assert_parts_are_cut_from_the_whole(lambda part: noise.gaussian((3, 66_667), 2.0, part=part, **PURPOSE))
    assert_parts_are_cut_from_the_whole(lambda part: noise.discrete((3, 66_667), part=part, **PURPOSE))


def test_a_part_that_begins_at_another_place_is_seen():
    noise = NoiseSource(SecretKey(bytes(16)))

    def off_by_one(part):
        moved = part if part is None else slice(part.start + 1, part.stop + 1)
        return noise.gaussian((3, 66_667), 2.0, part=moved, **PURPOSE)

    with pytest.raises(AssertionError):
        assert_parts_are_cut_from_the_whole(off_by_one)
