# SPDX-License-Identifier: Apache-2.0
"""Sinks: listeners to a run, as the metrics file and the progress bar.

A sink gets released numbers only, which it may store, show or send. The one exception is
`Progress.examples_per_second`, which is for the operator: it depends on how many records were drawn, and no privacy
statement covers it. A sink that passes its numbers on must leave it out.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dpquant.errors import SettingError
from dpquant.privacy.plan import PrivacyPlan, rounded_up
from dpquant.runs.directory import append_line
from dpquant.runs.record import EpochRecord, RunRecord, metrics_line, share_of_macs
from dpquant.runs.settings import TrainSettings
from dpquant.runs.timings import examples_per_second

if TYPE_CHECKING:
    from dpquant.training.private import Epoch, PrivateTraining


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """State of a run after a step. All fields but `examples_per_second` are released.

    Attributes:
      epoch: index of the present epoch, from 0, of `epochs`.
      step: number of steps taken, of `steps`.
      epsilon: spent when the epoch began. It is not computed at every step, because the accountant is slow.
      layers_quantized: number of layers that run quantized in this epoch, of `num_layers`.
      macs_quantized: share of the multiply-accumulates that run quantized in this epoch, in 0..1.
      examples_per_second: for the operator, not for release. It uses the expected batch size, but the time depends on
        the sizes of the Poisson batches, which are private. Not a number where a tracker is not to know it.
      accuracy_test: after the last finished epoch, in 0..1; None before the first.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    epsilon: float
    layers_quantized: int
    num_layers: int
    macs_quantized: float
    examples_per_second: float
    accuracy_test: float | None

    @classmethod
    def of(cls, private: "PrivateTraining", epoch: "Epoch", epsilon: float, past: Sequence[EpochRecord]) -> "Progress":
        """Return the state of a run.

        Args:
          private: the run, after a step.
          epoch: the present epoch.
          epsilon: spent when the epoch began.
          past: the finished epochs.
        """
        return cls(
            epoch=epoch.index,
            epochs=private.plan.epochs,
            step=private.steps_taken,
            steps=private.plan.steps,
            epsilon=epsilon,
            layers_quantized=len(epoch.policy),
            num_layers=len(private.macs),
            macs_quantized=share_of_macs(private, [epoch.policy], most_bits=8),
            examples_per_second=examples_per_second(private),
            accuracy_test=past[-1].accuracy_test if past else None,
        )


class Sink(Protocol):
    """Listener to a run, handed to `train(..., sinks=[...])`. Derive from it and override the methods that you need;
    the others do nothing.

    A sink that raises ends the run with one SettingError, as a full disk does. What was charged stays charged, and the
    run directory has the model of the last finished epoch. A sink that raises in `preparing` or `started` refuses the
    run before anything is charged. KeyboardInterrupt stops the run as the user's Ctrl-C does. A run that ends early
    calls no further method.
    """

    def preparing(self, what: str) -> None:
        """Called with a few words about each phase before the run starts, when the phase begins."""

    def started(self, plan: PrivacyPlan, settings: TrainSettings) -> None:
        """Called when all checks have passed and nothing is charged yet."""

    def stepped(self, progress: Progress) -> None:
        """Called after each step. `progress.examples_per_second` is for the operator only."""

    def epoch_ended(self, epoch: EpochRecord) -> None:
        """Called after each epoch, when its model is saved."""

    def finished(self, record: RunRecord) -> None:
        """Called at the end of the run, when the record is written."""


@dataclasses.dataclass(frozen=True)
class Sinks(Sink):
    """Sink that forwards each call to several sinks, in order.

    Attributes:
      sinks: to which is forwarded.
      epsilon_spent: quoted in the error if one of them raises.
    """

    sinks: Sequence[Sink]
    epsilon_spent: Callable[[], float]

    def preparing(self, what: str) -> None:
        self._tell(lambda sink: sink.preparing(what))

    def started(self, plan: PrivacyPlan, settings: TrainSettings) -> None:
        self._tell(lambda sink: sink.started(plan, settings))

    def stepped(self, progress: Progress) -> None:
        self._tell(lambda sink: sink.stepped(progress))

    def epoch_ended(self, epoch: EpochRecord) -> None:
        self._tell(lambda sink: sink.epoch_ended(epoch))

    def finished(self, record: RunRecord) -> None:
        self._tell(lambda sink: sink.finished(record))

    def _tell(self, tell: Callable[[Sink], None]) -> None:
        for sink in self.sinks:
            try:
                tell(sink)
            except Exception as error:  # a user's sink may raise anything; it got nothing private to quote
                raise SettingError(
                    f"Expected sink {type(sink).__name__} to take a run's numbers; got {type(error).__name__}: "
                    f"{error}. The run ends here. What was charged stays charged: epsilon = "
                    f"{rounded_up(self.epsilon_spent())}. Repair what the sink writes to, or leave it out."
                ) from error


class MetricsFile(Sink):
    """Sink that appends one line of JSON per epoch to a file and flushes it to disk."""

    def __init__(self, path: Path):
        self._path = path

    def epoch_ended(self, epoch: EpochRecord) -> None:
        append_line(self._path, metrics_line(epoch))
