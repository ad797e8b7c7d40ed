# SPDX-License-Identifier: Apache-2.0
"""The files of a run directory: their names, and how each is written, whole or not at all."""

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
from dpquant.runs.record import RunRecord, Timings, replacing, write_whole
from dpquant.runs.settings import TrainSettings

CONFIG, LEDGER, METRICS = "config.toml", "ledger.jsonl", "metrics.jsonl"
MODEL, RECORD, TIMINGS, CHOICES = "model.safetensors", "record.json", "timings.json", "choices.json"


class Charged(NamedTuple):
    """What a run has spent.

    Attributes:
      steps: training steps that were charged.
      epsilon: of everything that was charged, at the plan's delta.
      research: some of it came from a seed, so that epsilon is no guarantee.
    """

    steps: int
    epsilon: float
    research: bool


def charged(ledger: Path, plan: PrivacyPlan) -> Charged:
    """Return what a run has spent so far, by its ledger's own lines.

    The file is the truth even of a run that was stopped half-way: a charge is there before its data is used.

    Args:
      ledger: the run's file; a missing one holds no charges.
      plan: of that run, for delta.
    Raises:
      LedgerError: the file does not agree with itself.
    Privacy: post-processing.
    """
    events = Ledger.read(ledger) if ledger.exists() else []
    return Charged(
        steps=sum(event.count for event in events if event.kind == "train"),
        epsilon=accounting.epsilon(events, plan.delta),
        research=any(event.research for event in events),
    )


class RunDirectory:
    """Writer of a run's files. `train` makes one of its `out`, unless it is handed another.

    Attributes:
      path: of the directory.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_new = not os.path.exists(path)

    def check_place(self) -> None:
        """Refuse a place that is neither new nor empty, or cannot be made: it is made when all else is checked.

        Raises:
          SettingError: another place is needed.
        """
        path = self.path
        if not self._is_new and (not path.is_dir() or any(path.iterdir())):
            raise SettingError(f"Expected out to be a new or empty directory; got out={path}. Name another one.")
        # os.path.exists is also False where a folder above may not be looked into, when Path.exists would raise
        nearest = next(folder for folder in (path.absolute(), *path.absolute().parents) if os.path.exists(folder))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
            raise SettingError(
                f"Expected out to be a place where a directory can be made; got out={path}. {nearest} cannot be "
                "written to. Name another one."
            )

    def begin(self, settings: TrainSettings, model: nn.Module, choices: Choices) -> None:
        """Try to save the model, then write what is known before the first charge.

        Raises:
          ModelError: the model cannot be saved, or comes back as another.
          OSError, SafetensorError: there is no room.
        """
        self.try_saving(model)
        (self.path / CONFIG).write_text(settings.to_toml())
        self._write_choices(choices)

    def keep(self, model: nn.Module, choices: Choices, timings: Timings) -> None:
        """Write what there is after an epoch, each file whole or not at all.

        Raises:
          OSError, SafetensorError: there is no room.
        """
        with replacing(self.path / MODEL) as draft:
            self.save(model, draft)
        timings.write(self.path / TIMINGS)
        self._write_choices(choices)

    def end(self, record: RunRecord, timings: Timings) -> None:
        """Write the record, and the times of the whole run.

        Raises:
          OSError: there is no room.
        """
        timings.write(self.path / TIMINGS)
        record.write(self.path / RECORD)

    def take_back(self) -> None:
        """Remove what a run wrote that was refused before its first charge."""
        for name in (CONFIG, LEDGER, CHOICES):
            (self.path / name).unlink(missing_ok=True)
        if self._is_new:
            with contextlib.suppress(OSError):  # what else is there stays
                self.path.rmdir()

    def save(self, model: nn.Module, path: Path) -> None:
        """Save a model's parameters and buffers; of parameters that are one tensor, one is in the file."""
        save_model(model, str(path))

    def try_saving(self, model: nn.Module) -> None:
        """Save the model to where it will be kept and load it back.

        Raises:
          ModelError: it cannot be saved, or comes back as another.
          OSError, SafetensorError: there is no room.
        """
        draft = self.path / f"{MODEL}.trial"
        try:
            before = {name: _bytes(tensor) for name, tensor in model.state_dict().items()}
            self.save(model, draft)
            load_model(model, draft)
            changed = [name for name, t in model.state_dict().items() if not torch.equal(before[name], _bytes(t))]
        except (OSError, SafetensorError):
            raise
        except Exception as error:  # safetensors and a user's own state_dict raise what they like
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
    """Copy a tensor's bytes: two tensors of NaN differ as numbers."""
    return tensor.detach().cpu().reshape(-1).clone().view(torch.uint8)


def append_line(path: Path, line: str) -> None:
    """Append a line that is on disk when this returns."""
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
