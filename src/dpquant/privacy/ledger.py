# SPDX-License-Identifier: Apache-2.0
"""The ledger: an append-only file of charges, written before each use of data.

`charge` returns only when its line is on disk, and only then may data be read. A crash can therefore waste budget but
never hide a release. One line is one charge, in JSON:

    {"seq": 0, "kind": "train", "sample_rate": 0.05, "noise_multiplier": 1.1, "count": 1, "research": false,
     "previous": <hash of the line before, or zeros>, "hash": <sha256 of the line without this field>}

Reading recomputes the hash of every line, so that a changed, removed, inserted or swapped line is an error. Two changes
are not errors. A torn last line is ignored: its charge had not returned, so no data was read under it. And a chain
cannot show that whole lines are missing at its end; to find that, compare the hash of the last line with the one in a
report. The chain finds accidents and careless edits. It is not a signature: whoever rewrites the whole file can
recompute it.

The ledger records what it is told and computes no epsilon.
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

from dpquant.errors import LedgerError, SettingError
from dpquant.privacy.events import Event, Kind, merged

NO_HASH = "0" * 64  # `previous` of the first line, and the head of an empty ledger


class Ledger:
    """An open ledger. With a file, every charge is on disk before `charge` returns.

    Attributes:
      path: the file; None keeps charges in memory only.
      research: whether every charge is marked as not private.
      head: hash of the last line; zeros before the first charge.
    """

    def __init__(self, path: Path | None = None, *, research: bool = False):
        """Open a new, empty ledger.

        Args:
          path: file to create, or an empty one; None keeps charges in memory only.
          research: True if the run's sampling or noise comes from a given seed.
        Raises:
          LedgerError: the file cannot be written, or already holds charges.
        """
        self.path, self.research, self.head = path, research, NO_HASH
        self._events: list[Event] = []
        self._num_lines = self._num_bytes = 0
        if path is not None:
            self._create(path)

    @classmethod
    def read(cls, path: Path) -> list[Event]:
        """Verify a ledger file and return its events, one a line. The file is not changed.

        Raises:
          LedgerError: the file cannot be read, or a line is not as it was written.
        Privacy: post-processing.
        """
        try:
            *lines, tail = path.read_bytes().split(b"\n")
        except OSError as error:
            raise LedgerError(
                f"Expected a readable ledger; got {path}: {error.strerror or error}. Check the path."
            ) from error
        if b"}" in tail:  # a line ends with its only closing brace: this one is whole and is verified; else it is torn
            lines.append(tail)
        events, previous = [], NO_HASH
        for seq, line in enumerate(lines):
            try:
                entry = json.loads(line)
                event = Event(**{field.name: entry[field.name] for field in dataclasses.fields(Event)})
            except (ValueError, KeyError, TypeError) as error:
                raise _corrupt(path, seq) from error
            written, previous = _line(seq, event, previous)
            if line != written:
                raise _corrupt(path, seq)
            events.append(event)
        return events

    def charge(
        self,
        *,
        kind: Kind,
        sample_rate: float,
        noise_multiplier: float,
        count: int = 1,
    ) -> None:
        """Record releases that are about to happen. Once this returns they are charged, whatever happens next.

        Args:
          kind: `train` or `analysis`.
          sample_rate: probability with which each record takes part in a release, in (0, 1].
          noise_multiplier: standard deviation of the noise over the sensitivity, >= 0.
          count: number of releases, >= 1.
        Raises:
          SettingError: a value out of range.
          LedgerError: the line is not safely on disk. The caller must not read any data.
        Privacy: charges `count` events.
        """
        event = Event(
            kind=kind,
            sample_rate=float(sample_rate),
            noise_multiplier=float(noise_multiplier),
            count=int(count),
            research=self.research,
        )
        if event.count < 1:
            raise SettingError(f"Expected count >= 1; got count={count}. Charge what is about to be released.")
        line, head = _line(self._num_lines, event, self.head)
        if self.path is not None:
            self._append(self.path, line + b"\n")
        self.head = head
        self._num_lines += 1
        self._events = merged([*self._events, event])

    def events(self) -> list[Event]:
        """Return everything charged so far, equal releases counted together. Privacy: post-processing."""
        return list(self._events)

    def _create(self, path: Path) -> None:
        try:
            with path.open("ab") as file:
                if file.tell() > 0:
                    raise LedgerError(
                        f"Expected a new or empty ledger; got {path}, which holds charges. They belong to another run. "
                        "Choose another place."
                    )
            if os.name == "posix":  # Windows cannot open folders; there the file system alone keeps the name
                self._sync_folder(path.parent)
        except OSError as error:
            raise self._unwritable(path, error) from error

    @staticmethod
    def _sync_folder(folder: Path) -> None:
        """Flush a folder to disk, so that the names of its files survive a crash."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _append(self, path: Path, line: bytes) -> None:
        binary = getattr(os, "O_BINARY", 0)  # without it, Windows writes an end of line as two bytes
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | binary)
            try:
                if os.fstat(descriptor).st_size != self._num_bytes:
                    raise LedgerError(
                        f"Expected {path} as this run left it; got another length. Another program wrote to it, or an "
                        "earlier write failed half-way. Stop, and read it with Ledger.read."
                    )
                if os.write(descriptor, line) != len(line):
                    raise OSError(0, "the line was written in part")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unwritable(path, error) from error
        self._num_bytes += len(line)

    @staticmethod
    def _unwritable(path: Path, error: OSError) -> LedgerError:
        return LedgerError(
            f"Expected a ledger that can be written; got {path}: {error.strerror or error}. No data may be used "
            "without it. Make room, or choose another place."
        )


def _line(seq: int, event: Event, previous: str) -> tuple[bytes, str]:
    """Return a line without its newline, and its hash. Every float reads back as the same number."""
    entry = {"seq": seq, **dataclasses.asdict(event), "previous": previous}
    digest = hashlib.sha256(json.dumps(entry).encode()).hexdigest()
    return json.dumps({**entry, "hash": digest}).encode(), digest


def _corrupt(path: Path, seq: int) -> LedgerError:
    return LedgerError(
        f"Expected line {seq + 1} of {path} as it was written; got another. The ledger does not agree with itself, so "
        "no epsilon can be stated from it. Restore it from a copy."
    )
