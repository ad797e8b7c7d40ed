# SPDX-License-Identifier: Apache-2.0
"""The products of convolutions agree with autograd and with exact sums; strides that crash oneDNN do not reach it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from convolutions import codes, convolutions, exactly
from dpquant.backends import algebra
from dpquant.backends.algebra import im2col, patch_grams
from dpquant.backends.geometry import Geometry


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_gradients_of_plain_tensors_agree_with_autograd(convolution):
    geometry, shape, size = convolution
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, shape[1] * geometry.groups, *size, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    y = exactly(x, weight, geometry)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    x, weight = x.detach(), weight.detach()
    torch.testing.assert_close(algebra.input_gradient(grad, weight, geometry, size), grad_x)
    torch.testing.assert_close(algebra.weight_gradient(grad, x, geometry), grad_weight)
    patches = algebra.im2col(x, geometry)
    each = algebra.in_weight_order(algebra.patch_products(algebra.positions(grad, geometry), patches), geometry)
    for i in range(3):
        torch.testing.assert_close(each[i], algebra.weight_gradient(grad[[i]], x[[i]], geometry))
    total = algebra.add_patch_products(grad, x, geometry, None)
    total = algebra.add_patch_products(grad, x, geometry, total)
    torch.testing.assert_close(algebra.in_weight_order(total.flatten(0, 1), geometry), 2 * grad_weight)
    torch.testing.assert_close(algebra.grouped_products(grad, x, geometry), each.reshape(3, *shape))


ONE_COLUMN = (Geometry(kernel=(3, 3), stride=(1, 4), padding=(1, 1)), (2, 1, 3, 3), (16, 1))


def assert_convolved_as_in_float64(convolution, convolved=algebra.convolved):
    geometry, shape, size = convolution
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator) for s in ((3, shape[1] * geometry.groups, *size), shape))
    x = x.contiguous(memory_format=torch.channels_last)
    found = convolved(x, weight, None, geometry)
    torch.testing.assert_close(found, exactly(x, weight, geometry).float(), rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
@example(ONE_COLUMN)
def test_a_convolution_in_float32_agrees_with_float64(convolution):
    assert_convolved_as_in_float64(convolution)


def test_padding_that_is_not_zero_would_be_seen():
    def padded_by_ones(x, weight, bias, geometry):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), value=1.0), weight, bias, geometry.stride)

    with pytest.raises(AssertionError):
        assert_convolved_as_in_float64(ONE_COLUMN, padded_by_ones)


class Strides(TorchDispatchMode):
    """Notes the strides of the convolutions that torch is asked to differentiate."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.convolution_backward:
            self.seen.append(tuple(args[4]))
        return function(*args, **(kwargs or {}))


def assert_no_strides_reach_torch(groups, weight_gradient=algebra.weight_gradient):
    """oneDNN would write beyond its workspace, which is a crash on some machines and nothing to be seen on others."""
    geometry = Geometry(stride=(2, 3), groups=groups)
    x, grad = torch.randn(3, 4 * groups, 7, 8), torch.randn(3, 6 * groups, 4, 3)
    each = algebra.patch_products(algebra.positions(grad, geometry), im2col(x, geometry))[..., None, None]
    with Strides() as strides:
        torch.testing.assert_close(weight_gradient(grad, x, geometry), each.sum(0))
        torch.testing.assert_close(algebra.grouped_products(grad, x, geometry), each)
    assert strides.seen and set(strides.seen) == {(1, 1)}


def with_strides(grad, x, geometry):
    """As torch's own backward pass asks for it."""
    weight = torch.empty(grad.shape[1], x.shape[1] // geometry.groups, *geometry.kernel)
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, geometry.stride, (0, 0), (1, 1), False, [0, 0], geometry.groups, [False, True, False]
    )[1]


@pytest.mark.parametrize("groups", [1, 2])
def test_weight_gradients_of_strided_1x1_kernels_leave_torch_no_strides(groups):
    assert_no_strides_reach_torch(groups)
    with pytest.raises(AssertionError):
        assert_no_strides_reach_torch(groups, with_strides)


def assert_no_examples_give_nothing(function):
    """What a batch without examples gives has the form of any other batch's, with no examples."""
    geometry = Geometry(kernel=(3, 2), stride=(2, 1), padding=(1, 0), groups=2)
    some, none = (function(torch.ones(batch, 4, 7, 6), geometry) for batch in (2, 0))
    assert none.shape == (0, *some.shape[1:])


@pytest.mark.parametrize("function", [im2col, patch_grams])
def test_no_examples_have_no_patches(function):
    assert_no_examples_give_nothing(function)
    with pytest.raises(RuntimeError, match="ambiguous"):  # a size that is left to torch
        assert_no_examples_give_nothing(lambda x, g: function(x, g).flatten(1).reshape(len(x), -1))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(convolutions())
def test_grams_of_patches_are_sums_of_grams_of_pixels(convolution):
    geometry, shape, size = convolution
    x = codes((2, shape[1] * geometry.groups, *size), 7).double()
    patches = im2col(x, geometry)
    expected = patches @ patches.transpose(2, 3)
    assert torch.equal(patch_grams(x, geometry), expected)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "channels", "out"), [(0, 384, 384), (1, 1, 1), (5, 7, 3), (64, 384, 192), (4, 16_384, 64)]
)
def test_rows_by_a_matrix_are_their_exact_products(rows, channels, out, dtype, transposed):
    """Codes whose partial sums float32 holds: any order of the terms gives them."""
    generator = torch.Generator().manual_seed(rows)
    x, bias = (torch.randint(-8, 9, size, generator=generator).to(dtype) for size in ((rows, channels), (out,)))
    shape = (channels, out) if transposed else (out, channels)
    matrix = torch.randint(-8, 9, shape, generator=generator).to(dtype)
    matrix = matrix.t() if transposed else matrix
    for added in (None, bias):
        wanted = x.double() @ matrix.double().t() + (0 if added is None else added.double())
        assert torch.equal(algebra.rows_by_matrix(x, matrix, added).double(), wanted)


POINTWISE = Geometry(kernel=(1, 1), stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1)


@pytest.mark.parametrize("positions", [0, 1, 256, 300, 1030])
@pytest.mark.parametrize("channels", [(3, 5), (128, 256), (256, 128)])
def test_a_sum_over_positions_is_exact_for_codes(channels, positions):
    x, grad = (codes((3, number, positions, 1), number).float() for number in channels)
    found = algebra.weight_gradient(grad, x, POINTWISE)[:, :, 0, 0]
    assert torch.equal(found.double(), torch.einsum("bopq,bcpq->oc", grad.double(), x.double()))


def test_a_sum_of_equal_terms_errs_less_than_is_allowed_for():
    """Each term is rounded in the same direction, so that errors add up: sums are formed in parts."""
    for value in (1 + 2**-8 - 2**-22, 1.1, 1 / 3, 0.7, 1.9999):
        grad, x = (torch.full((64, number, 256, 1), value) for number in (128, 256))
        found = algebra.weight_gradient(grad, x, POINTWISE).double()
        wanted = 64 * 256 * grad[0, 0, 0].double() * x[0, 0, 0].double()
        assert ((found - wanted).abs() <= algebra.ROUND_OFF * wanted).all()


def test_a_product_of_a_sequence_is_no_view():
    """A model may overwrite it."""
    for channels in (6, 384):  # by torch's own product, and by oneDNN's
        x = torch.randn(8, channels, 64, 1).to(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 1, 1)
        y = algebra.convolved(x, weight, None, POINTWISE)
        assert not y._is_view() and y.stride(1) == 1
        torch.testing.assert_close(y, F.conv2d(x, weight), rtol=1e-4, atol=1e-4)
