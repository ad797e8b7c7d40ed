# SPDX-License-Identifier: Apache-2.0
"""The ledger: an append-only file of charges, written before each use of data.

`charge` returns only when a line that covers it is on disk, and only then may data be read. A crash can therefore waste
budget but never hide a release. The file is JSON, one object a line. Every line has a number `seq`, a `kind`, the hash
of the line before (`previous`, zeros in the first) and its own `hash` (sha256 of the line without this field):

    header             the first line: format, run (a random name), plan (epsilon, delta and planned events; null
                       without a plan), neighbours and public (what the guarantee is about), dpquant (its version)
    attempt            number (from 1), research: a process begins to write, the first or one that continues the run
    train, analysis    sample_rate, noise_multiplier, count, research: releases that are about to happen
    returned           lease (number of a train line), count: releases of that line that never happened

**Leases.** A line for every step would cost a fast step dearly, since a disk takes milliseconds. A train line may
therefore charge up to `lease` steps ahead, which `charge` then serves without touching the disk. The number is fixed
when the ledger is opened, from the time that its own line took and from a step's time on synthetic records: a real
step's time depends on the size of its batch, which is private. A clean end gives the rest back; that is sound, because
the rest never touched data. After a crash the whole lease stays charged, and so a lease is never more than a hundredth
of the plan: on a slow disk it would otherwise be a third of a short run, which three crashes would leave without steps.

**Reading** recomputes every hash, so that a changed, removed, inserted or swapped line is an error. Two changes are not
errors. A torn last line, one without its end, is ignored: its charge had not returned, so no data was read under it.
And a chain cannot show that whole lines are missing at its end; to find that, compare `head`, the hash of the last
line, with the one in a report. The chain finds accidents and careless edits. It is not a signature: whoever rewrites
the whole file can recompute it. Format 1 had neither header nor attempts. It can be read, and not continued.

The ledger records what it is told and computes no epsilon. `entries.py` reads the lines, `disk.py` writes them.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Self

from dpquant.errors import BudgetError, LedgerError, SettingError, expect
from dpquant.privacy.disk import DISK, AppendFile, Disk
from dpquant.privacy.entries import FORMAT, Contents, header, line_of, verified
from dpquant.privacy.events import Budget, Event, Kind, merged

LONGEST_LEASE = 64  # steps; a crash wastes at most as many
_SHARE = 0.01  # of a step's time, which its ledger may take
_WASTE = 0.01  # of the planned steps, which a crash may cost; also bounds the lines of a run, on whatever disk, by 100


class Ledger:
    """An open ledger. With a file, every charge is on disk before `charge` returns, and no other process can write.

    Attributes:
      path: the file; None keeps charges in memory only.
      budget: what may be charged at most; None sets no limit, and leases nothing.
      research: whether every charge is marked as not private.
      attempt: number of processes that have written to the file, this one included.
      lease: number of steps that a train line charges at most.
      repaired: length of the torn line that `resumed` removed.
      head: hash of the last line; zeros before the first.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        budget: Budget | None = None,
        research: bool = False,
        step_seconds: float | None = None,
        disk: Disk = DISK,
    ):
        """Open a new ledger.

        Args:
          path: file to create, or an empty one; its folder is created. None keeps charges in memory only.
          budget: what may be charged at most. None sets no limit.
          research: True if the run's sampling or noise comes from a given seed.
          step_seconds: time of a step on synthetic records, a public fact that decides on `lease`. None charges every
            step by itself.
          disk: makes all calls of the operating system.
        Raises:
          LedgerError: the file cannot be written, another process writes to it, or it already holds lines.
        """
        expect("path", path, (Path, type(None)), "a pathlib.Path or None", "Give pathlib.Path('ledger.jsonl')")
        self.path, self.budget, self.research, self._step_seconds = path, budget, research, step_seconds
        self.lease, self.repaired, self._contents = 1, 0, Contents(budget=budget)
        self._ahead = self._lease_line = 0  # steps of the last lease that are left, and its line's number
        self._file = None if path is None else AppendFile(path, disk, new=True)
        if self._file is not None:
            if self._file.length > 0:
                self._file.close()
                raise LedgerError(
                    f"Expected a new or empty ledger; got {path}, which holds charges. They belong to another run. "
                    "Choose another place."
                )
            self._append(header(budget))
            self._file.keep_name()
            self._begin_attempt()

    @classmethod
    def resumed(
        cls,
        path: Path,
        *,
        budget: Budget | None = None,
        research: bool = False,
        step_seconds: float | None = None,
        disk: Disk = DISK,
    ) -> Self:
        """Open the ledger of a run that continues: verify it, remove a torn last line, and begin another attempt.

        Args:
          path: the run's ledger, of format 2.
          budget: of the run's plan, which must be the ledger's own; None asks nothing.
          research: True if this attempt's sampling or noise comes from a given seed. It stays True if it ever was.
          step_seconds: as for a new ledger.
          disk: as for a new ledger.
        Returns: a ledger that goes on where the file ends; `repaired` is the length of what was removed.
        Raises:
          LedgerError: the file cannot be written, another process writes to it, it is not as it was written, it holds
            no header, or its plan is another one. It is then left as it is.
        """
        file = AppendFile(path, disk, new=False)
        try:
            contents = verified(path, file.read())
            if contents.format != FORMAT or contents.num_lines == 0:
                found = "a ledger of format 1" if contents.num_lines else "no complete line"
                raise LedgerError(
                    f"Expected a ledger of format {FORMAT} in {path}; got {found}. It says nothing of the plan, so "
                    "that nothing may be charged to it. Begin a new run."
                )
            if budget is not None and budget != contents.budget:
                raise LedgerError(
                    f"Expected the plan that line 1 of {path} names; got another one. What was charged there would not "
                    "count towards it. Continue with the run's own settings."
                )
            if contents.torn:
                file.cut(contents.num_bytes)
            elif file.length < contents.num_bytes:  # a whole last line that lacks its end of line
                file.append(b"\n")
            ledger = cls(budget=contents.budget, research=research or contents.research, step_seconds=step_seconds)
            ledger.path, ledger.repaired, ledger._file, ledger._contents = path, contents.torn, file, contents
            ledger._begin_attempt()
        except BaseException:
            file.close()
            raise
        return ledger

    @property
    def head(self) -> str:
        return self._contents.head

    @property
    def attempt(self) -> int:
        return self._contents.attempts

    @classmethod
    def verify(cls, path: Path) -> Contents:
        """Verify a ledger file and return all that it says. The file is not changed, and may be in use.

        Raises:
          LedgerError: the file cannot be read, or a line is not as it was written; the message names the line.
        Privacy: post-processing.
        """
        expect("path", path, Path, "a pathlib.Path", "Give pathlib.Path('ledger.jsonl')")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise LedgerError(
                f"Expected a readable ledger; got {path}: {error.strerror or error}. Check the path."
            ) from error
        return verified(path, data)

    @classmethod
    def read(cls, path: Path) -> list[Event]:
        """Verify a ledger file and return what was charged, equal releases counted together. Raises as `verify`."""
        return cls.verify(path).events

    def charge(self, *, kind: Kind, sample_rate: float, noise_multiplier: float, count: int = 1) -> None:
        """Record releases that are about to happen. Once this returns they are charged, whatever happens next.

        Args:
          kind: `train` or `analysis`.
          sample_rate: probability with which each record takes part in a release, in (0, 1].
          noise_multiplier: standard deviation of the noise over the sensitivity, >= 0.
          count: number of releases, >= 1.
        Raises:
          SettingError: a value out of range.
          BudgetError: the budget does not hold these releases. Nothing was written.
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
        self._refuse_beyond_budget(event)
        if kind == "train" and event.count <= self._ahead:
            self._ahead -= event.count
        elif kind == "train":
            self.settle()
            allowed = self.remaining(kind) or 1  # without a budget nothing is leased
            written = dataclasses.replace(event, count=max(event.count, min(self.lease, allowed)))
            self._append(dataclasses.asdict(written))
            self._lease_line, self._ahead = self._contents.num_lines - 1, written.count - event.count
        else:
            self._append(dataclasses.asdict(event))
        self._contents.events = merged([*self._contents.events, event])

    def events(self) -> list[Event]:
        """Return what was charged so far, equal releases counted together, without leased steps that are not taken.

        A process that crashes now leaves a file that charges these too. Privacy: post-processing.
        """
        return list(self._contents.events)

    def charged(self, kind: Kind) -> int:
        """Return how many releases of a kind were charged, in all attempts: more than were made, if one crashed."""
        return self._contents.charged(kind)

    def remaining(self, kind: Kind) -> int | None:
        """Return how many more releases of a kind the budget holds; None if there is no budget."""
        if self.budget is None:
            return None
        planned = self.budget.planned(kind)
        return 0 if planned is None else max(0, planned.count - self.charged(kind))

    def settle(self) -> None:
        """Give back the leased steps that were not taken. Does nothing after a failed write: they stay charged.

        Raises:
          LedgerError: the line cannot be written.
        """
        if self._ahead and self._file is not None and self._file.sound:
            self._append({"kind": "returned", "lease": self._lease_line, "count": self._ahead})
        self._ahead = 0

    def close(self) -> None:
        """Give back what was not used, and let another process write. Twice does no harm."""
        try:
            self.settle()
        finally:
            if self._file is not None:
                self._file.close()

    def _refuse_beyond_budget(self, event: Event) -> None:
        if self.budget is None:
            return
        planned = self.budget.planned(event.kind)
        if planned is None or dataclasses.replace(planned, count=event.count, research=event.research) != event:
            raise BudgetError(
                f"Expected a charge that is planned; got {event}. The budget holds for what the plan names. Plan it "
                "before the run begins."
            )
        remaining = self.remaining(event.kind) or 0
        if event.count > remaining:
            raise BudgetError(
                f"Expected at most {remaining} more releases of kind {event.kind}; got {event.count}. The planned "
                f"{planned.count} are charged, and more would exceed the plan's epsilon. Plan more before a run begins."
            )

    def _begin_attempt(self) -> None:
        """Write the line that begins an attempt, and fix the length of its leases by the time which that took."""
        number = self._contents.attempts + 1
        seconds = self._append({"kind": "attempt", "number": number, "research": self.research})
        self._contents.attempts = number
        planned = None if self.budget is None else self.budget.planned("train")
        if planned is not None and self._step_seconds is not None:
            least = seconds / (_SHARE * max(self._step_seconds, 1e-9))
            longest = min(LONGEST_LEASE, math.floor(_WASTE * planned.count))
            self.lease = max(1, min(math.ceil(least), longest))

    def _append(self, facts: dict[str, Any]) -> float:
        """Write a line, return once it is on disk, and return how many seconds that took."""
        contents = self._contents
        line, head = line_of({"seq": contents.num_lines, **facts, "previous": contents.head})
        seconds = 0.0 if self._file is None else self._file.append(line + b"\n")
        contents.head = head
        contents.num_lines += 1
        return seconds
