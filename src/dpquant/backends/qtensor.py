# SPDX-License-Identifier: Apache-2.0
"""Number codes with a scale for each row."""

import dataclasses
from collections.abc import Callable

from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QTensor:
    """Codes with one scale per row: the value of an element is (code - zero_point) * scale [* block_scale].

    Attributes:
      codes: int8, uint8 with a zero point, or float8; in the shape and memory format of the quantized tensor.
      scale: float32 `(B,)`, or `(1,)` if the whole tensor is one row. 0: the row is zero. NaN: it was not finite.
      zero_point: the offset that was added to the codes.
      block_scale: float32, in the shape of the codes: the scale of each element's block. None: no blocks.
    """

    codes: Tensor
    scale: Tensor
    zero_point: int = 0
    block_scale: Tensor | None = None

    def take(self, rows: Tensor) -> "QTensor":
        """Return the codes and scales of some rows, given by index."""
        return dataclasses.replace(self.rearranged(lambda part: part[rows]), scale=self.scale[rows])

    def rearranged(self, change: Callable[[Tensor], Tensor]) -> "QTensor":
        """Return the elements in another shape or order, with their blocks' scales; row scales stay as they are."""
        block_scale = None if self.block_scale is None else change(self.block_scale)
        return dataclasses.replace(self, codes=change(self.codes), block_scale=block_scale)

    def dequantize(self) -> Tensor:
        """Return the values (code - zero_point) * scale [* block_scale], float32, in the shape of the codes.

        Privacy: per example, reads no other row.
        """
        scale = self.scale.view(-1, *(1,) * (self.codes.ndim - 1)) if self.codes.ndim else self.scale[0]
        return code_values(self) * scale


Operand = Tensor | QTensor
"""An operand of a product: float values, or codes with their scales."""


def code_values(operand: Operand) -> Tensor:
    """Return codes as float32 `(B, ...)`, without zero point and row scale, times the scales of their blocks, if any.

    The product of a code and its block's scale is exact: `scales.py`. A plain tensor is returned unchanged.
    """
    if isinstance(operand, Tensor):
        return operand
    values = operand.codes.float()
    values = values.sub_(operand.zero_point) if operand.zero_point else values
    return values if operand.block_scale is None else values.mul_(operand.block_scale)


def scaled(values: Tensor, scale_B: Tensor, scale_C: Tensor) -> Tensor:
    """Multiply each example's accumulators by its own scale and each channel's, in place.

    Args:
      values: float32 `(B, C, H, W)`.
      scale_B: scales of the examples, `(B,)`.
      scale_C: scales of the channels, `(C,)` or `(1,)`.
    Returns: `values`.
    """
    return values.mul_((scale_B[:, None] * scale_C)[:, :, None, None])
