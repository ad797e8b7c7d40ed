# SPDX-License-Identifier: Apache-2.0
"""The report of a run as the run ends: before its trackers are told, so that they can keep it."""

from pathlib import Path

from dpquant.app.report import write_report
from dpquant.errors import SettingError
from dpquant.runs.record import RunRecord
from dpquant.runs.sinks import Sink


class ReportAtEnd(Sink):
    """Sink that writes report.html when the record is written.

    Attributes:
      refused: why it could not be written; None if it could. The run is complete all the same.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self.refused: SettingError | None = None

    def finished(self, record: RunRecord) -> None:
        try:
            write_report(self._folder)
        except SettingError as error:
            self.refused = error
