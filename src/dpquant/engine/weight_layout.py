# SPDX-License-Identifier: Apache-2.0
"""How the weight of a matrix product lies in a parameter: whole, transposed, or in some of its rows.

All products are convolutions with a weight `(O, C / G, *kernel)`. A linear layer stores it as `(O, C)`, GPT-2's
transposed, a 3-D convolution with an axis more, and torch's attention stores three of them in one parameter.

Symbols: B examples, O output channels, C input channels, G groups.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """Where a product's weight lies in a parameter.

    Attributes:
      shape: of the parameter.
      rows: (first, last + 1) row of the parameter that the product uses; None: all.
      transposed: whether the parameter is `(C, O)`.
    """

    shape: torch.Size
    rows: tuple[int, int] | None = None
    transposed: bool = False

    def of(self, parameter: Tensor, kernel: tuple[int, int]) -> Tensor:
        """Return the product's weight `(O, C / G, *kernel)`, a view of the parameter."""
        weight = parameter.t() if self.transposed else self.part(parameter)
        return weight.reshape(weight.shape[0], -1, *kernel)

    def part(self, parameter: Tensor) -> Tensor:
        """Return the rows that the product uses, a view of the parameter; the parameter itself if it uses all."""
        return parameter if self.rows is None else parameter[slice(*self.rows)]

    def full(self, gradients: Tensor) -> Tensor:
        """Return gradients of the product's weight, `(..., O, C / G, *kernel)`, as gradients `(..., *shape)`.

        They are zero in the rows that the product does not use.
        """
        lead = gradients.shape[:-4]
        if self.transposed:
            return gradients.reshape(*lead, self.shape[1], self.shape[0]).transpose(-1, -2).contiguous()
        return self.in_rows(gradients.reshape(*lead, -1, *self.shape[1:]))

    def in_rows(self, gradients: Tensor) -> Tensor:
        """Return gradients of the rows that the product uses, `(..., rows, *shape[1:])`, with zeros in all others."""
        if self.rows is None:
            return gradients
        first, end = self.rows
        return F.pad(gradients, (*[0] * (2 * len(self.shape) - 2), first, self.shape[0] - end))

    def apart_from(self, other: "WeightLayout") -> bool:
        """Return whether the two use different rows of one parameter, so that their gradients are orthogonal."""
        if self.rows is None or other.rows is None:
            return False
        return self.rows[1] <= other.rows[0] or other.rows[1] <= self.rows[0]
