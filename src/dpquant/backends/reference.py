# SPDX-License-Identifier: Apache-2.0
"""The reference backend: the definition of a quantized layer, in plain torch on any device.

Codes are multiplied exactly, as floating-point numbers; every other backend gives the same integers faster. In blocks,
the products of codes with their blocks' scales are exact, and their sum rounds in float32: its last bits depend on the
device's order of summation. The methods for norms and sums of weight gradients are:

    patches   materialise G_i for all examples at once, by a batched matrix product over im2col
    groups    materialise G_i by one convolution whose groups are the examples
    direct    materialise G_i without im2col, by the native kernel
    grams     norm: contract Gram matrices, <x_i x_i^T, g_i g_i^T>; sum: one matrix product over all positions of all
              examples. No tensor of the weight's size exists per example. Best if there are few positions

Symbols: B examples, T positions, D patch size, O output channels, G groups, C channels.
Source: book-keeping, Bu et al., arXiv 2210.00038; Gram norms, Goodfellow, arXiv 1510.01799.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from dpquant.backends import native_products as native
from dpquant.backends.algebra import (
    ROUND_OFF,
    convolved,
    grouped_products,
    im2col,
    input_gradient,
    patch_grams,
    patch_products,
    positions,
    row_norms,
    squares_of_codes,
    squares_of_values,
)
from dpquant.backends.gemm_sum import GemmSum, OuterSum, slices
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Method, Norms, Operands, PackedWeight
from dpquant.backends.precision import bfloat16_factors
from dpquant.backends.qtensor import QTensor, code_values, scaled
from dpquant.backends.quantize import quantize_rows
from dpquant.formats import Precision, RoleFormat

_VECTOR = 16  # channels from which on the native kernel materialises gradients of values faster than a product does
_FLOAT32_EXACT = 2**24  # float32 represents every integer up to this one


class ReferenceWeight:
    """A weight whose codes are multiplied as floating-point numbers, which is exact for integer codes on any device."""

    def __init__(self, weight: QTensor, geometry: Geometry, max_code: int):
        self._codes, self._scale = code_values(weight), weight.scale
        self._geometry = geometry
        self._max_code = max_code  # bounds every partial sum

    def forward(self, x: QTensor, bias: Tensor | None) -> Tensor:
        dtype = _exact_dtype(x, self._codes[0].numel(), self._max_code)
        y = convolved(code_values(x).to(dtype), self._codes.to(dtype), None, self._geometry).float()
        y = scaled(y, x.scale, self._scale)
        return y if bias is None else y.add_(bias[:, None, None])

    def input_gradient(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        out_channels_per_group = self._codes.shape[0] // self._geometry.groups
        terms = out_channels_per_group * self._codes[0, 0].numel()
        dtype = _exact_dtype(grad, terms, self._max_code)
        x = input_gradient(code_values(grad).to(dtype), self._codes.to(dtype), self._geometry, size).float()
        return scaled(x, grad.scale, self._scale)


def _exact_dtype(operand: QTensor, num_terms: int, max_code: int) -> torch.dtype:
    """Return float32 if it represents every partial sum of `num_terms` products, else float64.

    Sums of float8 codes and of codes in blocks are taken in float32, as hardware does, and are not exact. On a GPU
    integers are always multiplied in float64: float32 convolutions may transform them first (Winograd), which is not
    exact.
    """
    if operand.codes.dtype.is_floating_point or operand.block_scale is not None:
        return torch.float32
    in_float32 = num_terms * max_code**2 <= _FLOAT32_EXACT and operand.codes.device.type == "cpu"
    return torch.float32 if in_float32 else torch.float64


class Reference:
    """The backend in plain torch, for any device; see `interface.Backend`."""

    name = "simulate"
    units: tuple[str, ...] = ()
    device_type: str | None = None

    def refusal(self, precision: Precision, device: torch.device) -> str | None:
        return None

    def exactness(self, precision: Precision, device: torch.device) -> str:
        return "exact on this processor"

    def quantize(self, x: Tensor, role: RoleFormat, row_keys: Tensor) -> QTensor:
        return quantize_rows(x.contiguous(memory_format=torch.channels_last), role, row_keys)

    def pack(self, weight: QTensor, geometry: Geometry, *, max_code: int) -> PackedWeight:
        return ReferenceWeight(weight, geometry, max_code)

    def methods(self, operands: Operands) -> Sequence[Method]:
        formed, grams = costs(operands)
        if operands.rank_one:  # O + D multiplications for a norm, where materialising takes O * D
            name, sum = ("grams", GemmSum) if operands.bf16_terms else ("outer", OuterSum)
            return [Method(name=name, norms=norms_by_grams, sum=sum, cost=grams)]
        methods = [
            Method(name="patches", norms=materialise_by_patches, sum=GemmSum, cost=formed),
            Method(name="groups", norms=materialise_by_groups, sum=GemmSum, cost=formed),
            Method(name="grams", norms=norms_by_grams, sum=GemmSum, cost=grams),
        ]
        if native.has_direct_products(_memory(operands)):
            methods.insert(2, Method(name="direct", norms=materialise_directly, sum=GemmSum, cost=formed))
        return methods


def costs(operands: Operands) -> tuple[int, int]:
    """Return the multiply-accumulates of materialising a gradient and of its Gram matrices, both divided by T."""
    outputs, patch = operands.shapes[1][1], operands.patch_size
    return outputs * patch, operands.num_positions * (outputs + patch)


def _memory(operands: Operands) -> Tensor:
    return operands.x.codes if isinstance(operands.x, QTensor) else operands.x


def gradients_of(operands: Operands) -> Tensor:
    """Materialise the gradients, `(B, O, D)` in patch order, by what is usually faster: nothing is timed.

    With less than a vector of channels the native kernel takes up to ten times as long as a product over im2col; with
    more, down to a fifth, and in depthwise convolutions, where its vectors run across the groups, a thirtieth.
    """
    channels, outputs = (shape[1] // operands.geometry.groups for shape in operands.shapes)
    if (channels >= _VECTOR or channels == outputs == 1) and native.has_direct_products(_memory(operands)):
        return _directly(operands)
    return _by_patches(operands)


def _by_patches(operands: Operands) -> Tensor:
    x, g = operands.values
    return patch_products(positions(g, operands.geometry), im2col(x, operands.geometry))


def _directly(operands: Operands) -> Tensor:
    x, g = operands.values
    return native.direct_products(g, x, operands.geometry)


def materialise_by_patches(operands: Operands) -> Norms:
    """Materialise the gradients by a batched matrix product over im2col, in patch order."""
    return _formed(_by_patches(operands), in_patch_order=True)


def materialise_by_groups(operands: Operands) -> Norms:
    """Materialise the gradients by a grouped convolution, in weight order."""
    x, g = operands.values
    return _formed(grouped_products(g, x, operands.geometry), in_patch_order=False)


def materialise_directly(operands: Operands) -> Norms:
    """Materialise the gradients without im2col, by the native kernel, in patch order."""
    return _formed(_directly(operands), in_patch_order=True)


def _formed(gradients: Tensor, *, in_patch_order: bool) -> Norms:
    return Norms(squares_B=row_norms(gradients), gradients=gradients, in_patch_order=in_patch_order)


def norms_by_grams(operands: Operands) -> Norms:
    """Contract Gram matrices, <x_i x_i^T, g_i g_i^T>, in float64, plus a margin for round-off in the Gram matrices.

    On one position they are single numbers, and no margin is needed.
    """
    if operands.num_positions == 1:
        return Norms(squares_B=_squares_on_one_position(operands))
    pieces = slices(operands.geometry, *operands.values)
    return Norms(squares_B=torch.cat([_squares_by_grams(x, g, operands) for x, g in pieces]))


def _squares_on_one_position(operands: Operands) -> Tensor:
    if operands.rank_one:
        x_B, g_B = operands.row_squares
        return x_B * g_B
    (x, g), geometry = operands.values, operands.geometry
    squares_of = squares_of_codes if operands.bf16_terms else squares_of_values
    x_BGD, g_BGO = im2col(x, geometry).squeeze(2), positions(g, geometry).squeeze(2)
    return (squares_of(x_BGD) * squares_of(g_BGO)).sum(1)


def _squares_by_grams(x: Tensor, g: Tensor, operands: Operands) -> Tensor:
    geometry = operands.geometry
    g_BGTO = positions(g, geometry)
    with bfloat16_factors() if operands.bf16_terms else contextlib.nullcontext():
        grams = [_patch_grams(x, geometry).double(), (g_BGTO @ g_BGTO.transpose(2, 3)).double()]
    lengths = [gram.diagonal(dim1=2, dim2=3).sqrt() for gram in grams]
    margin_B = (lengths[0] * lengths[1]).sum((1, 2)).square()
    return (grams[0] * grams[1]).sum((1, 2, 3)) + ROUND_OFF * margin_B


def _patch_grams(x: Tensor, geometry: Geometry) -> Tensor:
    if geometry.stride == (1, 1) and geometry.kernel != (1, 1):
        return patch_grams(x, geometry)
    patches = im2col(x, geometry)  # with a stride or a 1x1 kernel these are not much larger than x
    return patches @ patches.transpose(2, 3)
