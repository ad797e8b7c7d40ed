# SPDX-License-Identifier: Apache-2.0
"""Number codes with a scale for each row."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QTensor:
    """Codes with one scale per row: the value of an element is (code - zero_point) * scale.

    Attributes:
      codes: int8, uint8 with a zero point, or float8; in the shape and memory format of the quantized tensor.
      scale: float32 `(B,)`, or `(1,)` if the whole tensor is one row. 0: the row is zero. NaN: it was not finite.
      zero_point: the offset that was added to the codes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: int = 0

    def take(self, rows: Tensor) -> "QTensor":
        """Return the codes and scales of some rows, given by index."""
        return dataclasses.replace(self, codes=self.codes[rows], scale=self.scale[rows])

    def dequantize(self) -> Tensor:
        """Return the values (code - zero_point) * scale, float32, in the shape of the codes.

        Privacy: per example, reads no other row.
        """
        scale = self.scale.view(-1, *(1,) * (self.codes.ndim - 1)) if self.codes.ndim else self.scale[0]
        return (self.codes.float() - self.zero_point) * scale


Operand = Tensor | QTensor
"""An operand of a product: float values, or codes with their scales."""


def code_values(operand: Operand) -> Tensor:
    """Return codes as float32 `(B, ...)` without zero point and scale; a plain tensor is returned unchanged."""
    if isinstance(operand, Tensor):
        return operand
    values = operand.codes.float()
    return values.sub_(operand.zero_point) if operand.zero_point else values


def scaled(values: Tensor, scale_B: Tensor, scale_C: Tensor) -> Tensor:
    """Multiply each example's accumulators by its own scale and each channel's, in place.

    Args:
      values: float32 `(B, C, H, W)`.
      scale_B: scales of the examples, `(B,)`.
      scale_C: scales of the channels, `(C,)` or `(1,)`.
    Returns: `values`.
    """
    return values.mul_((scale_B[:, None] * scale_C)[:, :, None, None])
