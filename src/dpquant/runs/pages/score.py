# SPDX-License-Identifier: Apache-2.0
"""The one number by which a page tells how well a run's model does: its accuracy, of rare positives the average
precision, or the error of a regression.
"""

import dataclasses
from collections.abc import Sequence

from dpquant.runs.record import RunRecord

_OF_RARE = "average_precision"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A metric on test records.

    Attributes:
      name: as in "test accuracy".
      last: value at the end of the run.
      values: after each epoch.
      is_share: whether it is a share of 1, which is shown in percent.
    """

    name: str
    last: float
    values: Sequence[float]
    is_share: bool

    @property
    def title(self) -> str:
        """The name at the beginning of a sentence."""
        return self.name[:1].upper() + self.name[1:]

    def text(self, value: float, digits: int = 1) -> str:
        """Return a value as it is shown."""
        return f"{100 * value:.{digits}f} %" if self.is_share else f"{value:.4g}"


def score_of(record: RunRecord) -> Score:
    """Return the accuracy of a classification, or the metric that tells more than an accuracy does.

    That is the average precision of rare positives, of which a model that always says no has a high accuracy, and the
    first metric of a regression.
    """
    rare = bool(record.per_epoch) and all(_OF_RARE in (one.metrics_test or {}) for one in record.per_epoch)
    if record.accuracy_test is not None and not rare:
        return Score(name="test accuracy", last=record.accuracy_test, values=record.accuracy_per_epoch, is_share=True)
    name = _OF_RARE if rare else next(iter(record.metrics_test or {}))
    values = [(epoch.metrics_test or {})[name] for epoch in record.per_epoch]
    return Score(name=f"test {name.replace('_', ' ')}", last=values[-1], values=values, is_share=False)
