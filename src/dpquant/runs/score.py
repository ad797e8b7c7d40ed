# SPDX-License-Identifier: Apache-2.0
"""The one number that tells how well a run's model does: its accuracy, of rare positives the average precision, or the
error of a regression.
"""

import dataclasses
import math
from collections.abc import Sequence

from dpquant.runs.record import EpochRecord, RunRecord

_OF_RARE, _OF_CLASSES = "average_precision", "accuracy"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """A metric on test records.

    Attributes:
      metric: `accuracy`, or a name of `evaluation.metrics`.
      values: {index of an epoch: the metric after it}, of epochs in which it was measured; at least one.
    """

    metric: str
    values: dict[int, float]

    @property
    def name(self) -> str:
        """In words, as in "test accuracy"."""
        return f"test {self.metric.replace('_', ' ')}"

    @property
    def title(self) -> str:
        """The name at the beginning of a sentence."""
        return self.name[:1].upper() + self.name[1:]

    @property
    def is_share(self) -> bool:
        """Whether it is a share of 1, which is shown in percent."""
        return self.metric == _OF_CLASSES

    @property
    def is_error(self) -> bool:
        """Whether less is better."""
        return self.metric not in (_OF_CLASSES, _OF_RARE)

    @property
    def last(self) -> float:
        """The value after the last epoch."""
        return list(self.values.values())[-1]

    @property
    def best_epoch(self) -> int:
        """Index of the first epoch with the best value."""
        best = min if self.is_error else max
        return best(self.values, key=self.values.__getitem__)

    @property
    def best(self) -> float:
        """The best value so far."""
        return self.values[self.best_epoch]

    def text(self, value: float, digits: int = 1, percent: str = " %") -> str:
        """Return a value as it is shown, a share in percent."""
        return f"{100 * value:.{digits}f}{percent}" if self.is_share else f"{value:.4g}"

    def line(self, value: float) -> str:
        """Return a value as it is shown among plain text."""
        return self.text(value, percent="%")


def score_of(record: RunRecord) -> Score:
    """Return the score of a run that has ended; see `score_so_far`. An accuracy at its end is the record's own."""
    score = score_so_far(record.per_epoch)
    assert score is not None, "every epoch of a record was measured"
    if score.is_share and record.accuracy_test is not None:
        return dataclasses.replace(score, values=score.values | {record.per_epoch[-1].index: record.accuracy_test})
    return score


def score_so_far(epochs: Sequence[EpochRecord]) -> Score | None:
    """Return the accuracy of a classification, or the metric that tells more than an accuracy does.

    That is the average precision of rare positives, of which a model that always says no has a high accuracy, and the
    first metric of a regression.

    Returns: None if nothing finite was measured yet.
    """
    measured = [
        (one.metrics_test or {}) | ({} if one.accuracy_test is None else {_OF_CLASSES: one.accuracy_test})
        for one in epochs
    ]
    last = next((found for found in reversed(measured) if found), {})
    metric = next((name for name in (_OF_RARE, _OF_CLASSES, *last) if name in last), None)
    values = {
        epoch.index: found[metric]
        for epoch, found in zip(epochs, measured, strict=True)
        if metric in found and math.isfinite(found[metric])
    }
    return None if metric is None or not values else Score(metric=metric, values=values)
