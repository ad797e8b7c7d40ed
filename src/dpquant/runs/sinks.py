# SPDX-License-Identifier: Apache-2.0
"""Sinks: whoever is told how a run goes. The file of metrics is one, the progress bar another.

A sink is told released numbers only, so that it may keep, show or send them. There is one exception, which is the
operator's: `Progress.examples_per_second`. It follows how many records were drawn, no statement covers it, and a sink
that lets anybody else see what it is told leaves it out.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from dpquant.errors import SettingError
from dpquant.privacy.plan import PrivacyPlan, rounded_up
from dpquant.runs.directory import append_line
from dpquant.runs.record import EpochRecord, RunRecord, examples_per_second
from dpquant.runs.settings import TrainSettings

if TYPE_CHECKING:
    from dpquant.training.private import Epoch, PrivateTraining


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run is after a step. All but the speed are numbers that the run releases.

    Attributes:
      epoch: from 0; step: steps taken; epsilon: spent when the epoch began, which costs an accountant's call.
      layers_quantized: of `num_layers`, in this epoch.
      examples_per_second: for the operator's screen, not for release: the batch size is the expected one, but the time
        follows the realised sizes, which are private.
      accuracy_test: after the last finished epoch, None before.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    epsilon: float
    layers_quantized: int
    num_layers: int
    examples_per_second: float
    accuracy_test: float | None

    @classmethod
    def of(cls, private: "PrivateTraining", epoch: "Epoch", epsilon: float, past: Sequence[EpochRecord]) -> "Progress":
        """Return where a run is.

        Args:
          private: the run, which has just taken a step.
          epoch: the present one.
          epsilon: spent when it began.
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
            examples_per_second=examples_per_second(private),
            accuracy_test=past[-1].accuracy_test if past else None,
        )


class Sink(Protocol):
    """Told how a run goes, by `train(..., sinks=...)`. Derived from, it does nothing by itself: override what matters.

    A sink that raises ends the run with one error, as a disk that is full does: what was charged stays charged, and the
    model of the last finished epoch is in the run directory. One that raises in `started` refuses the run, before
    anything is charged. A KeyboardInterrupt stops the run as the user does.
    """

    def started(self, plan: PrivacyPlan, settings: TrainSettings) -> None:
        """All checks have passed, and nothing is charged yet."""

    def stepped(self, progress: Progress) -> None:
        """A step was taken. `progress.examples_per_second` is the operator's alone."""

    def epoch_ended(self, epoch: EpochRecord) -> None:
        """An epoch is over, and its model is saved."""

    def finished(self, record: RunRecord) -> None:
        """The run is over, and its record is written."""


class Sinks(Sink):
    """Several sinks, told one after the other."""

    def __init__(self, sinks: Sequence[Sink], epsilon_spent: Callable[[], float]):
        """Tell these `sinks`; what `epsilon_spent` returns is in the error about one that raises."""
        self._sinks, self._epsilon_spent = sinks, epsilon_spent

    def started(self, plan: PrivacyPlan, settings: TrainSettings) -> None:
        self._tell(lambda sink: sink.started(plan, settings))

    def stepped(self, progress: Progress) -> None:
        self._tell(lambda sink: sink.stepped(progress))

    def epoch_ended(self, epoch: EpochRecord) -> None:
        self._tell(lambda sink: sink.epoch_ended(epoch))

    def finished(self, record: RunRecord) -> None:
        self._tell(lambda sink: sink.finished(record))

    def _tell(self, tell: Callable[[Sink], None]) -> None:
        for sink in self._sinks:
            try:
                tell(sink)
            except Exception as error:  # a user's sink raises what it likes; it was told nothing that is private
                raise SettingError(
                    f"Expected sink {type(sink).__name__} to take what a run tells; got a {type(error).__name__}: "
                    f"{error}. The run ends here. What was charged stays charged: epsilon = "
                    f"{rounded_up(self._epsilon_spent())}. Make the sink catch what it can do without, or leave it out."
                ) from error


class MetricsFile(Sink):
    """Writes one line an epoch, which is on disk before the next epoch begins."""

    def __init__(self, path: Path):
        self._path = path

    def epoch_ended(self, epoch: EpochRecord) -> None:
        line = {
            "epoch": epoch.index,
            "epsilon": epoch.epsilon,
            "accuracy_test": epoch.accuracy_test,
            "layers_quantized": epoch.layers_quantized,
        }
        if epoch.nonprivate_accuracy_train is not None:
            line["nonprivate_accuracy_train"] = epoch.nonprivate_accuracy_train
        append_line(self._path, json.dumps(line))
