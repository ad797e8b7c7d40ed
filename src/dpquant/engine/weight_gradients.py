# SPDX-License-Identifier: Apache-2.0
"""The per-example gradients of a layer's weight, from the layer's operands, in the way that is fastest here.

    G_i = s_i sum_t g_it x_it^T          x_it: the patch of the input that output position t sees

There are these ways to the squared norms and to the sum of c_i G_i:

    grams       <x_i x_i^T, g_i g_i^T> is the squared norm; the sum is one matrix product over all positions of all
                examples. Nothing of the weight's size exists per example: best where there are few positions.
    code grams  as `grams`, with the norm on int8 instructions, exactly, by the native kernel
    patches     form G_i, for all examples at once, by a batched product of unfolded inputs
    groups      form G_i by one convolution whose groups are the examples
    direct      form G_i straight from the maps, by the native kernel
    recompute   where the operands are codes, form G_i on int8 instructions, by the native kernel, twice: once for its
                norm, once to be added; it is never kept
    code norms  norms as in `recompute`; the sum as in `grams`

Which one is taken is measured, once for every shape, on made-up operands (`backends/choose.py`). Norm and sum belong to
the same operands and, where the layer is quantized, to the same codes: there the factor c_i s_i is rounded down to a
bfloat16, on every backend and in every way, so that a factor times a code is a sum of one or two bfloat16 numbers and
the matrix product can run on them, exactly.

Symbols: B examples, T positions, D patch size, O output channels, G groups, C channels.
Source: book-keeping, Bu et al., arXiv 2210.00038; Gram norms, Goodfellow, arXiv 1510.01799.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dpquant.backends.choose import fastest
from dpquant.backends.geometry import Geometry
from dpquant.backends.native_products import (
    add_code_products,
    add_code_sums,
    code_norms,
    direct_products,
    folded,
    gram_norms,
    has_code_products,
    has_code_sums,
    has_direct_products,
    has_gram_norms,
)
from dpquant.backends.qtensor import QTensor
from dpquant.backends.reference import (
    bfloat16_factors,
    code_values,
    grouped_products,
    in_weight_order,
    patch_grams,
    patch_products,
    positions,
    unfolded,
)
from dpquant.engine.contributions import ROUND_OFF, Contribution, Formed, distances
from dpquant.engine.summed import WaitingSum, slices

_CLEAR = 3  # times the multiplications: a way that needs so many more is not tried


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the gradients of some kernel taps belong in a weight.

    Attributes:
      shape: of the weight, `(O, C / G, *kernel)` or `(O, C)`.
      kernel: of the weight.
      taps: rows and columns of the kernel that the gradients are of; the others' are zero.
    """

    shape: torch.Size
    kernel: tuple[int, int]
    taps: tuple[slice, slice]

    def filled(self, gradients: Tensor) -> Tensor:
        """`(..., O, C / G, *taps)` -> `(..., *shape)`."""
        (top, bottom), (left, right) = (
            (taps.start, size - taps.stop) for taps, size in zip(self.taps, self.kernel, strict=True)
        )
        full = F.pad(gradients, (left, right, top, bottom)) if top or bottom or left or right else gradients
        return full.reshape(*gradients.shape[:-4], *self.shape)


@dataclasses.dataclass
class FormedProduct(Formed):
    """Weight gradients that exist already, of values or of codes without their scales.

    Attributes:
      gradients: `(B, ...)` in the weight's order, or `(B, O, D)` in patch order where a geometry is given.
      scale_B: of the codes; None: values.
      geometry: whose patch order it is.
      weight: where they belong.
    """

    scale_B: Tensor | None
    geometry: Geometry | None
    weight: Place

    def squared_norms(self) -> Tensor:
        return _times_squares(super().squared_norms(), self.scale_B)

    def per_example(self) -> Tensor:
        gradients = self.weight.filled(self._in_order(self.gradients))
        return gradients if self.scale_B is None else gradients * self.scale_B.view(-1, *[1] * (gradients.ndim - 1))

    def add_weighted(self, weights_B: Tensor, total: Tensor | None) -> Tensor:
        return super().add_weighted(scaled_weights(weights_B, self.scale_B), total)

    def finished(self, total: Tensor) -> Tensor:
        return self.weight.filled(self._in_order(total))

    def take(self, rows: Tensor) -> "FormedProduct":
        return dataclasses.replace(
            self,
            gradients=self.gradients[rows],
            scale_B=None if self.scale_B is None else self.scale_B[rows],
        )

    def _in_order(self, products: Tensor) -> Tensor:
        return products if self.geometry is None else in_weight_order(products, self.geometry)


@dataclasses.dataclass
class Product:
    """Weight gradients as their operands: G_i = scale_i * sum_t g_it x_it^T.

    Attributes:
      operands: x and g, values or codes, channels last: `(B, C, H, W)` and `(B, O, H', W')`.
      pieces: how many bfloat16 numbers add up to a factor times a code of g; 0 for values, which are not rounded.
      geometry: how the taps walk over x.
      weight: where the gradients belong.
      norms_B: ||G_i||^2 of the codes, if known.
    """

    operands: tuple[Tensor, Tensor] | tuple[QTensor, QTensor]
    pieces: int
    geometry: Geometry
    weight: Place
    norms_B: Tensor | None = None

    @classmethod
    def of(
        cls,
        x: Tensor | QTensor,
        g: Tensor | QTensor,
        geometry: Geometry,
        shape: torch.Size,
        *,
        significant_bits: int | None,
    ) -> "Product":
        """From a layer's operands, both quantized or neither. geometry, shape: the layer's and its weight's.
        significant_bits: of g's codes, if it has any.
        """
        if isinstance(x, QTensor) and isinstance(g, QTensor):
            # eight bits of the factor and one of the code are eight; and eight and up to seven fit in two eights
            operands, pieces = (x, g), 1 if significant_bits == 1 else 2
        else:
            # detached: the graph holds the tape, so that a tape that held the graph would never be freed
            x, g = (code_values(t).detach().contiguous(memory_format=torch.channels_last) for t in (x, g))
            operands, pieces = (x, g), 0
        height, width = _shape(x)[2:]
        met, taps = geometry.trimmed((height, width))
        return cls(operands, pieces, met, Place(shape, geometry.kernel, taps))

    @functools.cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """Both operands as float32: values or integer codes."""
        return code_values(self.operands[0]), code_values(self.operands[1])

    @property
    def scale_B(self) -> Tensor | None:
        """Of the product of codes; None: values."""
        x, g = self.operands
        return x.scale * g.scale if isinstance(x, QTensor) and isinstance(g, QTensor) else None

    def squared_norms(self) -> Tensor:
        """By Gram matrices: <x_i x_i^T, g_i g_i^T>, summed in float64, with a margin for the Grams' own round-off."""
        if self.norms_B is not None:
            return _times_squares(self.norms_B, self.scale_B)
        total_B = torch.cat([self._by_grams(x, g) for x, g in slices(self.geometry, *self.values)])
        return _times_squares(total_B, self.scale_B)

    def _by_grams(self, x: Tensor, g: Tensor) -> Tensor:
        g_BGTO = positions(g, self.geometry)
        if g_BGTO.shape[2] == 1:
            squares = [t.double().square().sum((2, 3)) for t in (unfolded(x, self.geometry), g_BGTO)]
            return (squares[0] * squares[1]).sum(1)
        with bfloat16_factors() if self.pieces else contextlib.nullcontext():
            grams = [self._patch_grams(x).double(), (g_BGTO @ g_BGTO.transpose(2, 3)).double()]
        lengths = [gram.diagonal(dim1=2, dim2=3).sqrt() for gram in grams]
        margin_B = (lengths[0] * lengths[1]).sum((1, 2)).square()
        return (grams[0] * grams[1]).sum((1, 2, 3)) + ROUND_OFF * margin_B

    def _patch_grams(self, x: Tensor) -> Tensor:
        if self.geometry.stride == (1, 1) and self.geometry.kernel != (1, 1):
            return patch_grams(x, self.geometry)
        patches = unfolded(x, self.geometry)  # not much larger than x itself
        return patches @ patches.transpose(2, 3)

    def per_example(self) -> Tensor:
        return self.by_patches().per_example()

    def inner_products(self, other: Contribution) -> Tensor:
        """With another product: by what their positions share, or by forming both, whichever multiplies less."""
        if not isinstance(other, Product):
            return (self.per_example() * other.per_example()).flatten(1).sum(1)
        ours, theirs = (
            (unfolded(x, self.geometry), positions(g, self.geometry)) for x, g in (self.values, other.values)
        )
        (x_BGTD, g_BGTO), (x2_BGTD, g2_BGTO) = ours, theirs
        num_positions, inputs, outputs = x_BGTD.shape[2], x_BGTD.shape[3], g_BGTO.shape[3]
        if num_positions * (inputs + outputs) < 2 * inputs * outputs:
            shared = (x_BGTD @ x2_BGTD.transpose(2, 3)) * (g_BGTO @ g2_BGTO.transpose(2, 3))
        else:
            shared = (g_BGTO.transpose(2, 3) @ x_BGTD) * (g2_BGTO.transpose(2, 3) @ x2_BGTD)
        products_B = shared.sum((1, 2, 3))
        for scale_B in (self.scale_B, other.scale_B):
            products_B = products_B if scale_B is None else products_B * scale_B
        return products_B

    def squared_distances(self, other: Contribution) -> Tensor:
        """With another product: by what all positions of both share, or by forming the difference, in float64."""
        if not isinstance(other, Product):
            return distances(self, other)
        x, g = [], []
        for product, sign in ((self, 1.0), (other, -1.0)):
            x.append(unfolded(product.values[0].double(), product.geometry))
            scale = sign if product.scale_B is None else sign * product.scale_B.double()[:, None, None, None]
            g.append(positions(product.values[1].double() * scale, product.geometry))
        x_BGTD, g_BGTO = torch.cat(x, 2), torch.cat(g, 2)
        num_positions, inputs, outputs = x_BGTD.shape[2], x_BGTD.shape[3], g_BGTO.shape[3]
        if num_positions * (inputs + outputs) < 2 * inputs * outputs:
            squares = (x_BGTD @ x_BGTD.transpose(2, 3)) * (g_BGTO @ g_BGTO.transpose(2, 3))
        else:
            squares = (g_BGTO.transpose(2, 3) @ x_BGTD).square()
        return squares.sum((1, 2, 3)).clamp(min=0)  # round-off

    def add_weighted(self, weights_B: Tensor, total: Any) -> Any:
        factors_B = scaled_weights(weights_B, self.scale_B)
        if isinstance(self.operands[0], QTensor) and has_code_sums(self.operands[0], self.geometry):
            g, x, walk = self._codes
            return add_code_sums(g, x, walk, factors_B, total, pieces=self.pieces)
        x, g = self.values
        total = WaitingSum(x, g, self.geometry, self.pieces) if total is None else total
        total.add(x, g * factors_B[:, None, None, None])
        return total

    def finished(self, total: Any) -> Tensor:
        sums = total.value() if isinstance(total, WaitingSum) else in_weight_order(total, self.geometry)
        return self.weight.filled(sums)

    def take(self, rows: Tensor) -> "Product":
        x, g = self.operands
        if isinstance(x, QTensor) and isinstance(g, QTensor):
            operands = x.take(rows), g.take(rows)
        else:
            operands = code_values(x)[rows], code_values(g)[rows]
        norms_B = None if self.norms_B is None else self.norms_B[rows]
        return dataclasses.replace(self, operands=operands, norms_B=norms_B)

    def by_patches(self) -> FormedProduct:
        """The gradients themselves, by a batched product."""
        x, g = self.values
        return self._formed(patch_products(positions(g, self.geometry), unfolded(x, self.geometry)))

    def by_groups(self) -> FormedProduct:
        """The gradients themselves, by a grouped convolution."""
        x, g = self.values
        return FormedProduct(grouped_products(g, x, self.geometry), self.scale_B, None, self.weight)

    def directly(self) -> FormedProduct:
        """The gradients themselves, without unfolding, by the native kernel."""
        x, g = self.values
        return self._formed(direct_products(g, x, self.geometry))

    def normed_by_codes(self) -> "Product":
        """The operands, with the norms of the gradients on int8 instructions."""
        self.norms_B = code_norms(*self._codes)
        return self

    def normed_by_grams(self) -> "Product":
        """The operands, with the norms by Gram matrices on int8 instructions."""
        self.norms_B = gram_norms(*self._codes)
        return self

    def recomputed(self) -> "Recomputed":
        """The operands, whose products are made on int8 instructions once for the norms and once for the sum."""
        return Recomputed(self.operands, self.pieces, self.geometry, self.weight, self.normed_by_codes().norms_B)

    def ways(self) -> dict[str, Callable[["Product"], Contribution]]:
        """The forms that can be taken here and are not clearly slower than another."""
        ways: dict[str, Callable[[Product], Contribution]] = {
            "patches": Product.by_patches,
            "groups": Product.by_groups,
            "direct": Product.directly,
            "code norms": Product.normed_by_codes,
            "recompute": Product.recomputed,
            "code grams": Product.normed_by_grams,
            "grams": lambda product: product,
        }
        x, g = self.operands
        channels, num_positions, outputs = _shape(x)[1], math.prod(_shape(g)[2:]), _shape(g)[1]
        grams = {"grams"}
        if isinstance(x, QTensor) and isinstance(g, QTensor):
            able = {"direct"} if has_direct_products(x.codes) else set()
            able |= {"code norms", "recompute"} if has_code_products(x, num_positions, self.geometry) else set()
            grams = {"code grams"} if has_gram_norms(x, g, self.geometry) else grams
        else:
            able = {"direct"} if has_direct_products(code_values(x)) else set()
        patch = channels // self.geometry.groups * math.prod(self.geometry.kernel)
        gram_cost, formed_cost = num_positions * (outputs + patch), outputs * patch
        if gram_cost <= _CLEAR * formed_cost:
            able |= grams
        if _CLEAR * gram_cost < formed_cost:
            able &= grams | {"code norms", "recompute"}
        else:
            able |= {"patches", "groups"}
        return {name: way for name, way in ways.items() if name in able}

    def fastest(self) -> Contribution:
        """The same gradients in the form whose norms and sum take the least time here."""
        ways, shapes = self.ways(), (*map(_shape, self.operands), self.pieces)
        question = ("per-example weight gradients", self.geometry, shapes, tuple(ways), torch.get_num_threads())
        return ways[fastest(question, {name: partial(self._try, way) for name, way in ways.items()})](self)

    def _formed(self, products: Tensor) -> FormedProduct:
        return FormedProduct(products, self.scale_B, self.geometry, self.weight)

    @functools.cached_property
    def _codes(self) -> tuple[Tensor, Tensor, Geometry]:
        """The codes of g and of x, and the walk over x, as the native kernels take them."""
        x, g = self.operands
        assert isinstance(x, QTensor) and isinstance(g, QTensor)
        return g.codes, *folded(x.codes, self.geometry)

    def _try(self, way: Callable[["Product"], Contribution]) -> None:
        """All that a form is asked for, on made-up operands of these shapes."""
        operands = cast(Any, tuple(map(_made_up, self.operands)))
        contribution = way(Product(operands, self.pieces, self.geometry, self.weight))
        contribution.squared_norms()
        contribution.finished(contribution.add_weighted(torch.ones(_shape(operands[0])[0]), None))


def _shape(operand: Tensor | QTensor) -> torch.Size:
    return operand.shape if isinstance(operand, Tensor) else operand.codes.shape


def _made_up(operand: Tensor | QTensor) -> Tensor | QTensor:
    """An operand of the same shape, type and layout, all ones."""
    if isinstance(operand, Tensor):
        return torch.ones_like(operand)
    ones = torch.ones_like(operand.codes, dtype=torch.uint8).to(operand.codes.dtype)
    return dataclasses.replace(operand, codes=ones, scale=torch.ones_like(operand.scale))


class Recomputed(Product):
    """Operands with known norms, whose products are formed again to be added up."""

    def add_weighted(self, weights_B: Tensor, total: Any) -> Any:
        return add_code_products(*self._codes, scaled_weights(weights_B, self.scale_B), total)

    def finished(self, total: Any) -> Tensor:
        return self.weight.filled(in_weight_order(total.sum(0), self.geometry))


def scaled_weights(weights_B: Tensor, scale_B: Tensor | None) -> Tensor:
    """The factors of codes: w_i s_i, rounded towards zero to a bfloat16; without scales, w_i itself."""
    if scale_B is None:
        return weights_B
    return ((weights_B * scale_B).view(torch.int32) & -(2**16)).view(torch.float32)


def _times_squares(norms_B: Tensor, scale_B: Tensor | None) -> Tensor:
    return norms_B if scale_B is None else norms_B * scale_B.double().square()
