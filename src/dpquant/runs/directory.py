# SPDX-License-Identifier: Apache-2.0
"""Files of a run directory: writing each of them completely or not at all."""

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
from dpquant.runs.description import ModelDescription
from dpquant.runs.names import (
    CHECKPOINTS,
    CHOICES,
    DESCRIPTION,
    DIVERGED,
    METRICS,
    MODEL,
    RECORD,
    RECORDS,
    TIMINGS,
    TOKENIZER,
)
from dpquant.runs.record import EpochRecord, RunRecord, metrics_line, replacing, sha256, write_whole
from dpquant.runs.timings import Timings
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

    def know_records(self, train_set: MapDataset, *, apart: bool = False) -> None:
        """Write the fingerprint of the training records, or, if there is one, check that they are still the same.

        Args:
          train_set: of this process.
          apart: other processes have other records, of which the fingerprint is, too.
        Raises:
          DataError: they are not.
          SettingError: the file cannot be written.
        """
        salt = self.salt_of_records()
        found = fingerprint.hash_of(train_set, salt)
        self.know_hash(salt, fingerprint.joined([found]) if apart else found)

    def salt_of_records(self) -> str:
        """Return the salt of the fingerprint of the training records, a new one if there is none."""
        return fingerprint.salt_in(self.path / RECORDS)

    def know_hash(self, salt: str, found: str) -> None:
        """Write the fingerprint, or, if there is one, check that it is this one. Raises as `know_records`."""
        path = self.path / RECORDS
        try:
            fingerprint.know(path, salt, found)
        except OSError as error:
            raise SettingError(
                f"Expected out to be a place that can be written to; got {path}: {error.strerror or error}. Make "
                "room, or name another place."
            ) from error

    def describe(self, description: ModelDescription) -> None:
        """Write what is needed to use the model. To be called before any charge.

        Raises:
          OSError: the file cannot be written.
        """
        description.write(self.path / DESCRIPTION)

    def keep_tokenizer(self, content: bytes) -> None:
        """Write a copy of the tokenizer, by which texts become inputs. To be called before any charge.

        Raises:
          OSError: the file cannot be written.
        """
        with replacing(self.path / TOKENIZER) as draft:
            draft.write_bytes(content)

    def model_sha256(self) -> str:
        """Return the SHA-256 of the model's file. Privacy: post-processing.

        Raises:
          OSError: the file cannot be read.
        """
        return sha256(self.path / MODEL)

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

    def past_timings(self, epochs: int) -> Timings | None:
        """Return the times of earlier processes of the run, with the ends of its first epochs; None if there are none.

        Args:
          epochs: how many epochs the run has ended, as it continues.
        Raises:
          DataError: the file cannot be read.
        """
        past = Timings.read(self.path / TIMINGS)
        return past and dataclasses.replace(past, seconds_at_epoch_ends=past.seconds_at_epoch_ends[:epochs])

    def keep(self, model: nn.Module, choices: Choices, timings: Timings) -> None:
        """Write model, timings and choices after an epoch, each file completely or not at all.

        Raises:
          OSError, SafetensorError: a file cannot be written.
        """
        with replacing(self.path / MODEL) as draft:
            self.save(model, draft)
        timings.write(self.path / TIMINGS)
        self._write_choices(choices)

    def note_divergence(self, reason: str) -> None:
        """Write why the run cannot go on, for whoever wants to continue it. Privacy: post-processing.

        Raises:
          OSError: the file cannot be written.
        """
        write_whole(self.path / DIVERGED, reason + "\n")

    def end(self, record: RunRecord, timings: Timings) -> None:
        """Write the record and the timings of the whole run.

        Raises:
          OSError: a file cannot be written.
        """
        timings.write(self.path / TIMINGS)
        record.write(self.path / RECORD)

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
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
