# SPDX-License-Identifier: Apache-2.0
"""Scales per block: the smallest that saturate nothing, exact products, no bias, and no block across examples."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpquant
import oracles
from conformance import assert_rows_stand_alone
from dpquant.backends.cpu_int8 import CpuInt8
from dpquant.backends.doubles import BlocksOfExamples, SharedScale
from dpquant.backends.qtensor import QTensor
from dpquant.backends.quantize import quantize, quantize_rows
from dpquant.backends.reference import Reference
from dpquant.backends.registry import BACKENDS, reason_for, resolve
from dpquant.engine.context import StepContext
from dpquant.engine.layers import prepare
from dpquant.errors import FormatError
from dpquant.formats import RECIPES, Recipe, precision
from dpquant.rounding import row_keys

NAMES = ("mxfp4", "nvfp4")
SIZES = {"mxfp4": 32, "nvfp4": 16}
CPU = torch.device("cpu")
Quantizer = Callable[..., QTensor]


def keys_for(num_rows: int) -> Tensor:
    return row_keys(2024, torch.arange(num_rows))


def in_blocks(name: str, x: Tensor, keys: Tensor) -> QTensor:
    """The function under test."""
    return quantize_rows(x, RECIPES[name].activation, keys)


def steps_of(q: QTensor) -> Tensor:
    """What code 1 is worth in each place."""
    assert q.block_scale is not None
    return q.block_scale.double() * q.scale.double().view(-1, *(1,) * (q.codes.ndim - 1))


def maps(*shape: int) -> Tensor:
    """Normal deviates whose sizes differ by powers of ten along the rows and the channels, some zero."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x *= (10.0 ** torch.arange(-1, shape[0] - 1)).view(-1, 1, 1, 1)
    x *= (10.0 ** (torch.arange(shape[1]) % 7 - 3)).view(1, -1, 1, 1)
    x[:, :, -1, -1] = 0
    return x


# Scales and codes


def assert_smallest_scales(quantizer: Quantizer, name: str) -> None:
    """Each block's scale is the smallest under which nothing saturates: exactly of powers of two, else to round-off."""
    x = maps(3, 70, 2, 3)
    steps = steps_of(quantizer(name, x, keys_for(3)))
    for b, h, w in itertools.product(*map(range, (3, 2, 3))):
        for first in range(0, 70, SIZES[name]):
            block = slice(first, first + SIZES[name])
            largest, found = x[b, block, h, w].abs().max().item(), steps[b, block, h, w]
            assert bool((found == found[0]).all())
            if largest > 0:
                expected = float(oracles.block_scale(name, largest, x[b].abs().max().item()))
                assert found[0].item() == pytest.approx(expected, rel=0 if name == "mxfp4" else 2**-22)


@pytest.mark.parametrize("name", NAMES)
def test_a_blocks_scale_is_the_smallest_that_saturates_nothing(name):
    assert_smallest_scales(in_blocks, name)


def one_size_smaller(name: str, x: Tensor, keys: Tensor) -> QTensor:
    """Blocks of half the size."""
    whole = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % SIZES[name])).unflatten(1, (-1, SIZES[name] // 2))
    parts = [in_blocks(name, part.contiguous(), keys).block_scale for part in whole.unbind(1)]
    honest = in_blocks(name, x, keys)
    return QTensor(codes=honest.codes, scale=honest.scale, block_scale=torch.cat(parts, 1)[:, : x.shape[1]])


def off_by(factor: float) -> Quantizer:
    """Scales that are all too large or too small by a factor."""

    def quantizer(name: str, x: Tensor, keys: Tensor) -> QTensor:
        q = in_blocks(name, x, keys)
        return dataclasses.replace(q, scale=q.scale * factor)

    return quantizer


@pytest.mark.parametrize("planted", [one_size_smaller, off_by(0.5), off_by(2.0), off_by(1 + 2**-20)])
@pytest.mark.parametrize("name", NAMES)
def test_other_scales_would_be_seen(name, planted):
    with pytest.raises(AssertionError):
        assert_smallest_scales(planted, name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NAMES)
def test_codes_round_by_their_lines_draws_whatever_the_layout(name, layout):
    B, C, H, W = 2, 33, 3, 2
    x = torch.randint(-12 * 2**10, 12 * 2**10, (B, C, H, W), generator=torch.Generator().manual_seed(0)) / 2.0**10
    x[:, ::16, :, :] = 12.0  # so that each block's scale is 1, or 448 times a row scale of 1 / 448
    q = in_blocks(name, x.contiguous(memory_format=layout), keys_for(B))
    assert q.codes.dtype == torch.int8 and q.codes.is_contiguous(memory_format=layout)
    assert bool(torch.isclose(steps_of(q), torch.ones(1).double(), rtol=2**-23).all())
    for b, c, h, w in itertools.product(range(B), range(C), range(H), range(W)):
        draw = oracles.hashed(w * C + c, oracles.line_key(int(keys_for(B)[b]), h)) >> 9
        assert q.codes[b, c, h, w].item() == oracles.rounded("e2m1", x[b, c, h, w].item(), draw)


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_no_maps_and_whole_tensors_have_blocks_of_consecutive_values(name):
    x = torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, 2, 100).view(5, 20)
    steps = steps_of(quantize(x, name)).flatten(1)
    whole = quantize(x, name, per_example=False)
    assert whole.codes.shape == whole.block_scale.shape == x.shape and whole.scale.shape == (1,)
    for found in (*steps, steps_of(whole).flatten()):
        for block in found.split(SIZES[name]):
            assert bool((block == block[0]).all())
    assert len(steps[0].unique()) > 2
    assert bool(((whole.dequantize() - x).abs() <= 4 * steps_of(whole)).all())


@pytest.mark.parametrize("name", NAMES)
def test_edges_of_float32(name):
    zero, tiny, smallest = torch.zeros(40), torch.full((40,), 2.0**-101), torch.full((40,), 2.0**-100)
    large, nan, infinite = torch.full((40,), 2.0**127), smallest.clone(), torch.ones(40)
    nan[3], infinite[39] = math.nan, -math.inf
    smallest[1:] = 0
    x = torch.stack([zero, tiny, smallest, large, nan, infinite])
    q = in_blocks(name, x, keys_for(6))
    assert q.scale[:2].tolist() == [0.0, 0.0] and q.scale[4:].isnan().all() and q.scale[2:4].gt(0).all()
    assert q.codes[[0, 1, 4, 5]].eq(0).all() and q.dequantize()[4:].isnan().all()
    assert q.dequantize()[:4].isfinite().all() and q.dequantize()[2, 1:].eq(0).all()
    assert (q.dequantize()[3].double().mean() / 2.0**127).item() == pytest.approx(1, rel=0.2)
    empty = quantize(torch.zeros(0, 5), name)
    assert empty.codes.shape == (0, 5) and empty.dequantize().shape == (0, 5)


# Products


def assert_products_are_exact(values: Tensor) -> None:
    """All products of two of the values are float32 numbers."""
    assert torch.equal((values[:, None] * values).double(), values.double()[:, None] * values.double())


def values_of(name: str) -> Tensor:
    """All code values times block scales, for MXFP4 those of blocks from 2^-60 to 2^60."""
    codes = torch.tensor(oracles.VALUES["e2m1"])
    scales = [2.0**k for k in range(-63, 61)] if name == "mxfp4" else oracles.VALUES["fp8-e4m3"]
    values = codes.double()[:, None] * torch.tensor(scales, dtype=torch.float64)
    assert torch.equal(values.float().double(), values)
    return values.float().unique()


@pytest.mark.parametrize("name", NAMES)
def test_products_of_codes_and_block_scales_are_exact(name):
    assert_products_are_exact(values_of(name))


def test_products_that_round_would_be_seen():
    with pytest.raises(AssertionError):  # with NVFP4's row scale inside the sum
        assert_products_are_exact(values_of("nvfp4") * torch.tensor(1 / 3))
    with pytest.raises(AssertionError):  # with larger exponents
        assert_products_are_exact(values_of("mxfp4") * 2.0**8)


# Unbiasedness over all draws: rows of two blocks, of which the first has the value that is looked at in its element 1

STRIDE = 2**10  # of the 2^23 draws: exact for fractions that are multiples of 2^-13
CASES = [("mxfp4", 13.0), ("mxfp4", 9.0), ("mxfp4", 3.5), ("mxfp4", -0.3125), ("nvfp4", 10.0), ("nvfp4", -2.6)]


@functools.cache
def keys_of_all_draws() -> Tensor:
    """Row keys under which element 1 draws every multiple of the stride once."""
    return oracles.unhashed(torch.arange(0, oracles.ONE, STRIDE) << 9, high=0) ^ 1


def assert_unbiased(quantizer: Quantizer, name: str, value: float) -> None:
    """The mean over all draws is the value: exactly with powers of two, else as closely as the stride allows."""
    row = torch.zeros(SIZES[name] + 1)
    row[:2], row[-1] = torch.tensor([abs(value), value]), 1000.0
    keys = keys_of_all_draws()
    mean = quantizer(name, row.expand(len(keys), -1), keys).dequantize()[:, 1].double().mean().item()
    assert mean == pytest.approx(value, rel=0 if name == "mxfp4" else 1e-4, abs=0)


def to_nearest(name: str, x: Tensor, keys: Tensor) -> QTensor:
    return quantize(x, name, rounding=dpquant.formats.Rounding.NEAREST)


@pytest.mark.parametrize(("name", "value"), CASES)
def test_rounding_is_unbiased_also_of_a_blocks_largest_value(name, value):
    assert_unbiased(in_blocks, name, value)


def rounded_down(name: str, x: Tensor, keys: Tensor) -> QTensor:
    """The largest scales below instead of the smallest above: the largest value of a block saturates."""
    q = in_blocks(name, x, keys)
    spacing = 2.0 if name == "mxfp4" else 1 + 2.0**-3
    limit = 12 * (steps_of(q) / spacing).float()
    return in_blocks(name, x.clamp(-limit, limit), keys)


@pytest.mark.parametrize("planted", [to_nearest, rounded_down])
@pytest.mark.parametrize(("name", "value"), CASES)
def test_biased_rounding_would_be_seen(name, value, planted):
    with pytest.raises(AssertionError):
        assert_unbiased(planted, name, value)


# One example at a time


@pytest.mark.parametrize(
    ("name", "planted"), [("mxfp4", BlocksOfExamples), ("mxfp4", SharedScale), ("nvfp4", SharedScale)]
)
def test_a_block_across_examples_is_caught(name, planted):
    with pytest.raises(AssertionError):
        assert_rows_stand_alone(planted(Reference()), RECIPES[name])


# Weights and backends


def blocks_along(q: QTensor, axis: int, size: int) -> bool:
    """Whether scales are equal within blocks along this axis, and differ between them."""
    steps = q.block_scale.movedim(axis, 0)
    parts = steps.split(size)
    return all(bool((part == part[:1]).all()) for part in parts) and not torch.equal(parts[0][:1], parts[1][:1])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_weights_blocks_lie_along_the_axis_that_its_product_sums(name, groups):
    torch.manual_seed(0)
    layer = prepare(nn.Conv2d(80 * groups, 72 * groups, (3, 2), groups=groups), format=name)
    layer.weight.data *= torch.exp(3 * torch.randn_like(layer.weight))  # so that blocks differ
    role, run = RECIPES[name].weight, StepContext(key=3)
    forward, backward = (layer.quantize_weight(run, role, kept) for kept in ("output", "input"))
    assert forward.codes.shape == backward.codes.shape == layer.weight.shape
    assert forward.scale.shape == (72 * groups,) and backward.scale.shape == (80 * groups,)
    assert blocks_along(forward, 1, SIZES[name]) and not blocks_along(forward, 0, SIZES[name])
    for outputs in backward.rearranged(lambda part: part.unflatten(0, (groups, -1))).block_scale:
        one = QTensor(codes=outputs, scale=torch.ones(1), block_scale=outputs)
        assert blocks_along(one, 0, SIZES[name]) and not blocks_along(one, 1, SIZES[name])


@pytest.mark.parametrize("name", NAMES)
def test_only_backends_that_have_the_block_scales_run_them(name):
    chosen = precision(name)
    for backend in BACKENDS.values():
        assert (backend.refusal(chosen, CPU) is None) is (backend.name == "simulate")
    assert resolve("auto", [chosen], CPU).name == "simulate"
    assert "scales per block" in reason_for(Reference(), [chosen], CPU)
    with pytest.raises(FormatError, match=r"scales per block.*backend='simulate'"):
        resolve(CpuInt8(), [chosen], CPU)
    with pytest.raises(FormatError, match="without blocks"):
        quantize(torch.ones(2, 3), name, kernel="native")


def test_a_recipe_of_ones_own_in_blocks_has_int8_weight_gradients():
    mine = Recipe(
        name="mine", **{role: getattr(RECIPES["nvfp4"], role) for role in ("weight", "activation", "gradient")}
    )
    layer = prepare(nn.Linear(20, 3), format=mine)
    assert layer.chosen.name == "mine/mine/int8"


def test_the_oracle_of_scales_is_right_by_hand():
    assert oracles.block_scale("mxfp4", 12.0, 1.0) == 1 and oracles.block_scale("mxfp4", 12.5, 1.0) == 2
    assert oracles.block_scale("nvfp4", 12 * 448.0, 12 * 448.0) == 448
    assert oracles.block_scale("nvfp4", 12.5, 12 * 448.0) == Fraction(9, 8)
