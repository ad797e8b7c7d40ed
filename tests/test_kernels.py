# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dpquant import kernels
from dpquant.errors import FormatError
from dpquant.kernels import Geometry, Int8Products, SimulatedProducts
from dpquant.quantizer import QTensor


def codes(shape, max_code, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-max_code, max_code + 1, shape, generator=generator, dtype=torch.int64).to(torch.int8)


def plain(values):
    return QTensor(codes=values, scale=torch.ones(len(values)))


def shifted(values):
    moved = (values.to(torch.int16) + 128).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return QTensor(codes=moved, scale=torch.ones(len(values)), zero_point=128)


@st.composite
def convolutions(draw):
    """(geometry, weight shape, input size): every combination that has an output."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    geometry = Geometry(
        kernel=kernel,
        stride=draw(st.tuples(st.integers(1, 3), st.integers(1, 3))),
        padding=draw(st.tuples(st.integers(0, 3), st.integers(0, 3))),
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        groups=groups,
    )
    size = tuple(
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 12))
        for k, p, d in zip(kernel, geometry.padding, geometry.dilation, strict=True)
    )
    return geometry, (groups * draw(st.integers(1, 3)), draw(st.integers(1, 4)), *kernel), size


def reference(x, weight, g):
    return F.conv2d(x.double(), weight.double(), None, g.stride, g.padding, g.dilation, g.groups)


def assert_exact_integers(convolution, max_code, make_products):
    """Both products equal the exact integers, rounded once to float32."""
    geometry, shape, size = convolution
    x = codes((2, shape[1] * geometry.groups, *size), max_code)
    weight = codes(shape, max_code, 1)
    exact = reference(x, weight, geometry)
    grad = codes(exact.shape, max_code, 2)
    fast, as_operand = make_products(weight, geometry, max_code)
    assert torch.equal(fast.forward(as_operand(x)), exact.float())
    inputs = x.double().requires_grad_()
    (exact_gradient,) = torch.autograd.grad(reference(inputs, weight, geometry), inputs, grad.double())
    assert torch.equal(fast.input_gradient(as_operand(grad), size), exact_gradient.float())


def simulated(weight, geometry, max_code):
    return SimulatedProducts(plain(weight), geometry, max_code), plain


def int8(weight, geometry, max_code):
    return Int8Products(plain(weight), geometry), shifted


@settings(max_examples=400, deadline=None, derandomize=True)
@given(convolutions(), st.sampled_from([7, 64, 127]))
def test_simulate_and_int8_give_the_exact_integers(convolution, max_code):
    assert_exact_integers(convolution, max_code, simulated)
    assert_exact_integers(convolution, max_code, int8)


def test_a_wrong_zero_point_is_caught():
    def off_by_one(weight, geometry, max_code):
        def moved(values):
            operand = shifted(values)
            return dataclasses.replace(operand, codes=operand.codes - 1)

        return Int8Products(plain(weight), geometry), moved

    with pytest.raises(AssertionError):
        assert_exact_integers((Geometry(kernel=(3, 3), padding=(1, 1)), (4, 3, 3, 3), (6, 6)), 64, off_by_one)


def test_sums_beyond_2_to_the_24_are_rounded_alike():
    x, weight = torch.full((1, 512, 4, 4), 127, dtype=torch.int8), torch.full((8, 512, 3, 3), 127, dtype=torch.int8)
    weight[:, 0, 0, 0] = 126  # so that the exact sum is odd, and no float32
    geometry = Geometry(kernel=(3, 3), padding=(1, 1))
    exact = reference(x, weight, geometry)
    assert exact.max() > 2**24 and not torch.equal(exact, exact.float().double())
    assert torch.equal(SimulatedProducts(plain(weight), geometry, 127).forward(plain(x)), exact.float())
    assert torch.equal(Int8Products(plain(weight), geometry).forward(shifted(x)), exact.float())


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_gradients_of_plain_tensors_agree_with_autograd(convolution):
    geometry, shape, size = convolution
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, shape[1] * geometry.groups, *size, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    y = reference(x, weight, geometry)
    grad = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    grad_x, grad_weight = torch.autograd.grad(y, (x, weight), grad)
    x, weight = x.detach(), weight.detach()
    torch.testing.assert_close(kernels.input_gradient(grad, weight, geometry, size), grad_x)
    torch.testing.assert_close(kernels.weight_gradient(grad, x, geometry), grad_weight)
    patches = kernels.unfolded(x, geometry)
    each = kernels.in_weight_order(kernels.patch_products(kernels.positions(grad, geometry), patches), geometry)
    for i in range(3):
        torch.testing.assert_close(each[i], kernels.weight_gradient(grad[[i]], x[[i]], geometry))
    total = kernels.add_patch_products(grad, x, geometry, None)
    total = kernels.add_patch_products(grad, x, geometry, total)
    torch.testing.assert_close(kernels.in_weight_order(total.flatten(0, 1), geometry), 2 * grad_weight)
    torch.testing.assert_close(kernels.grouped_products(grad, x, geometry), each.reshape(3, *shape))


def test_this_machine_either_is_exact_or_refuses_int8():
    cpu = torch.device("cpu")
    if kernels.int8_is_exact(127):
        assert kernels.resolve_backend("auto", max_code=127, fits_int8=True, device=cpu) == "int8"
    assert kernels.resolve_backend("auto", max_code=448, fits_int8=False, device=cpu) == "simulate"
    assert kernels.resolve_backend("simulate", max_code=127, fits_int8=True, device=cpu) == "simulate"


@pytest.mark.parametrize(
    ("backend", "settings_", "words"),
    [
        ("int4", {}, "one of auto, simulate, int8"),
        ("int8", {"fits_int8": False}, "codes are not int8"),
        ("int8", {"device": torch.device("meta")}, "on meta"),
    ],
)
def test_an_impossible_backend_is_refused(backend, settings_, words):
    facts = {"max_code": 64, "fits_int8": True, "device": torch.device("cpu"), **settings_}
    with pytest.raises(FormatError, match=words):
        kernels.resolve_backend(backend, **facts)


def test_a_wrong_int8_convolution_is_refused(monkeypatch):
    honest = kernels._Int8Weight.convolved
    monkeypatch.setattr(kernels._Int8Weight, "convolved", lambda self, codes, g: honest(self, codes, g) + 1)
    kernels.int8_is_exact.cache_clear()
    with pytest.raises(FormatError, match="not exact"):
        kernels.resolve_backend("int8", max_code=64, fits_int8=True, device=torch.device("cpu"))
    kernels.int8_is_exact.cache_clear()


@pytest.mark.parametrize(
    "convolution",
    [
        (Geometry(), (5, 3, 1, 1), (1, 1)),
        (Geometry(kernel=(5, 5), padding=(2, 2)), (4, 3, 5, 5), (1, 1)),
        (Geometry(kernel=(5, 1), padding=(6, 3), stride=(3, 2)), (4, 3, 5, 1), (7, 5)),
        (Geometry(kernel=(1, 5), stride=(4, 4), groups=5), (5, 1, 1, 5), (11, 13)),
        (Geometry(kernel=(5, 3), dilation=(2, 3), padding=(4, 3), stride=(2, 2)), (2, 2, 5, 3), (10, 9)),
    ],
    ids=str,
)
def test_large_kernels_single_pixels_and_remainders_are_exact(convolution):
    assert_exact_integers(convolution, 127, simulated)
    assert_exact_integers(convolution, 127, int8)


@pytest.mark.parametrize(
    "convolution",
    [
        (Geometry(kernel=(2, 1), stride=(1, 3), padding=(1, 1), groups=2), (2, 4, 2, 1), (3, 1)),
        (Geometry(kernel=(2, 2), padding=(0, 1), dilation=(1, 2)), (1, 1, 2, 2), (2, 1)),
        (Geometry(kernel=(3, 3), stride=(2, 2), dilation=(1, 2)), (3, 4, 3, 3), (12, 5)),
    ],
)
def test_the_corners_in_which_onednn_errs_are_walked_around(convolution):
    assert_exact_integers(convolution, 64, int8)


@pytest.mark.skipif(not kernels.has_direct_products(torch.zeros(1)), reason="no native kernel on this machine")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_direct_products_are_those_of_patches(convolution):
    geometry, shape, size = convolution
    generator = torch.Generator().manual_seed(0)
    cl = torch.channels_last
    x = torch.randn(3, shape[1] * geometry.groups, *size, generator=generator).contiguous(memory_format=cl)
    y = reference(x, torch.zeros(shape), geometry)
    grad = torch.randn(y.shape, generator=generator).contiguous(memory_format=cl)
    expected = kernels.patch_products(kernels.positions(grad, geometry), kernels.unfolded(x, geometry))
    torch.testing.assert_close(kernels.direct_products(grad, x, geometry), expected, rtol=1e-4, atol=1e-4)
    if grad.count_nonzero() and expected.abs().max() > 1e-2:  # a kernel that forgets one position would be seen
        grad[0, :, 0, 0] = 0
        changed = kernels.patch_products(kernels.positions(grad, geometry), kernels.unfolded(x, geometry))
        if (changed - expected).abs().max() > 1e-2:
            with pytest.raises(AssertionError):
                torch.testing.assert_close(kernels.direct_products(grad, x, geometry), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not kernels._code_products_are_exact(), reason="no native kernel on this machine")
@settings(max_examples=100, deadline=None, derandomize=True)
@given(convolutions(), st.booleans())
def test_products_of_codes_are_exact_integers_on_every_kernel(convolution, extreme):
    geometry, shape, size = convolution
    geometry = dataclasses.replace(geometry, groups=1)
    x = codes((3, shape[1], *size), 127)
    y = reference(x, torch.zeros(shape), geometry)
    grad = codes(y.shape, 127, 1)
    if extreme:  # the largest codes: where a kernel would saturate
        x, grad = (torch.where(values > 0, 127, -127).to(torch.int8) for values in (x, grad))
    exact = kernels.patch_products(kernels.positions(grad.double(), geometry), kernels.unfolded(x.double(), geometry))
    operands = shifted(grad).codes, shifted(x).codes
    weights = torch.tensor([0.5, -2.0, 0.0])
    for kernel in kernels._native.code_kernels():
        products = kernels.code_products(*operands, geometry, kernel=kernel)
        assert torch.equal(products, exact.float())
        norms = kernels.code_norms(*operands, geometry, kernel=kernel)
        torch.testing.assert_close(norms, exact.square().sum((1, 2)), rtol=1e-12, atol=0)
        total = kernels.add_code_products(*operands, geometry, weights, None, kernel=kernel)
        total = kernels.add_code_products(*operands, geometry, weights, total, kernel=kernel)
        expected = 2 * torch.einsum("b,bod->od", weights.double(), exact)
        torch.testing.assert_close(total.sum(0).double(), expected, rtol=1e-5, atol=1e-2)
        if grad[0, :, 0, 0].any() and exact[0].any():  # the check sees one code that is forgotten
            operands[0][0, :, 0, 0] = 128
            again = kernels.code_products(*operands, geometry, kernel=kernel)
            expected_again = kernels.patch_products(
                kernels.positions(operands[0].double() - 128, geometry), kernels.unfolded(x.double(), geometry)
            )
            assert torch.equal(again, expected_again.float())
            assert torch.equal(again, exact.float()) == torch.equal(exact, expected_again)
            operands = shifted(grad).codes, operands[1]
