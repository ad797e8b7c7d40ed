# SPDX-License-Identifier: Apache-2.0
"""Which processes of a run have not come, or have gone: asked in the store in which torchrun lets them meet.

When a process ends, the exchange fails on the others, and its error names a socket. They then answer a roll call. An
exchange hardly fails but where somebody is lost, so that whoever is the last without an answer is that one. One of
those that have answered tells it; the others say nothing. A process that ends with an error of its own notes that
first, and then nothing is told of it.
"""

import contextlib
import datetime
import itertools
import os
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Self

from torch.distributed import PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]: documented

from dpquant.errors import GroupError

LAUNCHED = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
"""Set by torchrun, and by every other launcher for torch.distributed."""
_WAIT = datetime.timedelta(seconds=15)  # for the others, which may be in the middle of a step
_GRACE = datetime.timedelta(seconds=0.5)  # for one that has the same error, and nobody may be lost
_BETWEEN = 0.05  # seconds
_number = itertools.count()


class RollCall:
    """The processes of a run as they answer in a store.

    Attributes:
      store: in which they do, of this start of the processes alone.
      rank: of this process.
      size: number of processes.
      name: of this start, the same for all its processes.
    """

    def __init__(self, store: Store, rank: int, size: int, name: str = ""):
        self.store, self.rank, self.size, self.name = store, rank, size, name

    @classmethod
    def of_torchrun(cls, timeout: datetime.timedelta) -> Self | None:
        """Return the roll call of the processes that torchrun has started, once all have come; None without torchrun.

        torchrun keeps one store over all its starts, and torch's own processes may find each other's former addresses
        in it. So these agree on a name for the present start, and use what is under it alone.

        Raises:
          GroupError: some processes have not come in this time. It names them.
        """
        global _present
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            return None
        rank, size, host, port = (os.environ[name] for name in LAUNCHED)
        store = TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
        _present = cls(PrefixStore("dpquant", store), int(rank), int(size)).come(timeout)
        return _present

    def come(self, timeout: datetime.timedelta) -> Self:
        """Return the roll call of this start, once all processes have called this.

        Each process asks under a name that is new. Process 0 answers each with the name of the start, so that nobody
        takes what a former process has left for an answer.

        Raises:
          GroupError: some have not come in this time. Process 0 names them.
        """
        store, rank, question = self.store, self.rank, uuid.uuid4().hex
        if rank > 0:
            store.set(f"asks/{rank}", question)
            try:
                store.wait([question], timeout)
            except RuntimeError:
                raise GroupError(_not_come(self.size, [0], timeout), told_by=False) from None
            start = store.get(question).decode()
            store.set(f"{start}/here/{rank}", "")
            return type(self)(PrefixStore(start, store), rank, self.size, start)
        ends, others = time.monotonic() + timeout.total_seconds(), set(range(1, self.size))
        while others:
            for other in sorted(others):
                if store.check([f"asks/{other}"]):
                    store.set(store.get(f"asks/{other}").decode(), question)
            others = {other for other in others if not store.check([f"{question}/here/{other}"])}
            if others and time.monotonic() > ends:
                raise GroupError(_not_come(self.size, sorted(others), timeout))
            time.sleep(_BETWEEN)
        return type(self)(PrefixStore(question, store), rank, self.size, question)

    def part(self, number: int) -> None:
        """Return once all processes have called this with that number, or do not come."""
        self._missing(f"part-{number}", _WAIT, until=0)

    def leave(self) -> None:
        """Note that this process ends with an error that it tells itself."""
        with contextlib.suppress(RuntimeError):
            self.store.set(f"left/{self.rank}", "")

    def lost(self, timeout: datetime.timedelta = _WAIT) -> tuple[Sequence[int], bool]:
        """Return which processes are lost, and whether it is for this one to tell.

        Nobody tells of processes that have noted that they leave.

        Args:
          timeout: after which those that have not answered count as lost, even if they are several.
        """
        missing = self._missing("after", timeout, until=1)
        gone = [rank for rank in range(self.size) if self.store.check([f"left/{rank}"])]
        first = min((rank for rank in range(self.size) if rank not in missing), default=self.rank)
        return missing, not gone and first == self.rank

    def _missing(self, question: str, timeout: datetime.timedelta, *, until: int) -> list[int]:
        """Answer a question, wait until at most `until` answers are missing, and return whose."""
        self.store.set(f"{question}/{self.rank}", "")
        began = time.monotonic()
        while True:
            missing = [rank for rank in range(self.size) if not self.store.check([f"{question}/{rank}"])]
            waited = datetime.timedelta(seconds=time.monotonic() - began)
            if not missing or waited > timeout or (len(missing) <= until and waited > _GRACE):
                return missing
            time.sleep(_BETWEEN)


_present: RollCall | None = None  # of this process, which takes part in one run of several


@contextlib.contextmanager
def departing() -> Iterator[None]:
    """Context: at its end no process goes before the others have got what it has sent them.

    An error with which the context ends is this process' own, and the others need not tell that it is lost. Every
    process has to enter the context.
    """
    number = next(_number)
    try:
        yield
    except GroupError:
        raise
    except BaseException:
        if _present is not None:
            _present.leave()
        raise
    if _present is not None:
        with contextlib.suppress(RuntimeError):
            _present.part(number)


def lost(error: Exception) -> GroupError:
    """Return the error for an exchange that has failed, after a roll call. Its text has addresses and no data."""
    reason = (str(error).splitlines() or [""])[0]
    missing, told_by = [], True
    with contextlib.suppress(RuntimeError):
        if _present is not None:
            missing, told_by = _present.lost()
    who = f"no answer of {_told(missing)}" if missing else f"a {type(error).__name__}: {reason}"
    return GroupError(
        f"Expected all processes of the run to answer; got {who}. One has ended or cannot be reached, and the others "
        "stop. What was charged stays charged. See that process' output, and resume the run.",
        told_by=told_by,
    )


def _not_come(size: int, missing: Sequence[int], timeout: datetime.timedelta) -> str:
    return (
        f"Expected {size} processes to start; got none of {_told(missing)} within {timeout.seconds} s. Nothing was "
        "charged. See their output, and whether their machines reach that of process 0."
    )


def _told(ranks: Sequence[int]) -> str:
    return ("process " if len(ranks) == 1 else "processes ") + ", ".join(map(str, ranks))
