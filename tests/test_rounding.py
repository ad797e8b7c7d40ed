# SPDX-License-Identifier: Apache-2.0
"""Keys name what they are for; draws are exactly uniform over their range and look independent along every axis."""

import functools
import math

import pytest
import torch
from scipy import stats
from torch import Tensor

import oracles
from dpquant.errors import SettingError
from dpquant.rounding import derive_key, element_bits, line_keys, row_keys

ALPHA = 1e-6
KEYS = [0, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF, -0x0123456789ABCDEF]

AMBIGUOUS = [
    ("ab", "c"),
    ("a", "bc"),
    ("abc",),
    (b"abc",),
    ("abc", ""),
    (1,),
    ("1",),
    (b"\x01",),
    (-1,),
    (255,),
    (1, 1),
]
AMBIGUOUS += [(256,), (2**64 + 1,), (2**200,), ()]


def assert_all_differ(derive, parts_list) -> None:
    """No two entries get the same key."""
    assert len({derive(*parts) for parts in parts_list}) == len(parts_list)


def test_keys_differ_when_parts_types_or_grouping_differ():
    assert_all_differ(derive_key, AMBIGUOUS)


def test_joining_the_parts_without_lengths_would_be_seen():
    with pytest.raises(AssertionError):
        assert_all_differ(lambda *parts: "".join(map(str, parts)), AMBIGUOUS)


def test_keys_never_change_between_versions():
    assert derive_key("step", 7, b"x") == 0xAA81D4012C7DD62B


def test_keys_are_64_bits_of_known_types():
    assert 0 <= derive_key("any") < 2**64
    with pytest.raises(SettingError, match="float"):
        derive_key(1.0)


PUBLISHED = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]  # from seed 1234567


def test_row_keys_are_splitmix64():
    keys = row_keys(1234567, torch.arange(4))
    assert [key % 2**64 for key in keys.tolist()] == PUBLISHED


def test_row_keys_depend_on_the_record_and_not_on_the_batch():
    ids = torch.tensor([5, -3, 2**62, 0])
    assert torch.equal(row_keys(9, ids)[[2, 0]], row_keys(9, ids[[2, 0]]))
    assert row_keys(9, torch.arange(10_000)).unique().numel() == 10_000


def test_row_keys_refuse_what_is_no_key_or_no_vector_of_ids():
    with pytest.raises(SettingError, match="key=-1"):
        row_keys(-1, torch.arange(2))
    with pytest.raises(SettingError, match="int32"):
        row_keys(0, torch.arange(2, dtype=torch.int32))
    with pytest.raises(SettingError, match="2 axes"):
        row_keys(0, torch.zeros(2, 2, dtype=torch.int64))


def test_line_keys_are_splitmix64():
    assert [key % 2**64 for key in line_keys(torch.tensor([1234567]), 4)[0].tolist()] == PUBLISHED
    keys = line_keys(torch.tensor(KEYS), 1000)
    assert [[key % 2**64 for key in row] for row in keys.tolist()] == [
        [oracles.line_key(row_key, line) for line in range(1000)] for row_key in KEYS
    ]


def assert_lines_have_their_own_keys(keys_of) -> None:
    """No two lines share a key, in one row or in two, and a line's key is the same however many lines follow."""
    rows = row_keys(9, torch.arange(100))
    keys = keys_of(rows, 1000)
    assert torch.cat([keys.flatten(), rows]).unique().numel() == 100 * 1001
    assert torch.equal(keys_of(rows, 10), keys[:, :10])


def test_lines_have_their_own_keys():
    assert_lines_have_their_own_keys(line_keys)


def test_line_keys_that_repeat_or_depend_on_the_number_of_lines_would_be_seen():
    def shared_by_two(rows, num_lines):
        return line_keys(rows, num_lines)[:, torch.arange(num_lines) // 2]

    def counted_from_the_end(rows, num_lines):
        return line_keys(rows, num_lines).flip(1)

    for broken in (shared_by_two, counted_from_the_end):
        with pytest.raises(AssertionError):
            assert_lines_have_their_own_keys(broken)


@pytest.mark.parametrize("key", KEYS)
def test_draws_are_the_documented_hash(key):
    index = [0, 1, 2, 3, 1000, 2**16, 2**31 - 1, 2**31, 2**32 - 1]
    draws = element_bits(torch.tensor([key]), torch.tensor(index))
    assert draws[0].tolist() == [oracles.hashed(i, key) >> 9 for i in index]


def assert_every_draw_has_its_512_indices(bits, key: int) -> None:
    """Draws all over the range have 512 hash values each; these come from different indices, which give the draw."""
    draws = torch.arange(0, 2**23, 4099)
    h = (draws[:, None] * 512 + torch.arange(512)).flatten()
    index = oracles.unhashed(h, (key >> 32) & oracles.MASK_32) ^ (key & oracles.MASK_32)
    assert index.unique().numel() == len(h)
    assert index.min() >= 0 and index.max() < 2**32
    assert torch.equal(bits(torch.tensor([key]), index)[0], draws.repeat_interleave(512))


@pytest.mark.parametrize("key", KEYS)
def test_over_all_indices_every_draw_occurs_equally_often(key):
    assert_every_draw_has_its_512_indices(element_bits, key)


def test_a_hash_that_loses_a_bit_would_be_seen():
    with pytest.raises(AssertionError):
        assert_every_draw_has_its_512_indices(lambda keys, index: element_bits(keys, index & ~(1 << 20)), KEYS[-1])


def assert_uniform(draws: Tensor) -> None:
    """Upper and lower eight bits are spread like random ones: neither unevenly nor too evenly (chi-square)."""
    for byte in (draws.flatten() >> 15, draws.flatten() & 255):
        counts = torch.bincount(byte, minlength=256).double()
        expected = counts.sum() / 256
        statistic = ((counts - expected) ** 2 / expected).sum().item()
        assert stats.chi2.isf(1 - ALPHA, 255) < statistic < stats.chi2.isf(ALPHA, 255)


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    """As whole numbers, by their lower twelve bits and by equality, two equally long series look independent."""
    for modulus in (2**23, 2**12):
        pair = torch.stack([a.flatten() % modulus, b.flatten() % modulus]).double()
        z = torch.corrcoef(pair)[0, 1].item() * math.sqrt(a.numel())
        assert abs(z) < stats.norm.isf(ALPHA / 2)
    assert (a == b).sum() < stats.poisson.isf(ALPHA, a.numel() / 2**23) + 1


NUM = 200_000
FEW, MANY = torch.arange(8), torch.arange(NUM)
AXES = ["element", "record", "line", "step"]


def draws_of(step: int, record_ids: Tensor, index: Tensor) -> Tensor:
    """Draws as a layer makes them."""
    return element_bits(row_keys(derive_key(0, step, "conv1", "activation"), record_ids), index)


@functools.cache
def draws_along(axis: str) -> Tensor:
    """A `(8, NUM)` matrix of draws along elements, records, lines or steps; other coordinates are small numbers."""
    match axis:
        case "element":
            return draws_of(0, FEW, MANY)
        case "record":
            return draws_of(0, MANY, FEW).T
        case "line":
            return element_bits(line_keys(row_keys(derive_key(0, 0), torch.zeros(1).long()), NUM)[0], FEW).T
        case _:
            keys = torch.cat(
                [row_keys(derive_key(0, step), torch.zeros(1, dtype=torch.int64)) for step in range(NUM // 8)]
            )
            return element_bits(keys, FEW).T


@pytest.mark.parametrize("axis", AXES)
def test_draws_are_uniform_along(axis):
    draws = draws_along(axis)
    for series in draws:
        assert_uniform(series)
    assert_uniform(draws.T[: NUM // 8])


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("lag", [1, 2, 16, 64, 1024])
def test_draws_are_uncorrelated_along(axis, lag):
    draws = draws_along(axis)[0]
    assert_uncorrelated(draws[lag:], draws[:-lag])


@pytest.mark.parametrize("axis", AXES)
def test_neighbouring_series_are_uncorrelated(axis):
    draws = draws_along(axis)
    assert_uncorrelated(draws[1:], draws[:-1])


def test_steps_are_uncorrelated():
    assert_uncorrelated(draws_of(0, FEW, MANY), draws_of(1, FEW, MANY))


def test_unmixed_counters_would_be_seen():
    with pytest.raises(AssertionError):
        assert_uniform(MANY * 41 % 2**23)
    with pytest.raises(AssertionError):
        assert_uncorrelated(MANY[1:], MANY[:-1])


def test_a_bias_of_two_percent_in_the_lowest_bit_would_be_seen():
    draws = draws_along("element")[0]
    biased = torch.where(draws % 50 == 0, draws | 1, draws)
    with pytest.raises(AssertionError):
        assert_uniform(biased.repeat(4))


def test_a_stream_shared_by_two_steps_would_be_seen():
    with pytest.raises(AssertionError):
        assert_uncorrelated(draws_of(0, FEW, MANY), draws_of(0, FEW, MANY))


def test_draws_that_repeat_one_in_a_thousand_would_be_seen():
    first, second = draws_of(0, FEW, MANY), draws_of(1, FEW, MANY)
    with pytest.raises(AssertionError):
        assert_uncorrelated(first, torch.where(MANY % 1000 == 0, first, second))
