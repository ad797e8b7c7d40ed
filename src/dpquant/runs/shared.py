# SPDX-License-Identifier: Apache-2.0
"""The run directory of several processes: process 0 takes it and writes it, and all fail where it does.

Every process makes the same calls in the same order, because the answer of process 0 goes to all. Checkpoints are read
by every process, from where process 0 has found them.
"""

import contextlib
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from dpquant.backends.choose import Choices
from dpquant.runs import fingerprint
from dpquant.runs.description import ModelDescription
from dpquant.runs.devices import described
from dpquant.runs.directory import RunDirectory
from dpquant.runs.place import Place
from dpquant.runs.provenance import GroupRecord, ProcessRecord
from dpquant.runs.record import EpochRecord, RunRecord
from dpquant.runs.settings import TrainSettings
from dpquant.runs.timings import Timings
from dpquant.training.agreement import on_first, together
from dpquant.training.continuing import Stateful
from dpquant.training.distributed import Group
from dpquant.training.private import PrivateTraining
from dpquant.training.records import MapDataset
from dpquant.training.roll_call import departing


def first_says(group: Group, work: Callable[[], Any]) -> Any:
    """Let process 0 do some work, and return its result, of JSON's types, on every process.

    Raises: on every process, what the work raises.
    """
    return json.loads(on_first(group, lambda: json.dumps(work()).encode()))


def shared(out: Path | Place, directory: Callable[[Path], RunDirectory], group: Group) -> tuple[Place, RunDirectory]:
    """Return the place of a run's files and their writer; of several processes, the first takes and writes it."""
    place = out if isinstance(out, Place) else Place(out) if group.size == 1 else SharedPlace(out, group)
    files = directory(place.path)
    return place, files if group.size == 1 else SharedDirectory(place.path, files, group)


def group_record(group: Group, device: torch.device) -> GroupRecord:
    """Return the record of a run's processes; `device` is that of this one."""
    own = ProcessRecord.here(torch.get_num_threads(), described(device))
    return GroupRecord.of("" if group.size == 1 else dist.get_backend_config(), group.from_all(own.to_json()))


class SharedPlace(Place):
    """The place of a run's files, which process 0 takes for all."""

    def __init__(self, path: Path, group: Group):
        super().__init__(path)
        self._own, self._group = Place(path), group

    @contextlib.contextmanager
    def taken(self, settings: TrainSettings, *, resume: bool = False) -> Iterator[bool]:
        """Context: as for `Place`. The directory is taken, and given back, by process 0."""
        if self._continues is not None:
            yield self._continues
            return
        with contextlib.ExitStack() as stack:
            take = self._own.taken(settings, resume=resume)
            self._continues = continues = first_says(self._group, lambda: stack.enter_context(take))
            try:
                yield continues
            finally:
                self._continues = None

    def has_ended(self, settings: TrainSettings) -> bool:
        """Return whether the directory holds a run that has ended. Raises as for `Place`."""
        with departing():
            return first_says(self._group, lambda: self._own.has_ended(settings))

    def settings(self) -> TrainSettings:
        """Return the settings of the run in the directory. Raises as for `Place`."""
        text = first_says(self._group, lambda: self._own.settings().to_toml())
        return TrainSettings.chosen({}, tomllib.loads(text))


class SharedDirectory(RunDirectory):
    """The run's files, which process 0 writes for all."""

    def __init__(self, path: Path, own: RunDirectory, group: Group):
        """Write by `own` on process 0, and nothing elsewhere."""
        super().__init__(path)
        self._own, self._group = own, group

    def know_records(self, train_set: MapDataset, *, apart: bool = False) -> None:
        if not apart:
            self._write(lambda: self._own.know_records(train_set))
            return
        salt = first_says(self._group, self._own.salt_of_records)
        own = together(self._group, lambda: fingerprint.hash_of(train_set, salt))
        hashes = [one.decode() for one in self._group.from_all(own.encode())]
        self._write(lambda: self._own.know_hash(salt, fingerprint.joined(hashes)))

    def describe(self, description: ModelDescription) -> None:
        self._write(lambda: self._own.describe(description))

    def keep_tokenizer(self, content: bytes) -> None:
        self._write(lambda: self._own.keep_tokenizer(content))

    def model_sha256(self) -> str:
        return first_says(self._group, self._own.model_sha256)

    def begin(self, model: nn.Module, choices: Choices, epochs: Sequence[EpochRecord]) -> None:
        self._write(lambda: self._own.begin(model, choices, epochs))

    def choices(self) -> Choices | None:
        return self._own.choices() if self._group.rank == 0 else None  # what process 0 decides holds for all

    def checkpoint(self, private: PrivateTraining, parts: Mapping[str, Stateful]) -> None:
        private.gather_state()
        self._write(lambda: self._own.checkpoint(private, parts))

    def newest_checkpoint(self) -> Path | None:
        found = first_says(self._group, lambda: None if (one := self._own.newest_checkpoint()) is None else str(one))
        return None if found is None else Path(found)

    def past_timings(self, epochs: int) -> Timings | None:
        return self._own.past_timings(epochs) if self._group.rank == 0 else None  # the operator's, of process 0

    def keep(self, model: nn.Module, choices: Choices, timings: Timings) -> None:
        self._write(lambda: self._own.keep(model, choices, timings))

    def note_divergence(self, reason: str) -> None:
        self._write(lambda: self._own.note_divergence(reason))

    def end(self, record: RunRecord, timings: Timings) -> None:
        self._write(lambda: self._own.end(record, timings))

    def _write(self, write: Callable[[], None]) -> None:
        first_says(self._group, write)
