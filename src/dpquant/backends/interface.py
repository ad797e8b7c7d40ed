# SPDX-License-Identifier: Apache-2.0
"""The interface of backends: quantization, products of codes, and norms and sums of per-example weight gradients.

A backend is stateless and knows neither models nor privacy. It gives the same integers as `reference.Reference`, or its
`refusal` gives the reason why it cannot. `registry.py` lists the backends; `tests/backends/test_conformance.py` tests
each of them.

    G_i = s_i sum_t g_it x_it^T          the weight gradient of example i; x_it: the receptive field of position t

A weight gradient is used twice: for its norm, and then in a weighted sum. A `Method` is a pair of kernels for the two.
Both use the same operands, so the clip factors belong to the gradients that are summed.

Symbols: B examples, C input channels, O output channels, G groups, T output positions.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dpquant.backends.algebra import squares_of_codes, squares_of_values
from dpquant.backends.geometry import Geometry
from dpquant.backends.qtensor import Operand, QTensor, code_values
from dpquant.backends.workarounds import columns_as_channels
from dpquant.formats import Precision, RoleFormat


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Operands:
    """The operands of a layer's per-example weight gradients: input and output gradient, both codes or both values.

    Attributes:
      x: the layer's input, `(B, C, H, W)`, channels last.
      g: the gradient of its output, `(B, O, H', W')`, channels last.
      geometry: of the convolution, cropped to the kernel taps that read x and not only padding.
      bf16_terms: bfloat16 terms needed to represent a factor times a code of g exactly, 1 or 2; 0: not codes.
    """

    x: Operand
    g: Operand
    geometry: Geometry
    bf16_terms: int = 0

    def __len__(self) -> int:
        return shape_of(self.x)[0]

    @property
    def shapes(self) -> tuple[torch.Size, torch.Size]:
        """The shapes of x and g."""
        return shape_of(self.x), shape_of(self.g)

    @property
    def device(self) -> torch.device:
        """The device of x and g."""
        return (self.x.codes if isinstance(self.x, QTensor) else self.x).device

    @property
    def num_positions(self) -> int:
        """The number T of output positions."""
        return math.prod(self.shapes[1][2:])

    @property
    def rank_one(self) -> bool:
        """Whether each gradient is the outer product g_i x_i^T of two vectors: a linear layer called on `(B, D)`."""
        return self.geometry.pointwise and self.num_positions == 1

    @functools.cached_property
    def row_squares(self) -> tuple[Tensor, Tensor]:
        """Squared norms of each example's x and g, without scales, float64 `(B,)`: the factors of a rank-one norm."""
        x, g = (operand.flatten(1) for operand in self.values)
        squares_of = squares_of_codes if self.bf16_terms else squares_of_values
        return squares_of(x), squares_of(g)

    @property
    def patch_size(self) -> int:
        """The number D of inputs in the receptive field of an output position, within a group."""
        return self.shapes[0][1] // self.geometry.groups * math.prod(self.geometry.kernel)

    @functools.cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """The float32 values of x and g; of codes, the integers, without zero point and scale."""
        return code_values(self.x), code_values(self.g)

    @property
    def quantized(self) -> tuple[QTensor, QTensor] | None:
        """The codes x and g; None if the operands are values."""
        if isinstance(self.x, QTensor) and isinstance(self.g, QTensor):
            return self.x, self.g
        return None

    @property
    def scale_B(self) -> Tensor | None:
        """The scale of each example's products of codes, float32 `(B,)`; None if the operands are values."""
        return None if self.quantized is None else self.quantized[0].scale * self.quantized[1].scale

    @functools.cached_property
    def codes(self) -> tuple[Tensor, Tensor, Geometry]:
        """The codes of g and x and their geometry, rewritten by `columns_as_channels` to fill the vector lanes."""
        assert self.quantized is not None
        x, g = self.quantized
        return g.codes, *columns_as_channels(x.codes, self.geometry, zero=x.zero_point)

    def take(self, rows: Tensor) -> "Operands":
        """Return the operands of some examples, given by index."""
        x, g = (operand.take(rows) if isinstance(operand, QTensor) else operand[rows] for operand in (self.x, self.g))
        return dataclasses.replace(self, x=x, g=g)

    def synthetic(self) -> "Operands":
        """Return synthetic operands, all ones, of equal shapes, types and layouts, to time kernels without data."""
        return dataclasses.replace(self, x=_ones_like(self.x), g=_ones_like(self.g))


def shape_of(operand: Operand) -> torch.Size:
    """Return the shape of values or codes."""
    return operand.shape if isinstance(operand, Tensor) else operand.codes.shape


def _ones_like(operand: Operand) -> Operand:
    if isinstance(operand, Tensor):
        return torch.ones_like(operand)
    ones = torch.ones_like(operand.codes, dtype=torch.uint8).to(operand.codes.dtype)
    return dataclasses.replace(operand, codes=ones, scale=torch.ones_like(operand.scale))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Norms:
    """The result of a norm kernel. Scales are not included: of codes, the products of integers.

    Attributes:
      squares_B: ||G_i||^2, float64 `(B,)`, never less than the exact squared norm of what the method's sum adds.
      gradients: G_i, if the kernel materialises them: `(B, O, C / G, *kernel)`, or `(B, O, D)` in patch order
        (kernel row, kernel column, channel).
      in_patch_order: whether `gradients` are in patch order.
    """

    squares_B: Tensor
    gradients: Tensor | None = None
    in_patch_order: bool = False


class NormKernel(Protocol):
    """Computes each example's squared norm; it may also return the materialised gradients."""

    def __call__(self, operands: Operands, /) -> Norms: ...


class Accumulator(Protocol):
    """Accumulates the weighted sum of weight gradients over any number of microbatches of equal shapes."""

    def add(self, operands: Operands, weights_B: Tensor) -> None:
        """Add sum_i w_i G_i, without scales; weights float32 `(B,)`. The microbatch may be empty."""
        ...

    def value(self) -> Tensor:
        """Return the sum so far, float32 `(O, C / G, *kernel)` on the operands' device."""
        ...


class SumKernel(Protocol):
    """Makes an empty accumulator for operands of these shapes; it does not read their values."""

    def __call__(self, operands: Operands, /) -> Accumulator: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """A method for the norms and the weighted sum of weight gradients.

    Attributes:
      name: identifies the method in saved choices. A sum of one size takes operands of every size that has a method of
        this name: microbatches of texts have several lengths.
      norms: computes the squared norms.
      sum: makes the accumulator. It is not used if `norms` materialises the gradients, as those are summed then.
      cost: multiply-accumulates per example, by which clearly slower methods are excluded before timing. None: always
        timed, because its instructions do several multiplications at once and the count would not compare.
    """

    name: str
    norms: NormKernel
    sum: SumKernel
    cost: float | None = None


class PackedWeight(Protocol):
    """A layer's quantized weight in the backend's own layout, packed once and used for a whole logical batch."""

    def forward(self, x: QTensor, bias: Tensor | None) -> Tensor:
        """Return s_i s(W) conv(codes of x_i, codes of W) + b: float32 `(B, O, H', W')`, channels last."""
        ...

    def input_gradient(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        """Return s_i s(W) conv_transpose(codes of grad_i, codes of W): float32 `(B, C, H, W)`, `size` = (H, W)."""
        ...


class Backend(Protocol):
    """Quantizes a layer's operands and multiplies their codes. It is stateless: one object serves all layers.

    Attributes:
      name: the name by which users choose it and records show it.
      device_type: of the devices that it is made for, `cpu` or `cuda`; None: any.
      units: names of the recipes that it multiplies on units made for them, if it does not refuse them, the narrowest
        first. `format=auto` takes the first one that is not refused.
    """

    name: str
    device_type: str | None
    units: tuple[str, ...]

    def refusal(self, precision: Precision, device: torch.device) -> str | None:
        """Return the reason why the backend cannot run a precision exactly on a device; None if it can."""
        ...

    def exactness(self, precision: Precision, device: torch.device) -> str:
        """Return on what a precision that is not refused runs exactly, in words for a run's record."""
        ...

    def quantize(self, x: Tensor, role: RoleFormat, row_keys: Tensor) -> QTensor:
        """Quantize each example of x, float32 `(B, C, H, W)`, with its own scale; the layout suits this backend."""
        ...

    def pack(self, weight: QTensor, geometry: Geometry, *, max_code: int) -> PackedWeight:
        """Pack a weight's int8 codes `(O, C / G, *kernel)`.

        Args:
          weight: its scale is `(1,)`, or one per channel of the product's result: `(O,)` forward, `(C,)` backward.
          geometry: of the convolution.
          max_code: the largest |code| of any operand, which bounds every partial sum.
        """
        ...

    def methods(self, operands: Operands) -> Sequence[Method]:
        """Return the methods that can run on these operands on this machine, at least one.

        Of equally fast methods the first is chosen. If norms were never computed, the last method's sum is used.
        """
        ...
