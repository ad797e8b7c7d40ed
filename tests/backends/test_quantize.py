# SPDX-License-Identifier: Apache-2.0
"""Codes against exact fractions, unbiasedness over all draws, one example at a time, native = torch bit for bit."""

import ast
import functools
import itertools
import math
import subprocess
import sys
from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
from dpquant.backends import quantize as module
from dpquant.backends.qtensor import QTensor
from dpquant.backends.quantize import native_available, quantize
from dpquant.errors import FormatError, SettingError
from dpquant.formats import E3M0, FORMATS, FP8_E4M3, INT4, INT8, NumberFormat, Recipe, RoleFormat, Rounding
from dpquant.rounding import row_keys

STOCHASTIC, NEAREST = Rounding.STOCHASTIC, Rounding.NEAREST
INTEGER_FORMATS = [E3M0, INT4, INT8]
KERNELS = ["torch", "native"]
WHERE = [(name, "torch") for name in FORMATS] + [(fmt.name, "native") for fmt in INTEGER_FORMATS]
CHANNELS_LAST = torch.channels_last
LAYOUTS = [torch.contiguous_format, CHANNELS_LAST]
Quantizer = Callable[..., QTensor]


def quantize_rows(
    x: Tensor,
    format: NumberFormat,
    rounding: Rounding,
    row_keys: Tensor,
    *,
    clip: float | None = None,
    one_sided: bool = False,
    **options,
) -> QTensor:
    """The function under test; a role's parts are given one by one."""
    role = RoleFormat(format=format, rounding=rounding, clip=clip, one_sided=one_sided)
    return module.quantize_rows(x, role, row_keys, **options)


def keys_for(num_rows: int) -> Tensor:
    return row_keys(2024, torch.arange(num_rows))


def bits_of(x: Tensor) -> Tensor:
    """The bytes of a tensor, so that NaN equals NaN and -0 differs from 0."""
    return x.contiguous().view(torch.uint8)


def example_batch(*shape: int, seed: int = 0) -> Tensor:
    """Rows of normal deviates whose sizes differ by powers of ten."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x * (10.0 ** torch.arange(-3, shape[0] - 3)).view(-1, *(1,) * (len(shape) - 1))


# Codes


def assert_rounds_exactly(quantizer: Quantizer, name: str, rounding: Rounding, kernel: str) -> None:
    """Every level, every midpoint and both float32 neighbours of each round as exact fractions say. The scale is 1."""
    values = oracles.boundaries(name)
    q = quantizer(torch.tensor([values]), FORMATS[name], rounding, keys_for(1), kernel=kernel)
    key = int(keys_for(1))
    draws = [oracles.hashed(i, key) >> 9 if rounding is STOCHASTIC else oracles.HALF for i in range(len(values))]
    expected = [oracles.rounded(name, value, draw) for value, draw in zip(values, draws, strict=True)]
    assert q.scale.tolist() == [1.0]
    assert q.dequantize()[0].tolist() == expected


@pytest.mark.parametrize("rounding", Rounding)
@pytest.mark.parametrize(("name", "kernel"), WHERE)
def test_every_code_and_every_boundary_rounds_exactly(name, kernel, rounding):
    assert_rounds_exactly(quantize_rows, name, rounding, kernel)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "kernel"), WHERE)
def test_a_maps_elements_round_by_their_lines_draws(name, kernel, layout):
    B, C, H, W = 2, 3, 5, 4
    x = torch.rand(B, C, H, W, generator=torch.Generator().manual_seed(0)) * FORMATS[name].max_code
    x[:, 1, 2, 3] = FORMATS[name].max_code  # so that the scale is 1
    values = quantize_rows(
        x.contiguous(memory_format=layout), FORMATS[name], STOCHASTIC, keys_for(B), kernel=kernel
    ).dequantize()
    for b, c, h, w in itertools.product(range(B), range(C), range(H), range(W)):
        draw = oracles.hashed(w * C + c, oracles.line_key(int(keys_for(B)[b]), h)) >> 9
        assert values[b, c, h, w].item() == oracles.rounded(name, x[b, c, h, w].item(), draw)


@pytest.mark.parametrize(("name", "kernel"), WHERE)
def test_a_rounding_that_is_off_at_boundaries_would_be_seen(name, kernel):
    def shrinking(x, *args, **kwargs):  # a tie, and what is just above it, becomes what is just below it
        shrunk = torch.where(x.abs() == x.abs().max(), x, x * (1 - 2**-22))
        return quantize_rows(shrunk, *args, **kwargs)

    with pytest.raises(AssertionError):
        assert_rounds_exactly(shrinking, name, NEAREST, kernel)


@pytest.mark.parametrize(("name", "kernel"), WHERE)
def test_levels_survive_any_rounding_at_any_scale(name, kernel):
    levels = torch.tensor([oracles.VALUES[name]], dtype=torch.float32)
    for exponent, rounding in itertools.product((-60, 0, 60), Rounding):
        x = levels * 2.0**exponent
        q = quantize_rows(x, FORMATS[name], rounding, keys_for(1), kernel=kernel)
        assert torch.equal(q.dequantize(), x)


@pytest.mark.parametrize(("name", "kernel"), WHERE)
def test_codes_are_levels_and_the_largest_value_takes_the_largest_code(name, kernel):
    x = example_batch(6, 999)
    q = quantize_rows(x, FORMATS[name], STOCHASTIC, keys_for(6), kernel=kernel)
    assert set(q.codes.float().unique().tolist()) <= set(oracles.VALUES[name])
    assert q.codes.float().abs().amax(1).tolist() == [FORMATS[name].max_code] * 6
    assert torch.equal(q.scale, x.abs().amax(1) / torch.tensor(float(FORMATS[name].max_code)))


# Unbiasedness and variance, exactly, over all draws. Rows of two values: the largest code, and the one looked at.

STRIDE = 8  # of the 2^23 draws, every eighth: exact for fractions that are multiples of 8 / 2^23
CASES = [
    ("e3m0", 0.3125),
    ("e3m0", 0.875),
    ("e3m0", 1.25),
    ("e3m0", 41.5),
    ("int4", 2.4375),
    ("int8", 99.125),
    ("int8", 0.0625),
]


@functools.cache
def keys_of_all_draws() -> Tensor:
    """Row keys under which element 1 draws 0, 8, 16, ... 2^23 - 8."""
    return oracles.unhashed(torch.arange(0, oracles.ONE, STRIDE) << 9, high=0) ^ 1


def outcomes(quantizer: Quantizer, name: str, value: float, kernel: str) -> Tensor:
    """What `value` becomes under each draw, float64."""
    keys = keys_of_all_draws()
    x = torch.tensor([float(FORMATS[name].max_code), -value]).expand(len(keys), 2).contiguous()
    return -quantizer(x, FORMATS[name], STOCHASTIC, keys, kernel=kernel).dequantize()[:, 1].double()


def assert_unbiased(quantizer: Quantizer, name: str, value: float, kernel: str) -> None:
    """The mean over all draws is the value itself."""
    assert outcomes(quantizer, name, value, kernel).mean().item() == value


def assert_variance(quantizer: Quantizer, value: float, kernel: str) -> None:
    """E3M0 has the variance of its definition: (t - a)(2a - t) with a = 2^floor(log2 t), or t(1 - t) below 1."""
    below, above = (
        (0.0, 1.0) if value < 1 else (2.0 ** math.floor(math.log2(value)), 2.0 ** math.ceil(math.log2(value)))
    )
    variance = ((outcomes(quantizer, "e3m0", value, kernel) - value) ** 2).mean().item()
    assert variance == (value - below) * (above - value)


def always_nearest(x, format, rounding, *args, **kwargs):
    return quantize_rows(x, format, NEAREST, *args, **kwargs)


def draws_from_half_the_range(x, format, rounding, keys, **kwargs):
    return quantize_rows(x, format, rounding, keys[: len(keys) // 2].repeat(2), **kwargs)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("name", "value"), CASES)
def test_stochastic_rounding_is_exactly_unbiased(name, value, kernel):
    assert_unbiased(quantize_rows, name, value, kernel)


@pytest.mark.parametrize("broken", [always_nearest, draws_from_half_the_range])
@pytest.mark.parametrize(("name", "value"), CASES)
def test_biased_rounding_would_be_seen(name, value, broken):
    with pytest.raises(AssertionError):
        assert_unbiased(broken, name, value, "native")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("value", [value for name, value in CASES if name == "e3m0"])
def test_the_variance_of_e3m0_is_exact(value, kernel):
    assert_variance(quantize_rows, value, kernel)


def test_a_wrong_variance_would_be_seen():
    with pytest.raises(AssertionError):
        assert_variance(always_nearest, 1.25, "native")


# One example at a time


def assert_isolated(quantizer: Quantizer) -> None:
    """Whatever becomes of row 2, all other rows keep their codes and scales bit for bit."""
    x = example_batch(5, 4, 7, 3)
    before = quantizer(x)
    for outlier in (1e4, 0.0, math.nan, math.inf):
        changed = x.clone()
        changed[2, 1] = outlier
        after = quantizer(changed)
        others = torch.tensor([0, 1, 3, 4])
        assert torch.equal(after.codes[others], before.codes[others])
        assert torch.equal(after.scale.expand(5)[others], before.scale.expand(5)[others])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["luq-fp4", "luq", "int8"])
def test_an_example_cannot_change_another_examples_codes(name, kernel):
    assert_isolated(lambda x: quantize(x, name, key=1, kernel=kernel))


def test_an_example_cannot_change_another_examples_float8_codes():
    assert_isolated(lambda x: QTensor(codes=(q := quantize(x, "fp8")).codes.float(), scale=q.scale))


@pytest.mark.parametrize("name", ["luq-fp4", "luq", "int8"])
def test_a_scale_over_the_batch_would_be_seen(name):
    with pytest.raises(AssertionError):
        assert_isolated(lambda x: quantize(x, name, key=1, per_example=False))


def assert_same_in_parts(quantizer: Quantizer) -> None:
    """A record's codes are the same alone, in any microbatch and in any order."""
    x, ids = example_batch(6, 50), torch.tensor([7, 3, 1000, 0, 2**40, 5])
    whole = quantizer(x, ids)
    for rows in ([0], [4, 5], [5, 3, 1]):
        part = quantizer(x[rows], ids[rows])
        assert torch.equal(part.codes, whole.codes[rows]) and torch.equal(part.scale, whole.scale[rows])


@pytest.mark.parametrize("kernel", KERNELS)
def test_codes_do_not_depend_on_the_microbatch(kernel):
    assert_same_in_parts(lambda x, ids: quantize(x, "luq-fp4", key=3, record_ids=ids, kernel=kernel))


def test_draws_by_position_in_the_batch_would_be_seen():
    with pytest.raises(AssertionError):
        assert_same_in_parts(lambda x, ids: quantize(x, "luq-fp4", key=3))


@pytest.mark.parametrize("name", ["luq-fp4", "e3m0", "int4", "fp8-e5m2"])
def test_another_key_gives_other_draws_and_the_same_key_the_same(name):
    x = example_batch(3, 500)
    first, again, other = (quantize(x, name, key=key).codes.float() for key in (1, 1, -1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# Padding: batches are padded to their longest record, whose length may change nothing for the others


def records(*shape: int) -> Tensor:
    """Maps: dense ones, one without negative values, one with a line of zeros inside, shorter ones, and all zeros."""
    x = example_batch(*shape)
    x[1] = x[1].abs()
    x[2, :, shape[2] // 2] = 0
    x[3, :, (shape[2] + 1) // 2 :] = 0
    x[4, :, :, (shape[3] + 1) // 2 :] = 0
    x[5] = 0
    return x


def assert_padding_changes_nothing(
    quantizer: Quantizer,
    name: str,
    layout: torch.memory_format,
    right: int,
    below: int,
    kernel: str,
    rounding: Rounding = STOCHASTIC,
    **options,
) -> None:
    """Zeros at the end of a map's lines, or more lines of zeros, leave the codes and the scale as they are."""
    for shape in ((7, 6, 4, 3), (7, 40, 7, 1), (6, 3, 9, 16)):
        x, keys = records(*shape), keys_for(shape[0])
        padded = torch.nn.functional.pad(x, (0, right, 0, below))
        short, long = (
            quantizer(maps.contiguous(memory_format=layout), FORMATS[name], rounding, keys, kernel=kernel, **options)
            for maps in (x, padded)
        )
        assert torch.equal(short.scale, long.scale)
        assert torch.equal(bits_of(long.codes[:, :, : shape[2], : shape[3]]), bits_of(short.codes))
        assert long.codes[:, :, shape[2] :].float().eq(0).all() and long.codes[..., shape[3] :].float().eq(0).all()


def as_flat_rows(x, format, rounding, keys, **kwargs):
    """Draws by an element's row-major position in the row: padding moves it. And a mean over all elements."""
    q = quantize_rows(x.flatten(1), format, rounding, keys, **kwargs)
    codes = torch.empty_like(x, dtype=q.codes.dtype).copy_(q.codes.view(x.shape))
    return QTensor(codes=codes, scale=q.scale, zero_point=q.zero_point)


PADDED = [(2, 0), (0, 5), (1, 3), (40, 70)]


@pytest.mark.parametrize(("right", "below"), PADDED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "kernel"), WHERE)
def test_padding_changes_neither_codes_nor_scale(name, kernel, layout, right, below):
    assert_padding_changes_nothing(quantize_rows, name, layout, right, below, kernel)


@pytest.mark.parametrize(("right", "below"), PADDED)
@pytest.mark.parametrize(("name", "kernel"), WHERE)
def test_draws_by_row_major_position_would_be_seen(name, kernel, right, below):
    with pytest.raises(AssertionError):
        assert_padding_changes_nothing(as_flat_rows, name, CHANNELS_LAST, right, below, kernel)


CLIPPED = [(name, kernel, clip, False) for name, kernel in WHERE for clip in (0.5, 2.5)]
CLIPPED += [("int4", kernel, clip, True) for kernel in KERNELS for clip in (0.5, 2.5)]


@pytest.mark.parametrize(("right", "below"), PADDED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "kernel", "clip", "one_sided"), CLIPPED)
def test_padding_changes_neither_codes_nor_scale_of_a_clipped_format(
    name, kernel, clip, one_sided, layout, right, below
):
    options = {"clip": clip, "one_sided": one_sided}
    assert_padding_changes_nothing(quantize_rows, name, layout, right, below, kernel, **options)


@pytest.mark.parametrize(("right", "below"), PADDED)
@pytest.mark.parametrize(("name", "kernel", "clip", "one_sided"), CLIPPED)
def test_a_mean_over_the_padding_would_be_seen(name, kernel, clip, one_sided, right, below):
    there = name, CHANNELS_LAST, right, below, kernel, NEAREST  # without draws that move
    assert_padding_changes_nothing(as_flat_rows, *there, one_sided=one_sided)
    with pytest.raises(AssertionError):
        assert_padding_changes_nothing(as_flat_rows, *there, clip=clip, one_sided=one_sided)


# Rows that have no scale, and edges of float32


@pytest.mark.parametrize(("name", "kernel"), WHERE)
def test_rows_without_a_usable_scale_become_zero_and_bad_rows_nan(name, kernel):
    zero, tiny, smallest = (
        torch.zeros(4),
        torch.full((4,), 2.0**-101),
        torch.tensor([2.0**-100, 0.0, 0.0, -(2.0**-149)]),
    )
    nan, infinite = torch.tensor([1.0, math.nan, 2.0, 3.0]), torch.tensor([-math.inf, 1.0, 2.0, 3.0])
    x = torch.stack([zero, tiny, smallest, nan, infinite, torch.ones(4)])
    q = quantize_rows(x, FORMATS[name], STOCHASTIC, keys_for(6), kernel=kernel)
    codes, top = q.codes.float(), FORMATS[name].max_code
    assert q.scale[[0, 1]].tolist() == [0.0, 0.0] and q.scale[[2, 5]].gt(0).all() and q.scale[[3, 4]].isnan().all()
    assert codes[[0, 1, 3, 4]].eq(0).all() and codes[2].tolist() == [top, 0, 0, 0] and codes[5].tolist() == [top] * 4
    assert q.dequantize()[[0, 1]].eq(0).all() and q.dequantize()[[3, 4]].isnan().all()


@pytest.mark.parametrize(("name", "kernel"), WHERE)
def test_the_largest_float32_has_a_code(name, kernel):
    x = torch.tensor([[torch.finfo(torch.float32).max, -1.0]])
    q = quantize_rows(x, FORMATS[name], NEAREST, keys_for(1), kernel=kernel)
    assert q.codes.float().tolist() == [[FORMATS[name].max_code, 0.0]] and q.scale.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (0, 3, 4, 4), (4, 0), (4, 3, 0, 2), (0,)])
def test_empty_batches_and_empty_rows_have_codes(shape):
    q = quantize(torch.zeros(shape), "luq-fp4")
    assert q.codes.shape == shape and q.codes.dtype == torch.int8
    assert q.scale.tolist() == [0.0] * shape[0]
    assert q.dequantize().shape == shape


# The native kernel


def assert_native_equals_torch(
    x: Tensor, format: NumberFormat, rounding: Rounding, zero_point: int, native: Quantizer, clip: float | None = None
) -> None:
    """Codes, scales, types and memory layout agree bit for bit."""
    keys = keys_for(len(x))
    a = quantize_rows(x, format, rounding, keys, zero_point=zero_point, clip=clip, kernel="torch")
    b = native(x, format, rounding, keys, zero_point=zero_point, clip=clip, kernel="native")
    assert a.codes.dtype == b.codes.dtype and a.codes.stride() == b.codes.stride()
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(bits_of(a.scale.nan_to_num(nan=-1)), bits_of(b.scale.nan_to_num(nan=-1)))


def with_odd_rows(x: Tensor) -> Tensor:
    """Denormals, zeros of both signs, large and non-finite values, spread over the first rows."""
    flat = x.reshape(len(x), -1).clone()
    odd = torch.tensor([1e-40, -0.0, 0.0, 2.0**-126, -1e38, 3e38, 2.0**-24])
    for row in range(min(3, len(flat))):
        flat[row, :: 3 + row] = odd.repeat(flat.shape[1])[: len(flat[row, :: 3 + row])] * 10.0 ** (-30 * row)
    if len(flat) > 4:
        flat[3, -1], flat[4, 0] = math.nan, -math.inf
    return flat.view(x.shape)


SHAPES = [
    (1,),
    (7,),
    (3, 1),
    (6, 5),
    (2, 2047),
    (2, 2048),
    (1, 2049),
    (3, 10_001),
    (2, 3, 5),
    (1, 1, 1, 1),
    (7, 1, 5, 3),
]
SHAPES += [(5, 3, 9, 7), (6, 3, 33, 31), (2, 64, 8, 8), (1, 2100, 2, 3), (2, 700, 3, 1), (3, 17, 1, 1), (1, 2048, 3, 1)]
SHAPES += [(2, 1, 2100, 1), (2, 8, 700, 1), (2, 15, 139, 1), (2, 17, 3, 241)]  # lines of many lengths against tiles


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_native_kernel_gives_the_same_bits(shape):
    layouts = in_layouts(with_odd_rows(example_batch(*shape)))
    for x, format, rounding, zero_point in itertools.product(layouts, INTEGER_FORMATS, Rounding, (0, 128)):
        assert_native_equals_torch(x, format, rounding, zero_point, quantize_rows)


def in_layouts(x: Tensor) -> list[Tensor]:
    """The tensor in each memory format that a kernel takes."""
    return [x.contiguous(memory_format=layout) for layout in LAYOUTS] if x.ndim == 4 else [x]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


SHARED = [(5, 3, 33, 31), (7, 2049)]  # each thread has rows
SHARED += [(1, 8, 9001, 1), (1, 700, 11, 13), (1, 3, 1, 30_001), (1, 70_001)]  # threads share one long row


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", SHARED, ids=str)
def test_the_native_kernel_gives_the_same_bits_on_two_threads(shape):
    layouts = in_layouts(example_batch(*shape))
    for x, format, rounding in itertools.product(layouts, INTEGER_FORMATS, Rounding):
        assert_native_equals_torch(x, format, rounding, 0, quantize_rows)
        assert_native_equals_torch(x, format, rounding, 0, quantize_rows, clip=2.5)


def with_zeros(x: Tensor) -> Tensor:
    """Maps that end, and that are interrupted, in lines and columns of zeros, and such with hardly a value."""
    x, (_, C, H, W) = x.clone(), x.shape
    x[1, :, H // 3 :] = -0.0
    x[2, :, :, W // 3 :] = 0
    x[3, :, H // 2 :], x[3, :, :, W // 2 :] = 0, -0.0
    x[4, :, 1 : H - 1], x[4, :, :, 1 : W - 1] = 0, 0
    x[5] = 0
    x[6:] = 0
    x[6, 0, 0, 0], x[7, -1, -1, -1] = 1.0, -1.0
    x[8, 0, -1, 0], x[8, -1, 0, -1] = 1.0, 1e-45  # the last line and the last column, at their first places
    x[9, 0, 0, -1], x[9, -1, H // 2, W // 2] = 1e-45, 1.0
    x[10, C // 2, H // 2, 0], x[10, 0, 0, W // 2] = 3.0, 1.0
    x[11, 0, H - 1, 0], x[11, 0, H // 2, W // 2], x[11, 0, 0, 0] = 1.0, 2.0, 3.0  # widest in the middle
    return x


ZEROS = [(12, 3, 9, 7), (12, 1, 40, 33), (12, 16, 5, 40), (12, 64, 12, 1), (12, 5, 1, 70), (12, 700, 3, 4)]
ZEROS += [(12, 1, 1, 1), (12, 17, 2, 2)]


@pytest.mark.parametrize("shape", ZEROS, ids=str)
def test_the_native_kernel_gives_the_same_bits_among_zeros(shape):
    for x, format, rounding in itertools.product(
        in_layouts(with_zeros(example_batch(*shape))), INTEGER_FORMATS, Rounding
    ):
        for clip in (0.01, 1.5, None):
            assert_native_equals_torch(x, format, rounding, 0, quantize_rows, clip=clip)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", [(1, 8, 9001, 1), (1, 3, 150, 301)], ids=str)
def test_the_native_kernel_gives_the_same_bits_among_zeros_on_two_threads(shape):
    x = example_batch(*shape)
    x[:, :, shape[2] // 3 :], x[..., shape[3] // 2 + 1 :] = 0, 0
    for maps in in_layouts(x):
        assert_native_equals_torch(maps, INT4, NEAREST, 0, quantize_rows, clip=1.5)


@pytest.mark.parametrize("shape", ZEROS[:6], ids=str)
def test_a_kernel_with_another_mean_would_be_seen(shape):
    x = with_zeros(example_batch(*shape)).contiguous(memory_format=CHANNELS_LAST)
    assert_native_equals_torch(x, INT4, NEAREST, 0, as_flat_rows)
    with pytest.raises(AssertionError):
        assert_native_equals_torch(x, INT4, NEAREST, 0, as_flat_rows, clip=1.5)


@pytest.mark.parametrize("format", INTEGER_FORMATS, ids=lambda format: format.name)
def test_a_thread_that_counts_lines_from_where_it_starts_would_be_seen(format):
    def from_zero_in_each_half(x, *args, **kwargs):
        half = x.shape[2] // 2
        first, second = (quantize_rows(maps, *args, **kwargs) for maps in (x, x.roll(half, dims=2)))
        codes = torch.cat([first.codes[:, :, :half], second.codes[:, :, :half]], dim=2)
        return QTensor(codes=codes.contiguous(memory_format=CHANNELS_LAST), scale=first.scale)

    x = example_batch(1, 8, 9000, 1).contiguous(memory_format=CHANNELS_LAST)
    with pytest.raises(AssertionError):
        assert_native_equals_torch(x, format, STOCHASTIC, 0, from_zero_in_each_half)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    values=st.lists(st.floats(width=32, allow_subnormal=True), min_size=1, max_size=40),
    format=st.sampled_from(INTEGER_FORMATS),
    rounding=st.sampled_from(Rounding),
)
def test_the_native_kernel_gives_the_same_bits_for_any_floats(values, format, rounding):
    assert_native_equals_torch(torch.tensor([values]), format, rounding, 0, quantize_rows)


def with_the_next_key(x, format, rounding, keys, **kwargs):
    return quantize_rows(x, format, rounding, keys + 1, **kwargs)


@pytest.mark.parametrize("broken", [with_the_next_key, as_flat_rows])
@pytest.mark.parametrize("format", INTEGER_FORMATS, ids=lambda format: format.name)
def test_a_kernel_with_other_draws_would_be_seen(format, broken):
    x = example_batch(3, 5, 4, 4).contiguous(memory_format=CHANNELS_LAST)
    with pytest.raises(AssertionError):
        assert_native_equals_torch(x, format, STOCHASTIC, 0, broken)


# Layout, zero point, whole tensors


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_memory_format_is_kept_and_does_not_change_codes(kernel):
    x = example_batch(4, 6, 5, 3)
    plain = quantize(x, "luq-fp4", kernel=kernel)
    last = quantize(x.contiguous(memory_format=CHANNELS_LAST), "luq-fp4", kernel=kernel)
    gaps = quantize(x.repeat_interleave(2, dim=3)[..., ::2], "luq-fp4", kernel=kernel)
    assert last.codes.is_contiguous(memory_format=CHANNELS_LAST) and plain.codes.is_contiguous()
    assert torch.equal(last.codes, plain.codes) and torch.equal(gaps.codes, plain.codes)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("format", INTEGER_FORMATS, ids=lambda format: format.name)
def test_a_zero_point_moves_codes_and_not_values(format, kernel):
    x = with_odd_rows(example_batch(6, 100))
    plain = quantize_rows(x, format, STOCHASTIC, keys_for(6), kernel=kernel)
    moved = quantize_rows(x, format, STOCHASTIC, keys_for(6), zero_point=128, kernel=kernel)
    assert moved.codes.dtype == torch.uint8 and torch.equal(moved.codes.short() - 128, plain.codes.short())
    assert torch.equal(moved.dequantize().nan_to_num(), plain.dequantize().nan_to_num())


def test_a_whole_tensor_has_one_scale():
    weight = example_batch(4, 3, 2, 2)
    q = quantize(weight, "int8", per_example=False)
    assert q.codes.shape == weight.shape and q.scale.shape == (1,)
    assert (q.dequantize() - weight).abs().max() <= q.scale.item() / 2 * (1 + 1e-6)
    assert quantize(torch.tensor(-3.0), "int4", per_example=False).dequantize().item() == -3.0


def test_a_gradient_is_not_carried_along():
    x = example_batch(2, 3).requires_grad_()
    assert not quantize(x, "luq-fp4", kernel="torch").scale.requires_grad


# What a name means, and what is refused


def test_a_recipes_name_means_its_activation_role():
    x = example_batch(3, 200)
    for name, format, rounding in [("luq-fp4", E3M0, STOCHASTIC), ("luq", INT4, NEAREST), ("int8", INT8, NEAREST)]:
        expected = quantize(x, format, rounding=rounding)
        assert torch.equal(quantize(x, name).codes, expected.codes)
    role = RoleFormat(format=INT4, rounding=NEAREST)
    mine = Recipe(name="mine", weight=role, activation=role, gradient=role)
    assert torch.equal(quantize(x, mine).codes, quantize(x, "luq").codes)


def test_a_format_rounds_stochastically_unless_told_otherwise():
    x = example_batch(3, 200)
    assert torch.equal(quantize(x, "int4").codes, quantize(x, INT4, rounding=STOCHASTIC).codes)
    assert not torch.equal(quantize(x, "int4").codes, quantize(x, "int4", rounding=NEAREST).codes)


def test_an_unknown_name_is_refused_with_formats_and_recipes():
    with pytest.raises(FormatError, match=r"fp8-e5m2.*got format='fp3'.*luq-fp4"):
        quantize(torch.ones(1, 1), "fp3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.ones(2, 3, dtype=torch.float64)}, "float64"),
        ({"x": torch.tensor(1.0)}, "0 axes"),
        ({"row_keys": torch.zeros(3, dtype=torch.int64)}, "row_keys"),
        ({"row_keys": torch.zeros(2, dtype=torch.int32)}, "row_keys"),
        ({"zero_point": 64}, "zero_point=64"),
        ({"kernel": "cuda"}, "kernel='cuda'"),
        ({"x": torch.zeros(1).expand(2, 2**32 + 1)}, r"2\^32"),
        ({"x": torch.zeros(1).expand(2, 2**17, 1, 2**16)}, r"2\^32.*line"),
    ],
    ids=["dtype", "axes", "too many keys", "key type", "zero point", "kernel", "row size", "line size"],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    good = {"x": torch.ones(2, 3), "format": E3M0, "rounding": NEAREST, "row_keys": keys_for(2)}
    with pytest.raises(SettingError, match=message):
        quantize_rows(**(good | arguments))


def test_a_map_may_have_more_elements_than_one_key_has_draws():
    module._check(torch.zeros(1).expand(1, 2**16, 2**17, 1), keys_for(1), 0, "auto")


def test_one_number_has_no_examples():
    with pytest.raises(SettingError, match="batch axis"):
        quantize(torch.tensor(1.0), "int8")


def test_a_format_that_is_not_built_in_rounds_by_its_facts():
    even = NumberFormat(name="even", exponent_bits=0, mantissa_bits=3, min_exponent=4, max_code=14)
    q = quantize(torch.tensor([[14.0, 4.9, -5.1]]), even, rounding=NEAREST)
    assert q.codes.tolist() == [[14, 4, -6]]


def test_formats_without_storage_or_kernel_are_refused():
    e2m1 = NumberFormat(name="e2m1", exponent_bits=2, mantissa_bits=1, min_exponent=0, max_code=6)
    for format, options in [(e2m1, {}), (FP8_E4M3, {"zero_point": 128}), (FP8_E4M3, {"kernel": "native"})]:
        with pytest.raises(FormatError, match=format.name):
            quantize_rows(torch.ones(1, 1), format, NEAREST, keys_for(1), **options)


# An installation without the kernel


WITHOUT_KERNEL = """
import sys, warnings
sys.modules["dpquant._native"] = None  # as if it had not been built

import torch
from dpquant import FormatError, quantize
from dpquant.backends.quantize import native_available

assert not native_available()
x = torch.randn(2, 10)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first = quantize(x, "luq-fp4")
    again = quantize(x, "luq-fp4")
assert torch.equal(first.codes, again.codes)
print([str(one.message) for one in caught if one.category is RuntimeWarning])
try:
    quantize(x, "luq-fp4", kernel="native")
except FormatError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def without_kernel() -> list[str]:
    """What a process says in which the kernel cannot be imported: its warnings, and the error where it is asked for."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_KERNEL], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_missing_kernel_is_reported_once_with_its_remedy(without_kernel):
    (warning,) = ast.literal_eval(without_kernel[0])
    assert "Install a C++ compiler" in warning


def test_a_missing_kernel_that_was_asked_for_is_an_error(without_kernel):
    assert "without a C++ compiler" in without_kernel[1]


class Operators(TorchDispatchMode):
    """Notes the names of torch's operators that run."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def rounds_in_torch(**options) -> bool:
    with Operators() as seen:
        assert quantize(torch.ones(2, 2), "luq-fp4", **options).codes.eq(64).all()
    return "floor" in seen.names


def test_the_kernel_is_used_where_it_can_be():
    assert native_available()
    assert not rounds_in_torch()
    assert rounds_in_torch(kernel="torch")  # so it would be seen


# Scales below the largest magnitude


@pytest.mark.parametrize("kernel", ["torch", "native"])
@pytest.mark.parametrize("clip", [0.5, 2.5, 100.0])
def test_a_clip_puts_the_largest_code_at_so_many_root_mean_squares(clip, kernel):
    x = example_batch(6, 3, 5, 7)
    q = quantize_rows(x, INT4, NEAREST, keys_for(6), clip=clip, kernel=kernel)
    rows = x.flatten(1).double()
    largest = rows.abs().amax(1)
    units = (rows.abs() * (2**15 / largest)[:, None]).round()  # squares are of integers
    rms = units.square().mean(1).sqrt() * largest / 2**15
    torch.testing.assert_close(rms, rows.square().mean(1).sqrt(), rtol=1e-4, atol=0)
    top = torch.minimum(clip * rms, largest)
    torch.testing.assert_close(q.scale.double(), top / 7, rtol=1e-6, atol=0)
    inside = rows.abs() <= top[:, None] * (1 - 1e-6)
    error = (q.dequantize().flatten(1).double() - rows).abs()
    assert bool((error[inside] <= (top / 14)[:, None].expand_as(rows)[inside] * (1 + 1e-5)).all())
    assert bool((q.codes.flatten(1)[~inside].abs() == 7).all())


def assert_the_mean_is_over(count_of: Callable[[Tensor], int], x: Tensor, kernel: str) -> None:
    """A row's scale is that of a root mean square over so many elements, for the rows that are not zero."""
    q = quantize_rows(x, INT4, NEAREST, keys_for(len(x)), clip=0.01, kernel=kernel)
    for row, scale in zip(x, q.scale.tolist(), strict=True):
        if row.any():
            rms = math.sqrt(row.double().square().sum().item() / count_of(row))
            assert scale == pytest.approx(0.01 * rms / 7, rel=1e-4)  # squares are of integers up to 2^15


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(12, 3, 9, 7), (12, 5, 1, 17), (12, 6, 20, 1)], ids=str)
def test_a_maps_mean_is_over_no_line_and_no_column_of_zeros_at_its_end(shape, layout, kernel):
    x = with_zeros(example_batch(*shape)).contiguous(memory_format=layout)
    assert_the_mean_is_over(lambda row: oracles.extent(row.tolist()), x, kernel)
    for broken in (lambda row: row.numel(), lambda row: int(row.count_nonzero())):
        with pytest.raises(AssertionError):
            assert_the_mean_is_over(broken, x, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_dense_maps_mean_is_over_all_elements(kernel):
    x = example_batch(6, 3, 5, 7).relu()
    x[:, 0, -1, -1] = 1e-3
    maps, rows = (
        quantizer(x, INT4, NEAREST, keys_for(6), clip=2.5, kernel=kernel) for quantizer in (quantize_rows, as_flat_rows)
    )
    assert torch.equal(maps.scale, rows.scale) and torch.equal(maps.codes, rows.codes)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_mean_of_rows_that_are_no_maps_is_over_all_elements(kernel):
    x = example_batch(4, 3, 8)
    x[..., 4:] = 0
    for rows in (x, x.flatten(1), x.view(4, 3, 2, 2, 2)):
        assert_the_mean_is_over(lambda row: row.numel(), rows, kernel)
    role = RoleFormat(format=INT4, rounding=NEAREST, clip=0.01)
    whole = quantize(x, Recipe(name="mine", weight=role, activation=role, gradient=role), per_example=False)
    assert torch.equal(whole.scale, quantize_rows(x.view(1, -1), INT4, NEAREST, keys_for(1), clip=0.01).scale)


@pytest.mark.parametrize("format", INTEGER_FORMATS, ids=lambda format: format.name)
def test_both_kernels_clip_alike_in_every_layout(format):
    x = example_batch(6, 3, 5, 7)
    x[1], x[2, 0, 0, 0], x[3, 0, 0, 0] = 0.0, float("inf"), float("nan")
    for layout in (torch.contiguous_format, torch.channels_last):
        first, second = (
            quantize_rows(x.contiguous(memory_format=layout), format, STOCHASTIC, keys_for(6), clip=1.5, kernel=kernel)
            for kernel in ("torch", "native")
        )
        assert torch.equal(first.codes, second.codes)
        torch.testing.assert_close(first.scale, second.scale, equal_nan=True, rtol=0, atol=0)
        assert first.scale[1] == 0 and bool(first.scale[2:4].isnan().all())


def assert_clips_alike_for_any_company(quantizer: Quantizer) -> None:
    """A row's scale has the same bits alone, among others, and with its elements in another order."""
    x = example_batch(24, 3, 500)
    q = quantizer(x, INT4, NEAREST, keys_for(24), clip=1.5)
    mixed = x.flip(0, 2)
    assert torch.equal(quantizer(mixed, INT4, NEAREST, keys_for(24), clip=1.5).scale.flip(0), q.scale)
    alone = [quantizer(x[i : i + 1], INT4, NEAREST, keys_for(1), clip=1.5).scale for i in range(24)]
    assert torch.equal(torch.cat(alone), q.scale)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_clipped_scale_does_not_depend_on_company_or_order(kernel):
    assert_clips_alike_for_any_company(functools.partial(quantize_rows, kernel=kernel))


def test_a_mean_that_depends_on_the_order_would_be_seen():
    def in_float32(x, format, rounding, keys, clip):
        q = quantize_rows(x, format, rounding, keys)
        squares = functools.reduce(torch.add, x.flatten(1).square().T)  # one after the other
        return QTensor(codes=q.codes, scale=clip * squares.sqrt())

    with pytest.raises(AssertionError):
        assert_clips_alike_for_any_company(in_float32)


def assert_signs_decide_row_by_row(quantizer: Quantizer, zero_point: int) -> None:
    """A row without negative values has 15 levels above zero; its neighbours' signs change nothing."""
    x = example_batch(6, 40)
    x[::2] = x[::2].abs()
    whole = quantizer(x, INT4, NEAREST, keys_for(6), one_sided=True, zero_point=zero_point)
    codes = whole.codes.float() - zero_point
    assert codes.amax(1)[::2].tolist() == [15] * 3 and codes[::2].amin() >= 0
    assert codes[1::2].abs().amax(1).tolist() == [7] * 3
    error = (whole.dequantize() - x).abs().amax(1)
    assert bool((error <= x.abs().amax(1) / torch.tensor([30, 14] * 3) * 1.0001).all())
    for i in range(6):
        alone = quantizer(x[[i]], INT4, NEAREST, keys_for(6)[[i]], one_sided=True, zero_point=zero_point)
        assert torch.equal(alone.codes[0], whole.codes[i]) and torch.equal(alone.scale[0], whole.scale[i])


@pytest.mark.parametrize("zero_point", [0, 128])
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_row_without_negative_values_has_twice_as_many_levels(kernel, zero_point):
    assert_signs_decide_row_by_row(functools.partial(quantize_rows, kernel=kernel), zero_point)


def test_signs_that_are_decided_for_the_batch_would_be_seen():
    def by_batch(x, format, *arguments, one_sided, **more):
        chosen = format.one_sided if bool((x >= 0).all()) else format
        return quantize_rows(x, chosen, *arguments, **more)

    with pytest.raises(AssertionError):
        assert_signs_decide_row_by_row(by_batch, 0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_codes_of_one_sign_keep_zero_rows_and_bad_rows_apart(bad):
    x = torch.ones(4, 5)
    x[1], x[2, 0], x[3, 0] = 0.0, bad, -1.0
    q = quantize_rows(x, INT4, NEAREST, keys_for(4), one_sided=True)
    assert q.codes.tolist() == [[15] * 5, [0] * 5, [0] * 5, [-7, 7, 7, 7, 7]]
    assert q.scale[1] == 0 and bool(q.scale[2].isnan())


def test_a_clip_is_worth_it_for_few_uniform_levels():
    """Normal deviates, four bits: the mean squared error is half of that with the largest magnitude as scale."""
    x = torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    errors = [
        float((quantize_rows(x, INT4, NEAREST, keys_for(8), clip=clip).dequantize() - x).square().mean())
        for clip in (None, 2.5)
    ]
    assert errors[1] < 0.6 * errors[0]
