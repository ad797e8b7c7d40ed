# SPDX-License-Identifier: Apache-2.0
"""What every backend promises, as functions that take one and raise AssertionError if it breaks its promise.

Exact answers are float64 sums of integers. `backends/test_conformance.py` runs all of it over all backends.
"""

import dataclasses
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from convolutions import codes, exactly
from dpquant.backends.algebra import ROUND_OFF, in_weight_order
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Backend, Method, Operands
from dpquant.backends.qtensor import QTensor, code_values
from dpquant.backends.quantize import quantize_rows
from dpquant.backends.reference import Reference
from dpquant.backends.registry import refusal, resolve
from dpquant.errors import FormatError
from dpquant.formats import RECIPES, Recipe, RoleFormat, precision, recipe
from dpquant.rounding import row_keys
from processor import CPU, integers_up_to

DEVICES = [CPU, *(torch.device("cuda", i) for i in range(min(torch.cuda.device_count(), 1)))]
ALL_RECIPES = [*RECIPES.values(), recipe("int4,int4@4+,e3m0~"), recipe("e3m0~#,e3m0~,e3m0~")]
PLAIN = (Geometry(kernel=(3, 3), padding=(1, 1)), (4, 3, 3, 3), (6, 6))
Convolution = tuple[Geometry, tuple[int, ...], tuple[int, int]]


def keys_for(count: int, device: torch.device) -> Tensor:
    return row_keys(11, torch.arange(count)).to(device)


def integers(backend: Backend, shape: Sequence[int], max_code: int, device: torch.device, seed: int) -> QTensor:
    """Random codes as a backend holds them, with scale 1."""
    values = codes(shape, max_code, seed).float()
    values.view(len(values), -1)[:, 0] = max_code
    q = backend.quantize(values.to(device), integers_up_to(max_code), keys_for(len(values), device))
    assert torch.equal(code_values(q).cpu(), values) and bool((q.scale == 1).all())
    return q


def whole(weight: Tensor, device: torch.device) -> QTensor:
    """A weight of integers, with scale 1."""
    return QTensor(codes=weight.to(device), scale=torch.ones(1, device=device))


def assert_products_are_exact(
    backend: Backend, convolution: Convolution, max_code: int, device: torch.device = CPU
) -> None:
    """Forward and input gradient are the exact integers, rounded once to float32."""
    geometry, shape, size = convolution
    weight = codes(shape, max_code, 1)
    x = integers(backend, (2, shape[1] * geometry.groups, *size), max_code, device, 0)
    inputs = code_values(x).double().cpu().requires_grad_()
    y = exactly(inputs, weight, geometry)
    grad = integers(backend, y.shape, max_code, device, 2)
    (exact_gradient,) = torch.autograd.grad(y, inputs, code_values(grad).double().cpu())
    packed = backend.pack(whole(weight, device), geometry, max_code=max_code)
    assert torch.equal(packed.forward(x, None).cpu(), y.detach().float())
    assert torch.equal(packed.input_gradient(grad, size).cpu(), exact_gradient.float())


def assert_large_sums_are_rounded_once(backend: Backend, max_code: int, device: torch.device = CPU) -> None:
    """Sums beyond 2^24, which float32 cannot hold."""
    odd, geometry = max_code - 1 + max_code % 2, Geometry(kernel=(3, 3), padding=(1, 1))
    ones = torch.full((1, 512, 4, 4), float(odd), device=device)
    x = backend.quantize(ones, integers_up_to(odd), keys_for(1, device))
    weight = torch.full((8, 512, 3, 3), max_code, dtype=torch.int8)
    weight[:, 0, 0, 0] = max_code - 1  # so that the exact sum is odd, and no float32
    exact = exactly(code_values(x).cpu(), weight, geometry)
    assert exact.max() > 2**24 and not torch.equal(exact, exact.float().double())
    packed = backend.pack(whole(weight, device), geometry, max_code=max_code)
    assert torch.equal(packed.forward(x, None).cpu(), exact.float())


def quantized_weight(weight: Tensor, role: RoleFormat, channels: int) -> QTensor:
    """As a layer quantizes it: one scale, or where the role says so one for each channel of an axis."""
    moved = weight.transpose(0, channels) if role.per_channel else weight[None]
    rows = moved if role.blocks is not None else moved.flatten(1)
    q = quantize_rows(rows, role, keys_for(len(rows), weight.device)).rearranged(lambda part: part.view(moved.shape))
    back = (lambda part: part.transpose(0, channels)) if role.per_channel else (lambda part: part[0])
    return q.rearranged(lambda part: back(part).contiguous())


def assert_equals_the_reference(
    backend: Backend, convolution: Convolution, chosen: Recipe, device: torch.device = CPU
) -> None:
    """Codes, scales and, of integer codes, both products with scales and bias have the reference's bits."""
    geometry, shape, size = convolution
    geometry = dataclasses.replace(geometry, groups=1)  # a weight's input channels are then an axis of its own
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((3, shape[1], *size), shape, shape[:1]))
    grad = torch.randn(exactly(x, weight, geometry).shape, generator=generator)
    keys = keys_for(3, device)
    found = []
    for one in (backend, Reference()):
        activation, gradient = (
            one.quantize(values.to(device), role, keys)
            for values, role in ((x, chosen.activation), (grad, chosen.gradient))
        )
        forward, backward = (
            one.pack(quantized_weight(weight.to(device), chosen.weight, axis), geometry, max_code=chosen.max_code)
            for axis in (0, 1)
        )
        operands = [part for q in (activation, gradient) for part in (code_values(q), q.scale)]
        found.append(
            (operands, [forward.forward(activation, bias.to(device)), backward.input_gradient(gradient, size)])
        )
    (operands, products), (expected_operands, expected_products) = found
    assert all(torch.equal(a, b) for a, b in zip(operands, expected_operands, strict=True))
    for product, expected in zip(products, expected_products, strict=True):
        assert torch.equal(product, expected) if chosen.fits_int8 else torch.allclose(product, expected, rtol=1e-4)


def quantized_operands(backend: Backend, convolution: Convolution, max_code: int, device: torch.device) -> Operands:
    """Five examples' codes, as a layer hands them to a backend's methods."""
    geometry, shape, size = convolution
    x = integers(backend, (5, shape[1] * geometry.groups, *size), max_code, device, 0)
    y = exactly(code_values(x).cpu(), torch.zeros(shape), geometry)
    g = integers(backend, y.shape, max_code, device, 2)
    return Operands(x=x, g=g, geometry=geometry.cropped(size)[0], bf16_terms=2)


def plain_operands(convolution: Convolution, device: torch.device) -> Operands:
    """The same of values."""
    geometry, shape, size = convolution
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, shape[1] * geometry.groups, *size, generator=generator)
    g = torch.randn(exactly(x, torch.zeros(shape), geometry).shape, generator=generator)
    x, g = (t.to(device).contiguous(memory_format=torch.channels_last) for t in (x, g))
    return Operands(x=x, g=g, geometry=geometry.cropped(size)[0])


def exact_gradients(operands: Operands) -> Tensor:
    """Each example's own, float64 `(B, O, C / G, *kernel)`, by autograd."""
    x, g = (t.double().cpu() for t in operands.values)
    shape = (g.shape[1], x.shape[1] // operands.geometry.groups, *operands.geometry.kernel)
    weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    each = [
        torch.autograd.grad(exactly(x[[i]], weight, operands.geometry), weight, g[[i]])[0] for i in range(len(operands))
    ]
    return torch.stack(each)


def assert_norms_are_never_below(backend: Backend, operands: Operands) -> None:
    """Every method's norms are those of float64, never less, and more by round-off alone."""
    squares_B = exact_gradients(operands).square().flatten(1).sum(1)
    x, g = (t.double().cpu() for t in operands.values)
    most_B = x.flatten(1).square().sum(1) * g.flatten(1).square().sum(1) * math.prod(operands.geometry.kernel)
    # terms that cancel leave round-off that is relative to most_B; of codes there is none
    slack_B = 0 if operands.quantized else 2.0**-20 * (squares_B * most_B).sqrt()
    for method in backend.methods(operands):
        found_B = method.norms(operands).squares_B.cpu()
        assert found_B.dtype == torch.float64 and found_B.shape == squares_B.shape, method.name
        # less by no more than factors are rounded down
        assert bool((found_B >= squares_B * (1 - ROUND_OFF) - slack_B).all()), method.name
        assert bool((found_B <= squares_B + 3 * ROUND_OFF * most_B).all()), method.name


def weighted_sum(method: Method, operands: Operands, weights_B: Tensor) -> Tensor:
    """What a method adds up over three microbatches, as the engine asks it to; of the second no row is finite."""
    total, accumulator = torch.zeros(()), None
    for rows, kept in (([0, 3], [0, 1]), ([4, 2], []), ([4, 1, 2], [2, 0, 1])):
        part, kept = operands.take(torch.tensor(rows)), torch.tensor(kept, dtype=torch.int64)
        norms, weights = method.norms(part), weights_B[rows][kept]
        if norms.gradients is None:
            accumulator = accumulator or method.sum(part)
            accumulator.add(part.take(kept), weights)
            total = accumulator.value()
        else:
            each = in_weight_order(norms.gradients, part.geometry) if norms.in_patch_order else norms.gradients
            total = total.to(each.device) + torch.einsum("b,bocij->ocij", weights, each[kept])
    return total


def assert_sums_are_exact(backend: Backend, operands: Operands) -> None:
    """Every method's weighted sum of small codes has no round-off."""
    weights_B = torch.tensor([0.5, -1.0, 0.0, 0.25, 1.5])
    expected = torch.einsum("b,bocij->ocij", weights_B.double(), exact_gradients(operands))
    names = [method.name for method in backend.methods(operands)]
    assert names and len(set(names)) == len(names)
    for method in backend.methods(operands):
        found = weighted_sum(method, operands, weights_B.to(operands.values[0].device))
        assert found.dtype == torch.float32 and torch.equal(found.double().cpu(), expected), method.name


def assert_sums_over_several_sizes_are_exact(backend: Backend, several: Sequence[Operands]) -> None:
    """A sum takes microbatches of every size that has its method, as texts of different lengths, in any order."""
    weights_B = torch.tensor([0.5, -1.0, 0.0, 0.25, 1.5])
    for method in backend.methods(several[0]):
        alike = [one for one in several if method.name in [other.name for other in backend.methods(one)]]
        total = method.sum(alike[0])
        for one in alike:
            total.add(one, weights_B.to(one.values[0].device))
        expected = sum(torch.einsum("b,bocij->ocij", weights_B.double(), exact_gradients(one)) for one in alike)
        assert torch.equal(total.value().double().cpu(), expected), method.name


def results_of_rows(backend: Backend, x: Tensor, ids: Tensor, chosen: Recipe) -> list[Tensor]:
    """Codes, scales and products of some rows: of activations forward, of output gradients backward."""
    geometry = Geometry(kernel=(3, 3), padding=(1, 1))
    weight = torch.randn(4, 4, 3, 3, generator=torch.Generator().manual_seed(0)).to(x.device)
    keys = row_keys(11, ids).to(x.device)
    activation, gradient = (backend.quantize(x, role, keys) for role in (chosen.activation, chosen.gradient))
    forward, backward = (
        backend.pack(quantized_weight(weight, chosen.weight, axis), geometry, max_code=chosen.max_code)
        for axis in (0, 1)
    )
    products = forward.forward(activation, weight[:, 0, 0, 0]), backward.input_gradient(gradient, x.shape[2:])
    return [code_values(activation), activation.scale, code_values(gradient), gradient.scale, *products]


def some_rows(device: torch.device) -> Tensor:
    """Five rows, one of them without negative values."""
    x = torch.randn(5, 4, 6, 5, generator=torch.Generator().manual_seed(1)).to(device)
    x[3] = x[3].abs()
    return x


def same(a: Tensor, b: Tensor, chosen: Recipe) -> bool:
    """Bit for bit; sums of float8 codes to round-off."""
    return torch.equal(a, b) if chosen.fits_int8 else torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def assert_rows_stand_alone(backend: Backend, chosen: Recipe, device: torch.device = CPU) -> None:
    """A row's codes, scale and products are the same in any company, in any place, and alone."""
    x, ids = some_rows(device), torch.arange(5)
    clean = results_of_rows(backend, x, ids, chosen)
    louder, silent = x.clone(), x.clone()
    louder[1:] *= 1e4
    silent[1:] = 0
    everybody = list(range(5))
    for batch, rows, compared in (
        (louder, everybody, [0]),
        (silent, everybody, [0]),
        (x, [4, 0], [4, 0]),
        (x, [2], [2]),
    ):
        found = results_of_rows(backend, batch[rows], ids[rows], chosen)
        for before, after in zip(clean, found, strict=True):
            assert same(after[: len(compared)], before[compared], chosen)


def assert_rows_that_are_not_finite_stay_alone(backend: Backend, chosen: Recipe, device: torch.device = CPU) -> None:
    """Such a row's products are NaN; all others keep theirs."""
    x, ids = some_rows(device), torch.arange(5)
    clean = results_of_rows(backend, x, ids, chosen)
    others = [0, 1, 3, 4]
    for value in (math.nan, math.inf, -math.inf):
        spoilt = x.clone()
        spoilt[2, 1, 3, 3] = value
        found = results_of_rows(backend, spoilt, ids, chosen)
        for before, after in zip(clean, found, strict=True):
            assert same(after[others], before[others], chosen)
        assert all(bool(product[2].isnan().all()) for product in found[-2:])


def assert_refusals_are_told(backend: Backend, others: Sequence[torch.device] = (torch.device("meta"),)) -> None:
    """A refusal is one clause, which stands in the one error that a user gets; without one nothing is raised."""
    for chosen in map(precision, ALL_RECIPES):
        for device in (*DEVICES, *others):
            reason = backend.refusal(chosen, device)
            assert reason == refusal(backend, [chosen], device)
            if reason is None:
                assert resolve(backend, [chosen], device) is backend
                continue
            assert reason and reason == reason.strip() and reason[0].islower() and reason[-1] != "."
            assert "\n" not in reason and ". " not in reason
            with pytest.raises(FormatError) as error:
                resolve(backend, [chosen], device)
            assert f"but {reason}. " in str(error.value) and "Expected" in str(error.value)
