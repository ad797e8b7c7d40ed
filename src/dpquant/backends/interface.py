# SPDX-License-Identifier: Apache-2.0
"""What a backend is: how codes are made and multiplied on a device, and how weight gradients are normed and summed.

A backend has no state, knows no model and no privacy, and gives the integers that `reference.Reference` gives, or says
beforehand why it cannot. `registry.py` lists the backends; `tests/backends/test_conformance.py` runs over all of them.

    G_i = s_i sum_t g_it x_it^T          the weight gradient of example i; x_it: the receptive field of position t

A weight gradient is needed twice: its norm, then its part in a weighted sum. A `Method` is a pair of kernels for the
two. Norm and sum are of the same operands, so that what is clipped is what is summed.

Symbols: B examples, C input channels, O output channels, G groups, T output positions.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dpquant.backends.geometry import Geometry
from dpquant.backends.qtensor import Operand, QTensor, code_values
from dpquant.backends.workarounds import columns_as_channels
from dpquant.formats import Precision, RoleFormat


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Operands:
    """What a layer's per-example weight gradients are products of; either both are codes or neither is.

    Attributes:
      x: the layer's input, `(B, C, H, W)`, channels last.
      g: the gradient of its output, `(B, O, H', W')`, channels last.
      geometry: of the convolution, cropped to the taps that meet x.
      bf16_terms: how many bfloat16 numbers represent a clip factor times a code of g exactly, 1 or 2; 0: values.
    """

    x: Operand
    g: Operand
    geometry: Geometry
    bf16_terms: int = 0

    def __len__(self) -> int:
        return shape_of(self.x)[0]

    @property
    def shapes(self) -> tuple[torch.Size, torch.Size]:
        """Of x and g."""
        return shape_of(self.x), shape_of(self.g)

    @property
    def num_positions(self) -> int:
        """T."""
        return math.prod(self.shapes[1][2:])

    @property
    def patch_size(self) -> int:
        """How many inputs one output position sees, within a group."""
        return self.shapes[0][1] // self.geometry.groups * math.prod(self.geometry.kernel)

    @functools.cached_property
    def values(self) -> tuple[Tensor, Tensor]:
        """X and g as float32: values, or codes without zero point or scale."""
        return code_values(self.x), code_values(self.g)

    @property
    def quantized(self) -> tuple[QTensor, QTensor] | None:
        """X and g if they are codes."""
        if isinstance(self.x, QTensor) and isinstance(self.g, QTensor):
            return self.x, self.g
        return None

    @property
    def scale_B(self) -> Tensor | None:
        """The scale of each example's product of codes; None: values."""
        return None if self.quantized is None else self.quantized[0].scale * self.quantized[1].scale

    @functools.cached_property
    def codes(self) -> tuple[Tensor, Tensor, Geometry]:
        """The codes of g and of x, and their geometry, laid out so that the vector lanes are filled."""
        assert self.quantized is not None
        x, g = self.quantized
        return g.codes, *columns_as_channels(x.codes, self.geometry, zero=x.zero_point)

    def take(self, rows: Tensor) -> "Operands":
        """Some of the examples."""
        x, g = (operand.take(rows) if isinstance(operand, QTensor) else operand[rows] for operand in (self.x, self.g))
        return dataclasses.replace(self, x=x, g=g)

    def synthetic(self) -> "Operands":
        """Operands of the same shapes, types and layouts, all ones: to time kernels without reading data."""
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
    """What a norm kernel gives, of products without scales.

    Attributes:
      squares_B: ||G_i||^2, float64 `(B,)`, never less than the true value of what the method's sum adds up.
      gradients: G_i, if the kernel has materialised them: `(B, O, C / G, *kernel)`, or `(B, O, D)` in patch order
        (kernel row, kernel column, channel).
      in_patch_order: whether they are.
    """

    squares_B: Tensor
    gradients: Tensor | None = None
    in_patch_order: bool = False


class NormKernel(Protocol):
    """Computes each example's squared norm, and may materialise the gradients on the way."""

    def __call__(self, operands: Operands, /) -> Norms: ...


class Accumulator(Protocol):
    """The weighted sum of weight gradients, over any number of microbatches of the same shapes."""

    def add(self, operands: Operands, weights_B: Tensor) -> None:
        """Add sum_i w_i G_i of the products without scales; float32 weights `(B,)`. There may be no examples."""
        ...

    def value(self) -> Tensor:
        """The sum so far: `(O, C / G, *kernel)`, float32 on the operands' device."""
        ...


class SumKernel(Protocol):
    """Begins an empty sum for operands of these shapes, whose values it does not read."""

    def __call__(self, operands: Operands, /) -> Accumulator: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way to the norms and the weighted sum of weight gradients.

    Attributes:
      name: under which the choice is kept.
      norms: of each example.
      sum: of the operands; not used where the norm kernel materialises the gradients, as those are summed then.
      cost: multiply-accumulates an example, by which hopeless methods are left out before timing. None: always timed,
        since its instructions do several at once.
    """

    name: str
    norms: NormKernel
    sum: SumKernel
    cost: float | None = None


class PackedWeight(Protocol):
    """A layer's quantized weight as a backend wants it, packed once and used for a whole logical batch."""

    def forward(self, x: QTensor, bias: Tensor | None) -> Tensor:
        """Return s_i s(W) conv(codes of x_i, codes of W) + b: float32 `(B, O, H', W')`, channels last."""
        ...

    def input_gradient(self, grad: QTensor, size: tuple[int, int]) -> Tensor:
        """Return s_i s(W) conv_transpose(codes of grad_i, codes of W): float32 `(B, C, H, W)`, `size` = (H, W)."""
        ...


class Backend(Protocol):
    """How a layer's codes are made and multiplied. Without state: one object serves all layers.

    Attributes:
      name: as users write it and records show it.
    """

    name: str

    def refusal(self, precision: Precision, device: torch.device) -> str | None:
        """Say why the backend cannot run a precision on a device exactly; None: it can."""
        ...

    def quantize(self, x: Tensor, role: RoleFormat, row_keys: Tensor) -> QTensor:
        """Quantize each example of x, float32 `(B, C, H, W)`, with its own scale, in the layout that products take."""
        ...

    def pack(self, weight: QTensor, geometry: Geometry, *, max_code: int) -> PackedWeight:
        """Pack a weight's int8 codes `(O, C / G, *kernel)`.

        Args:
          weight: scale `(1,)`, or one for each channel that the product keeps: `(O,)` forward, `(C,)` backward.
          geometry: of the convolution.
          max_code: the largest |code| of any operand, which bounds every partial sum.
        """
        ...

    def methods(self, operands: Operands) -> Sequence[Method]:
        """Return the methods that can run on these operands here, at least one.

        The first ones win ties. The last one's sum is taken where the gradients' norms were not asked for.
        """
        ...
