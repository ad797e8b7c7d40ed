# SPDX-License-Identifier: Apache-2.0
"""The backend for int8 instructions of a CPU, and the check that its products are exact on this processor.

It gives the same integers as `reference.ReferenceWeight`. Groups of few channels, as in depthwise convolutions, have
kernels of their own in oneDNN, which are checked apart. No other file calls `torch.ops.onednn`. For weight gradients
it adds these methods, on the native kernels of `native_products.py`, to those of the reference:

    code norms   norm: materialise each G_i on int8 instructions and discard it; sum: as in `code grams`
    recompute    norm: as in `code norms`; sum: materialise each G_i a second time to add it
    code grams   norm: as `grams`, on int8 instructions; sum: on bfloat16 instructions, or else as in `grams`
    grams, recompute   norm: as in `code grams`; sum: as in `recompute`

Symbols: B examples, C input channels, O output channels, G groups, H x W input size.

Sources: oneDNN's int8 convolution through `torch.ops.onednn.qconv2d_pointwise`, which takes activations as uint8 with a
zero point: a code c in -127..127 is passed as c + 128, also in zero padding. All scales are 1, so the result is the
int32 accumulator converted to float32, and the conversion is its only rounding (none below 2^24).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpquant.backends import native_products as native
from dpquant.backends.algebra import in_weight_order
from dpquant.backends.code_weight import CodeWeight
from dpquant.backends.gemm_sum import GemmSum
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Method, Norms, Operands, PackedWeight
from dpquant.backends.native_convolutions import NativeWeight, faster_than_onednn, native_kernels
from dpquant.backends.native_products import INT8_ZERO_POINT
from dpquant.backends.qtensor import QTensor
from dpquant.backends.quantize import quantize_rows
from dpquant.backends.reference import Reference, ReferenceWeight, costs
from dpquant.backends.workarounds import LANES, around_corners
from dpquant.formats import Precision, RoleFormat

_LARGEST_SUM = 2**31 - 1  # that int32 accumulators hold
_LARGEST_CODE = 127  # for which pairs of products saturate where they are summed in 16 bits

Packing = Callable[[QTensor, Geometry, int], PackedWeight]
"""Packs a weight's codes for a geometry; the integer is the largest magnitude of any code."""


class Int8Weight(CodeWeight):
    """A weight whose codes are multiplied on int8 instructions; it is packed for each product on first use."""

    def __init__(self, weight: QTensor, geometry: Geometry, max_code: int):
        del max_code  # int8 instructions are exact for any code, or `flaw_of_int8` finds that they are not
        super().__init__(weight, geometry, _PackedCodes, zero=INT8_ZERO_POINT)


class _PackedCodes:
    """Weight codes `(O, C / G, *kernel)`, packed by oneDNN once per geometry."""

    def __init__(self, codes: Tensor):
        self.codes = codes
        self._scales = torch.ones(codes.shape[0])
        self._zero_points = torch.zeros(codes.shape[0], dtype=torch.int8)
        self._packed: dict[Geometry, Tensor] = {}

    def convolved(self, codes: Tensor, geometry: Geometry) -> Tensor:
        """Convolve uint8 codes (zero point 128) to float32 accumulators `(B, O, H', W')`, channels last."""
        codes, g = around_corners(codes, geometry, zero=INT8_ZERO_POINT)
        if g not in self._packed:
            self._packed[g] = torch.ops.onednn.qconv_prepack(
                self.codes, self._scales, 1.0, INT8_ZERO_POINT, g.stride, g.padding, g.dilation, g.groups, None
            )
        return torch.ops.onednn.qconv2d_pointwise(
            codes, 1.0, INT8_ZERO_POINT, self._packed[g], self._scales, self._zero_points, None,
            g.stride, g.padding, g.dilation, g.groups, 1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip


@functools.cache
def flaw_of_int8(max_code: int, packed: Packing = Int8Weight, *, groups: int = 1) -> str | None:
    """Check that this processor's int8 convolution is exact for codes up to `max_code`, forward and backward.

    The convolution has 64 channels. One of many groups is multiplied by other kernels, and a depthwise one by others
    again.

    Without VNNI or AMX instructions, or with them disabled, pairs of products are summed in 16 bits, which may
    saturate. So the check uses the largest codes, not random ones. The result is cached for the process.

    Returns: None if the products are exact; else the flaw, in words that complete a sentence.
    """
    try:
        generator = torch.Generator().manual_seed(0)
        outputs = 32 if groups == 1 else 64
        geometry = Geometry(kernel=(3, 3), stride=(2, 2), padding=(1, 1), groups=groups)
        signs = torch.randint(0, 2, (2, 64, 9, 9), generator=generator).mul_(2).sub_(1)
        x = QTensor(codes=(signs * max_code).to(torch.int8), scale=torch.ones(2))
        codes = torch.full((outputs, 64 // groups, 3, 3), max_code, dtype=torch.int8)
        weight = QTensor(codes=codes, scale=torch.ones(1))
        grad = QTensor(codes=x.codes[:, :outputs, :5, :5].contiguous(), scale=x.scale)
        exact, fast = ReferenceWeight(weight, geometry, max_code), packed(weight, geometry, max_code)
        forward = torch.equal(fast.forward(_with_zero_point(x), None), exact.forward(x, None))
        backward = torch.equal(fast.input_gradient(_with_zero_point(grad), (9, 9)), exact.input_gradient(grad, (9, 9)))
    except (RuntimeError, AttributeError) as error:  # no such operator in this torch, or none for this processor
        first_line = str(error).partition("\n")[0].rstrip(".")
        return f"does not run ({type(error).__name__}: {first_line})"
    return None if forward and backward else f"is not exact for codes up to {max_code}"


def _with_zero_point(x: QTensor) -> QTensor:
    codes = (x.codes.to(torch.int16) + INT8_ZERO_POINT).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    return QTensor(codes=codes, scale=x.scale, zero_point=INT8_ZERO_POINT)


class CpuInt8(Reference):
    """The backend that multiplies codes on int8 instructions of a CPU; see `interface.Backend`."""

    name = "int8"
    units = ("int8",)
    device_type = "cpu"

    def __init__(self, packed: Packing | None = None):
        """Make a backend whose weights are `packed`; `refusal` checks whether its products are exact here.

        None: by the native kernels on processors with AVX-512 VNNI, or without instructions that sum int8 products in
        32 bits; else by oneDNN.
        """
        self._packing = packed

    @functools.cached_property
    def _packed(self) -> Packing:
        if self._packing is not None:
            return self._packing
        if faster_than_onednn() and flaw_of_int8(_LARGEST_CODE, NativeWeight) is None:
            return NativeWeight
        saturates = flaw_of_int8(_LARGEST_CODE) is not None
        return NativeWeight if saturates and native_kernels() else Int8Weight

    def refusal(self, precision: Precision, device: torch.device) -> str | None:
        if precision.in_blocks:
            return "the recipe has scales per block, which change within an int8 product's sum"
        if not precision.fits_int8:
            return "the recipe's codes are not int8"
        if device.type != "cpu":
            return f"the model is on {device}"
        if flaw := flaw_of_int8(precision.max_code, self._packed):
            return f"this processor's int8 convolution {flaw}"
        return None

    def quantize(self, x: Tensor, role: RoleFormat, row_keys: Tensor) -> QTensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return quantize_rows(x, role, row_keys, zero_point=INT8_ZERO_POINT)

    def pack(self, weight: QTensor, geometry: Geometry, *, max_code: int) -> PackedWeight:
        outputs, kernel = weight.codes.shape[0] // geometry.groups, math.prod(geometry.kernel)
        terms = kernel * max(outputs, weight.codes.shape[1])  # of the longer one of the two products
        if terms * max_code**2 > _LARGEST_SUM:
            return ReferenceWeight(weight, geometry, max_code)
        channels = max(outputs, weight.codes.shape[1])  # of a group
        if self._packing is None and geometry.groups > 1 and channels < LANES:
            # other kernels fill the lanes up with zeros: in a depthwise convolution ours takes 20 times as long as
            # oneDNN's, and 10 times as long as float32
            if flaw_of_int8(max_code, groups=64 if channels == 1 else 16) is None:
                return Int8Weight(weight, geometry, max_code)
            if channels == 1:
                return ReferenceWeight(weight, geometry, max_code)
        return self._packed(weight, geometry, max_code)

    def methods(self, operands: Operands) -> Sequence[Method]:
        *formed, grams = super().methods(operands)
        if operands.quantized is None:
            return [*formed, grams]
        x, g = operands.quantized
        sum = CodeSum if native.has_code_sums(x, operands.geometry) else GemmSum
        grams = dataclasses.replace(grams, sum=sum)
        if native.has_code_products(x, operands.num_positions, operands.geometry):
            formed.append(Method(name="code norms", norms=norms_by_codes, sum=sum))
            formed.append(Method(name="recompute", norms=norms_by_codes, sum=RecomputedSum))
        if native.has_gram_norms(x, g, operands.geometry):
            cost = costs(operands)[1]
            formed.append(Method(name="grams, recompute", norms=norms_by_code_grams, sum=RecomputedSum, cost=cost))
            grams = Method(name="code grams", norms=norms_by_code_grams, sum=sum, cost=cost)
        return [*formed, grams]


def norms_by_codes(operands: Operands) -> Norms:
    """Compute squared norms by materialising each gradient exactly on int8 instructions and discarding it."""
    return Norms(squares_B=native.code_norms(*operands.codes))


def norms_by_code_grams(operands: Operands) -> Norms:
    """Compute squared norms by contracting Gram matrices of codes, exactly, on int8 instructions."""
    return Norms(squares_B=native.gram_norms(*operands.codes))


class CodeSum:
    """An accumulator of products of codes on bfloat16 instructions (AMX or AVX-512), by the native kernel."""

    def __init__(self, operands: Operands):
        self._geometry, self._bf16_terms = operands.geometry, operands.bf16_terms
        self._total = torch.zeros(operands.shapes[1][1], operands.patch_size)

    def add(self, operands: Operands, weights_B: Tensor) -> None:
        native.add_code_sums(*operands.codes, weights_B, self._total, bf16_terms=self._bf16_terms)

    def value(self) -> Tensor:
        return in_weight_order(self._total, self._geometry)


class RecomputedSum:
    """An accumulator that materialises each gradient again on int8 instructions to add it, by the native kernel."""

    def __init__(self, operands: Operands):
        self._geometry = operands.geometry
        self._totals = torch.zeros(torch.get_num_threads(), operands.shapes[1][1], operands.patch_size)

    def add(self, operands: Operands, weights_B: Tensor) -> None:
        native.add_code_products(*operands.codes, weights_B, self._totals)

    def value(self) -> Tensor:
        return in_weight_order(self._totals.sum(0), self._geometry)
