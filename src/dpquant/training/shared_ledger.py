# SPDX-License-Identifier: Apache-2.0
"""The ledger of a run with several processes: process 0 has it, and its answer to a charge goes to all.

    process 0    charge -> on disk      ┐ one message: done or the error, head, events
    process r    wait                   ┘ then read records, or raise the same error

So a record is read on no process before its charge is on the disk of process 0. Only opening and charging are
exchanges; the other calls answer from the last message.
"""

import dataclasses
import json
from collections.abc import Callable

from dpquant.privacy.events import Event, Kind
from dpquant.privacy.mechanism import Charges
from dpquant.training.agreement import on_first
from dpquant.training.distributed import Group


def shared(group: Group, opened: Callable[[], Charges]) -> Charges:
    """Return the ledger that process 0 opens, as this process sees it.

    Raises:
      LedgerError: on every process, if process 0 cannot open it.
    """
    return opened() if group.size == 1 else SharedLedger(group, opened)


class SharedLedger:
    """The ledger of process 0, as each process of a group sees it."""

    def __init__(self, group: Group, opened: Callable[[], Charges]):
        """Open the ledger on process 0, and nothing elsewhere."""
        self._group = group
        self._own: Charges | None = None

        def open_it() -> bytes:
            self._own = opened()
            return _facts(self._own)

        self._last = json.loads(on_first(group, open_it))

    @property
    def research(self) -> bool:
        return self._last["research"] if self._own is None else self._own.research

    @property
    def head(self) -> str:
        return self._last["head"] if self._own is None else self._own.head

    def charge(self, *, kind: Kind, sample_rate: float, noise_multiplier: float, count: int = 1) -> None:
        """Charge on process 0; return, or raise what that raises, on every process, once it is done.

        Privacy: until this returns, no process may read a record.
        """

        def charge_it() -> bytes:
            assert self._own is not None, "process 0 has the ledger"
            self._own.charge(kind=kind, sample_rate=sample_rate, noise_multiplier=noise_multiplier, count=count)
            return _facts(self._own)

        self._last = json.loads(on_first(self._group, charge_it))

    def events(self) -> list[Event]:
        return [Event(**event) for event in self._last["events"]] if self._own is None else self._own.events()

    def charged(self, kind: Kind) -> int:
        return sum(event.count for event in self.events() if event.kind == kind)

    def settle(self) -> None:
        """Give back, on process 0, what was charged ahead. Nothing is exchanged: this may follow an error."""
        if self._own is not None:
            self._own.settle()

    def close(self) -> None:
        """Close, on process 0. Nothing is exchanged."""
        if self._own is not None:
            self._own.close()


def _facts(ledger: Charges) -> bytes:
    """Return what all processes have to know of the ledger."""
    events = [dataclasses.asdict(event) for event in ledger.events()]
    return json.dumps({"head": ledger.head, "research": ledger.research, "events": events}).encode()
