# SPDX-License-Identifier: Apache-2.0
"""What every backend promises, tried on all of `registry.BACKENDS` that run here, and on doubles that break it.

A new backend needs nothing here but its line in the registry. The backend for GPUs is tried on the CPU too, on units
that stand in for a GPU's. Exact answers are float64 sums of integers.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

import dpquant
from conformance import (
    ALL_RECIPES,
    DEVICES,
    PLAIN,
    assert_equals_the_reference,
    assert_large_sums_are_rounded_once,
    assert_norms_are_never_below,
    assert_products_are_exact,
    assert_refusals_are_told,
    assert_rows_stand_alone,
    assert_rows_that_are_not_finite_stay_alone,
    assert_sums_are_exact,
    assert_sums_over_several_sizes_are_exact,
    plain_operands,
    quantized_operands,
)
from convolutions import convolutions
from dpquant.backends.algebra import ROUND_OFF, convolved, input_gradient
from dpquant.backends.cpu_int8 import CpuInt8, Int8Weight
from dpquant.backends.doubles import OffByOne, SharedScale, Wrapped
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Backend, Norms, Operands
from dpquant.backends.qtensor import QTensor, code_values, scaled
from dpquant.backends.reference import Reference
from dpquant.backends.registry import BACKENDS
from dpquant.formats import RECIPES, precision
from dpquant.runs import ranges
from networks import loss, zoo
from processor import CPU, LARGEST_CODES, of_integers
from units import EXACT, backend_of, taking_turns

Where = tuple[Backend, torch.device]

TRIED = [*BACKENDS.values(), CpuInt8(Int8Weight), backend_of(*EXACT)]  # oneDNN, where native kernels are taken


@pytest.fixture(autouse=True, scope="module")
def every_way_in_turn():
    with taking_turns():
        yield


def running(chosen) -> list[Where]:
    """The backends that run a precision here, and where."""
    pairs = [(backend, device) for backend in TRIED for device in DEVICES]
    return [(backend, device) for backend, device in pairs if backend.refusal(precision(chosen), device) is None]


def cases(chosen: Sequence) -> list:
    """(what is chosen, backend, device) for every backend that runs it."""
    return [
        pytest.param(one, backend, device, id=f"{getattr(one, 'name', one)}-{backend.name}-{device}")
        for one in chosen
        for backend, device in running(of_integers(one) if isinstance(one, int) else one)
    ]


CORNERS = [  # where oneDNN has been seen to err, large kernels, single pixels, remainders
    (Geometry(kernel=(2, 1), stride=(1, 3), padding=(1, 1), groups=2), (2, 4, 2, 1), (3, 1)),
    (Geometry(kernel=(2, 2), padding=(0, 1), dilation=(1, 2)), (1, 1, 2, 2), (2, 1)),
    (Geometry(kernel=(3, 3), stride=(2, 2), dilation=(1, 2)), (3, 4, 3, 3), (12, 5)),
    (Geometry(), (5, 3, 1, 1), (1, 1)),
    (Geometry(kernel=(5, 5), padding=(2, 2)), (4, 3, 5, 5), (1, 1)),
    (Geometry(kernel=(5, 1), padding=(6, 3), stride=(3, 2)), (4, 3, 5, 1), (7, 5)),
    (Geometry(kernel=(1, 5), stride=(4, 4), groups=5), (5, 1, 1, 5), (11, 13)),
    (Geometry(kernel=(5, 3), dilation=(2, 3), padding=(4, 3), stride=(2, 2)), (2, 2, 5, 3), (10, 9)),
]


@pytest.mark.parametrize(("max_code", "backend", "device"), cases([7, *LARGEST_CODES]))
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(convolution=convolutions())
def test_products_are_exact(backend, device, max_code, convolution):
    assert_products_are_exact(backend, convolution, max_code, device)


@pytest.mark.parametrize("convolution", CORNERS, ids=str)
@pytest.mark.parametrize(("max_code", "backend", "device"), cases(LARGEST_CODES))
def test_products_of_odd_geometries_are_exact(backend, device, max_code, convolution):
    assert_products_are_exact(backend, convolution, max_code, device)


@pytest.mark.parametrize(("max_code", "backend", "device"), cases(LARGEST_CODES))
def test_large_sums_are_rounded_once(backend, device, max_code):
    assert_large_sums_are_rounded_once(backend, max_code, device)


@pytest.mark.parametrize(("chosen", "backend", "device"), cases(ALL_RECIPES))
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(convolution=convolutions())
def test_codes_and_products_equal_the_references(backend, device, chosen, convolution):
    assert_equals_the_reference(backend, convolution, chosen, device)


@pytest.mark.parametrize(("max_code", "backend", "device"), cases([7, *LARGEST_CODES]))
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(convolution=convolutions())
def test_norms_of_codes_are_never_below(backend, device, max_code, convolution):
    assert_norms_are_never_below(backend, quantized_operands(backend, convolution, max_code, device))


@pytest.mark.parametrize(("max_code", "backend", "device"), cases([7]))
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(convolution=convolutions())
def test_norms_of_values_are_never_below(backend, device, max_code, convolution):
    assert_norms_are_never_below(backend, plain_operands(convolution, device))


@pytest.mark.parametrize(("max_code", "backend", "device"), cases([7]))
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(convolution=convolutions())
def test_sums_of_small_codes_are_exact(backend, device, max_code, convolution):
    assert_sums_are_exact(backend, quantized_operands(backend, convolution, max_code, device))


@pytest.mark.parametrize("codes", [True, False])
@pytest.mark.parametrize(("max_code", "backend", "device"), cases([7]))
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(convolution=convolutions(), taller=st.integers(1, 9), wider=st.integers(0, 3))
def test_sums_over_several_sizes_are_exact(backend, device, max_code, codes, convolution, taller, wider):
    geometry, shape, (height, width) = convolution
    sizes = [(height, width), (height + taller, width + wider), (height + taller, width + wider), (height, width)]
    several = [quantized_operands(backend, (geometry, shape, size), max_code, device) for size in sizes]
    if not codes:
        several = [of_values(one) for one in several]
    hypothesis.assume(several[0].geometry == several[1].geometry)  # others have a sum of their own
    assert_sums_over_several_sizes_are_exact(backend, several)


def of_values(operands: Operands) -> Operands:
    """The same numbers, not as codes."""
    x, g = (one.contiguous(memory_format=torch.channels_last) for one in operands.values)
    return Operands(x=x, g=g, geometry=operands.geometry)


@pytest.mark.parametrize(("chosen", "backend", "device"), cases(ALL_RECIPES))
def test_rows_stand_alone(backend, device, chosen):
    assert_rows_stand_alone(backend, chosen, device)


@pytest.mark.parametrize(("chosen", "backend", "device"), cases(ALL_RECIPES))
def test_rows_that_are_not_finite_stay_alone(backend, device, chosen):
    assert_rows_that_are_not_finite_stay_alone(backend, chosen, device)


@pytest.mark.parametrize("backend", TRIED, ids=[backend.name for backend in TRIED])
def test_refusals_are_told(backend):
    assert_refusals_are_told(backend)


def test_backends_are_known_by_their_names_here_and_on_the_command_line():
    assert all(backend.name == name for name, backend in BACKENDS.items())
    assert ("auto", *BACKENDS) == ranges.BACKENDS


# ---------------------------------------------------------------------------------------- who breaks it is found out

INT8_RECIPE = RECIPES["luq-fp4"]
HONEST = [pytest.param(backend, id=backend.name) for backend, device in running(INT8_RECIPE) if device == CPU]


@pytest.mark.parametrize("honest", HONEST)
def test_a_scale_over_the_batch_is_caught(honest):
    double = SharedScale(honest)
    assert_products_are_exact(double, PLAIN, 7)  # it multiplies as it should
    with pytest.raises(AssertionError):
        assert_rows_stand_alone(double, INT8_RECIPE)
    with pytest.raises(AssertionError):
        assert_rows_that_are_not_finite_stay_alone(double, INT8_RECIPE)
    with pytest.raises(AssertionError):
        assert_equals_the_reference(double, PLAIN, INT8_RECIPE)


@pytest.mark.parametrize("honest", HONEST)
def test_products_and_sums_that_are_off_by_one_are_caught(honest):
    double = OffByOne(honest)
    assert_rows_stand_alone(double, INT8_RECIPE)  # it keeps rows apart
    for broken in (
        lambda: assert_products_are_exact(double, PLAIN, 7),
        lambda: assert_large_sums_are_rounded_once(double, 64),
        lambda: assert_equals_the_reference(double, PLAIN, INT8_RECIPE),
    ):
        with pytest.raises(AssertionError):
            broken()
    operands = quantized_operands(double, PLAIN, 7, CPU)
    assert_norms_are_never_below(double, operands)
    for method in double.methods(operands):
        with pytest.raises(AssertionError, match=method.name):
            assert_sums_are_exact(Only(double, method.name), operands)


class OneSize(Wrapped):
    """Its sums leave out what has another size than the first microbatch."""

    def methods(self, operands):
        return [dataclasses.replace(one, sum=partial(LeavesOut, one.sum)) for one in self.inner.methods(operands)]


class LeavesOut:
    def __init__(self, sum, operands):
        self._inner, self._shapes = sum(operands), operands.shapes
        self.value = self._inner.value

    def add(self, operands, weights_B):
        if operands.shapes == self._shapes:
            self._inner.add(operands, weights_B)


@pytest.mark.parametrize("honest", HONEST)
def test_sums_of_one_size_are_caught(honest):
    geometry, shape, (height, width) = PLAIN
    several = [quantized_operands(honest, (geometry, shape, (height + more, width)), 7, CPU) for more in (0, 3, 0)]
    assert_sums_over_several_sizes_are_exact(honest, several)
    with pytest.raises(AssertionError):
        assert_sums_over_several_sizes_are_exact(OneSize(honest), several)


class Only(Wrapped):
    """Has one of the methods."""

    def __init__(self, inner, method):
        super().__init__(inner)
        self._method = method

    def methods(self, operands):
        return [one for one in self.inner.methods(operands) if one.name == self._method]


class BackwardOffByOne(OffByOne):
    """Wrong in the input gradient alone."""

    def pack(self, weight, geometry, *, max_code):
        packed = super().pack(weight, geometry, max_code=max_code)
        packed.forward = self.inner.pack(weight, geometry, max_code=max_code).forward
        return packed


def test_an_input_gradient_that_is_off_by_one_is_caught():
    with pytest.raises(AssertionError):
        assert_products_are_exact(BackwardOffByOne(Reference()), PLAIN, 7)


class Shortened(Wrapped):
    """Every method's norms are too short, or too long, by a factor."""

    def __init__(self, inner, factor):
        super().__init__(inner)
        self._factor = factor

    def methods(self, operands):
        def norms(method):
            def times(operands):
                found = method.norms(operands)
                return Norms(squares_B=found.squares_B * self._factor, gradients=found.gradients)

            return times

        return [dataclasses.replace(one, norms=norms(one)) for one in self.inner.methods(operands)]


@pytest.mark.parametrize("honest", HONEST)
@pytest.mark.parametrize("factor", [1 - 2 * ROUND_OFF, 2.0])
def test_norms_that_are_below_or_far_above_are_caught(honest, factor):
    operands = quantized_operands(honest, (Geometry(), (4, 3, 1, 1), (1, 1)), 7, CPU)  # one position: nothing cancels
    assert_norms_are_never_below(honest, operands)
    for method in honest.methods(operands):
        with pytest.raises(AssertionError, match=method.name):
            assert_norms_are_never_below(Shortened(Only(honest, method.name), factor), operands)


class Forgetful(Wrapped):
    """Zeroes what is not finite: the row counts, and its own result says nothing."""

    def quantize(self, x, role, row_keys):
        return self.inner.quantize(x.nan_to_num(0, 0, 0), role, row_keys)


def test_rows_that_are_mended_in_silence_are_caught():
    with pytest.raises(AssertionError):
        assert_rows_that_are_not_finite_stay_alone(Forgetful(Reference()), INT8_RECIPE)


class Refusing(Wrapped):
    """Refuses everything, in words of its own."""

    def __init__(self, inner, words):
        super().__init__(inner)
        self._words = words

    def refusal(self, precision, device):
        return self._words


def test_a_refusal_in_several_sentences_is_caught():
    assert_refusals_are_told(Refusing(Reference(), "the moon is full"))
    for words in ("The moon is full", "the moon is full.", "it is full. Wait", "two\nlines", ""):
        with pytest.raises(AssertionError):
            assert_refusals_are_told(Refusing(Reference(), words))


# ----------------------------------------------------------------------------------------- a backend of a dozen lines


class Float64Weight:
    def __init__(self, weight: QTensor, geometry: Geometry):
        self._codes, self._scale, self._geometry = code_values(weight).double(), weight.scale, geometry

    def forward(self, x: QTensor, bias: Tensor | None) -> Tensor:
        y = convolved(code_values(x).double(), self._codes, None, self._geometry).float()
        return scaled(y, x.scale, self._scale) + (0 if bias is None else bias[:, None, None])

    def input_gradient(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        x = input_gradient(code_values(grad).double(), self._codes, self._geometry, size).float()
        return scaled(x, grad.scale, self._scale)


class Float64(Reference):
    name = "float64"

    def pack(self, weight: QTensor, geometry: Geometry, *, max_code: int) -> Float64Weight:
        return Float64Weight(weight, geometry)


def test_a_backend_of_a_dozen_lines_keeps_every_promise():
    mine = Float64()
    for convolution in (*CORNERS, PLAIN):
        for max_code in (7, *LARGEST_CODES):
            assert_products_are_exact(mine, convolution, max_code)
            assert_norms_are_never_below(mine, quantized_operands(mine, convolution, max_code, CPU))
        assert_norms_are_never_below(mine, plain_operands(convolution, CPU))
        assert_sums_are_exact(mine, quantized_operands(mine, convolution, 7, CPU))
    assert_large_sums_are_rounded_once(mine, 127)
    for chosen in ALL_RECIPES:
        assert_equals_the_reference(mine, PLAIN, chosen)
        assert_rows_stand_alone(mine, chosen)
        assert_rows_that_are_not_finite_stay_alone(mine, chosen)
    assert_refusals_are_told(mine)


@pytest.mark.parametrize("name", ["strided", "residual", "positions"])
def test_a_model_is_clipped_on_a_backend_of_a_dozen_lines(name):
    sums = []
    for backend in (Float64(), "simulate"):
        model, batch = zoo()[name]
        model = dpquant.prepare(model, backend=backend)
        layers = dpquant.quantizable_layers(model)
        assert {type(layer.backend) for layer in layers.values()} == {type(BACKENDS.get(backend, backend))}
        dpquant.set_policy(model, list(layers))
        ids = torch.arange(len(batch[1]))
        sums.append(dpquant.clipped_sum(model, loss, batch, max_grad_norm=0.1, record_ids=ids, step=0, seed=0).grads)
    for parameter, ours in sums[0].items():
        torch.testing.assert_close(ours, sums[1][parameter], rtol=1e-5, atol=1e-7)
