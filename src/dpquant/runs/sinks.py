# SPDX-License-Identifier: Apache-2.0
"""Sinks: listeners to a run. The file of metrics is one, the progress bar another.

A sink gets released numbers only, so that it may keep, show or send them. There is one exception, which is the
operator's: `Progress.examples_per_second`. It follows how many records were drawn and no statement covers it; a sink
that shows its numbers to anybody else leaves it out.
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
    """State of a run after a step. All but the speed are numbers that the run releases.

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
        """Return the state of a run.

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
    """Listener to a run, handed to `train(..., sinks=[...])`. Derive from it and override what matters: the others do
    nothing.

    A sink that raises ends the run with one SettingError, as a full disk does: what was charged stays charged, and the
    model of the last finished epoch is in the run directory. A sink that raises in `started` refuses the run before
    anything is charged. KeyboardInterrupt stops the run as the user's Ctrl-C does. A run that ends early calls no
    further method.
    """

    def started(self, plan: PrivacyPlan, settings: TrainSettings) -> None:
        """Begin: all checks have passed, and nothing is charged yet."""

    def stepped(self, progress: Progress) -> None:
        """Take a step's progress; its `examples_per_second` is the operator's alone."""

    def epoch_ended(self, epoch: EpochRecord) -> None:
        """Take an epoch's numbers, its model being saved."""

    def finished(self, record: RunRecord) -> None:
        """Take the record, which is written: the run is over."""


class Sinks(Sink):
    """Fan-out to several sinks, in their order."""

    def __init__(self, sinks: Sequence[Sink], epsilon_spent: Callable[[], float]):
        """Hold `sinks`, and `epsilon_spent`, which the error about one that raises quotes."""
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
                    f"Expected sink {type(sink).__name__} to take a run's numbers; got {type(error).__name__}: "
                    f"{error}. The run ends here. What was charged stays charged: epsilon = "
                    f"{rounded_up(self._epsilon_spent())}. Repair what the sink writes to, or leave it out."
                ) from error


class MetricsFile(Sink):
    """Sink that appends one line of JSON an epoch, on disk before the next epoch begins."""

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
