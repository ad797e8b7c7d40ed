# SPDX-License-Identifier: Apache-2.0
"""Per-example gradients of a layer's weight in lazy form, with norm and sum by the fastest method on this machine.

    G_i = s_i sum_t g_it x_it^T          x_it: the receptive field of output position t

A backend has several methods for the squared norms ||G_i||^2 and the sum of c_i G_i (`backends/interface.py`). The
fastest one is chosen by timing them on synthetic operands, once per shape (`backends/choose.py`). Norm and sum use the
same operands and, if the layer is quantized, the same codes. For codes, every backend and method rounds the factor
c_i s_i down to a bfloat16. A factor times a code is then exactly a sum of one or two bfloat16 numbers, on which matrix
products can run without further rounding of their inputs.

Symbols: B examples, T positions, D patch size, O output channels, G groups, C channels.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dpquant.backends.algebra import im2col, in_weight_order, positions, row_norms
from dpquant.backends.choose import fastest, place
from dpquant.backends.geometry import Geometry
from dpquant.backends.interface import Accumulator, Backend, Method, Norms, Operands, shape_of
from dpquant.backends.qtensor import Operand, QTensor, code_values
from dpquant.backends.reference import costs, gradients_of, norms_by_grams
from dpquant.engine.contributions import Contribution, DenseSum, Materialised, WeightedSum, distances, rows_or_zero
from dpquant.engine.weight_layout import WeightLayout

_AT_ONCE = 2**24  # elements of gradients that are materialised at a time for their norms, 64 MiB
_HOPELESS = 3  # a method with more than this times the multiplications of the cheapest one is not timed


@dataclasses.dataclass(frozen=True)
class KernelCrop:
    """Scatters gradients of a cropped kernel into the full weight; zero elsewhere.

    Attributes:
      layout: where the weight lies in its parameter.
      kernel: (height, width) of the full kernel.
      taps: rows and columns of the kernel that the gradients belong to.
    """

    layout: WeightLayout
    kernel: tuple[int, int]
    taps: tuple[slice, slice]

    def full(self, gradients: Tensor) -> Tensor:
        """Return gradients `(..., O, C / G, *taps)` as gradients of the parameter."""
        (top, bottom), (left, right) = (
            (taps.start, size - taps.stop) for taps, size in zip(self.taps, self.kernel, strict=True)
        )
        full = F.pad(gradients, (left, right, top, bottom)) if top or bottom or left or right else gradients
        return self.layout.full(full)


@dataclasses.dataclass(kw_only=True)
class MaterialisedWeightGradient(Materialised):
    """Weight gradients that a norm kernel has materialised: products of values, or of codes without their scales.

    Attributes:
      gradients: `(B, O, C / G, *taps)`, or `(B, O, D)` in patch order if `patches` is given.
      squares_B: squared norms of `gradients`, as they are stored.
      scale_B: each example's scale of the products of codes, `(B,)`; None: products of values.
      patches: the geometry that defines the patch order; None: weight order.
      crop: the part of the weight that the gradients belong to.
    """

    scale_B: Tensor | None
    patches: Geometry | None
    crop: KernelCrop

    @property
    def kind(self) -> Hashable:
        return type(self), self.patches, self.crop.layout.rows

    def squared_norms(self) -> Tensor:
        return _times_squares(super().squared_norms(), self.scale_B)

    def per_example(self) -> Tensor:
        gradients = _in_weight(self.gradients, self.patches, self.crop)
        return _scaled(gradients, self.scale_B)

    def begin_sum(self) -> DenseSum:
        return DenseSum(self.gradients, partial(_in_weight, patches=self.patches, crop=self.crop))

    def tensors(self) -> Sequence[Tensor]:
        return (self.gradients,) if self.scale_B is None else (self.gradients, self.scale_B)

    def factors(self, weights_B: Tensor) -> Tensor:
        return scaled_weights(weights_B, self.scale_B)

    def take(self, rows: Tensor) -> "MaterialisedWeightGradient":
        scale_B = None if self.scale_B is None else self.scale_B[rows]
        return dataclasses.replace(super().take(rows), scale_B=scale_B)

    def masked(self, keep_B: Tensor) -> "MaterialisedWeightGradient":
        if self.scale_B is None:
            return dataclasses.replace(self, gradients=rows_or_zero(keep_B, self.gradients))
        return dataclasses.replace(self, scale_B=rows_or_zero(keep_B, self.scale_B))  # codes are finite


def _scaled(gradients: Tensor, scale_B: Tensor | None) -> Tensor:
    return gradients if scale_B is None else gradients * scale_B.view(-1, *[1] * (gradients.ndim - 1))


def _in_weight(gradients: Tensor, patches: Geometry | None, crop: KernelCrop) -> Tensor:
    return crop.full(gradients if patches is None else in_weight_order(gradients, patches))


@dataclasses.dataclass(kw_only=True)
class LazyWeightGradient:
    """Weight gradients in lazy form: stored as their operands, and materialised only on request.

    Attributes:
      operands: x and g.
      crop: the part of the weight that the gradients belong to.
      backend: supplies the methods for norm and sum.
      method: the method by which the norms were computed; None before `evaluated` or `by`.
      squares_B: squared norms without scales, float64 `(B,)`; None before `evaluated` or `by`.
    """

    operands: Operands
    crop: KernelCrop
    backend: Backend
    method: Method | None = None
    squares_B: Tensor | None = None

    @classmethod
    def of(
        cls,
        x: Operand,
        g: Operand,
        geometry: Geometry,
        layout: WeightLayout,
        *,
        backend: Backend,
        significant_bits: int,
    ) -> "LazyWeightGradient":
        """Make the weight gradients of one call of a layer. If only one of x and g is codes, both are used as values.

        Args:
          x: input of the layer.
          g: gradient of its output.
          geometry: of the layer.
          layout: of its weight.
          backend: of the layer.
          significant_bits: of g's codes; not used for values.
        """
        bf16_terms = 0
        if isinstance(x, QTensor) and isinstance(g, QTensor):
            # a bfloat16 has 8 significant bits: factor (8 bits) times code (1 bit) fits in one, times 7 bits in two
            bf16_terms = 1 if significant_bits == 1 else 2
        else:
            # detached: the autograd graph refers to the tape, so a tape that refers to the graph is never freed
            x, g = (code_values(t).detach().contiguous(memory_format=torch.channels_last) for t in (x, g))
        height, width = shape_of(x)[2:]
        cropped, taps = geometry.cropped((height, width))
        operands = Operands(x=x, g=g, geometry=cropped, bf16_terms=bf16_terms)
        return cls(operands=operands, crop=KernelCrop(layout, geometry.kernel, taps), backend=backend)

    def methods(self) -> dict[str, Method]:
        """Return {name: method} of the methods that support the operands and are not clearly slower than another."""
        methods = self.backend.methods(self.operands)
        least = min((method.cost for method in methods if method.cost is not None), default=0.0)
        return {one.name: one for one in methods if one.cost is None or one.cost <= _HOPELESS * least}

    def evaluated(self) -> "LazyWeightGradient | MaterialisedWeightGradient":
        """Compute the norms by the method whose norms and sum together take the least time on this machine."""
        methods, operands = self.methods(), self.operands
        if len(methods) == 1:
            return self.by(*methods.values())
        shapes = (*operands.shapes, operands.bf16_terms)
        facts = (operands.geometry, shapes, tuple(methods), torch.get_num_threads(), *place(operands.device))
        key = ("per-example weight gradients", *facts)
        trials = {name: partial(self._try, method) for name, method in methods.items()}
        return self.by(methods[fastest(key, trials)])

    def by(self, method: Method) -> "LazyWeightGradient | MaterialisedWeightGradient":
        """Compute the norms by a method. The result is materialised if the method materialises gradients."""
        norms = method.norms(self.operands)
        if norms.gradients is not None:
            return self._materialised(norms.gradients, norms)
        return dataclasses.replace(self, method=method, squares_B=norms.squares_B)

    def _materialised(self, gradients: Tensor, norms: Norms) -> "MaterialisedWeightGradient":
        return MaterialisedWeightGradient(
            gradients=gradients,
            squares_B=norms.squares_B,
            scale_B=self.operands.scale_B,
            patches=self.operands.geometry if norms.in_patch_order else None,
            crop=self.crop,
        )

    def _try(self, method: Method) -> None:
        """Compute norms and sum by a method on synthetic operands of these shapes, to be timed."""
        synthetic = dataclasses.replace(self, operands=self.operands.synthetic(), squares_B=None)
        part = synthetic.by(method)
        norms_B = part.squared_norms()
        total = cast(WeightedSum[Any], part.begin_sum())
        total.add(part, torch.ones_like(norms_B, dtype=torch.float32))
        total.value()

    @property
    def kind(self) -> Hashable:
        method = None if self.method is None else self.method.name
        return type(self), method, self.operands.geometry, self.crop.layout.rows

    def squared_norms(self) -> Tensor:
        squares_B = self.squares_B
        if squares_B is None:
            formed, grams = costs(self.operands)
            if grams <= formed:
                squares_B = norms_by_grams(self.operands).squares_B
            else:
                squares_B = torch.cat([row_norms(gradients_of(self.operands.take(rows))) for rows in self._few()])
        return _times_squares(squares_B, self.operands.scale_B)

    def per_example(self) -> Tensor:
        gradients = _in_weight(gradients_of(self.operands), self.operands.geometry, self.crop)
        return _scaled(gradients, self.operands.scale_B)

    def inner_products(self, other: Contribution) -> Tensor:
        """Contract Gram matrices between the positions of both, or materialise both, whichever multiplies less."""
        if not isinstance(other, LazyWeightGradient) or self.crop != other.crop:
            return (self.per_example() * other.per_example()).flatten(1).sum(1)
        ones = (self.operands,) if other is self else (self.operands, other.operands)
        inputs, outputs = self.operands.patch_size, self.operands.shapes[1][1] // self.operands.geometry.groups
        if self.operands.num_positions * (inputs + outputs) < 2 * inputs * outputs:
            pairs = [(im2col(x, one.geometry), positions(g, one.geometry)) for one in ones for x, g in (one.values,)]
            (x_BGTD, g_BGTO), (x2_BGTD, g2_BGTO) = pairs[0], pairs[-1]
            shared = (x_BGTD @ x2_BGTD.transpose(2, 3)) * (g_BGTO @ g2_BGTO.transpose(2, 3))
            products_B = shared.sum((1, 2, 3))
        else:
            pieces = ([gradients_of(one.take(rows)) for one in ones] for rows in self._few())
            products_B = torch.cat([(piece[0] * piece[-1]).sum((1, 2)) for piece in pieces])
        for scale_B in (self.operands.scale_B, other.operands.scale_B):
            products_B = products_B if scale_B is None else products_B * scale_B
        return products_B

    def _few(self) -> Sequence[Tensor]:
        """Return the numbers of all examples, a few at a time, whose gradients are not kept."""
        return torch.arange(len(self.operands), device=self.operands.device).split(
            max(_AT_ONCE // costs(self.operands)[0], 1)
        )

    def squared_distances(self, other: Contribution) -> Tensor:
        """Compute in float64, by Gram matrices over the positions of both or by materialising the difference."""
        if not isinstance(other, LazyWeightGradient) or self.crop != other.crop:
            return distances(self, other)
        x, g = [], []
        for operands, sign in ((self.operands, 1.0), (other.operands, -1.0)):
            x.append(im2col(operands.values[0].double(), operands.geometry))
            scale = sign if operands.scale_B is None else sign * operands.scale_B.double()[:, None, None, None]
            g.append(positions(operands.values[1].double() * scale, operands.geometry))
        x_BGTD, g_BGTO = torch.cat(x, 2), torch.cat(g, 2)
        num_positions, inputs, outputs = x_BGTD.shape[2], x_BGTD.shape[3], g_BGTO.shape[3]
        if num_positions * (inputs + outputs) < 2 * inputs * outputs:
            squares = (x_BGTD @ x_BGTD.transpose(2, 3)) * (g_BGTO @ g_BGTO.transpose(2, 3))
        else:
            squares = (g_BGTO.transpose(2, 3) @ x_BGTD).square()
        return squares.sum((1, 2, 3)).clamp(min=0)  # round-off may make it negative

    def tensors(self) -> Sequence[Tensor]:
        scale_B = self.operands.scale_B
        return self.operands.values if scale_B is None else (*self.operands.values, scale_B)

    def begin_sum(self) -> "WeightSum":
        method = self.method or self.backend.methods(self.operands)[-1]  # not evaluated: no method was timed
        return WeightSum(method.sum(self.operands), self.crop)

    def take(self, rows: Tensor) -> "LazyWeightGradient":
        squares_B = None if self.squares_B is None else self.squares_B[rows]
        return dataclasses.replace(self, operands=self.operands.take(rows), squares_B=squares_B)

    def masked(self, keep_B: Tensor) -> "LazyWeightGradient":
        x, g = (
            dataclasses.replace(one, scale=rows_or_zero(keep_B, one.scale))  # codes are finite
            if isinstance(one, QTensor)
            else rows_or_zero(keep_B, one)
            for one in (self.operands.x, self.operands.g)
        )
        return dataclasses.replace(self, operands=dataclasses.replace(self.operands, x=x, g=g))


class WeightSum:
    """Accumulates the weighted sum of lazy weight gradients by a backend's accumulator."""

    def __init__(self, accumulator: Accumulator, crop: KernelCrop):
        self._accumulator, self._crop = accumulator, crop

    def add(self, part: LazyWeightGradient, weights_B: Tensor) -> None:
        self._accumulator.add(part.operands, scaled_weights(weights_B, part.operands.scale_B))

    def value(self) -> Tensor:
        return self._crop.full(self._accumulator.value())


def scaled_weights(weights_B: Tensor, scale_B: Tensor | None) -> Tensor:
    """Return the factors of products of codes, w_i s_i rounded towards zero to bfloat16; without scales, w_i."""
    if scale_B is None:
        return weights_B
    return ((weights_B * scale_B).view(torch.int32) & -(2**16)).view(torch.float32)


def _times_squares(norms_B: Tensor, scale_B: Tensor | None) -> Tensor:
    return norms_B if scale_B is None else norms_B * scale_B.double().square()
