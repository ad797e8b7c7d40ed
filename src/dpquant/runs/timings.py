# SPDX-License-Identifier: Apache-2.0
"""Wall-clock times of a run, for its operator only: they follow the sizes of batches, which are private."""

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from dpquant.errors import DataError
from dpquant.runs.provenance import utc_now
from dpquant.runs.record import write_whole

if TYPE_CHECKING:
    from dpquant.training.private import PrivateTraining

NOT_FOR_RELEASE = (
    "The operator's own, not for release: times follow the realised batch sizes, which are private. No privacy "
    "statement covers this file."
)


def examples_per_second(private: "PrivateTraining") -> float:
    """Return the expected batch size times the number of steps, over the seconds of steps and analyses.

    It is 0 where none was timed: a run that continues may find all of its steps charged.

    Privacy: for the operator only. The time depends on how many records each step drew, which is private.
    """
    seconds = private.seconds_train + private.seconds_analysis
    return private.plan.expected_batch_size * private.steps_taken / seconds if seconds else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timings:
    """Wall-clock times of a run so far, for its operator only: no privacy statement covers them.

    Attributes:
      note: NOT_FOR_RELEASE, the first field in the file.
      written: UTC, when this was written: after the last epoch, or at the end of the run.
      seconds_total: since the run began, including the measurements at its start.
      seconds_train, seconds_analysis: total time of the steps, and of the analyses.
      seconds_at_epoch_ends: for each epoch, the time from the start of the run to the epoch's end.
      examples_per_second: expected batch size times the number of steps, over the time of steps and analyses; 0 if
        none was timed.
    """

    note: str = NOT_FOR_RELEASE
    written: str | None = None
    seconds_total: float
    seconds_train: float
    seconds_analysis: float
    seconds_at_epoch_ends: list[float]
    examples_per_second: float

    @classmethod
    def of(cls, private: "PrivateTraining", began: float, ends: Sequence[float]) -> Self:
        """Return the times of a run so far.

        Args:
          private: the run.
          began: `time.perf_counter` at the start of the run.
          ends: `time.perf_counter` at the end of each epoch so far.
        """
        return cls(
            written=utc_now(),
            seconds_total=time.perf_counter() - began,
            seconds_train=private.seconds_train,
            seconds_analysis=private.seconds_analysis,
            seconds_at_epoch_ends=[end - began for end in ends],
            examples_per_second=examples_per_second(private),
        )

    def write(self, path: Path) -> None:
        """Write the times as JSON, completely or not at all."""
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Return the times in a file; None if there is no file, because the operator may keep it elsewhere.

        Raises:
          DataError: the file cannot be read, or holds no timings.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"Expected readable timings; got {path}: {type(error).__name__}: {error}. Nothing but a run writes "
                "them. Remove the file to go on without."
            ) from error
