# SPDX-License-Identifier: Apache-2.0
"""The plan of the analyses: what they draw, clip and hide. Loads no torch.

Symbols: q sample_rate, sigma noise_multiplier, C max_norm.
"""

import dataclasses
from typing import Literal, Self

from dpquant.privacy.ranges import RULES, checked, checked_choice

Score = Literal["loss", "gradient"]  # the quantity whose change defines a layer's impact

_SCORE_ADVICE = "It says what a layer's impact is measured by. Use loss, as the paper does, or gradient."
_PART = 1 / 16  # of a step's batch, as `dpquant train` takes it for gradients


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalysisPlan:
    """Settings of the analyses: private measurements of each layer's impact, from which policies choose layers.

    Attributes:
      count: number of analyses, spread evenly over the epochs; the first comes before any step.
      sample_rate: probability with which each record takes part in an analysis, in (0, 1].
      expected_batch_size: public number by which the noised sum of impacts is divided.
      noise_multiplier: standard deviation of the noise over the sensitivity, >= 0.1.
      max_norm: L2 norm to which each example's impact vector is clipped, in units of the score.
      repeats: number of roundings that are averaged before clipping; costs time, not privacy.
      score: `gradient`: an impact is 1 - cosine between an example's gradients with the layer quantized and in full
        precision. `loss`: an impact is the increase of an example's loss, as in the paper.
    Raises:
      SettingError: a value out of range.
    """

    count: int
    sample_rate: float
    expected_batch_size: float
    noise_multiplier: float
    max_norm: float
    repeats: int = 1
    score: Score = "gradient"

    def __post_init__(self) -> None:
        checked_choice("analysis.score", self.score, Score, _SCORE_ADVICE)
        for field in dataclasses.fields(self):
            if field.name in RULES:
                object.__setattr__(self, field.name, checked(field.name, getattr(self, field.name), "analysis."))

    @classmethod
    def for_epochs(cls, epochs: int, sample_rate: float, expected_batch_size: float) -> Self:
        """Return one analysis an epoch, on a sixteenth of a step's batch.

        Args:
          epochs: of the run.
          sample_rate: of a step.
          expected_batch_size: of a step.
        """
        return cls(
            count=epochs,
            sample_rate=sample_rate * _PART,
            expected_batch_size=expected_batch_size * _PART,
            noise_multiplier=1.0,
            max_norm=1.0,
        )
