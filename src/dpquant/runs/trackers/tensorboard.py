# SPDX-License-Identifier: Apache-2.0
"""TensorBoard: event files in RUN/trackers/tensorboard, written by tensorboardX. TensorBoard itself is not needed."""

from tensorboardX import SummaryWriter

from dpquant.privacy.plan import PrivacyPlan
from dpquant.runs.record import EpochRecord, RunRecord
from dpquant.runs.settings import TrainSettings
from dpquant.runs.sinks import Progress, Sink
from dpquant.runs.trackers.numbers import numbers_of
from dpquant.runs.trackers.tracking import TrackedRun


class Tracker(Sink):
    """Writes an epoch's numbers at the step that is its number, from 1, and settings and statement as text.

    A process that continues a run adds a file of events to the same folder, which TensorBoard shows as one run.
    """

    def __init__(self, run: TrackedRun):
        """Open a file of events in the tracker's folder."""
        self._now, self._progress = run.now, None
        self._writer = SummaryWriter(str(run.folder))
        self._plan: PrivacyPlan
        self._progress: Progress | None

    def started(self, plan: PrivacyPlan, settings: TrainSettings) -> None:
        self._plan = plan
        self._write("settings", settings.to_toml())

    def stepped(self, progress: Progress) -> None:
        self._progress = progress

    def epoch_ended(self, epoch: EpochRecord) -> None:
        for name, value in numbers_of(epoch, self._progress, self._plan).items():
            self._writer.add_scalar(name, value, epoch.index + 1, walltime=self._now())
        self._writer.flush()

    def finished(self, record: RunRecord) -> None:
        self._write("dpquant.statement", record.statement)

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()

    def _write(self, name: str, text: str) -> None:
        indented = "".join(f"    {line}\n" for line in text.splitlines())  # TensorBoard reads Markdown
        self._writer.add_text(name, indented, 0, walltime=self._now())
        self._writer.flush()
