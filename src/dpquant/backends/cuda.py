# SPDX-License-Identifier: Apache-2.0
"""The backend for tensor cores of a GPU. It gives the same integers as `reference.ReferenceWeight`.

Every product of codes runs on a carrier (`carriers.py`) that has passed its check on this device; of those the fastest
for the shape is taken. If none has passed for a length, the product runs in float64. Of weight gradients

    patches   materialise G_i by batched products of codes over im2col
    grams     norm: contract Gram matrices of codes, <x_i x_i^T, g_i g_i^T>; sum: as below

are summed, where no G_i is materialised, by matrix products over the positions of many examples, with the factors
c_i s_i folded into g: exactly one or two bfloat16 terms (`Operands.bf16_terms`), added up in float32.

Where Triton runs, its kernels compete with these: a product of int8 codes without im2col, scales and bias included
(`triton/conv.py`), and norms of gradients that are formed tile by tile and never stored (`triton/norms.py`):

    code norms, value norms   norm: by the kernel; sum: as above

Symbols: B examples, T positions, C input channels, O output channels, G groups, D patch size, N products, M rows,
K terms, L columns.
Source: book-keeping, Bu et al., arXiv 2210.00038; Gram norms, Goodfellow, arXiv 1510.01799.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from dpquant.backends import triton
from dpquant.backends.algebra import ROUND_OFF, im2col, in_weight_order, positions, row_norms
from dpquant.backends.carriers import (
    CARRIERS,
    Carrier,
    flaw_of,
    flaw_of_convolution,
    in_patches,
    out_size,
    unfolded,
)
from dpquant.backends.choose import fastest, place
from dpquant.backends.code_weight import CodeWeight
from dpquant.backends.gemm_sum import GemmSum
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Method, Norms, Operands, PackedWeight, SumKernel
from dpquant.backends.qtensor import QTensor
from dpquant.backends.reference import Reference, costs, norms_by_grams
from dpquant.formats import Precision

_AT_ONCE = 2**28  # bytes of im2col output, or of Gram matrices, formed at a time
_SUMMED_AT_ONCE = 2**14  # positions that one product adds up: a tensor core rounds every partial sum towards zero
_USUAL_TERMS = 1024  # of the products by which it is decided whether the backend runs at all
_ANY_CODE = 127  # bounds the codes of weight gradients, whose formats are not told

_FLOAT64 = Carrier(
    name="float64", dtype=torch.float64, max_code=2**10, largest_sum=2**53, unit=torch.bmm
)  # exact on any device, and slow on most: where nothing else is


class Cuda(Reference):
    """The backend that multiplies codes on tensor cores; see `interface.Backend`."""

    name = "cuda"
    units = ("int8",)

    def __init__(self, carriers: Sequence[Carrier] = CARRIERS, device_type: str = "cuda", *, kernels: bool = True):
        """Make a backend of these carriers for devices of this type; tests bring stand-ins for the CPU.

        Args:
          carriers: units that multiply codes.
          device_type: of the devices that have them.
          kernels: whether Triton's kernels are used, where they run.
        """
        self._carriers, self.device_type, self._kernels = tuple(carriers), device_type, kernels

    def refusal(self, precision: Precision, device: torch.device) -> str | None:
        if device.type != self.device_type:
            return f"the model is on {device}"
        if not precision.fits_int8:
            return "the recipe's codes are not int8"
        max_code = max(precision.max_code, 1)
        if not self._exact(device, max_code, _USUAL_TERMS):
            return f"no unit of this device multiplies its codes exactly ({self._flaws(device, max_code)})"
        return None

    def exactness(self, precision: Precision, device: torch.device) -> str:
        max_code = max(precision.max_code, 1)
        names = ", ".join(carrier.name for carrier in self._exact(device, max_code, _USUAL_TERMS))
        flaws = self._flaws(device, max_code)
        return f"exact on {names}" + (f" (not used: {flaws})" if flaws else "")

    def pack(self, weight: QTensor, geometry: Geometry, *, max_code: int) -> PackedWeight:
        carried = CodeWeight(weight, geometry, partial(_CarriedCodes, self, geometry.groups, max_code), zero=0)
        if not self._has_kernels(weight.codes.device):
            return carried
        from dpquant.backends.triton import conv

        if conv.refusal(tuple(weight.codes.shape), geometry.groups, max_code) is not None:
            return carried
        layouts = {"carriers": carried, "kernel": conv.TritonWeight(weight, geometry, max_code)}
        return _FastestWeight(layouts, (geometry, tuple(weight.codes.shape), max_code))

    def methods(self, operands: Operands) -> Sequence[Method]:
        return [*self._methods_of_kernels(operands), *self._methods_of_carriers(operands)]

    def _has_kernels(self, device: torch.device) -> bool:
        return self._kernels and triton.refusal(device) is None

    def _methods_of_kernels(self, operands: Operands) -> Sequence[Method]:
        if not self._has_kernels(operands.device):
            return []
        from dpquant.backends.triton import norms

        if norms.has_code_norms(operands):
            return [Method(name="code norms", norms=norms.code_norms, sum=self._sum_kernel(operands))]
        if norms.has_value_norms(operands):
            return [Method(name="value norms", norms=norms.value_norms, sum=GemmSum)]
        return []

    def _methods_of_carriers(self, operands: Operands) -> Sequence[Method]:
        if operands.quantized is None:
            return super().methods(operands)
        formed, grams = costs(operands)
        return [
            Method(name="patches", norms=self._materialise, sum=self._sum_kernel(operands), cost=formed),
            Method(name="grams", norms=self._norms_by_grams, sum=self._sum_kernel(operands), cost=grams),
        ]

    def exact(self, device: torch.device, max_code: int, terms: int) -> Sequence[Carrier]:
        """Return the carriers that multiply codes up to `max_code` exactly over this many terms; at least one."""
        return self._exact(device, max_code, terms) or [_FLOAT64]

    def _exact(self, device: torch.device, max_code: int, terms: int) -> list[Carrier]:
        length = 1 << (terms - 1).bit_length()
        return [carrier for carrier in self._carriers if flaw_of(carrier, device, max_code, length) is None]

    def _flaws(self, device: torch.device, max_code: int) -> str:
        flaws = {carrier.name: flaw_of(carrier, device, max_code, _USUAL_TERMS) for carrier in self._carriers}
        return "; ".join(f"{name} {flaw}" for name, flaw in flaws.items() if flaw)

    def _products(self, a: Tensor, b: Tensor) -> Tensor:
        """Multiply codes `(N, M, K)` by codes `(N, K, L)` on the fastest carrier: exact, rounded once to float32."""
        carriers = {one.name: one for one in self.exact(a.device, _ANY_CODE, a.shape[2])}
        key = ("products of codes", (*a.shape[1:], b.shape[2]), tuple(carriers), *place(a.device))
        trials = {name: partial(_try_products, carrier, a, b) for name, carrier in carriers.items()}
        return carriers[fastest(key, trials)].exact_products(a, b, _ANY_CODE)

    def _materialise(self, operands: Operands) -> Norms:
        x, g = _codes(operands)
        patches_BGTD, g_BGTO = im2col(x, operands.geometry), positions(g, operands.geometry)
        products = self._products(g_BGTO.transpose(2, 3).flatten(0, 1), patches_BGTD.flatten(0, 1))
        gradients_BOD = products.unflatten(0, (len(x), -1)).flatten(1, 2)
        return Norms(squares_B=row_norms(gradients_BOD), gradients=gradients_BOD, in_patch_order=True)

    def _norms_by_grams(self, operands: Operands) -> Norms:
        """Contract Gram matrices, which are exact but for one rounding; the margin covers it, and that of the terms."""
        if operands.num_positions == 1:
            return norms_by_grams(operands)  # without products
        (x, g), geometry = _codes(operands), operands.geometry
        bytes_of_one = operands.num_positions * (operands.patch_size + 8 * operands.num_positions) * geometry.groups
        step = max(_AT_ONCE // bytes_of_one, 1)
        parts = zip(x.split(step), g.split(step), strict=True)
        return Norms(squares_B=torch.cat([self._squares_by_grams(*part, geometry) for part in parts]))

    def _squares_by_grams(self, x: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
        grams = [self._gram(rows_BGTD) for rows_BGTD in (im2col(x, geometry), positions(g, geometry))]
        lengths = [gram.diagonal(dim1=2, dim2=3).double().sqrt() for gram in grams]
        margin_B = (lengths[0] * lengths[1]).sum((1, 2)).square()
        # in float64 as they are read: a float64 copy would take longer than the sum
        return (grams[0] * grams[1]).sum((1, 2, 3), dtype=torch.float64) + ROUND_OFF * margin_B

    def _gram(self, rows_BGTD: Tensor) -> Tensor:
        rows_NTD = rows_BGTD.flatten(0, 1)
        return self._products(rows_NTD, rows_NTD.transpose(1, 2)).unflatten(0, rows_BGTD.shape[:2])

    def _sum_kernel(self, operands: Operands) -> SumKernel:
        """Return sums on bfloat16 units where they are exact for codes; else in float32, whose inputs are not rounded.

        The engine sums where float32 products are IEEE's.
        """
        carriers = self._exact(operands.device, _ANY_CODE, _USUAL_TERMS)
        bf16 = next((carrier for carrier in carriers if carrier.dtype == torch.bfloat16), None)
        return GemmSum if bf16 is None else partial(CarriedSum, bf16)


def _codes(operands: Operands) -> tuple[Tensor, Tensor]:
    """Return the codes of x and g."""
    assert operands.quantized is not None
    x, g = operands.quantized
    return x.codes, g.codes


def _try_products(carrier: Carrier, a: Tensor, b: Tensor) -> None:
    """Multiply synthetic operands of these shapes and layouts, to be timed."""
    carrier.exact_products(torch.ones_like(a), torch.ones_like(b), _ANY_CODE)


class _FastestWeight:
    """A weight in several layouts that give the same bits; of each product's shape the fastest one is used."""

    def __init__(self, layouts: Mapping[str, PackedWeight], facts: tuple[Hashable, ...]):
        self._layouts, self._facts = layouts, facts

    def forward(self, x: QTensor, bias: Tensor | None) -> Tensor:
        return self._product(("forward", bias is None), x, lambda weight, x: weight.forward(x, bias))

    def input_gradient(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        return self._product(("input gradient", size), grad, lambda weight, grad: weight.input_gradient(grad, size))

    def _product(
        self, which: tuple[Hashable, ...], operand: QTensor, multiply: Callable[[PackedWeight, QTensor], Tensor]
    ) -> Tensor:
        key = ("product of codes", *which, *self._facts, tuple(operand.codes.shape), *place(operand.codes.device))
        ones = functools.cache(lambda: dataclasses.replace(operand, codes=torch.ones_like(operand.codes)))
        trials = {name: lambda weight=weight: multiply(weight, ones()) for name, weight in self._layouts.items()}
        return multiply(self._layouts[fastest(key, trials)], operand)


class _CarriedCodes:
    """Weight codes that are convolved on the fastest of the exact carriers; see `code_weight.PackedCodes`."""

    def __init__(self, backend: Cuda, groups: int, max_code: int, codes: Tensor):
        self.codes = codes
        self._backend, self._groups, self._max_code = backend, groups, max_code
        self._known_ways: dict[tuple[torch.Size, Geometry], dict[str, partial[Tensor]]] = {}

    def convolved(self, codes: Tensor, geometry: Geometry) -> Tensor:
        if codes.numel() == 0:
            shape, layout = (len(codes), len(self.codes), *out_size(codes, geometry)), torch.channels_last
            return torch.empty(shape, device=codes.device, memory_format=layout)
        if (codes.shape, geometry) not in self._known_ways:
            self._known_ways[codes.shape, geometry] = self._ways(codes.shape, codes.device, geometry)
        ways = self._known_ways[codes.shape, geometry]
        facts = (codes.shape[1:], self.codes.shape, self._max_code, tuple(ways), *place(codes.device))
        key: Hashable = ("convolution of codes", geometry, *facts)
        ones = functools.cache(lambda: torch.ones_like(codes))
        trials = {name: lambda way=way: way(ones(), geometry) for name, way in ways.items()}
        return ways[fastest(key, trials)](codes, geometry)

    def _ways(self, shape: torch.Size, device: torch.device, geometry: Geometry) -> dict[str, partial[Tensor]]:
        """Return {name: a function of codes and geometry} of all exact ways to convolve codes of this shape."""
        terms = self.codes[0].numel()
        exact = self._backend.exact(device, self._max_code, terms)
        ways = {carrier.name: partial(self._unfolded, carrier) for carrier in exact}
        for carrier in exact:
            if not carrier.can_convolve(self.codes.shape[1], geometry, self._max_code):
                continue
            shapes = (shape, self.codes.shape)
            if flaw_of_convolution(carrier, exact[0], device, self._max_code, shapes, geometry) is None:
                ways[f"{carrier.name} convolution"] = partial(self._directly, carrier)
        return ways

    def _unfolded(self, carrier: Carrier, codes: Tensor, geometry: Geometry) -> Tensor:
        step = max(_AT_ONCE // (self.codes[0].numel() * geometry.groups * codes[0, 0].numel()), 1)
        parts = [unfolded(carrier, some, self._in_patches, geometry, self._max_code) for some in codes.split(step)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _directly(self, carrier: Carrier, codes: Tensor, geometry: Geometry) -> Tensor:
        return carrier.exact_convolution(codes, self.codes, geometry, self._max_code)

    @functools.cached_property
    def _in_patches(self) -> Tensor:
        return in_patches(self.codes, self._groups)


class CarriedSum:
    """An accumulator of products of codes on bfloat16 units, with the examples' factors folded into g."""

    def __init__(self, carrier: Carrier, operands: Operands, /):
        self._carrier, self._geometry, self._bf16_terms = carrier, operands.geometry, operands.bf16_terms
        outputs = operands.shapes[1][1] // operands.geometry.groups
        shape = (operands.geometry.groups, outputs, operands.patch_size)
        self._total = torch.zeros(shape, device=operands.device)

    def add(self, operands: Operands, weights_B: Tensor) -> None:
        (x, g), positions_of_one = _codes(operands), operands.num_positions
        if g.numel() == 0:
            return
        step = max(_SUMMED_AT_ONCE // positions_of_one, 1)
        for some_x, some_g, weights in zip(x.split(step), g.split(step), weights_B.split(step), strict=True):
            patches_GND = im2col(some_x, self._geometry).transpose(0, 1).flatten(1, 2)
            weighted_GON = (
                positions(some_g.float() * weights[:, None, None, None], self._geometry).permute(1, 3, 0, 2).flatten(2)
            )
            for _ in range(self._bf16_terms):
                term = weighted_GON.bfloat16()
                self._total += self._carrier.products(term, patches_GND)
                weighted_GON = weighted_GON - term.float()

    def value(self) -> Tensor:
        return in_weight_order(self._total.flatten(0, 1), self._geometry)
