# SPDX-License-Identifier: Apache-2.0
"""Number codes with a scale for each row."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class QTensor:
    """Codes with one scale per row: the value of an element is (code - zero_point) * scale.

    Attributes:
      codes: int8; uint8 with a zero point; or float8. The shape and memory format of what was quantized.
      scale: float32 `(B,)`, or `(1,)` when the whole tensor is one row. 0: the row is zero. NaN: it was not finite.
      zero_point: what was added to the codes.
    """

    codes: Tensor
    scale: Tensor
    zero_point: int = 0

    def take(self, rows: Tensor) -> "QTensor":
        """Some of the rows."""
        return dataclasses.replace(self, codes=self.codes[rows], scale=self.scale[rows])

    def dequantize(self) -> Tensor:
        """The values that the codes stand for: float32, shape of codes.

        Privacy: per example, reads no other row.
        """
        scale = self.scale.view(-1, *(1,) * (self.codes.ndim - 1)) if self.codes.ndim else self.scale[0]
        return (self.codes.float() - self.zero_point) * scale
