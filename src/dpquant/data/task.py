# SPDX-License-Identifier: Apache-2.0
"""What a model has to tell from a record: a class, a rare positive, or a number. All of it is public."""

import dataclasses
import math
from typing import Literal

Kind = Literal["classification", "rare positives", "regression"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A task, which decides loss and metrics.

    Attributes:
      kind: classification, rare positives (two classes of which the second is rare), or regression.
      prior: of the second class, in (0, 1), a public number; None: none is declared.
      low, high: range of a regression's targets, to which they are clamped, in their own unit.
    """

    kind: Kind = "classification"
    prior: float | None = None
    low: float = -1.0
    high: float = 1.0

    @property
    def log_prior(self) -> tuple[float, float]:
        """Return the logarithms of the two classes' declared shares; zeros without a prior."""
        return (0.0, 0.0) if self.prior is None else (math.log1p(-self.prior), math.log(self.prior))

    def scaled(self, value: float) -> float:
        """Return a regression's target, clamped to the range and scaled to -1 .. 1."""
        clamped = min(max(value, self.low), self.high)
        return 2 * (clamped - self.low) / (self.high - self.low) - 1

    @property
    def unit(self) -> float:
        """Return what a difference of 1 between scaled targets is in the targets' own unit."""
        return (self.high - self.low) / 2


CLASSIFICATION = Task()
UNREADABLE = -1
"""Target of a record that cannot be used. Its loss is zero, whatever the model returns, so it contributes nothing."""
