# SPDX-License-Identifier: Apache-2.0
"""Files of a run directory: writing each of them completely or not at all."""

import contextlib
import os
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
from dpquant.privacy.plan import PrivacyPlan
from dpquant.runs.names import CHOICES, CONFIG, LEDGER, MODEL, RECORD, TIMINGS
from dpquant.runs.record import RunRecord, Timings, replacing, write_whole
from dpquant.runs.settings import TrainSettings


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

    def begin(self, settings: TrainSettings, model: nn.Module, choices: Choices) -> None:
        """Try to save the model, then write settings and choices. To be called before the first charge.

        Raises:
          ModelError: the model cannot be saved, or loading it back changes it.
          OSError, SafetensorError: a file cannot be written.
        """
        self.try_saving(model)
        (self.path / CONFIG).write_text(settings.to_toml())
        self._write_choices(choices)

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
        """Remove the files of a run that was refused before its first charge, and the directory if it was new."""
        for name in (CONFIG, LEDGER, CHOICES):
            (self.path / name).unlink(missing_ok=True)
        if self._is_new:
            with contextlib.suppress(OSError):  # the directory is not empty: other files stay
                self.path.rmdir()

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
