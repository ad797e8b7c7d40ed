# SPDX-License-Identifier: Apache-2.0
"""The native convolutions give the bits of the reference, also for the largest codes, and tests see if not."""

import dataclasses
import functools
import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convolutions import codes, convolutions, shifted
from dpquant.backends.cpu_int8 import CpuInt8, Int8Weight, flaw_of_int8
from dpquant.backends.geometry import Geometry
from dpquant.backends.native_convolutions import NativeWeight, faster_than_onednn, native_kernels
from dpquant.backends.qtensor import QTensor
from dpquant.backends.reference import ReferenceWeight
from processor import CPU, of_integers

pytestmark = pytest.mark.skipif(not native_kernels(), reason="no native kernel on this machine")

LARGEST = [7, 64, 73, 74, 127]  # 73 is the largest that is summed in 16 bits
MANY = 300  # examples; more than are convolved at once
KERNELS = [functools.partial(NativeWeight, kernel=kernel) for kernel in native_kernels()]


def operands(convolution, largest, batch, *, extreme):
    """Return weights for both directions, x and g, as codes with scales, and the geometry."""
    geometry, shape, size = convolution
    drawn = [codes(shape, largest), codes((batch, shape[1] * geometry.groups, *size), largest, 1)]
    if extreme:
        drawn = [torch.where(values > 0, largest, -largest).to(torch.int8) for values in drawn]
    weight, x = drawn
    generator = torch.Generator().manual_seed(0)

    def scaled(codes, count):
        return QTensor(codes=codes, scale=torch.rand(count, generator=generator))

    y = ReferenceWeight(scaled(weight, 1), geometry, largest).forward(scaled(x, batch), None)
    grad = codes(y.shape, largest, 2)
    if extreme:
        grad = torch.where(grad > 0, largest, -largest).to(torch.int8)
    forward, backward = scaled(weight, shape[0]), scaled(weight, x.shape[1])
    return forward, backward, scaled(x, batch), scaled(grad, batch), geometry


def as_bytes(x):
    return dataclasses.replace(shifted(x.codes), scale=x.scale)


def assert_the_references(packed, convolution, largest, batch, *, extreme):
    """Assert that weights packed by `packed` give the reference's bits, forward and backward."""
    forward, backward, x, grad, geometry = operands(convolution, largest, batch, extreme=extreme)
    bias = torch.linspace(-1, 1, len(forward.codes))
    exact = ReferenceWeight(forward, geometry, largest).forward(x, bias)
    assert torch.equal(packed(forward, geometry, largest).forward(as_bytes(x), bias), exact)
    size = x.codes.shape[2], x.codes.shape[3]
    exact = ReferenceWeight(backward, geometry, largest).input_gradient(grad, size)
    assert torch.equal(packed(backward, geometry, largest).input_gradient(as_bytes(grad), size), exact)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(convolutions(), st.sampled_from(LARGEST), st.sampled_from([1, 3]), st.booleans())
def test_products_are_the_references_bits(convolution, largest, batch, extreme):
    for packed in KERNELS:
        assert_the_references(packed, convolution, largest, batch, extreme=extreme)


WIDE = (Geometry(kernel=(1, 3), padding=(0, 1), groups=2), (2 * 70, 4, 1, 3), (1, 8))  # more than a panel of outputs
POINTWISE = (Geometry(), (19, 36, 1, 1), (5, 2))  # its planes are its images
ONE_POSITION = (Geometry(), (19, 33, 1, 1), (1, 1))
STRIDED = (Geometry(kernel=(3, 3), stride=(2, 2), padding=(1, 1)), (17, 13, 3, 3), (5, 6))
WITHOUT_TAPS = (Geometry(kernel=(1, 1), stride=(2, 3)), (5, 4, 1, 1), (7, 7))  # most inputs are read by none


@pytest.mark.parametrize(
    "convolution",
    [ONE_POSITION, POINTWISE, STRIDED, WITHOUT_TAPS, WIDE],
    ids=["one position", "pointwise", "strided", "few taps", "wide"],
)
@pytest.mark.parametrize("largest", LARGEST)
def test_many_examples_are_the_references_bits(convolution, largest):
    for packed in KERNELS:
        assert_the_references(packed, convolution, largest, MANY, extreme=True)


def test_long_sums_of_the_largest_codes_are_exact():
    """Nearly as large as int32 holds, of products that are all equal, and with 128 added to each code of x larger."""
    terms = (2**31 - 1) // 127**2 // 4 * 4
    for sign in (1, -1):
        weight = QTensor(codes=torch.full((5, terms, 1, 1), sign * 127, dtype=torch.int8), scale=torch.ones(1))
        x = QTensor(codes=torch.full((7, terms, 1, 1), 127, dtype=torch.int8), scale=torch.ones(7))
        for packed in KERNELS:
            y = packed(weight, Geometry(), 127).forward(as_bytes(x), None)
            assert torch.equal(y, torch.full((7, 5, 1, 1), float(sign * terms * 127**2)))


def test_codes_that_are_larger_than_was_told_are_caught():
    """Summed in 16 bits on AVX2, where they do not fit."""

    def told_73(weight, geometry, max_code):
        return NativeWeight(weight, geometry, 73, kernel="avx2")

    assert_the_references(told_73, STRIDED, 73, 3, extreme=True)
    with pytest.raises(AssertionError):
        assert_the_references(told_73, STRIDED, 127, 3, extreme=True)


class WithoutItsLastTap(NativeWeight):
    def _packed(self, rows, columns, *, transposed):
        return super()._packed(rows[-1:] if len(rows) == 1 else rows[:-1], columns, transposed=transposed)


def test_a_forgotten_tap_is_caught():
    with pytest.raises(AssertionError):
        assert_the_references(WithoutItsLastTap, STRIDED, 7, 3, extreme=False)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86 processors")
def test_the_backend_takes_them_where_onednn_saturates_or_is_slower():
    """And so runs all codes of eight bits there."""
    taken = CpuInt8()._packed
    assert taken is (Int8Weight if flaw_of_int8(127) is None and not faster_than_onednn() else NativeWeight)
    assert CpuInt8().refusal(of_integers(127), CPU) is None
