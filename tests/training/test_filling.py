# SPDX-License-Identifier: Apache-2.0
"""Rows of a step, against batches drawn as a sampler draws them, and the sizes that are fitted by them."""

import numpy as np
import pytest

from dpquant.training.filling import fitted, of_analysis, rows_of_step


def assert_rows_are_counted(rows):
    records = np.random.default_rng(0)
    for size, expected in [(32, 40), (64, 256), (1024, 4096), (1055, 4096), (4096, 4096), (100, 8)]:
        drawn = np.ceil(records.binomial(60 * expected, 1 / 60, 20_000) / size) * size
        assert rows(size, expected) == pytest.approx(drawn.mean(), rel=0.02), (size, expected)


def test_rows_of_a_step_are_those_that_a_sampler_makes():
    assert_rows_are_counted(rows_of_step)


def test_rows_without_the_filling_would_be_seen():
    with pytest.raises(AssertionError):
        assert_rows_are_counted(lambda size, expected: expected)


def test_each_group_fills_a_microbatch_of_its_own():
    """Records of 4 groups, 512 a step: with 64 at a time about 5 % more rows for one group, and 25 % for four."""
    records = np.random.default_rng(0).binomial(7680, 1 / 60, (20_000, 4))
    drawn = (np.ceil(records / 64) * 64).sum(1).mean()
    assert rows_of_step(64, 512, 4) == pytest.approx(drawn, rel=0.02) and drawn > 1.2 * 512
    assert rows_of_step(64, 512) < 1.1 * 512


@pytest.mark.parametrize(("size", "expected"), [(1024, 4096), (4096, 4096), (64, 64), (256, 512)])
def test_a_size_is_fitted_to_the_batches(size, expected):
    found = fitted(size, expected)
    assert size < found <= size * 9 / 8
    assert rows_of_step(found, expected) < 0.95 * rows_of_step(size, expected)


@pytest.mark.parametrize(("size", "expected"), [(16, 4096), (32, 20), (64, 1e6)])
def test_a_size_that_fits_stays(size, expected):
    assert fitted(size, expected) == size


def seconds_of_analysis(size, groups, *, records=32, begins=5.0):
    """Mean time of drawn analyses in units of a row's: a pass costs its rows, and `begins` more to begin."""
    drawn = np.random.default_rng(0).binomial(60 * records // groups, 1 / 60, (4_000, groups))
    return float((np.ceil(drawn / size) * (size + begins)).sum(1).mean())


@pytest.mark.parametrize(("groups", "gain"), [(1, 1.2), (4, 3), (10, 5)])
def test_an_analysis_computes_few_rows_that_are_copies(groups, gain):
    found = of_analysis(64, 32, groups=groups, device="cpu")
    least = min(seconds_of_analysis(size, groups) for size in range(1, 65))
    assert seconds_of_analysis(found, groups) < 1.1 * least
    assert seconds_of_analysis(64, groups) > gain * seconds_of_analysis(found, groups)


def test_an_analysis_has_as_many_at_a_time_as_memory_allows_where_passes_are_dear():
    assert of_analysis(64, 4096, groups=1, device="cpu") > 50
    assert of_analysis(64, 64, groups=1, device="cuda") == of_analysis(64, 200, groups=4, device="cuda") == 64
    assert of_analysis(3, 64, groups=1, device="cpu") == 3
