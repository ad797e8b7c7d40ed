# SPDX-License-Identifier: Apache-2.0
import dataclasses
import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

from convolutions import codes, convolutions, exactly, shifted
from dpquant.backends import cpu_int8, reference, workarounds
from dpquant.backends.cpu_int8 import Int8Products
from dpquant.backends.geometry import Geometry
from dpquant.backends.qtensor import QTensor
from dpquant.backends.reference import SimulatedProducts
from dpquant.errors import FormatError
from dpquant.machine import Hardware
from processor import LARGEST_CODES, backends_of, int8_runs


def plain(values):
    return QTensor(codes=values, scale=torch.ones(len(values)))


def assert_exact_integers(convolution, max_code, make_products):
    """Both products equal the exact integers, rounded once to float32."""
    geometry, shape, size = convolution
    x = codes((2, shape[1] * geometry.groups, *size), max_code)
    weight = codes(shape, max_code, 1)
    exact = exactly(x, weight, geometry)
    grad = codes(exact.shape, max_code, 2)
    fast, as_operand = make_products(weight, geometry, max_code)
    assert torch.equal(fast.forward(as_operand(x)), exact.float())
    inputs = x.double().requires_grad_()
    (exact_gradient,) = torch.autograd.grad(exactly(inputs, weight, geometry), inputs, grad.double())
    assert torch.equal(fast.input_gradient(as_operand(grad), size), exact_gradient.float())


def simulated(weight, geometry, max_code):
    return SimulatedProducts(plain(weight), geometry, max_code), plain


def int8(weight, geometry, max_code):
    return Int8Products(plain(weight), geometry), shifted


@settings(max_examples=400, deadline=None, derandomize=True)
@given(convolutions(), st.sampled_from([7, 64, 127]))
def test_simulate_and_int8_give_the_exact_integers(convolution, max_code):
    assert_exact_integers(convolution, max_code, simulated)
    if int8_runs(max_code):
        assert_exact_integers(convolution, max_code, int8)


def test_a_wrong_zero_point_is_caught():
    def off_by_one(weight, geometry, max_code):
        def moved(values):
            operand = shifted(values)
            return dataclasses.replace(operand, codes=operand.codes - 1)

        return Int8Products(plain(weight), geometry), moved

    with pytest.raises(AssertionError):
        assert_exact_integers((Geometry(kernel=(3, 3), padding=(1, 1)), (4, 3, 3, 3), (6, 6)), 64, off_by_one)


@pytest.mark.parametrize("max_code", LARGEST_CODES)
def test_sums_beyond_2_to_the_24_are_rounded_alike(max_code):
    odd = max_code - 1 + max_code % 2
    x, weight = (torch.full(s, v, dtype=torch.int8) for s, v in (((1, 512, 4, 4), odd), ((8, 512, 3, 3), max_code)))
    weight[:, 0, 0, 0] = max_code - 1  # so that the exact sum is odd, and no float32
    geometry = Geometry(kernel=(3, 3), padding=(1, 1))
    exact = exactly(x, weight, geometry)
    assert exact.max() > 2**24 and not torch.equal(exact, exact.float().double())
    assert torch.equal(SimulatedProducts(plain(weight), geometry, max_code).forward(plain(x)), exact.float())
    if int8_runs(max_code):
        assert torch.equal(Int8Products(plain(weight), geometry).forward(shifted(x)), exact.float())


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
    torch.testing.assert_close(reference.input_gradient(grad, weight, geometry, size), grad_x)
    torch.testing.assert_close(reference.weight_gradient(grad, x, geometry), grad_weight)
    patches = reference.unfolded(x, geometry)
    each = reference.in_weight_order(reference.patch_products(reference.positions(grad, geometry), patches), geometry)
    for i in range(3):
        torch.testing.assert_close(each[i], reference.weight_gradient(grad[[i]], x[[i]], geometry))
    total = reference.add_patch_products(grad, x, geometry, None)
    total = reference.add_patch_products(grad, x, geometry, total)
    torch.testing.assert_close(reference.in_weight_order(total.flatten(0, 1), geometry), 2 * grad_weight)
    torch.testing.assert_close(reference.grouped_products(grad, x, geometry), each.reshape(3, *shape))


ONE_COLUMN = (Geometry(kernel=(3, 3), stride=(1, 4), padding=(1, 1)), (2, 1, 3, 3), (16, 1))


def assert_convolved_as_in_float64(convolution):
    geometry, shape, size = convolution
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=generator) for s in ((3, shape[1] * geometry.groups, *size), shape))
    x = x.contiguous(memory_format=torch.channels_last)
    found = reference.convolved(x, weight, None, geometry)
    torch.testing.assert_close(found, exactly(x, weight, geometry).float(), rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
@example(ONE_COLUMN)
def test_a_convolution_in_float32_agrees_with_float64(convolution):
    assert_convolved_as_in_float64(convolution)


def test_padding_that_is_not_zero_would_be_seen(monkeypatch):
    monkeypatch.setattr(workarounds, "_padded", lambda x, g, zero: F.pad(x, (1, 1, 1, 1), value=1))
    with pytest.raises(AssertionError):
        assert_convolved_as_in_float64(ONE_COLUMN)


def assert_no_strides_reach_torch(groups, monkeypatch):
    """oneDNN would write beyond its workspace, which is a crash on some machines and nothing to be seen on others."""
    run = reference._convolution_backward

    def watched(grad, x, weight, geometry, *others):
        assert geometry.stride == (1, 1)
        return run(grad, x, weight, geometry, *others)

    monkeypatch.setattr(reference, "_convolution_backward", watched)
    geometry = Geometry(stride=(2, 3), groups=groups)
    x, grad = torch.randn(3, 4 * groups, 7, 8), torch.randn(3, 6 * groups, 4, 3)
    each = reference.patch_products(reference.positions(grad, geometry), reference.unfolded(x, geometry))[
        ..., None, None
    ]
    torch.testing.assert_close(reference.weight_gradient(grad, x, geometry), each.sum(0))
    torch.testing.assert_close(reference.grouped_products(grad, x, geometry), each)


@pytest.mark.parametrize("groups", [1, 2])
def test_weight_gradients_of_strided_1x1_kernels_leave_torch_no_strides(groups, monkeypatch):
    assert_no_strides_reach_torch(groups, monkeypatch)
    monkeypatch.setattr(reference, "visited", lambda x, geometry: (x, geometry))
    with pytest.raises(AssertionError):
        assert_no_strides_reach_torch(groups, monkeypatch)


def assert_no_examples_give_nothing(function):
    """What a batch without examples gives has the form of any other batch's, with no examples."""
    geometry = Geometry(kernel=(3, 2), stride=(2, 1), padding=(1, 0), groups=2)
    some, none = (function(torch.ones(batch, 4, 7, 6), geometry) for batch in (2, 0))
    assert none.shape == (0, *some.shape[1:])


@pytest.mark.parametrize("function", [reference.unfolded, reference.patch_grams])
def test_no_examples_have_no_patches(function):
    assert_no_examples_give_nothing(function)
    with pytest.raises(RuntimeError, match="ambiguous"):  # a size that is left to torch
        assert_no_examples_give_nothing(lambda x, g: function(x, g).flatten(1).reshape(len(x), -1))


@pytest.mark.parametrize("max_code", LARGEST_CODES)
def test_this_machine_either_is_exact_or_refuses_int8(max_code):
    cpu = torch.device("cpu")
    int8_runs(max_code)
    assert cpu_int8.resolve_backend("auto", max_code=448, fits_int8=False, device=cpu) == "simulate"
    assert cpu_int8.resolve_backend("simulate", max_code=max_code, fits_int8=True, device=cpu) == "simulate"


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86 processors")
@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="told to use fewer instructions")
def test_int8_runs_where_the_processor_has_the_instructions():
    """So that a broken int8 backend is no reason to leave out its tests."""
    instructions = Hardware.here().instructions
    if "avx2" in instructions:
        assert cpu_int8.flaw_of_int8(64) is None
        assert backends_of("luq-fp4") == ("simulate", "int8")
    if {"avx512_vnni", "amx_int8"} & set(instructions):
        assert cpu_int8.flaw_of_int8(127) is None
        assert backends_of("int8") == ("simulate", "int8")


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
        cpu_int8.resolve_backend(backend, **facts)


@pytest.fixture
def int8_is_asked_anew():
    cpu_int8.flaw_of_int8.cache_clear()
    yield
    cpu_int8.flaw_of_int8.cache_clear()


def refusal_of_int8(max_code=64):
    with pytest.raises(FormatError) as refusal:
        cpu_int8.resolve_backend("int8", max_code=max_code, fits_int8=True, device=torch.device("cpu"))
    return str(refusal.value)


@pytest.mark.usefixtures("int8_is_asked_anew")
def test_a_wrong_int8_convolution_is_refused(monkeypatch):
    honest = cpu_int8._Int8Weight.convolved
    monkeypatch.setattr(cpu_int8._Int8Weight, "convolved", lambda self, codes, g: honest(self, codes, g) + 1)
    assert "int8 convolution is not exact for codes up to 64. A wrong" in refusal_of_int8()
    assert not int8_runs(64) and backends_of("luq-fp4") == ("simulate",)  # as every test asks


def without_the_operator(self, codes, geometry):
    return torch.ops.onednn.qconv2d_by_another_name(codes)


def without_a_primitive(self, codes, geometry):
    raise RuntimeError("could not create a primitive descriptor.\nA second line.")


@pytest.mark.usefixtures("int8_is_asked_anew")
@pytest.mark.parametrize(
    ("convolved", "words"),
    [
        (without_the_operator, "object has no attribute 'qconv2d_by_another_name'). A wrong"),
        (without_a_primitive, "does not run (RuntimeError: could not create a primitive descriptor). A wrong"),
    ],
)
def test_why_int8_does_not_run_is_told(convolved, words, monkeypatch):
    monkeypatch.setattr(cpu_int8._Int8Weight, "convolved", convolved)
    assert words in refusal_of_int8()
    monkeypatch.setattr(cpu_int8, "flaw_of_int8", lambda max_code: "is missing or not exact")  # a reason that is lost
    assert words not in refusal_of_int8()


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
    for max_code in LARGEST_CODES:
        assert_exact_integers(convolution, max_code, simulated)
        if int8_runs(max_code):
            assert_exact_integers(convolution, max_code, int8)


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


@settings(max_examples=100, deadline=None, derandomize=True)
@given(convolutions())
def test_grams_of_patches_are_sums_of_grams_of_pixels(convolution):
    geometry, shape, size = convolution
    x = codes((2, shape[1] * geometry.groups, *size), 7).double()
    patches = reference.unfolded(x, geometry)
    expected = patches @ patches.transpose(2, 3)
    assert torch.equal(reference.patch_grams(x, geometry), expected)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="about x86 processors")
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI"])
def test_int8_is_exact_or_refused_where_instructions_are_fewer(instructions):
    """Without VNNI, pairs of full-range products saturate; the codes of LUQ-FP4 never do."""
    program = "from dpquant.backends.cpu_int8 import int8_is_exact as exact; print(exact(64), exact(127))"
    told = {**os.environ, "ONEDNN_MAX_CPU_ISA": instructions}
    told_of = subprocess.run(
        [sys.executable, "-c", program], env=told, capture_output=True, text=True, check=True
    ).stdout
    small, full = told_of.split()
    if cpu_int8.int8_is_exact(64):
        assert small == "True"
    if instructions == "AVX2":
        assert full == "False"
