# SPDX-License-Identifier: Apache-2.0
"""Files of a run directory: writing each of them completely or not at all."""

import contextlib
import dataclasses
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from dpquant.backends.choose import Choices
from dpquant.errors import ModelError, SettingError
from dpquant.privacy import accounting
from dpquant.privacy.ledger import Ledger
from dpquant.privacy.plan import PrivacyPlan, rounded_up
from dpquant.runs import fingerprint
from dpquant.runs.names import CHECKPOINTS, CHOICES, CONFIG, LEDGER, METRICS, MODEL, RECORD, RECORDS, TIMINGS
from dpquant.runs.record import EpochRecord, RunRecord, Timings, metrics_line, replacing, write_whole
from dpquant.runs.settings import TrainSettings, from_toml
from dpquant.training.checkpoint import newest, purge
from dpquant.training.continuing import Stateful
from dpquant.training.private import PrivateTraining
from dpquant.training.records import MapDataset

_KEPT = 2  # checkpoints


class Charged(NamedTuple):
    """Privacy budget that a run has spent.

    Attributes:
      steps: training steps that were charged.
      epsilon: epsilon of everything that was charged, at the plan's delta.
      research: noise or sampling of an event was drawn from a seed, so that epsilon is no guarantee.
    """

    steps: int
    epsilon: float
    research: bool

    def told(self, plan: PrivacyPlan) -> str:
        """Return in words what a run that was stopped has spent."""
        secure = "" if not self.research else "; NOT PRIVATE: sampling or noise came from a given seed"
        return (
            f"interrupted after {self.steps} of {plan.steps} steps; spent so far: "
            f"epsilon = {rounded_up(self.epsilon)} at delta = {plan.delta:g}{secure}"
        )


def charged(ledger: Path, plan: PrivacyPlan) -> Charged:
    """Return the budget that a run has spent so far, computed from its ledger file.

    This holds for a run that was stopped, too: an event is written before its data is used.

    Args:
      ledger: path of the run's ledger; a missing file holds no events.
      plan: of the run, for delta.
    Raises:
      LedgerError: the file is unreadable or inconsistent.
    Privacy: post-processing.
    """
    events = Ledger.read(ledger) if ledger.exists() else []
    return Charged(
        steps=sum(event.count for event in events if event.kind == "train"),
        epsilon=accounting.epsilon(events, plan.delta),
        research=any(event.research for event in events),
    )


class RunDirectory:
    """Writer of a run's files. `train` constructs one from `out` by default.

    Attributes:
      path: of the directory.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_new = not os.path.exists(path)
        self._missing = [folder for folder in path.absolute().parents if not os.path.exists(folder)]

    def check_place(self) -> None:
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
        return TrainSettings.chosen(from_toml(self.path / CONFIG))

    def check_continues(self, settings: TrainSettings) -> None:
        """Check that the directory holds a run with these settings that has not ended.

        Raises:
          SettingError: it does not.
        """
        own = self.settings()
        if (self.path / RECORD).exists():
            raise SettingError(
                f"Expected a run that has not ended; got {self.path}, which holds its record. Its budget is spent. "
                "Begin a new run in another directory; epsilon adds up."
            )
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

    def know_records(self, train_set: MapDataset) -> None:
        """Write the fingerprint of the training records, or, if there is one, check that they are still the same.

        Raises:
          DataError: they are not.
          SettingError: the file cannot be written.
        """
        path = self.path / RECORDS
        if path.exists():
            fingerprint.check(path, train_set)
            return
        try:
            fingerprint.write(path, train_set)
        except OSError as error:
            raise SettingError(
                f"Expected out to be a place that can be written to; got {path}: {error.strerror or error}. Make "
                "room, or name another place."
            ) from error

    def begin(self, model: nn.Module, choices: Choices, epochs: Sequence[EpochRecord]) -> None:
        """Try to save the model, then write choices and the metrics of past epochs. To be called before any charge.

        Raises:
          ModelError: the model cannot be saved, or loading it back changes it.
          OSError, SafetensorError: a file cannot be written.
        """
        self.try_saving(model)
        self._write_choices(choices)
        if epochs or (self.path / METRICS).exists():
            write_whole(self.path / METRICS, "".join(metrics_line(one) + "\n" for one in epochs))

    def choices(self) -> Choices | None:
        """Return the decisions of the run in the directory; None if it had made none."""
        return Choices.read(self.path / CHOICES) if (self.path / CHOICES).exists() else None

    def checkpoint(self, private: PrivateTraining, parts: Mapping[str, Stateful]) -> None:
        """Write a checkpoint, unless there is one of this step, and remove all but the newest two.

        Raises:
          SettingError: it cannot be written.
        """
        home = self.path / CHECKPOINTS
        folder = home / f"step-{private.steps_taken:08d}"
        home.mkdir(exist_ok=True)
        if folder.exists():
            if newest(home)[0] == folder:
                return
            shutil.rmtree(folder)
        private.save(folder, **parts)
        purge(home, keep=_KEPT)

    def newest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that is as it was written; warn of newer ones. None if there is none."""
        home = self.path / CHECKPOINTS
        if not home.is_dir():
            return None
        found, refused = newest(home)
        for why in refused.values():
            warnings.warn(f"{why} The run continues from {'the start' if found is None else found.name}.", stacklevel=2)
        return found

    def shift_clocks(self, private: PrivateTraining, began: float) -> float:
        """Add the times of earlier processes to a run's, and return when it would have begun in one."""
        past = Timings.read(self.path / TIMINGS)
        if past is None:
            return began
        private.seconds_train += past.seconds_train
        private.seconds_analysis += past.seconds_analysis
        return began - past.seconds_total

    def keep(self, model: nn.Module, choices: Choices, timings: Timings) -> None:
        """Write model, timings and choices after an epoch, each file completely or not at all.

        Raises:
          OSError, SafetensorError: a file cannot be written.
        """
        with replacing(self.path / MODEL) as draft:
            self.save(model, draft)
        timings.write(self.path / TIMINGS)
        self._write_choices(choices)

    def end(self, record: RunRecord, timings: Timings) -> None:
        """Write the record and the timings of the whole run.

        Raises:
          OSError: a file cannot be written.
        """
        timings.write(self.path / TIMINGS)
        record.write(self.path / RECORD)

    def take_back(self) -> None:
        """Remove the files of a run that was refused before its first charge, and the directory if it was new.

        Nothing is removed if the ledger holds charges.
        """
        if (self.path / LEDGER).exists() and Ledger.read(self.path / LEDGER):
            return
        for name in (CONFIG, LEDGER, CHOICES, METRICS, RECORDS):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / CHECKPOINTS, ignore_errors=True)
        if self._is_new:
            with contextlib.suppress(OSError):  # a directory is not empty: other files stay
                for folder in (self.path, *self._missing):
                    folder.rmdir()

    def save(self, model: nn.Module, path: Path) -> None:
        """Save a model's parameters and buffers. A tensor that several names share is saved once."""
        save_model(model, str(path))

    def try_saving(self, model: nn.Module) -> None:
        """Save the model to a trial file in the directory, load it back and compare all bytes.

        Raises:
          ModelError: the model cannot be saved, or loading it back changes it.
          OSError, SafetensorError: the file cannot be written.
        """
        draft = self.path / f"{MODEL}.trial"
        try:
            before = {name: _bytes(tensor) for name, tensor in model.state_dict().items()}
            self.save(model, draft)
            load_model(model, draft)
            changed = [name for name, t in model.state_dict().items() if not torch.equal(before[name], _bytes(t))]
        except (OSError, SafetensorError):
            raise
        except Exception as error:  # safetensors and a user's state_dict may raise anything
            raise ModelError(
                f"Expected a model that safetensors can save and load back; got a {type(error).__name__}: {error}. A "
                "model that cannot be saved would be lost after training. Let its state_dict hold whole tensors only."
            ) from error
        finally:
            draft.unlink(missing_ok=True)
        if changed:
            raise ModelError(
                f"Expected a model that comes back from its file as it was saved; got another {changed[0]}. It would "
                "not be the model that was trained. Let its state_dict hold its parameters and buffers as they are."
            )

    def _write_choices(self, choices: Choices) -> None:
        write_whole(self.path / CHOICES, choices.to_json())


def _bytes(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor's bytes: as numbers, NaN would differ from itself."""
    return tensor.detach().cpu().reshape(-1).clone().view(torch.uint8)


def append_line(path: Path, line: str) -> None:
    """Append a line to a file and flush it to disk before returning."""
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
