# SPDX-License-Identifier: Apache-2.0
"""The trackers of a run as one sink: what they are told, when, and what happens if one fails.

A tracker may show its numbers to others. So it gets nothing that the privacy statement does not cover, unless
`track_unsafe` allows it:

    accuracy on the training records    is left out of epochs and record
    examples a second                   is not a number: a step takes longer the more records it draws
    times                               are all the time at which the process began, for the same reason
    report.html                         is not handed over if the run has measured accuracy on its training records

A run that has spent budget does not end because a tracker fails: the first failure of each is a warning.
"""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from dpquant.privacy.plan import PrivacyPlan
from dpquant.runs.names import DESCRIPTION, MODEL, REPORT, TRACKERS
from dpquant.runs.record import EpochRecord, RunRecord
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sinks import Progress, Sink
from dpquant.runs.trackers.registry import load_trackers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is made from.

    Attributes:
      directory: of the run.
      folder: the tracker's own, in the run directory; it is there. A process that continues the run finds in it what
        an earlier one has written.
      now: returns the time to give to numbers, in seconds since 1970; see the head of this module.
      unsafe: what the privacy statement does not cover may be passed on.
      model: the model may be passed on.
    """

    directory: Path
    folder: Path
    now: Callable[[], float]
    unsafe: bool
    model: bool

    @property
    def name(self) -> str:
        """Name of the run: that of its directory."""
        return self.directory.absolute().name

    def files(self, record: RunRecord) -> list[Path]:
        """Return the files of a run that has ended which may be passed on as they are, and are there."""
        names = [REPORT] if self.unsafe or not record.unsafe_metrics else []
        names += [MODEL, DESCRIPTION] if self.model else []
        return [path for path in (self.directory / name for name in names) if path.is_file()]


class Tracking(Sink):
    """Sink that tells all trackers of a run. They are started in the first phase of the run that it is told of."""

    def __init__(self, settings: TrainSettings, directory: Path, *, clock: Callable[[], float] = time.time):
        """Load the trackers that the settings name.

        Args:
          settings: of the run.
          directory: of the run.
          clock: returns seconds since 1970.
        Raises:
          SettingError: one is not there.
        """
        self._makers = load_trackers(settings.track)
        self._directory, self._unsafe, self._model = directory, settings.track_unsafe, settings.track_model
        began = clock()
        self._now = clock if self._unsafe else lambda: began
        self._sinks: dict[str, Sink] = {}
        self._failed: set[str] = set()

    def preparing(self, what: str) -> None:
        """Start the trackers, at the first call."""
        makers, self._makers = self._makers, {}
        for name, make in makers.items():
            with self._going_on(name):
                folder = self._directory / TRACKERS / name
                folder.mkdir(parents=True, exist_ok=True)
                self._sinks[name] = make(
                    TrackedRun(
                        directory=self._directory,
                        folder=folder,
                        now=self._now,
                        unsafe=self._unsafe,
                        model=self._model,
                    )
                )

    def started(self, plan: PrivacyPlan, settings: TrainSettings) -> None:
        self._tell(lambda sink: sink.started(plan, settings))

    def stepped(self, progress: Progress) -> None:
        told = progress if self._unsafe else dataclasses.replace(progress, examples_per_second=math.nan)
        self._tell(lambda sink: sink.stepped(told))

    def epoch_ended(self, epoch: EpochRecord) -> None:
        told = epoch if self._unsafe else _released(epoch)
        self._tell(lambda sink: sink.epoch_ended(told))

    def finished(self, record: RunRecord) -> None:
        told = record
        if not self._unsafe:
            told = dataclasses.replace(record, per_epoch=[_released(epoch) for epoch in record.per_epoch])
        self._tell(lambda sink: sink.finished(told))

    def close(self) -> None:
        """Close the trackers that have a `close`: the process ends, whether or not the run has."""
        for name, sink in self._sinks.items():
            if (close := getattr(sink, "close", None)) is not None:
                with self._going_on(name):
                    close()

    def _tell(self, tell: Callable[[Sink], None]) -> None:
        for name, sink in self._sinks.items():
            with self._going_on(name):
                tell(sink)

    @contextlib.contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        """Context: an exception of a tracker becomes a warning, the first time; its own warnings are not shown."""
        failed = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                yield
            except Exception as error:  # another program's client may raise anything
                failed = error
        if failed is not None and name not in self._failed:
            self._failed.add(name)
            warnings.warn(
                f"Expected tracker {name} to take a run's numbers; got {type(failed).__name__}: {failed}. The run goes "
                "on. What the tracker lacks is in metrics.jsonl and record.json.",
                stacklevel=2,
            )


def _released(epoch: EpochRecord) -> EpochRecord:
    """Return an epoch without what the privacy statement does not cover."""
    return dataclasses.replace(epoch, nonprivate_accuracy_train=None)
