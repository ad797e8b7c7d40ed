# SPDX-License-Identifier: Apache-2.0
"""The place of a run's files: taken before anything slow is imported, given back if the run is refused.

A run can be killed while Python still loads torch. Its directory is there by then, with the settings in it, so that the
run can be continued. This module loads neither torch nor the accountant.
"""

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dpquant.errors import LedgerError, SettingError
from dpquant.privacy.ledger import Ledger
from dpquant.runs.names import (
    CHECKPOINTS,
    CHOICES,
    CONFIG,
    DESCRIPTION,
    DIVERGED,
    LEDGER,
    METRICS,
    PROGRESS,
    RECORD,
    RECORDS,
    TOKENIZER,
    TRACKERS,
)
from dpquant.runs.record import write_whole
from dpquant.runs.settings import TrainSettings, from_toml


class Place:
    """A directory for one run, which may not be there yet.

    Attributes:
      path: of the directory.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_new = not os.path.exists(path)
        self._missing = [folder for folder in path.absolute().parents if not os.path.exists(folder)]
        self._continues: bool | None = None  # None: not taken

    @contextlib.contextmanager
    def taken(self, settings: TrainSettings, *, resume: bool = False) -> Iterator[bool]:
        """Context: the directory is there and belongs to a run with these settings.

        If the context ends with an exception before anything is charged, the directory is given back. Taking a place
        again inside of its own context does nothing.

        Args:
          settings: of the run.
          resume: continue the run in the directory, if there is one. Its settings must be these.
        Returns: whether a run in the directory is continued.
        Raises:
          SettingError: the directory is not empty, cannot be made, or holds a run that cannot be continued.
          LedgerError: the ledger of the run in it is not as it was written.
        """
        if self._continues is not None:
            yield self._continues
            return
        if resume and self.holds_a_run():
            self.check_continues(settings)
            yield from self._held(continues=True)
        else:
            self.check()
            self.make(settings)
            yield from self._held(continues=False)

    def _held(self, *, continues: bool) -> Iterator[bool]:
        self._continues = continues
        try:
            yield continues
        except BaseException:
            if not continues:
                self.give_back()
            raise
        finally:
            self._continues = None

    def check(self) -> None:
        """Check that the directory is new or empty and can be created. It is not created yet.

        Raises:
          SettingError: the path is not empty, not a directory, or cannot be written to.
        """
        path = self.path
        if not self._is_new and (not path.is_dir() or any(path.iterdir())):
            raise SettingError(f"Expected out to be a new or empty directory; got out={path}. Name another one.")
        # Where a parent folder may not be read, os.path.exists returns False and Path.exists raises
        nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.exists(folder))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise SettingError(
                f"Expected out to be a place where a directory can be made; got out={path}. {nearest} cannot be "
                "written to. Name another one."
            )

    def holds_a_run(self) -> bool:
        """Return whether the directory is there and not empty."""
        return self.path.is_dir() and any(self.path.iterdir())

    def settings(self) -> TrainSettings:
        """Return the settings of the run in the directory.

        Raises:
          SettingError: there is no run, or its settings cannot be read.
        """
        if not (self.path / CONFIG).is_file():
            raise SettingError(
                f"Expected the directory of a run; got {self.path}, which holds no {CONFIG}. Name the directory that "
                "dpquant train has made."
            )
        return TrainSettings.chosen({}, from_toml(self.path / CONFIG))

    def check_continues(self, settings: TrainSettings) -> None:
        """Check that the directory holds a run with these settings that has not ended.

        Raises:
          SettingError: it does not.
          LedgerError: its ledger is not as it was written.
        """
        own = self.settings()
        if (self.path / RECORD).exists():
            raise SettingError(
                f"Expected a run that has not ended; got {self.path}, which holds its record. Its budget is spent. "
                "Begin a new run in another directory; epsilon adds up."
            )
        if (self.path / DIVERGED).exists():
            raise SettingError(
                f"Expected a run that has not diverged; got {self.path}, which did: "
                f"{(self.path / DIVERGED).read_text(encoding='utf-8')}"
            )
        if (self.path / LEDGER).exists():
            Ledger.verify(self.path / LEDGER)
        self._check_same(own, settings)

    def has_ended(self, settings: TrainSettings) -> bool:
        """Return whether the directory holds a run that has ended; then nothing is left to continue.

        Raises:
          SettingError: it holds one that has ended, with other settings.
        """
        if not (self.path / RECORD).exists():
            return False
        self._check_same(self.settings(), settings)
        return True

    def _check_same(self, own: TrainSettings, settings: TrainSettings) -> None:
        """Check that settings are those of the run in the directory, its own."""
        differ = [f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(settings, f.name)]
        if differ:
            name = differ[0]
            raise SettingError(
                f"Expected {name}={getattr(own, name)!r}, as in {self.path / CONFIG}; got {getattr(settings, name)!r}. "
                "What is charged was charged under the former. Leave it out, or begin a new run in another directory."
            )

    def make(self, settings: TrainSettings) -> None:
        """Make the directory with the settings in it, both at once, so that a run can always be continued.

        Raises:
          SettingError: it cannot be made.
        """
        draft = self.path.absolute().with_name(f"{self.path.name}.tmp-{os.getpid()}")
        try:
            draft.mkdir(parents=True)
            write_whole(draft / CONFIG, settings.to_toml())
            draft.replace(self.path)  # over an empty directory, too
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise SettingError(
                f"Expected out to be a place where a directory can be made; got out={self.path}: "
                f"{error.strerror or error}. Name another one."
            ) from error

    def give_back(self) -> None:
        """Remove the files of a run that was refused before its first charge, and the directory if it was new.

        Nothing is removed if the ledger holds charges.
        """
        if self._is_charged():
            return
        for name in (CONFIG, LEDGER, CHOICES, METRICS, RECORDS, DESCRIPTION, TOKENIZER, PROGRESS):
            (self.path / name).unlink(missing_ok=True)
        for folder in (CHECKPOINTS, TRACKERS):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        if self._is_new:
            with contextlib.suppress(OSError):  # a directory is not empty: other files stay
                for folder in (self.path, *self._missing):
                    folder.rmdir()

    def _is_charged(self) -> bool:
        """Return whether the ledger holds charges, or cannot be read, so that it may."""
        try:
            return (self.path / LEDGER).exists() and len(Ledger.read(self.path / LEDGER)) > 0
        except LedgerError:
            return True
