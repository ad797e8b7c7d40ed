# SPDX-License-Identifier: Apache-2.0
"""`evaluation.json`: what `dpquant evaluate` found on test records. This module loads no torch.

Either everything is computed from test records without protection, or one number is released with noise and nothing
else is computed from them: `protected`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Self

from dpquant.errors import DataError
from dpquant.runs.record import write_whole

EVALUATION_SCHEMA = 1
"""Version of the format. Raise it with every change of a field, and keep reading the earlier ones."""
UNPROTECTED = "Computed from the test set, which is not protected"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClassResult:
    """How one class fares.

    Attributes:
      name: of the class.
      support: number of its records.
      precision: share of the records that were taken for it and are of it; None: none was.
      recall: share of its records that were taken for it; None: there is none.
    """

    name: str
    support: int
    precision: float | None
    recall: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bin:
    """Records of which the model gives similar probabilities to the second class.

    Attributes:
      count: of records.
      predicted: mean probability.
      observed: share of the second class.
    """

    count: int
    predicted: float
    observed: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """How well two classes are told apart by the probability of the second; fields are None if records are of one.

    Attributes:
      average_precision, roc_auc: areas under the curves.
      recall_at_1_percent_fpr: share of the second class that scores above all but a hundredth of the first.
      calibration_error: mean gap between predicted and observed shares, weighted by records.
      calibration: in ten equal ranges of the probability; empty ones are left out.
    """

    average_precision: float | None
    roc_auc: float | None
    recall_at_1_percent_fpr: float | None
    calibration_error: float
    calibration: list[Bin]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protected:
    """An accuracy that was released with noise.

    Attributes:
      accuracy: noisy count of correct answers over `records`, cut to 0..1.
      epsilon: of this release, at delta = 0, for test records.
      records: public number of test records.
      half_width: of an interval around the accuracy that covers the noise in 95 of 100 cases.
      releases, epsilon_together: number of all releases that are written down, and what they cost together.
    """

    accuracy: float
    epsilon: float
    records: int
    half_width: float
    releases: int
    epsilon_together: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of `dpquant evaluate`. A field that does not fit the task, or that is not released, is None.

    Attributes:
      schema: version of the format, the first field in the file.
      data: the test records, as the settings name data.
      task: classification, rare positives or regression.
      model_sha256: of the model's file.
      statement: whether and how the test records are protected.
      records, unreadable: number of test records, and of those that cannot be used. They count as wrong.
      accuracy, accuracy_low, accuracy_high: with its 95 % Wilson interval.
      classes: in the order of the model's outputs.
      confusion: [true class][predicted class], numbers of readable records.
      ranking: of two classes.
      errors: of a regression, {metric: value in the targets' unit}.
      protected: what was released with noise instead of all of these.
    """

    schema: int = dataclasses.field(default=EVALUATION_SCHEMA, init=False)
    data: str
    task: str
    model_sha256: str
    statement: str
    records: int | None = None
    unreadable: int | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    classes: list[ClassResult] | None = None
    confusion: list[list[int]] | None = None
    ranking: Ranking | None = None
    errors: dict[str, float] | None = None
    protected: Protected | None = None

    def to_json(self) -> str:
        """Return the evaluation as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def write(self, path: Path) -> None:
        """Write the evaluation to a file, completely or not at all."""
        write_whole(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the evaluation in a file.

        Raises:
          DataError: the file cannot be read, holds no evaluation, or one of a newer schema.
        """
        try:
            fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if (schema := fields.pop("schema")) != EVALUATION_SCHEMA:
                raise ValueError(f"schema {schema}")
            if fields["classes"] is not None:
                fields["classes"] = [ClassResult(**one) for one in fields["classes"]]
            if (ranking := fields["ranking"]) is not None:
                fields["ranking"] = Ranking(
                    **{**ranking, "calibration": [Bin(**one) for one in ranking["calibration"]]}
                )
            if fields["protected"] is not None:
                fields["protected"] = Protected(**fields["protected"])
            return cls(**fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"Expected {path} to hold an evaluation; got {type(error).__name__}: {error}. It was changed, or "
                "written by another version. Make it again by dpquant evaluate."
            ) from error
