# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convolutions import DEPTHWISE, codes, convolutions, exactly, shifted
from dpquant.backends import native_products as products
from dpquant.backends.algebra import im2col, patch_products, positions
from dpquant.backends.geometry import Geometry
from dpquant.backends.workarounds import columns_as_channels

MANY = 70  # examples; more than any kernel packs at once
LARGEST = [64, 73, 74, 127]  # LUQ-FP4's; the largest that avx2 sums in 16 bits, and one more; all


@pytest.mark.skipif(not products.has_direct_products(torch.zeros(1)), reason="no native kernel on this machine")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_direct_products_are_those_of_patches(convolution):
    geometry, shape, size = convolution
    generator = torch.Generator().manual_seed(0)
    cl = torch.channels_last
    x = torch.randn(3, shape[1] * geometry.groups, *size, generator=generator).contiguous(memory_format=cl)
    y = exactly(x, torch.zeros(shape), geometry)
    grad = torch.randn(y.shape, generator=generator).contiguous(memory_format=cl)
    expected = patch_products(positions(grad, geometry), im2col(x, geometry))
    for kernel in products._native.float_kernels():
        found = products.direct_products(grad, x, geometry, kernel=kernel)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    if grad.count_nonzero() and expected.abs().max() > 1e-2:  # a kernel that forgets one position would be seen
        grad[0, :, 0, 0] = 0
        changed = patch_products(positions(grad, geometry), im2col(x, geometry))
        if (changed - expected).abs().max() > 1e-2:
            with pytest.raises(AssertionError):
                torch.testing.assert_close(products.direct_products(grad, x, geometry), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not products.has_direct_products(torch.zeros(1)), reason="no native kernel on this machine")
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 5), (7, 7), (2, 9)])
@pytest.mark.parametrize("padded", [False, True])
def test_direct_products_of_depthwise_convolutions_are_those_of_patches(kernel, padded):
    """Of maps with some outputs that read the image by all taps of a line, by a few of them, or by none."""
    padding = (kernel[0], kernel[1] + 2) if padded else (0, 0)
    for stride, size in [((1, 1), (9, 17)), ((2, 3), (11, 13)), ((1, 1), kernel)]:
        geometry = Geometry(kernel=kernel, stride=stride, padding=padding, groups=DEPTHWISE)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, DEPTHWISE, *size, generator=generator).contiguous(memory_format=torch.channels_last)
        y = exactly(x, torch.zeros(DEPTHWISE, 1, *kernel), geometry)
        grad = torch.randn(y.shape, generator=generator).contiguous(memory_format=torch.channels_last)
        expected = patch_products(positions(grad.double(), geometry), im2col(x.double(), geometry))
        for name in products._native.float_kernels():
            found = products.direct_products(grad, x, geometry, kernel=name).double()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(products._native is None, reason="no native module")
def test_the_kernels_of_this_processor_are_exact():
    """Else they would not be taken, and the tests below would be skipped."""
    assert products._code_products_run() == bool(products._native.code_kernels())
    assert products._code_sums_run() == bool(products._native.code_sum_kernels())


@pytest.mark.skipif(not products._code_products_run(), reason="no native kernel on this machine")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(convolutions(), st.sampled_from(LARGEST), st.booleans())
def test_products_of_codes_are_exact_integers_on_every_kernel(convolution, largest, extreme):
    geometry, shape, size = convolution
    geometry = dataclasses.replace(geometry, groups=1)
    x = codes((3, shape[1], *size), largest)
    y = exactly(x, torch.zeros(shape), geometry)
    grad = codes(y.shape, largest, 1)
    if extreme:  # the largest codes: where a kernel would saturate
        x, grad = (torch.where(values > 0, largest, -largest).to(torch.int8) for values in (x, grad))
    exact = patch_products(positions(grad.double(), geometry), im2col(x.double(), geometry))
    operands = shifted(grad).codes, shifted(x).codes
    weights = torch.tensor([0.5, -2.0, 0.0])
    for kernel in products._native.code_kernels():
        formed = products.code_products(*operands, geometry, kernel=kernel)
        assert torch.equal(formed, exact.float())
        norms = products.code_norms(*operands, geometry, kernel=kernel)
        torch.testing.assert_close(norms, exact.square().sum((1, 2)), rtol=1e-12, atol=0)
        grams = products.gram_norms(*operands, geometry, kernel=kernel)
        assert torch.equal(grams, exact.square().sum((1, 2)))
        total = torch.zeros(torch.get_num_threads(), *exact.shape[1:])
        for _ in range(2):
            products.add_code_products(*operands, geometry, weights, total, kernel=kernel)
        expected = 2 * torch.einsum("b,bod->od", weights.double(), exact)
        torch.testing.assert_close(total.sum(0).double(), expected, rtol=1e-5, atol=1e-2)
        if grad[0, :, 0, 0].any() and exact[0].any():  # the check sees one code that is forgotten
            operands[0][0, :, 0, 0] = 128
            again = products.code_products(*operands, geometry, kernel=kernel)
            expected_again = patch_products(
                positions(operands[0].double() - 128, geometry), im2col(x.double(), geometry)
            )
            assert torch.equal(again, expected_again.float())
            assert torch.equal(
                products.gram_norms(*operands, geometry, kernel=kernel), expected_again.square().sum((1, 2))
            )
            assert torch.equal(again, exact.float()) == torch.equal(exact, expected_again)
            operands = shifted(grad).codes, operands[1]


@pytest.mark.skipif(not products._code_products_run(), reason="no native kernel on this machine")
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_many_examples_are_added_each_with_its_own_weight(parts):
    """More than are packed at once, shared among parts of the total as among threads; tiles with every remainder."""
    geometry = Geometry(kernel=(3, 3), padding=(1, 1))
    x, grad = codes((MANY, 53, 4, 4), 64), codes((MANY, 17, 4, 4), 64, 1)
    exact = patch_products(positions(grad.double(), geometry), im2col(x.double(), geometry))
    weights = torch.arange(MANY) / MANY
    for kernel in products._native.code_kernels():
        total = torch.zeros(parts, *exact.shape[1:])
        products.add_code_products(shifted(grad).codes, shifted(x).codes, geometry, weights, total, kernel=kernel)
        expected = torch.einsum("b,bod->od", weights.double(), exact)
        torch.testing.assert_close(total.sum(0).double(), expected, rtol=1e-5, atol=1e-2)
        norms = products.code_norms(shifted(grad).codes, shifted(x).codes, geometry, kernel=kernel)
        torch.testing.assert_close(norms, exact.square().sum((1, 2)), rtol=1e-12, atol=0)
        others = torch.einsum("b,bod->od", weights.double().roll(1), exact)  # each with another's would be seen
        assert not torch.allclose(total.sum(0).double(), others, rtol=1e-5, atol=1e-2)


@pytest.mark.skipif(not products._code_products_run(), reason="no native kernel on this machine")
@pytest.mark.parametrize("size", [(18, 1), (1, 18), (3, 7)])
def test_positions_of_a_pointwise_product_meet_those_of_their_own(size):
    """They are given to the kernels as one row, whatever the shape of the map."""
    x, grad = codes((3, 21, *size), 127), codes((3, 6, *size), 127, 1)
    exact = torch.einsum("bot,bct->boc", grad.flatten(2).double(), x.flatten(2).double())
    operands = shifted(grad).codes, shifted(x).codes, Geometry()
    for kernel in products._native.code_kernels():
        assert torch.equal(products.code_products(*operands, kernel=kernel), exact.float())
        assert torch.equal(products.gram_norms(*operands, kernel=kernel), exact.square().sum((1, 2)))
    for kernel in products._native.code_sum_kernels():
        total = torch.zeros(exact.shape[1:])
        products.add_code_sums(*operands, torch.ones(3), total, bf16_terms=2, kernel=kernel)
        assert torch.equal(total.double(), exact.sum(0))


@pytest.mark.skipif(not products._code_products_run(), reason="no native kernel on this machine")
@pytest.mark.parametrize("largest", LARGEST)
def test_long_sums_of_the_largest_codes_are_exact_on_every_kernel(largest):
    """All products are equal and largest: no sum of some of them would fit where it must not."""
    geometry = Geometry(kernel=(1, 1))
    for sign in (1, -1):
        x, grad = (torch.full((1, 33, 9, 9), 128 + one, dtype=torch.uint8) for one in (largest, sign * largest))
        x, grad = (one.contiguous(memory_format=torch.channels_last) for one in (x, grad))
        for kernel in products._native.code_kernels():
            exact = torch.full((1, 33, 33), float(sign * 81 * largest**2))
            assert torch.equal(products.code_products(grad, x, geometry, kernel=kernel), exact)
            assert products.gram_norms(grad, x, geometry, kernel=kernel).item() == 33**2 * (81 * largest**2) ** 2


@pytest.mark.skipif(not products._code_sums_run(), reason="no native kernel on this machine")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(convolutions(), st.sampled_from([3, 33, 70]), st.sampled_from([1, 2]))
def test_weighted_sums_of_codes_are_those_of_products(convolution, batch, pieces):
    geometry, shape, size = convolution
    geometry = dataclasses.replace(geometry, groups=1)
    x = codes((batch, shape[1], *size), 127)
    y = exactly(x, torch.zeros(shape), geometry)
    grad = codes(y.shape, 127, 1)
    if pieces == 1:  # what one bfloat16 number can hold: a weight times a power of two
        grad = grad.sign() * 64
    operands = shifted(grad).codes, shifted(x).codes
    weights = torch.rand(batch, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    weights[-1] = 0
    exact = patch_products(positions(grad.double(), geometry), im2col(x.double(), geometry))
    expected = 2 * torch.einsum("b,bod->od", weights.double(), exact)
    scale = torch.einsum("b,bod->od", weights.double(), exact.abs()).max().item() + 1
    for kernel in products._native.code_sum_kernels():
        total = torch.zeros(exact.shape[1:])
        for _ in range(2):
            products.add_code_sums(*operands, geometry, weights, total, bf16_terms=pieces, kernel=kernel)
        torch.testing.assert_close(total.double(), expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.skipif(not products._code_sums_run(), reason="no native kernel on this machine")
def test_one_piece_is_not_enough_for_a_code_of_seven_bits():
    generator = torch.Generator().manual_seed(0)
    x, grad = shifted(codes((40, 8, 5, 5), 127)).codes, shifted(codes((40, 8, 5, 5), 127, 1)).codes
    weights, geometry = torch.rand(40, generator=generator).bfloat16().float(), Geometry()
    one, two = torch.zeros(2, 8, 8)
    for pieces, total in ((1, one), (2, two)):
        products.add_code_sums(grad, x, geometry, weights, total, bf16_terms=pieces)
    assert (one - two).abs().max() > 1e-4 * two.abs().max()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(convolutions())
def test_folding_columns_into_channels_changes_no_product(convolution):
    geometry, shape, size = convolution
    geometry = dataclasses.replace(geometry, groups=1)
    x = shifted(codes((2, shape[1], *size), 127)).codes
    assert len(columns_as_channels(x[:0], geometry, zero=128)[0]) == 0
    grad = codes(exactly(x, torch.zeros(shape), geometry).shape, 127, 1).double()
    folded_x, walk = columns_as_channels(x, geometry, zero=128)
    assert walk.kernel[1] in (1, geometry.kernel[1])
    assert folded_x.is_contiguous(memory_format=torch.channels_last)
    a, b = (
        patch_products(positions(grad, g), im2col(t.double() - 128, g)) for t, g in ((x, geometry), (folded_x, walk))
    )
    assert torch.equal(a, b)


def in_torch(grad, x, geometry):
    """The products of codes, exact."""
    return patch_products(positions(grad.double() - 128, geometry), im2col(x.double() - 128, geometry))


def products_in_torch(grad, x, geometry):
    return in_torch(grad, x, geometry).float()


def norms_in_torch(grad, x, geometry):
    return in_torch(grad, x, geometry).square().sum((1, 2))


def add_in_torch(grad, x, geometry, weights_B, total, *, bf16_terms):
    total += torch.einsum("b,bod->od", weights_B.double(), in_torch(grad, x, geometry)).float()


def test_right_kernels_are_taken_and_wrong_ones_refused():
    assert products.products_are_exact(products_in_torch, norms_in_torch)
    assert not products.products_are_exact(lambda *args: products_in_torch(*args) + 1, norms_in_torch)
    assert not products.products_are_exact(products_in_torch, lambda *args: norms_in_torch(*args) + 1)

    def one_more(grad, x, geometry, weights_B, total, *, bf16_terms):
        add_in_torch(grad, x, geometry, weights_B, total, bf16_terms=bf16_terms)
        total += 1

    assert products.sums_are_exact(add_in_torch)
    assert not products.sums_are_exact(one_more)
